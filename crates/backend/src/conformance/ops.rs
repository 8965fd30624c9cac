//! Ops without state, each alone in a plan: formats, odd sizes, numbers of rows.

use paceline_gguf::GgmlType;
use paceline_kernels::formats::FORMATS;

use crate::{
    Backend, Buf, Error, LocalKernels, Pairing, PlanBuilder, RopeScaling, RopeSpec, RouterScore, RouterSpec,
    StateConfig, Yarn,
};

use super::{
    Report, Tolerance,
    random::Random,
    rig::{Agree, Part, Record, Rig, Row, Setup, Tensor, Weights},
    scalar::ScalarBackend,
};

/// Rows of a step: one, a few, around a vector's width, more than a verification.
const N_ROWS: [usize; 6] = [1, 2, 3, 8, 17, 33];

/// A plan of one op (and what it takes to see its result).
struct Case<'a> {
    name: String,
    /// Width of the rows handed in; 0 where tokens are read instead.
    width: usize,
    /// Inputs are of `[-size, size)`.
    size: f32,
    tensors: Vec<Tensor>,
    taps: &'a [usize],
    /// Every other row is an output.
    some_outputs: bool,
    agree: Agree,
    record: Record<'a>,
}

fn case<'a>(name: &str, width: usize, tensors: Vec<Tensor>, tolerance: f64, record: Record<'a>) -> Case<'a> {
    let agree = Agree::within(tolerance);
    Case { name: name.into(), width, size: 1.0, tensors, taps: &[], some_outputs: false, agree, record }
}

pub(super) fn check(backend: &dyn Backend, tolerance: Tolerance, report: &mut Report) {
    let mut random = Random::new(1);
    for format in FORMATS {
        let supported = report.n_case;
        for case in format_cases(&mut random, format.ty, tolerance) {
            match run(backend, &mut random, case) {
                Ok(()) => report.n_case += 1,
                Err(Error::UnsupportedType { ty, .. }) => {
                    assert_eq!(supported, report.n_case, "{} is supported for some ops only", ty.name());
                    report.unsupported.push(ty);
                    break;
                }
                Err(error) => panic!("{}: {error}", format.ty.name()),
            }
        }
    }
    row_wise(&mut random, tolerance.other, &mut |random, case| {
        let name = case.name.clone();
        run(backend, random, case).unwrap_or_else(|error| panic!("{name}: {error}"));
        report.n_case += 1;
    });
}

fn run(backend: &dyn Backend, random: &mut Random, case: Case<'_>) -> Result<(), Error> {
    let scalar = ScalarBackend::default();
    let n_token = case.tensors.first().map_or(1, |table| table.n_out);
    let setup = Setup {
        name: case.name,
        tensors: case.tensors,
        states: vec![],
        config: StateConfig::default(),
        plans: vec![case.record],
        taps: case.taps,
    };
    let mut rig = Rig::new(&[&scalar, backend], case.agree, setup)?;
    let mut seq = rig.sequence();
    rig.reserve(&mut seq, N_ROWS[N_ROWS.len() - 1]);
    for n in N_ROWS {
        let mut row = || Row {
            token: random.below(n_token) as u32,
            position: random.below(300_000) as u32,
            input: random.values(case.width, case.size),
        };
        let part = Part { seq: &seq, rows: (0..n).map(|_| row()).collect(), n_certain: n };
        let outputs: Vec<u32> = (0..n as u32).step_by(if case.some_outputs { 2 } else { 1 }).collect();
        rig.step_outputs(0, &[part], &outputs);
    }
    Ok(())
}

