//! Attention of one query row and head over the cells it may see, in one pass.
//!
//! ```text
//! s_c = scale · q·k_c          out = Σ_c exp(s_c − m) v_c / Σ_c exp(s_c − m)        m = max s_c
//! ```
//!
//! The maximum is not known before the last cell, so it runs along ("Online normalizer calculation
//! for softmax", Milakov & Gimelshein): when a cell exceeds it, what has been summed so far is
//! scaled down once.
//!
//! Invariant: the result is a function of the visible cells' keys and values in their order, and of
//! nothing else. The running maximum moves cell by cell, not page by page, so how the cells are cut
//! into pages, what lies between them (rejected drafts, other branches of a tree, pages that are
//! not visible at all) and which rows share the forward make no difference to a single bit. A row
//! of a draft tree may thus call [`attend_page`](RunningSoftmax::attend_page) for each run of
//! ancestors, and gets what it would get after their commit.

use crate::act::softcap;
use crate::kv::{KvData, KvRows};
use crate::table::KernelTable;
use std::ops::Range;

/// Scores that are computed ahead of their use: small enough for the stack. Any number gives the
/// same result.
const AHEAD: usize = 64;

/// One head of one query row.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The query, `[head_dim]`.
    pub q: &'a [f32],
    /// Factor on `q·k`, usually `1 / √head_dim`.
    pub scale: f32,
    /// Bound on the scaled scores, by [`softcap`].
    pub softcap: Option<f32>,
}

/// A softmax-weighted sum of values in the making.
pub struct RunningSoftmax<'a> {
    table: &'a KernelTable,
    query: Query<'a>,
    /// `Σ exp(s_c − max) v_c` over the cells so far.
    acc: &'a mut [f32],
    /// `Σ exp(s_c − max)`.
    sum: f32,
    max: f32,
}

impl<'a> RunningSoftmax<'a> {
    /// Starts with no cells. The sum, and with [`finish`](Self::finish) the result, is in `out`,
    /// which is as long as a value.
    pub fn new(table: &'a KernelTable, query: Query<'a>, out: &'a mut [f32]) -> Self {
        out.fill(0.0);
        Self { table, query, acc: out, sum: 0.0, max: f32::NEG_INFINITY }
    }

    /// Takes in the cells `visible` of a page, which follow those taken in so far.
    pub fn attend_page(&mut self, k: KvRows<'_>, v: KvRows<'_>, visible: Range<usize>) {
        let mut scores = [0.0; AHEAD];
        for start in visible.clone().step_by(AHEAD) {
            let cells = start..visible.end.min(start + AHEAD);
            let scores = &mut scores[..cells.len()];
            for (score, c) in scores.iter_mut().zip(cells.clone()) {
                *score = self.score(k, c);
            }
            for (score, c) in scores.iter().zip(cells) {
                self.add(*score, v, c);
            }
        }
    }

    /// Divides by the weights' sum and leaves the result in `out`: zeros if no cell was visible.
    ///
    /// A `sink` is the score of a cell whose value is zero: it takes a share of the weight and
    /// adds nothing.
    pub fn finish(mut self, sink: Option<f32>) {
        if self.sum == 0.0 {
            return;
        }
        if let Some(sink) = sink {
            // Overflows only where the cells' share is zero, as it should be: 1/∞.
            self.sum += (sink - self.max).exp();
        }
        (self.table.scale)(self.acc, 1.0 / self.sum);
    }

    fn score(&self, k: KvRows<'_>, c: usize) -> f32 {
        let q = self.query.q;
        let at = c * k.stride + k.offset;
        let product = match k.data {
            KvData::F32(data) => (self.table.dot)(q, &data[at..at + q.len()]),
            KvData::F16(data) => (self.table.dot_f16)(q, &data[at..at + q.len()]),
        };
        let score = product * self.query.scale;
        self.query.softcap.map_or(score, |cap| softcap(score, cap))
    }

