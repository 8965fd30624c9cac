//! The step loop's body, and what may be asked of the engine between steps.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};

use paceline_backend::{Exec, Step as Forward, StepOut};
use paceline_memory::{Memory, Usage};
use paceline_sampling::{ParamError, Sampler};
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, TapUnion, verify};
use paceline_text::Vocab;

use crate::{
    Event, Request, RequestError, RequestId, SpeculationNote, Token,
    choose::{Choice, Outcome, Pace},
    plan::{LanePlan, SlotView, StepPlan, plan},
    slot::{Active, Phase, SlotStatus},
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
            check_memory: false,
        }
    }
}

/// What a call to [`Engine::step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There was nothing to do.
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

/// The engine. See the crate's documentation.
pub struct Engine {
    target: Target,
    drafters: Vec<Box<dyn Drafter>>,
    taps: TapUnion,
    pace: Pace,
    vocab: Arc<Vocab>,
    config: EngineConfig,
    slots: Vec<Option<Active>>,
    waiting: VecDeque<(Request, Sampler)>,
    counters: Counters,
    clock: Option<Clock>,
    out: StepOut,
}

impl Engine {
    /// An engine that serves `target`, guessing with `drafters`: none, one, or whichever is best for a slot. The
    /// target's plan was recorded with the [`TapUnion`] of all.
    pub fn new(
        target: Target,
        drafters: impl IntoIterator<Item = Box<dyn Drafter>>,
        vocab: Arc<Vocab>,
        config: EngineConfig,
    ) -> Self {
        assert!(config.n_slot > 0 && config.n_ctx > 1 && config.n_ubatch > 0, "{config:?}");
        let drafters: Vec<Box<dyn Drafter>> = drafters.into_iter().collect();
        Engine {
            slots: (0..config.n_slot).map(|_| None).collect(),
            waiting: VecDeque::new(),
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
        self.waiting.push_back((request, sampler));
        Ok(())
    }

    /// Ends a request without an answer; its slot is free at once. False if it was not known any more.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(at) = self.waiting.iter().position(|(r, _)| r.id == id) {
            self.waiting.remove(at);
            return true;
        }
        match self.slots.iter().position(|s| s.as_ref().is_some_and(|a| a.request == id)) {
            Some(slot) => {
                self.retire(slot);
                true
            }
            None => false,
        }
    }

    /// True if a step would find something to do.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.slots.iter().any(Option::is_some)
    }

    /// One step: admit, draft, plan, forward, verify, commit, emit.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Step {
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
                let n_gap = active.as_ref()?.n_gap();
                Some(SlotView { slot, n_gap, n_draft: drafts[slot].tokens.len() })
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
        for slot in finished {
            self.retire(slot);
        }
        self.count(&plan);
        if self.config.check_memory {
            self.target.memory.check();
        }
        Step::Ran { n_rows: plan.n_rows(), n_lanes: plan.lanes.len() }
    }

    fn admit(&mut self, events: &mut Vec<Event>) {
        let mut at = 0;
        while at < self.waiting.len() {
            let free = match self.waiting[at].0.slot {
                Some(wanted) => Some(wanted).filter(|&slot| self.slots[slot].is_none()),
                None => self.slots.iter().position(Option::is_none),
            };
            let Some(slot) = free else {
                at += 1;
                continue;
            };
            let Some((request, sampler)) = self.waiting.remove(at) else { break };
            let n_draft_max = request.n_draft_max.unwrap_or(usize::MAX).min(self.config.n_draft_max);
            let note = match n_draft_max {
                _ if self.drafters.is_empty() => SpeculationNote::NoDrafter,
                0 => SpeculationNote::OffByRequest,
                _ => SpeculationNote::Active,
            };
            let seq = self.target.memory.create();
            events.push(Event::Started { request: request.id, slot, n_cached: 0 });
            let (chooser, n_ctx, vocab) = (self.pace.chooser(), self.config.n_ctx, self.vocab.clone());
            let mut active = Active::new(request, seq, sampler, chooser, n_draft_max, n_ctx, vocab);
            active.stats.speculation = note;
            self.slots[slot] = Some(active);
        }
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

    /// Makes room for the plan's rows: for the known tokens of every slot, then for drafts from what is left, so
    /// that no draft costs another slot its room. A draft without room is dropped; a slot without fails.
    fn prepare(&mut self, plan: StepPlan, drafts: &mut [Draft], events: &mut Vec<Event>) -> StepPlan {
        let mut lanes = Vec::with_capacity(plan.lanes.len());
        for lane in plan.lanes {
            let Some(active) = &self.slots[lane.slot] else { continue };
            match self.target.memory.prepare(active.seq, lane.n_known, lane.n_known) {
                Ok(()) => lanes.push(lane),
                Err(error) => {
                    let (request, stats) = (active.request, active.stats.clone());
                    events.push(Event::Failed { request, error: RequestError::NoRoom(error), stats });
                    self.retire(lane.slot);
                }
            }
        }
        for lane in lanes.iter_mut().filter(|lane| lane.n_draft > 0) {
            let Some(active) = &self.slots[lane.slot] else { continue };
            if self.target.memory.extend(active.seq, lane.n_draft).is_err() {
                lane.n_draft = 0;
                drafts[lane.slot] = Draft::default();
            }
        }
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

    /// Verifies every lane, commits what is final in both memories, and emits. Returns the slots that are done.
    fn verify_and_commit(
        &mut self,
        plan: &StepPlan,
        drafts: &[Draft],
        events: &mut Vec<Event>,
    ) -> Vec<usize> {
        let mut finished = Vec::new();
        let mut moved = Vec::with_capacity(plan.lanes.len());
        let (mut row, mut output) = (0, 0);
        for lane in &plan.lanes {
            let Some(active) = &mut self.slots[lane.slot] else { continue };
            let first_row = row;
            row += lane.n_known + lane.n_draft;
            let first_position = active.n_computed;
            let mut n_final = lane.n_known;
            let drafted_by = active.drafted_by.take();
            if lane.closes {
                let logits = |i: usize| self.out.output_row(output + i);
                let decided = decide(active, lane, &drafts[lane.slot], logits);
                output += lane.n_draft + 1;
                n_final += decided.n_taken.saturating_sub(1);
                self.counters.count(lane, &decided);
                // An answer that ends inside a draft says nothing about the rest of it.
                if decided.is_over {
                    finished.push(lane.slot);
                } else if let Some(drafter) = drafted_by.filter(|_| lane.n_draft > 0) {
                    let (n_draft, n_accepted) = (lane.n_draft, decided.n_accepted);
                    active.outcome = Some(Outcome { drafter, n_draft, n_accepted });
                }
                events.extend(decided.events);
            } else {
                events.push(Event::Prefill {
                    request: active.request,
                    n_computed: active.n_computed + lane.n_known,
                    n_prompt: active.stats.n_prompt,
                });
            }
            self.target.memory.commit(active.seq, n_final);
            active.n_computed += n_final;
            if follows(active) && !finished.contains(&lane.slot) {
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

    fn retire(&mut self, slot: usize) {
        let Some(active) = self.slots[slot].take() else { return };
        self.target.memory.free(active.seq);
        for drafter in &mut self.drafters {
            drafter.forget(active.seq);
        }
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

/// What drafting costs here, as long as nothing is known.
fn pace(drafters: &[Box<dyn Drafter>], config: &EngineConfig, has_clock: bool) -> Pace {
    let n_draft_max: Vec<usize> =
        drafters.iter().map(|drafter| drafter.n_draft_max().min(config.n_draft_max)).collect();
    Pace::new(&n_draft_max, has_clock)
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
    logits: impl Fn(usize) -> &'a [f32],
) -> Decided {
    let next = active.tokens.len();
    let mut failure = None;
    let sampler = &mut active.sampler;
    let verdict = verify(
        &draft.tokens[..lane.n_draft],
        |i| match sampler.choose((next + i) as u64, logits(i)) {
            Ok(choice) => {
                sampler.accept(choice.token);
                Some((choice.token, choice.logprobs))
            }
            Err(error) => {
                failure = Some(RequestError::Logits { position: next - 1 + i, reason: error.to_string() });
                None
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
