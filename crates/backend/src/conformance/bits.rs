//! Bit for bit: how rows are cut into steps, which lanes share a step and in which order, what was guessed and
//! rejected, which pages and slots hold a sequence, and how many threads compute make no difference at all.

use paceline_gguf::GgmlType;
use paceline_kernels::formats::FORMATS;

use crate::{
    AttentionOp, Backend, BlockMask, Buf, HeadMap, KvType, KvTypes, LocalKernels, Pairing, PlanBuilder,
    RopeScaling, RopeSpec, RouterScore, RouterSpec, StateConfig, StateDecl, StateId,
};

use super::{
    random::Random,
    rig::{Agree, Part, Rig, Row, Sequence, Setup, Tensor, Weights},
};

const N_TOKEN: usize = 31;
/// Rows of each sequence.
const LENGTHS: [usize; 3] = [19, 33, 26];
/// Ways to cut them that are tried for each format.
const N_CUT: usize = 3;

const HEAD: usize = 12;
const N_HEAD: usize = 4;
const N_HEAD_KV: usize = 2;
const N_HEAD_K: usize = 2;
const N_HEAD_V: usize = 4;
const DIM: usize = 8;
const CHANNELS: usize = (2 * N_HEAD_K + N_HEAD_V) * DIM;
/// Wide enough for a wave that is worth sharing.
const FF: usize = 515;
const N_EXPERT: usize = 9;
const N_USED: usize = 3;
/// A whole block of every format.
const FF_EXPERT: usize = 256;

/// Checks that all `backends` agree in every bit, with each other and however rows are cut into steps, for every
/// op and tensor format. Panics at the first difference.
pub fn check_bits(backends: &[&dyn Backend]) {
    let mut random = Random::new(3);
    for (i, format) in FORMATS.iter().enumerate() {
        // Heads that are no whole blocks allow plain floats only.
        let ty = |i: usize| [KvType::F32, KvType::F16, KvType::Bf16][i % 3];
        let kv = KvTypes { k: ty(i), v: ty(i / 3) };
        let page_len = [4, 16, 5][i % 3];
        cuts(backends, &mut random, format.ty, kv, page_len);
    }
    blocks(backends, &mut random);
    for (i, k) in KvType::ALL.into_iter().enumerate() {
        long(backends, &mut random, KvTypes { k, v: KvType::ALL[7 - i] });
    }
}

/// A row is what its sequence and position say.
fn row(seq: usize, position: usize) -> Row {
    let token = Random::new((seq * 1000 + position) as u64).below(N_TOKEN) as u32;
    Row { token, position: position as u32, input: vec![] }
}

/// A hybrid of two layers in which every op occurs; its matrices of `n_embd` inputs are in the format `ty`.
fn record(p: &mut PlanBuilder<'_>, w: &Weights) -> Buf {
    let x = p.embed(&w.matrix(0), 1.5);
    let h = p.rms_norm(x, &w.vector(1), 1e-6);
    let [u, z, alpha, b] = p.matmuls(h, [&w.matrix(2), &w.matrix(3), &w.matrix(4), &w.matrix(5)]);
    let gates = p.delta_gates(alpha, b, &w.vector(6), &w.vector(7));
    let qkv = p.short_conv(StateId(0), u, &w.matrix(8));
    let o = p.delta_rule(StateId(1), qkv, gates, N_HEAD_V * DIM, HeadMap::Tiled, 1e-6);
    let y = p.gated_rms_norm(o, z, &w.vector(9), 1e-6);
    let h = p.matmul(y, &w.matrix(10));
    let x = p.add(x, h);
    p.tap(0, x);

    let h = p.rms_norm(x, &w.vector(1), 1e-6);
    let qg = p.matmul_bias(h, &w.matrix(11), Some(&w.vector(12)));
    let (q, gate) = (p.columns(qg, 2 * HEAD, 0, HEAD), p.columns(qg, 2 * HEAD, HEAD, HEAD));
    let [k, v] = p.matmuls(h, [&w.matrix(13), &w.matrix(14)]);
    let rope = RopeSpec {
        n_rot: 8,
        base: 1e4,
        pairing: Pairing::HalfSplit,
        factors: None,
        scaling: RopeScaling::None,
    };
    let q = p.rms_norm(q, &w.vector(15), 1e-6);
    let (q, k) = (p.rope(q, HEAD, &rope), p.rope(k, HEAD, &rope));
    p.kv_append(StateId(2), k, v);
    let mut attend = |window, sinks| {
        p.attention(|dst| AttentionOp {
            state: StateId(2),
            q,
            dst,
            n_head: N_HEAD,
            scale: 0.3,
            mask: BlockMask::Causal,
            window,
            sinks,
        })
    };
    let (wide, narrow) = (attend(None, None), attend(Some(6), Some(w.vector(16).id)));
    let y = p.add(wide, narrow);
    let y = p.sigmoid_mul(y, gate);
    let h = p.matmul(y, &w.matrix(17));
    let x = p.add(x, h);
    let [gate, up] = p.matmuls(x, [&w.matrix(18), &w.matrix(19)]);
    let h = p.silu_mul(gate, up);
    let h = p.matmul(h, &w.matrix(20));
    let x = p.add(x, h);
    let logits = p.matmul(x, &w.matrix(21));
    let spec = RouterSpec {
        n_used: N_USED,
        score: RouterScore::Softmax,
        normalise: true,
        scale: 1.0,
        expert_scale: Some(w.vector(26).id),
    };
    let routes = p.router(logits, spec);
    let [gate, up] = [22, 23].map(|i| p.expert_matmul(x, routes, &w.experts(i, N_EXPERT)));
    let h = p.gelu_mul(gate, up);
    let h = p.expert_matmul(h, routes, &w.experts(24, N_EXPERT));
    let h = p.weighted_sum(h, routes);
    let shared = p.matmul(x, &w.matrix(25));
    let h = p.sigmoid_mul(h, shared);
    let x = p.add(x, h);
    let x = p.scale_by(x, &w.vector(27));
    p.tap(1, x);
    let x = p.select_outputs(x);
    let x = p.rms_norm_plain(x, w.vector(1).len, 1e-6);
    let logits = p.matmul(x, &w.matrix(0));
    let logits = p.softcap(logits, 3.0);
    p.scale(logits, 1.7)
}

