//! Every drafter on real (tiny) models, alone and in company, at any number of slots: each request gets, bit for bit, the
//! tokens and log probabilities that it gets without any, whoever is cancelled beside it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use paceline_backend::{Backend, PlanBuilder, StateConfig, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_engine::{
    CacheConfig, CheckedSnapshot, Engine, EngineConfig, Event, Request, RequestId, Stats, Target, TokenOut,
};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_models::Model;
use paceline_sampling::SamplingParams;
use paceline_spec::{Drafter, LoadDrafter, TapUnion, kind};
use paceline_testkit::{Rng, Seeded, goldens_dir, letters_vocab};

fn converted(name: &str) -> Arc<Gguf> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let target = if name == "dflash-gemma4" { "gemma4" } else { "qwen35" };
    let target_dir = name.starts_with("dflash").then(|| goldens_dir().join(target));
    convert(&ConvertOptions { target_dir, ..ConvertOptions::new(goldens_dir().join(name), &out) }, |_| {})
        .unwrap();
    Arc::new(Gguf::from_bytes(name, std::fs::read(&out).unwrap()).unwrap())
}

/// A target and files of drafters.
struct Pair {
    backend: Arc<dyn Backend>,
    model: Box<dyn Model>,
    target: Arc<Gguf>,
    files: HashMap<&'static str, Arc<Gguf>>,
}

