//! The step loop's body, and what may be asked of the engine between steps.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};

use paceline_backend::{Exec, Step as Forward, StepOut};
use paceline_memory::{Memory, SeqId, Usage};
use paceline_sampling::{Known, ParamError, Sampler};
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, TapUnion, known, verify};
use paceline_text::Vocab;

use crate::{
    CacheConfig, CacheUsage, Event, Request, RequestError, RequestId, SpeculationNote, Token,
    cache::{Cache, Hit, Members, Stores},
    choose::{Choice, Outcome, Pace},
    plan::{LanePlan, SlotView, StepPlan, plan},
    radix::n_common,
    shelf::{Archive, Shelf, ShelfId},
    slot::{Active, Phase, SlotStatus},
    snapshot_file::{CheckedSnapshot, RestoreError, SnapshotFile},
};

/// The model that decides: its compiled forward and the memory of its sequences.
pub struct Target {
    /// `[n_out, n_vocab]` logits, and the taps that the drafter asked for.
    pub exec: Box<dyn Exec>,
    /// Pages and slots.
    pub memory: Memory,
    /// Width of a logits row.
    pub n_vocab: usize,
}

/// Sizes of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Requests served at once.
    pub n_slot: usize,
    /// Context of each slot, prompt and answer together.
    pub n_ctx: usize,
    /// About how many rows a step has. Drafts are never cut to fit.
    pub n_ubatch: usize,
    /// Most tokens drafted per slot and step.
    pub n_draft_max: usize,
    /// Requests that may wait for a slot.
    pub n_queue_max: usize,
    /// The prompt cache.
    pub cache: CacheConfig,
    /// A free slot whose last tokens make up at least this share of a prompt serves it; otherwise it is the slot that
    /// was free longest. What is reused does not depend on it.
    pub slot_similarity: f32,
    /// Digest of all that a snapshot in a file depends on: models, drafters, storage, numerics.
    pub pair: u64,
    /// Recounts all memory after each step; for tests.
    pub check_memory: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            n_slot: 4,
            n_ctx: 4096,
            n_ubatch: 512,
            n_draft_max: 15,
            n_queue_max: 64,
            cache: CacheConfig::default(),
            slot_similarity: 0.1,
            pair: 0,
            check_memory: false,
        }
    }
}

/// What a call to [`Engine::step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There was nothing to do, or it waits for the shelf.
    Idle,
    /// A forward ran.
    Ran {
        /// Its rows.
        n_rows: usize,
        /// Slots that took part.
        n_lanes: usize,
    },
}

/// Totals since the start, for metrics.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Target forwards.
    pub n_step: u64,
    /// Rows of all forwards.
    pub n_row: u64,
    /// Lanes of all forwards.
    pub n_lane: u64,
    /// The longest sequence so far.
    pub n_tokens_max: u64,
    /// Drafts verified, drafted tokens, accepted tokens.
    pub drafts: (u64, u64, u64),
    /// Accepted tokens by position in the draft.
    pub accepted_by_position: Vec<u64>,
    /// Requests that failed on unusable logits.
    pub n_bad_logits: u64,
    /// Drafts dropped as unusable.
    pub n_bad_drafts: u64,
    /// Requests that waited again because the memory was full.
    pub n_parked: u64,
    /// Where the time went; zeros without a clock.
    pub times: StageTimes,
}

/// Time spent in each stage of a step, by the clock that [`Engine::with_clock`] lent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// The drafter's forwards.
    pub draft: Duration,
    /// The target's forwards: prompts, drafts and single tokens.
    pub verify: Duration,
    /// Walking the drafts, and making what is final part of both memories, which gives the drafter its features.
    pub commit: Duration,
}

/// Tells the time since some moment of its own.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

impl Counters {
    fn count(&mut self, lane: &LanePlan, decided: &Decided) {
        let (drafts, drafted, accepted) = &mut self.drafts;
        *drafts += u64::from(lane.n_draft > 0);
        *drafted += lane.n_draft as u64;
        *accepted += decided.n_accepted as u64;
        if self.accepted_by_position.len() < decided.n_accepted {
            self.accepted_by_position.resize(decided.n_accepted, 0);
        }
        for n in &mut self.accepted_by_position[..decided.n_accepted] {
            *n += 1;
        }
        self.n_bad_logits += u64::from(decided.failed);
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// Prompt and context do not fit.
    #[error(
        "the request has {n_prompt} prompt tokens, and the context of a slot has {n_ctx}, of which one is needed for \
         the answer; shorten the prompt, or start with a larger -c or fewer slots (-np)"
    )]
    ContextExceeded {
        /// Prompt tokens.
        n_prompt: usize,
        /// Context of a slot.
        n_ctx: usize,
    },
    /// Too many requests wait already.
    #[error("{n_waiting} requests are waiting already, the most allowed")]
    QueueFull {
        /// Waiting requests.
        n_waiting: usize,
    },
    /// There is nothing to compute.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// A token that the vocabulary does not have.
    #[error("prompt token {token} at index {index} is out of range: the vocabulary has {n_vocab} tokens")]
    BadToken {
        /// The token.
        token: Token,
        /// Where it is.
        index: usize,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// A slot that does not exist.
    #[error("slot {slot} does not exist: there are {n_slot}")]
    BadSlot {
        /// The slot.
        slot: usize,
        /// Number of slots.
        n_slot: usize,
    },
    /// A sampling parameter out of range.
    #[error(transparent)]
    Sampling(#[from] ParamError),
}

/// Why a slot can't be saved, restored or erased.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// It does not exist.
    #[error("slot {slot} does not exist: there are {n_slot}")]
    BadSlot {
        /// The slot.
        slot: usize,
        /// Number of slots.
        n_slot: usize,
    },
    /// It serves a request.
    #[error("slot {slot} is busy: wait for its answer, or for its client to go away")]
    Busy {
        /// The slot.
        slot: usize,
    },
    /// It served none, or what it left is gone.
    #[error("slot {slot} holds nothing: {why}")]
    Empty {
        /// The slot.
        slot: usize,
        /// What became of it.
        why: &'static str,
    },
    /// The file is of no use.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// The snapshot of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The contents of a file.
    pub bytes: Vec<u8>,
    /// Tokens in it.
    pub n_token: usize,
}

