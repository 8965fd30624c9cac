//! What changes from step to step: the rows, and where each sequence keeps its past.

use std::ops::Range;

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
    /// A table for each class, with pages for all cells that the lane's rows look at, and for the rows themselves. Those that
    /// hold the lane's own rows are not shared.
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

    /// Panics unless lanes, positions and outputs agree; `page_len` as in the states.
    pub fn check(&self, page_len: usize) {
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
            let cells = lane.n_past + lane.rows.len();
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
    /// `[n, taps_width]`: the tapped hidden states of every row, tap layers side by side.
    pub taps: Vec<f32>,
    /// Width of a taps row, 0 without taps.
    pub taps_width: usize,
    /// Experts that the products of this step read, each layer's by itself: what a step of a mixture of experts costs
    /// beside its rows. 0 where there are none, and on backends that do not count.
    pub n_experts_read: usize,
}

impl StepOut {
    /// Output row `i` (the row of `outputs[i]`).
    pub fn output_row(&self, i: usize) -> &[f32] {
        &self.output[i * self.output_width..(i + 1) * self.output_width]
    }

    /// The tapped states of step rows `rows`.
    pub fn taps_rows(&self, rows: Range<usize>) -> &[f32] {
        &self.taps[rows.start * self.taps_width..rows.end * self.taps_width]
    }
}