impl Pair {
    fn new(target: &str, files: &[(&'static str, &str)]) -> Pair {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
        let target = converted(target);
        let model = paceline_models::load(&target, &backend).unwrap();
        let files = files.iter().map(|(kind, name)| (*kind, converted(name))).collect();
        Pair { backend, model, target, files }
    }

    fn drafter(&self, name: &str) -> Box<dyn Drafter> {
        let kind = kind(name).unwrap();
        (kind.load)(&LoadDrafter {
            file: self.files.get(kind.name).unwrap_or(&self.target).clone(),
            backend: &self.backend,
            target: &*self.model,
            states: StateConfig::default(),
            n_cell_max: 1 << 14,
            n_draft_max: Some(5),
        })
        .unwrap()
    }

    fn engine(&self, drafters: &[&str], n_slot: usize, plans: bool) -> Engine {
        self.caching(drafters, n_slot, plans, CacheConfig::default())
    }

    fn caching(&self, drafters: &[&str], n_slot: usize, plans: bool, cache: CacheConfig) -> Engine {
        let drafters: Vec<Box<dyn Drafter>> = drafters.iter().map(|name| self.drafter(name)).collect();
        let taps = TapUnion::of(&drafters);
        let mut p = PlanBuilder::new(taps.taps());
        let logits = self.model.record(&mut p);
        let states = self.backend.alloc_states(self.model.states(), StateConfig::default()).unwrap();
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

    fn requests(&self, n: u64, seed: u64) -> Vec<Request> {
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
fn serve(
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
fn check_end(mut engine: Engine) {
    engine.clear_cache();
    let usage = engine.usage();
    assert_eq!((usage.n_page, usage.n_page_resting, usage.bytes + usage.bytes_resting), (0, 0, 0));
    for drafter in engine.drafters() {
        assert_eq!(drafter.state_bytes(), 0, "{} forgot everybody", drafter.name());
    }
}

/// `(drafted, accepted)` of all answers that were not cancelled.
fn check(pair: &Pair, drafters: &[&str], plans: bool) -> (usize, usize) {
    let (mut n_draft, mut n_accepted) = (0, 0);
    for n_slot in [1, 2, 5, 8] {
        let seed = n_slot as u64;
        let _seeded = Seeded::new("drafters on tiny models", seed);
        let requests = pair.requests(12, seed);
        let plain = serve(&mut pair.engine(&[], 1, false), &requests, &[]);
        let mut rng = Rng::new(seed);
        let cancels: Vec<_> =
            (0..3).map(|_| (rng.range(0..30), RequestId(rng.range(0..12) as u64))).collect();
        let mut engine = pair.engine(drafters, n_slot, plans);
        let drafted = serve(&mut engine, &requests, &cancels);
        check_end(engine);
        for (id, (tokens, stats)) in &drafted {
            let want = &plain[id].0;
            let bits = |tokens: &[TokenOut]| -> Vec<_> {
                tokens.iter().map(|t| (t.id, t.logprobs.clone())).collect()
            };
            let n = if cancels.iter().any(|(_, gone)| gone == id) { tokens.len() } else { want.len() };
            assert_eq!(bits(tokens), bits(&want[..n]), "{drafters:?}, {n_slot} slots, {id:?}");
            n_draft += stats.n_draft;
            n_accepted += stats.n_accepted;
            assert!(stats.dropped.is_empty(), "{:?}", stats.dropped);
        }
    }
    (n_draft, n_accepted)
}

#[test]
fn the_targets_own_head() {
    let pair = Pair::new("qwen35-mtp", &[]);
    let (n_draft, n_accepted) = check(&pair, &["draft-mtp"], false);
    assert!(n_draft > 1000 && n_accepted > 0, "{n_accepted} of {n_draft}");
}

#[test]
fn copies_of_the_text() {
    let pair = Pair::new("qwen35", &[]);
    let (n_draft, n_accepted) = check(&pair, &["ngram-simple"], false);
    assert!(n_draft > 20, "{n_accepted} of {n_draft}");
}

/// The target drafts for itself: with the target's noise its guesses are the target's choices, greedy or sampled. The
/// penalties of some requests see what was accepted and not what was guessed, so there a guess may err.
#[test]
fn a_small_model_as_good_as_the_target() {
    for name in ["qwen35-mtp", "llama"] {
        let pair = Pair::new(name, &[("draft", name)]);
        let (n_draft, n_accepted) = check(&pair, &["draft"], false);
        assert!(n_accepted * 10 > n_draft * 9, "{name}: {n_accepted} of {n_draft}");
    }
}

#[test]
fn a_small_model_that_knows_nothing() {
    let pair = Pair::new("qwen35-mtp", &[("draft", "qwen35")]);
    let (n_draft, _) = check(&pair, &["draft"], false);
    assert!(n_draft > 1000);
}

#[test]
fn blocks() {
    let pair = Pair::new("qwen35", &[("dflash", "dflash")]);
    assert!(check(&pair, &["dflash"], false).0 > 1000);
}

#[test]
fn several_at_once() {
    let pair = Pair::new("qwen35", &[("dflash", "dflash")]);
    assert!(check(&pair, &["dflash", "ngram-simple"], false).0 > 1000);
    check(&pair, &["ngram-simple", "dflash"], true);
    let pair = Pair::new("qwen35-mtp", &[("draft", "qwen35-mtp")]);
    let (n_draft, n_accepted) = check(&pair, &["draft-mtp", "ngram-simple", "draft"], false);
    // The one that is right is found.
    assert!(n_accepted * 2 > n_draft, "{n_accepted} of {n_draft}");
    check(&pair, &["draft-mtp", "ngram-simple", "draft"], true);
}

/// Chats that go on, are asked again and are edited: whoever begins with what is cached gets the tokens, the log
/// probabilities and the accept lengths of a cold start; so does who begins with a slot's file in another engine.
#[test]
fn a_cached_prefix_drafts_as_a_cold_start() {
    let files = [("draft", "qwen35-mtp"), ("dflash", "dflash")];
    let (hybrid, dense) = (Pair::new("qwen35-mtp", &files[..1]), Pair::new("llama", &[("draft", "llama")]));
    let dflash = Pair::new("qwen35", &files[1..]);
    let qwen3 = Pair::new("qwen3", &[("draft", "qwen3")]);
    // Layers with a window, shorter than most of these prompts.
    let windowed = Pair::new("gemma4", &[("draft", "gemma4"), ("dflash", "dflash-gemma4")]);
    let lists: [(&Pair, &[&str]); 14] = [
        (&hybrid, &["draft-mtp"]),
        (&hybrid, &["ngram-simple"]),
        (&hybrid, &["draft"]),
        (&hybrid, &["draft-mtp", "ngram-simple", "draft"]),
        (&dense, &["ngram-simple"]),
        (&dense, &["draft"]),
        (&dense, &["draft", "ngram-simple"]),
        (&dflash, &["dflash"]),
        (&dflash, &["dflash", "ngram-simple"]),
        (&qwen3, &["draft"]),
        (&windowed, &[]),
        (&windowed, &["draft"]),
        (&windowed, &["dflash"]),
        (&windowed, &["dflash", "ngram-simple"]),
    ];
    for (i, (pair, drafters)) in lists.into_iter().enumerate() {
        let n_slot = [2, 1, 4, 8][i % 4];
        let new = |cache| pair.caching(drafters, n_slot, false, cache);
        let cold = |request: &Request| {
            serve(&mut new(CacheConfig::OFF), std::slice::from_ref(request), &[]).remove(&request.id).unwrap()
        };
        let check = |got: (Vec<TokenOut>, Stats), request: &Request| {
            let (tokens, stats) = cold(request);
            let bits = |tokens: &[TokenOut]| -> Vec<_> {
                tokens.iter().map(|t| (t.id, t.logprobs.clone())).collect()
            };
            assert_eq!(bits(&got.0), bits(&tokens), "{drafters:?}, {:?}", request.id);
            if drafters.len() > 1 {
                // Who is asked depends on how drafters did before, in other requests too.
                return;
            }
            assert_eq!(Stats { n_cached: 0, ..got.1 }, stats, "{drafters:?}, {:?}", request.id);
        };
        let (mut warm, mut n_cached) = (new(CacheConfig { n_step: 16, ..CacheConfig::default() }), 0);
        let mut rng = Rng::new(11);
        for first in pair.requests(6, 5) {
            let mut request = Request { n_predict: Some(20), ..first };
            for _ in 0..4 {
                let got = serve(&mut warm, std::slice::from_ref(&request), &[]).remove(&request.id).unwrap();
                n_cached += usize::from(got.1.n_cached > 0);
                let answer: Vec<u32> = got.0.iter().map(|t| t.id).collect();
                check(got, &request);
                match rng.range(0..3) {
                    // Asked again.
                    0 => {}
                    // Its last words changed.
                    1 => *request.prompt.last_mut().unwrap() = 3,
                    // The next turn.
                    _ => {
                        request.prompt = [&request.prompt[..], &answer, &[5, 6, 7]].concat();
                        request.turns = vec![request.prompt.len() - 3];
                    }
                }
            }
            let saved = (0..n_slot).find_map(|slot| warm.save(slot).ok()).unwrap();
            let mut other = new(CacheConfig::default());
            let restored = other.restore(0, &CheckedSnapshot::new(saved.bytes.clone()).unwrap()).unwrap();
            assert!(restored.serves_drafts, "{drafters:?}");
            assert_eq!(other.save(0).unwrap(), saved, "nothing is lost on the way");
            // Another seed, so another answer.
            request.sampling.seed += 1;
            let got = serve(&mut other, std::slice::from_ref(&request), &[]).remove(&request.id).unwrap();
            check(got, &request);
            check_end(other);
        }
        assert!(n_cached > 8, "{drafters:?}: {n_cached} of 24 began with something cached");
        check_end(warm);
    }
}