/// What a restore brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Tokens.
    pub n_token: usize,
    /// False if a drafter is loaded and the file has nothing for it: then only requests that do not draft begin with it.
    pub serves_drafts: bool,
}

/// What an erase forgot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Erased {
    /// Tokens of the conversation.
    pub n_token: usize,
    /// Snapshots of it.
    pub n_snapshot: usize,
}

/// The engine. See the crate's documentation.
pub struct Engine {
    target: Target,
    drafters: Vec<Box<dyn Drafter>>,
    taps: TapUnion,
    pace: Pace,
    vocab: Arc<Vocab>,
    config: EngineConfig,
    slots: Vec<Option<Active>>,
    /// The tokens that each slot had last, and when it was used last.
    last: Vec<(Vec<Token>, u64)>,
    waiting: VecDeque<Queued>,
    cache: Cache,
    n_started: u64,
    counters: Counters,
    clock: Option<Clock>,
    out: StepOut,
}

/// A request in the queue.
struct Queued {
    waiting: Waiting,
    /// The file with a part of its prompt, until it has come.
    fetching: Option<ShelfId>,
    /// Files that were asked for. What comes may be dropped for others before there is a slot, so it is asked again, but not
    /// for ever.
    n_fetch: usize,
    /// It waits for what another request computes.
    awaits_twin: bool,
}

impl Queued {
    fn new(waiting: Waiting) -> Queued {
        Queued { waiting, fetching: None, n_fetch: 0, awaits_twin: false }
    }
}

/// A request without a slot.
enum Waiting {
    /// It was never started.
    New(Box<Request>, Box<Sampler>),
    /// It was, and gave up its memory for others.
    Parked(Box<Active>),
}

impl Waiting {
    fn id(&self) -> RequestId {
        match self {
            Waiting::New(request, _) => request.id,
            Waiting::Parked(active) => active.request,
        }
    }

    fn slot(&self) -> Option<usize> {
        match self {
            Waiting::New(request, _) => request.slot,
            Waiting::Parked(active) => active.wanted,
        }
    }

    fn tokens(&self) -> &[Token] {
        match self {
            Waiting::New(request, _) => &request.prompt,
            Waiting::Parked(active) => &active.tokens,
        }
    }
}

/// Tokens of a prompt that are computed again rather than split off into a step of their own, so that a snapshot comes
/// right before them.
const N_TAIL_MAX: usize = 64;

/// Tokens behind what is cached already that are worth a snapshot.
const N_BRANCH_MIN: usize = 16;

/// Tokens that another request is computing, for which one that has them too begins to wait.
const N_AWAIT_MIN: usize = 64;

/// Files that are fetched for one request.
const N_FETCH_MAX: usize = 3;

impl Engine {
    /// An engine that serves `target`, guessing with `drafters`: none, one, or whichever is best for a slot. The
    /// target's plan was recorded with the [`TapUnion`] of all.
    pub fn new(
        target: Target,
        drafters: impl IntoIterator<Item = Box<dyn Drafter>>,
        vocab: Arc<Vocab>,
        mut config: EngineConfig,
    ) -> Self {
        // A request that has the memory for itself must have room to its end.
        config.n_ctx = config.n_ctx.min(target.memory.n_cell_max());
        assert!(config.n_slot > 0 && config.n_ctx > 1 && config.n_ubatch > 0, "{config:?}");
        let drafters: Vec<Box<dyn Drafter>> = drafters.into_iter().collect();
        Engine {
            slots: (0..config.n_slot).map(|_| None).collect(),
            last: vec![(Vec::new(), 0); config.n_slot],
            waiting: VecDeque::new(),
            cache: Cache::new(config.cache),
            n_started: 0,
            counters: Counters::default(),
            clock: None,
            out: StepOut::default(),
            target,
            taps: TapUnion::of(&drafters),
            pace: pace(&drafters, &config, false),
            drafters,
            vocab,
            config,
        }
    }

    /// Counts the time of each stage by `clock`.
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Drafts as much as pays, down to nothing, by the clock that was lent. Without this, drafts have full length.
    pub fn with_planner(mut self) -> Self {
        assert!(self.clock.is_some(), "a planner needs a clock");
        self.pace = pace(&self.drafters, &self.config, true);
        self
    }

    /// Keeps what the cache has no room for on `shelf`, in `n_byte_max` bytes, and finds what is there already. Does nothing
    /// where the cache is off.
    pub fn with_shelf(mut self, shelf: Box<dyn Shelf>, n_byte_max: u64) -> Self {
        if self.config.cache.is_on() {
            self.cache.set_archive(Archive::new(shelf, n_byte_max, self.config.pair));
        }
        self
    }

    fn now(&self) -> Duration {
        self.clock.as_ref().map_or(Duration::ZERO, |clock| clock())
    }

