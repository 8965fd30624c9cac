//! The shelf behind the prompt cache: snapshots that the memory had no room for, kept as files by somebody else.
//!
//! ```text
//!  cache ──drops a snapshot──▶ leaving ──a few MB a step──▶ Shelf::put   ··· threads of its own, files
//!    ▲                                                          │
//!    └── taken up ◀── Shelf::news ◀── Shelf::fetch ◀── index: tokens, who has a part, last use
//! ```
//!
//! What is there, what it is good for and what has to go is decided here, with no file in sight: a [`Shelf`] stores bytes
//! under numbers. Neither writing nor reading holds up a step: a snapshot that leaves is copied a few pages at a time, and a
//! request whose prefix is on the shelf waits for it while others go on. What was used last goes last.

use std::collections::{HashMap, VecDeque};

use paceline_memory::{Memory, SeqId};

use crate::{
    Token,
    cache::{Members, candidates},
    radix::{NodeId, Radix},
    snapshot_file::{CheckedSnapshot, SnapshotHead, SnapshotWriter, digest},
};

/// Names a file on a shelf: a digest of what its head says, so equal snapshots have one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShelfId(pub u64);

/// A file that was found at the start.
#[derive(Clone, Debug)]
pub struct Stocked {
    /// Its name.
    pub id: ShelfId,
    /// What it says about itself. Of other pairs only what it takes counts.
    pub head: SnapshotHead,
}

/// What became of what a shelf was asked to do.
#[derive(Debug)]
pub enum ShelfNews {
    /// The file is complete: from here on it can be fetched.
    Stored(ShelfId),
    /// It could not be written. Nothing of it is left.
    NotStored(ShelfId),
    /// What was fetched, checked.
    Fetched(ShelfId, CheckedSnapshot),
    /// It could not be read, or is damaged; it is gone, or not ours.
    NotFetched(ShelfId),
}

/// Keeps bytes under numbers, beyond the life of the process. No call waits for a device.
pub trait Shelf: Send {
    /// The files that were there at the start, the one that was used least lately first.
    fn stock(&mut self) -> Vec<Stocked>;
    /// Takes more of a file at present.
    fn has_room(&self) -> bool;
    /// The next bytes of file `id`, and whether they are the last ones; files come one after the other.
    fn put(&mut self, id: ShelfId, bytes: Vec<u8>, is_last: bool);
    /// Asks for a file.
    fn fetch(&mut self, id: ShelfId);
    /// A file was used.
    fn touch(&mut self, id: ShelfId);
    /// A file is not wanted any more. What is being written or read may end before that.
    fn remove(&mut self, id: ShelfId);
    /// The next of what happened since.
    fn news(&mut self) -> Option<ShelfNews>;
}

/// What the shelf holds and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ShelfUsage {
    /// Files of this pair.
    pub n_file: usize,
    /// Bytes of all files, those of other pairs and those being written included.
    pub bytes: u64,
    /// Bytes that they may have.
    pub n_byte_max: u64,
    /// Snapshots that are on their way to it.
    pub n_leaving: usize,
    /// Files written.
    pub n_stored: u64,
    /// Bytes of them.
    pub n_byte_stored: u64,
    /// Snapshots that were dropped because too many were being written, or could not be.
    pub n_not_stored: u64,
    /// Files read and taken up.
    pub n_fetched: u64,
    /// Files that could not be read, or not be used.
    pub n_not_fetched: u64,
    /// Files removed for want of room.
    pub n_removed: u64,
}

#[derive(Debug)]
struct Entry {
    id: ShelfId,
    members: Members,
    n_byte: u64,
    /// When it was used, in uses of anything.
    used: u64,
}

/// Snapshots of fewer tokens are computed again sooner than they are worth a file.
pub(crate) const N_TOKEN_MIN: usize = 64;

/// Bytes copied in a step: about a millisecond.
const N_BYTE_STEP: usize = 8 << 20;

/// Bytes handed over at a time.
const N_BYTE_PUT: usize = 1 << 20;

/// What may be on its way at once, beyond the budget of the cache; one snapshot may in any case.
const N_BYTE_LEAVING: u64 = 512 << 20;

/// Files that are read at once. Each is held in memory until it is taken up.
const N_FETCH: usize = 2;

/// The shelf and the index of what is on it.
pub(crate) struct Archive {
    shelf: Box<dyn Shelf>,
    /// The digest of models and settings that files must have.
    pair: u64,
    index: Radix<Entry>,
    nodes: HashMap<ShelfId, NodeId>,
    /// Files of other pairs, the one to go first in front.
    others: VecDeque<(ShelfId, u64)>,
    leaving: VecDeque<SnapshotWriter>,
    /// Handed over whole, and not heard of since.
    written: Vec<(ShelfId, u64, Vec<Token>, Members)>,
    /// Of these, and of what is half written, those that are not wanted any more.
    doomed: Vec<ShelfId>,
    fetching: Vec<ShelfId>,
    chunk: Vec<u8>,
    /// Bytes that may be on their way, and one snapshot more.
    n_byte_leaving: u64,
    now: u64,
    usage: ShelfUsage,
}

