//! The CPU backend against the definition of every op, against itself, and after panics.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use paceline_kernels::formats::{FORMATS, quantize_rows};

use super::*;
use crate::{
    AttentionOp, BlockMask, Buf, Experts, KvType, Lane, Matrix, PageId, PageTable, PlanBuilder, RouterScore,
    RouterSpec, SlotId, StateId, Step, StepOut, Tap, Vector, WeightSource,
    conformance::{self, EIGHT_BIT_ACTIVATIONS, Tolerance, random::Random},
};

/// A backend that shares every wave, however little there is to do.
fn eager(n_threads: usize) -> CpuBackend {
    CpuBackend { share_from: 0, ..CpuBackend::new(n_threads).unwrap() }
}

/// A backend that packs nothing.
fn unpacked(backend: CpuBackend) -> CpuBackend {
    CpuBackend { packs: false, ..backend }
}

#[test]
fn every_op_is_as_defined() {
    let exact = Tolerance::default();
    let packed = Tolerance { matmul: EIGHT_BIT_ACTIVATIONS, ..exact };
    let backends = [
        (CpuBackend::new(1).unwrap(), packed),
        (eager(2), packed),
        (unpacked(CpuBackend::new(1).unwrap()), exact),
        (unpacked(eager(2)), exact),
    ];
    for (backend, tolerance) in backends {
        let report = conformance::check(&backend, tolerance);
        assert_eq!(report.unsupported, [], "the CPU computes with every format");
        assert!(report.n_case > 10 * FORMATS.len(), "{} cases", report.n_case);
    }
}

#[test]
fn every_bit_is_the_same_however_rows_are_cut_and_whoever_computes() {
    conformance::check_bits(&[
        &CpuBackend::new(1).unwrap(),
        &eager(2),
        &CpuBackend::new(2).unwrap(),
        &eager(5),
    ]);
    conformance::check_bits(&[&unpacked(CpuBackend::new(1).unwrap()), &unpacked(eager(2))]);
}

fn upload(backend: &dyn Backend, random: &mut Random, n_in: usize, n_out: usize) -> Matrix {
    let data = quantize_rows(GgmlType::F32, n_in, &random.values(n_in * n_out, 0.5));
    let tensors = [("w", [n_in as u64, n_out as u64], GgmlType::F32, data)];
    let file = Gguf::from_bytes("test", to_bytes(&Metadata::new(), &tensors).unwrap()).unwrap();
    let id = backend.upload(&WeightSource { file: Arc::new(file), tensor: 0 }).unwrap();
    Matrix { id, n_in, n_out }
}

/// A plan of random row ops in which buffers are read soon, late, often or once.
fn random_plan(backend: &dyn Backend, random: &mut Random) -> Plan {
    let widths = [7, 12, 30];
    let matrices: Vec<Matrix> = widths
        .iter()
        .flat_map(|&n_in| widths.map(|n_out| (n_in, n_out)))
        .map(|(n_in, n_out)| upload(backend, random, n_in, n_out))
        .collect();
    let norms = widths.map(|len| Vector { id: upload(backend, random, len, 1).id, len });
    let mut p = PlanBuilder::new(&[Tap::Layer(0), Tap::Layer(1)]);
    let mut bufs: Vec<Buf> = vec![p.input(30)];
    let mut unread = bufs.clone();
    for i in 0..40 {
        let at = random.below(bufs.len());
        // Half of the time something recent.
        let src = if random.below(2) == 0 { bufs[at] } else { bufs[bufs.len() - 1 - at.min(2)] };
        let width = p.width(src);
        let twin = |random: &mut Random, p: &PlanBuilder<'_>| {
            let same: Vec<Buf> = bufs.iter().copied().filter(|b| p.width(*b) == width).collect();
            same[random.below(same.len())]
        };
        let other = twin(random, &p);
        let kind = random.below(6);
        let dst = match kind {
            0 => p.add(src, other),
            1 => p.silu_mul(src, other),
            2 => p.sigmoid_mul(src, other),
            3 => p.rms_norm(src, norms.iter().find(|n| n.len == width).unwrap(), 1e-3),
            _ => {
                let fitting: Vec<&Matrix> = matrices.iter().filter(|m| m.n_in == width).collect();
                p.matmul(src, fitting[random.below(fitting.len())])
            }
        };
        unread.retain(|b| *b != src && (kind > 2 || *b != other));
        bufs.push(dst);
        unread.push(dst);
        if i == 10 || i == 30 {
            let m = matrices.iter().find(|m| m.n_in == p.width(dst) && m.n_out == 12).unwrap();
            let x = p.matmul(dst, m);
            p.tap(i / 20, x);
        }
    }
    let mut sum = None;
    for buf in bufs.into_iter().filter(|b| random.below(3) == 0 || unread.contains(b)) {
        let m = matrices.iter().find(|m| m.n_in == p.width(buf) && m.n_out == 7).unwrap();
        let x = p.matmul(buf, m);
        sum = Some(sum.map_or(x, |sum| p.add(sum, x)));
    }
    let x = p.select_outputs(sum.unwrap());
    let y = p.silu_mul(x, x);
    let x = p.add(x, y);
    p.finish(Some(x))
}

