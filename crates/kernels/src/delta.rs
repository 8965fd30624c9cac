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

/// Successive tokens of one value head.
#[derive(Clone, Copy, Debug)]
pub struct DeltaRun<'a> {
    /// Width of a key.
    pub dim_k: usize,
    /// Keys, normalised, `[n, dim_k]`.
    pub k: &'a [f32],
    /// Values, `[n, dim_v]`.
    pub v: &'a [f32],
    /// Factors on the old states, `[n]`.
    pub decay: &'a [f32],
    /// Shares of the corrections that are written, `[n]`.
    pub beta: &'a [f32],
}

impl<'a> DeltaRun<'a> {
    /// Number of tokens.
    pub fn n(&self) -> usize {
        self.decay.len()
    }

    pub(crate) fn dim_v(&self) -> usize {
        self.v.len() / self.n().max(1)
    }

    /// Token `t` alone.
    pub(crate) fn token(&self, t: usize) -> DeltaToken<'a> {
        let (dim_k, dim_v) = (self.dim_k, self.dim_v());
        DeltaToken {
            k: &self.k[t * dim_k..(t + 1) * dim_k],
            v: &self.v[t * dim_v..(t + 1) * dim_v],
            decay: self.decay[t],
            beta: self.beta[t],
        }
    }

    /// Panics unless all lengths fit, `q` and `out` being empty or of `n` tokens.
    pub(crate) fn check(&self, state: &[f32], q: &[f32], out: &[f32]) {
        let (n, dim_v) = (self.n(), self.dim_v());
        assert!(self.dim_k > 0, "a delta state has keys");
        assert_eq!(
            [self.k.len(), self.v.len(), self.beta.len()],
            [n * self.dim_k, n * dim_v, n],
            "tokens of a run"
        );
        assert!(n == 0 || state.len() == dim_v * self.dim_k, "delta state [{dim_v}, {}]", self.dim_k);
        assert!(
            q.is_empty() && out.is_empty() || [q.len(), out.len()] == [self.k.len(), self.v.len()],
            "queries of a run"
        );
    }
}