    /// Adds cell `c` with its score. A NaN goes into the sum and comes out at the end.
    fn add(&mut self, score: f32, v: KvRows<'_>, c: usize) {
        if score == f32::NEG_INFINITY {
            return; // weight zero; and −∞ less a maximum of −∞ would be NaN
        }
        self.raise_max(score);
        let weight = (score - self.max).exp();
        self.sum += weight;
        let at = c * v.stride + v.offset;
        let dim = self.acc.len();
        match v.data {
            KvData::F32(data) => (self.table.axpy)(self.acc, weight, &data[at..at + dim]),
            KvData::F16(data) => (self.table.axpy_f16)(self.acc, weight, &data[at..at + dim]),
        }
    }

    fn raise_max(&mut self, score: f32) {
        if score > self.max {
            // exp(−∞) = 0 for the first cell, on sums that are zero.
            let correction = (self.max - score).exp();
            self.sum *= correction;
            (self.table.scale)(self.acc, correction);
            self.max = score;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use proptest::prelude::*;

    const DIM: usize = 21;
    /// Cells are wider than a head, and the head is not their first.
    const STRIDE: usize = 30;
    const OFFSET: usize = 5;

    fn query(q: &[f32]) -> Query<'_> {
        Query { q, scale: 0.4, softcap: None }
    }

    fn rows(data: KvData<'_>) -> KvRows<'_> {
        KvRows { data, stride: STRIDE, offset: OFFSET }
    }

    fn noise(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| 3.0 * (seed + i as f32 * 12.9898).sin()).collect()
    }

    fn cell(data: &[f32], c: usize) -> &[f32] {
        &data[c * STRIDE + OFFSET..][..DIM]
    }

    /// Softmax attention in f64 over the given cells.
    fn exact(query: &Query<'_>, k: &[f32], v: &[f32], cells: &[usize], sink: Option<f32>) -> Vec<f64> {
        let score = |&c: &usize| {
            let dot: f64 = query.q.iter().zip(cell(k, c)).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let s = dot * f64::from(query.scale);
            query.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = cells.iter().map(score).collect();
        let max = scores.iter().copied().chain(sink.map(f64::from)).fold(f64::NEG_INFINITY, f64::max);
        let total = scores.iter().map(|s| (s - max).exp()).sum::<f64>()
            + sink.map_or(0.0, |sink| (f64::from(sink) - max).exp());
        let weighted = |d: usize| {
            scores.iter().zip(cells).map(|(s, &c)| (s - max).exp() * f64::from(cell(v, c)[d])).sum::<f64>()
        };
        (0..DIM).map(|d| weighted(d) / total).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn matches_f64(
            n_cells in 1..150usize, seed in 0.0f32..100.0, sink in prop::option::of(-3.0f32..9.0), capped: bool
        ) {
            let (q, k, v) = (noise(DIM, seed), noise(n_cells * STRIDE, seed + 1.0), noise(n_cells * STRIDE, seed + 2.0));
            let query = Query { softcap: capped.then_some(5.0), ..query(&q) };
            let cells: Vec<usize> = (0..n_cells).collect();
            let want = exact(&query, &k, &v, &cells, sink);
            for table in KernelTable::available() {
                let mut out = [f32::NAN; DIM];
                let mut softmax = RunningSoftmax::new(table, query, &mut out);
                softmax.attend_page(rows(KvData::F32(&k)), rows(KvData::F32(&v)), 0..n_cells);
                softmax.finish(sink);
                for (got, want) in out.iter().zip(&want) {
                    prop_assert!((f64::from(*got) - want).abs() < 1e-4, "{}: {got} != {want}", table.isa);
                }
            }
        }

        /// The same cells, whole, in pieces, with gaps of invisible cells, and with empty pages:
        /// the same bits.
        #[test]
        fn only_the_visible_cells_count(
            gaps in prop::collection::vec(0..3usize, 1..90), cuts in prop::collection::vec(0..90usize, 0..5),
            seed in 0.0f32..100.0, half: bool
        ) {
            let n = gaps.len();
            let (q, k, v) = (noise(DIM, seed), noise(n * STRIDE, seed + 1.0), noise(n * STRIDE, seed + 2.0));
            // The cells again, spread out: `gaps[i]` cells of rubbish lie before cell i.
            let (mut spread_k, mut spread_v, mut at) = (vec![], vec![], vec![]);
            for (i, gap) in gaps.iter().enumerate() {
                for (spread, cells) in [(&mut spread_k, &k), (&mut spread_v, &v)] {
                    spread.extend(vec![f32::NAN; gap * STRIDE]);
                    spread.extend(&cells[i * STRIDE..(i + 1) * STRIDE]);
                }
                at.push(spread_k.len() / STRIDE - 1);
            }
            let halve = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>();
            let halves = [&k, &v, &spread_k, &spread_v].map(|x| halve(x));
            let data = if half {
                [0, 1, 2, 3].map(|i| rows(KvData::F16(&halves[i])))
            } else {
                [&k, &v, &spread_k, &spread_v].map(|x| rows(KvData::F32(x)))
            };
            let [k, v, spread_k, spread_v] = data;

            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n)).chain([0, n]).collect();
            cuts.sort();
            for table in KernelTable::available() {
                let run = |attend: &dyn Fn(&mut RunningSoftmax<'_>)| {
                    let mut out = [f32::NAN; DIM];
                    let mut softmax = RunningSoftmax::new(table, query(&q), &mut out);
                    attend(&mut softmax);
                    softmax.finish(Some(0.5));
                    out
                };
                let whole = run(&|s| s.attend_page(k, v, 0..n));
                prop_assert!(whole.iter().all(|x| x.is_finite()));
                prop_assert_eq!(whole, run(&|s| cuts.windows(2).for_each(|w| s.attend_page(k, v, w[0]..w[1]))));
                prop_assert_eq!(whole, run(&|s| at.iter().for_each(|&c| s.attend_page(spread_k, spread_v, c..c + 1))));
            }
        }
    }

