//! Ops with state: random runs of steps over several sequences, with rejected rows, copies and resets.
//!
//! Every step's rows see what earlier steps and commits left, so a state that went wrong shows in the rows after
//! it. Recurrent states are also read back whole: a step of tentative rows that are never committed asks a delta
//! rule for its matrix column by column, and a convolution for each row of its tail.

use paceline_gguf::GgmlType;

use crate::{
    AttentionOp, Backend, BlockMask, Buf, HeadMap, KvType, KvTypes, PlanBuilder, StateConfig, StateDecl,
    StateId,
};

use super::{
    Report, Tolerance,
    random::Random,
    rig::{Agree, Part, Rig, Row, Sequence, Setup, Tensor, Weights},
    scalar::ScalarBackend,
};

/// Rounds of a run; each is a step of some sequences and a commit.
const N_ROUND: usize = 24;
/// The most rows of a lane. Whole heads of a delta rule are read back within that, too.
const N_TENTATIVE_MAX: usize = 16;

pub(super) fn check(backend: &dyn Backend, tolerance: Tolerance, report: &mut Report) {
    let mut random = Random::new(2);
    for setup in attention_cases(&mut random) {
        attention(backend, tolerance, &mut random, &setup);
        report.n_case += 1;
    }
    for (channels, width) in [(5, 4), (259, 4), (64, 2), (33, 7), (3, 1)] {
        short_conv(backend, tolerance, &mut random, channels, width);
        report.n_case += 1;
    }
    for (heads, n_head_k, n_head_v, dim_k, dim_v) in [
        (HeadMap::Tiled, 2, 4, 8, 6),
        (HeadMap::Grouped, 2, 4, 8, 6),
        (HeadMap::Tiled, 3, 3, 16, 16),
        (HeadMap::Grouped, 1, 3, 5, 7),
        (HeadMap::Tiled, 3, 6, 1, 17),
    ] {
        delta_rule(
            backend,
            tolerance,
            &mut random,
            heads,
            &StateDecl::Delta { n_head_k, n_head_v, dim_k, dim_v },
        );
        report.n_case += 1;
    }
}

/// Steps of random sequences in random order, with random parts of them certain and committed. `input` makes
/// the values of a row; `after` runs behind each commit.
fn run(
    rig: &mut Rig,
    random: &mut Random,
    input: &dyn Fn(&mut Random) -> Vec<f32>,
    after: &mut dyn FnMut(&mut Rig, &mut Sequence, &mut Random),
) {
    let mut seqs: Vec<Sequence> = (0..3).map(|_| rig.sequence()).collect();
    for round in 0..N_ROUND {
        if round == N_ROUND / 2 {
            let fork = rig.fork(&seqs[0]);
            seqs.push(fork);
            rig.reset(&mut seqs[1]);
        }
        let lanes: Vec<usize> = random.order(seqs.len()).split_off(random.below(seqs.len()));
        // (rows, of which certain, of which final)
        let sizes: Vec<[usize; 3]> = lanes
            .iter()
            .map(|&s| {
                // Mostly short ones, and one long prompt.
                let most = 1 + random.below(9);
                let n = if round == 0 { 13 + s } else { 1 + random.below(most) };
                let n_certain = random.below(n + 1);
                [n, n_certain, n_certain + random.below(n - n_certain + 1)]
            })
            .collect();
        for (&s, [n, ..]) in lanes.iter().zip(&sizes) {
            rig.reserve(&mut seqs[s], *n);
        }
        let parts: Vec<Part<'_>> = lanes
            .iter()
            .zip(&sizes)
            .map(|(&s, &[n, n_certain, _])| {
                let row =
                    |i: usize| Row { token: 0, position: (seqs[s].n_past + i) as u32, input: input(random) };
                Part { seq: &seqs[s], rows: (0..n).map(row).collect(), n_certain }
            })
            .collect();
        rig.step(0, &parts);
        drop(parts);
        for (&s, &[_, n_certain, n_final]) in lanes.iter().zip(&sizes) {
            rig.commit(&mut seqs[s], n_final, n_certain);
            after(rig, &mut seqs[s], random);
        }
    }
}

/// A tentative step that leaves nothing behind.
fn probe(rig: &mut Rig, plan: usize, seq: &mut Sequence, inputs: Vec<Vec<f32>>) {
    rig.reserve(seq, inputs.len());
    let rows = inputs.into_iter().map(|input| Row { input, ..Row::default() }).collect();
    rig.step(plan, &[Part { seq, rows, n_certain: 0 }]);
    rig.commit(seq, 0, 0);
}

