//! What every backend must compute: one suite, run by the tests of each of them.
//!
//! [`check`] runs a table of small plans, op by op, over every tensor format and awkward sizes, on the backend
//! and on [`ScalarBackend`], which is the definition of every op, and compares results. States can't be read
//! through the interface, so they are compared by what later steps make of them: after random runs of
//! steps, partial commits, copies and resets, the rows that follow must agree too.
//!
//! [`check_bits`] asks for more: several backends (one device with different numbers of threads, say) that must
//! agree bit for bit, with each other and with themselves however rows are cut into steps. The CPU backend
//! promises that, a GPU backend may promise it in a deterministic mode.
//!
//! A check panics at the first difference and says in which case, step, row and column it lies. All numbers
//! follow fixed seeds.

mod bits;
mod ops;
pub(crate) mod random;
mod rig;
mod scalar;
mod states;

pub use bits::check_bits;
pub use scalar::ScalarBackend;

use paceline_gguf::GgmlType;

use crate::Backend;

/// How far results may be from the definition, relative to the largest value of a row.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Products with a matrix of a quantised format, relative to the size that products of random values have, if that
    /// is more. See [`EIGHT_BIT_ACTIVATIONS`].
    pub matmul: f64,
    /// Everything else.
    pub other: f64,
}

/// [`Tolerance::matmul`] of a backend that rounds activations to 8 bits under the largest of their block.
///
/// Weights and activations of the cases are uniform in [-1, 1). A rounding error is uniform within half a step,
/// 1/254 of the block's largest value, so its rms is 1/254 of that of the values, and an output's error likewise: 0.4 % of an output's
/// rms. The largest of the 10^4 to 10^5 outputs of a format is below five times that.
pub const EIGHT_BIT_ACTIVATIONS: f64 = 5.0 / 254.0;

impl Default for Tolerance {
    /// For f32 throughout, sums in any order.
    fn default() -> Tolerance {
        Tolerance { matmul: 2e-5, other: 2e-5 }
    }
}

/// What a run of [`check`] covered.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cases that ran.
    pub n_case: usize,
    /// Formats that the backend refused to upload, and whose cases therefore did not run.
    pub unsupported: Vec<GgmlType>,
}

/// Runs every case on `backend`. Panics at the first result that is not within `tolerance`.
pub fn check(backend: &dyn Backend, tolerance: Tolerance) -> Report {
    let mut report = Report::default();
    ops::check(backend, tolerance, &mut report);
    states::check(backend, tolerance, &mut report);
    report
}
