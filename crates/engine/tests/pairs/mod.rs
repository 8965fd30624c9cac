//! Tiny targets and their drafters, engines over them, and what these answer.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{collections::HashMap, sync::Arc, time::Duration};

use paceline_backend::{Backend, PlanBuilder, StateConfig, States, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_engine::{
    CacheConfig, Engine, EngineConfig, Event, Request, RequestId, Stats, Target, TokenOut,
};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_models::Model;
use paceline_sampling::{SamplingParams, TokenLogprobs};
use paceline_spec::{Drafter, LoadDrafter, TapUnion, kind};
use paceline_testkit::{Rng, goldens_dir, letters_vocab};

/// A golden checkpoint as the converter writes it; drafters are checked against their targets.
fn converted(name: &str) -> Arc<Gguf> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let target = match name {
        "dflash-gemma4" | "dflash2-gemma4" => Some("gemma4"),
        _ => name.starts_with("dflash").then_some("qwen35"),
    };
    let target_dir = target.map(|target| goldens_dir().join(target));
    convert(&ConvertOptions { target_dir, ..ConvertOptions::new(goldens_dir().join(name), &out) }, |_| {})
        .unwrap();
    Arc::new(Gguf::from_bytes(name, std::fs::read(&out).unwrap()).unwrap())
}

/// A target and files of drafters.
pub struct Pair {
    pub backend: Arc<dyn Backend>,
    pub model: Box<dyn Model>,
    pub target: Arc<Gguf>,
    /// By the name that a drafter is asked for by.
    pub files: HashMap<&'static str, Arc<Gguf>>,
}

impl Pair {
    pub fn new(target: &str, files: &[(&'static str, &str)]) -> Pair {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
        let target = converted(target);
        let model = paceline_models::load(&target, &backend).unwrap();
        let files = files.iter().map(|(kind, name)| (*kind, converted(name))).collect();
        Pair { backend, model, target, files }
    }

    /// The name is one of a kind, and may be an alias.
    pub fn drafter(&self, name: &str, target_states: &Arc<dyn States>) -> Box<dyn Drafter> {
        let kind = kind(name).unwrap();
        (kind.load)(&LoadDrafter {
            file: self.files.get(name).unwrap_or(&self.target).clone(),
            backend: &self.backend,
            target: &*self.model,
            target_states,
            states: StateConfig::default(),
            n_cell_max: 1 << 14,
            n_draft_max: Some(5),
        })
        .unwrap()
    }

    pub fn engine(&self, drafters: &[&str], n_slot: usize, plans: bool) -> Engine {
        self.caching(drafters, n_slot, plans, CacheConfig::default())
    }

    pub fn caching(&self, drafters: &[&str], n_slot: usize, plans: bool, cache: CacheConfig) -> Engine {
        let states = self.backend.alloc_states(self.model.states(), StateConfig::default()).unwrap();
        let drafters: Vec<Box<dyn Drafter>> =
            drafters.iter().map(|name| self.drafter(name, &states)).collect();
        let taps = TapUnion::of(&drafters);
        let mut p = PlanBuilder::new(taps.taps());
        let logits = self.model.record(&mut p);
        let exec = self.backend.compile(Arc::new(p.finish(Some(logits))), &states).unwrap();
        let n_vocab = self.model.hparams().n_vocab;
        let target = Target { exec, memory: Memory::new(states, 1 << 14), n_vocab };
        let config = EngineConfig {
            n_slot,
            n_ctx: 256,
            n_ubatch: 24,
            n_draft_max: 5,
            cache,
            check_memory: true,
            ..EngineConfig::default()
        };
        let engine = Engine::new(target, drafters, letters_vocab(n_vocab), config);
        if !plans {
            return engine;
        }
        // Any clock will do: what it says changes how much is drafted and nothing else.
        let start = std::time::Instant::now();
        engine
            .with_clock(Box::new(move || Duration::from_micros(start.elapsed().as_micros() as u64)))
            .with_planner()
    }

    pub fn requests(&self, n: u64, seed: u64) -> Vec<Request> {
        let mut rng = Rng::new(seed);
        let n_vocab = self.model.hparams().n_vocab;
        let request = |id| {
            // Some text that repeats itself, for those that copy.
            let phrase: Vec<u32> = (0..rng.range(1..12)).map(|_| rng.range(0..n_vocab) as u32).collect();
            let n_prompt = rng.range(1..60);
            let prompt = phrase.iter().copied().cycle().take(n_prompt).collect();
            let temperature = *rng.pick(&[0.0, 0.7]);
            let sampling = SamplingParams {
                temperature,
                seed: rng.bits(),
                n_probs: 2,
                repeat_penalty: *rng.pick(&[1.0, 1.1]),
                ..SamplingParams::default()
            };
            let n_predict = Some(rng.range(1..40));
            Request { sampling, n_predict, ignore_eos: true, ..Request::new(RequestId(id), prompt) }
        };
        (0..n).map(request).collect()
    }
}

/// Serves all, cancelling some; tokens and figures of each.
pub fn serve(
    engine: &mut Engine,
    requests: &[Request],
    cancels: &[(usize, RequestId)],
) -> HashMap<RequestId, (Vec<TokenOut>, Stats)> {
    let mut answers: HashMap<RequestId, (Vec<TokenOut>, Stats)> = HashMap::new();
    let (mut events, mut n_step) = (Vec::new(), 0);
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    while engine.has_work() {
        for (_, id) in cancels.iter().filter(|(step, _)| *step == n_step) {
            engine.cancel(*id);
        }
        engine.step(&mut events);
        n_step += 1;
        for event in events.drain(..) {
            match event {
                Event::Tokens { request, tokens, .. } => {
                    answers.entry(request).or_default().0.extend(tokens);
                }
                Event::Done { request, stats, .. } => answers.entry(request).or_default().1 = stats,
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
    }
    assert_eq!(engine.usage().n_page, 0);
    answers
}

/// Nothing is left of anybody.
pub fn check_end(mut engine: Engine) {
    engine.clear_cache();
    let usage = engine.usage();
    assert_eq!((usage.n_page, usage.n_page_resting, usage.bytes + usage.bytes_resting), (0, 0, 0));
    for drafter in engine.drafters() {
        assert_eq!(drafter.state_bytes(), 0, "{} forgot everybody", drafter.name());
    }
}

/// What may depend on nothing but the request.
pub fn bits(tokens: &[TokenOut]) -> Vec<(u32, Option<TokenLogprobs>)> {
    tokens.iter().map(|t| (t.id, t.logprobs.clone())).collect()
}
