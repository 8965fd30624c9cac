#![forbid(unsafe_code)]
//! What sequences remember: which pages and slots are theirs, how far they are committed, and what is only
//! tentative.
//!
//! ```text
//!  pages   [p0][p1][p2]            cells 0 .. len are committed,
//!           ▲▲▲▲▲▲▲ ▲▲▲···          len .. len + n_rows are tentative until `commit`
//!          0       len
//!  slot    recurrent state after cell len - 1 (certain rows advance it, tentative ones never)
//! ```
//!
//! One step of a sequence is a transaction: [`Memory::prepare`] makes room for its rows, [`Memory::extend`] for
//! more that are only tried, [`Memory::lane`] describes them to the backend, [`Memory::commit`] makes the first of them final. Nothing needs undoing: rows
//! that are not committed lie behind `len`, where nobody looks.
//!
//! Pages are counted: [`Memory::fork`] shares them, and a shared page is copied before a sequence writes into
//! it. Storage is asked of the device when a page is first used and returned when the last sequence lets go,
//! so a context size is a limit, not a reservation.

use std::sync::Arc;

use paceline_backend::{Lane, PageId, SlotId, StateDecl, States};

/// A sequence. Ids are never used twice, so a stale one is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(u64);

/// There are not enough free pages for a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the KV cache is full: {needed} more pages of {page_len} cells needed, {free} free of {total}")]
pub struct NoRoom {
    /// Pages that the step would have taken.
    pub needed: usize,
    /// Pages free.
    pub free: usize,
    /// Pages in all.
    pub total: usize,
    /// Cells in a page.
    pub page_len: usize,
}

/// Usage figures, for logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    /// Sequences alive.
    pub n_seq: usize,
    /// Pages in use.
    pub n_page: usize,
    /// Pages that may be in use at once.
    pub n_page_max: usize,
    /// Bytes behind pages and slots in use.
    pub bytes: usize,
}

#[derive(Debug)]
struct Sequence {
    id: SeqId,
    len: usize,
    pages: Vec<PageId>,
    slot: Option<SlotId>,
    /// Rows prepared and not yet committed: how many, and how many of them are certain.
    pending: Option<(usize, usize)>,
}

/// The memory of all sequences of one model.
pub struct Memory {
    states: Arc<dyn States>,
    page_len: usize,
    n_page_max: usize,
    has_pages: bool,
    has_slots: bool,
    /// Reference counts by page id; ids of freed pages wait in `free_pages`.
    refs: Vec<u32>,
    free_pages: Vec<PageId>,
    n_slot: u32,
    free_slots: Vec<SlotId>,
    sequences: Vec<Sequence>,
    next_id: u64,
}

impl Memory {
    /// A memory over `states` that holds at most `n_cell_max` cells, rounded up to whole pages.
    pub fn new(states: Arc<dyn States>, n_cell_max: usize) -> Memory {
        let page_len = states.config().page_len;
        let has_pages = states.decls().iter().any(|d| matches!(d, StateDecl::Kv { .. }));
        let has_slots = states.decls().iter().any(|d| d.slot_width() > 0);
        Memory {
            page_len,
            n_page_max: n_cell_max.div_ceil(page_len),
            has_pages,
            has_slots,
            states,
            refs: Vec::new(),
            free_pages: Vec::new(),
            n_slot: 0,
            free_slots: Vec::new(),
            sequences: Vec::new(),
            next_id: 0,
        }
    }

    /// The store behind.
    pub fn states(&self) -> &Arc<dyn States> {
        &self.states
    }

    /// Starts an empty sequence.
    pub fn create(&mut self) -> SeqId {
        let slot = self.has_slots.then(|| self.take_slot());
        if let Some(slot) = slot {
            self.states.slot_reset(slot);
        }
        self.insert(0, Vec::new(), slot)
    }

    /// Starts a sequence with the committed past of `seq`: pages shared, recurrent state copied.
    pub fn fork(&mut self, seq: SeqId) -> SeqId {
        let of = self.find(seq);
        let (len, pages, slot) = (of.len, of.pages.clone(), of.slot);
        assert!(of.pending.is_none(), "fork of {seq:?} inside a step");
        for page in &pages {
            self.refs[page.0 as usize] += 1;
        }
        let slot = slot.map(|from| {
            let to = self.take_slot();
            self.states.slot_copy(from, to);
            to
        });
        self.insert(len, pages, slot)
    }

