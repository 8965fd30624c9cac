//! The prompt cache: snapshots of sequences, found by their tokens.
//!
//! A snapshot is a fork that nobody advances: the target's pages and recurrent state, and the drafters' memories, at one
//! token boundary. All of them, of all slots and requests, hang in one [radix tree](crate::radix). A request takes the
//! longest prefix that it can begin with *exactly*: its logits and its drafts are those of a cold start, so a snapshot
//! serves only requests all of whose drafters have a part in it, and a recurrent state only prompts that go on where it was
//! taken. Attention alone can begin anywhere inside a snapshot, if all drafters can, and as long as no window has left pages behind. One that refuses a fork all the same
//! has no say in the others' parts: such a prefix is not kept, or not offered.
//!
//! What only snapshots hold is bounded in bytes. Who goes first is decided as in GreedyDual-Size with frequencies
//! (Cao and Irani, 1997; Cherkasova, 1998): each snapshot weighs the tokens that it saves per byte that it costs, as often
//! as it was used, on top of the weight at which the last one was dropped when it was used last. So the unused sink, and
//! what is cheap to compute again goes before what is not. What goes is written to the [shelf](crate::shelf), if there is one.

use paceline_memory::{Memory, SeqId};
use paceline_spec::Drafter;

use crate::{
    Token,
    radix::{NodeId, Radix},
    shelf::{Archive, N_TOKEN_MIN, ShelfId, ShelfUsage, conversation},
    snapshot_file::{CheckedSnapshot, Part, RestoreError, SnapshotFile, SnapshotWriter},
};

/// What the prompt cache may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes that snapshots may hold beyond what running requests use; 0 turns the cache off.
    pub n_byte_max: usize,
    /// Where a snapshot can't be entered in the middle, one is taken every so many tokens of a prompt; 0 is never.
    pub n_step: usize,
    /// Of these, at most so many for a prompt: its last ones.
    pub n_step_max: usize,
    /// A request that ends leaves a snapshot of all that was computed.
    pub keeps_finished: bool,
}

impl CacheConfig {
    /// No cache.
    pub const OFF: CacheConfig =
        CacheConfig { n_byte_max: 0, n_step: 0, n_step_max: 0, keeps_finished: false };

    /// True if anything is ever kept.
    pub fn is_on(&self) -> bool {
        self.n_byte_max > 0
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig { n_byte_max: 8 << 30, n_step: 8192, n_step_max: 32, keeps_finished: true }
    }
}

/// What the prompt cache holds and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CacheUsage {
    /// Snapshots held.
    pub n_snapshot: usize,
    /// Bytes that only they hold, those of drafters included.
    pub bytes: usize,
    /// Bytes that they may hold.
    pub n_byte_max: usize,
    /// Requests that began with a cached prefix.
    pub n_hit: u64,
    /// Requests that might have and found none.
    pub n_miss: u64,
    /// Tokens that were not computed again.
    pub n_token_hit: u64,
    /// Snapshots taken.
    pub n_taken: u64,
    /// Snapshots dropped for want of room.
    pub n_evicted: u64,
    /// The shelf behind it, if there is one.
    pub shelf: Option<ShelfUsage>,
}

/// Some of the drafters, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Members(u64);

impl Members {
    pub const NONE: Members = Members(0);
    /// More drafters than anybody loads.
    pub const N_MAX: usize = 64;

    /// Those of `n` drafters for which `is_one` says so.
    pub fn of(is_one: impl Fn(usize) -> bool, n: usize) -> Members {
        assert!(n <= Members::N_MAX, "{n} drafters");
        Members((0..n).filter(|&i| is_one(i)).fold(0, |bits, i| bits | 1 << i))
    }

    fn has(self, i: usize) -> bool {
        self.0 >> i & 1 == 1
    }

    pub fn covers(self, other: Members) -> bool {
        other.0 & !self.0 == 0
    }
}

