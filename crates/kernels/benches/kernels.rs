//! Speed of the kernels: `cargo bench -p paceline-kernels`. One thread; `PACELINE_ISA` chooses.
//!
//! Divan's table has the kernels on data that caches hold. Behind it comes a line for each kernel on data from memory, and what that is
//! of what this machine can do, measured first; a name after `--` selects there too. `-- --list` and `-- --test` leave it out.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use paceline_gguf::GgmlType;
use paceline_kernels::attention::QueryTile;
use paceline_kernels::delta::{DeltaToken, delta_advance, delta_step};
use paceline_kernels::formats::{format, quantize_rows};
use paceline_kernels::kv::KvType;
use paceline_kernels::norm::rms_norm;
use paceline_kernels::packed::{Grain, PackedMatrix, PackedTable, QuantRows, pack};
use paceline_kernels::roofline::{Point, measure};
use paceline_kernels::{KernelTable, Team, WeightRows};

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

/// One KV head of 128 over more cells than caches hold; bytes are those of the cells.
mod attention {
    use super::*;
    use paceline_kernels::attention::KvHead;
    use paceline_kernels::kv::{KvBytes, KvTypes};

    pub const DIM: usize = 128;
    const PAGE: usize = 64;

    pub struct Cache {
        types: KvTypes,
        pages: Vec<[KvBytes; 2]>,
    }

    impl Cache {
        pub fn new(types: impl Into<KvTypes>, n_cell: usize) -> Cache {
            let types = types.into();
            let row = noise(PAGE * DIM);
            let page = |ty: KvType| {
                let n = ty.row_bytes(PAGE * DIM);
                let mut bytes = KvBytes::new(n);
                ty.write(&row, &mut bytes.bytes_mut()[..n]);
                bytes
            };
            let one = [page(types.k), page(types.v)];
            Cache { types, pages: vec![one; n_cell / PAGE] }
        }

        pub fn bytes(&self) -> usize {
            self.pages.len() * PAGE * self.types.cell_bytes(DIM)
        }

        /// The last `n_row` cells are the rows'.
        pub fn attend(&self, tile: &mut QueryTile, q: &[f32], n_row: usize, per_row: usize) {
            let page = |i: usize| [self.pages[i][0].bytes(), self.pages[i][1].bytes()];
            let n_past = self.pages.len() * PAGE - n_row;
            tile.start(DIM, None);
            for i in 0..n_row * per_row {
                tile.push(&q[i * DIM..(i + 1) * DIM], 0.088, 0..n_past + i / per_row + 1);
            }
            tile.attend(table(), KvHead { types: self.types, head_dim: DIM, page_len: PAGE, page: &page });
            black_box(tile);
        }
    }

    fn run(bencher: Bencher<'_, '_>, types: impl Into<KvTypes>, n_cell: usize, n_row: usize, per_row: usize) {
        let cache = Cache::new(types, n_cell);
        let (q, mut tile) = (noise(n_row * per_row * DIM), QueryTile::default());
        bencher
            .counter(BytesCount::new(cache.bytes()))
            .bench_local(|| cache.attend(&mut tile, black_box(&q), n_row, per_row));
    }

    /// One row with so many query heads on a KV head.
    #[divan::bench(args = [1, 2, 4, 8])]
    fn f16(bencher: Bencher<'_, '_>, per_row: usize) {
        run(bencher, KvType::F16, 256 << 10, 1, per_row);
    }

    /// Rows of a draft, two query heads each.
    #[divan::bench(args = [1, 2, 4, 8, 16])]
    fn f16_rows(bencher: Bencher<'_, '_>, n_row: usize) {
        run(bencher, KvType::F16, 256 << 10, n_row, 2);
    }

    #[divan::bench(args = [1, 8])]
    fn q8_0(bencher: Bencher<'_, '_>, n_row: usize) {
        run(bencher, KvType::Q8_0, 256 << 10, n_row, 2);
    }

    #[divan::bench(args = [1, 8])]
    fn q4_0(bencher: Bencher<'_, '_>, n_row: usize) {
        run(bencher, KvType::Q4_0, 256 << 10, n_row, 2);
    }

    /// 64 rows of a prompt, two heads each, over 4096 cells; items are products.
    #[divan::bench]
    fn prompt(bencher: Bencher<'_, '_>) {
        let cache = Cache::new(KvType::F16, 4096);
        let (q, mut tile) = (noise(128 * DIM), QueryTile::default());
        bencher
            .counter(ItemsCount::new(2 * 128usize * 4096 * DIM))
            .bench_local(|| cache.attend(&mut tile, black_box(&q), 64, 2));
    }

    /// The fastest that these cells can be read.
    #[divan::bench]
    fn read_only(bencher: Bencher<'_, '_>) {
        let cache = Cache::new(KvType::F16, 256 << 10);
        bencher.counter(BytesCount::new(cache.bytes())).bench_local(|| {
            let mut sums = [0u64; 32];
            for page in cache.pages.iter().flatten() {
                for line in page.bytes().chunks_exact(256) {
                    for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                        *sum ^= u64::from_ne_bytes(*word);
                    }
                }
            }
            black_box(sums)
        });
    }

    /// A row of 8 heads into cells.
    #[divan::bench(args = KvType::ALL)]
    fn append(bencher: Bencher<'_, '_>, ty: KvType) {
        let (row, n) = (noise(8 * DIM), ty.row_bytes(8 * DIM));
        let mut bytes = KvBytes::new(n);
        bencher
            .counter(ItemsCount::new(8 * DIM))
            .bench_local(|| ty.write(black_box(&row), black_box(&mut bytes.bytes_mut()[..n])));
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
        let dim = attention::DIM;
        let cache = attention::Cache::new(KvType::F16, FAR / (4 * dim));
        let (q, mut tile) = (noise(dim), QueryTile::default());
        let seconds = least(|| cache.attend(&mut tile, &q, 1, 1));
        let mut out = vec![f32::NAN; dim];
        tile.finish(0, None, &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "attention");
        Done { n_bytes: cache.bytes(), macs: cache.bytes() / 2, peak: point.fma.best, seconds }
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
