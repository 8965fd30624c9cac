//! The hash model behind the traits of a device: pages, slots and forwards that are strict about their contract.
//!
//! What a real device would let pass, and compute nonsense from, panics here: a page or slot without storage, a
//! cell never written since its page was handed out, a slot run twice without a commit between, a commit of more
//! rows than the window holds. What can't be noticed locally (a stale but written cell, a state advanced over the
//! wrong rows) changes the hash instead.

use std::{
    any::Any,
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use paceline_backend::{
    Exec, Lane, LaneCells, PageClasses, PageId, SavedId, SlotId, StateConfig, StateDecl, StateId, States,
    Step, StepOut, first_cell,
};

use crate::{
    HashModel, Token,
    hash_model::{Cell, Past, Recurrent, attend_all},
    rng::mix,
};

/// Calls so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Pages given storage.
    pub n_alloc: usize,
    /// Pages whose storage was returned.
    pub n_release: usize,
    /// Pages copied.
    pub n_copy: usize,
    /// Slots reset or copied into.
    pub n_slot_start: usize,
}

/// A slot: what is committed, and the rows of the last step that may be.
#[derive(Clone, Debug, Default)]
struct Slot {
    committed: Recurrent,
    /// Tentative rows of a step that has not been committed.
    window: Option<Vec<(Token, u32)>>,
}

#[derive(Debug, Default)]
struct Stores {
    /// Class and cells of the pages that have storage; none where nothing was written since.
    pages: HashMap<PageId, (usize, Vec<Option<Cell>>)>,
    slots: HashMap<SlotId, Slot>,
    saved: HashMap<SavedId, Recurrent>,
    traffic: Traffic,
}

/// Pages and slots of the hash model.
#[derive(Debug)]
pub struct HashStates {
    decls: Vec<StateDecl>,
    config: StateConfig,
    stores: Mutex<Stores>,
}

impl HashStates {
    /// Empty stores.
    pub fn new(decls: Vec<StateDecl>, config: StateConfig) -> HashStates {
        HashStates { decls, config, stores: Mutex::default() }
    }

    /// Pages that have storage.
    pub fn n_page(&self) -> usize {
        self.stores().pages.len()
    }

    /// Recurrent states that are saved.
    pub fn n_saved(&self) -> usize {
        self.stores().saved.len()
    }

    /// What was called so far.
    pub fn traffic(&self) -> Traffic {
        self.stores().traffic
    }

    // A panic under the lock has already failed the test; hiding it behind a poisoned lock helps nobody.
    fn stores(&self) -> MutexGuard<'_, Stores> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stores {
    fn cell(&mut self, lane: &Lane<'_>, class: usize, page_len: usize, at: usize) -> &mut Option<Cell> {
        let page = lane.tables[class].page(at / page_len);
        match self.pages.get_mut(&page) {
            Some((of, cells)) if *of == class => &mut cells[at % page_len],
            Some((of, _)) => panic!("cell {at} is in {page:?}, which is of class {of}, not {class}"),
            None => panic!("cell {at} is in {page:?}, which has no storage"),
        }
    }

    /// Cells that a lane reads, of one class.
    fn read(&mut self, lane: &Lane<'_>, class: usize, page_len: usize, cells: Range<usize>) -> Vec<Cell> {
        let read = |at| match self.cell(lane, class, page_len, at) {
            Some(cell) => *cell,
            None => panic!("cell {at} of {} is read and was never written", lane.n_past),
        };
        cells.map(read).collect()
    }

    fn slot(&mut self, slot: SlotId) -> &mut Slot {
        match self.slots.get_mut(&slot) {
            Some(slot) => slot,
            None => panic!("{slot:?} was never reset"),
        }
    }
}

impl States for HashStates {
    fn decls(&self) -> &[StateDecl] {
        &self.decls
    }

    fn config(&self) -> StateConfig {
        self.config
    }

    fn page_bytes(&self, class: usize) -> usize {
        let classes = PageClasses::of(&self.decls);
        let is_in = |(at, _): &(usize, &StateDecl)| classes.class(StateId(*at as u32)) == Some(class);
        let width = self.decls.iter().enumerate().filter(is_in).map(|(_, decl)| decl.cell_width());
        width.sum::<usize>() * self.config.page_len * 4
    }

    fn slot_bytes(&self) -> usize {
        let width = |d: &StateDecl| d.slot_width() + d.window_width() * self.config.n_tentative_max;
        self.decls.iter().map(width).sum::<usize>() * 4
    }