    /// Forgets a sequence and returns what only it used.
    pub fn free(&mut self, seq: SeqId) {
        let at = self.position(seq);
        let sequence = self.sequences.swap_remove(at);
        for page in sequence.pages {
            self.let_go(page);
        }
        self.free_slots.extend(sequence.slot);
    }

    /// Committed cells of `seq`.
    pub fn len(&self, seq: SeqId) -> usize {
        self.find(seq).len
    }

    /// True if `seq` has no committed cells.
    pub fn is_empty(&self, seq: SeqId) -> bool {
        self.len(seq) == 0
    }

    /// Makes room for `n_rows` rows behind the committed cells, the first `n_certain` of them certain. Shared
    /// pages that the rows fall into are copied. On error nothing has changed.
    pub fn prepare(&mut self, seq: SeqId, n_rows: usize, n_certain: usize) -> Result<(), NoRoom> {
        let at = self.position(seq);
        assert!(n_certain <= n_rows && n_rows > 0, "{n_certain} certain of {n_rows} rows");
        assert!(self.sequences[at].pending.is_none(), "{seq:?} is already inside a step");
        if self.has_pages {
            let len = self.sequences[at].len;
            let first = len / self.page_len;
            let have = self.sequences[at].pages.len();
            let want = (len + n_rows).div_ceil(self.page_len);
            let shared = |p: &PageId| self.refs[p.0 as usize] > 1;
            let n_copy = self.sequences[at].pages[first.min(have)..].iter().filter(|p| shared(p)).count();
            let needed = n_copy + want.saturating_sub(have);
            let free = self.n_page_max - self.n_page_used();
            if needed > free {
                return Err(NoRoom { needed, free, total: self.n_page_max, page_len: self.page_len });
            }
            for i in first..have {
                let page = self.sequences[at].pages[i];
                if self.refs[page.0 as usize] > 1 {
                    let copy = self.take_page();
                    self.states.page_copy(page, copy);
                    self.let_go(page);
                    self.sequences[at].pages[i] = copy;
                }
            }
            for _ in have..want {
                let page = self.take_page();
                self.sequences[at].pages.push(page);
            }
        }
        self.sequences[at].pending = Some((n_rows, n_certain));
        Ok(())
    }

    /// Adds `n_more` tentative rows to the prepared ones. On error nothing has changed: the prepared rows stay.
    pub fn extend(&mut self, seq: SeqId, n_more: usize) -> Result<(), NoRoom> {
        let at = self.position(seq);
        let Some((n_rows, n_certain)) = self.sequences[at].pending else {
            panic!("{seq:?} has no prepared rows")
        };
        if self.has_pages {
            let have = self.sequences[at].pages.len();
            let want = (self.sequences[at].len + n_rows + n_more).div_ceil(self.page_len);
            let (needed, free) = (want.saturating_sub(have), self.n_page_max - self.n_page_used());
            if needed > free {
                return Err(NoRoom { needed, free, total: self.n_page_max, page_len: self.page_len });
            }
            for _ in 0..needed {
                let page = self.take_page();
                self.sequences[at].pages.push(page);
            }
        }
        self.sequences[at].pending = Some((n_rows + n_more, n_certain));
        Ok(())
    }