/// Ops that read a matrix, in one format.
fn format_cases(random: &mut Random, ty: GgmlType, tolerance: Tolerance) -> Vec<Case<'static>> {
    let name = ty.name();
    let block = ty.block_len();
    let mut cases = Vec::new();
    let width = if block == 1 { 77 } else { 3 * block };
    let table = |random: &mut Random| vec![Tensor::random(random, [width, 37], ty, 1.0)];
    cases.push(case(&format!("embed {name}"), 0, table(random), tolerance.other, &|p, w| {
        p.embed(&w.matrix(0), 1.0)
    }));
    cases.push(case(&format!("embed {name}, scaled"), 0, table(random), tolerance.other, &|p, w| {
        p.embed(&w.matrix(0), 11.3)
    }));
    let wide = 2 * width;
    let halves = vec![Tensor::random(random, [wide, 67], ty, 1.0)];
    let agree = match block {
        1 => Agree::within(tolerance.other),
        _ => Agree::Within { tolerance: tolerance.matmul, size: (wide as f64).sqrt() / 3.0 },
    };
    let halves = case(&format!("matmul {name} of rows side by side"), wide, halves, 0.0, &|p, w| {
        let x = p.input(w.matrix(0).n_in);
        let half = w.matrix(0).n_in / 2;
        let (a, b) = (p.columns(x, 2 * half, 0, half), p.columns(x, 2 * half, half, half));
        let x = p.concat(&[b, a]);
        p.matmul(x, &w.matrix(0))
    });
    cases.push(Case { agree, ..halves });
    let widths = if block == 1 { [1, 77, 300] } else { [block, 2 * block, 3 * block] };
    for (n_in, n_out) in [(widths[0], 1), (widths[1], 5), (widths[2], 67), (widths[1], 259)] {
        let tensors = |random: &mut Random| {
            vec![Tensor::random(random, [n_in, n_out], ty, 1.0), Tensor::vector(random.values(n_out, 2.0))]
        };
        let agree = match block {
            1 => Agree::within(tolerance.other),
            // The rms of an output: each of its products has a mean square of 1/9.
            _ => Agree::Within { tolerance: tolerance.matmul, size: (n_in as f64).sqrt() / 3.0 },
        };
        let name = format!("matmul {name} [{n_in}, {n_out}]");
        let plain = case(&name, n_in, tensors(random), 0.0, &|p, w| {
            let x = p.input(w.matrix(0).n_in);
            p.matmul(x, &w.matrix(0))
        });
        let with_bias = case(&format!("{name} with bias"), n_in, tensors(random), 0.0, &|p, w| {
            let x = p.input(w.matrix(0).n_in);
            p.matmul_bias(x, &w.matrix(0), Some(&w.vector(1)))
        });
        cases.extend([plain, with_bias].map(|case| Case { agree, ..case }));
    }
    // Experts that several rows choose, one, none; outputs of less than a group, of some, of some and a part.
    macro_rules! experts {
        ($n_expert:literal, $n_used:literal, $n_out:literal) => {{
            const N_EXPERT: usize = $n_expert;
            const N_USED: usize = $n_used;
            let n_in = widths[1];
            let tensors =
                |random: &mut Random| vec![Tensor::random(random, [n_in, N_EXPERT * $n_out], ty, 1.0)];
            let agree = match block {
                1 => Agree::within(tolerance.other),
                _ => Agree::Within { tolerance: tolerance.matmul, size: (n_in as f64).sqrt() / 3.0 },
            };
            let name = format!("expert_matmul {name} {N_USED} of {N_EXPERT} experts [{n_in}, {}]", $n_out);
            let shared = case(&name, N_EXPERT + n_in, tensors(random), 0.0, &|p, w| {
                expert_matmul(p, w, N_EXPERT, N_USED, false)
            });
            let name = format!("{name}, an input a slot");
            let own = case(&name, N_EXPERT + N_USED * n_in, tensors(random), 0.0, &|p, w| {
                expert_matmul(p, w, N_EXPERT, N_USED, true)
            });
            cases.extend([shared, own].map(|case| Case { agree, ..case }));
        }};
    }
    experts!(4, 1, 7);
    experts!(5, 3, 64);
    experts!(40, 8, 33);
    cases
}

/// Rows of logits and then the inputs of a product with experts.
fn expert_matmul(p: &mut PlanBuilder<'_>, w: &Weights, n_expert: usize, n_used: usize, own: bool) -> Buf {
    let experts = w.experts(0, n_expert);
    let n_x = if own { n_used * experts.n_in } else { experts.n_in };
    let width = n_expert + n_x;
    let row = p.input(width);
    let (logits, x) = (p.columns(row, width, 0, n_expert), p.columns(row, width, n_expert, n_x));
    let routes = p.router(logits, router(n_used));
    p.expert_matmul(x, routes, &experts)
}

fn router(n_used: usize) -> RouterSpec {
    RouterSpec { n_used, score: RouterScore::Softmax, normalise: true, scale: 1.0, expert_scale: None }
}