/// What the plan makes of some rows.
fn replay(backend: &CpuBackend, plan: Plan, input: &[f32], n: usize) -> StepOut {
    let states = backend.alloc_states(&[], StateConfig::default()).unwrap();
    let mut exec = backend.compile(Arc::new(plan), &states).unwrap();
    let positions: Vec<u32> = (0..n as u32).collect();
    let outputs: Vec<u32> = positions.iter().copied().filter(|i| i % 3 != 1).collect();
    let lanes = [Lane { rows: 0..n, n_past: 0, n_certain: n, tables: &[], slot: None }];
    let step =
        Step { tokens: &positions, inputs: input, positions: &positions, lanes: &lanes, outputs: &outputs };
    let mut out = StepOut::default();
    exec.run(&step, &mut out);
    out
}

#[test]
fn a_shared_arena_is_as_good_as_memory_for_every_buffer() {
    let backend = eager(2);
    let mut random = Random::new(5);
    let mut saved = 0;
    for _ in 0..40 {
        let plan = random_plan(&backend, &mut random);
        let mut apart = plan.clone();
        apart.arena_width = [0, 0];
        for (decl, offset) in plan.bufs.iter().zip(&mut apart.offsets) {
            *offset = apart.arena_width[decl.rows as usize];
            apart.arena_width[decl.rows as usize] += decl.width;
        }
        saved += apart.arena_width[0] - plan.arena_width[0];
        let input = random.values(30 * 5, 1.0);
        let text = plan.to_string();
        let (a, b) = (replay(&backend, plan, &input, 5), replay(&backend, apart, &input, 5));
        assert!(a.output.iter().chain(&a.taps).all(|x| x.is_finite()), "{text}");
        assert_eq!((a.output, a.taps), (b.output, b.taps), "{text}");
    }
    assert!(saved > 0, "placement shares memory at all");
}

/// Stores are filled by other ops than those that read the floats, and shared by buffers of one width.
#[test]
fn a_product_multiplies_the_rows_of_its_own_input() {
    for seed in 10..30 {
        let [packed, floats] = [eager(2), unpacked(eager(2))].map(|backend| {
            let mut random = Random::new(seed);
            let plan = random_plan(&backend, &mut random);
            replay(&backend, plan, &random.values(30 * 5, 1.0), 5)
        });
        let greatest = floats.output.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let apart =
            packed.output.iter().zip(&floats.output).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(apart <= 1e-4 * greatest, "plan {seed}: {apart} of {greatest}");
        assert_ne!(packed.output, floats.output, "plan {seed}: sums in another order");
    }
}