    fn page_alloc(&self, page: PageId, class: usize) {
        let mut stores = self.stores();
        stores.traffic.n_alloc += 1;
        let old = stores.pages.insert(page, (class, vec![None; self.config.page_len]));
        assert!(old.is_none(), "{page:?} has storage already");
    }

    fn page_release(&self, page: PageId) {
        let mut stores = self.stores();
        stores.traffic.n_release += 1;
        assert!(stores.pages.remove(&page).is_some(), "release of {page:?}, which has no storage");
    }

    fn page_copy(&self, from: PageId, to: PageId) {
        let mut stores = self.stores();
        stores.traffic.n_copy += 1;
        let Some(cells) = stores.pages.get(&from).cloned() else {
            panic!("copy of {from:?} without storage")
        };
        let Some(place) = stores.pages.get_mut(&to) else { panic!("copy into {to:?} without storage") };
        assert_eq!(place.0, cells.0, "class of {from:?} and of its copy {to:?}");
        *place = cells;
    }

    fn slot_reset(&self, slot: SlotId) {
        let mut stores = self.stores();
        stores.traffic.n_slot_start += 1;
        stores.slots.insert(slot, Slot::default());
    }

    fn slot_save(&self, slot: SlotId, saved: SavedId) {
        let mut stores = self.stores();
        let of = stores.slot(slot);
        assert!(of.window.is_none(), "{slot:?} is saved inside a step");
        let committed = of.committed;
        let old = stores.saved.insert(saved, committed);
        assert!(old.is_none(), "{saved:?} has storage already");
    }

    fn slot_load(&self, saved: SavedId, slot: SlotId) {
        let mut stores = self.stores();
        stores.traffic.n_slot_start += 1;
        let Some(&committed) = stores.saved.get(&saved) else { panic!("{saved:?} has no storage") };
        stores.slots.insert(slot, Slot { committed, window: None });
    }

    fn slot_commit(&self, slot: SlotId, n_rows: usize) {
        let mut stores = self.stores();
        let of = stores.slot(slot);
        let Some(window) = of.window.take() else { panic!("commit of {slot:?}, which ran no step") };
        assert!(
            n_rows <= window.len(),
            "commit of {n_rows} rows of {slot:?}, whose window has {}",
            window.len()
        );
        for &(token, position) in &window[..n_rows] {
            of.committed.advance(token, position);
        }
    }

    fn saved_bytes(&self) -> usize {
        self.decls.iter().map(StateDecl::slot_width).sum::<usize>() * 4
    }

    fn saved_release(&self, saved: SavedId) {
        assert!(self.stores().saved.remove(&saved).is_some(), "release of {saved:?}, which has no storage");
    }

    fn page_export(&self, page: PageId, out: &mut Vec<u8>) {
        let stores = self.stores();
        let Some((_, cells)) = stores.pages.get(&page) else { panic!("export of {page:?} without storage") };
        for cell in cells {
            // An unwritten cell is written as one that no token can leave.
            let (token, position, row) = cell.map_or((Token::MAX, 0, 0), |c| (c.token, c.position, c.row));
            out.extend(token.to_le_bytes());
            out.extend(position.to_le_bytes());
            out.extend(row.to_le_bytes());
            // As many bytes as a cell is said to have.
            out.extend([0; CELL_BYTES - 16]);
        }
    }

    fn page_import(&self, page: PageId, bytes: &[u8]) -> bool {
        let (cells, rest) = bytes.as_chunks::<CELL_BYTES>();
        if cells.len() != self.config.page_len || !rest.is_empty() {
            return false;
        }
        let cell = |bytes: &[u8; CELL_BYTES]| {
            let (token, rest) = bytes.split_first_chunk()?;
            let (position, rest) = rest.split_first_chunk()?;
            let (row, _) = rest.split_first_chunk()?;
            let token = Token::from_le_bytes(*token);
            let (position, row) = (u32::from_le_bytes(*position), u64::from_le_bytes(*row));
            (token != Token::MAX).then_some(Cell { token, position, row })
        };
        let mut stores = self.stores();
        let Some(place) = stores.pages.get_mut(&page) else { panic!("import into {page:?} without storage") };
        place.1 = cells.iter().map(cell).collect();
        true
    }