    /// Takes a request, to be started when a slot is free.
    pub fn submit(&mut self, mut request: Request) -> Result<(), SubmitError> {
        let (n_prompt, n_ctx, n_vocab) = (request.prompt.len(), self.config.n_ctx, self.target.n_vocab);
        if n_prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if n_prompt >= n_ctx {
            return Err(SubmitError::ContextExceeded { n_prompt, n_ctx });
        }
        if let Some(index) = request.prompt.iter().position(|&t| t as usize >= n_vocab) {
            return Err(SubmitError::BadToken { token: request.prompt[index], index, n_vocab });
        }
        if let Some(slot) = request.slot.filter(|&slot| slot >= self.config.n_slot) {
            return Err(SubmitError::BadSlot { slot, n_slot: self.config.n_slot });
        }
        if request.ignore_eos {
            let eog = (0..n_vocab as Token).filter(|&t| self.vocab.is_eog(t));
            request.sampling.logit_bias.extend(eog.map(|t| (t, f32::NEG_INFINITY)));
        }
        let suppressed = self.vocab.suppressed().iter().filter(|&&t| (t as usize) < n_vocab);
        request.sampling.logit_bias.extend(suppressed.map(|&t| (t, f32::NEG_INFINITY)));
        let mut sampler = Sampler::new(request.sampling.clone(), n_vocab, request.dry_breakers.clone())?;
        sampler.accept_prompt(&request.prompt);
        let n_free = self.slots.iter().filter(|s| s.is_none()).count();
        if self.waiting.len() >= self.config.n_queue_max + n_free {
            return Err(SubmitError::QueueFull { n_waiting: self.waiting.len() });
        }
        self.waiting.push_back(Queued::new(Waiting::New(Box::new(request), Box::new(sampler))));
        Ok(())
    }

