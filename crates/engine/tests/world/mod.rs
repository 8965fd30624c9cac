//! An engine over the hash model, its requests, and the check that every one of them got what it gets alone.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod shelf;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use paceline_backend::{Exec, StateConfig, Step as Forward, StepOut, Tap};
use paceline_engine::{
    CacheConfig, Engine, EngineConfig, Event, Finish, Request, RequestError, RequestId, Shelf,
    SpeculationNote, Stats, Step, SubmitError, TokenOut,
};
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, SeqId};
use paceline_testkit::{
    Answer, End, HashKind, HashModel, HashStates, Log, Recorder, Token, alone, letters_vocab, tiny_vocab,
};
use paceline_text::Vocab;

/// What the engine said about one request.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub slot: Option<usize>,
    pub n_cached: usize,
    pub n_prefill: usize,
    pub tokens: Vec<TokenOut>,
    pub text: String,
    pub end: Option<Result<Finish, RequestError>>,
    pub stats: Stats,
    /// Cancelled with this many tokens told.
    pub cancelled: Option<usize>,
}

impl Told {
    pub fn ids(&self) -> Vec<Token> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    pub fn is_over(&self) -> bool {
        self.end.is_some() || self.cancelled.is_some()
    }
}

/// Sizes of a world.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub n_slot: usize,
    pub n_ctx: usize,
    pub n_ubatch: usize,
    pub n_draft_max: usize,
    pub page_len: usize,
    pub n_cell_max: usize,
    pub cache: CacheConfig,
}

impl Sizes {
    pub const ROOMY: Sizes = Sizes {
        n_slot: 2,
        n_ctx: 256,
        n_ubatch: 32,
        n_draft_max: 15,
        page_len: 16,
        n_cell_max: 1 << 20,
        cache: CacheConfig { n_byte_max: usize::MAX, n_step: 24, n_step_max: 32, keeps_finished: true },
    };

    /// The same without a prompt cache.
    pub const COLD: Sizes = Sizes { cache: CacheConfig::OFF, ..Sizes::ROOMY };

    /// The context that a request can have.
    pub fn n_ctx_of(&self, model: &HashModel) -> usize {
        let n_cell = self.n_cell_max.next_multiple_of(self.page_len);
        if model.kind == HashKind::Recurrent { self.n_ctx } else { self.n_ctx.min(n_cell) }
    }
}

/// A drafter under the eyes of a [`Recorder`].
pub fn watched<D: Drafter + 'static>(model: &HashModel, drafter: D) -> (Box<dyn Drafter>, Log) {
    let (recorder, log) = Recorder::new(model.clone(), drafter);
    (Box::new(recorder), log)
}

/// What things cost on a clock that nothing else moves, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Prices {
    pub forward: u64,
    pub row: u64,
    pub draft: u64,
}

struct Priced {
    inner: Box<dyn Exec>,
    time: Arc<AtomicU64>,
    prices: Prices,
}

impl Exec for Priced {
    fn run(&mut self, step: &Forward<'_>, out: &mut StepOut) {
        let cost = self.prices.forward + self.prices.row * step.n_rows() as u64;
        self.time.fetch_add(cost, Ordering::Relaxed);
        self.inner.run(step, out);
    }
}

struct PricedDrafter {
    inner: Box<dyn Drafter>,
    time: Arc<AtomicU64>,
    prices: Prices,
}

impl Drafter for PricedDrafter {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn contract(&self) -> String {
        self.inner.contract()
    }
    fn taps(&self) -> &[Tap] {
        self.inner.taps()
    }
    fn n_draft_max(&self) -> usize {
        self.inner.n_draft_max()
    }
    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        self.time.fetch_add(self.prices.draft, Ordering::Relaxed);
        self.inner.draft(requests)
    }
    fn commit(&mut self, kept: &[Kept<'_>]) {
        self.inner.commit(kept);
    }
    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        self.inner.fork(from, to, len)
    }
    fn forks_anywhere(&self, len: usize) -> bool {
        self.inner.forks_anywhere(len)
    }
    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        self.inner.export(seq)
    }
    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        self.inner.import(seq, len, bytes)
    }
    fn forget(&mut self, seq: SeqId) {
        self.inner.forget(seq);
    }
    fn state_bytes(&self) -> usize {
        self.inner.state_bytes()
    }
    fn resting_bytes(&self) -> usize {
        self.inner.resting_bytes()
    }
}

/// An engine, and everything that was asked of it and told by it.
pub struct World {
    pub model: HashModel,
    pub engine: Engine,
    pub states: Arc<HashStates>,
    pub logs: Vec<Log>,
    pub requests: HashMap<RequestId, Request>,
    pub told: HashMap<RequestId, Told>,
    pub n_step: usize,
    vocab: Arc<Vocab>,
    sizes: Sizes,
    events: Vec<Event>,
}

