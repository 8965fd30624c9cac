//! Matrix products, one tile of weight rows at a time.
//!
//! ```text
//! out[c][r] = Σ_i w[r][i] · x[c][i]        w [m, n_in]   x [n, n_in]   out [n, m]
//! ```
//!
//! The weights are the bulk: each weight row is widened to f32 once, into scratch, and multiplied
//! with all `n` rows of `x`. That is why a forward over several tokens costs little more than over
//! one, and why speculation pays.
//!
//! Invariant: `out[c][r]` is the same bits whatever `n`, `m` and the thread. A vector kernel keeps
//! one accumulator vector for each output, adds the products of the inner dimension to it front to
//! back, a vector at a time, and sums its lanes in one fixed order at the end. Blocking over rows
//! and columns only chooses which outputs sit in registers together.

use crate::formats::Format;

/// Widens quantised (or half-precision) weights: whole quant blocks in, as many floats out.
pub type Dequantize = fn(&[u8], &mut [f32]);

/// Some whole rows of a weight matrix, as they lie in the file.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    /// The format's conversion to f32.
    pub dequantize: Dequantize,
    /// The rows, one behind the other: `n_rows` times the same number of bytes.
    pub bytes: &'a [u8],
    /// Number of rows, `m`.
    pub n_rows: usize,
    /// Inner dimension.
    pub n_in: usize,
}

impl<'a> WeightRows<'a> {
    /// Rows of a tensor in this format.
    ///
    /// # Panics
    /// If a row is not a whole number of quant blocks, or the bytes are not those of the rows.
    pub fn new(format: &Format, bytes: &'a [u8], n_rows: usize, n_in: usize) -> Self {
        let ty = format.ty;
        assert!(n_in.is_multiple_of(ty.block_len()), "a row of {n_in} in {} blocks", ty.name());
        let expected = n_rows * n_in / ty.block_len() * ty.block_bytes();
        assert_eq!(bytes.len(), expected, "bytes of {} weights [{n_rows}, {n_in}]", ty.name());
        Self { dequantize: format.dequantize, bytes, n_rows, n_in }
    }

