//! Golden targets and drafters that read them: which rows share a forward, which experts a row goes to, whose keys a layer reads,
//! and what was guessed in between leaves no trace in the text.

use std::{collections::HashMap, sync::Arc};

use paceline_backend::{Backend, PlanBuilder, StateConfig, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_engine::{Engine, EngineConfig, Event, Request, RequestId, Target};
use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use paceline_memory::{Memory, SeqId};
use paceline_models::Model;
use paceline_sampling::SamplingParams;
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, LoadDrafter};
use paceline_testkit::{Rng, Token, goldens_dir};
use paceline_text::Vocab;

const N_PREDICT: usize = 40;

fn converted(name: &str) -> Arc<Gguf> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    convert(&ConvertOptions::new(goldens_dir().join(name), &out), |_| {}).unwrap();
    Arc::new(Gguf::from_bytes(&format!("{name}.gguf"), std::fs::read(out).unwrap()).unwrap())
}

/// The golden drafter with random weights of the size of this target, tapped behind `taps`.
fn random_drafter(target: &dyn Model, taps: &[i32]) -> Arc<Gguf> {
    let (n_embd, n_vocab) = (target.hparams().n_embd as u64, target.hparams().n_vocab);
    let golden = converted("dflash");
    let mut metadata = Metadata::for_file("drafter.gguf");
    for (key, value) in golden.metadata().iter().filter(|(key, _)| !key.starts_with("tokenizer.ggml.tokens"))
    {
        metadata.insert(key, value.clone());
    }
    metadata.insert("dflash.embedding_length", n_embd as u32);
    metadata.insert("dflash.target_hidden_size", n_embd as u32);
    metadata.insert("dflash.vocab_size", n_vocab as u32);
    // Counted from 1 in the file.
    metadata.insert("dflash.target_layers", taps.iter().map(|tap| tap + 1).collect::<Vec<i32>>());
    let mut rng = Rng::new(5);
    let mut tensors = Vec::new();
    for tensor in golden.tensors() {
        let resized = |n: &u64| match n {
            40 => n_embd,
            120 => taps.len() as u64 * n_embd,
            n => *n,
        };
        let shape: Vec<u64> = tensor.shape.iter().map(resized).collect();
        let size = if shape.len() == 1 { 0.3 } else { (3.0 / shape[0] as f64).sqrt() };
        let middle = if shape.len() == 1 { 1.0 } else { 0.0 };
        let values =
            (0..shape.iter().product()).map(|_| middle + size * (rng.range(0..2001) as f64 / 1000.0 - 1.0));
        let data: Vec<u8> = values.flat_map(|x| (x as f32).to_le_bytes()).collect();
        tensors.push((tensor.name.clone(), shape, GgmlType::F32, data));
    }
    Arc::new(Gguf::from_bytes("drafter.gguf", to_bytes(&metadata, &tensors).unwrap()).unwrap())
}