#[derive(Clone)]
struct AttentionCase {
    n_head: usize,
    n_head_kv: usize,
    head_dim: usize,
    mask: BlockMask,
    window: Option<usize>,
    sinks: bool,
    kv: KvTypes,
    page_len: usize,
}

fn attention_cases(random: &mut Random) -> Vec<AttentionCase> {
    let mut cases = Vec::new();
    for (n_head, n_head_kv, head_dim) in [(1, 1, 4), (4, 2, 10), (6, 2, 33), (10, 1, 8)] {
        for mask in [BlockMask::Causal, BlockMask::Full] {
            for window in [None, Some(1), Some(7)] {
                for kv in [KvType::F32, KvType::F16, KvType::Bf16].map(KvTypes::from) {
                    cases.push(AttentionCase {
                        n_head,
                        n_head_kv,
                        head_dim,
                        mask,
                        window,
                        sinks: random.below(2) == 0,
                        kv,
                        page_len: [1, 4, 16][random.below(3)],
                    });
                }
            }
        }
    }
    // Heads of whole blocks, every type for keys and for values, beside another.
    for (i, ty) in KvType::ALL.into_iter().enumerate() {
        for kv in [KvTypes { k: ty, v: KvType::F16 }, KvTypes { k: KvType::ALL[(i + 3) % 8], v: ty }] {
            cases.push(AttentionCase {
                n_head: 6,
                n_head_kv: 2,
                head_dim: [32, 64, 96][i % 3],
                mask: BlockMask::Causal,
                window: None,
                sinks: random.below(2) == 0,
                kv,
                page_len: [5, 16, 32][random.below(3)],
            });
        }
    }
    cases
}

fn attention(backend: &dyn Backend, tolerance: Tolerance, random: &mut Random, case: &AttentionCase) {
    let &AttentionCase { n_head, n_head_kv, head_dim, mask, window, sinks, kv, page_len } = case;
    let (n_q, n_kv) = (n_head * head_dim, n_head_kv * head_dim);
    let width = n_q + 2 * n_kv;
    let record = move |p: &mut PlanBuilder<'_>, w: &Weights| {
        let x = p.input(width);
        let (k, v) = (p.columns(x, width, n_q, n_kv), p.columns(x, width, n_q + n_kv, n_kv));
        // A second state's keys are the first one's values.
        p.kv_append(StateId(1), v, k);
        p.kv_append(StateId(0), k, v);
        let q = p.columns(x, width, 0, n_q);
        let mut attend = |state, mask| {
            p.attention(|dst| AttentionOp {
                state: StateId(state),
                q,
                dst,
                n_head,
                scale: 0.7,
                mask,
                window,
                sinks: sinks.then(|| w.vector(0).id),
            })
        };
        let (a, b) = (attend(0, mask), attend(1, BlockMask::Causal));
        p.add(a, b)
    };
    // Queries without keys, as another model would have them: over what is committed, with no page beyond it.
    let look = move |p: &mut PlanBuilder<'_>, w: &Weights| {
        let q = p.input(n_q);
        p.attention(|dst| AttentionOp {
            state: StateId(1),
            q,
            dst,
            n_head,
            scale: 0.7,
            mask: BlockMask::Past,
            window,
            sinks: sinks.then(|| w.vector(0).id),
        })
    };
    let setup = Setup {
        name: format!(
            "attention {n_head}/{n_head_kv} heads of {head_dim}, {mask:?}, window {window:?}, {kv}"
        ),
        tensors: vec![Tensor::vector(random.values(n_head, 3.0))],
        // The second one keeps all cells or as few, and so has pages of its own or shares them.
        states: [window, window.filter(|_| sinks)]
            .map(|window| StateDecl::Kv { n_head: n_head_kv, head_dim, window })
            .to_vec(),
        config: StateConfig { page_len, kv, n_tentative_max: N_TENTATIVE_MAX },
        plans: vec![&record, &look],
        taps: &[],
    };
    let scalar = ScalarBackend::default();
    let mut rig = Rig::new(&[&scalar, backend], Agree::within(tolerance.other), setup)
        .unwrap_or_else(|error| panic!("attention: {error}"));
    run(&mut rig, random, &|random| random.values(width, 2.0), &mut |rig, seq, random| {
        rig.give_back(seq);
        // The first of two rows sees something, and with a window of 1 neither does.
        if seq.n_past > 1 && window != Some(1) {
            let mut past = seq.clone();
            for table in &mut past.tables {
                table.pages.truncate(seq.n_past.div_ceil(page_len) - table.first);
            }
            let mut row = || Row { input: random.values(n_q, 2.0), ..Row::default() };
            rig.step(1, &[Part { seq: &past, rows: vec![row(), row()], n_certain: 0 }]);
        }
    });
}