#[test]
fn matrices_are_packed_once_and_tables_not_at_all() {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = reports.clone();
    let backend = eager(2).on_progress(move |done, all| seen.lock().unwrap().push((done, all)));
    let mut random = Random::new(3);
    let [a, b, table] =
        [(8, 40), (40, 8), (8, 8)].map(|(n_in, n_out)| upload(&backend, &mut random, n_in, n_out));
    let compile = |matrices: [&Matrix; 2]| {
        let mut p = PlanBuilder::new(&[]);
        let x = p.embed(&table, 1.0);
        let x = p.matmul(x, matrices[0]);
        let x = p.matmul(x, matrices[1]);
        let plan = p.finish(Some(x));
        let states = backend.alloc_states(&[], StateConfig::default()).unwrap();
        backend.compile(Arc::new(plan), &states).unwrap();
        let mut reports = std::mem::take(&mut *reports.lock().unwrap());
        reports.sort();
        reports
    };
    let all = 4 * (8 * 40 + 40 * 8);
    let first = compile([&a, &b]);
    assert!(first.len() > 2 && first.iter().all(|report| report.1 == all), "{first:?}");
    assert_eq!(first.last(), Some(&(all, all)));
    assert_eq!(compile([&a, &b]), []);
    assert_eq!([a.id, b.id, table.id].map(|id| backend.weight(id).packed().is_some()), [true, true, false]);
    let c = upload(&backend, &mut random, 40, 8);
    assert_eq!(compile([&a, &c]), [(4 * 40 * 8, 4 * 40 * 8)]);
}

/// Keys, values and queries from the input; a page that has no storage panics in the middle of a step.
#[test]
fn a_panicking_step_leaves_the_others_alone() {
    for backend in [CpuBackend::new(1).unwrap(), eager(3)] {
        let decls = [
            StateDecl::Kv { n_head: 1, head_dim: 4, window: None },
            StateDecl::ConvTail { channels: 4, width: 3 },
        ];
        let config = StateConfig { page_len: 4, kv: KvType::F16.into(), n_tentative_max: 4 };
        let states = backend.alloc_states(&decls, config).unwrap();
        let conv = upload(&backend, &mut Random::new(6), 3, 4);
        let mut p = PlanBuilder::new(&[]);
        let x = p.input(4);
        let q = p.short_conv(StateId(1), x, &conv);
        p.kv_append(StateId(0), x, q);
        let (state, n_head, scale, mask) = (StateId(0), 1, 0.5, BlockMask::Causal);
        let y =
            p.attention(|dst| AttentionOp { state, q, dst, n_head, scale, mask, window: None, sinks: None });
        let mut exec = backend.compile(Arc::new(p.finish(Some(y))), &states).unwrap();

        let mut run = |pages: &[PageId], slot: SlotId, n_past: usize| {
            let input = Random::new(n_past as u64).values(8, 1.0);
            let tables = [PageTable::whole(pages.to_vec())];
            let lanes = [Lane { rows: 0..2, n_past, n_certain: 1, tables: &tables, slot: Some(slot) }];
            let (two, outputs) = ([n_past as u32, n_past as u32 + 1], [0, 1]);
            let step =
                Step { tokens: &two, inputs: &input, positions: &two, lanes: &lanes, outputs: &outputs };
            let mut out = StepOut::default();
            catch_unwind(AssertUnwindSafe(|| exec.run(&step, &mut out))).map(|()| {
                states.slot_commit(slot, 1);
                out.output
            })
        };
        let [good, alone] = [[PageId(0), PageId(1)], [PageId(2), PageId(3)]];
        good.iter().chain(&alone).for_each(|page| states.page_alloc(*page, 0));
        [0, 1, 2].iter().for_each(|slot| states.slot_reset(SlotId(*slot)));
        let want = [0, 2, 4].map(|n_past| run(&alone, SlotId(1), n_past).unwrap());
        for (i, want) in want.iter().enumerate() {
            let panic = run(&[PageId(9), PageId(9)], SlotId(2), 0).unwrap_err();
            drop(panic);
            states.slot_reset(SlotId(2));
            assert_eq!(&run(&good, SlotId(0), 2 * i).unwrap(), want, "after {} panics", i + 1);
        }
    }
}

