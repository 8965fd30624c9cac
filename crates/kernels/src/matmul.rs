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

impl WeightRows<'_> {
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
