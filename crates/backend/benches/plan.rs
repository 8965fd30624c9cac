//! What a plan costs beyond its kernels, and a toy model end to end: `cargo bench -p paceline-backend`.
//!
//! `waves` is a chain of 200 additions over 256 values, so nearly all of it is what a wave costs. `decode` and
//! `prefill` run a hybrid of 8 layers, hidden 256, vocabulary 4096, Q8_0: as large as the bundled model.

use std::sync::Arc;

use divan::{Bencher, counter::ItemsCount};
use paceline_backend::{
    AttentionOp, Backend, BlockMask, Exec, HeadMap, KvType, Lane, Matrix, PageId, PageTable, Pairing,
    PlanBuilder, RopeScaling, RopeSpec, SlotId, StateConfig, StateDecl, StateId, States, Step, StepOut,
    Vector, WeightSource, cpu::CpuBackend,
};
use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use paceline_kernels::formats::quantize_rows;

const THREADS: [usize; 2] = [1, 2];

fn main() {
    divan::main();
}

/// Makes weights on the fly.
struct Weights {
    backend: CpuBackend,
}

impl Weights {
    fn matrix(&self, n_in: usize, n_out: usize, ty: GgmlType) -> Matrix {
        let values: Vec<f32> = (0..n_in * n_out).map(|i| (i as f32 * 12.9898).sin() * 0.1).collect();
        let data = quantize_rows(ty, n_in, &values);
        let tensor = [("w", [n_in as u64, n_out as u64], ty, data)];
        let file = Gguf::from_bytes("bench", to_bytes(&Metadata::new(), &tensor).unwrap()).unwrap();
        let id = self.backend.upload(&WeightSource { file: Arc::new(file), tensor: 0 }).unwrap();
        Matrix { id, n_in, n_out }
    }

    fn q8(&self, n_in: usize, n_out: usize) -> Matrix {
        self.matrix(n_in, n_out, GgmlType::Q8_0)
    }

    fn vector(&self, len: usize) -> Vector {
        Vector { id: self.matrix(len, 1, GgmlType::F32).id, len }
    }
}

struct Toy {
    exec: Box<dyn Exec>,
    states: Arc<dyn States>,
    tables: Vec<PageTable>,
    out: StepOut,
}

const D: usize = 256;
const N_HEAD: usize = 4;
const N_HEAD_KV: usize = 2;
const HEAD: usize = 64;
const N_DELTA: usize = 4;
const DIM: usize = 64;
const FF: usize = 768;

fn hybrid(n_threads: usize) -> Toy {
    let w = Weights { backend: CpuBackend::new(n_threads).unwrap() };
    let channels = 3 * N_DELTA * DIM;
    let rope = RopeSpec {
        n_rot: 32,
        base: 1e4,
        pairing: Pairing::HalfSplit,
        factors: None,
        scaling: RopeScaling::None,
    };
    let mut decls = Vec::new();
    let mut p = PlanBuilder::new(&[]);
    let mut x = p.embed(&w.q8(D, 4096), 1.0);
    for il in 0..8 {
        let h = p.rms_norm(x, &w.vector(D), 1e-6);
        let state = StateId(decls.len() as u32);
        let h = if il % 4 == 3 {
            decls.push(StateDecl::Kv { n_head: N_HEAD_KV, head_dim: HEAD, window: None });
            let [q, k, v] = p.matmuls(
                h,
                [&w.q8(D, N_HEAD * HEAD), &w.q8(D, N_HEAD_KV * HEAD), &w.q8(D, N_HEAD_KV * HEAD)],
            );
            let norm = w.vector(HEAD);
            let q = p.rms_norm(q, &norm, 1e-6);
            let q = p.rope(q, HEAD, &rope);
            let k = p.rms_norm(k, &norm, 1e-6);
            let k = p.rope(k, HEAD, &rope);
            p.kv_append(state, k, v);
            p.attention(|dst| AttentionOp {
                state,
                q,
                dst,
                n_head: N_HEAD,
                scale: 0.125,
                mask: BlockMask::Causal,
                window: None,
                sinks: None,
            })
        } else {
            decls.push(StateDecl::ConvTail { channels, width: 4 });
            decls.push(StateDecl::Delta { n_head_k: N_DELTA, n_head_v: N_DELTA, dim_k: DIM, dim_v: DIM });
            let width = N_DELTA * DIM;
            let [u, z, alpha, b] =
                p.matmuls(h, [&w.q8(D, channels), &w.q8(D, width), &w.q8(D, N_DELTA), &w.q8(D, N_DELTA)]);
            let gates = p.delta_gates(alpha, b, &w.vector(N_DELTA), &w.vector(N_DELTA));
            let qkv = p.short_conv(state, u, &w.matrix(4, channels, GgmlType::F32));
            let o = p.delta_rule(StateId(state.0 + 1), qkv, gates, width, HeadMap::Tiled, 1e-6);
            p.gated_rms_norm(o, z, &w.vector(DIM), 1e-6)
        };
        let h = p.matmul(h, &w.q8(D, D));
        x = p.add(x, h);
        let h = p.rms_norm(x, &w.vector(D), 1e-6);
        let [gate, up] = p.matmuls(h, [&w.q8(D, FF), &w.q8(D, FF)]);
        let h = p.silu_mul(gate, up);
        let h = p.matmul(h, &w.q8(FF, D));
        x = p.add(x, h);
    }
    let x = p.select_outputs(x);
    let x = p.rms_norm(x, &w.vector(D), 1e-6);
    let logits = p.matmul(x, &w.q8(D, 4096));
    toy(&w.backend, p.finish(Some(logits)), &decls)
}