/// Pages of a window go and come all the time: what one left, the next one has. Others go back to the system.
#[test]
fn pages_of_windows_are_used_again() {
    let backend = CpuBackend::new(1).unwrap();
    let kv = |window| StateDecl::Kv { n_head: 1, head_dim: 4, window };
    let config = StateConfig { page_len: 4, ..StateConfig::default() };
    let states = backend.alloc_states(&[kv(Some(8)), kv(None)], config).unwrap();
    for (class, is_kept) in [(0, false), (1, true)] {
        let mark = vec![7; states.page_bytes(class)];
        states.page_alloc(PageId(3), class);
        assert!(states.page_import(PageId(3), &mark));
        states.page_release(PageId(3));
        states.page_alloc(PageId(5), class);
        let mut found = Vec::new();
        states.page_export(PageId(5), &mut found);
        assert_eq!(found == mark, is_kept, "class {class}");
        states.page_release(PageId(5));
    }
}

/// The first step is the largest, or the smallest, or has no outputs: buffers follow.
#[test]
fn the_size_of_one_step_does_not_bind_the_next() {
    let backend = eager(2);
    let mut random = Random::new(7);
    let plan = Arc::new(random_plan(&backend, &mut random));
    let states = backend.alloc_states(&[], StateConfig { page_len: 512, ..StateConfig::default() }).unwrap();
    let mut kept = backend.compile(plan.clone(), &states).unwrap();
    let mut kept_out = StepOut::default();
    for n in [1, 33, 2, 257, 16, 1, 8] {
        let input = random.values(30 * n, 1.0);
        let positions: Vec<u32> = (0..n as u32).collect();
        for outputs in [&positions[..], &[], &positions[n - 1..]] {
            let lanes = [Lane { rows: 0..n, n_past: 0, n_certain: n, tables: &[], slot: None }];
            let step =
                Step { tokens: &positions, inputs: &input, positions: &positions, lanes: &lanes, outputs };
            let mut fresh_out = StepOut::default();
            backend.compile(plan.clone(), &states).unwrap().run(&step, &mut fresh_out);
            kept.run(&step, &mut kept_out);
            assert_eq!(kept_out.output.len(), outputs.len() * 7);
            assert_eq!((&kept_out.output, &kept_out.taps), (&fresh_out.output, &fresh_out.taps), "{n} rows");
        }
    }
}

/// A mixture of experts over rows of logits and activations, behind a router's choice.
struct Mixture {
    n_expert: usize,
    n_used: usize,
    n_embd: usize,
    n_ff: usize,
    ty: GgmlType,
}

impl Mixture {
    fn width(&self) -> usize {
        self.n_expert + self.n_embd
    }