    /// Ends a request without an answer; its slot is free at once. False if it was not known any more.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(at) = self.waiting.iter().position(|queued| queued.waiting.id() == id) {
            self.waiting.remove(at);
            return true;
        }
        match self.slots.iter().position(|s| s.as_ref().is_some_and(|a| a.request == id)) {
            Some(slot) => {
                self.retire(slot, true);
                self.evict();
                true
            }
            None => false,
        }
    }

    /// True if a step would find something to do.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.slots.iter().any(Option::is_some)
    }

    /// True if snapshots are on their way to the shelf or from it, which steps see to.
    pub fn has_chores(&self) -> bool {
        self.cache.is_busy()
    }

    /// Puts on the shelf what the cache holds and has room there. Steps do the writing: it is done when there are no
    /// [chores](Self::has_chores) left.
    pub fn put_away(&mut self) {
        self.cache.put_all_away(&mut stores(&mut self.target, &mut self.drafters));
    }

    /// One step: admit, draft, plan, forward, verify, commit, emit.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Step {
        self.cache.tend(&mut stores(&mut self.target, &mut self.drafters));
        self.admit(events);
        let begin = self.now();
        let mut drafts = self.draft();
        let draft_time = self.now().saturating_sub(begin);
        self.counters.times.draft += draft_time;
        let views: Vec<SlotView> = self
            .slots
            .iter()
            .enumerate()
            .filter_map(|(slot, active)| {
                let active = active.as_ref()?;
                let (n_gap, n_known_max) = (active.n_gap(), active.n_known_max());
                Some(SlotView { slot, n_gap, n_known_max, n_draft: drafts[slot].tokens.len() })
            })
            .collect();
        let plan = self.prepare(plan(&views, self.config.n_ubatch), &mut drafts, events);
        if plan.lanes.is_empty() {
            return Step::Idle;
        }
        let begin = self.now();
        self.forward(&plan, &drafts);
        let computed = self.now();
        let verify_time = computed.saturating_sub(begin);
        self.counters.times.verify += verify_time;
        let finished = self.verify_and_commit(&plan, &drafts, events);
        self.settle(&plan, draft_time, verify_time);
        self.counters.times.commit += self.now().saturating_sub(computed);
        self.count(&plan);
        for lane in plan.lanes.iter().filter(|lane| !finished.contains(&(lane.slot, false))) {
            self.keep_cuts(lane.slot);
        }
        for (slot, is_sound) in finished {
            self.retire(slot, is_sound);
        }
        self.evict();
        if self.config.check_memory {
            self.target.memory.check();
        }
        Step::Ran { n_rows: plan.n_rows(), n_lanes: plan.lanes.len() }
    }

    /// Starts what waits, first come, first served, as long as there are slots and memory.
    fn admit(&mut self, events: &mut Vec<Event>) {
        let mut at = 0;
        while at < self.waiting.len() {
            let Some(slot) = self.free_slot(&self.waiting[at].waiting) else {
                at += 1;
                continue;
            };
            let hit = self.reach(at);
            let must_wait = self.awaits_more(at, hit);
            if must_wait || !self.has_room(at, hit) {
                if let Some(hit) = hit {
                    stores(&mut self.target, &mut self.drafters).forget(hit.seq);
                }
                if must_wait {
                    at += 1;
                    continue;
                }
                return;
            }
            let Some(Queued { waiting, .. }) = self.waiting.remove(at) else { return };
            let seq = hit.map_or_else(|| self.target.memory.create(), |hit| hit.seq);
            let n_cached = hit.map_or(0, |hit| hit.len);
            let mut active = match waiting {
                Waiting::Parked(active) => *active,
                Waiting::New(request, sampler) => {
                    let turns = request.turns.clone();
                    let active = self.start(*request, *sampler, seq, slot, n_cached, events);
                    if active.caches && self.config.cache.is_on() {
                        self.cache.count(hit);
                    }
                    self.plan_cuts(active, &turns, n_cached)
                }
            };
            (active.seq, active.n_computed) = (seq, n_cached);
            active.reach_cuts();
            active.born = self.n_started;
            self.n_started += 1;
            self.slots[slot] = Some(active);
        }
    }

    /// The slot that may serve `waiting` now.
    fn free_slot(&self, waiting: &Waiting) -> Option<usize> {
        let is_free = |slot: &usize| self.slots[*slot].is_none();
        if let Some(wanted) = waiting.slot() {
            return Some(wanted).filter(is_free);
        }
        let tokens = waiting.tokens();
        let similarity = |slot: usize| n_common(&self.last[slot].0, tokens) as f32 / tokens.len() as f32;
        let free = || (0..self.slots.len()).filter(is_free);
        let similar =
            free().map(|slot| (similarity(slot), slot)).filter(|(s, _)| *s > self.config.slot_similarity);
        // Of equals the first.
        let best = similar.min_by(|a, b| b.0.total_cmp(&a.0));
        best.map(|(_, slot)| slot).or_else(|| free().min_by_key(|&slot| self.last[slot].1))
    }

    /// Whether a waiting request uses the cache, and the drafters that a prefix must have parts of.
    fn wants(&self, at: usize) -> (bool, Members) {
        match &self.waiting[at].waiting {
            Waiting::New(request, _) => {
                let all = Members::of(|_| self.n_draft_max(request) > 0, self.drafters.len());
                (request.cache_prompt, all)
            }
            Waiting::Parked(active) => (active.caches, followers(active)),
        }
    }

    /// The longest cached prefix of a waiting request.
    fn reach(&mut self, at: usize) -> Option<Hit> {
        let (caches, wanted) = self.wants(at);
        let tokens = self.waiting[at].waiting.tokens();
        let mut stores = stores(&mut self.target, &mut self.drafters);
        // The last token is computed in any case: its row says what comes next.
        let n_max = tokens.len() - 1;
        if caches { self.cache.find(tokens, n_max, wanted, &mut stores) } else { None }
    }

    /// True if a waiting request should wait on, since more of its prompt than `hit` is about to be there: on its way from
    /// the shelf, or being computed by another request. It is asked before each step, so who waits for a request that is
    /// cancelled, or for a file that is damaged, goes on with what there is.
    fn awaits_more(&mut self, at: usize, hit: Option<Hit>) -> bool {
        let (caches, wanted) = self.wants(at);
        if !caches || !self.config.cache.is_on() {
            return false;
        }
        let n_have = hit.map_or(0, |hit| hit.len);
        self.awaits_shelf(at, n_have, wanted) || self.awaits_twin(at, n_have, wanted)
    }

    fn awaits_shelf(&mut self, at: usize, n_have: usize, wanted: Members) -> bool {
        let n_free = self.slots.iter().filter(|slot| slot.is_none()).count();
        let n_before = self.waiting.iter().take(at).filter(|queued| queued.fetching.is_some()).count();
        let queued = &mut self.waiting[at];
        if queued.fetching.is_some_and(|id| self.cache.is_fetching(id)) {
            return true;
        }
        queued.fetching = None;
        if queued.n_fetch >= N_FETCH_MAX {
            return false;
        }
        let tokens = queued.waiting.tokens();
        let stores = stores(&mut self.target, &mut self.drafters);
        let Some(id) = self.cache.on_shelf(tokens, n_have, tokens.len() - 1, wanted, &stores) else {
            return false;
        };
        // Without a slot for it, it would have to wait here, where others may need the room.
        if n_before < n_free && self.cache.fetch(id) {
            queued.fetching = Some(id);
            queued.n_fetch += 1;
        }
        true
    }

    /// Requests with one prompt that come together compute it once: the others wait for the first one's snapshot.
    fn awaits_twin(&mut self, at: usize, n_have: usize, wanted: Members) -> bool {
        let queued = &mut self.waiting[at];
        let n_min = n_have + if queued.awaits_twin { 1 } else { N_AWAIT_MIN };
        queued.awaits_twin = false;
        let tokens = queued.waiting.tokens();
        let is_drawn = |active: &Active| active.caches && followers(active).covers(wanted);
        for active in self.slots.iter_mut().flatten().filter(|active| is_drawn(active)) {
            let n = n_common(&active.tokens[..active.stats.n_prompt], tokens).min(tokens.len() - 1);
            if n > active.n_computed && n >= n_min {
                // There is a snapshot at the end of what both have, or one is taken.
                active.add_cut(n);
                queued.awaits_twin = true;
                return true;
            }
        }
        false
    }

    /// True if there is room for all of a waiting request beside those that run.
    fn has_room(&self, at: usize, hit: Option<Hit>) -> bool {
        let memory = &self.target.memory;
        let owed = |tokens: &[Token], seq: Option<SeqId>| {
            let (n_have, n_asleep) =
                seq.map_or((0, 0), |seq| (memory.n_page(seq), memory.n_page_asleep(seq)));
            memory.n_page_of(tokens.len()).saturating_sub(n_have) + n_asleep
        };
        let running: Vec<&Active> = self.slots.iter().flatten().collect();
        if running.is_empty() {
            return true;
        }
        // A page for each to grow into, and one for a shared page that is written.
        let spare = memory.n_page_of(1) * (running.len() + 2);
        let promised: usize = running.iter().map(|active| owed(&active.tokens, Some(active.seq))).sum();
        let tokens = self.waiting[at].waiting.tokens();
        let needed = owed(tokens, hit.map(|hit| hit.seq)) + promised + spare;
        needed <= memory.n_page_free()
    }

    fn n_draft_max(&self, request: &Request) -> usize {
        request.n_draft_max.unwrap_or(usize::MAX).min(self.config.n_draft_max)
    }

    fn start(
        &mut self,
        request: Request,
        sampler: Sampler,
        seq: SeqId,
        slot: usize,
        n_cached: usize,
        events: &mut Vec<Event>,
    ) -> Active {
        let n_draft_max = self.n_draft_max(&request);
        let note = match n_draft_max {
            _ if self.drafters.is_empty() => SpeculationNote::NoDrafter,
            0 => SpeculationNote::OffByRequest,
            _ => SpeculationNote::Active,
        };
        events.push(Event::Started { request: request.id, slot, n_cached });
        let (chooser, n_ctx, vocab) = (self.pace.chooser(), self.config.n_ctx, self.vocab.clone());
        let mut active = Active::new(request, seq, sampler, chooser, n_draft_max, n_ctx, vocab);
        active.stats.speculation = note;
        active.stats.n_cached = n_cached;
        active
    }

    /// Decides where the prompt of `active` leaves snapshots.
    fn plan_cuts(&mut self, mut active: Active, turns: &[usize], n_cached: usize) -> Active {
        let config = self.config.cache;
        if !active.caches || !config.is_on() {
            return active;
        }
        let n = active.tokens.len();
        if self.cache.enters_anywhere(&stores(&mut self.target, &mut self.drafters), n) {
            // One behind the prompt serves every prefix, and cuts nothing.
            active.cuts = vec![n];
            return active;
        }
        let mut cuts = turns.to_vec();
        // The same prompt again, or a longer one, goes on close before the end of this one.
        if turns.iter().all(|&turn| turn >= n || turn + N_TAIL_MAX < n) {
            cuts.push(n - 1);
        }
        // Where prompts part once they may part again.
        cuts.extend(Some(self.cache.n_shared(&active.tokens)).filter(|&m| m >= n_cached + N_BRANCH_MIN));
        let n_step = n.checked_div(config.n_step).unwrap_or(0);
        cuts.extend((1..=n_step).rev().take(config.n_step_max).map(|i| i * config.n_step));
        // A cut costs a forward; close behind what is cached it would save less than one.
        cuts.retain(|&cut| cut >= n_cached + N_BRANCH_MIN && cut < n);
        cuts.sort_unstable_by(|a, b| b.cmp(a));
        cuts.dedup();
        active.cuts = cuts;
        active
    }

    /// Drafts for every slot that can use one, each drafter called once at most for all its slots; by slot, empty where
    /// there is none. A slot whose drafter had nothing to say may ask another.
    fn draft(&mut self) -> Vec<Draft> {
        let n_slot = self.slots.len();
        let mut drafts = vec![Draft::default(); n_slot];
        let n_decoding = self.slots.iter().flatten().filter(|active| active.n_gap() == 1).count();
        if self.drafters.is_empty() || n_decoding == 0 || self.pace.begin(n_decoding) {
            return drafts;
        }
        let mut asked = vec![vec![false; self.drafters.len()]; n_slot];
        let mut open: Vec<usize> = (0..n_slot).collect();
        while !open.is_empty() {
            let calls = self.choose(&open, &asked, n_decoding);
            open.clear();
            for (drafter, wanted) in calls.iter().enumerate().filter(|(_, wanted)| !wanted.is_empty()) {
                for &slot in &self.ask(drafter, wanted, &mut drafts) {
                    asked[slot][drafter] = true;
                    open.push(slot);
                }
            }
            open.sort_unstable();
        }
        drafts
    }

    /// What the slots of `open` want of each drafter: `(slot, most tokens)`.
    fn choose(&mut self, open: &[usize], asked: &[Vec<bool>], n_decoding: usize) -> Vec<Vec<(usize, usize)>> {
        let mut calls = vec![Vec::new(); self.drafters.len()];
        for &slot in open {
            let Some(active) = self.slots[slot].as_mut().filter(|a| follows(a)) else { continue };
            let room = active.n_draft_room();
            if room == 0 {
                continue;
            }
            let choice = active.chooser.choose(&mut self.pace, n_decoding, room, &asked[slot]);
            let is_first = !asked[slot].contains(&true);
            let note = &mut active.stats.speculation;
            match choice {
                Choice::Draft { drafter, n_draft } => {
                    calls[drafter].push((slot, n_draft));
                    if *note == SpeculationNote::Resting {
                        *note = SpeculationNote::Active;
                    }
                }
                Choice::Rest if is_first && *note == SpeculationNote::Active => {
                    *note = SpeculationNote::Resting;
                }
                Choice::Rest | Choice::Measure => {}
            }
        }
        calls
    }

    /// One call of a drafter for the slots that want it. Returns those that got nothing and may ask another.
    fn ask(&mut self, index: usize, wanted: &[(usize, usize)], drafts: &mut [Draft]) -> Vec<usize> {
        let begin = self.pace.is_timed().then(|| self.now());
        let drafter = &mut self.drafters[index];
        let mut requests = Vec::with_capacity(wanted.len());
        for (slot, active) in self.slots.iter_mut().enumerate() {
            let Some(&(_, n_max)) = wanted.iter().find(|(wanting, _)| *wanting == slot) else { continue };
            let Some(active) = active else { continue };
            requests.push(DraftRequest {
                seq: active.seq,
                anchor: active.tokens[active.n_computed],
                position: active.n_computed,
                n_max,
                past: self.target.memory.past(active.seq),
                sampler: &mut active.sampler,
            });
        }
        let answers = drafter.draft(&mut requests);
        drop(requests);
        assert_eq!(answers.len(), wanted.len(), "the drafter must answer every request");
        let mut empty = Vec::new();
        for (&(slot, n_max), mut draft) in wanted.iter().zip(answers) {
            let Some(active) = &mut self.slots[slot] else { continue };
            // A drafter's word is not trusted: an id out of range would index past tables further on.
            let in_range = draft.tokens.iter().all(|&t| (t as usize) < self.target.n_vocab);
            let fault = match draft.fault.take() {
                None if !in_range => {
                    Some("it proposed a token that the vocabulary does not have".to_string())
                }
                fault => fault,
            };
            if let Some(reason) = fault {
                self.counters.n_bad_drafts += 1;
                drafter.forget(active.seq);
                active.stats.dropped.push((drafter.name(), reason.clone()));
                match active.chooser.drop_drafter(index) {
                    true => empty.push(slot),
                    false => active.stats.speculation = SpeculationNote::Faulted(reason),
                }
                continue;
            }
            draft.tokens.truncate(n_max);
            if draft.tokens.is_empty() {
                empty.push(slot);
                continue;
            }
            active.drafted_by = Some(index);
            active.stats.drafter = Some(drafter.name());
            drafts[slot] = draft;
        }
        if let Some(begin) = begin {
            let n_draft = wanted.iter().map(|(_, n_max)| *n_max).max().unwrap_or(0);
            let time = self.now().saturating_sub(begin);
            self.pace.record_draft(index, n_draft, time);
        }
        empty
    }

    /// Lets the choosers know what the step's drafts came to, and what the step cost.
    fn settle(&mut self, plan: &StepPlan, draft_time: Duration, verify_time: Duration) {
        let decoding = || plan.lanes.iter().filter(|lane| lane.n_known == 1);
        let (m, n_rows) = (decoding().count(), decoding().map(|lane| 1 + lane.n_draft).sum());
        if self.drafters.is_empty() || m == 0 {
            return;
        }
        let is_pure = m == plan.lanes.len();
        if is_pure {
            self.pace.record_verify(n_rows, m, verify_time);
        }
        let mut outcomes = self.slots.iter_mut().flatten().filter_map(|active| {
            let Active { outcome, chooser, .. } = active;
            outcome.take().map(|outcome| (chooser, outcome))
        });
        self.pace.settle(m, n_rows, is_pure.then_some(draft_time + verify_time), &mut outcomes);
    }

    /// Makes room for the plan's rows: for the known tokens of every slot, the oldest request first, then for drafts
    /// from what is left, so that no draft costs another slot its room. Where there is none for known tokens the youngest
    /// request is parked, so the oldest always goes on; a draft is cut to the room that there is.
    fn prepare(&mut self, mut plan: StepPlan, drafts: &mut [Draft], events: &mut Vec<Event>) -> StepPlan {
        plan.lanes.sort_by_key(|lane| self.slots[lane.slot].as_ref().map(|active| active.born));
        let mut lanes = Vec::with_capacity(plan.lanes.len());
        for lane in plan.lanes {
            while let Some(active) = &self.slots[lane.slot] {
                let Err(error) = self.target.memory.prepare(active.seq, lane.n_known, lane.n_known) else {
                    lanes.push(lane);
                    break;
                };
                let others = self.slots.iter().flatten().filter(|other| other.request != active.request);
                match others.map(|other| other.born).max() {
                    Some(youngest) => {
                        let youngest = youngest.max(active.born);
                        let is_youngest = |a: &Option<Active>| a.as_ref().is_some_and(|a| a.born == youngest);
                        let Some(slot) = self.slots.iter().position(is_youngest) else { break };
                        self.park(slot);
                    }
                    None => {
                        let (request, stats) = (active.request, active.stats.clone());
                        events.push(Event::Failed { request, error: RequestError::NoRoom(error), stats });
                        self.retire(lane.slot, true);
                    }
                }
            }
        }
        for lane in lanes.iter_mut().filter(|lane| lane.n_draft > 0) {
            let Some(active) = &self.slots[lane.slot] else { continue };
            lane.n_draft = self.target.memory.extend(active.seq, lane.n_draft);
            drafts[lane.slot].tokens.truncate(lane.n_draft);
        }
        lanes.sort_by_key(|lane| lane.slot);
        StepPlan { lanes }
    }

    fn forward(&mut self, plan: &StepPlan, drafts: &[Draft]) {
        let n_rows = plan.n_rows();
        let (mut tokens, mut positions) = (Vec::with_capacity(n_rows), Vec::with_capacity(n_rows));
        let (mut lanes, mut outputs) = (Vec::with_capacity(plan.lanes.len()), Vec::new());
        for lane in &plan.lanes {
            let Some(active) = &self.slots[lane.slot] else { continue };
            let first = tokens.len();
            lanes.push(self.target.memory.lane(active.seq, first));
            tokens.extend(&active.tokens[active.n_computed..active.n_computed + lane.n_known]);
            tokens.extend(&drafts[lane.slot].tokens);
            positions.extend((active.n_computed as u32..).take(lane.n_known + lane.n_draft));
            if lane.closes {
                outputs.extend((first + lane.n_known - 1) as u32..tokens.len() as u32);
            }
        }
        let step =
            Forward { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        self.target.exec.run(&step, &mut self.out);
    }

    /// Verifies every lane, commits what is final in both memories, and emits. Returns the slots that are done, and
    /// whether what they computed can be built on.
    fn verify_and_commit(
        &mut self,
        plan: &StepPlan,
        drafts: &[Draft],
        events: &mut Vec<Event>,
    ) -> Vec<(usize, bool)> {
        let mut finished = Vec::new();
        let mut moved = Vec::with_capacity(plan.lanes.len());
        let (mut row, mut output) = (0, 0);
        for lane in &plan.lanes {
            let Some(active) = &mut self.slots[lane.slot] else { continue };
            let first_row = row;
            row += lane.n_known + lane.n_draft;
            let first_position = active.n_computed;
            let drafted_by = active.drafted_by.take();
            let (mut n_final, mut is_wanted) = (lane.n_known, true);
            if lane.closes {
                let logits = |i: usize| (self.out.output_row(output + i), known(&self.out, output + i));
                let decided = decide(active, lane, &drafts[lane.slot], logits);
                output += lane.n_draft + 1;
                n_final += decided.n_taken.saturating_sub(1);
                self.counters.count(lane, &decided);
                // An answer that ends inside a draft says nothing about the rest of it.
                if decided.is_over {
                    finished.push((lane.slot, !decided.failed));
                    // Drafters are told of rows that nobody goes on from only for the sake of a snapshot.
                    is_wanted = !decided.failed && active.caches && self.config.cache.is_on();
                } else if let Some(drafter) = drafted_by.filter(|_| lane.n_draft > 0) {
                    let (n_draft, n_accepted) = (lane.n_draft, decided.n_accepted);
                    active.outcome = Some(Outcome { drafter, n_draft, n_accepted });
                }
                events.extend(decided.events);
            } else {
                let (n_computed, n_prompt) = (active.n_computed + lane.n_known, active.stats.n_prompt);
                if !active.is_decoding() && n_computed > active.n_told {
                    active.n_told = n_computed;
                    events.push(Event::Prefill { request: active.request, n_computed, n_prompt });
                }
            }
            self.target.memory.commit(active.seq, n_final);
            active.n_computed += n_final;
            if follows(active) && is_wanted {
                moved.push((lane.slot, first_position, first_row..first_row + n_final));
            }
        }
        self.inform(&moved);
        finished
    }

    /// Gives each drafter the rows that became final of the slots that it follows: (slot, first position, rows).
    fn inform(&mut self, moved: &[(usize, usize, Range<usize>)]) {
        for (i, drafter) in self.drafters.iter_mut().enumerate() {
            let followed = || {
                let active = |slot: usize| self.slots[slot].as_ref().filter(|a| a.chooser.is_alive(i));
                moved.iter().filter_map(move |(slot, first, rows)| Some((active(*slot)?, *first, rows)))
            };
            let mut own = Vec::new();
            let is_all = self.taps.is_all_of(i);
            if !is_all {
                for (_, _, rows) in followed() {
                    self.taps.gather(i, self.out.taps_rows(rows.clone()), self.out.taps_width, &mut own);
                }
            }
            let width = own.len() / followed().map(|(_, _, rows)| rows.len()).sum::<usize>().max(1);
            let mut at = 0;
            let kept: Vec<Kept<'_>> = followed()
                .map(|(active, first_position, rows)| {
                    let own_rows = at * width..(at + rows.len()) * width;
                    at += rows.len();
                    Kept {
                        seq: active.seq,
                        first_position,
                        tokens: &active.tokens[first_position..first_position + rows.len()],
                        taps: if is_all { self.out.taps_rows(rows.clone()) } else { &own[own_rows] },
                    }
                })
                .collect();
            if !kept.is_empty() {
                drafter.commit(&kept);
            }
        }
    }

    /// Takes the request out of `slot`. What it computed stays in the cache, if that is wanted and it is sound.
    fn retire(&mut self, slot: usize, is_sound: bool) {
        let Some(active) = self.slots[slot].take() else { return };
        let (cache, mut stores) = (&mut self.cache, stores(&mut self.target, &mut self.drafters));
        if is_sound && leaves_snapshot(&active, &self.config.cache) {
            cache.keep(&active.tokens[..active.n_computed], active.seq, followers(&active), &mut stores);
        }
        stores.forget(active.seq);
        let mut tokens = active.tokens;
        tokens.truncate(active.n_computed);
        self.last[slot] = (tokens, self.counters.n_step);
    }

    /// Makes the request in `slot` wait again, first in the queue. Its snapshot may be dropped for others; then it is
    /// computed again.
    fn park(&mut self, slot: usize) {
        let Some(mut active) = self.slots[slot].take() else { return };
        // Its draft was never verified.
        active.drafted_by = None;
        let (cache, mut stores) = (&mut self.cache, stores(&mut self.target, &mut self.drafters));
        if active.caches {
            cache.keep(&active.tokens[..active.n_computed], active.seq, followers(&active), &mut stores);
        }
        stores.forget(active.seq);
        cache.evict(&mut stores);
        self.counters.n_parked += 1;
        self.waiting.push_front(Queued::new(Waiting::Parked(Box::new(active))));
    }

    /// Takes a snapshot if the prompt in `slot` has come to where one is due.
    fn keep_cuts(&mut self, slot: usize) {
        let Some(active) = &mut self.slots[slot] else { return };
        if active.reach_cuts() {
            let mut stores = stores(&mut self.target, &mut self.drafters);
            self.cache.keep(&active.tokens[..active.n_computed], active.seq, followers(active), &mut stores);
        }
    }

    fn evict(&mut self) {
        self.cache.evict(&mut stores(&mut self.target, &mut self.drafters));
    }

    /// A free slot.
    fn idle_slot(&self, slot: usize) -> Result<usize, SaveError> {
        match self.slots.get(slot) {
            None => Err(SaveError::BadSlot { slot, n_slot: self.config.n_slot }),
            Some(Some(_)) => Err(SaveError::Busy { slot }),
            Some(None) => Ok(slot),
        }
    }

    /// The contents of a file with what the last request of `slot` left: tokens, the target's memory, the drafter's.
    pub fn save(&mut self, slot: usize) -> Result<Saved, SaveError> {
        let slot = self.idle_slot(slot)?;
        let tokens = &self.last[slot].0;
        if tokens.is_empty() {
            return Err(SaveError::Empty { slot, why: "it has served no request" });
        }
        let mut stores = stores(&mut self.target, &mut self.drafters);
        let Some((n_token, bytes)) = self.cache.export(tokens, self.config.pair, &mut stores) else {
            let why = "what its last request computed is not in the prompt cache (any more)";
            return Err(SaveError::Empty { slot, why });
        };
        Ok(Saved { bytes, n_token })
    }

    /// Takes up the contents of such a file as what `slot` had last; any slot may go on with it. On error nothing has
    /// changed.
    pub fn restore(&mut self, slot: usize, file: &CheckedSnapshot) -> Result<Restored, SaveError> {
        let slot = self.idle_slot(slot)?;
        let file = SnapshotFile::read(file, self.config.pair)?;
        let (n_token, n_vocab) = (file.tokens.len(), self.target.n_vocab);
        if file.tokens.iter().any(|&token| token as usize >= n_vocab) {
            return Err(RestoreError::Damaged(format!("a token beyond the {n_vocab} that there are")).into());
        }
        let mut stores = stores(&mut self.target, &mut self.drafters);
        let serves_drafts = self.cache.import(&file, &mut stores)?;
        self.cache.evict(&mut stores);
        self.last[slot] = (file.tokens, self.counters.n_step);
        Ok(Restored { n_token, serves_drafts })
    }

    /// Forgets what the conversation of `slot` left, on the shelf too, except what other conversations begin with.
    pub fn erase(&mut self, slot: usize) -> Result<Erased, SaveError> {
        let slot = self.idle_slot(slot)?;
        let tokens = std::mem::take(&mut self.last[slot].0);
        let n_snapshot = self.cache.erase(&tokens, &mut stores(&mut self.target, &mut self.drafters));
        Ok(Erased { n_token: tokens.len(), n_snapshot })
    }

    /// Tokens of the last request of `slot` that one which goes on from them would begin with; 0 while it is busy.
    pub fn n_kept(&mut self, slot: usize) -> usize {
        let Some((tokens, _)) = self.last.get(slot).filter(|_| self.slots[slot].is_none()) else { return 0 };
        let stores = stores(&mut self.target, &mut self.drafters);
        let wanted = Members::of(|_| self.config.n_draft_max > 0, stores.drafters.len());
        self.cache.n_reach(tokens, wanted, &stores)
    }

    /// Drops everything that is cached.
    pub fn clear_cache(&mut self) {
        self.cache.clear(&mut stores(&mut self.target, &mut self.drafters));
    }

    /// What is cached, and what that was good for.
    pub fn cache_usage(&mut self) -> CacheUsage {
        self.cache.usage(&stores(&mut self.target, &mut self.drafters))
    }

    fn count(&mut self, plan: &StepPlan) {
        self.counters.n_step += 1;
        self.counters.n_row += plan.n_rows() as u64;
        self.counters.n_lane += plan.lanes.len() as u64;
        let longest = self.slots.iter().flatten().map(|a| a.tokens.len() as u64).max().unwrap_or(0);
        self.counters.n_tokens_max = self.counters.n_tokens_max.max(longest);
    }

    /// What each slot is doing.
    pub fn slots(&self) -> Vec<SlotStatus> {
        self.slots
            .iter()
            .enumerate()
            .map(|(id, active)| match active {
                Some(active) => active.status(id),
                None => SlotStatus {
                    id,
                    phase: Phase::Idle,
                    request: None,
                    n_prompt: 0,
                    n_prompt_computed: 0,
                    n_predicted: 0,
                    n_remaining: None,
                    n_draft: (0, 0),
                },
            })
            .collect()
    }

    /// The figures so far of a request that has a slot.
    pub fn stats(&self, id: RequestId) -> Option<&crate::Stats> {
        self.slots.iter().flatten().find(|active| active.request == id).map(|active| &active.stats)
    }

    /// Requests that wait for a slot.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Totals since the start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The sizes it was made with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// What the target's memory holds.
    pub fn usage(&self) -> Usage {
        self.target.memory.usage()
    }

    /// The drafters.
    pub fn drafters(&self) -> &[Box<dyn Drafter>] {
        &self.drafters
    }
}

