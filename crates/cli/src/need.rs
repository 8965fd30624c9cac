//! What sequences take of memory, worked out from what a model's layers remember.

use paceline_backend::{KvTypes, PageClasses, StateConfig, StateDecl, StateId};

/// What states take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryNeed {
    /// Of each class of layers how many cells it keeps (none is all) and the bytes of a cell over all its layers.
    pub classes: Vec<(Option<u64>, u64)>,
    /// Bytes of a slot's recurrent state, its tentative rows included.
    pub slot_bytes: u64,
}

/// How much is asked of it.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Cells over all slots.
    pub n_cell: u64,
    /// Slots that they are spread over.
    pub n_slot: u64,
    /// The most rows of a step.
    pub n_row: u64,
}

impl MemoryNeed {
    /// Of a model with these states.
    pub fn new(states: &[StateDecl], kv: KvTypes, n_tentative: usize) -> MemoryNeed {
        let classes = PageClasses::of(states);
        let mut cells: Vec<(Option<u64>, u64)> =
            classes.windows().iter().map(|window| (window.map(|n| n as u64), 0)).collect();
        for (at, state) in states.iter().enumerate() {
            if let Some(class) = classes.class(StateId(at as u32)) {
                cells[class].1 += state.cell_bytes(kv) as u64;
            }
        }
        let slot: usize = states.iter().map(|s| s.slot_width() + n_tentative * s.window_width()).sum();
        MemoryNeed { classes: cells, slot_bytes: (slot * size_of::<f32>()) as u64 }
    }

    /// Bytes of a token of context, over all attention layers, before any window is full.
    pub fn cell_bytes(&self) -> u64 {
        self.classes.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of a token of context once all windows are full.
    pub fn far_cell_bytes(&self) -> u64 {
        self.classes.iter().filter(|(window, _)| window.is_none()).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes that one row reads behind `n` tokens of context.
    pub fn read_bytes(&self, n: u64) -> u64 {
        self.classes.iter().map(|(window, bytes)| bytes * window.map_or(n, |window| window.min(n))).sum()
    }

    /// Bytes of all cells of full slots while a step runs.
    ///
    /// A window keeps itself and the rows of the step, and the pages at its ends are whole.
    pub fn context_bytes(&self, demand: Demand) -> u64 {
        let Demand { n_cell, n_slot, n_row } = demand;
        let page = StateConfig::default().page_len as u64;
        let cells = |window: Option<u64>| match window {
            None => n_cell,
            Some(window) => {
                let of_slot = ((window - 1).div_ceil(page) + 2) * page;
                n_cell.min(of_slot.saturating_mul(n_slot).saturating_add(n_row))
            }
        };
        let bytes = self.classes.iter().map(|(window, bytes)| bytes.saturating_mul(cells(*window)));
        bytes.fold(0, u64::saturating_add)
    }

    /// The longest context that `n_slot` slots can have in so many bytes.
    pub fn n_ctx_within(&self, bytes: u64, n_slot: u64, n_row: u64) -> u64 {
        let fits = |n_ctx: u64| {
            let demand = Demand { n_cell: n_ctx.saturating_mul(n_slot), n_slot, n_row };
            self.context_bytes(demand) <= bytes
        };
        // The number that fits first, then halves: it grows without steps down.
        let (mut low, mut high) = (0, u64::from(u32::MAX));
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            match fits(middle) {
                true => low = middle,
                false => high = middle - 1,
            }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_backend::KvType;

    fn need() -> MemoryNeed {
        let kv = |n_head, window| StateDecl::Kv { n_head, head_dim: 32, window };
        let states =
            [kv(4, Some(100)), kv(1, None), kv(4, Some(100)), StateDecl::ConvTail { channels: 8, width: 4 }];
        MemoryNeed::new(&states, KvType::F16.into(), 0)
    }

    #[test]
    fn windows_stop_growing() {
        let need = need();
        // 128 bytes of a head's key and value; one full layer of one head, two layers of four with a window.
        assert_eq!(need.classes, [(None, 128), (Some(100), 1024)]);
        assert_eq!((need.cell_bytes(), need.far_cell_bytes(), need.slot_bytes), (1152, 128, 96));
        let bytes = |n_cell, n_slot| need.context_bytes(Demand { n_cell, n_slot, n_row: 50 });
        assert_eq!(bytes(60, 1), 60 * 1152);
        // 99 cells are in three pages at most, and 50 more rows reach into one more.
        assert_eq!(bytes(100_000, 1), 100_000 * 128 + (4 * 64 + 50) * 1024);
        assert_eq!(bytes(100_000, 3) - bytes(100_000, 1), 2 * 4 * 64 * 1024);
    }

    #[test]
    fn the_longest_context_that_fits() {
        let need = need();
        for (n_ctx, n_slot) in [(10, 1), (99, 4), (5000, 1), (70_000, 8)] {
            let demand = Demand { n_cell: n_ctx * n_slot, n_slot, n_row: 512 };
            let bytes = need.context_bytes(demand);
            assert_eq!(need.n_ctx_within(bytes, n_slot, 512), n_ctx, "{n_ctx} of {n_slot}");
            assert_eq!(need.n_ctx_within(bytes - 1, n_slot, 512), n_ctx - 1, "{n_ctx} of {n_slot}");
        }
        assert_eq!(MemoryNeed::default().n_ctx_within(0, 1, 1), u64::from(u32::MAX));
    }
}