impl Archive {
    /// An index of what `shelf` has, within `n_byte_max`.
    pub fn new(mut shelf: Box<dyn Shelf>, n_byte_max: u64, pair: u64) -> Archive {
        let stock = shelf.stock();
        let mut archive = Archive {
            shelf,
            pair,
            index: Radix::new(),
            nodes: HashMap::new(),
            others: VecDeque::new(),
            leaving: VecDeque::new(),
            written: Vec::new(),
            doomed: Vec::new(),
            fetching: Vec::new(),
            chunk: Vec::new(),
            n_byte_leaving: N_BYTE_LEAVING,
            now: 0,
            usage: ShelfUsage { n_byte_max, ..ShelfUsage::default() },
        };
        for Stocked { id, head } in stock {
            archive.usage.bytes += head.n_file;
            if head.pair == pair && !head.tokens.is_empty() {
                let members = members_of(&head);
                archive.enter(id, &head.tokens, head.n_file, members);
            } else {
                archive.others.push_back((id, head.n_file));
            }
        }
        archive.make_room(0);
        archive
    }

    fn enter(&mut self, id: ShelfId, tokens: &[Token], n_byte: u64, members: Members) {
        self.now += 1;
        let entry = Entry { id, members, n_byte, used: self.now };
        let (node, old) = self.index.insert(tokens, entry);
        match old {
            // Written again: the file is the new one.
            Some(old) if old.id == id => self.usage.bytes -= old.n_byte,
            Some(old) => {
                self.nodes.remove(&old.id);
                self.let_go(old.id, old.n_byte);
            }
            None => {}
        }
        self.nodes.insert(id, node);
    }

    fn let_go(&mut self, id: ShelfId, n_byte: u64) {
        self.usage.bytes -= n_byte;
        self.shelf.remove(id);
    }

    /// Forgets a file, and removes it.
    fn remove(&mut self, node: NodeId) {
        if let Some(entry) = self.index.remove(node) {
            self.nodes.remove(&entry.id);
            self.let_go(entry.id, entry.n_byte);
        }
    }

    /// Removes files until `n_byte` more fit: those of other pairs first, then what was used least lately. False if they
    /// never will.
    fn make_room(&mut self, n_byte: u64) -> bool {
        while self.usage.bytes + n_byte > self.usage.n_byte_max {
            if let Some((id, n)) = self.others.pop_front() {
                self.let_go(id, n);
            } else {
                let entries = self.nodes.iter().filter(|(id, _)| !self.fetching.contains(id));
                let used = |node: NodeId| self.index.get(node).map_or(0, |entry| entry.used);
                let Some(node) = entries.map(|(_, &node)| node).min_by_key(|&node| used(node)) else {
                    return false;
                };
                self.remove(node);
            }
            self.usage.n_removed += 1;
        }
        true
    }

    /// The file with the longest beginning of `tokens`, of at most `n_max`, that is exact for drafters `wanted`, and how many
    /// tokens that is.
    pub fn find(
        &self,
        tokens: &[Token],
        n_max: usize,
        wanted: Members,
        anywhere: impl Fn(usize) -> bool,
    ) -> Option<(ShelfId, usize)> {
        let fit = |entry: &Entry| entry.members.covers(wanted).then_some(entry.used as f64);
        let (node, len) = candidates(&self.index, tokens, n_max, anywhere, fit).next()?;
        self.index.get(node).map(|entry| (entry.id, len))
    }

    /// True if another file may be asked for.
    pub fn may_fetch(&self) -> bool {
        self.fetching.len() < N_FETCH
    }

    /// Asks for a file, if it is not asked for already.
    pub fn fetch(&mut self, id: ShelfId) {
        if !self.fetching.contains(&id) {
            self.fetching.push(id);
            self.shelf.fetch(id);
        }
    }

    pub fn is_fetching(&self, id: ShelfId) -> bool {
        self.fetching.contains(&id)
    }

    /// About the bytes that a file takes in memory: the tokens in its head take none.
    pub fn n_byte(&self, id: ShelfId) -> u64 {
        let Some(&node) = self.nodes.get(&id) else { return 0 };
        let n_token = self.index.depth(node) as u64;
        let n_file = self.index.get(node).map_or(0, |entry| entry.n_byte);
        n_file.saturating_sub(n_token * size_of::<Token>() as u64)
    }

