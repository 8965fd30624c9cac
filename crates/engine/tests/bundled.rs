//! The bundled pair against its training-time reference: PyTorch ran the same weights, unquantised, without caches.
//! One error in a tap, a mask, a position or a converted tensor would cost far more acceptance than 8-bit weights do.

use std::sync::Arc;

use paceline_backend::{Backend, NUMERICS, PlanBuilder, StateConfig, cpu::CpuBackend};
use paceline_engine::{CacheConfig, Engine, EngineConfig, Event, Request, RequestId, Stats, Target, digest};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_sampling::TokenLogprobs;
use paceline_spec::LoadDrafter;
use paceline_text::Vocab;
use serde_json::Value;

fn open(name: &str) -> Arc<Gguf> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    Arc::new(Gguf::open(root.join("models/bundled").join(name)).unwrap())
}

fn engine(n_slot: usize, cache: CacheConfig) -> Engine {
    let (target, drafter) = (open("target.gguf"), open("drafter.gguf"));
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(2).unwrap());
    let model = paceline_models::load(&target, &backend).unwrap();
    let config = StateConfig::default();
    let states = backend.alloc_states(model.states(), config).unwrap();
    let request = LoadDrafter {
        file: drafter,
        backend: &backend,
        target: &*model,
        target_states: &states,
        states: config,
        n_cell_max: 1 << 16,
        n_draft_max: None,
    };
    let drafter = paceline_spec::load(&request).unwrap();
    let mut p = PlanBuilder::new(drafter.taps());
    let logits = model.record(&mut p);
    let plan = Arc::new(p.finish(Some(logits)));
    let exec = backend.compile(plan, &states).unwrap();
    let vocab = Arc::new(Vocab::from_metadata(target.metadata()).unwrap());
    let target = Target { exec, memory: Memory::new(states, 1 << 16), n_vocab: model.hparams().n_vocab };
    let config = EngineConfig { n_slot, n_ctx: 1024, cache, check_memory: true, ..EngineConfig::default() };
    Engine::new(target, Some(drafter), vocab, config)
}

struct Reference {
    n_prompt: usize,
    tokens: Vec<u32>,
    accepted: Vec<usize>,
}

fn references() -> Vec<Reference> {
    let path = paceline_testkit::goldens_dir().join("bundled.json");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let numbers =
        |v: &Value| -> Vec<u64> { v.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect() };
    json.as_array()
        .unwrap()
        .iter()
        .map(|r| Reference {
            n_prompt: r["n_prompt"].as_u64().unwrap() as usize,
            tokens: numbers(&r["tokens"]).into_iter().map(|t| t as u32).collect(),
            accepted: numbers(&r["accepted"]).into_iter().map(|n| n as usize).collect(),
        })
        .collect()
}

/// Tokens and (verifies, tokens gained) of every reference prompt, all served by one engine.
fn answers(n_slot: usize, references: &[Reference]) -> Vec<(Vec<u32>, usize, usize)> {
    let request = |r: &Reference| {
        let mut request = Request::new(RequestId(0), r.tokens[..r.n_prompt].to_vec());
        request.sampling.temperature = 0.0;
        request.n_predict = Some(r.tokens.len() - r.n_prompt);
        request
    };
    let mut engine = engine(n_slot, CacheConfig::OFF);
    let answers = ask(&mut engine, references.iter().map(request).collect());
    answers
        .into_iter()
        .map(|answer| (answer.tokens, answer.stats.n_verify, answer.stats.n_predicted))
        .collect()
}

/// A finished answer.
#[derive(Clone, Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<Option<TokenLogprobs>>,
    stats: Stats,
}

impl Answer {
    /// What must not depend on what was asked before: tokens, log probabilities, accept lengths.
    fn essence(mut self) -> Answer {
        self.stats.n_cached = 0;
        self
    }
}

impl PartialEq for Answer {
    fn eq(&self, other: &Answer) -> bool {
        (&self.tokens, &self.logprobs, &self.stats) == (&other.tokens, &other.logprobs, &other.stats)
    }
}