/// The memories that a sequence lives in.
pub(crate) struct Stores<'a> {
    pub memory: &'a mut Memory,
    pub drafters: &'a mut [Box<dyn Drafter>],
}

impl Stores<'_> {
    /// True if a snapshot of `len` tokens serves every prefix of them.
    fn enter_anywhere(&self, len: usize) -> bool {
        self.memory.forks_anywhere(len) && self.drafters.iter().all(|drafter| drafter.forks_anywhere(len))
    }

    pub fn forget(&mut self, seq: SeqId) {
        self.memory.free(seq);
        self.drafters.iter_mut().for_each(|drafter| drafter.forget(seq));
    }

    /// Lets `members` begin `to` with the first `len` tokens of `from`: all of them, or none and false.
    fn fork_drafters(&mut self, from: SeqId, to: SeqId, len: usize, members: Members) -> bool {
        for i in (0..self.drafters.len()).filter(|&i| members.has(i)) {
            if !self.drafters[i].fork(from, to, len) {
                let before = self.drafters[..i].iter_mut().enumerate().filter(|(i, _)| members.has(*i));
                before.for_each(|(_, drafter)| drafter.forget(to));
                return false;
            }
        }
        true
    }

    /// What drafters remember of `seq`, which rests.
    fn parts(&self, seq: SeqId) -> Vec<Part> {
        let drafters = self.drafters.iter();
        drafters.map(|drafter| (drafter.name(), drafter.export(seq).unwrap_or_default())).collect()
    }

    /// All drafters.
    fn all(&self) -> Members {
        Members::of(|_| true, self.drafters.len())
    }

    /// Bytes that only resting sequences hold.
    fn bytes_resting(&self) -> usize {
        let drafters = self.drafters.iter().map(|drafter| drafter.resting_bytes());
        self.memory.usage().bytes_resting + drafters.sum::<usize>()
    }
}

#[derive(Debug)]
struct Snapshot {
    seq: SeqId,
    /// The drafters that have a part in it.
    members: Members,
    /// How often it was used, its making included.
    n_use: f64,
    /// The weight at which the last one was dropped when this one was used last.
    used_at: f64,
}

/// A prefix that a sequence begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hit {
    /// A fork of the snapshot, cut to length, for the request to own.
    pub seq: SeqId,
    pub len: usize,
    node: NodeId,
}

pub(crate) struct Cache {
    config: CacheConfig,
    tree: Radix<Snapshot>,
    /// The weight at which the last snapshot was dropped.
    sunk: f64,
    usage: CacheUsage,
    archive: Option<Archive>,
}

/// Where `tree` can be entered for the longest beginning of `tokens`, of at most `n_max`, best first: the node to begin with,
/// and how many of its tokens. `anywhere` says whether one of so many tokens can be entered before its end; values are asked whether they
/// are `fit`, and how much so.
pub(crate) fn candidates<'a, T>(
    tree: &'a Radix<T>,
    tokens: &[Token],
    n_max: usize,
    anywhere: impl Fn(usize) -> bool + 'a,
    fit: impl Fn(&T) -> Option<f64> + 'a,
) -> impl Iterator<Item = (NodeId, usize)> + 'a {
    let found = tree.find(tokens);
    let deepest = std::iter::once((found.below, found.n_shared));
    let path = found.path.into_iter().rev().map(|node| (node, tree.depth(node)));
    let points = deepest.chain(path).map(move |(point, depth)| (point, depth.min(n_max)));
    points.take_while(|(_, len)| *len > 0).filter_map(move |(point, len)| {
        let is_fit = |id: NodeId| tree.get(id).and_then(&fit);
        if tree.depth(point) == len && is_fit(point).is_some() {
            return Some((point, len));
        }
        let under = tree.under(point).into_iter().filter(|&id| anywhere(tree.depth(id)));
        let fit = under.filter_map(|id| is_fit(id).map(|how| (how, id)));
        fit.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, id)| (id, len))
    })
}