    /// Weights from a seed, the same on every backend.
    fn exec(&self, backend: &dyn Backend) -> Box<dyn Exec> {
        let mut random = Random::new(11);
        let mut experts = |n_in: usize, n_out: usize| {
            let data = quantize_rows(self.ty, n_in, &random.values(n_in * n_out * self.n_expert, 0.5));
            let shape = [n_in as u64, n_out as u64, self.n_expert as u64];
            let file = to_bytes(&Metadata::new(), &[("w", shape, self.ty, data)]).unwrap();
            let file = Arc::new(Gguf::from_bytes("test", file).unwrap());
            let id = backend.upload(&WeightSource { file, tensor: 0 }).unwrap();
            Experts { id, n_in, n_out, n_expert: self.n_expert }
        };
        let (n_embd, n_ff) = (self.n_embd, self.n_ff);
        let [gate, up, down] = [(n_embd, n_ff), (n_embd, n_ff), (n_ff, n_embd)].map(|(i, o)| experts(i, o));
        let mut p = PlanBuilder::new(&[]);
        let row = p.input(self.width());
        let logits = p.columns(row, self.width(), 0, self.n_expert);
        let x = p.columns(row, self.width(), self.n_expert, n_embd);
        let n_used = self.n_used;
        let routes = p.router(
            logits,
            RouterSpec {
                n_used,
                score: RouterScore::Softmax,
                normalise: true,
                scale: 1.0,
                expert_scale: None,
            },
        );
        let [gate, up] = [gate, up].map(|w| p.expert_matmul(x, routes, &w));
        let h = p.silu_mul(gate, up);
        let y = p.expert_matmul(h, routes, &down);
        let y = p.weighted_sum(y, routes);
        let states = backend.alloc_states(&[], StateConfig { page_len: 512, ..Default::default() }).unwrap();
        backend.compile(Arc::new(p.finish(Some(y))), &states).unwrap()
    }

    /// Rows whose logits are random, have ties, or are the same in all rows.
    fn rows(&self, random: &mut Random, n: usize, kind: usize) -> Vec<f32> {
        let same = random.values(self.n_expert, 2.0);
        let logits = |random: &mut Random| match kind {
            0 => random.values(self.n_expert, 2.0),
            1 => (0..self.n_expert).map(|_| random.below(3) as f32).collect(),
            _ => same.clone(),
        };
        (0..n).flat_map(|_| [logits(random), random.values(self.n_embd, 1.0)].concat()).collect()
    }
}

fn run_rows(exec: &mut dyn Exec, input: &[f32], n: usize) -> StepOut {
    let positions: Vec<u32> = (0..n as u32).collect();
    let lanes = [Lane { rows: 0..n, n_past: 0, n_certain: n, tables: &[], slot: None }];
    let mut out = StepOut::default();
    exec.run(
        &Step { tokens: &[], inputs: input, positions: &positions, lanes: &lanes, outputs: &positions },
        &mut out,
    );
    out
}

/// Batched is alone, bit for bit, whatever the threads; and all of it is the definition.
#[test]
fn experts_give_a_row_the_same_bits_whoever_shares_them() {
    let mut random = Random::new(12);
    for case in 0..24 {
        // The first are corners: all experts, one, more than the rows can choose, an odd format without a packed form.
        let ty =
            [GgmlType::Q8_0, GgmlType::F32, GgmlType::Q4_0, GgmlType::Q5_0, GgmlType::BF16, GgmlType::IQ4_NL]
                [case % 6];
        let n_expert = [4, 128, 8, 5][case % 4] + random.below(4);
        let width = |random: &mut Random| match ty.block_len() {
            1 => 1 + random.below(150),
            block => block * (1 + random.below(3)),
        };
        let mixture = Mixture {
            n_expert,
            n_used: if case < 2 { 8.min(n_expert) } else { 1 + random.below(8.min(n_expert)) },
            n_embd: width(&mut random),
            n_ff: width(&mut random),
            ty,
        };
        let n = [1, 2, 5, 33, 70][case % 5];
        let input = mixture.rows(&mut random, n, case % 3);
        let at = format!(
            "case {case}: {} of {n_expert} experts in {ty}, {} and {} wide, {n} rows",
            mixture.n_used, mixture.n_embd, mixture.n_ff
        );

        let want = run_rows(&mut *mixture.exec(&CpuBackend::new(1).unwrap()), &input, n);
        for n_threads in [2, 5] {
            let mut exec = mixture.exec(&eager(n_threads));
            let got = run_rows(&mut *exec, &input, n);
            assert_eq!(got.output, want.output, "{at}: {n_threads} threads");
            // Alone, in another order, in twos: the same rows.
            let mut read = 0;
            for chunk in [1, 2] {
                for (i, part) in input.chunks(chunk * mixture.width()).enumerate().rev() {
                    let got = run_rows(&mut *exec, part, part.len() / mixture.width());
                    let first = i * chunk * mixture.n_embd;
                    assert_eq!(got.output, want.output[first..first + got.output.len()], "{at}: row {i}");
                    assert!(got.n_experts_read >= mixture.n_used, "{at}");
                    read = read.max(got.n_experts_read);
                }
            }
            let most = n_expert.min(n * mixture.n_used);
            assert!((read..=most).contains(&want.n_experts_read), "{at}: {} read", want.n_experts_read);
            if case % 3 == 2 {
                assert_eq!(want.n_experts_read, mixture.n_used, "{at}: all rows choose the same");
            }
        }

        let scalar = conformance::ScalarBackend::default();
        let exact = run_rows(&mut *mixture.exec(&scalar), &input, n);
        let floats = run_rows(&mut *mixture.exec(&unpacked(eager(2))), &input, n);
        let greatest = exact.output.iter().fold(0.1f32, |max, x| max.max(x.abs()));
        let quantised = paceline_kernels::packed::grain(ty).is_some() && ty.is_quantized();
        for (got, tolerance) in [(&want, if quantised { 0.04 } else { 1e-5 }), (&floats, 1e-5)] {
            let off = got.output.iter().zip(&exact.output).map(|(a, b)| (a - b).abs());
            let off = off.fold(0.0, f32::max) / greatest;
            assert!(off <= tolerance, "{at}: {off} of {greatest}");
        }
    }
}