    fn saved_export(&self, saved: SavedId, out: &mut Vec<u8>) {
        let stores = self.stores();
        let Some(of) = stores.saved.get(&saved) else { panic!("export of {saved:?} without storage") };
        // As many bytes as a state is said to have, so tokens are short.
        let tail = of.tail.map(|token| u16::try_from(token).expect("a small vocabulary"));
        out.extend(of.state.to_le_bytes());
        [tail[0], tail[1], tail[2], 0].iter().for_each(|x| out.extend(x.to_le_bytes()));
    }

    fn saved_import(&self, saved: SavedId, bytes: &[u8]) -> bool {
        let Some((state, tail)) = bytes.split_first_chunk() else { return false };
        let (&[a, b, c, _], []) = tail.as_chunks::<2>() else { return false };
        let tail = [a, b, c].map(|token| u64::from(u16::from_le_bytes(token)));
        let old = self.stores().saved.insert(saved, Recurrent { state: u64::from_le_bytes(*state), tail });
        assert!(old.is_none(), "{saved:?} has storage already");
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Bytes of an exported cell: token, position, row, and nothing.
const CELL_BYTES: usize = 32;

/// Forwards of the hash model.
#[derive(Debug)]
pub struct HashExec {
    model: HashModel,
    states: Arc<HashStates>,
}

impl HashExec {
    /// A forward over `states`.
    pub fn new(model: HashModel, states: Arc<HashStates>) -> HashExec {
        HashExec { model, states }
    }

    /// Hashes of a lane's rows; leaves cells and slot as [`Lane`] says.
    fn lane(&self, stores: &mut Stores, lane: &Lane<'_>, tokens: &[Token], positions: &[u32]) -> Vec<u64> {
        let page_len = self.states.config.page_len;
        let mut past = Past::default();
        let classes = PageClasses::of(&self.states.decls);
        let class = |window: &Option<usize>| classes.windows().iter().position(|of| of == window);
        if let Some(all) = class(&None) {
            past.attended = attend_all(&stores.read(lane, all, page_len, 0..lane.n_past));
        }
        let slot = lane.slot.filter(|_| self.model.kind.has_slots());
        assert_eq!(slot.is_some(), self.model.kind.has_slots(), "a lane with {:?}", lane.slot);
        if let Some(slot) = slot {
            let of = stores.slot(slot);
            assert!(of.window.is_none(), "the last step of {slot:?} was not committed");
            past.recurrent = of.committed;
        }
        let mut rows = Vec::with_capacity(tokens.len());
        for (i, (&token, &position)) in tokens.iter().zip(positions).enumerate() {
            let here = lane.n_past + i;
            let windows = self.model.kind.windows().iter().filter(|window| window.is_some());
            let seen = windows.filter_map(|window| {
                let cells = stores.read(lane, class(window)?, page_len, first_cell(*window, here)..here);
                Some(attend_all(&cells))
            });
            past.seen = seen.fold(0, mix);
            let row = self.model.row(token, position, &past);
            rows.push(row);
            let cell = Cell { token, position, row };
            past.attended = cell.attend(past.attended);
            for class in 0..classes.len() {
                *stores.cell(lane, class, page_len, here) = Some(cell);
            }
            past.recurrent.advance(token, position);
            if let Some(slot) = slot.filter(|_| i < lane.n_certain) {
                stores.slot(slot).committed = past.recurrent;
            }
        }
        if let Some(slot) = slot {
            let window: Vec<_> =
                tokens.iter().copied().zip(positions.iter().copied()).skip(lane.n_certain).collect();
            let n_max = self.states.config.n_tentative_max;
            assert!(
                window.len() <= n_max,
                "{} tentative rows, the window has room for {n_max}",
                window.len()
            );
            stores.slot(slot).window = Some(window);
        }
        rows
    }
}

impl Exec for HashExec {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        // A page list is only there for models with pages.
        if self.model.kind.has_pages() {
            step.check(self.states.config.page_len, LaneCells::Own);
        }
        if !self.model.delay.is_zero() {
            std::thread::sleep(self.model.delay);
        }
        let mut stores = self.states.stores();
        let mut rows = Vec::with_capacity(step.n_rows());
        for lane in step.lanes {
            let range = lane.rows.clone();
            rows.extend(self.lane(&mut stores, lane, &step.tokens[range.clone()], &step.positions[range]));
        }
        (out.output_width, out.taps_width) = (self.model.n_vocab, self.model.n_tap);
        out.output.clear();
        for &row in step.outputs {
            self.model.logits_into(rows[row as usize], step.tokens[row as usize], &mut out.output);
        }
        out.taps.clear();
        for &row in &rows {
            self.model.taps_into(row, &mut out.taps);
        }
        out.summarize();
    }
}