impl World {
    /// An engine for `model`, its drafter under the eyes of a [`Recorder`].
    pub fn new<D: Drafter + 'static>(model: HashModel, drafter: Option<D>, sizes: Sizes) -> World {
        let drafters = drafter.map(|drafter| watched(&model, drafter));
        World::several(model, drafters.into_iter().collect(), sizes, None)
    }

    /// One with any number of drafters that are [`watched`], and with a planner if steps have prices.
    pub fn several(
        model: HashModel,
        drafters: Vec<(Box<dyn Drafter>, Log)>,
        sizes: Sizes,
        prices: Option<Prices>,
    ) -> World {
        let vocab = match model.n_vocab == tiny_vocab().len() {
            true => tiny_vocab(),
            false => letters_vocab(model.n_vocab),
        };
        let config = StateConfig { page_len: sizes.page_len, n_tentative_max: 15, ..StateConfig::default() };
        let (mut target, states) = model.target(config, sizes.n_cell_max);
        let (mut drafters, logs): (Vec<Box<dyn Drafter>>, Vec<Log>) = drafters.into_iter().unzip();
        let time = Arc::new(AtomicU64::new(0));
        if let Some(prices) = prices {
            target.exec = Box::new(Priced { inner: target.exec, time: time.clone(), prices });
            let priced =
                |inner| Box::new(PricedDrafter { inner, time: time.clone(), prices }) as Box<dyn Drafter>;
            drafters = drafters.into_iter().map(priced).collect();
        }
        let config = EngineConfig {
            n_slot: sizes.n_slot,
            n_ctx: sizes.n_ctx,
            n_ubatch: sizes.n_ubatch,
            n_draft_max: sizes.n_draft_max,
            n_queue_max: 1000,
            cache: sizes.cache,
            check_memory: true,
            ..EngineConfig::default()
        };
        let mut engine = Engine::new(target, drafters, vocab.clone(), config);
        if prices.is_some() {
            let clock = move || Duration::from_micros(time.load(Ordering::Relaxed));
            engine = engine.with_clock(Box::new(clock)).with_planner();
        }
        World {
            engine,
            model,
            states,
            logs,
            requests: HashMap::new(),
            told: HashMap::new(),
            n_step: 0,
            vocab,
            sizes,
            events: Vec::new(),
        }
    }

    /// With a shelf behind its cache.
    pub fn with_shelf(self, shelf: Box<dyn Shelf>, n_byte_max: u64) -> World {
        World { engine: self.engine.with_shelf(shelf, n_byte_max), ..self }
    }

    pub fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        self.engine.submit(request.clone())?;
        self.told.insert(request.id, Told::default());
        let old = self.requests.insert(request.id, request);
        assert!(old.is_none(), "request ids are used once");
        Ok(())
    }

    pub fn cancel(&mut self, id: RequestId) {
        let told = self.told.get_mut(&id).expect("a submitted request");
        assert_eq!(self.engine.cancel(id), !told.is_over(), "{id:?} is known until it is over");
        if !told.is_over() {
            told.cancelled = Some(told.tokens.len());
        }
    }

    pub fn step(&mut self) -> Step {
        let mut events = std::mem::take(&mut self.events);
        let step = self.engine.step(&mut events);
        let n_event = events.len();
        for event in events.drain(..) {
            self.hear(event);
        }
        self.events = events;
        let waits = self.engine.has_chores();
        assert!(
            step != Step::Idle || n_event > 0 || waits || !self.engine.has_work(),
            "an idle step with work to do"
        );
        self.n_step += 1;
        assert!(self.n_step < 100_000, "the engine does not come to an end");
        step
    }

    pub fn run(&mut self) {
        while self.engine.has_work() {
            self.step();
        }
        assert_eq!(self.step(), Step::Idle);
        self.rest();
    }

    /// Until nothing is on its way to the shelf or from it.
    pub fn rest(&mut self) {
        while self.engine.has_chores() {
            self.step();
        }
    }

    fn hear(&mut self, event: Event) {
        let id = match &event {
            Event::Started { request, .. }
            | Event::Prefill { request, .. }
            | Event::Tokens { request, .. }
            | Event::Done { request, .. }
            | Event::Failed { request, .. } => *request,
        };
        let told = self.told.get_mut(&id).expect("a submitted request");
        assert!(!told.is_over(), "{id:?} is over, and then: {event:?}");
        assert_eq!(told.slot.is_none(), matches!(event, Event::Started { .. }), "{id:?} starts once, first");
        match event {
            Event::Started { slot, n_cached, .. } => {
                assert!(n_cached < self.requests[&id].prompt.len(), "a token is left to compute");
                (told.slot, told.n_cached, told.n_prefill) = (Some(slot), n_cached, n_cached);
            }
            Event::Prefill { n_computed, n_prompt, .. } => {
                assert!(told.tokens.is_empty(), "{id:?} computes its prompt after its first token");
                assert!(n_computed > told.n_prefill && n_computed < n_prompt, "{n_computed} of {n_prompt}");
                told.n_prefill = n_computed;
            }
            Event::Tokens { text, tokens, .. } => {
                assert!(!tokens.is_empty(), "an event without tokens");
                told.text += &text;
                told.tokens.extend(tokens);
            }
            Event::Done { text, finish, stats, .. } => {
                told.text += &text;
                told.end = Some(Ok(finish));
                told.stats = stats;
            }
            Event::Failed { error, stats, .. } => {
                told.end = Some(Err(error));
                told.stats = stats;
            }
        }
    }

    /// What the request gets alone.
    pub fn alone(&self, id: RequestId) -> Answer {
        alone(&self.model, &self.vocab, &self.requests[&id], self.sizes.n_ctx_of(&self.model))
    }

    /// Every request got what it gets alone, and nothing is left, but for what is cached, which fits and can be dropped.
    pub fn check(&mut self) {
        self.rest();
        for (&id, told) in &self.told {
            self.check_one(id, told);
        }
        let usage = self.engine.usage();
        assert_eq!((usage.n_seq, usage.n_page, usage.bytes), (0, 0, 0), "nothing stays in use");
        let cached = self.engine.cache_usage();
        assert_eq!(usage.n_resting, cached.n_snapshot, "what rests is a snapshot");
        assert!(cached.bytes <= self.sizes.cache.n_byte_max, "{cached:?}");
        if let Some(shelf) = cached.shelf {
            assert!(shelf.bytes <= shelf.n_byte_max && shelf.n_leaving == 0, "{shelf:?}");
        }
        self.engine.clear_cache();
        let usage = self.engine.usage();
        assert_eq!((usage.n_resting, usage.n_page_resting, usage.bytes_resting), (0, 0, 0), "all is dropped");
        assert_eq!(self.states.n_saved(), 0, "no saved state stays behind");
        let traffic = self.states.traffic();
        assert_eq!((self.states.n_page(), traffic.n_alloc), (0, traffic.n_release), "no page stays behind");
        for (log, drafter) in self.logs.iter().zip(self.engine.drafters()) {
            assert_eq!((log.n_live(), drafter.state_bytes()), (0, 0), "the drafter forgot everybody");
        }
    }

    fn check_one(&self, id: RequestId, told: &Told) {
        let alone = self.alone(id);
        let ids = told.ids();
        let request = &self.requests[&id];
        let wanted = request.slot.is_none() || told.slot.is_none() || told.slot == request.slot;
        assert!(wanted, "{id:?} wants slot {:?} and is in {:?}", request.slot, told.slot);
        match (&told.end, &told.cancelled) {
            (Some(Ok(finish)), None) => {
                assert_eq!(ids, alone.tokens, "{id:?}: tokens");
                assert_eq!(told.text, alone.text, "{id:?}: text");
                assert_eq!(End::Finish(finish.clone()), alone.end, "{id:?}: reason");
                self.check_stats(id, told);
            }
            (Some(Err(RequestError::Logits { position, .. })), None) => {
                assert_eq!((End::BadLogits(*position), &ids), (alone.end, &alone.tokens), "{id:?}");
                assert!(alone.text.starts_with(&told.text), "{id:?}: {:?}", told.text);
            }
            (None, Some(n_tokens)) => {
                assert_eq!(ids.len(), *n_tokens, "{id:?}: tokens after a cancel");
                assert!(
                    alone.tokens.starts_with(&ids) && alone.text.starts_with(&told.text),
                    "{id:?}: {ids:?}"
                );
            }
            other => panic!("{id:?} ends with {other:?}"),
        }
        for (i, token) in told.tokens.iter().enumerate() {
            assert_eq!(token.logprobs, alone.logprobs[i], "{id:?}: log probabilities of token {i}");
            assert!(!token.drafted || request.n_draft_max != Some(0), "{id:?} drafts though it asked not to");
        }
    }

    fn check_stats(&self, id: RequestId, told: &Told) {
        let (stats, request) = (&told.stats, &self.requests[&id]);
        let n_accepted = told.tokens.iter().filter(|t| t.drafted).count();
        assert_eq!((stats.n_prompt, stats.n_predicted), (request.prompt.len(), told.tokens.len()), "{id:?}");
        assert_eq!(
            (stats.n_cached, request.cache_prompt || told.n_cached == 0),
            (told.n_cached, true),
            "{id:?}"
        );
        assert_eq!((stats.n_accepted, n_accepted <= stats.n_draft), (n_accepted, true), "{id:?}");
        let (drafted, accepted) =
            stats.by_position.iter().fold((0, 0), |(d, a), (drafted, accepted)| (d + drafted, a + accepted));
        assert_eq!((drafted, accepted), (stats.n_draft, stats.n_accepted), "{id:?}: by position");
        let is_off = request.n_draft_max == Some(0) || self.sizes.n_draft_max == 0;
        let plain = self.logs.is_empty() || is_off;
        assert!(!plain || (stats.n_draft == 0 && stats.n_verify == told.tokens.len()), "{id:?}: {stats:?}");
        let note = match (&stats.speculation, !self.logs.is_empty(), is_off) {
            (SpeculationNote::NoDrafter, has_drafter, _) => !has_drafter,
            (SpeculationNote::OffByRequest, has_drafter, is_off) => has_drafter && is_off,
            (_, has_drafter, is_off) => has_drafter && !is_off,
        };
        assert!(note, "{id:?}: {:?}", stats.speculation);
    }
}