/// Who drafts.
#[derive(Clone, Copy)]
enum Drafts {
    /// A random DFlash drafter, tapped behind these layers.
    Dflash(&'static [i32]),
    /// The golden assistant of this name.
    Assistant(&'static str),
}

/// A drafter that somebody whispers to: the first tokens of a draft become those of the plain answer, as many as the
/// position says. Alone it would never be right; so drafts are kept in parts, in full and not at all.
struct Helped {
    inner: Box<dyn Drafter>,
    /// Prompts with their plain answers.
    known: Vec<Vec<Token>>,
    committed: HashMap<SeqId, Vec<Token>>,
}

impl Drafter for Helped {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn contract(&self) -> String {
        self.inner.contract()
    }

    fn taps(&self) -> &[paceline_backend::Tap] {
        self.inner.taps()
    }

    fn n_draft_max(&self) -> usize {
        self.inner.n_draft_max()
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        let mut drafts = self.inner.draft(requests);
        for (draft, request) in drafts.iter_mut().zip(requests) {
            assert_eq!(draft.fault, None);
            let mut so_far = self.committed[&request.seq].clone();
            so_far.push(request.anchor);
            let plain = self.known.iter().find(|known| known.starts_with(&so_far));
            let right = &plain.expect("an answer as the plain one, so far")[so_far.len()..];
            let n_right = [0, 2, 5, 1, 3][request.position % 5];
            draft.tokens.iter_mut().zip(right).take(n_right).for_each(|(guess, right)| *guess = *right);
        }
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        for kept in kept {
            self.committed.entry(kept.seq).or_default().extend(kept.tokens);
        }
        self.inner.commit(kept);
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        let can = self.inner.fork(from, to, len);
        if can {
            let tokens = self.committed[&from][..len].to_vec();
            self.committed.insert(to, tokens);
        }
        can
    }

    fn forks_anywhere(&self, len: usize) -> bool {
        self.inner.forks_anywhere(len)
    }

    fn forget(&mut self, seq: SeqId) {
        self.committed.remove(&seq);
        self.inner.forget(seq);
    }
}

struct Answered {
    tokens: Vec<Token>,
    n_accepted: usize,
    n_drafted: usize,
}

/// Answers to the prompts, speculated with the help of `known` if there is any.
fn answers(
    target: &Arc<Gguf>,
    drafts: Drafts,
    n_slot: usize,
    known: Option<Vec<Vec<Token>>>,
    requests: &[Request],
) -> Vec<Answered> {
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(2).unwrap());
    let model = paceline_models::load(target, &backend).unwrap();
    let config = StateConfig { page_len: 16, ..StateConfig::default() };
    let states = backend.alloc_states(model.states(), config).unwrap();
    let drafter = known.map(|known| {
        let file = match drafts {
            Drafts::Dflash(taps) => random_drafter(&*model, taps),
            Drafts::Assistant(name) => converted(name),
        };
        let load = LoadDrafter {
            file,
            backend: &backend,
            target: &*model,
            target_states: &states,
            states: config,
            n_cell_max: 1 << 14,
            n_draft_max: Some(5),
        };
        let inner = paceline_spec::load(&load).unwrap();
        Box::new(Helped { inner, known, committed: HashMap::new() }) as Box<dyn Drafter>
    });
    let mut p = PlanBuilder::new(drafter.as_ref().map_or(&[], |drafter| drafter.taps()));
    let logits = model.record(&mut p);
    let plan = Arc::new(p.finish(Some(logits)));
    let exec = backend.compile(plan, &states).unwrap();
    let vocab = Arc::new(Vocab::from_metadata(target.metadata()).unwrap());
    let target = Target { exec, memory: Memory::new(states, 1 << 14), n_vocab: model.hparams().n_vocab };
    let config = EngineConfig {
        n_slot,
        n_ctx: 256,
        n_ubatch: 24,
        n_draft_max: 5,
        check_memory: true,
        ..Default::default()
    };
    let mut engine = Engine::new(target, drafter, vocab, config);
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    let mut answers: Vec<Answered> =
        requests.iter().map(|_| Answered { tokens: Vec::new(), n_accepted: 0, n_drafted: 0 }).collect();
    let mut events = Vec::new();
    while engine.has_work() {
        engine.step(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Tokens { request, tokens, .. } => {
                    answers[request.0 as usize].tokens.extend(tokens.iter().map(|t| t.id));
                }
                Event::Done { request, stats, .. } => {
                    let answer = &mut answers[request.0 as usize];
                    (answer.n_accepted, answer.n_drafted) = (stats.n_accepted, stats.n_draft);
                }
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
    }
    assert_eq!(engine.usage().n_page, 0);
    answers
}

#[test]
fn experts_and_delta_rules() {
    check("qwen35moe", Drafts::Dflash(&[1, 3, 6]));
}

#[test]
fn gemma4() {
    check("gemma4", Drafts::Dflash(&[0, 2, 4]));
}

#[test]
fn gemma4_with_shared_kv() {
    check("gemma4-e", Drafts::Dflash(&[1, 5, 9]));
}

#[test]
fn gemma4_with_experts() {
    check("gemma4-moe", Drafts::Dflash(&[0, 2, 4]));
}

#[test]
fn gemma4_with_its_assistant() {
    check("gemma4", Drafts::Assistant("gemma4-assistant"));
    check("gemma4-e", Drafts::Assistant("gemma4-e-assistant"));
}

/// Speculated is plain, greedy and sampled, at any number of slots.
fn check(name: &str, drafts: Drafts) {
    let target = converted(name);
    let n_vocab = target.tensor("token_embd.weight").unwrap().shape[1] as usize;
    let mut rng = Rng::new(17);
    let requests: Vec<Request> = (0..10)
        .map(|id| {
            let n_prompt = 1 + 7 * id as usize % 30;
            let prompt = (0..n_prompt).map(|_| rng.range(0..n_vocab) as Token).collect();
            // Every other one is greedy.
            let temperature = if id % 2 == 0 { 0.0 } else { 0.9 };
            Request {
                sampling: SamplingParams { temperature, seed: id, ..SamplingParams::default() },
                n_predict: Some(N_PREDICT),
                ignore_eos: true,
                ..Request::new(RequestId(id), prompt)
            }
        })
        .collect();
    let plain = answers(&target, drafts, 1, None, &requests);
    let known: Vec<Vec<Token>> =
        requests.iter().zip(&plain).map(|(r, a)| [&r.prompt[..], &a.tokens].concat()).collect();
    for n_slot in [1, 2, 5, 8] {
        let crowd = answers(&target, drafts, n_slot, None, &requests);
        let speculated = answers(&target, drafts, n_slot, Some(known.clone()), &requests);
        for (id, plain) in plain.iter().enumerate() {
            assert_eq!(plain.tokens.len(), N_PREDICT);
            assert_eq!(crowd[id].tokens, plain.tokens, "answer {id}, plain at {n_slot} slots");
            let got = &speculated[id];
            assert_eq!(got.tokens, plain.tokens, "answer {id}, speculated at {n_slot} slots");
            let (n_accepted, n_drafted) = (got.n_accepted, got.n_drafted);
            assert!(10 < n_accepted && n_accepted < n_drafted, "{n_accepted} of {n_drafted} drafted");
        }
    }
}