    /// The prepared rows of `seq` as a lane of a step, from row `first_row` of the step on.
    pub fn lane(&self, seq: SeqId, first_row: usize) -> Lane<'_> {
        let sequence = self.find(seq);
        let Some((n_rows, n_certain)) = sequence.pending else { panic!("{seq:?} has no prepared rows") };
        Lane {
            rows: first_row..first_row + n_rows,
            n_past: sequence.len,
            n_certain,
            pages: &sequence.pages,
            slot: sequence.slot,
        }
    }

    /// Ends the step of `seq`: the first `n_rows` prepared rows are final, the others never happened.
    ///
    /// Certain rows have advanced the recurrent state already, so they can't be dropped.
    pub fn commit(&mut self, seq: SeqId, n_rows: usize) {
        let at = self.position(seq);
        let sequence = &mut self.sequences[at];
        let Some((n_prepared, n_certain)) = sequence.pending.take() else {
            panic!("{seq:?} has no prepared rows")
        };
        assert!(
            (n_certain..=n_prepared).contains(&n_rows),
            "commit of {n_rows} rows with {n_certain} certain of {n_prepared} prepared"
        );
        sequence.len += n_rows;
        if let Some(slot) = sequence.slot {
            self.states.slot_commit(slot, n_rows - n_certain);
        }
        let keep = sequence.len.div_ceil(self.page_len);
        let surplus = sequence.pages.split_off(keep.min(sequence.pages.len()));
        for page in surplus {
            self.let_go(page);
        }
    }

    /// Drops the cells from `len` on. Only for memories without recurrent state, which can't be wound back.
    pub fn truncate(&mut self, seq: SeqId, len: usize) {
        assert!(!self.has_slots, "a recurrent state can't be truncated");
        let at = self.position(seq);
        let sequence = &mut self.sequences[at];
        assert!(sequence.pending.is_none(), "truncate of {seq:?} inside a step");
        sequence.len = sequence.len.min(len);
        let keep = sequence.len.div_ceil(self.page_len);
        let surplus = sequence.pages.split_off(keep.min(sequence.pages.len()));
        for page in surplus {
            self.let_go(page);
        }
    }

    /// Cells that could still be taken by new pages.
    pub fn n_cell_free(&self) -> usize {
        (self.n_page_max - self.n_page_used()) * self.page_len
    }

    /// What is in use.
    pub fn usage(&self) -> Usage {
        let n_page = self.n_page_used();
        let n_slot = self.n_slot as usize - self.free_slots.len();
        Usage {
            n_seq: self.sequences.len(),
            n_page,
            n_page_max: self.n_page_max,
            bytes: n_page * self.states.page_bytes() + n_slot * self.states.slot_bytes(),
        }
    }

    /// Recounts everything and panics where the books are wrong.
    pub fn check(&self) {
        let mut refs = vec![0; self.refs.len()];
        let mut slots = vec![false; self.n_slot as usize];
        for sequence in &self.sequences {
            let cells = sequence.len + sequence.pending.map_or(0, |(n, _)| n);
            if self.has_pages {
                assert_eq!(sequence.pages.len(), cells.div_ceil(self.page_len), "pages of {:?}", sequence.id);
            }
            for page in &sequence.pages {
                refs[page.0 as usize] += 1;
            }
            if let Some(slot) = sequence.slot {
                assert!(!slots[slot.0 as usize], "{slot:?} has two owners");
                slots[slot.0 as usize] = true;
            }
        }
        assert_eq!(refs, self.refs, "page reference counts");
        for page in &self.free_pages {
            assert_eq!(self.refs[page.0 as usize], 0, "{page:?} is free and in use");
        }
        assert_eq!(self.free_pages.len(), self.refs.iter().filter(|&&n| n == 0).count(), "free pages");
        for slot in &self.free_slots {
            assert!(!slots[slot.0 as usize], "{slot:?} is free and in use");
        }
        let n_used = slots.iter().filter(|&&used| used).count();
        assert_eq!(n_used + self.free_slots.len(), self.n_slot as usize, "slots");
    }

    fn n_page_used(&self) -> usize {
        self.refs.len() - self.free_pages.len()
    }

    fn insert(&mut self, len: usize, pages: Vec<PageId>, slot: Option<SlotId>) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.sequences.push(Sequence { id, len, pages, slot, pending: None });
        id
    }

    // A server has at most a few dozen sequences; a scan beats a map.
    fn position(&self, seq: SeqId) -> usize {
        match self.sequences.iter().position(|s| s.id == seq) {
            Some(at) => at,
            None => panic!("{seq:?} does not exist"),
        }
    }

    fn find(&self, seq: SeqId) -> &Sequence {
        &self.sequences[self.position(seq)]
    }

    fn take_page(&mut self) -> PageId {
        let page = self.free_pages.pop().unwrap_or_else(|| {
            self.refs.push(0);
            PageId(self.refs.len() as u32 - 1)
        });
        self.refs[page.0 as usize] = 1;
        self.states.page_alloc(page);
        page
    }

    fn let_go(&mut self, page: PageId) {
        let refs = &mut self.refs[page.0 as usize];
        *refs -= 1;
        if *refs == 0 {
            self.states.page_release(page);
            self.free_pages.push(page);
        }
    }

    fn take_slot(&mut self) -> SlotId {
        self.free_slots.pop().unwrap_or_else(|| {
            self.n_slot += 1;
            SlotId(self.n_slot - 1)
        })
    }
}