fn stores<'a>(target: &'a mut Target, drafters: &'a mut [Box<dyn Drafter>]) -> Stores<'a> {
    Stores { memory: &mut target.memory, drafters }
}

/// True if a snapshot is taken when the request ends.
fn leaves_snapshot(active: &Active, cache: &CacheConfig) -> bool {
    active.caches && cache.is_on() && cache.keeps_finished && active.n_computed > 0
}

/// What drafting costs here, as long as nothing is known.
fn pace(drafters: &[Box<dyn Drafter>], config: &EngineConfig, has_clock: bool) -> Pace {
    let n_draft_max: Vec<usize> =
        drafters.iter().map(|drafter| drafter.n_draft_max().min(config.n_draft_max)).collect();
    Pace::new(&n_draft_max, has_clock)
}

/// The drafters that were given all rows of this request and may be asked for drafts.
fn followers(active: &Active) -> Members {
    if follows(active) {
        Members::of(|i| active.chooser.is_alive(i), active.chooser.n_drafter())
    } else {
        Members::NONE
    }
}

/// True if drafters follow this request: they were given all its rows and may be asked for drafts.
fn follows(active: &Active) -> bool {
    use SpeculationNote::{Active as Drafting, Resting, Useless};
    matches!(active.stats.speculation, Drafting | Useless | Resting)
}

