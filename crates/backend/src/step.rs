//! What changes from step to step: the rows, and where each sequence keeps its past.

use std::ops::Range;

use paceline_kernels::summary::{CHUNK, Summary, summarize};

use crate::Token;

/// A page of KV cells in [`States`](crate::States), shared by all KV layers of a [class](crate::PageClasses).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// A slot of recurrent state in [`States`](crate::States), shared by all recurrent layers of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// A copy of the recurrent state that a slot had, in [`States`](crate::States).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SavedId(pub u32);

/// Cells that the lanes of a step have pages for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneCells {
    /// The committed ones and one for each row.
    Own,
    /// The committed ones: the plan writes no cells and its rows don't see each other, so it can read the memory of another
    /// model.
    Past,
}

/// The pages of one sequence in one [class](crate::PageClasses): cell `c` lies in page `c / page_len`, counted from the
/// sequence's beginning, and pages before `first` have been given back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    /// Pages that are no more.
    pub first: usize,
    /// Those that are.
    pub pages: Vec<PageId>,
}

impl PageTable {
    /// All pages of a sequence.
    pub fn whole(pages: Vec<PageId>) -> PageTable {
        PageTable { first: 0, pages }
    }

    /// The number behind the last page.
    pub fn end(&self) -> usize {
        self.first + self.pages.len()
    }

    /// Page `i`, counted from the sequence's beginning.
    ///
    /// # Panics
    /// If it was given back, or is not there yet.
    pub fn page(&self, i: usize) -> PageId {
        match i.checked_sub(self.first).and_then(|at| self.pages.get(at)) {
            Some(page) => *page,
            None => panic!("page {i} of a sequence that has {}..{}", self.first, self.end()),
        }
    }
}

/// The rows of one sequence in a step. Row `i` of the lane sits in KV cell `n_past + i`.
#[derive(Clone, Debug)]
pub struct Lane<'a> {
    /// Rows of the step that belong to this sequence: contiguous, in order.
    pub rows: Range<usize>,
    /// Committed cells of the sequence before this step.
    pub n_past: usize,
    /// How many of the first rows are certain to be committed (prompt tokens, the anchor). The recurrent
    /// state advances over exactly these; the rest is kept in the tentative window for
    /// [`slot_commit`](crate::States::slot_commit).
    pub n_certain: usize,
    /// A table for each class, with pages for all cells that the lane's rows look at, and for the rows themselves unless the
    /// plan only looks at committed ones ([`LaneCells`]). Those that hold the lane's own rows are not shared.
    pub tables: &'a [PageTable],
    /// The recurrent slot, where the model has recurrent layers.
    pub slot: Option<SlotId>,
}

impl Lane<'_> {
    /// The slot, for ops that need one.
    pub(crate) fn recurrent_slot(&self) -> SlotId {
        let Some(slot) = self.slot else { panic!("rows {:?}: a recurrent layer and no slot", self.rows) };
        slot
    }
}

/// One forward: `n` rows of several lanes.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// `[n]`; ignored by plans that embed nothing.
    pub tokens: &'a [Token],
    /// `[n, width]` rows for [`PlanBuilder::input`](crate::PlanBuilder::input), else empty.
    pub inputs: &'a [f32],
    /// `[n]` positions for rotary embeddings.
    pub positions: &'a [u32],
    /// The sequences; their row ranges cover `0..n` in order, without gaps.
    pub lanes: &'a [Lane<'a>],
    /// Rows whose output is wanted, ascending.
    pub outputs: &'a [u32],
}

impl Step<'_> {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.positions.len()
    }

    /// Panics unless lanes, positions and outputs agree; `page_len` as in the states, `cells` as the plan has them.
    pub fn check(&self, page_len: usize, cells: LaneCells) {
        let n = self.n_rows();
        let mut next = 0;
        for lane in self.lanes {
            assert_eq!(lane.rows.start, next, "lanes must cover the rows in order");
            assert!(!lane.rows.is_empty(), "a lane without rows");
            assert!(
                lane.n_certain <= lane.rows.len(),
                "{} certain of {} rows",
                lane.n_certain,
                lane.rows.len()
            );
            let cells = match cells {
                LaneCells::Own => lane.n_past + lane.rows.len(),
                LaneCells::Past => lane.n_past,
            };
            for table in lane.tables {
                assert!(table.end() * page_len >= cells, "{} pages for {cells} cells", table.end());
            }
            next = lane.rows.end;
        }
        assert_eq!(next, n, "lanes cover {next} of {n} rows");
        assert!(self.outputs.iter().all(|&r| (r as usize) < n), "output row out of range");
        assert!(self.outputs.is_sorted(), "output rows must ascend");
    }
}

/// Results of a step, reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct StepOut {
    /// `[outputs.len(), output_width]`: the plan's output, one row for each of [`Step::outputs`].
    pub output: Vec<f32>,
    /// Width of an output row.
    pub output_width: usize,
    /// Of each output row: what choosing its greatest value needs.
    pub summaries: Vec<RowSummary>,
    /// `[n, taps_width]`: the tapped hidden states of every row, tap layers side by side; or a plan's second result.
    pub taps: Vec<f32>,
    /// Width of a taps row, 0 without taps.
    pub taps_width: usize,
    /// Experts that the products of this step read, each layer's by itself: what a step of a mixture of experts costs
    /// beside its rows. 0 where there are none, and on backends that do not count.
    pub n_experts_read: usize,
}

/// The greatest value of an output row, and what its share is computed from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSummary {
    /// Where the greatest value is; the first place of several.
    pub at: u32,
    /// The greatest value.
    pub max: f32,
    /// `ln Σ exp(value)`.
    pub log_sum: f64,
}

impl RowSummary {
    /// From the summaries of the row's chunks.
    pub(crate) fn new(row: &[f32], parts: impl Iterator<Item = Summary>) -> RowSummary {
        let (mut all, mut best) = (Summary::EMPTY, 0);
        for (i, part) in parts.enumerate() {
            if part.max > all.max {
                best = i;
            }
            all = all.merge(part);
        }
        let first = (best * CHUNK).min(row.len());
        let at = row[first..].iter().position(|x| *x == all.max).unwrap_or(0);
        let log_sum = if all.is_sound { all.log_sum() } else { f64::NAN };
        RowSummary { at: (first + at) as u32, max: all.max, log_sum }
    }
}

impl StepOut {
    /// What is known of output row `i`: none if a value is NaN or ∞, or all are -∞.
    pub fn summary(&self, i: usize) -> Option<RowSummary> {
        self.summaries.get(i).copied().filter(|summary| summary.log_sum.is_finite())
    }

    /// Summarises the output rows, for backends without a quicker way.
    pub fn summarize(&mut self) {
        let Self { output, output_width, summaries, .. } = self;
        summaries.clear();
        if *output_width > 0 {
            summaries.extend(output.chunks_exact(*output_width).map(|row| {
                let parts = row.chunks(CHUNK).map(|chunk| {
                    let mut part = Summary::EMPTY;
                    summarize(chunk, &mut part);
                    part
                });
                RowSummary::new(row, parts)
            }));
        }
    }

    /// Output row `i` (the row of `outputs[i]`).
    pub fn output_row(&self, i: usize) -> &[f32] {
        &self.output[i * self.output_width..(i + 1) * self.output_width]
    }

    /// The tapped states of step rows `rows`.
    pub fn taps_rows(&self, rows: Range<usize>) -> &[f32] {
        &self.taps[rows.start * self.taps_width..rows.end * self.taps_width]
    }
}