impl Cache {
    pub fn new(config: CacheConfig) -> Cache {
        let usage = CacheUsage { n_byte_max: config.n_byte_max, ..CacheUsage::default() };
        Cache { config, tree: Radix::new(), sunk: 0.0, usage, archive: None }
    }

    /// What has no room here goes to `archive` from now on, and comes back from there.
    pub fn set_archive(&mut self, archive: Archive) {
        self.archive = Some(archive);
    }

    /// True if a snapshot of `len` tokens serves every prefix of them.
    pub fn enters_anywhere(&self, stores: &Stores<'_>, len: usize) -> bool {
        stores.enter_anywhere(len)
    }

    /// Snapshots whose tokens begin with those of `point`, itself included, and that serve every prefix of theirs.
    fn enterable(&self, point: NodeId, stores: &Stores<'_>) -> Vec<NodeId> {
        let mut under = self.tree.under(point);
        under.retain(|&id| self.enters_anywhere(stores, self.tree.depth(id)));
        under
    }

    /// Tokens that `tokens` shares with anything cached.
    pub fn n_shared(&self, tokens: &[Token]) -> usize {
        self.tree.find(tokens).n_shared
    }

    /// A fork with the longest cached prefix of `tokens`, of at most `n_max` tokens, that all drafters of `wanted` know.
    pub fn find(
        &self,
        tokens: &[Token],
        n_max: usize,
        wanted: Members,
        stores: &mut Stores<'_>,
    ) -> Option<Hit> {
        let fit = |s: &Snapshot| s.members.covers(wanted).then_some(s.used_at);
        let anywhere = |len| self.enters_anywhere(stores, len);
        let points: Vec<(NodeId, usize)> = candidates(&self.tree, tokens, n_max, anywhere, fit).collect();
        for (node, len) in points {
            if let Some(seq) = self.fork(node, len, wanted, stores) {
                return Some(Hit { seq, len, node });
            }
        }
        None
    }

    /// How many of `tokens` a request that goes on from them would begin with.
    pub fn n_reach(&self, tokens: &[Token], wanted: Members, stores: &Stores<'_>) -> usize {
        let fit = |s: &Snapshot| s.members.covers(wanted).then_some(s.used_at);
        let anywhere = |len| self.enters_anywhere(stores, len);
        let here =
            candidates(&self.tree, tokens, tokens.len(), anywhere, fit).next().map_or(0, |(_, len)| len);
        let archive = self.archive.as_ref();
        let there = archive.and_then(|archive| archive.find(tokens, tokens.len(), wanted, anywhere));
        here.max(there.map_or(0, |(_, len)| len))
    }

    fn fork(&self, node: NodeId, len: usize, wanted: Members, stores: &mut Stores<'_>) -> Option<SeqId> {
        let of = self.tree.get(node)?.seq;
        let seq = stores.memory.fork_prefix(of, len)?;
        if !stores.fork_drafters(of, seq, len, wanted) {
            stores.memory.free(seq);
            return None;
        }
        Some(seq)
    }

    /// The hit is used.
    pub fn count(&mut self, hit: Option<Hit>) {
        let Some(hit) = hit else {
            self.usage.n_miss += 1;
            return;
        };
        self.usage.n_hit += 1;
        self.usage.n_token_hit += hit.len as u64;
        self.touch(hit.node);
    }

    fn touch(&mut self, node: NodeId) {
        if let Some(snapshot) = self.tree.get_mut(node) {
            snapshot.used_at = self.sunk;
            snapshot.n_use += 1.0;
        }
    }