/// Ops that handle each row by itself.
fn row_wise(random: &mut Random, tolerance: f64, run: &mut dyn FnMut(&mut Random, Case<'_>)) {
    let weight = |random: &mut Random, n| vec![Tensor::vector(random.values(n, 2.0))];

    for width in [1, 77, 512] {
        let w = weight(random, width);
        run(
            random,
            case("rms_norm of rows", width, w, tolerance, &|p, w| {
                let x = p.input(w.vector(0).len);
                p.rms_norm(x, &w.vector(0), 1e-6)
            }),
        );
    }
    let w = weight(random, 7);
    run(
        random,
        case("rms_norm of heads", 77, w, tolerance, &|p, w| {
            let x = p.input(77);
            p.rms_norm(x, &w.vector(0), 1e-5)
        }),
    );
    run(
        random,
        case("rms_norm of heads without a weight", 77, vec![], tolerance, &|p, _| {
            let x = p.input(77);
            p.rms_norm_plain(x, 7, 1e-5)
        }),
    );
    run(
        random,
        case("scale", 77, vec![], tolerance, &|p, _| {
            let x = p.input(77);
            p.scale(x, 0.7)
        }),
    );
    let w = weight(random, 1);
    run(
        random,
        case("scale by a weight", 77, w, tolerance, &|p, w| {
            let x = p.input(77);
            p.scale_by(x, &w.vector(0))
        }),
    );
    let w = weight(random, 11);
    run(
        random,
        case("gated_rms_norm", 66, w, tolerance, &|p, w| {
            let x = p.input(66);
            let (x, z) = (p.columns(x, 66, 0, 33), p.columns(x, 66, 33, 33));
            p.gated_rms_norm(x, z, &w.vector(0), 1e-6)
        }),
    );

    // More rows than taps, and fewer; three groups of channels, and a channel each.
    for (n_tap, side, n_group) in [(3, 0, 3), (3, 1, 3), (2, 1, 33), (1, 0, 1)] {
        let base = vec![Tensor::random(random, [33, 2 * n_tap], GgmlType::F32, 1.0)];
        let record = move |p: &mut PlanBuilder<'_>, w: &Weights| {
            let (n_delta, width) = (2 * n_tap * n_group, 33 + 2 * n_tap * n_group);
            let x = p.input(width);
            let (x, delta) = (p.columns(x, width, 0, 33), p.columns(x, width, 33, n_delta));
            let kernels = LocalKernels { id: w.matrix(0).id, channels: 33, n_tap, n_side: 2 };
            p.local_conv(x, delta, &kernels, side)
        };
        let width = 33 + 2 * n_tap * n_group;
        run(random, case(&format!("local_conv of {n_tap}, side {side}"), width, base, tolerance, &record));
    }

    for pairing in [Pairing::HalfSplit, Pairing::Adjacent] {
        // Over 400 tokens the three pairs turn 64, 3 and 0.1 times.
        let yarn = Yarn { attn_factor: 0.9, ..Yarn::new(4.0, 400) };
        let half = Yarn { ext_factor: 0.5, ..yarn };
        for (with_factors, scaling) in [
            (false, RopeScaling::None),
            (true, RopeScaling::None),
            (false, RopeScaling::Linear(2.5)),
            (false, RopeScaling::Yarn(yarn)),
            (true, RopeScaling::Yarn(half)),
            (false, RopeScaling::Yarn(Yarn { ext_factor: 0.0, ..yarn })),
        ] {
            let factors = weight_of((0..3).map(|i| 1.0 + 3.5 * i as f32).collect());
            let record = move |p: &mut PlanBuilder<'_>, w: &Weights| {
                let x = p.input(30);
                let factors = with_factors.then_some(w.vector(0).id);
                p.rope(x, 10, &RopeSpec { n_rot: 6, base: 1e4, pairing, factors, scaling })
            };
            run(
                random,
                case(
                    &format!("rope {pairing:?}, factors {with_factors}, {scaling:?}"),
                    30,
                    factors,
                    tolerance,
                    &record,
                ),
            );
        }
    }

    for size in [1.0, 60.0] {
        let tensors = [
            Tensor::vector(random.values(5, 2.0)),
            Tensor::vector(random.values(5, 1.0).iter().map(|x| x - 1.0).collect()),
        ];
        for second in [false, true] {
            let tensors = tensors.iter().map(|t| Tensor::vector(t.values.clone())).collect();
            let record = move |p: &mut PlanBuilder<'_>, w: &Weights| {
                let x = p.input(10);
                let (alpha, b) = (p.columns(x, 10, 0, 5), p.columns(x, 10, 5, 5));
                let (decay, beta) = p.delta_gates(alpha, b, &w.vector(0), &w.vector(1));
                if second { beta } else { decay }
            };
            run(random, Case { size, ..case("delta_gates", 10, tensors, tolerance, &record) });
        }
        run(
            random,
            Case {
                size,
                ..case("silu_mul", 154, vec![], tolerance, &|p, _| {
                    let x = p.input(154);
                    let (gate, up) = (p.columns(x, 154, 0, 77), p.columns(x, 154, 77, 77));
                    p.silu_mul(gate, up)
                })
            },
        );
        run(
            random,
            Case {
                size,
                ..case("gelu_mul", 154, vec![], tolerance, &|p, _| {
                    let x = p.input(154);
                    let (gate, up) = (p.columns(x, 154, 0, 77), p.columns(x, 154, 77, 77));
                    p.gelu_mul(gate, up)
                })
            },
        );
        run(
            random,
            Case {
                size,
                ..case("softcap", 77, vec![], tolerance, &|p, _| {
                    let x = p.input(77);
                    p.softcap(x, 7.5)
                })
            },
        );
        run(
            random,
            Case {
                size,
                ..case("sigmoid_mul", 154, vec![], tolerance, &|p, _| {
                    let x = p.input(154);
                    let (x, gate) = (p.columns(x, 154, 0, 77), p.columns(x, 154, 77, 77));
                    p.sigmoid_mul(x, gate)
                })
            },
        );
    }
    run(
        random,
        case("sigmoid_mul, one gate a row", 78, vec![], tolerance, &|p, _| {
            let x = p.input(78);
            let (x, gate) = (p.columns(x, 78, 0, 77), p.columns(x, 78, 77, 1));
            p.sigmoid_mul(x, gate)
        }),
    );
    for (score, normalise, scale) in [
        (RouterScore::Softmax, true, 1.0),
        (RouterScore::Softmax, false, 2.5),
        (RouterScore::Sigmoid, true, 1.0),
        (RouterScore::Sigmoid, false, 0.5),
    ] {
        for (size, ids) in [(0.01, false), (3.0, false), (3.0, true), (60.0, false)] {
            let record = move |p: &mut PlanBuilder<'_>, _: &Weights| {
                let x = p.input(37);
                let routes =
                    p.router(x, RouterSpec { n_used: 5, score, normalise, scale, expert_scale: None });
                if ids { routes.ids } else { routes.weights }
            };
            let name = format!("router {score:?}, normalise {normalise}, scale {scale}");
            run(random, Case { size, ..case(&name, 37, vec![], tolerance, &record) });
        }
    }
    let w = weight(random, 37);
    run(
        random,
        case("router, a factor for each expert", 37, w, tolerance, &|p, w| {
            let x = p.input(37);
            p.router(x, RouterSpec { expert_scale: Some(w.vector(0).id), ..router(5) }).weights
        }),
    );
    run(
        random,
        case("weighted_sum", 40 + 8 * 33, vec![], tolerance, &|p, _| {
            let x = p.input(40 + 8 * 33);
            let (logits, x) = (p.columns(x, 304, 0, 40), p.columns(x, 304, 40, 8 * 33));
            let routes = p.router(logits, router(8));
            p.weighted_sum(x, routes)
        }),
    );
    run(
        random,
        case("add", 2 * 4099, vec![], tolerance, &|p, _| {
            let x = p.input(2 * 4099);
            let (a, b) = (p.columns(x, 2 * 4099, 0, 4099), p.columns(x, 2 * 4099, 4099, 4099));
            p.add(a, b)
        }),
    );
    run(
        random,
        case("columns", 77, vec![], tolerance, &|p, _| {
            let x = p.input(77);
            p.columns(x, 11, 4, 3)
        }),
    );
    run(
        random,
        case("concat", 77, vec![], tolerance, &|p, _| {
            let x = p.input(77);
            let [a, b] = [(0, 3), (5, 2)].map(|(first, len)| p.columns(x, 7, first, len));
            p.concat(&[a, b, a])
        }),
    );
    run(
        random,
        Case {
            some_outputs: true,
            ..case("select_outputs", 77, vec![], tolerance, &|p, _| {
                let x = p.input(77);
                p.select_outputs(x)
            })
        },
    );
    run(
        random,
        Case {
            taps: &[2, 0, 2],
            ..case("taps", 33, vec![], tolerance, &|p, _| {
                let x = p.input(33);
                p.tap(0, x);
                let y = p.add(x, x);
                p.tap(1, y);
                p.tap(2, y);
                p.add(x, y)
            })
        },
    );
}

fn weight_of(values: Vec<f32>) -> Vec<Tensor> {
    vec![Tensor::vector(values)]
}