    /// Widens row `r` into `out [n_in]`.
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.n_in, "a row of n_in floats");
        let row_bytes = self.bytes.len() / self.n_rows;
        (self.dequantize)(&self.bytes[r * row_bytes..(r + 1) * row_bytes], out);
    }

    /// Number of rows of `x`, after a check that all shapes agree.
    pub(crate) fn checked_columns(&self, x: &[f32], out: &[f32]) -> usize {
        let Self { n_rows, n_in, bytes, .. } = *self;
        assert!(n_rows > 0 && n_in > 0, "weights [{n_rows}, {n_in}]");
        assert_eq!(bytes.len() % n_rows, 0, "{} bytes in {n_rows} rows", bytes.len());
        assert_eq!(x.len() % n_in, 0, "x has {} floats in rows of {n_in}", x.len());
        let n = x.len() / n_in;
        assert_eq!(out.len(), n * n_rows, "out of x [{n}, {n_in}] and weights [{n_rows}, {n_in}]");
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::FORMATS;
    use crate::table::KernelTable;
    use proptest::prelude::*;

    /// Numbers between -1 and 1 that look random.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    struct Case {
        format: &'static Format,
        bytes: Vec<u8>,
        n_rows: usize,
        n_in: usize,
        x: Vec<f32>,
    }

    impl Case {
        /// `n_in` is rounded up to whole quant blocks.
        fn new(format: &'static Format, n_rows: usize, n_in: usize, n: usize, seed: u64) -> Self {
            let n_in = n_in.next_multiple_of(format.ty.block_len());
            let n_blocks = n_rows * n_in / format.ty.block_len();
            let mut bytes = vec![0; n_blocks * format.ty.block_bytes()];
            (format.quantize)(&noise(n_rows * n_in, seed), &mut bytes);
            Self { format, bytes, n_rows, n_in, x: noise(n * n_in, seed + 1) }
        }

        fn weights(&self) -> WeightRows<'_> {
            WeightRows::new(self.format, &self.bytes, self.n_rows, self.n_in)
        }

        fn product(&self, table: &KernelTable, x: &[f32]) -> Vec<f32> {
            let mut out = vec![f32::NAN; x.len() / self.n_in * self.n_rows];
            (table.matmul_tile)(&self.weights(), x, &mut Vec::new(), &mut out);
            out
        }

        /// The product of row `r` and column `c` in f64, and Σ|w·x|, which rounding is relative to.
        fn exact(&self, c: usize, r: usize) -> (f64, f64) {
            let mut w = vec![0.0; self.n_in];
            self.weights().dequantize_row(r, &mut w);
            let x = &self.x[c * self.n_in..(c + 1) * self.n_in];
            let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
        }
    }

    /// All columns together, each alone, and some rows apart are the same bits.
    fn check_invariant(case: &Case) {
        for table in KernelTable::available() {
            let at = |what| format!("{} {:?} n_in {}: {what}", table.isa, case.format.ty, case.n_in);
            let together = case.product(table, &case.x);
            for (c, x) in case.x.chunks(case.n_in).enumerate() {
                let alone = case.product(table, x);
                let row = &together[c * case.n_rows..(c + 1) * case.n_rows];
                assert_eq!(alone, row, "{}", at(format!("column {c} of {}", case.x.len() / case.n_in)));
            }
            let (top, bottom) = case.bytes.split_at(case.bytes.len() / case.n_rows);
            if case.n_rows > 1 {
                let rest = WeightRows { bytes: bottom, n_rows: case.n_rows - 1, ..case.weights() };
                let first = WeightRows { bytes: top, n_rows: 1, ..case.weights() };
                for (w, start) in [(first, 0), (rest, 1)] {
                    let mut out = vec![f32::NAN; together.len() / case.n_rows * w.n_rows];
                    (table.matmul_tile)(&w, &case.x, &mut vec![f32::NAN; 7], &mut out);
                    for (apart, row) in out.chunks(w.n_rows).zip(together.chunks(case.n_rows)) {
                        assert_eq!(apart, &row[start..start + w.n_rows], "{}", at("rows apart".into()));
                    }
                }
            }
        }
    }

    fn check_exact(case: &Case) {
        for table in KernelTable::available() {
            for (i, got) in case.product(table, &case.x).iter().enumerate() {
                let (want, size) = case.exact(i / case.n_rows, i % case.n_rows);
                // One rounding for each of n_in additions bounds the error; it is far smaller.
                let bound = f64::from(f32::EPSILON) * case.n_in as f64 * size + 1e-30;
                assert!(
                    (f64::from(*got) - want).abs() <= bound,
                    "{} {:?} [{}, {}] out {i}: {got} != {want}",
                    table.isa,
                    case.format.ty,
                    case.n_rows,
                    case.n_in
                );
            }
        }
    }

    #[test]
    fn every_number_of_columns_gives_the_same_bits() {
        for (i, format) in FORMATS.iter().enumerate() {
            for n in 1..=33 {
                check_invariant(&Case::new(format, 5, 77, n, (i * 100 + n) as u64));
            }
        }
    }

    #[test]
    fn every_format_matches_f64() {
        for format in FORMATS {
            for (n_rows, n) in [(1, 1), (7, 3), (21, 6)] {
                check_exact(&Case::new(format, n_rows, 300, n, 3));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_shape(
            format in 0..3usize, n_rows in 1..40usize, n_in in 1..300usize, n in 1..20usize, seed: u32
        ) {
            let case = Case::new(&FORMATS[format], n_rows, n_in, n, seed.into());
            check_invariant(&case);
            check_exact(&case);
        }
    }

    #[test]
    fn no_columns_is_no_output() {
        let case = Case::new(&FORMATS[0], 3, 8, 0, 1);
        for table in KernelTable::available() {
            assert!(case.product(table, &[]).is_empty());
        }
    }

    #[test]
    #[should_panic(expected = "bytes of f32 weights [2, 3]")]
    fn weights_of_another_shape_are_refused() {
        WeightRows::new(&FORMATS[0], &[0; 20], 2, 3);
    }

    #[test]
    #[should_panic(expected = "x has 9 floats in rows of 8")]
    fn a_cut_row_of_x_is_refused() {
        let case = Case::new(&FORMATS[0], 3, 8, 0, 1);
        case.product(&crate::scalar::TABLE, &[0.0; 9]);
    }
}