/// What a verify came to.
struct Decided {
    n_taken: usize,
    n_accepted: usize,
    is_over: bool,
    failed: bool,
    events: Vec<Event>,
}

/// Lets the sampler of `active` walk the draft and takes what it chose.
fn decide<'a>(
    active: &mut Active,
    lane: &LanePlan,
    draft: &Draft,
    logits: impl Fn(usize) -> (&'a [f32], Option<Known>),
) -> Decided {
    let next = active.tokens.len();
    let mut failure = None;
    let sampler = &mut active.sampler;
    let verdict = verify(
        &draft.tokens[..lane.n_draft],
        |i| {
            let (row, known) = logits(i);
            match sampler.choose_known((next + i) as u64, row, known) {
                Ok(choice) => {
                    sampler.accept(choice.token);
                    Some((choice.token, choice.logprobs))
                }
                Err(error) => {
                    failure =
                        Some(RequestError::Logits { position: next - 1 + i, reason: error.to_string() });
                    None
                }
            }
        },
        |choice| choice.0,
    );
    // What was chosen before a failure counts: the answer may end there, and without a draft it would have.
    let (text, tokens, finish) = active.take(verdict.chosen, verdict.n_accepted);
    let (n_taken, n_accepted) = (tokens.len(), verdict.n_accepted.min(tokens.len()));
    let failure = failure.filter(|_| finish.is_none());
    let request = active.request;
    let mut events = Vec::with_capacity(2);
    if n_taken > 0 {
        active.count_draft(lane.n_draft, n_accepted);
        events.push(Event::Tokens { request, text, tokens });
    }
    let (is_over, failed) = (finish.is_some() || failure.is_some(), failure.is_some());
    if let Some(finish) = finish {
        let text = active.finish_text(&finish);
        events.push(Event::Done { request, text, finish, stats: active.stats.clone() });
    } else if let Some(error) = failure {
        events.push(Event::Failed { request, error, stats: active.stats.clone() });
    }
    Decided { n_taken, n_accepted, is_over, failed, events }
}