/// Advances `state` by several tokens, reading it after each with `q [n, dim_k]` into `out [n, dim_v]` unless both are empty. The same
/// bits as token by token, but a row of the state stays in registers meanwhile.
pub fn delta_run(table: &KernelTable, state: &mut [f32], run: &DeltaRun<'_>, q: &[f32], out: &mut [f32]) {
    (table.delta_run)(state, run, q, out);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_steps_worked_by_hand() {
        // K = V = 2; state transposed to [dim_v, dim_k]. Figures to eight places.
        for table in KernelTable::available() {
            let (mut state, mut out) = ([0.0; 4], [0.0; 2]);
            let mut step = |k: [f32; 2], v: [f32; 2], q: [f32; 2], g, beta, expected: [f32; 6]| {
                delta_step(table, &mut state, &DeltaToken::new(&k, &v, g, beta), &q, &mut out);
                let got: Vec<f32> = state.iter().chain(&out).copied().collect();
                let close = got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 1e-6);
                assert!(close, "{}: {got:?} != {expected:?}", table.isa);
            };
            let first = [0.6, 0.8, -0.3, -0.4, 0.6, -0.3];
            step([0.6, 0.8], [2.0, -1.0], [1.0, 0.0], -0.5, 0.5, first);
            let second = [0.496_728, 0.623_040_6, 2.676_636, -0.311_520_3, 0.796_469_3, 1.356_765_3];
            step([1.0, 0.0], [0.5, 3.0], [0.6, 0.8], -0.25, 0.9, second);
        }
    }

    /// The rule in f64, on `state [dim_v, dim_k]`.
    fn step_f64(state: &mut [f64], token: &DeltaToken<'_>, q: &[f32]) -> Vec<f64> {
        let dot = |row: &[f64], x: &[f32]| row.iter().zip(x).map(|(s, x)| s * f64::from(*x)).sum::<f64>();
        let rows = state.chunks_mut(q.len()).zip(token.v);
        rows.map(|(row, v)| {
            row.iter_mut().for_each(|s| *s *= f64::from(token.decay));
            let d = f64::from(token.beta) * (f64::from(*v) - dot(row, token.k));
            row.iter_mut().zip(token.k).for_each(|(s, k)| *s += d * f64::from(*k));
            dot(row, q)
        })
        .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn steps_match_f64_and_advance_leaves_the_same_bits(
            dim_k in 1..70usize, dim_v in 1..9usize, n_tokens in 1..6usize, seed in 0..1000u32
        ) {
            let noise = |n: usize, salt: u32| -> Vec<f32> {
                (0..n).map(|i| ((seed + salt * 77) as f32 * 1.3 + i as f32 * 12.9898).sin()).collect()
            };
            for table in KernelTable::available() {
                let mut stepped = noise(dim_v * dim_k, 9);
                let mut advanced = stepped.clone();
                let mut exact: Vec<f64> = stepped.iter().map(|s| f64::from(*s)).collect();
                for t in 0..n_tokens as u32 {
                    let (mut k, v, q) = (noise(dim_k, 3 * t), noise(dim_v, 3 * t + 1), noise(dim_k, 3 * t + 2));
                    let length = k.iter().map(|k| k * k).sum::<f32>().sqrt().max(1e-3);
                    k.iter_mut().for_each(|k| *k /= length);
                    let token = DeltaToken::new(&k, &v, -0.1 * t as f32, 0.7);
                    let mut out = vec![f32::NAN; dim_v];
                    delta_step(table, &mut stepped, &token, &q, &mut out);
                    delta_advance(table, &mut advanced, &token);
                    prop_assert_eq!(&stepped, &advanced, "{}", table.isa);
                    let want = step_f64(&mut exact, &token, &q);
                    for (got, want) in out.iter().zip(want).chain(stepped.iter().zip(exact.iter().copied())) {
                        prop_assert!((f64::from(*got) - want).abs() < 1e-4, "{}: {got} != {want}", table.isa);
                    }
                }
            }
        }

        #[test]
        fn a_run_is_its_tokens_one_by_one(
            dim_k in prop::sample::select(vec![1, 7, 32, 64, 127, 128, 256]), dim_v in 1..9usize, n in 0..20usize, seed in 0..1000u32
        ) {
            let noise = |n: usize, salt: u32| -> Vec<f32> {
                (0..n).map(|i| 0.2 * ((seed + salt * 77) as f32 * 1.3 + i as f32 * 12.9898).sin()).collect()
            };
            let (k, v, q) = (noise(n * dim_k, 1), noise(n * dim_v, 2), noise(n * dim_k, 3));
            let (decay, beta): (Vec<f32>, Vec<f32>) = (0..n).map(|t| ((-0.1 * t as f32).exp(), 0.7)).unzip();
            let run = DeltaRun { dim_k, k: &k, v: &v, decay: &decay, beta: &beta };
            for table in KernelTable::available() {
                let mut one_by_one = noise(dim_v * dim_k, 9);
                let (mut run_state, mut advanced) = (one_by_one.clone(), one_by_one.clone());
                let (mut want, mut got) = (vec![f32::NAN; n * dim_v], vec![f32::NAN; n * dim_v]);
                for t in 0..n {
                    let out = &mut want[t * dim_v..(t + 1) * dim_v];
                    delta_step(table, &mut one_by_one, &run.token(t), &q[t * dim_k..(t + 1) * dim_k], out);
                }
                delta_run(table, &mut run_state, &run, &q, &mut got);
                delta_run(table, &mut advanced, &run, &[], &mut []);
                prop_assert_eq!(&got, &want, "{}", table.isa);
                prop_assert_eq!(&run_state, &one_by_one, "{}", table.isa);
                prop_assert_eq!(&advanced, &one_by_one, "{}", table.isa);
            }
        }

        #[test]
        fn rows_are_independent(dim_k in 1..40usize, seed in 0..1000u32) {
            let noise = |n: usize, salt: u32| -> Vec<f32> {
                (0..n).map(|i| ((seed + salt) as f32 + i as f32 * 78.233).cos()).collect()
            };
            let (k, v, q) = (noise(dim_k, 1), noise(6, 2), noise(dim_k, 3));
            for table in KernelTable::available() {
                let (mut whole, mut out) = (noise(6 * dim_k, 4), [0.0; 6]);
                let mut cut = whole.clone();
                delta_step(table, &mut whole, &DeltaToken::new(&k, &v, -0.3, 0.4), &q, &mut out);
                let mut cut_out = [0.0; 6];
                let (top, bottom) = cut.split_at_mut(2 * dim_k);
                let (out_top, out_bottom) = cut_out.split_at_mut(2);
                delta_step(table, top, &DeltaToken::new(&k, &v[..2], -0.3, 0.4), &q, out_top);
                delta_step(table, bottom, &DeltaToken::new(&k, &v[2..], -0.3, 0.4), &q, out_bottom);
                prop_assert_eq!((whole, out), (cut, cut_out), "{}", table.isa);
            }
        }
    }

    #[test]
    fn a_full_reset_forgets_all() {
        for table in KernelTable::available() {
            let (mut state, mut out) = (vec![3.0; 2 * 32], [0.0; 2]);
            let token = DeltaToken::new(&[0.0; 32], &[1.0, 2.0], f32::NEG_INFINITY, 1.0);
            delta_step(table, &mut state, &token, &[1.0; 32], &mut out);
            assert_eq!((state, out), (vec![0.0; 64], [0.0; 2]), "{}", table.isa);
        }
    }

    #[test]
    #[should_panic(expected = "delta state [2, 3]")]
    fn a_state_of_another_shape_is_refused() {
        let token = DeltaToken::new(&[0.0; 3], &[0.0; 2], 0.0, 1.0);
        delta_advance(&crate::scalar::TABLE, &mut [0.0; 5], &token);
    }
}
