//! What choosing a token needs of a row of logits: the greatest, and the sum that makes a probability of it.
//!
//! A vocabulary has 10^5 entries and a verified draft sixteen rows, so going over them once more on one thread costs as much as
//! some layers. Rows are summarised in chunks that threads share; chunks lie at fixed places, so who takes which changes
//! no bit.

use crate::act::exp;

/// Logits of a chunk: they stay in the first-level cache from one pass to the next.
pub const CHUNK: usize = 4096;
/// Sums that run side by side.
const LANES: usize = 16;

/// A chunk of a row of logits, or a whole row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The greatest logit; -∞ if all are.
    pub max: f32,
    /// `Σ exp(logit - max)`; 0 if all are -∞.
    pub sum: f64,
    /// False if a logit is NaN or ∞: the rest means nothing then.
    pub is_sound: bool,
}

impl Summary {
    /// Of no logits.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, is_sound: true };

    /// This and what comes behind it.
    pub fn merge(self, next: Summary) -> Summary {
        let max = if next.max > self.max { next.max } else { self.max };
        let part = |s: Summary| if s.sum == 0.0 { 0.0 } else { s.sum * f64::from(s.max - max).exp() };
        Summary { max, sum: part(self) + part(next), is_sound: self.is_sound && next.is_sound }
    }

    /// `ln Σ exp(logit)`.
    pub fn log_sum(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}

/// Summarises up to [`CHUNK`] logits. Inlined into functions that enable an instruction set.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain loops over arrays become vectors
pub fn summarize(logits: &[f32], out: &mut Summary) {
    let (rows, tail) = logits.as_chunks::<LANES>();
    let mut top = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    for row in rows {
        for l in 0..LANES {
            top[l] = if row[l] > top[l] { row[l] } else { top[l] };
            bad[l] |= u32::from(row[l].is_nan() | (row[l] == f32::INFINITY));
        }
    }
    let mut is_sound = bad.iter().all(|bad| *bad == 0);
    let mut max = top.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    for &x in tail {
        max = if x > max { x } else { max };
        is_sound &= x < f32::INFINITY;
    }
    if max == f32::NEG_INFINITY || !is_sound {
        *out = Summary { max, sum: 0.0, is_sound };
        return;
    }
    let mut sums = [0.0f32; LANES];
    for row in rows {
        for l in 0..LANES {
            sums[l] += exp(row[l] - max);
        }
    }
    let tail: f32 = tail.iter().map(|x| exp(x - max)).sum();
    let sum = sums.iter().map(|sum| f64::from(*sum)).sum::<f64>() + f64::from(tail);
    *out = Summary { max, sum, is_sound };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KernelTable;
    use proptest::prelude::*;

    fn whole(table: &KernelTable, row: &[f32]) -> Summary {
        row.chunks(CHUNK).fold(Summary::EMPTY, |all, chunk| {
            let mut part = Summary::EMPTY;
            (table.rows.summarize)(chunk, &mut part);
            all.merge(part)
        })
    }

    fn exact(row: &[f32]) -> (f32, f64) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (max, f64::from(max) + row.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn matches_f64(n in 1..20_000usize, seed: u16, scale in 0.1f32..60.0, banned in 0..5usize) {
            let mut row: Vec<f32> =
                (0..n).map(|i| scale * (f32::from(seed) + i as f32 * 12.9898).sin()).collect();
            row.iter_mut().step_by(7).take(banned).for_each(|x| *x = f32::NEG_INFINITY);
            prop_assume!(row.iter().any(|x| x.is_finite()));
            let (max, log_sum) = exact(&row);
            let first = whole(&KernelTable::available()[0], &row);
            for table in KernelTable::available() {
                let got = whole(table, &row);
                prop_assert_eq!(got.max, max);
                prop_assert!(got.is_sound && (got.log_sum() - log_sum).abs() < 1e-5, "{} {}", got.log_sum(), log_sum);
                prop_assert_eq!(got, first, "{}", table.isa);
            }
        }
    }

    #[test]
    fn what_is_no_number_is_noticed_wherever_it_is() {
        for table in KernelTable::available() {
            for n in [1, 16, 33, 5000] {
                for bad in [f32::NAN, f32::INFINITY] {
                    for at in [0, n / 2, n - 1] {
                        let mut row = vec![1.0; n];
                        row[at] = bad;
                        assert!(!whole(table, &row).is_sound, "{bad} at {at} of {n}");
                    }
                }
                let none = whole(table, &vec![f32::NEG_INFINITY; n]);
                assert_eq!((none.max, none.sum, none.is_sound), (f32::NEG_INFINITY, 0.0, true));
            }
        }
    }
}