/// What is not a number is seen in its own row, and nowhere else.
#[test]
fn a_router_shows_nan() {
    let mixture = Mixture { n_expert: 6, n_used: 2, n_embd: 32, n_ff: 64, ty: GgmlType::Q8_0 };
    let mut exec = mixture.exec(&eager(2));
    let mut input = mixture.rows(&mut Random::new(1), 3, 0);
    let want = run_rows(&mut *exec, &input, 3).output;
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
        input[mixture.width() + 4] = bad;
        let got = run_rows(&mut *exec, &input, 3).output;
        assert!(got[32..64].iter().all(|x| x.is_nan()), "{bad}");
        assert_eq!([&got[..32], &got[64..]], [&want[..32], &want[64..]]);
    }
}

/// Wide rows, so that threads share them in chunks; the plain way of the trait's users says what they come to.
#[test]
fn output_rows_are_summarised() {
    let (n_in, n_out, mut random) = (24, 10_000, Random::new(5));
    for backend in [CpuBackend::new(1).unwrap(), eager(3)] {
        let w = upload(&backend, &mut random, n_in, n_out);
        let mut p = PlanBuilder::new(&[]);
        let src = p.input(n_in);
        let src = p.select_outputs(src);
        let out = p.matmul(src, &w);
        let config = StateConfig { page_len: 16, kv: KvType::F32.into(), n_tentative_max: 0 };
        let states = backend.alloc_states(&[], config).unwrap();
        let mut exec = backend.compile(Arc::new(p.finish(Some(out))), &states).unwrap();
        for n in [1, 3, 2] {
            let (mut out, inputs) = (StepOut::default(), random.values(n * n_in, 1.0));
            let outputs: Vec<u32> = (0..n as u32).collect();
            let tokens = vec![0; n];
            let lanes = [Lane { rows: 0..n, n_past: 0, n_certain: n, tables: &[], slot: None }];
            exec.run(
                &Step {
                    tokens: &tokens,
                    inputs: &inputs,
                    positions: &outputs,
                    lanes: &lanes,
                    outputs: &outputs,
                },
                &mut out,
            );
            let got = out.summaries.clone();
            out.summarize();
            assert_eq!(got, out.summaries, "{n} rows");
            for (i, summary) in got.iter().enumerate() {
                let row = out.output_row(i);
                let best = (0..n_out).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
                assert_eq!((summary.at as usize, summary.max), (best, row[best]));
            }
        }
    }
}
