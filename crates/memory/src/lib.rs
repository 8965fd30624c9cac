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
//! Layers that look back through a window have pages of a [class](PageClasses) of their own, which are given back once they lie
//! wholly behind the window of the row that comes next:
//!
//! ```text
//!  all     [p0][p1][p2][p3][p4]     a sequence of 9 cells in pages of 2
//!  window          [q2][q3][q4]     of 4: the next row, in cell 9, looks at 6 .. 9
//! ```
//!
//! What comes next is decided by commits alone: tentative rows move no window. A fork at an earlier place keeps the pages of *its*
//! window by their count; a sequence that has gone on can't be entered there any more.
//!
//! Pages are counted: [`Memory::fork`] shares them, and a shared page is copied before a sequence writes into
//! it. Storage is asked of the device when a page is first used and returned when the last sequence lets go,
//! so a context size is a limit, not a reservation.
//!
//! A fork *rests* until its first step: it has no slot, only a saved copy of the recurrent state, which other resting
//! forks share, and pages that nobody else has do not count towards the limit of pages. A snapshot is a fork that never
//! wakes; who keeps it bounds [`Usage::bytes_resting`].

use std::{collections::BTreeMap, sync::Arc};

use paceline_backend::{Lane, PageClasses, PageId, PageTable, SavedId, SlotId, States, first_cell};

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
    /// Pages that they use, of the class that keeps the most.
    pub n_page: usize,
    /// Of these, as many as may be in use at once.
    pub n_page_max: usize,
    /// Pages of all classes, those of resting sequences too.
    pub n_page_all: usize,
    /// Bytes behind pages and slots in use.
    pub bytes: usize,
    /// Sequences that rest.
    pub n_resting: usize,
    /// Pages of all classes that only they have.
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
    /// One for each class.
    tables: Vec<PageTable>,
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

/// A class of pages.
#[derive(Debug)]
struct Class {
    /// Cells that it keeps; none is all.
    window: Option<usize>,
    page_bytes: usize,
    /// Pages with a user.
    n_used: usize,
    /// Pages with a user that is awake.
    n_awake: usize,
}

/// The memory of all sequences of one model.
pub struct Memory {
    states: Arc<dyn States>,
    page_len: usize,
    n_page_max: usize,
    /// The widest first. What it has counts towards the limit: wherever another one has a page this has one too, and what
    /// shares that shares this.
    classes: Vec<Class>,
    has_slots: bool,
    pages: Counted,
    /// Class of each page.
    class_of: Vec<usize>,
    /// Users of each page that are awake.
    n_awake: Vec<u32>,
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
        let windows = PageClasses::of(states.decls()).windows().to_vec();
        let class =
            |(class, window)| Class { window, page_bytes: states.page_bytes(class), n_used: 0, n_awake: 0 };
        let classes = windows.into_iter().enumerate().map(class).collect();
        let has_slots = states.decls().iter().any(|d| d.slot_width() > 0);
        Memory {
            page_len,
            n_page_max: n_cell_max.div_ceil(page_len),
            classes,
            has_slots,
            states,
            pages: Counted::default(),
            class_of: Vec::new(),
            n_awake: Vec::new(),
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
        let tables = vec![PageTable::default(); self.classes.len()];
        self.insert(Sequence { len: 0, tables, recurrent, is_awake: true, pending: None })
    }

    /// True if a fork may begin with any part of a sequence of `len` cells: a recurrent state is that of all its tokens and of
    /// no other number, and a window leaves pages behind.
    pub fn forks_anywhere(&self, len: usize) -> bool {
        !self.has_slots && self.classes.iter().all(|class| self.first_page(class, len) == 0)
    }

    /// The first page of a class that a sequence of `len` cells keeps.
    fn first_page(&self, class: &Class, len: usize) -> usize {
        first_cell(class.window, len) / self.page_len
    }