fn chain(n_threads: usize) -> Toy {
    let backend = CpuBackend::new(n_threads).unwrap();
    let mut p = PlanBuilder::new(&[]);
    let input = p.input(D);
    let x = (0..200).fold(input, |x, _| p.add(x, input));
    toy(&backend, p.finish(Some(x)), &[])
}

fn toy(backend: &CpuBackend, plan: paceline_backend::Plan, decls: &[StateDecl]) -> Toy {
    let config = StateConfig { page_len: 64, kv: KvType::F16.into(), n_tentative_max: 16 };
    let states = backend.alloc_states(decls, config).unwrap();
    let pages: Vec<PageId> = (0..16).map(PageId).collect();
    if decls.iter().any(|decl| matches!(decl, StateDecl::Kv { .. })) {
        pages.iter().for_each(|page| states.page_alloc(*page, 0));
    }
    let tables = vec![PageTable::whole(pages)];
    states.slot_reset(SlotId(0));
    Toy { exec: backend.compile(Arc::new(plan), &states).unwrap(), states, tables, out: StepOut::default() }
}

impl Toy {
    fn step(&mut self, n: usize, n_past: usize, inputs: &[f32]) {
        let tokens: Vec<u32> = (0..n as u32).collect();
        let lanes = [Lane { rows: 0..n, n_past, n_certain: 1, tables: &self.tables, slot: Some(SlotId(0)) }];
        let outputs: Vec<u32> = if n > 16 { vec![n as u32 - 1] } else { tokens.clone() };
        let lanes = if n > 16 { [Lane { n_certain: n, ..lanes[0].clone() }] } else { lanes };
        let step = Step { tokens: &tokens, inputs, positions: &tokens, lanes: &lanes, outputs: &outputs };
        self.exec.run(&step, &mut self.out);
        self.states.slot_commit(SlotId(0), 0);
    }
}

#[divan::bench(args = THREADS)]
fn waves(bencher: Bencher<'_, '_>, n_threads: usize) {
    let mut toy = chain(n_threads);
    let input = vec![0.5; D];
    bencher.counter(ItemsCount::new(200usize)).bench_local(|| toy.step(1, 0, &input));
}

#[divan::bench(args = THREADS, consts = [1, 8])]
fn decode<const N: usize>(bencher: Bencher<'_, '_>, n_threads: usize) {
    let mut toy = hybrid(n_threads);
    bencher.counter(ItemsCount::new(N)).bench_local(|| toy.step(N, 200, &[]));
}

#[divan::bench(args = THREADS, sample_count = 20)]
fn prefill(bencher: Bencher<'_, '_>, n_threads: usize) {
    let mut toy = hybrid(n_threads);
    bencher.counter(ItemsCount::new(512usize)).bench_local(|| toy.step(512, 0, &[]));
}

/// One product of 512 rows with a matrix [2048, 1024].
#[divan::bench(args = THREADS, sample_count = 20)]
fn prefill_matmul(bencher: Bencher<'_, '_>, n_threads: usize) {
    let w = Weights { backend: CpuBackend::new(n_threads).unwrap() };
    let mut p = PlanBuilder::new(&[]);
    let x = p.input(2048);
    let y = p.matmul(x, &w.q8(2048, 1024));
    let mut toy = toy(&w.backend, p.finish(Some(y)), &[]);
    let input = vec![0.5; 512 * 2048];
    bencher.counter(ItemsCount::new(512usize * 2048 * 1024)).bench_local(|| toy.step(512, 0, &input));
}