fn tensors(random: &mut Random, ty: GgmlType) -> Vec<Tensor> {
    let n_embd = match ty.block_len() {
        1 => 77,
        32 => 64,
        block => block,
    };
    let f32 = GgmlType::F32;
    let mut matrix = |shape, ty| Tensor::random(random, shape, ty, 0.3);
    let (inner, q, kv) = (N_HEAD_V * DIM, N_HEAD * HEAD, N_HEAD_KV * HEAD);
    vec![
        matrix([n_embd, N_TOKEN], ty),
        matrix([n_embd, 1], f32),
        matrix([n_embd, CHANNELS], ty),
        matrix([n_embd, inner], ty),
        matrix([n_embd, N_HEAD_V], ty),
        matrix([n_embd, N_HEAD_V], ty),
        matrix([N_HEAD_V, 1], f32),
        Tensor::vector(vec![-0.3, -0.1, -0.7, -0.01]),
        matrix([4, CHANNELS], f32),
        matrix([DIM, 1], f32),
        matrix([inner, n_embd], f32),
        matrix([n_embd, 2 * q], ty),
        matrix([2 * q, 1], f32),
        matrix([n_embd, kv], ty),
        matrix([n_embd, kv], ty),
        matrix([HEAD, 1], f32),
        matrix([N_HEAD, 1], f32),
        matrix([q, n_embd], f32),
        matrix([n_embd, FF], ty),
        matrix([n_embd, FF], ty),
        matrix([FF, n_embd], f32),
        matrix([n_embd, N_EXPERT], f32),
        matrix([n_embd, N_EXPERT * FF_EXPERT], ty),
        matrix([n_embd, N_EXPERT * FF_EXPERT], ty),
        matrix([FF_EXPERT, N_EXPERT * n_embd], ty),
        matrix([n_embd, 1], f32),
        matrix([N_EXPERT, 1], f32),
        Tensor::vector(vec![0.6]),
    ]
}

fn states() -> Vec<StateDecl> {
    vec![
        StateDecl::ConvTail { channels: CHANNELS, width: 4 },
        StateDecl::Delta { n_head_k: N_HEAD_K, n_head_v: N_HEAD_V, dim_k: DIM, dim_v: DIM },
        StateDecl::Kv { n_head: N_HEAD_KV, head_dim: HEAD, window: None },
    ]
}