    /// Keeps a snapshot of `seq`, whose committed tokens are `tokens` and known to `members`, unless something as good is
    /// there.
    pub fn keep(&mut self, tokens: &[Token], seq: SeqId, members: Members, stores: &mut Stores<'_>) {
        if !self.config.is_on() || tokens.is_empty() {
            return;
        }
        let anywhere = self.enters_anywhere(stores, tokens.len());
        let found = self.tree.find(tokens);
        if found.n_shared == tokens.len() {
            let same = self.tree.exact(tokens).into_iter();
            let longer = self.enterable(found.below, stores);
            let as_good = |&id: &NodeId| self.tree.get(id).is_some_and(|s| s.members.covers(members));
            if let Some(id) = same.chain(longer).find(as_good) {
                return self.touch(id);
            }
        }
        let fork = stores.memory.fork(seq);
        if !stores.fork_drafters(seq, fork, tokens.len(), members) {
            // One has lost the sequence; a snapshot that claims less would be in the way of a better one.
            return stores.memory.free(fork);
        }
        let (node, old) =
            self.tree.insert(tokens, Snapshot { seq: fork, members, n_use: 1.0, used_at: self.sunk });
        if let Some(old) = old {
            stores.forget(old.seq);
        }
        self.usage.n_taken += 1;
        if anywhere {
            let covered = |&id: &NodeId| self.tree.get(id).is_some_and(|s| members.covers(s.members));
            let covered: Vec<NodeId> = self.tree.above(node).filter(covered).collect();
            covered.into_iter().for_each(|id| self.drop(id, stores));
        }
    }

    /// The file of the snapshot of `tokens`, or of its longest part that can be had, and how many tokens that is.
    pub fn export(&self, tokens: &[Token], pair: u64, stores: &mut Stores<'_>) -> Option<(usize, Vec<u8>)> {
        let (all, n) = (stores.all(), tokens.len());
        let hit =
            self.find(tokens, n, all, stores).or_else(|| self.find(tokens, n, Members::NONE, stores))?;
        let tokens = tokens[..hit.len].to_vec();
        let parts = stores.parts(hit.seq);
        let bytes = SnapshotWriter::new(pair, tokens, hit.seq, stores.memory, parts).all(stores.memory);
        stores.forget(hit.seq);
        Some((hit.len, bytes))
    }

    /// Takes up what a file holds, and says whether all drafters found their parts. On error nothing has changed.
    pub fn import(&mut self, file: &SnapshotFile<'_>, stores: &mut Stores<'_>) -> Result<bool, RestoreError> {
        if !self.config.is_on() {
            return Err(RestoreError::Useless("the prompt cache is off (--cache-ram 0)".to_string()));
        }
        let damaged = |what: &str, why: String| RestoreError::Damaged(format!("{what}: {why}"));
        let seq = stores.memory.import(file.target).map_err(|why| damaged("the target's part", why))?;
        let n_token = file.tokens.len();
        let (mut fault, mut has_part) = (None, vec![false; stores.drafters.len()]);
        let mut parts = file.drafters.clone();
        for (drafter, has_part) in stores.drafters.iter_mut().zip(&mut has_part) {
            // Of two with one name each has its own.
            let at = parts.iter().position(|(name, _)| *name == drafter.name());
            let part = at.map(|at| parts.remove(at)).filter(|(_, part)| !part.is_empty());
            if let (None, Some((name, part))) = (&fault, part) {
                let outcome = drafter.import(seq, n_token, part);
                fault = outcome.err().map(|why| damaged(&format!("the part of {name}"), why));
                *has_part = true;
            }
        }
        let members = Members::of(|i| has_part[i], has_part.len());
        let n = stores.memory.len(seq);
        if n != n_token || n_token == 0 {
            fault = fault.or(Some(RestoreError::Damaged(format!("a memory of {n} for {n_token} tokens"))));
        }
        let n_byte = stores.memory.bytes_alone(seq);
        if n_byte > self.config.n_byte_max {
            let why = format!("it takes {n_byte} bytes, and the cache may hold {}", self.config.n_byte_max);
            fault = fault.or(Some(RestoreError::Useless(why)));
        }
        if let Some(fault) = fault {
            stores.forget(seq);
            return Err(fault);
        }
        let serves_all = members.covers(stores.all());
        let here = self.tree.exact(&file.tokens);
        if let Some(node) =
            here.filter(|&node| self.tree.get(node).is_some_and(|s| s.members.covers(members)))
        {
            // What is there is as good.
            stores.forget(seq);
            self.touch(node);
            return Ok(serves_all);
        }
        let snapshot = Snapshot { seq, members, n_use: 1.0, used_at: self.sunk };
        if let (_, Some(old)) = self.tree.insert(&file.tokens, snapshot) {
            stores.forget(old.seq);
        }
        Ok(serves_all)
    }