    /// True if a snapshot of these tokens should be written. One that is there already counts as used.
    pub fn wants(&mut self, tokens: &[Token], members: Members, n_byte: usize, anywhere: bool) -> bool {
        if tokens.len() < N_TOKEN_MIN || n_byte as u64 > self.usage.n_byte_max {
            return false;
        }
        let found = self.index.find(tokens);
        if found.n_shared == tokens.len() {
            let longer = if anywhere { self.index.under(found.below) } else { Vec::new() };
            let mut same = self.index.exact(tokens).into_iter().chain(longer);
            let as_good = |id: &NodeId| self.index.get(*id).is_some_and(|e| e.members.covers(members));
            if let Some(node) = same.find(as_good) {
                self.touch(node);
                return false;
            }
            // Who has a part in what is there must not lose it.
            if let Some(entry) = self.index.exact(tokens).and_then(|node| self.index.get(node))
                && !members.covers(entry.members)
            {
                return false;
            }
        }
        let on_way = self.leaving.iter().map(|writer| &writer.head.tokens[..]);
        let on_way = on_way.chain(self.written.iter().map(|(_, _, tokens, _)| &tokens[..]));
        let mut covering =
            on_way.filter(|other| if anywhere { other.starts_with(tokens) } else { *other == tokens });
        if covering.next().is_some() {
            return false;
        }
        let n_leaving: u64 = self.leaving.iter().map(|writer| writer.head.n_file).sum();
        let has_time = self.leaving.is_empty() || n_leaving + n_byte as u64 <= self.n_byte_leaving;
        self.usage.n_not_stored += u64::from(!has_time);
        has_time
    }

    fn touch(&mut self, node: NodeId) {
        self.now += 1;
        if let Some(entry) = self.index.get_mut(node) {
            entry.used = self.now;
            self.shelf.touch(entry.id);
        }
    }

    /// Takes a snapshot to be written, whose sequence is the shelf's until then; gives it back if there is no room for it.
    pub fn take(&mut self, writer: SnapshotWriter) -> Option<SeqId> {
        if !self.make_room(writer.head.n_file) {
            return Some(writer.seq());
        }
        self.usage.bytes += writer.head.n_file;
        self.leaving.push_back(writer);
        None
    }

    /// There will be no more requests: any number of snapshots may be on their way.
    pub fn close(&mut self) {
        self.n_byte_leaving = u64::MAX;
    }

    /// The digest that files must have.
    pub fn pair(&self) -> u64 {
        self.pair
    }

    /// Sequences that are being written.
    pub fn leaving(&self) -> Vec<SeqId> {
        self.leaving.iter().map(SnapshotWriter::seq).collect()
    }

    /// Copies a little of what leaves. Returns a sequence that is not needed any more.
    pub fn write_some(&mut self, memory: &Memory) -> Option<SeqId> {
        let mut n_left = N_BYTE_STEP;
        while n_left > 0 && self.shelf.has_room() {
            let writer = self.leaving.front_mut()?;
            let id = id_of(&writer.head);
            let before = self.chunk.len();
            let goes_on = writer.next(memory, &mut self.chunk);
            n_left = n_left.saturating_sub(self.chunk.len() - before);
            if self.chunk.len() >= N_BYTE_PUT || !goes_on {
                self.shelf.put(id, std::mem::take(&mut self.chunk), !goes_on);
            }
            if !goes_on {
                let writer = self.leaving.pop_front()?;
                let (seq, members) = (writer.seq(), members_of(&writer.head));
                self.written.push((id, writer.head.n_file, writer.head.tokens, members));
                return Some(seq);
            }
        }
        None
    }

    /// What was fetched since, oldest first.
    pub fn news(&mut self, anywhere: impl Fn(usize) -> bool) -> Option<(ShelfId, CheckedSnapshot)> {
        while let Some(news) = self.shelf.news() {
            match news {
                ShelfNews::Stored(id) => {
                    let Some(at) = self.written.iter().position(|(of, ..)| *of == id) else { continue };
                    let (id, n_byte, tokens, members) = self.written.swap_remove(at);
                    self.usage.n_stored += 1;
                    self.usage.n_byte_stored += n_byte;
                    if let Some(at) = self.doomed.iter().position(|of| *of == id) {
                        self.doomed.swap_remove(at);
                        self.let_go(id, n_byte);
                        continue;
                    }
                    self.enter(id, &tokens, n_byte, members);
                    if anywhere(tokens.len())
                        && let Some(&node) = self.nodes.get(&id)
                    {
                        let covered = |&id: &NodeId| {
                            self.index.get(id).is_some_and(|entry| members.covers(entry.members))
                        };
                        let covered: Vec<NodeId> = self.index.above(node).filter(covered).collect();
                        covered.into_iter().for_each(|node| self.remove(node));
                    }
                }
                ShelfNews::NotStored(id) => {
                    let Some(at) = self.written.iter().position(|(of, ..)| *of == id) else { continue };
                    self.usage.bytes -= self.written.swap_remove(at).1;
                    self.usage.n_not_stored += 1;
                }
                ShelfNews::Fetched(id, file) => {
                    self.fetching.retain(|of| *of != id);
                    return Some((id, file));
                }
                ShelfNews::NotFetched(id) => self.spoilt(id),
            }
        }
        None
    }

