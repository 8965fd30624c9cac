//! Which rows of which slots a step computes: a pure function of the slots.
//!
//! A slot has tokens *known* (prompt, answer) and tokens *computed*; a step narrows the gap. A slot whose gap is
//! one token is decoding: that token is its anchor, and a draft may follow it. Anchors and drafts always take
//! part in full, so no other slot's prompt and no small ubatch can split or shrink a verification; prompts share
//! what the budget leaves, and at least a fixed part of it, so that they advance while others decode.

/// What the plan needs to know of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Index of the slot.
    pub slot: usize,
    /// Tokens known and not computed yet, at least 1.
    pub n_gap: usize,
    /// Most of them that this step may compute, at least 1: a snapshot is taken behind them.
    pub n_known_max: usize,
    /// Drafted tokens after them; only if `n_gap` is 1.
    pub n_draft: usize,
}

/// The rows of one slot in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanePlan {
    /// Index of the slot.
    pub slot: usize,
    /// Known tokens computed: certain rows.
    pub n_known: usize,
    /// Drafted tokens verified: tentative rows.
    pub n_draft: usize,
    /// True if the gap closes, so that the last known row and the drafted ones need logits.
    pub closes: bool,
}

/// The rows of a step, lanes in slot order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// One lane per slot that takes part.
    pub lanes: Vec<LanePlan>,
}

impl StepPlan {
    /// Rows in all.
    pub fn n_rows(&self) -> usize {
        self.lanes.iter().map(|lane| lane.n_known + lane.n_draft).sum()
    }
}

/// Lays out a step of about `n_ubatch` rows.
pub fn plan(slots: &[SlotView], n_ubatch: usize) -> StepPlan {
    let decoding: usize = slots.iter().filter(|s| s.n_gap == 1).map(|s| 1 + s.n_draft).sum();
    let n_prefilling = slots.iter().filter(|s| s.n_gap > 1).count();
    // A quarter of the ubatch is the prompts' even when decoding fills it.
    let mut budget = n_ubatch.saturating_sub(decoding).max(n_ubatch / 4).max(1);
    let mut left = n_prefilling;
    let mut lanes = Vec::with_capacity(slots.len());
    for view in slots {
        let n_known = if view.n_gap == 1 {
            1
        } else {
            // An even share, and what earlier prompts left over.
            let share = (budget / left.max(1)).max(1).min(view.n_gap).min(view.n_known_max);
            budget = budget.saturating_sub(share);
            left -= 1;
            share
        };
        debug_assert!(view.n_gap == 1 || view.n_draft == 0, "a draft behind an unfinished prompt");
        let closes = n_known == view.n_gap;
        lanes.push(LanePlan { slot: view.slot, n_known, n_draft: view.n_draft, closes });
    }
    StepPlan { lanes }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(n_gap, n_draft)` of each slot -> `(n_known, n_draft, closes)` of each lane.
    fn check(slots: &[(usize, usize)], n_ubatch: usize, want: &[(usize, usize, bool)]) {
        let views = slots.iter().enumerate().map(|(slot, &(n_gap, n_draft))| SlotView {
            slot,
            n_gap,
            n_known_max: n_gap,
            n_draft,
        });
        check_views(&views.collect::<Vec<_>>(), n_ubatch, want);
    }

    fn check_views(views: &[SlotView], n_ubatch: usize, want: &[(usize, usize, bool)]) {
        let got: Vec<_> =
            plan(views, n_ubatch).lanes.iter().map(|l| (l.n_known, l.n_draft, l.closes)).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn a_prompt_is_cut_into_chunks() {
        check(&[(1000, 0)], 512, &[(512, 0, false)]);
        check(&[(488, 0)], 512, &[(488, 0, true)]);
        check(&[(2, 0)], 1, &[(1, 0, false)]);
    }

    #[test]
    fn drafts_are_never_cut() {
        check(&[(1, 15), (1, 15), (1, 15)], 16, &[(1, 15, true), (1, 15, true), (1, 15, true)]);
    }

    #[test]
    fn prompts_advance_while_others_decode() {
        check(&[(1, 15), (100, 0)], 16, &[(1, 15, true), (4, 0, false)]);
        check(&[(1, 3), (100, 0)], 64, &[(1, 3, true), (60, 0, false)]);
    }

    #[test]
    fn a_prompt_stops_where_a_snapshot_is_due() {
        let view = |slot, n_known_max| SlotView { slot, n_gap: 100, n_known_max, n_draft: 0 };
        check_views(&[view(0, 7), view(1, 100)], 60, &[(7, 0, false), (53, 0, false)]);
        check_views(&[view(0, 1)], 60, &[(1, 0, false)]);
    }

    #[test]
    fn prompts_share_the_budget() {
        check(&[(100, 0), (10, 0), (100, 0)], 60, &[(20, 0, false), (10, 0, true), (30, 0, false)]);
    }
}
