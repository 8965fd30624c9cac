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
//! what is cheap to compute again goes before what is not.

use paceline_memory::{Memory, SeqId};
use paceline_spec::Drafter;

use crate::{
    Token,
    radix::{NodeId, Radix},
    snapshot_file::{RestoreError, SnapshotFile},
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

    fn covers(self, other: Members) -> bool {
        other.0 & !self.0 == 0
    }
}

/// The memories that a sequence lives in.
pub(crate) struct Stores<'a> {
    pub memory: &'a mut Memory,
    pub drafters: &'a mut [Box<dyn Drafter>],
}

impl Stores<'_> {
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

/// A drafter's name and its part of a file.
pub(crate) type Part = (&'static str, Vec<u8>);

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
}

impl Cache {
    pub fn new(config: CacheConfig) -> Cache {
        let usage = CacheUsage { n_byte_max: config.n_byte_max, ..CacheUsage::default() };
        Cache { config, tree: Radix::new(), sunk: 0.0, usage }
    }

    /// True if a snapshot of `len` tokens serves every prefix of them.
    pub fn enters_anywhere(&self, stores: &Stores<'_>, len: usize) -> bool {
        stores.memory.forks_anywhere(len) && stores.drafters.iter().all(|drafter| drafter.forks_anywhere(len))
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
        &mut self,
        tokens: &[Token],
        n_max: usize,
        wanted: Members,
        stores: &mut Stores<'_>,
    ) -> Option<Hit> {
        let found = self.tree.find(tokens);
        let is_fit = |s: &Snapshot| s.members.covers(wanted);
        let deepest = std::iter::once((found.below, found.n_shared));
        let path = found.path.iter().rev().map(|&node| (node, self.tree.depth(node)));
        let points: Vec<(NodeId, usize)> = deepest.chain(path).collect();
        for (point, depth) in points {
            let len = depth.min(n_max);
            if len == 0 {
                break;
            }
            let exact =
                (self.tree.depth(point) == len && self.tree.get(point).is_some_and(is_fit)).then_some(point);
            let anywhere = || {
                let under = self.enterable(point, stores);
                let fit = |&id: &NodeId| self.tree.get(id).filter(|s| is_fit(s)).map(|s| (s.used_at, id));
                under.iter().filter_map(fit).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, id)| id)
            };
            let Some(node) = exact.or_else(anywhere) else { continue };
            if let Some(seq) = self.fork(node, len, wanted, stores) {
                return Some(Hit { seq, len, node });
            }
        }
        None
    }

    fn fork(&mut self, node: NodeId, len: usize, wanted: Members, stores: &mut Stores<'_>) -> Option<SeqId> {
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

    /// What a file of the snapshot of `tokens`, or of its longest part that can be had, is made of: the number of tokens,
    /// the target's part, and for each drafter its name and its part, empty if it has none.
    pub fn export(
        &mut self,
        tokens: &[Token],
        stores: &mut Stores<'_>,
    ) -> Option<(usize, Vec<u8>, Vec<Part>)> {
        let (all, n) = (stores.all(), tokens.len());
        let hit =
            self.find(tokens, n, all, stores).or_else(|| self.find(tokens, n, Members::NONE, stores))?;
        let mut target = Vec::new();
        stores.memory.export(hit.seq, &mut target);
        let drafters = stores.drafters.iter();
        let drafters =
            drafters.map(|drafter| (drafter.name(), drafter.export(hit.seq).unwrap_or_default())).collect();
        stores.forget(hit.seq);
        Some((hit.len, target, drafters))
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
        let snapshot = Snapshot { seq, members, n_use: 1.0, used_at: self.sunk };
        if let (_, Some(old)) = self.tree.insert(&file.tokens, snapshot) {
            stores.forget(old.seq);
        }
        Ok(members.covers(stores.all()))
    }

    /// Drops the snapshot of exactly these tokens. False if there is none.
    pub fn erase(&mut self, tokens: &[Token], stores: &mut Stores<'_>) -> bool {
        let node = self.tree.exact(tokens);
        node.into_iter().for_each(|node| self.drop(node, stores));
        node.is_some()
    }

    fn drop(&mut self, node: NodeId, stores: &mut Stores<'_>) {
        if let Some(snapshot) = self.tree.remove(node) {
            stores.forget(snapshot.seq);
        }
    }

    /// Drops snapshots until the others fit into the budget.
    pub fn evict(&mut self, stores: &mut Stores<'_>) {
        while self.tree.len() > 0 && stores.bytes_resting() > self.config.n_byte_max {
            let Some((weight, node)) = self.lightest(stores) else { return };
            self.sunk = self.sunk.max(weight);
            self.usage.n_evicted += 1;
            self.drop(node, stores);
        }
    }

    /// The snapshot to go first. One that shares all it has returns nothing, so it goes only if all are like that.
    fn lightest(&self, stores: &Stores<'_>) -> Option<(f64, NodeId)> {
        let weigh = |node: NodeId| {
            let snapshot = self.tree.get(node)?;
            let nearest = || self.tree.above(node).next().map_or(0, |above| self.tree.depth(above));
            let (depth, n_shared) = (self.tree.depth(node), || self.tree.n_shared(node));
            let n_again = depth - if self.enters_anywhere(stores, depth) { n_shared() } else { nearest() };
            let n_byte = stores.memory.bytes_alone(snapshot.seq);
            let worth = snapshot.n_use * n_again as f64 / n_byte.max(1) as f64;
            Some((n_byte == 0, snapshot.used_at + worth, node))
        };
        let all = self.tree.all().into_iter().filter_map(weigh);
        all.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))).map(|(_, weight, node)| (weight, node))
    }

    /// Drops all snapshots.
    pub fn clear(&mut self, stores: &mut Stores<'_>) {
        self.tree.all().into_iter().for_each(|node| self.drop(node, stores));
    }

    pub fn usage(&self, stores: &Stores<'_>) -> CacheUsage {
        CacheUsage { n_snapshot: self.tree.len(), bytes: stores.bytes_resting(), ..self.usage }
    }
}