    /// A file was taken up.
    pub fn count_fetched(&mut self, id: ShelfId) {
        self.usage.n_fetched += 1;
        if let Some(&node) = self.nodes.get(&id) {
            self.touch(node);
        }
    }

    /// A file is of no use.
    pub fn spoilt(&mut self, id: ShelfId) {
        self.usage.n_not_fetched += 1;
        self.fetching.retain(|of| *of != id);
        if let Some(node) = self.nodes.get(&id) {
            self.remove(*node);
        }
    }

    /// Removes every file of a beginning of `tokens` that nothing else goes on from, and of what goes on from all of them.
    /// Returns what was being written and is not needed any more, and how many files there were.
    pub fn erase(&mut self, tokens: &[Token]) -> (Vec<SeqId>, usize) {
        let nodes = conversation(&self.index, tokens);
        let n = nodes.len();
        nodes.into_iter().for_each(|node| self.remove(node));
        let is_of_it = |other: &[Token]| other.starts_with(tokens) || tokens.starts_with(other);
        let mut dropped = Vec::new();
        // The one in front may be half written. What is begun ends, and goes when it is heard of.
        let begun = usize::from(!self.leaving.is_empty());
        let front = self.leaving.front().map(|writer| (id_of(&writer.head), &writer.head.tokens));
        let on_way = self.written.iter().map(|(id, _, tokens, _)| (*id, tokens)).chain(front);
        self.doomed.extend(on_way.filter(|(_, tokens)| is_of_it(tokens)).map(|(id, _)| id));
        for at in (begun..self.leaving.len()).rev() {
            if is_of_it(&self.leaving[at].head.tokens)
                && let Some(writer) = self.leaving.remove(at)
            {
                self.usage.bytes -= writer.head.n_file;
                dropped.push(writer.seq());
            }
        }
        (dropped, n)
    }

    /// True if there is something to write or to wait for.
    pub fn is_busy(&self) -> bool {
        !self.leaving.is_empty() || !self.written.is_empty() || !self.fetching.is_empty()
    }

    /// Stops what is on its way, and returns the sequences.
    pub fn clear(&mut self) -> Vec<SeqId> {
        // What is begun stays without an end; nobody will hear of it.
        self.chunk.clear();
        self.usage.bytes -= self.leaving.iter().map(|writer| writer.head.n_file).sum::<u64>();
        self.leaving.drain(..).map(|writer| writer.seq()).collect()
    }

    pub fn usage(&self) -> ShelfUsage {
        ShelfUsage {
            n_file: self.index.len(),
            n_leaving: self.leaving.len() + self.written.len(),
            ..self.usage
        }
    }
}

/// The name of the file with this head.
fn id_of(head: &SnapshotHead) -> ShelfId {
    let tokens = head.tokens.iter().flat_map(|token| token.to_le_bytes());
    let parts = head.drafters.iter().flat_map(|(name, has_part)| name.bytes().chain([u8::from(*has_part)]));
    let bytes: Vec<u8> = head.pair.to_le_bytes().into_iter().chain(tokens).chain(parts).collect();
    ShelfId(digest(&bytes))
}

/// Which drafters have a part: they are in the order in which they are loaded, which `pair` holds.
fn members_of(head: &SnapshotHead) -> Members {
    let n = head.drafters.len().min(Members::N_MAX);
    Members::of(|i| head.drafters[i].1, n)
}

/// What belongs to the conversation of `tokens`: values that go on from all of it, and those of its beginnings that no other
/// one goes on from.
pub(crate) fn conversation<T>(tree: &Radix<T>, tokens: &[Token]) -> Vec<NodeId> {
    let found = tree.find(tokens);
    let is_whole = found.n_shared == tokens.len();
    let mut own = if is_whole { tree.under(found.below) } else { Vec::new() };
    for &node in found.path.iter().rev() {
        if tree.get(node).is_none() || own.contains(&node) {
            continue;
        }
        let under = tree.under(node);
        if under.iter().all(|id| *id == node || own.contains(id)) {
            own.push(node);
        }
    }
    own
}