/// Every sequence alone, a row at a time and never guessing, against random cuts of all of them together.
fn cuts(backends: &[&dyn Backend], random: &mut Random, ty: GgmlType, kv: KvTypes, page_len: usize) {
    let name = format!("a hybrid in {}", ty.name());
    let rig = || {
        let setup = Setup {
            name: name.clone(),
            tensors: tensors(&mut Random::new(4), ty),
            states: states(),
            config: StateConfig { page_len, kv, n_tentative_max: 16 },
            plans: vec![&record],
            taps: &[0, 1],
        };
        Rig::new(backends, Agree::Bits, setup).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let mut alone = rig();
    let want: Vec<Vec<Vec<f32>>> = (0..LENGTHS.len())
        .map(|s| {
            let mut seq = alone.sequence();
            let one = |i| {
                alone.reserve(&mut seq, 1);
                let out = alone.step(0, &[Part { seq: &seq, rows: vec![row(s, i)], n_certain: 1 }]).remove(0);
                alone.commit(&mut seq, 1, 1);
                out
            };
            (0..LENGTHS[s]).map(one).collect()
        })
        .collect();

    for cut in 0..N_CUT {
        let mut rig = rig();
        let mut seqs: Vec<Sequence> = LENGTHS.iter().map(|_| rig.sequence()).collect();
        while let todo @ 1.. = (0..seqs.len()).filter(|&s| seqs[s].n_past < LENGTHS[s]).count() {
            let lanes: Vec<usize> =
                random.order(seqs.len()).into_iter().filter(|&s| seqs[s].n_past < LENGTHS[s]).collect();
            let lanes = &lanes[random.below(todo)..];
            // (right rows, of which certain; wrong rows behind them)
            let sizes: Vec<[usize; 3]> = lanes
                .iter()
                .map(|&s| {
                    let left = LENGTHS[s] - seqs[s].n_past;
                    let n = 1 + random.below(left.min(if cut == 0 { 4 } else { 12 }));
                    [n, random.below(n + 1), random.below(4)]
                })
                .collect();
            for (&s, [n, _, n_wrong]) in lanes.iter().zip(&sizes) {
                if random.below(6) == 0 {
                    // A copy goes on where the original would have.
                    if let Some(fork) = (rig.n_slot_free() > 0).then(|| rig.fork(&seqs[s])) {
                        seqs[s] = fork;
                    }
                }
                rig.reserve(&mut seqs[s], n + n_wrong);
            }
            let parts: Vec<Part<'_>> = lanes
                .iter()
                .zip(&sizes)
                .map(|(&s, &[n, n_certain, n_wrong])| {
                    let past = seqs[s].n_past;
                    let right = (past..past + n).map(|i| row(s, i));
                    let wrong = (past + n..past + n + n_wrong).map(|i| Row { token: 1, ..row(s + 7, i) });
                    Part { seq: &seqs[s], rows: right.chain(wrong).collect(), n_certain }
                })
                .collect();
            let got = rig.step(0, &parts);
            drop(parts);
            let mut first = 0;
            for (&s, &[n, n_certain, n_wrong]) in lanes.iter().zip(&sizes) {
                let past = seqs[s].n_past;
                for i in 0..n {
                    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(
                        bits(&got[first + i]) == bits(&want[s][past + i]),
                        "{name}, {}: position {} of sequence {s} differs in cut {cut}, as row {i} of {n} of lanes \
                         {lanes:?}",
                        backends[backends.len() - 1].describe(),
                        past + i
                    );
                }
                rig.commit(&mut seqs[s], n, n_certain);
                first += n + n_wrong;
            }
        }
    }
}

/// Rows that see their whole lane, as a drafter's block does, and are convolved in it: alone, and beside others in any
/// order.
fn blocks(backends: &[&dyn Backend], random: &mut Random) {
    const WIDTH: usize = (N_HEAD + 2 * N_HEAD_KV) * HEAD;
    let (n_q, n_kv) = (N_HEAD * HEAD, N_HEAD_KV * HEAD);
    let record = move |p: &mut PlanBuilder<'_>, w: &Weights| {
        let x = p.input(WIDTH);
        let (k, v) = (p.columns(x, WIDTH, n_q, n_kv), p.columns(x, WIDTH, n_q + n_kv, n_kv));
        p.kv_append(StateId(0), k, v);
        let q = p.columns(x, WIDTH, 0, n_q);
        let (state, n_head, scale) = (StateId(0), N_HEAD, 0.3);
        let (mask, window, sinks) = (BlockMask::Full, Some(9), None);
        let y = p.attention(|dst| AttentionOp { state, q, dst, n_head, scale, mask, window, sinks });
        let kernels = LocalKernels { id: w.matrix(0).id, channels: n_q, n_tap: 3, n_side: 2 };
        p.local_conv(y, q, &kernels, 1)
    };
    let setup = Setup {
        name: "blocks".into(),
        tensors: vec![Tensor::random(&mut Random::new(6), [N_HEAD * HEAD, 6], GgmlType::F32, 1.0)],
        states: vec![StateDecl::Kv { n_head: N_HEAD_KV, head_dim: HEAD, window: None }],
        config: StateConfig { page_len: 4, kv: KvType::F16.into(), n_tentative_max: 16 },
        plans: vec![&record],
        taps: &[],
    };
    let mut rig = Rig::new(backends, Agree::Bits, setup).unwrap_or_else(|error| panic!("blocks: {error}"));
    let mut rows = |n: usize| -> Vec<Row> {
        (0..n).map(|_| Row { input: random.values(WIDTH, 1.0), ..Row::default() }).collect()
    };
    let prompts = [3, 11, 6].map(&mut rows);
    let drafts = [7, 1, 16].map(&mut rows);
    let mut seqs: Vec<Sequence> = Vec::new();
    let mut alone: Vec<Vec<Vec<f32>>> = Vec::new();
    for (prompt, draft) in prompts.iter().zip(&drafts) {
        let mut seq = rig.sequence();
        rig.reserve(&mut seq, prompt.len() + draft.len());
        rig.step(0, &[Part { seq: &seq, rows: prompt.clone(), n_certain: prompt.len() }]);
        rig.commit(&mut seq, prompt.len(), prompt.len());
        alone.push(rig.step(0, &[Part { seq: &seq, rows: draft.clone(), n_certain: 0 }]));
        seqs.push(seq);
    }
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let part = |s: usize| Part { seq: &seqs[s], rows: drafts[s].clone(), n_certain: 0 };
        let got = rig.step(0, &order.map(part));
        let want: Vec<Vec<f32>> = order.into_iter().flat_map(|s| alone[s].clone()).collect();
        assert!(got == want, "blocks differ in the order {order:?}");
    }
}