    /// Drops what a conversation has left, its tokens being these: every snapshot of a beginning that no other conversation goes
    /// on from, and of what goes on from all of it, on the shelf too. Returns how many there were.
    pub fn erase(&mut self, tokens: &[Token], stores: &mut Stores<'_>) -> usize {
        if tokens.is_empty() {
            return 0;
        }
        let nodes = conversation(&self.tree, tokens);
        let mut n = nodes.len();
        nodes.into_iter().for_each(|node| self.drop(node, stores));
        if let Some(archive) = &mut self.archive {
            let (dropped, n_file) = archive.erase(tokens);
            dropped.into_iter().for_each(|seq| stores.memory.free(seq));
            n += n_file;
        }
        n
    }

    fn drop(&mut self, node: NodeId, stores: &mut Stores<'_>) {
        if let Some(snapshot) = self.tree.remove(node) {
            stores.forget(snapshot.seq);
        }
    }

    /// Drops snapshots until the others fit into the budget. Those that the shelf takes are beyond it until they are written.
    pub fn evict(&mut self, stores: &mut Stores<'_>) {
        while self.tree.len() > 0 && self.bytes(stores) > self.config.n_byte_max {
            let Some((weight, node)) = self.lightest(stores) else { return };
            self.sunk = self.sunk.max(weight);
            self.usage.n_evicted += 1;
            self.put_away(node, stores);
        }
    }

    /// Bytes that only snapshots hold, those on their way to the shelf excluded.
    fn bytes(&self, stores: &Stores<'_>) -> usize {
        let leaving = self.archive.as_ref().map_or_else(Vec::new, Archive::leaving);
        stores.bytes_resting() - stores.memory.bytes_among(&leaving)
    }

    /// Drops a snapshot, to the shelf if it is wanted there.
    fn put_away(&mut self, node: NodeId, stores: &mut Stores<'_>) {
        let anywhere = self.enters_anywhere(stores, self.tree.depth(node));
        if let (Some(archive), Some(snapshot)) = (&mut self.archive, self.tree.get(node)) {
            let (seq, members) = (snapshot.seq, snapshot.members);
            let tokens = self.tree.tokens(node);
            if archive.wants(&tokens, members, stores.memory.export_bytes(seq), anywhere) {
                // Drafters keep little; what the target keeps is copied bit by bit.
                let parts = stores.parts(seq);
                let writer = SnapshotWriter::new(archive.pair(), tokens, seq, stores.memory, parts);
                if archive.take(writer).is_none() {
                    stores.drafters.iter_mut().for_each(|drafter| drafter.forget(seq));
                    self.tree.remove(node);
                    return;
                }
            }
        }
        self.drop(node, stores);
    }

    /// Writes a little of what leaves, and takes up what has come.
    pub fn tend(&mut self, stores: &mut Stores<'_>) {
        loop {
            let Some(archive) = &mut self.archive else { return };
            if let Some(seq) = archive.write_some(stores.memory) {
                stores.memory.free(seq);
            }
            let Some((id, file)) = archive.news(|len| stores.enter_anywhere(len)) else { return };
            let taken = self.take_up(&file, stores);
            if let Some(archive) = &mut self.archive {
                match taken {
                    Ok(()) => archive.count_fetched(id),
                    Err(_) => archive.spoilt(id),
                }
            }
        }
    }

    fn take_up(&mut self, file: &CheckedSnapshot, stores: &mut Stores<'_>) -> Result<(), RestoreError> {
        let pair = self.archive.as_ref().map_or(0, Archive::pair);
        self.import(&SnapshotFile::read(file, pair)?, stores).map(|_| ())
    }

