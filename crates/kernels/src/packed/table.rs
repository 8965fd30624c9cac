//! The packed kernels of one instruction set, and which of them this machine has.

use std::ops::Range;
use std::sync::OnceLock;

use super::format::{PackedFormat, ROWS};
use super::matrix::PackedMatrix;
use super::product::{Place, TileFn, product};
use super::rows::{ActBlock, Grain, QuantRows};
use crate::shared::SharedMut;
use crate::table::KernelTable;

/// See [`product`].
pub(super) type ProductFn = unsafe fn(&[TileFn], &PackedMatrix, Range<usize>, &QuantRows, Place<'_>);

/// The packed kernels of one instruction set. All of them give the same bits.
pub struct PackedTable {
    /// `scalar`, `avx2`, `avx2-vnni` or `avx512`.
    pub isa: &'static str,
    /// This instruction set's kernels of a format.
    pub(super) kernels: fn(&'static PackedFormat) -> &'static [TileFn],
    /// [`product`](super::product::product), compiled for this instruction set.
    pub(super) product: ProductFn,
    /// Quantises one block of a row.
    pub(super) fill: fn(&mut ActBlock, Grain, &[f32]),
}

impl PackedTable {
    /// All tables that this machine can run, slowest first; `scalar` is always there.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<PackedTable>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let mut tables = vec![PackedTable {
                isa: "scalar",
                kernels: |format| format.kernels.scalar,
                product,
                fill: |block, grain, x| block.fill(grain, x),
            }];
            #[cfg(target_arch = "x86_64")]
            tables.extend(super::avx2::tables().into_iter().chain(super::avx512::table()));
            tables
        })
    }

    /// The fastest table that uses no instructions beyond those of `table`.
    pub fn of(table: &KernelTable) -> &'static Self {
        let allowed = |packed: &&Self| match table.isa {
            "avx512" => true,
            isa => packed.isa.starts_with(isa),
        };
        let available = Self::available();
        available.iter().rev().find(allowed).unwrap_or(&available[0])
    }

    /// `out[c][r]` for all columns of `x` and the rows of some groups of `w`; `out [n, rows of the groups]`.
    ///
    /// # Panics
    /// If the grain or the inner dimension of `x` is not that of `w`, there are no such groups, or `out` has another
    /// size.
    pub fn product(&self, w: &PackedMatrix, groups: Range<usize>, x: &QuantRows, out: &mut [f32]) {
        let m = (groups.end * ROWS).min(w.n_out()).saturating_sub(groups.start * ROWS);
        assert_eq!(
            out.len(),
            x.n() * m,
            "out of x [{}, {}] and weights [{m}, {}]",
            x.n(),
            x.n_in(),
            w.n_in()
        );
        let out = SharedMut::new(out);
        let place = Place { out: &out, offset: 0, stride: m };
        // SAFETY: the kernels are those of the format, and the table was detected; `out` is borrowed here alone.
        unsafe { (self.product)((self.kernels)(w.format()), w, groups, x, place) }
    }

    /// The same, written where a matrix of outputs has these rows: `(c, r)` at `offset + c · stride + r`, where `r` counts
    /// all rows of `w`.
    ///
    /// # Panics
    /// As [`product`](Self::product), or if an output lies outside of `out`.
    ///
    /// # Safety
    /// Nobody else may read or write these rows' outputs at the same time.
    pub unsafe fn product_into(
        &self,
        w: &PackedMatrix,
        groups: Range<usize>,
        x: &QuantRows,
        out: &SharedMut<'_, f32>,
        offset: usize,
        stride: usize,
    ) {
        let place = Place { out, offset: offset + groups.start * ROWS, stride };
        // SAFETY: the kernels are those of the format, and the table was detected; the outputs are the caller's.
        unsafe { (self.product)((self.kernels)(w.format()), w, groups, x, place) }
    }
}
