//! Speed of the kernels: `cargo bench -p paceline-kernels`. One thread; `PACELINE_ISA` chooses.
//!
//! Divan's table has the kernels on data that caches hold. Behind it comes a line for each kernel on data from memory, and what that is
//! of what this machine can do, measured first; a name after `--` selects there too. `-- --list` and `-- --test` leave it out.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use paceline_gguf::GgmlType;
use paceline_kernels::attention::{Query, RunningSoftmax};
use paceline_kernels::delta::{DeltaToken, delta_advance, delta_step};
use paceline_kernels::formats::{format, quantize_rows};
use paceline_kernels::kv::{KvData, KvRows};
use paceline_kernels::norm::rms_norm;
use paceline_kernels::packed::{Grain, PackedMatrix, PackedTable, QuantRows, pack};
use paceline_kernels::roofline::{Point, measure};
use paceline_kernels::{KernelTable, Team, WeightRows, f16};

fn main() {
    divan::main();
    if !std::env::args().any(|arg| ["--list", "--test"].contains(&arg.as_str())) {
        shares::print();
    }
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

/// Formats that have a packed form.
const PACKED: [GgmlType; 10] = [
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::IQ4_NL,
    GgmlType::IQ4_XS,
    GgmlType::BF16,
    GgmlType::F16,
    GgmlType::F32,
];

/// A packed matrix of about so many bytes in the file, with scales that are numbers.
fn packed_matrix(ty: GgmlType, n_in: usize, n_bytes: usize) -> PackedMatrix {
    let row_bytes = n_in / ty.block_len() * ty.block_bytes();
    let n_out = (n_bytes / row_bytes).next_multiple_of(32);
    let row = quantize_rows(ty, n_in, &noise(n_in));
    pack(ty, &row.repeat(n_out), n_in, n_out, &Team::new(1), &|_| ()).expect("memory").expect("a packed form")
}

/// A packed matrix of half a megabyte times n columns; bytes are those of its tiles.
#[divan::bench(args = PACKED, consts = [1, 4, 8, 16, 32])]
fn packed<const N: usize>(bencher: Bencher<'_, '_>, ty: &GgmlType) {
    let table = PackedTable::of(table());
    let w = packed_matrix(*ty, 2560, 1 << 19);
    let mut rows = QuantRows::new();
    rows.quantize_rows(table, w.grain(), &noise(N * w.n_in()), N, w.n_in());
    let mut out = vec![0.0; N * w.n_out()];
    bencher
        .counter(BytesCount::new(w.bytes()))
        .counter(ItemsCount::new(N * w.n_in() * w.n_out()))
        .bench_local(|| table.product(&w, 0..w.n_groups(), black_box(&rows), black_box(&mut out)));
}

/// A row of 4096 activations to 8-bit integers; items are values.
#[divan::bench(args = [Grain::Per32, Grain::Per256])]
fn quantize(bencher: Bencher<'_, '_>, grain: &Grain) {
    let (table, x, mut rows) = (PackedTable::of(table()), noise(4096), QuantRows::new());
    bencher
        .counter(ItemsCount::new(x.len()))
        .bench_local(|| rows.quantize_rows(table, *grain, black_box(&x), 1, x.len()));
}

/// A row of 4096; items are values.
#[divan::bench]
fn norm(bencher: Bencher<'_, '_>) {
    let (x, weight) = (noise(4096), noise(4096));
    let mut out = vec![0.0; 4096];
    bencher
        .counter(ItemsCount::new(x.len()))
        .bench_local(|| rms_norm(black_box(&x), Some(&weight), 1e-6, black_box(&mut out)));
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

/// Kernels on data from memory, against what this machine can do.
mod shares {
    use std::time::Instant;

    use super::*;

    /// More than caches hold, and of packed matrices as much.
    const FAR: usize = 160 << 20;
    const N: [usize; 5] = [1, 4, 8, 16, 32];
    const REPEATS: usize = 7;

    /// What a kernel did.
    struct Done {
        n_bytes: usize,
        macs: usize,
        /// Products per second that the machine could do of these.
        peak: f64,
        seconds: f64,
    }

    /// The least of several runs.
    fn least(mut run: impl FnMut()) -> f64 {
        let time = |_| {
            let begin = Instant::now();
            run();
            begin.elapsed().as_secs_f64()
        };
        (0..REPEATS).map(time).fold(f64::INFINITY, f64::min)
    }

    pub fn print() {
        let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
        let roofline = measure(table(), &[1], 30, 1.0);
        let point = *roofline.at(1);
        println!(
            "\n{} kernels, 1 thread; this machine reads {:.1} GB/s, {}: {:.0} GMAC/s, {}: {:.0} GMAC/s",
            roofline.isa,
            point.read.best / 1e9,
            roofline.dot,
            point.dot.best / 1e9,
            roofline.fma,
            point.fma.best / 1e9
        );
        println!("{:<24} {:>9} {:>8} {:>9} {:>8}", "from memory", "GB/s", "of read", "GMAC/s", "of peak");
        let line = |name: String, run: &mut dyn FnMut() -> Done| {
            if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
                return;
            }
            let Done { n_bytes, macs, peak, seconds } = run();
            let (bytes, macs) = (n_bytes as f64 / seconds, macs as f64 / seconds);
            println!(
                "{name:<24} {:>9.2} {:>7.0}% {:>9.2} {:>7.0}%",
                bytes / 1e9,
                100.0 * bytes / point.read.best,
                macs / 1e9,
                100.0 * macs / peak
            );
        };
        for ty in PACKED {
            let mut matrix = None;
            for n in N {
                let name = format!("packed {} n={n}", ty.name());
                line(name, &mut || {
                    product(matrix.get_or_insert_with(|| packed_matrix(ty, 2560, FAR)), n, &point)
                });
            }
        }
        line("attention f16".into(), &mut || attention(&point));
        line("delta step".into(), &mut || delta(&point));
    }

    fn product(w: &PackedMatrix, n: usize, point: &Point) -> Done {
        let table = PackedTable::of(table());
        let mut rows = QuantRows::new();
        rows.quantize_rows(table, w.grain(), &noise(n * w.n_in()), n, w.n_in());
        let mut out = vec![0.0; n * w.n_out()];
        let seconds = least(|| table.product(w, 0..w.n_groups(), &rows, black_box(&mut out)));
        assert!(out.iter().all(|x| x.is_finite()), "{} products", w.ty().name());
        let peak = if w.grain() == Grain::F32 { point.fma.best } else { point.dot.best };
        Done { n_bytes: w.bytes(), macs: n * w.n_in() * w.n_out(), peak, seconds }
    }

    /// One head of one row over cells that fill the memory.
    fn attention(point: &Point) -> Done {
        let dim = 128;
        let n = FAR / (2 * dim * size_of::<f16>());
        let cells = vec![f16::from_f32(0.25); n * dim];
        let values = cells.clone();
        let k = KvRows { data: KvData::F16(&cells), stride: dim, offset: 0 };
        let v = KvRows { data: KvData::F16(&values), stride: dim, offset: 0 };
        let (q, mut out) = (noise(dim), vec![0.0; dim]);
        let query = Query { q: &q, scale: 0.088, softcap: None };
        let seconds = least(|| {
            let mut softmax = RunningSoftmax::new(table(), query, black_box(&mut out));
            softmax.attend_page(k, v, 0..n);
            softmax.finish(None);
        });
        assert!(out.iter().all(|x| x.is_finite()), "attention");
        let n_bytes = 2 * n * dim * size_of::<f16>();
        Done { n_bytes, macs: 2 * n * dim, peak: point.fma.best, seconds }
    }

    /// One token of heads whose states fill the memory: read and written.
    fn delta(point: &Point) -> Done {
        let (dim, n) = (128, FAR / (128 * 128 * size_of::<f32>()));
        let mut states = vec![0.1f32; n * dim * dim];
        let (k, v, q) = (vec![0.05; dim], noise(dim), noise(dim));
        let token = DeltaToken::new(&k, &v, -0.1, 0.5);
        let mut out = vec![0.0; dim];
        let seconds = least(|| {
            for state in states.chunks_exact_mut(dim * dim) {
                delta_step(table(), state, &token, &q, black_box(&mut out));
            }
        });
        assert!(out.iter().all(|x| x.is_finite()), "delta rule");
        let n_bytes = 2 * states.len() * size_of::<f32>();
        Done { n_bytes, macs: 3 * states.len(), peak: point.fma.best, seconds }
    }
}
