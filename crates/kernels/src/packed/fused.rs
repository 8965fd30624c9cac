//! Operations that leave their result quantised, without a row of floats in between.
//!
//! Each is bit for bit the operation followed by [`RowWriter::quantize`].

use super::{PackedTable, RowWriter};
use crate::{act, norm};

impl RowWriter<'_> {
    /// Quantises `rms_norm(x; w)` into row `row`.
    ///
    /// # Panics
    /// If there is no such row, or a length differs from the row's.
    ///
    /// # Safety
    /// No other thread may write this row at the same time.
    pub unsafe fn rms_norm(&self, table: &PackedTable, row: usize, x: &[f32], w: Option<&[f32]>, eps: f32) {
        assert_eq!(x.len(), self.n_in(), "a row of n_in values");
        assert!(w.is_none_or(|w| w.len() == x.len()), "a norm's input and weight");
        let factor = norm::rms_factor(x, eps);
        // SAFETY: the row is the caller's by contract.
        unsafe {
            self.quantize_from(table, row, |k, out| {
                let range = k..k + out.len();
                norm::scale_by(&x[range.clone()], factor, w.map(|w| &w[range]), out);
            });
        }
    }

    /// Quantises `silu(gate) · up` into row `row`.
    ///
    /// # Panics
    /// If there is no such row, or a length differs from the row's.
    ///
    /// # Safety
    /// No other thread may write this row at the same time.
    pub unsafe fn silu_mul(&self, table: &PackedTable, row: usize, gate: &[f32], up: &[f32]) {
        assert_eq!((gate.len(), up.len()), (self.n_in(), self.n_in()), "rows of n_in values");
        // SAFETY: the row is the caller's by contract.
        unsafe {
            self.quantize_from(table, row, |k, out| {
                let range = k..k + out.len();
                act::silu_mul(&gate[range.clone()], &up[range], out);
            });
        }
    }
}