    fn attend(q: f32, keys: &[f32], values: &[f32], sink: Option<f32>) -> f32 {
        let mut out = [f32::NAN];
        let rows = |data| KvRows { data: KvData::F32(data), stride: 1, offset: 0 };
        let query = Query { q: &[q], scale: 1.0, softcap: None };
        let mut softmax = RunningSoftmax::new(&crate::scalar::TABLE, query, &mut out);
        softmax.attend_page(rows(keys), rows(values), 0..keys.len());
        softmax.finish(sink);
        out[0]
    }

    #[test]
    fn corners() {
        assert_eq!(attend(1.0, &[], &[], None), 0.0, "nothing visible");
        assert_eq!(attend(1.0, &[], &[], Some(3.0)), 0.0, "nothing but a sink");
        assert_eq!(attend(1.0, &[-700.0, -700.0], &[1.0, 3.0], None), 2.0, "far below zero");
        assert_eq!(attend(1.0, &[1e30, -1e30], &[5.0, 7.0], None), 5.0, "far apart");
        assert_eq!(attend(1.0, &[f32::NEG_INFINITY, 0.0], &[5.0, 7.0], None), 7.0, "a masked first cell");
        assert_eq!(attend(1.0, &[f32::NEG_INFINITY], &[5.0], None), 0.0, "all cells masked");
        assert_eq!(attend(1.0, &[0.0], &[8.0], Some(0.0)), 4.0, "half to the sink");
        assert_eq!(attend(1.0, &[0.0], &[8.0], Some(200.0)), 0.0, "all to the sink");
        assert_eq!(attend(1.0, &[0.0], &[8.0], Some(f32::NEG_INFINITY)), 8.0, "nothing to the sink");
        assert!(attend(1.0, &[f32::NAN, 0.0], &[5.0, 7.0], None).is_nan(), "NaN is not hidden");
        assert!(attend(1.0, &[0.0, 0.0], &[5.0, f32::NAN], None).is_nan(), "NaN is not hidden");
    }
}
