//! Which KV states share pages: those that keep the same cells of a sequence.
//!
//! A layer that looks back through a window never asks for a cell that lies wholly behind it, so its pages can be given
//! back where those of a layer that sees everything must stay. States with the same window make up a *class*, and a
//! sequence has one [`PageTable`](crate::PageTable) for each.

use crate::{StateDecl, StateId};

/// The classes of a model's states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageClasses {
    windows: Vec<Option<usize>>,
    /// Of each state; none where it is not paged.
    of: Vec<Option<usize>>,
}

impl PageClasses {
    /// Those of `decls`.
    pub fn of(decls: &[StateDecl]) -> PageClasses {
        let window = |decl: &StateDecl| match decl {
            StateDecl::Kv { window, .. } => Some(*window),
            _ => None,
        };
        let mut windows: Vec<Option<usize>> = decls.iter().filter_map(window).collect();
        windows.sort_by_key(|window| std::cmp::Reverse(window.unwrap_or(usize::MAX)));
        windows.dedup();
        let class = |decl| window(decl).and_then(|of| windows.iter().position(|window| *window == of));
        PageClasses { of: decls.iter().map(class).collect(), windows }
    }

    /// How many cells each class keeps, the widest one first: none is all.
    pub fn windows(&self) -> &[Option<usize>] {
        &self.windows
    }

    /// Number of classes.
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// True if nothing is paged.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// The class of a state; none for one that is not paged.
    pub fn class(&self, state: StateId) -> Option<usize> {
        self.of[state.0 as usize]
    }
}

/// The first cell that the row in cell `n_past`, or any later one, looks at through `window`, which counts the row's own.
pub fn first_cell(window: Option<usize>, n_past: usize) -> usize {
    window.map_or(0, |window| n_past.saturating_add(1).saturating_sub(window))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_with_the_same_window_share_pages() {
        let kv = |window| StateDecl::Kv { n_head: 1, head_dim: 4, window };
        let conv = StateDecl::ConvTail { channels: 2, width: 4 };
        let classes = PageClasses::of(&[kv(Some(8)), conv, kv(None), kv(Some(16)), kv(Some(8))]);
        assert_eq!(classes.windows(), [None, Some(16), Some(8)]);
        let found = [0, 1, 2, 3, 4].map(|state| classes.class(StateId(state)));
        assert_eq!(found, [Some(2), None, Some(0), Some(1), Some(2)]);
        assert!(PageClasses::of(&[]).is_empty());
    }

    #[test]
    fn a_window_counts_the_row_itself() {
        assert_eq!([first_cell(None, 9), first_cell(Some(1), 9), first_cell(Some(4), 9)], [0, 9, 6]);
        assert_eq!([first_cell(Some(4), 3), first_cell(Some(4), 4)], [0, 1]);
    }
}