    /// The file on the shelf that gives a request more than the `n_have` tokens that it would begin with, if there is one that
    /// is worth the time.
    pub fn on_shelf(
        &self,
        tokens: &[Token],
        n_have: usize,
        n_max: usize,
        wanted: Members,
        stores: &Stores<'_>,
    ) -> Option<ShelfId> {
        let archive = self.archive.as_ref()?;
        let (id, len) = archive.find(tokens, n_max, wanted, |len| self.enters_anywhere(stores, len))?;
        let is_worth = len >= n_have + N_TOKEN_MIN && archive.n_byte(id) <= self.config.n_byte_max as u64;
        is_worth.then_some(id)
    }

    /// Asks for a file. False if so many are on their way that it has to be asked again.
    pub fn fetch(&mut self, id: ShelfId) -> bool {
        let Some(archive) = self.archive.as_mut().filter(|a| a.may_fetch() || a.is_fetching(id)) else {
            return false;
        };
        archive.fetch(id);
        true
    }

    /// True until a file has come, or is known not to.
    pub fn is_fetching(&self, id: ShelfId) -> bool {
        self.archive.as_ref().is_some_and(|archive| archive.is_fetching(id))
    }

    /// True if there is something to write, or to wait for.
    pub fn is_busy(&self) -> bool {
        self.archive.as_ref().is_some_and(Archive::is_busy)
    }

    /// Puts all snapshots on the shelf, the most valuable ones, as many as it may hold.
    pub fn put_all_away(&mut self, stores: &mut Stores<'_>) {
        let mut all = self.weights(stores);
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        let Some(archive) = &mut self.archive else { return };
        archive.close();
        let mut n_left = archive.usage().n_byte_max;
        for (_, _, node) in all {
            let Some(snapshot) = self.tree.get(node) else { continue };
            let n_byte = stores.memory.export_bytes(snapshot.seq) as u64;
            if n_byte <= n_left {
                n_left -= n_byte;
                self.put_away(node, stores);
            }
        }
    }

    /// The snapshot to go first, and its weight. One that shares all it has returns nothing, so it goes only if all are like
    /// that.
    fn lightest(&self, stores: &Stores<'_>) -> Option<(f64, NodeId)> {
        let all = self.weights(stores).into_iter();
        all.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))).map(|(_, weight, node)| (weight, node))
    }

    /// Of each snapshot whether it shares all it has, what it weighs, and where it is.
    fn weights(&self, stores: &Stores<'_>) -> Vec<(bool, f64, NodeId)> {
        let weigh = |node: NodeId| {
            let snapshot = self.tree.get(node)?;
            let nearest = || self.tree.above(node).next().map_or(0, |above| self.tree.depth(above));
            let (depth, n_shared) = (self.tree.depth(node), || self.tree.n_shared(node));
            let n_again = depth - if self.enters_anywhere(stores, depth) { n_shared() } else { nearest() };
            let n_byte = stores.memory.bytes_alone(snapshot.seq);
            let worth = snapshot.n_use * n_again as f64 / n_byte.max(1) as f64;
            Some((n_byte == 0, snapshot.used_at + worth, node))
        };
        self.tree.all().into_iter().filter_map(weigh).collect()
    }

    /// Drops all snapshots, and what is on its way to the shelf. What is on it stays.
    pub fn clear(&mut self, stores: &mut Stores<'_>) {
        self.tree.all().into_iter().for_each(|node| self.drop(node, stores));
        let leaving = self.archive.as_mut().map_or_else(Vec::new, Archive::clear);
        leaving.into_iter().for_each(|seq| stores.memory.free(seq));
    }

    pub fn usage(&self, stores: &Stores<'_>) -> CacheUsage {
        let shelf = self.archive.as_ref().map(Archive::usage);
        CacheUsage { n_snapshot: self.tree.len(), bytes: self.bytes(stores), shelf, ..self.usage }
    }
}