fn short_conv(
    backend: &dyn Backend,
    tolerance: Tolerance,
    random: &mut Random,
    channels: usize,
    width: usize,
) {
    let state = StateId(0);
    let tap_weight = |tap: usize| {
        let values = (0..channels * width).map(|i| if i % width == tap { 1.0 } else { 0.0 }).collect();
        Tensor { n_in: width, n_out: channels, ty: GgmlType::F32, values }
    };
    let conv = |i: usize| {
        move |p: &mut PlanBuilder<'_>, w: &Weights| -> Buf {
            let x = p.input(channels);
            p.short_conv(state, x, &w.matrix(i))
        }
    };
    // Plan 0 is the convolution; plan 1 + t reads what tap t sees, the rows of the tail among it.
    let plans: Vec<_> = (0..=width).map(conv).collect();
    let weight = Tensor::random(random, [width, channels], GgmlType::F32, 1.0);
    let setup = Setup {
        name: format!("short_conv of {channels} channels, {width} taps"),
        tensors: std::iter::once(weight).chain((0..width).map(tap_weight)).collect(),
        states: vec![StateDecl::ConvTail { channels, width }],
        config: StateConfig { page_len: 8, kv: KvType::F32.into(), n_tentative_max: N_TENTATIVE_MAX },
        plans: plans.iter().map(|plan| plan as _).collect(),
        taps: &[],
    };
    let scalar = ScalarBackend::default();
    let mut rig = Rig::new(&[&scalar, backend], Agree::within(tolerance.other), setup)
        .unwrap_or_else(|error| panic!("short_conv: {error}"));
    run(&mut rig, random, &|random| random.values(channels, 2.0), &mut |rig, seq, _| {
        (1..=width).for_each(|plan| probe(rig, plan, seq, vec![vec![0.5; channels]]));
    });
}

fn delta_rule(
    backend: &dyn Backend,
    tolerance: Tolerance,
    random: &mut Random,
    heads: HeadMap,
    decl: &StateDecl,
) {
    let &StateDecl::Delta { n_head_k, n_head_v, dim_k, dim_v } = decl else { panic!("{decl:?}") };
    let (n_qk, n_v) = (2 * n_head_k * dim_k, n_head_v * dim_v);
    let width = n_qk + n_v + 2 * n_head_v;
    let record = move |p: &mut PlanBuilder<'_>, _: &Weights| {
        let x = p.input(width);
        let qkv = p.columns(x, width, 0, n_qk + n_v);
        let decay = p.columns(x, width, n_qk + n_v, n_head_v);
        let beta = p.columns(x, width, n_qk + n_v + n_head_v, n_head_v);
        p.delta_rule(StateId(1), qkv, (decay, beta), n_v, heads, 1e-6)
    };
    let setup = Setup {
        name: format!("delta_rule {decl:?}, {heads:?}"),
        tensors: vec![Tensor::vector(vec![0.0])],
        // Behind another state, so that its place in a slot matters.
        states: vec![StateDecl::ConvTail { channels: 3, width: 4 }, decl.clone()],
        config: StateConfig { page_len: 8, kv: KvType::F32.into(), n_tentative_max: N_TENTATIVE_MAX },
        plans: vec![&record],
        taps: &[],
    };
    let scalar = ScalarBackend::default();
    let mut rig = Rig::new(&[&scalar, backend], Agree::within(tolerance.other), setup)
        .unwrap_or_else(|error| panic!("delta_rule: {error}"));
    let input = |random: &mut Random| {
        let mut row = random.values(width, 2.0);
        for head in 0..n_head_v {
            row[n_qk + n_v + head] = -random.unit().abs(); // logarithm of the decay
            row[n_qk + n_v + n_head_v + head] = random.unit().abs(); // beta
        }
        row
    };
    run(&mut rig, random, &input, &mut |rig, seq, _| {
        // No decay and no correction leave the matrix as it is; a unit query reads one of its columns.
        let unit = |i: usize| {
            let mut row = vec![0.0; width];
            (0..n_head_k).for_each(|head| row[head * dim_k + i] = 1.0);
            row
        };
        probe(rig, 0, seq, (0..dim_k).map(unit).collect());
    });
}
