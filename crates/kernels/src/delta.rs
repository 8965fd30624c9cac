//! The gated delta rule of one value head ("Gated Delta Networks", Yang et al.).
//!
//! ```text
//! S  = decay · S                          decay = exp(g), g ≤ 0 the log decay
//! d  = beta · (v − S k)                   what the state still gets wrong about k
//! S  = S + d kᵀ
//! o  = S q                                with the updated state
//! ```
//!
//! `S` is stored `[dim_v, dim_k]`, key fastest, so that every line above works along rows: row `j`
//! needs nothing but `v[j]`, and tiles may cut a head between rows. (The papers' `S` is the
//! transpose, keys by values.)
//!
//! Invariant: [`delta_step`] and [`delta_advance`] leave the same bits in the state. Verifying runs
//! the first on a copy, committing the second on the state itself.

use crate::table::KernelTable;

/// What one token brings to the recurrence of one value head.
#[derive(Clone, Copy, Debug)]
pub struct DeltaToken<'a> {
    /// Key, normalised, `[dim_k]`.
    pub k: &'a [f32],
    /// Value, `[dim_v]`.
    pub v: &'a [f32],
    /// Factor on the old state, `exp` of the log decay; [`DeltaToken::new`] takes the logarithm.
    pub decay: f32,
    /// Share of the correction that is written, 0 to 1.
    pub beta: f32,
}

impl<'a> DeltaToken<'a> {
    /// A token from the *log* decay `g ≤ 0`.
    pub fn new(k: &'a [f32], v: &'a [f32], g: f32, beta: f32) -> Self {
        Self { k, v, decay: g.exp(), beta }
    }

    pub(crate) fn check_state(&self, state: &[f32]) {
        let (dim_v, dim_k) = (self.v.len(), self.k.len());
        assert_eq!(state.len(), dim_v * dim_k, "delta state [{dim_v}, {dim_k}]");
        assert!(dim_k > 0, "a delta state has keys");
    }

    pub(crate) fn check_output(&self, q: &[f32], out: &[f32]) {
        assert_eq!(q.len(), self.k.len(), "query and key of a delta step");
        assert_eq!(out.len(), self.v.len(), "output and value of a delta step");
    }
}

/// Advances `state [dim_v, dim_k]` by one token and reads it with `q [dim_k]` into `out [dim_v]`.
pub fn delta_step(
    table: &KernelTable,
    state: &mut [f32],
    token: &DeltaToken<'_>,
    q: &[f32],
    out: &mut [f32],
) {
    (table.delta_step)(state, token, q, out);
}

/// Advances `state [dim_v, dim_k]` by one token, to the same bits as [`delta_step`].
pub fn delta_advance(table: &KernelTable, state: &mut [f32], token: &DeltaToken<'_>) {
    (table.delta_advance)(state, token);
}
