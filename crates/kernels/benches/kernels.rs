//! Speed of the kernels: `cargo bench -p paceline-kernels`. One thread; `PACELINE_ISA` chooses.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use paceline_gguf::GgmlType;
use paceline_kernels::delta::{DeltaToken, delta_advance, delta_step};
use paceline_kernels::formats::{format, quantize_rows};
use paceline_kernels::{KernelTable, Team, WeightRows};

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

/// One KV head of 128 over more cells than caches hold; bytes are those of the cells.
mod attention {
    use super::*;
    use paceline_kernels::attention::{KvHead, QueryTile};
    use paceline_kernels::kv::{KvBytes, KvType, KvTypes};

    const DIM: usize = 128;
    const PAGE: usize = 64;

    struct Cache {
        types: KvTypes,
        pages: Vec<[KvBytes; 2]>,
    }

    impl Cache {
        fn new(types: impl Into<KvTypes>, n_cell: usize) -> Cache {
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

        fn bytes(&self) -> usize {
            self.pages.len() * PAGE * self.types.cell_bytes(DIM)
        }

        /// The last `n_row` cells are the rows'.
        fn attend(&self, tile: &mut QueryTile, q: &[f32], n_row: usize, per_row: usize) {
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