    /// True if `seq` keeps all that a sequence of `len` cells keeps.
    fn keeps(&self, sequence: &Sequence, len: usize) -> bool {
        let keeps = |(table, class): (&PageTable, &Class)| table.first <= self.first_page(class, len);
        len == sequence.len || sequence.tables.iter().zip(&self.classes).all(keeps)
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
    /// or it has more and a recurrent state, or a window that has left some of what is needed.
    pub fn fork_prefix(&mut self, seq: SeqId, len: usize) -> Option<SeqId> {
        let of = self.find(seq);
        assert!(of.pending.is_none(), "fork of {seq:?} inside a step");
        if len > of.len || (len < of.len && self.has_slots) || !self.keeps(of, len) {
            return None;
        }
        let part = |(table, class): (&PageTable, &Class)| {
            let (first, end) = (self.first_page(class, len), len.div_ceil(self.page_len));
            PageTable { first, pages: table.pages[first - table.first..end - table.first].to_vec() }
        };
        let tables: Vec<PageTable> = of.tables.iter().zip(&self.classes).map(part).collect();
        let recurrent = of.recurrent;
        tables.iter().flat_map(|table| &table.pages).for_each(|page| self.pages.share(page.0));
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
        Some(self.insert(Sequence { len, tables, recurrent, is_awake: false, pending: None }))
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
        let pages = || sequence.tables.iter().flat_map(|table| &table.pages);
        let n_page = pages().count();
        match (part, sequence.recurrent) {
            (0, _) => out.extend((sequence.len as u64).to_le_bytes()),
            (n, _) if n <= n_page => {
                let page = pages().nth(n - 1).expect("a page of those counted");
                framed(out, |out| self.states.page_export(*page, out));
            }
            (n, Recurrent::Saved(saved)) if n == n_page + 1 => {
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
        let bytes = |(table, class): (&PageTable, &Class)| table.pages.len() * (frame + class.page_bytes);
        let pages: usize = sequence.tables.iter().zip(&self.classes).map(bytes).sum();
        let recurrent = if self.has_slots { frame + self.states.saved_bytes() } else { 0 };
        frame + pages + recurrent
    }

    /// A resting sequence of what an export gave. On error, which says what is wrong, nothing has changed.
    pub fn import(&mut self, bytes: &[u8]) -> Result<SeqId, String> {
        let (&len, mut rest) = bytes.split_first_chunk().ok_or("it has no length")?;
        let len = usize::try_from(u64::from_le_bytes(len)).map_err(|e| e.to_string())?;
        // Each page and state has a length of its own before it, so a false count runs out of bytes soon.
        let mut tables = vec![PageTable::default(); self.classes.len()];
        let mut outcome = Ok(());
        for (class, table) in tables.iter_mut().enumerate() {
            table.first = self.first_page(&self.classes[class], len);
            let end = len.div_ceil(self.page_len);
            while table.end() < end && outcome.is_ok() {
                let (page, at) = (self.take_resting_page(class), table.end());
                table.pages.push(page);
                outcome = match frame(&mut rest) {
                    Some(bytes) if self.states.page_import(page, bytes) => Ok(()),
                    Some(bytes) => {
                        Err(format!("page {at} has {} bytes, another number than here", bytes.len()))
                    }
                    None => Err(format!("it has {at} of {end} pages")),
                };
            }
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
        let seq = self.insert(Sequence { len, tables, recurrent, is_awake: false, pending: None });
        if outcome.is_ok() && !rest.is_empty() {
            outcome = Err(format!("{} bytes follow its end", rest.len()));
        }
        outcome.map(|()| seq).inspect_err(|_| self.free(seq))
    }

    /// Forgets a sequence and returns what only it used.
    pub fn free(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.remove(&seq) else { panic!("{seq:?} does not exist") };
        for page in sequence.tables.into_iter().flat_map(|table| table.pages) {
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
        let first_written = sequence.len / self.page_len;
        let end = (sequence.len + n_rows).div_ceil(self.page_len);
        if let Some(table) = sequence.tables.first() {
            let n_new = end.saturating_sub(table.end());
            self.expect_room(n_new + self.n_page_more(sequence, first_written))?;
        }
        self.wake(seq);
        for class in 0..self.classes.len() {
            let table = &self.find(seq).tables[class];
            for at in first_written - table.first..table.pages.len() {
                let page = self.find(seq).tables[class].pages[at];
                if self.pages.is_shared(page.0) {
                    let copy = self.take_page(class);
                    self.states.page_copy(page, copy);
                    self.let_go(page, true);
                    self.find_mut(seq).tables[class].pages[at] = copy;
                }
            }
        }
        self.append_pages(seq, end);
        self.find_mut(seq).pending = Some((n_rows, n_certain));
        Ok(())
    }

    /// Pages of the widest class that a step of `sequence` adds to those in use before it takes new ones: by waking, and by
    /// copying what it shares of the pages from `first_written` on.
    fn n_page_more(&self, sequence: &Sequence, first_written: usize) -> usize {
        let Some(table) = sequence.tables.first() else { return 0 };
        let first_written = first_written - table.first;
        let more = |(at, page): (usize, &PageId)| {
            let n_awake = self.n_awake[page.0 as usize] - u32::from(sequence.is_awake);
            // A page that is copied stays in use if others are awake; one that only rests elsewhere is swapped.
            let is_copied = at >= first_written && self.pages.is_shared(page.0);
            usize::from(if sequence.is_awake { is_copied && n_awake > 0 } else { is_copied || n_awake == 0 })
        };
        let from = if sequence.is_awake { first_written } else { 0 };
        table.pages.iter().enumerate().skip(from).map(more).sum()
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
        let tables = sequence.tables.clone();
        for page in tables.iter().flat_map(|table| &table.pages) {
            let n = &mut self.n_awake[page.0 as usize];
            *n += 1;
            self.classes[self.class_of[page.0 as usize]].n_awake += usize::from(*n == 1);
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
        let cells = sequence.len + n_rows;
        let mut n_more = n_more;
        if let Some(table) = sequence.tables.first() {
            let room = table.end().saturating_add(self.n_page_free()).saturating_mul(self.page_len);
            n_more = n_more.min(room - cells);
            self.append_pages(seq, (cells + n_more).div_ceil(self.page_len));
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
            tables: &sequence.tables,
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
        Lane { rows: 0..1, n_past: sequence.len, n_certain: 1, tables: &sequence.tables, slot: None }
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

    /// Drops the cells from `len` on. Only for memories without recurrent state, which can't be wound back, and only where no
    /// window has left what a sequence of `len` cells looks at.
    pub fn truncate(&mut self, seq: SeqId, len: usize) {
        assert!(!self.has_slots, "a recurrent state can't be truncated");
        let sequence = self.find(seq);
        assert!(sequence.pending.is_none(), "truncate of {seq:?} inside a step");
        let len = sequence.len.min(len);
        assert!(self.keeps(sequence, len), "a window of {seq:?} has left what {len} cells look at");
        self.find_mut(seq).len = len;
        self.trim(seq);
    }

    /// Lets go of the pages behind the committed cells, and of those that no later row looks at.
    fn trim(&mut self, seq: SeqId) {
        for class in 0..self.classes.len() {
            let sequence = self.find(seq);
            let (len, is_awake) = (sequence.len, sequence.is_awake);
            let (first, end) = (self.first_page(&self.classes[class], len), len.div_ceil(self.page_len));
            while self.find(seq).tables[class].end() > end.max(first)
                && let Some(page) = self.find_mut(seq).tables[class].pages.pop()
            {
                self.let_go(page, is_awake);
            }
            let n_left = first - self.find(seq).tables[class].first;
            for at in 0..n_left {
                let page = self.find(seq).tables[class].pages[at];
                self.let_go(page, is_awake);
            }
            let table = &mut self.find_mut(seq).tables[class];
            table.pages.drain(..n_left);
            table.first = first;
        }
    }

    /// Pages of the widest class that a sequence of `n_cell` cells has.
    pub fn n_page_of(&self, n_cell: usize) -> usize {
        let Some(class) = self.classes.first() else { return 0 };
        n_cell.div_ceil(self.page_len) - self.first_page(class, n_cell)
    }

    /// Pages of the widest class that `seq` has which are in use by nobody: what waking it would add, before it writes.
    pub fn n_page_asleep(&self, seq: SeqId) -> usize {
        let Some(table) = self.find(seq).tables.first() else { return 0 };
        table.pages.iter().filter(|page| self.n_awake[page.0 as usize] == 0).count()
    }

    /// Pages of the widest class that `seq` has.
    pub fn n_page(&self, seq: SeqId) -> usize {
        self.find(seq).tables.first().map_or(0, |table| table.pages.len())
    }

    /// Pages of the widest class that sequences may still take.
    pub fn n_page_free(&self) -> usize {
        self.n_page_max.saturating_sub(self.n_page_awake())
    }

    fn n_page_awake(&self) -> usize {
        self.classes.first().map_or(0, |class| class.n_awake)
    }

    /// Bytes that freeing `seq` would return.
    pub fn bytes_alone(&self, seq: SeqId) -> usize {
        let sequence = self.find(seq);
        let bytes = |(table, class): (&PageTable, &Class)| {
            table.pages.iter().filter(|page| !self.pages.is_shared(page.0)).count() * class.page_bytes
        };
        let pages: usize = sequence.tables.iter().zip(&self.classes).map(bytes).sum();
        let recurrent = match sequence.recurrent {
            Recurrent::Slot(_) => self.states.slot_bytes(),
            Recurrent::Saved(saved) if !self.saved.is_shared(saved.0) => self.states.saved_bytes(),
            _ => 0,
        };
        pages + recurrent
    }

    /// Bytes that freeing all of `seqs` would return.
    pub fn bytes_among(&self, seqs: &[SeqId]) -> usize {
        let (mut pages, mut saved) = (vec![BTreeMap::new(); self.classes.len()], BTreeMap::new());
        let mut n_slot = 0;
        for sequence in seqs.iter().map(|seq| self.find(*seq)) {
            for (table, pages) in sequence.tables.iter().zip(&mut pages) {
                table.pages.iter().for_each(|page| *pages.entry(page.0).or_insert(0) += 1);
            }
            match sequence.recurrent {
                Recurrent::None => {}
                Recurrent::Slot(_) => n_slot += 1,
                Recurrent::Saved(id) => *saved.entry(id.0).or_insert(0) += 1,
            }
        }
        let n_only = |of: &Counted, users: &BTreeMap<u32, u32>| {
            users.iter().filter(|(id, n)| of.n_user[**id as usize] == **n).count()
        };
        let of_class = |(class, pages): (&Class, _)| n_only(&self.pages, pages) * class.page_bytes;
        self.classes.iter().zip(&pages).map(of_class).sum::<usize>()
            + n_only(&self.saved, &saved) * self.states.saved_bytes()
            + n_slot * self.states.slot_bytes()
    }

    /// Cells that could still be taken by new pages.
    pub fn n_cell_free(&self) -> usize {
        self.n_page_free() * self.page_len
    }

    /// Cells that sequences may have at once; no limit without pages.
    pub fn n_cell_max(&self) -> usize {
        if self.classes.is_empty() { usize::MAX } else { self.n_page_max.saturating_mul(self.page_len) }
    }

    /// What is in use.
    pub fn usage(&self) -> Usage {
        let n_seq = self.sequences.values().filter(|s| s.is_awake).count();
        let resting = |class: &Class| class.n_used - class.n_awake;
        let awake_bytes: usize = self.classes.iter().map(|class| class.n_awake * class.page_bytes).sum();
        let resting_bytes: usize = self.classes.iter().map(|class| resting(class) * class.page_bytes).sum();
        Usage {
            n_seq,
            n_page: self.n_page_awake(),
            n_page_max: self.n_page_max,
            n_page_all: self.pages.n_used(),
            bytes: awake_bytes + self.slots.n_used() * self.states.slot_bytes(),
            n_resting: self.sequences.len() - n_seq,
            n_page_resting: self.classes.iter().map(resting).sum(),
            bytes_resting: resting_bytes + self.saved.n_used() * self.states.saved_bytes(),
        }
    }

    /// Recounts everything and panics where the books are wrong.
    pub fn check(&self) {
        let zeros = |of: &Counted| vec![0; of.n_user.len()];
        let (mut pages, mut n_awake) = (zeros(&self.pages), zeros(&self.pages));
        let (mut slots, mut saved) = (zeros(&self.slots), zeros(&self.saved));
        for (id, sequence) in &self.sequences {
            let cells = sequence.len + sequence.pending.map_or(0, |(n, _)| n);
            assert_eq!(sequence.tables.len(), self.classes.len(), "page tables of {id:?}");
            for (at, (table, class)) in sequence.tables.iter().zip(&self.classes).enumerate() {
                let first = self.first_page(class, sequence.len);
                let end = cells.div_ceil(self.page_len);
                let range = (table.first, table.end());
                assert_eq!(
                    range,
                    (first, end.max(first)),
                    "pages of {id:?}, of which {} cells are final",
                    sequence.len
                );
                for page in &table.pages {
                    assert_eq!(self.class_of[page.0 as usize], at, "class of {page:?} of {id:?}");
                    pages[page.0 as usize] += 1;
                    n_awake[page.0 as usize] += u32::from(sequence.is_awake);
                }
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
                for table in &sequence.tables {
                    let mut written = table.pages.iter().skip(sequence.len / self.page_len - table.first);
                    assert!(written.all(|page| !self.pages.is_shared(page.0)), "{id:?} writes a shared page");
                }
            }
        }
        self.pages.check(&pages, "pages");
        self.slots.check(&slots, "slots");
        self.saved.check(&saved, "saved states");
        assert_eq!(n_awake, self.n_awake, "users of pages that are awake");
        for (at, class) in self.classes.iter().enumerate() {
            let of_class = |n: &[u32]| (0..n.len()).filter(|&i| n[i] > 0 && self.class_of[i] == at).count();
            assert_eq!(of_class(&n_awake), class.n_awake, "pages in use of class {at}");
            assert_eq!(of_class(&pages), class.n_used, "pages of class {at}");
            assert!(class.n_awake <= self.n_page_awake(), "class {at} has more pages than the widest one");
        }
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

    /// Gives `seq` pages of each class up to number `end`.
    fn append_pages(&mut self, seq: SeqId, end: usize) {
        for class in 0..self.classes.len() {
            while self.find(seq).tables[class].end() < end {
                let page = self.take_page(class);
                self.find_mut(seq).tables[class].pages.push(page);
            }
        }
    }

    /// A page for a sequence that is awake.
    fn take_page(&mut self, class: usize) -> PageId {
        let page = self.take_resting_page(class);
        self.n_awake[page.0 as usize] = 1;
        self.classes[class].n_awake += 1;
        page
    }

    /// A page for a sequence that rests.
    fn take_resting_page(&mut self, class: usize) -> PageId {
        let page = self.pages.take();
        self.n_awake.resize(self.pages.n_user.len(), 0);
        self.class_of.resize(self.pages.n_user.len(), 0);
        self.class_of[page as usize] = class;
        self.classes[class].n_used += 1;
        self.states.page_alloc(PageId(page), class);
        PageId(page)
    }

    fn let_go(&mut self, page: PageId, is_awake: bool) {
        let at = page.0 as usize;
        let class = &mut self.classes[self.class_of[at]];
        if is_awake {
            self.n_awake[at] -= 1;
            class.n_awake -= usize::from(self.n_awake[at] == 0);
        }
        if self.pages.let_go(page.0) {
            class.n_used -= 1;
            self.states.page_release(page);
        }
    }

    fn let_go_saved(&mut self, saved: SavedId) {
        if self.saved.let_go(saved.0) {
            self.states.saved_release(saved);
        }
    }
}
