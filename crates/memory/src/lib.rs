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
//!
//! A fork *rests* until its first step: it has no slot, only a saved copy of the recurrent state, which other resting
//! forks share, and pages that nobody else has do not count towards the limit of pages. A snapshot is a fork that never
//! wakes; who keeps it bounds [`Usage::bytes_resting`].

use std::{collections::BTreeMap, sync::Arc};

use paceline_backend::{Lane, PageId, SavedId, SlotId, StateDecl, States};

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
    /// Sequences awake.
    pub n_seq: usize,
    /// Pages that they use.
    pub n_page: usize,
    /// Pages that may be in use at once.
    pub n_page_max: usize,
    /// Bytes behind pages and slots in use.
    pub bytes: usize,
    /// Sequences that rest.
    pub n_resting: usize,
    /// Pages that only they have.
    pub n_page_resting: usize,
    /// Bytes behind these pages and the saved states.
    pub bytes_resting: usize,
}

/// The recurrent state of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recurrent {
    /// It has none.
    None,
    /// Where it is computed with.
    Slot(SlotId),
    /// A copy, perhaps shared with other resting sequences.
    Saved(SavedId),
}

#[derive(Debug)]
struct Sequence {
    len: usize,
    pages: Vec<PageId>,
    recurrent: Recurrent,
    is_awake: bool,
    /// Rows prepared and not yet committed: how many, and how many of them are certain.
    pending: Option<(usize, usize)>,
}

/// Ids that are handed out again once they are free, each with the number of its users.
#[derive(Debug, Default)]
struct Counted {
    n_user: Vec<u32>,
    free: Vec<u32>,
}

impl Counted {
    /// An id with one user.
    fn take(&mut self) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.n_user.push(0);
            self.n_user.len() as u32 - 1
        });
        self.n_user[id as usize] = 1;
        id
    }

    fn share(&mut self, id: u32) {
        self.n_user[id as usize] += 1;
    }

    /// True if that was the last user.
    fn let_go(&mut self, id: u32) -> bool {
        let n = &mut self.n_user[id as usize];
        *n -= 1;
        let is_free = *n == 0;
        if is_free {
            self.free.push(id);
        }
        is_free
    }

    fn is_shared(&self, id: u32) -> bool {
        self.n_user[id as usize] > 1
    }

    fn n_used(&self) -> usize {
        self.n_user.len() - self.free.len()
    }

    /// Panics unless the users are these.
    fn check(&self, n_user: &[u32], what: &str) {
        assert_eq!(n_user, self.n_user, "users of {what}");
        assert!(self.free.iter().all(|&id| n_user[id as usize] == 0), "{what}: free and in use");
        let n_free = n_user.iter().filter(|&&n| n == 0).count();
        assert_eq!(self.free.len(), n_free, "{what}: free ones");
    }
}

/// Appends what `write` appends, its length before it.
fn framed(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; 8]);
    write(out);
    let n = (out.len() - start - 8) as u64;
    out[start..start + 8].copy_from_slice(&n.to_le_bytes());
}

/// Takes what [`framed`] wrote off the front.
fn frame<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (&n, rest) = bytes.split_first_chunk()?;
    let (frame, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(n)).ok()?)?;
    *bytes = rest;
    Some(frame)
}

/// The memory of all sequences of one model.
pub struct Memory {
    states: Arc<dyn States>,
    page_len: usize,
    n_page_max: usize,
    has_pages: bool,
    has_slots: bool,
    pages: Counted,
    /// Users of each page that are awake.
    n_awake: Vec<u32>,
    /// Pages that have one.
    n_page_awake: usize,
    slots: Counted,
    saved: Counted,
    sequences: BTreeMap<SeqId, Sequence>,
    next_id: u64,
}

