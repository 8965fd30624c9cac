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
            self.raise_max(sink);
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