/// The answers to requests that are all submitted at once.
fn ask(engine: &mut Engine, requests: Vec<Request>) -> Vec<Answer> {
    let mut answers = vec![Answer::default(); requests.len()];
    for (i, request) in requests.into_iter().enumerate() {
        engine.submit(Request { id: RequestId(i as u64), ..request }).unwrap();
    }
    let mut events = Vec::new();
    while engine.has_work() {
        engine.step(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Tokens { request, tokens, .. } => {
                    let answer = &mut answers[request.0 as usize];
                    answer.tokens.extend(tokens.iter().map(|t| t.id));
                    answer.logprobs.extend(tokens.into_iter().map(|t| t.logprobs));
                }
                Event::Done { request, stats, .. } => answers[request.0 as usize].stats = stats,
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
    }
    assert_eq!(engine.usage().n_page, 0);
    answers
}

/// Chats as clients send them: the same again, the last message edited, shorter, longer, with the answer and another
/// question behind it. Each is what it is in an engine that has seen nothing, and a part of most is not computed again.
#[test]
fn restored_is_fresh() {
    let references = references();
    let prompt = |i: usize| {
        references[i % references.len()].tokens[..references[i % references.len()].n_prompt].to_vec()
    };
    let turn = |past: &[u32], more: &[u32]| {
        let mut request = Request::new(RequestId(0), [past, more].concat());
        request.sampling.temperature = if past.len().is_multiple_of(2) { 0.0 } else { 0.8 };
        request.sampling.n_probs = 3;
        request.n_predict = Some(24);
        request.ignore_eos = true;
        request.turns = vec![past.len()];
        request
    };
    for n_slot in [1, 2, 4, 8] {
        let mut warm = engine(n_slot, CacheConfig { n_step: 40, ..CacheConfig::default() });
        let mut rounds: Vec<Vec<Request>> = Vec::new();
        // Five times the same, in a row and side by side.
        rounds.extend((0..3).map(|_| vec![turn(&[], &prompt(0))]));
        rounds.push(vec![turn(&[], &prompt(0)), turn(&[], &prompt(0))]);
        // A long past, and last messages that differ, each shorter than the one before.
        let past: Vec<u32> = (0..8).flat_map(prompt).collect();
        rounds.extend((0..3).map(|i| vec![turn(&past, &prompt(i)[..prompt(i).len() - i])]));
        rounds.push((0..4).map(|i| turn(&past[..past.len() - 3 * i], &prompt(i))).collect());
        let (mut n_cached, mut n_prompt) = (0, 0);
        let mut last: Option<Request> = None;
        for i in 0..rounds.len() + 3 {
            let round = match rounds.get(i) {
                Some(round) => round.clone(),
                // The next turn: with the answer, a question behind it, and the drafter off in the end.
                None => {
                    let before = last.take().unwrap();
                    let answer = ask(&mut engine(1, CacheConfig::OFF), vec![before.clone()]).remove(0);
                    let past = [&before.prompt[..], &answer.tokens[..]].concat();
                    let n_draft_max = (i + 1 == rounds.len() + 3).then_some(0);
                    vec![Request { n_draft_max, ..turn(&past, &prompt(i)) }]
                }
            };
            last = round.first().cloned();
            let got = ask(&mut warm, round.clone());
            for (got, request) in got.into_iter().zip(round) {
                n_cached += got.stats.n_cached;
                n_prompt += got.stats.n_prompt;
                let want = ask(&mut engine(1, CacheConfig::OFF), vec![request]).remove(0);
                assert!(got.clone().essence() == want, "{n_slot} slots, round {i}: {got:?} is not {want:?}");
            }
        }
        assert!(n_cached * 2 > n_prompt, "{n_slot} slots: {n_cached} of {n_prompt} tokens were cached");
        let cached = warm.cache_usage();
        assert!(cached.n_snapshot > 0 && cached.bytes > 0, "{cached:?}");
        warm.clear_cache();
        let usage = warm.usage();
        assert_eq!((usage.n_page, usage.n_page_resting, usage.bytes + usage.bytes_resting), (0, 0, 0));
        assert_eq!(warm.drafters()[0].state_bytes(), 0);
    }
}

/// Digests of all that the bundled pair leaves in memory behind a long prompt, by the number that a build gives to its bits
/// and the kernels that it ran on.
const BITS: &[(u32, &str, u64)] = &[
    (1, "avx512", 0x1495_98d6_61c5_9639),
    (1, "avx2", 0xffd6_3590_181e_d6ce),
    (1, "scalar", 0xb4a2_99ef_5663_f1e6),
    (2, "avx512", 0xdc89_08db_b53c_8594),
    (2, "avx2", 0x91ff_53f1_116c_2746),
    (2, "scalar", 0x8824_4673_c2ce_b5c1),
];

/// Files of snapshots are taken up by every build with the same [`NUMERICS`]. Whoever changes what is computed has to raise
/// it, and to write down here what goes with the new number.
#[test]
fn bits_go_with_their_number() {
    let backend = CpuBackend::new(2).unwrap().describe();
    let isa = backend.split(' ').nth(1).unwrap();
    let prompt: Vec<u32> =
        references().iter().flat_map(|r| r.tokens[..r.n_prompt].to_vec()).cycle().take(900).collect();
    let mut engine = engine(1, CacheConfig::default());
    let request = Request { n_predict: Some(1), ignore_eos: true, ..Request::new(RequestId(0), prompt) };
    ask(&mut engine, vec![request]);
    let found = digest(&engine.save(0).unwrap().bytes);
    let known = BITS.iter().find(|(number, name, _)| *number == NUMERICS && *name == isa);
    let Some((_, _, expected)) = known else {
        return println!("nothing is known of {isa} kernels with NUMERICS {NUMERICS}: found {found:#018x}");
    };
    assert_eq!(
        *expected, found,
        "{backend}: other bits than before ({expected:#018x} -> {found:#018x}): raise paceline_backend::NUMERICS, unless \
         only the format of files has changed, and write the digests of all kernel sets (PACELINE_ISA) down here"
    );
}

#[test]
fn greedy_answers_and_acceptance_are_the_references() {
    let references = references();
    let answers = answers(1, &references);
    let mut n_same = 0;
    for (i, ((tokens, verifies, _), r)) in answers.iter().zip(&references).enumerate() {
        if tokens != &r.tokens[r.n_prompt..] {
            continue;
        }
        n_same += 1;
        // The first verify is the prompt's, which the reference does not count; 8-bit weights move a round here
        // or there.
        let (got, want) = (verifies - 1, r.accepted.len());
        assert!(got.abs_diff(want) <= 1 + want / 10, "answer {i} took {got} rounds, the reference {want}");
    }
    // Quantised weights flip a near tie now and then, and the rest of that answer is another text.
    assert!(n_same >= 4, "only {n_same} of {} answers are the reference's", references.len());
}

#[test]
fn crowds_get_the_answers_of_one() {
    let references = references();
    let alone = answers(1, &references);
    for n_slot in [2, 3, 8] {
        assert_eq!(answers(n_slot, &references), alone, "{n_slot} slots");
    }
}
