//! Speed of the kernels: `cargo bench -p paceline-kernels`. One thread; `PACELINE_ISA` chooses.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use paceline_gguf::GgmlType;
use paceline_kernels::attention::{Query, RunningSoftmax};
use paceline_kernels::delta::{DeltaToken, delta_advance, delta_step};
use paceline_kernels::formats::{format, quantize_rows};
use paceline_kernels::kv::{KvData, KvRows};
use paceline_kernels::{KernelTable, Team, WeightRows, f16};

fn main() {
    divan::main();
}

fn table() -> &'static KernelTable {
    KernelTable::best().unwrap_or_else(|error| panic!("{error}"))
}

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 12.9898).sin()).collect()
}

/// Weights [256, 4096] times n columns; bytes are those of the weights.
mod matmul {
    use super::*;

    const N: [usize; 6] = [1, 2, 4, 8, 16, 64];

    #[divan::bench(args = N)]
    fn q8_0(bencher: Bencher<'_, '_>, n: usize) {
        run(bencher, GgmlType::Q8_0, n);
    }

    #[divan::bench(args = N)]
    fn q4_k(bencher: Bencher<'_, '_>, n: usize) {
        run(bencher, GgmlType::Q4_K, n);
    }

    #[divan::bench(args = N)]
    fn f32(bencher: Bencher<'_, '_>, n: usize) {
        run(bencher, GgmlType::F32, n);
    }

    fn run(bencher: Bencher<'_, '_>, ty: GgmlType, n: usize) {
        let (n_rows, n_in) = (256, 4096);
        let bytes = quantize_rows(ty, n_in, &noise(n_rows * n_in));
        let format = format(ty).expect("a format of the list");
        let w = WeightRows::new(format, &bytes, n_rows, n_in);
        let (x, mut scratch, mut out) = (noise(n * n_in), Vec::new(), vec![0.0; n * n_rows]);
        bencher
            .counter(BytesCount::new(bytes.len()))
            .bench_local(|| (table().matmul_tile)(&w, black_box(&x), &mut scratch, black_box(&mut out)));
    }
}

/// One head of one row over n cells; items are cells.
#[divan::bench(args = [256, 4096])]
fn attention_f16(bencher: Bencher<'_, '_>, n: usize) {
    let dim = 128;
    let cells: Vec<f16> = noise(n * dim).into_iter().map(f16::from_f32).collect();
    let rows = KvRows { data: KvData::F16(&cells), stride: dim, offset: 0 };
    let (q, mut out) = (noise(dim), vec![0.0; dim]);
    let query = Query { q: &q, scale: 0.088, softcap: None };
    bencher.counter(ItemsCount::new(n)).bench_local(|| {
        let mut softmax = RunningSoftmax::new(table(), query, black_box(&mut out));
        softmax.attend_page(rows, rows, 0..n);
        softmax.finish(None);
    });
}

/// One token of one head of 128 x 128; bytes are those of the state.
#[divan::bench(args = [true, false])]
fn delta(bencher: Bencher<'_, '_>, output: bool) {
    let (mut state, k, v) = (noise(128 * 128), noise(128), noise(128));
    let (q, mut out) = (noise(128), vec![0.0; 128]);
    let k: Vec<f32> = k.iter().map(|k| k / 8.0).collect();
    let token = DeltaToken::new(&k, &v, -0.1, 0.5);
    bencher.counter(BytesCount::of_slice(&state.clone())).bench_local(|| {
        if output {
            delta_step(table(), black_box(&mut state), &token, &q, &mut out);
        } else {
            delta_advance(table(), black_box(&mut state), &token);
        }
    });
}

/// A region of the team in which nothing is done.
#[divan::bench(args = [1, 2])]
fn empty_region(bencher: Bencher<'_, '_>, n_threads: usize) {
    let team = Team::new(n_threads);
    bencher.bench_local(|| team.for_each(black_box(4), &|i| _ = black_box(i)));
}