/// Contexts of several spans, which threads share where heads are few: a row at a time, and as drafts of many rows.
fn long(backends: &[&dyn Backend], random: &mut Random, kv: KvTypes) {
    const HEAD: usize = 32;
    const WIDTH: usize = 4 * HEAD;
    const N_PAST: usize = 2300;
    let record = move |p: &mut PlanBuilder<'_>, _: &Weights| {
        let x = p.input(WIDTH);
        let (k, v) = (p.columns(x, WIDTH, 2 * HEAD, HEAD), p.columns(x, WIDTH, 3 * HEAD, HEAD));
        p.kv_append(StateId(0), k, v);
        let q = p.columns(x, WIDTH, 0, 2 * HEAD);
        let (state, n_head, scale, mask) = (StateId(0), 2, 0.3, BlockMask::Causal);
        let mut attend = |window| {
            p.attention(|dst| AttentionOp { state, q, dst, n_head, scale, mask, window, sinks: None })
        };
        let (wide, narrow) = (attend(None), attend(Some(1500)));
        p.add(wide, narrow)
    };
    let setup = Setup {
        name: format!("long contexts of {kv}"),
        tensors: vec![Tensor::vector(vec![0.0])],
        states: vec![StateDecl::Kv { n_head: 1, head_dim: HEAD, window: None }],
        config: StateConfig { page_len: 64, kv, n_tentative_max: 16 },
        plans: vec![&record],
        taps: &[],
    };
    let mut rig = Rig::new(backends, Agree::Bits, setup).unwrap_or_else(|error| panic!("long: {error}"));
    let mut rows = |n: usize| -> Vec<Row> {
        (0..n).map(|_| Row { input: random.values(WIDTH, 1.0), ..Row::default() }).collect()
    };
    let (prompt, draft) = (rows(N_PAST), rows(9));
    let mut seq = rig.sequence();
    for chunk in prompt.chunks(512) {
        rig.reserve(&mut seq, chunk.len());
        rig.step(0, &[Part { seq: &seq, rows: chunk.to_vec(), n_certain: chunk.len() }]);
        rig.commit(&mut seq, chunk.len(), chunk.len());
    }
    rig.reserve(&mut seq, draft.len());
    let together = rig.step(0, &[Part { seq: &seq, rows: draft.clone(), n_certain: 1 }]);
    rig.commit(&mut seq, 0, 0);
    for (i, row) in draft.into_iter().enumerate() {
        rig.reserve(&mut seq, 1);
        let alone = rig.step(0, &[Part { seq: &seq, rows: vec![row], n_certain: 1 }]);
        assert!(alone[0] == together[i], "row {i} of a long context of {kv}");
        rig.commit(&mut seq, 1, 1);
    }
}