impl Memory {
    /// A memory over `states` that holds at most `n_cell_max` cells of sequences that are awake, rounded up to whole
    /// pages.
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
            pages: Counted::default(),
            n_awake: Vec::new(),
            n_page_awake: 0,
            slots: Counted::default(),
            saved: Counted::default(),
            sequences: BTreeMap::new(),
            next_id: 0,
        }
    }

    /// The store behind.
    pub fn states(&self) -> &Arc<dyn States> {
        &self.states
    }

    /// Starts an empty sequence, awake.
    pub fn create(&mut self) -> SeqId {
        let mut recurrent = Recurrent::None;
        if self.has_slots {
            let slot = SlotId(self.slots.take());
            self.states.slot_reset(slot);
            recurrent = Recurrent::Slot(slot);
        }
        self.insert(Sequence { len: 0, pages: Vec::new(), recurrent, is_awake: true, pending: None })
    }

    /// True if a fork may begin with any part of a sequence: a recurrent state is that of all its tokens and of no other
    /// number.
    pub fn forks_anywhere(&self) -> bool {
        !self.has_slots
    }

    /// Starts a sequence with the committed past of `seq`: pages shared, recurrent state copied. It rests.
    pub fn fork(&mut self, seq: SeqId) -> SeqId {
        let len = self.len(seq);
        match self.fork_prefix(seq, len) {
            Some(fork) => fork,
            None => unreachable!("a fork of all of a sequence"),
        }
    }

    /// Starts a sequence with the first `len` committed cells of `seq`. None where that can't be exact: `seq` has fewer,
    /// or it has more and a recurrent state.
    pub fn fork_prefix(&mut self, seq: SeqId, len: usize) -> Option<SeqId> {
        let of = self.find(seq);
        assert!(of.pending.is_none(), "fork of {seq:?} inside a step");
        if len > of.len || (len < of.len && self.has_slots) {
            return None;
        }
        let n_page = if self.has_pages { len.div_ceil(self.page_len) } else { 0 };
        let (pages, recurrent) = (of.pages[..n_page].to_vec(), of.recurrent);
        pages.iter().for_each(|page| self.pages.share(page.0));
        let recurrent = match recurrent {
            Recurrent::None => Recurrent::None,
            Recurrent::Slot(slot) => {
                let saved = SavedId(self.saved.take());
                self.states.slot_save(slot, saved);
                Recurrent::Saved(saved)
            }
            Recurrent::Saved(saved) => {
                self.saved.share(saved.0);
                Recurrent::Saved(saved)
            }
        };
        Some(self.insert(Sequence { len, pages, recurrent, is_awake: false, pending: None }))
    }

    /// Appends what `seq`, which rests, holds to `out`: its length, pages and recurrent state, for an
    /// [`import`](Self::import) into a memory over the same declarations and settings.
    pub fn export(&self, seq: SeqId, out: &mut Vec<u8>) {
        let mut part = 0;
        while self.export_part(seq, part, out) {
            part += 1;
        }
    }

    /// Appends part `part` of what [`export`](Self::export) gives, a page at most, or says that there are no more: for those
    /// who have no time for all of it at once. The parts of a sequence that rests stay as they are.
    pub fn export_part(&self, seq: SeqId, part: usize, out: &mut Vec<u8>) -> bool {
        let sequence = self.find(seq);
        assert!(!sequence.is_awake, "export of {seq:?}, which is awake");
        match (part, sequence.recurrent) {
            (0, _) => out.extend((sequence.len as u64).to_le_bytes()),
            (n, _) if n <= sequence.pages.len() => {
                framed(out, |out| self.states.page_export(sequence.pages[n - 1], out));
            }
            (n, Recurrent::Saved(saved)) if n == sequence.pages.len() + 1 => {
                framed(out, |out| self.states.saved_export(saved, out));
            }
            _ => return false,
        }
        true
    }

    /// Bytes that an export of `seq` has.
    pub fn export_bytes(&self, seq: SeqId) -> usize {
        let sequence = self.find(seq);
        let frame = size_of::<u64>();
        let pages = sequence.pages.len() * (frame + self.states.page_bytes());
        let recurrent = if self.has_slots { frame + self.states.saved_bytes() } else { 0 };
        frame + pages + recurrent
    }

    /// A resting sequence of what an export gave. On error, which says what is wrong, nothing has changed.
    pub fn import(&mut self, bytes: &[u8]) -> Result<SeqId, String> {
        let (&len, mut rest) = bytes.split_first_chunk().ok_or("it has no length")?;
        let len = usize::try_from(u64::from_le_bytes(len)).map_err(|e| e.to_string())?;
        // Each page and state has a length of its own before it, so a false count runs out of bytes soon.
        let n_page = self.n_page_of(len);
        let mut pages = Vec::new();
        let mut outcome = Ok(());
        while pages.len() < n_page && outcome.is_ok() {
            let page = PageId(self.pages.take());
            self.n_awake.resize(self.pages.n_user.len(), 0);
            self.states.page_alloc(page);
            pages.push(page);
            outcome = match frame(&mut rest) {
                Some(bytes) if self.states.page_import(page, bytes) => Ok(()),
                Some(bytes) => Err(format!(
                    "page {} has {} bytes, another number than here",
                    pages.len() - 1,
                    bytes.len()
                )),
                None => Err(format!("it has {} of {n_page} pages", pages.len() - 1)),
            };
        }
        let mut recurrent = Recurrent::None;
        if self.has_slots && outcome.is_ok() {
            let saved = SavedId(self.saved.take());
            match frame(&mut rest) {
                Some(bytes) if self.states.saved_import(saved, bytes) => recurrent = Recurrent::Saved(saved),
                _ => {
                    self.saved.let_go(saved.0);
                    outcome = Err("its recurrent state is missing or of another size than here".to_string());
                }
            }
        }
        let seq = self.insert(Sequence { len, pages, recurrent, is_awake: false, pending: None });
        if outcome.is_ok() && !rest.is_empty() {
            outcome = Err(format!("{} bytes follow its end", rest.len()));
        }
        outcome.map(|()| seq).inspect_err(|_| self.free(seq))
    }

    /// Forgets a sequence and returns what only it used.
    pub fn free(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.remove(&seq) else { panic!("{seq:?} does not exist") };
        for page in sequence.pages {
            self.let_go(page, sequence.is_awake);
        }
        match sequence.recurrent {
            Recurrent::None => {}
            Recurrent::Slot(slot) => _ = self.slots.let_go(slot.0),
            Recurrent::Saved(saved) => self.let_go_saved(saved),
        }
    }

    /// Committed cells of `seq`.
    pub fn len(&self, seq: SeqId) -> usize {
        self.find(seq).len
    }

    /// True if `seq` is a fork that had no step yet.
    pub fn rests(&self, seq: SeqId) -> bool {
        !self.find(seq).is_awake
    }

    /// True if `seq` has no committed cells.
    pub fn is_empty(&self, seq: SeqId) -> bool {
        self.len(seq) == 0
    }

    /// Makes room for `n_rows` rows behind the committed cells, the first `n_certain` of them certain, and wakes `seq` if
    /// it rests. Shared pages that the rows fall into are copied. On error nothing has changed.
    pub fn prepare(&mut self, seq: SeqId, n_rows: usize, n_certain: usize) -> Result<(), NoRoom> {
        assert!(n_certain <= n_rows && n_rows > 0, "{n_certain} certain of {n_rows} rows");
        let sequence = self.find(seq);
        assert!(sequence.pending.is_none(), "{seq:?} is already inside a step");
        let mut copied = 0..0;
        let mut n_new = 0;
        if self.has_pages {
            let have = sequence.pages.len();
            n_new = (sequence.len + n_rows).div_ceil(self.page_len).saturating_sub(have);
            copied = (sequence.len / self.page_len).min(have)..have;
            let needed = n_new + self.n_page_more(sequence, copied.clone());
            self.expect_room(needed)?;
        }
        self.wake(seq);
        for at in copied {
            let page = self.find(seq).pages[at];
            if self.pages.is_shared(page.0) {
                let copy = self.take_page();
                self.states.page_copy(page, copy);
                self.let_go(page, true);
                self.find_mut(seq).pages[at] = copy;
            }
        }
        self.append_pages(seq, n_new);
        self.find_mut(seq).pending = Some((n_rows, n_certain));
        Ok(())
    }

    /// Pages that a step of `sequence` adds to those in use before it takes new ones: by waking, and by copying what it
    /// shares of the pages `copied`.
    fn n_page_more(&self, sequence: &Sequence, copied: std::ops::Range<usize>) -> usize {
        let more = |(at, page): (usize, &PageId)| {
            let n_awake = self.n_awake[page.0 as usize] - u32::from(sequence.is_awake);
            // A page that is copied stays in use if others are awake; one that only rests elsewhere is swapped.
            let is_copied = copied.contains(&at) && self.pages.is_shared(page.0);
            usize::from(if sequence.is_awake { is_copied && n_awake > 0 } else { is_copied || n_awake == 0 })
        };
        let from = if sequence.is_awake { copied.start } else { 0 };
        sequence.pages.iter().enumerate().skip(from).map(more).sum()
    }

    fn expect_room(&self, needed: usize) -> Result<(), NoRoom> {
        let free = self.n_page_free();
        if needed > free {
            return Err(NoRoom { needed, free, total: self.n_page_max, page_len: self.page_len });
        }
        Ok(())
    }

    /// Gives a resting sequence a slot, and counts its pages among those in use.
    fn wake(&mut self, seq: SeqId) {
        let sequence = self.find(seq);
        if sequence.is_awake {
            return;
        }
        let mut recurrent = sequence.recurrent;
        for page in sequence.pages.clone() {
            let n = &mut self.n_awake[page.0 as usize];
            *n += 1;
            self.n_page_awake += usize::from(*n == 1);
        }
        if let Recurrent::Saved(saved) = recurrent {
            let slot = SlotId(self.slots.take());
            self.states.slot_load(saved, slot);
            self.let_go_saved(saved);
            recurrent = Recurrent::Slot(slot);
        }
        let sequence = self.find_mut(seq);
        (sequence.recurrent, sequence.is_awake) = (recurrent, true);
    }

    /// Adds up to `n_more` tentative rows to the prepared ones, as many as there is room for, and says how many.
    pub fn extend(&mut self, seq: SeqId, n_more: usize) -> usize {
        let sequence = self.find(seq);
        let Some((n_rows, n_certain)) = sequence.pending else { panic!("{seq:?} has no prepared rows") };
        let (have, cells) = (sequence.pages.len(), sequence.len + n_rows);
        let mut n_more = n_more;
        if self.has_pages {
            let room = have.saturating_add(self.n_page_free()).saturating_mul(self.page_len);
            n_more = n_more.min(room - cells);
            self.append_pages(seq, (cells + n_more).div_ceil(self.page_len).saturating_sub(have));
        }
        self.find_mut(seq).pending = Some((n_rows + n_more, n_certain));
        n_more
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
            slot: match sequence.recurrent {
                Recurrent::Slot(slot) => Some(slot),
                _ => None,
            },
        }
    }

    /// The committed cells of `seq` as a lane of one row, for a plan that reads them and writes nothing: how another model
    /// attends to this one's memory between its steps. Nothing is prepared, and nothing needs a commit.
    pub fn past(&self, seq: SeqId) -> Lane<'_> {
        let sequence = self.find(seq);
        assert!(sequence.pending.is_none(), "a look at {seq:?} inside a step");
        Lane { rows: 0..1, n_past: sequence.len, n_certain: 1, pages: &sequence.pages, slot: None }
    }

    /// Ends the step of `seq`: the first `n_rows` prepared rows are final, the others never happened.
    ///
    /// Certain rows have advanced the recurrent state already, so they can't be dropped.
    pub fn commit(&mut self, seq: SeqId, n_rows: usize) {
        let sequence = self.find_mut(seq);
        let Some((n_prepared, n_certain)) = sequence.pending.take() else {
            panic!("{seq:?} has no prepared rows")
        };
        assert!(
            (n_certain..=n_prepared).contains(&n_rows),
            "commit of {n_rows} rows with {n_certain} certain of {n_prepared} prepared"
        );
        sequence.len += n_rows;
        if let Recurrent::Slot(slot) = sequence.recurrent {
            self.states.slot_commit(slot, n_rows - n_certain);
        }
        self.trim(seq);
    }

    /// Drops the cells from `len` on. Only for memories without recurrent state, which can't be wound back.
    pub fn truncate(&mut self, seq: SeqId, len: usize) {
        assert!(!self.has_slots, "a recurrent state can't be truncated");
        let sequence = self.find_mut(seq);
        assert!(sequence.pending.is_none(), "truncate of {seq:?} inside a step");
        sequence.len = sequence.len.min(len);
        self.trim(seq);
    }

    /// Lets go of the pages behind the committed cells.
    fn trim(&mut self, seq: SeqId) {
        let page_len = self.page_len;
        let sequence = self.find_mut(seq);
        let keep = sequence.len.div_ceil(page_len).min(sequence.pages.len());
        let (surplus, is_awake) = (sequence.pages.split_off(keep), sequence.is_awake);
        for page in surplus {
            self.let_go(page, is_awake);
        }
    }

    /// Pages of `n_cell` cells.
    pub fn n_page_of(&self, n_cell: usize) -> usize {
        if self.has_pages { n_cell.div_ceil(self.page_len) } else { 0 }
    }

    /// Pages that `seq` has which are in use by nobody: what waking it would add, before it writes.
    pub fn n_page_asleep(&self, seq: SeqId) -> usize {
        self.find(seq).pages.iter().filter(|page| self.n_awake[page.0 as usize] == 0).count()
    }

    /// Pages that `seq` has.
    pub fn n_page(&self, seq: SeqId) -> usize {
        self.find(seq).pages.len()
    }

    /// Pages that sequences may still take.
    pub fn n_page_free(&self) -> usize {
        self.n_page_max.saturating_sub(self.n_page_awake)
    }

    /// Bytes that freeing `seq` would return.
    pub fn bytes_alone(&self, seq: SeqId) -> usize {
        let sequence = self.find(seq);
        let n_page = sequence.pages.iter().filter(|page| !self.pages.is_shared(page.0)).count();
        let recurrent = match sequence.recurrent {
            Recurrent::Slot(_) => self.states.slot_bytes(),
            Recurrent::Saved(saved) if !self.saved.is_shared(saved.0) => self.states.saved_bytes(),
            _ => 0,
        };
        n_page * self.states.page_bytes() + recurrent
    }

    /// Bytes that freeing all of `seqs` would return.
    pub fn bytes_among(&self, seqs: &[SeqId]) -> usize {
        let (mut pages, mut saved) = (BTreeMap::new(), BTreeMap::new());
        let mut n_slot = 0;
        for sequence in seqs.iter().map(|seq| self.find(*seq)) {
            sequence.pages.iter().for_each(|page| *pages.entry(page.0).or_insert(0) += 1);
            match sequence.recurrent {
                Recurrent::None => {}
                Recurrent::Slot(_) => n_slot += 1,
                Recurrent::Saved(id) => *saved.entry(id.0).or_insert(0) += 1,
            }
        }
        let n_only = |of: &Counted, users: &BTreeMap<u32, u32>| {
            users.iter().filter(|(id, n)| of.n_user[**id as usize] == **n).count()
        };
        n_only(&self.pages, &pages) * self.states.page_bytes()
            + n_only(&self.saved, &saved) * self.states.saved_bytes()
            + n_slot * self.states.slot_bytes()
    }

    /// Cells that could still be taken by new pages.
    pub fn n_cell_free(&self) -> usize {
        self.n_page_free() * self.page_len
    }

    /// Cells that sequences may have at once; no limit without pages.
    pub fn n_cell_max(&self) -> usize {
        if self.has_pages { self.n_page_max.saturating_mul(self.page_len) } else { usize::MAX }
    }

    /// What is in use.
    pub fn usage(&self) -> Usage {
        let n_seq = self.sequences.values().filter(|s| s.is_awake).count();
        let n_page_resting = self.pages.n_used() - self.n_page_awake;
        let (page_bytes, slot_bytes) = (self.states.page_bytes(), self.states.slot_bytes());
        Usage {
            n_seq,
            n_page: self.n_page_awake,
            n_page_max: self.n_page_max,
            bytes: self.n_page_awake * page_bytes + self.slots.n_used() * slot_bytes,
            n_resting: self.sequences.len() - n_seq,
            n_page_resting,
            bytes_resting: n_page_resting * page_bytes + self.saved.n_used() * self.states.saved_bytes(),
        }
    }

    /// Recounts everything and panics where the books are wrong.
    pub fn check(&self) {
        let zeros = |of: &Counted| vec![0; of.n_user.len()];
        let (mut pages, mut n_awake) = (zeros(&self.pages), zeros(&self.pages));
        let (mut slots, mut saved) = (zeros(&self.slots), zeros(&self.saved));
        for (id, sequence) in &self.sequences {
            let cells = sequence.len + sequence.pending.map_or(0, |(n, _)| n);
            assert_eq!(sequence.pages.len(), self.n_page_of(cells), "pages of {id:?}");
            for page in &sequence.pages {
                pages[page.0 as usize] += 1;
                n_awake[page.0 as usize] += u32::from(sequence.is_awake);
            }
            match sequence.recurrent {
                Recurrent::None => assert!(!self.has_slots, "{id:?} has no recurrent state"),
                Recurrent::Slot(slot) => {
                    assert!(sequence.is_awake && slots[slot.0 as usize] == 0, "{slot:?} of {id:?}");
                    slots[slot.0 as usize] += 1;
                }
                Recurrent::Saved(id) => {
                    assert!(!sequence.is_awake, "{id:?} of a sequence that is awake");
                    saved[id.0 as usize] += 1;
                }
            }
            if sequence.pending.is_some() {
                assert!(sequence.is_awake, "{id:?} rests inside a step");
                let written = sequence.pages.iter().skip(sequence.len / self.page_len);
                assert!(
                    written.into_iter().all(|page| !self.pages.is_shared(page.0)),
                    "{id:?} writes a shared page"
                );
            }
        }
        self.pages.check(&pages, "pages");
        self.slots.check(&slots, "slots");
        self.saved.check(&saved, "saved states");
        assert_eq!(n_awake, self.n_awake, "users of pages that are awake");
        assert_eq!(n_awake.iter().filter(|&&n| n > 0).count(), self.n_page_awake, "pages in use");
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    fn find(&self, seq: SeqId) -> &Sequence {
        match self.sequences.get(&seq) {
            Some(sequence) => sequence,
            None => panic!("{seq:?} does not exist"),
        }
    }

    fn find_mut(&mut self, seq: SeqId) -> &mut Sequence {
        match self.sequences.get_mut(&seq) {
            Some(sequence) => sequence,
            None => panic!("{seq:?} does not exist"),
        }
    }

    fn append_pages(&mut self, seq: SeqId, n: usize) {
        for _ in 0..n {
            let page = self.take_page();
            self.find_mut(seq).pages.push(page);
        }
    }

    /// A page for a sequence that is awake.
    fn take_page(&mut self) -> PageId {
        let page = self.pages.take();
        self.n_awake.resize(self.pages.n_user.len(), 0);
        self.n_awake[page as usize] = 1;
        self.n_page_awake += 1;
        self.states.page_alloc(PageId(page));
        PageId(page)
    }

    fn let_go(&mut self, page: PageId, is_awake: bool) {
        if is_awake {
            let n = &mut self.n_awake[page.0 as usize];
            *n -= 1;
            self.n_page_awake -= usize::from(*n == 0);
        }
        if self.pages.let_go(page.0) {
            self.states.page_release(page);
        }
    }

    fn let_go_saved(&mut self, saved: SavedId) {
        if self.saved.let_go(saved.0) {
            self.states.saved_release(saved);
        }
    }
}
