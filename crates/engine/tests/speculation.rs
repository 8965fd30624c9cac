//! Speculation on purpose: each accept length, each place where an answer can end inside an accepted run, each kind
//! of bad drafter.

mod world;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use paceline_backend::{StateConfig, Tap};
use paceline_engine::{
    CacheConfig, Engine, EngineConfig, Finish, Request, RequestError, RequestId, SpeculationNote, SubmitError,
};
use paceline_sampling::SamplingParams;
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, SeqId};
use paceline_testkit::{
    Accept, End, HashKind, HashModel, IM_END, Lie, Reading, Scripted, TEXT_END, Token, liar, oracle,
    tiny_vocab,
};
use world::{Prices, Sizes, World, watched};

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

fn text(text: &str) -> Vec<Token> {
    text.bytes().map(Token::from).collect()
}

fn request(id: u64, prompt: &str) -> Request {
    Request {
        n_predict: Some(48),
        ignore_eos: true,
        sampling: greedy(),
        ..Request::new(RequestId(id), text(prompt))
    }
}

fn run<D: Drafter + 'static>(
    model: HashModel,
    drafter: Option<D>,
    sizes: Sizes,
    requests: Vec<Request>,
) -> World {
    let mut world = World::new(model, drafter, sizes);
    requests.into_iter().for_each(|r| world.submit(r).expect("a valid request"));
    world.run();
    world.check();
    world
}

/// Forwards that 48 tokens take if each verify accepts `accept` of 7 drafted tokens.
fn check_accept(accept: Accept, n_verify: usize) {
    for (kind, temperature) in HashKind::ALL.into_iter().flat_map(|kind| [0.0, 0.8, 1.0].map(|t| (kind, t))) {
        for n_slot in [1, 2, 3, 8] {
            let model = HashModel::new(5, kind);
            let sizes = Sizes { n_slot, n_draft_max: 7, ..Sizes::ROOMY };
            let requests: Vec<Request> = (0..10)
                .map(|id| Request {
                    sampling: SamplingParams { temperature, seed: id, ..SamplingParams::default() },
                    ..request(id, &"once ".repeat(id as usize + 1))
                })
                .collect();
            let world = run(model.clone(), Some(oracle(model, 15, accept, 1)), sizes, requests);
            for told in world.told.values() {
                let stats = &told.stats;
                assert_eq!((stats.n_predicted, stats.n_verify), (48, n_verify), "{accept:?}: {stats:?}");
                assert_eq!(stats.n_accepted, 48 - n_verify, "the rest was drafted");
                assert!((stats.accept_len() - 48.0 / n_verify as f64).abs() < 1e-9);
                let useless = accept == Accept::Exactly(0);
                let note = if useless { SpeculationNote::Useless } else { SpeculationNote::Active };
                assert_eq!(stats.speculation, note);
            }
        }
    }
}

#[test]
fn every_accept_length() {
    // The first token comes from the prompt's last row, without a draft: 1 + ceil(47 / (accepted + 1)).
    check_accept(Accept::Exactly(0), 48);
    check_accept(Accept::Exactly(1), 25);
    check_accept(Accept::Exactly(3), 13);
    check_accept(Accept::All, 7);
}

/// A clock that moves on by a second whenever it is read: each stage of a step takes one.
#[test]
fn stages_are_timed_by_a_lent_clock_and_no_other() {
    let times = |is_lent: bool| {
        let model = HashModel::new(5, HashKind::Hybrid);
        let mut world = World::new(model.clone(), Some(oracle(model, 15, Accept::Varying, 1)), Sizes::ROOMY);
        if is_lent {
            let n_read = AtomicU64::new(0);
            let clock = move || Duration::from_secs(n_read.fetch_add(1, Ordering::Relaxed));
            world.engine = world.engine.with_clock(Box::new(clock));
        }
        world.submit(request(0, "once upon a time")).unwrap();
        world.run();
        world.check();
        let counters = world.engine.counters();
        (counters.n_step, [counters.times.draft, counters.times.verify, counters.times.commit])
    };
    let (n_step, lent) = times(true);
    assert_eq!(lent[1..], [Duration::from_secs(n_step); 2]);
    assert!(lent[0] >= lent[1], "a step that finds nothing to do looks for drafts too: {lent:?}");
    assert_eq!(times(false), (n_step, [Duration::ZERO; 3]));
}

#[test]
fn an_end_inside_an_accepted_run() {
    for seed in 0..40 {
        let model = HashModel::new(seed, HashKind::Hybrid);
        let long = run(
            model.clone(),
            Some(oracle(model.clone(), 15, Accept::All, 1)),
            Sizes::ROOMY,
            vec![request(0, "x")],
        );
        let (all, ids) = (&long.told[&RequestId(0)].text, long.told[&RequestId(0)].ids());
        for n_draft in [3, 15] {
            let sizes = Sizes { n_draft_max: n_draft, n_slot: 3, ..Sizes::ROOMY };
            let word: String = all.chars().skip(9).take(3).collect();
            let stopped = Request { stop: vec!["never".into(), word.clone()], ..request(0, "x") };
            let limited = Request { n_predict: Some(10 + seed as usize % 9), ..request(1, "x") };
            // Any token may be called an end by the request that bans nothing.
            let ended = Request { ignore_eos: false, n_predict: None, ..request(2, "x") };
            let drafter = oracle(model.clone(), 15, Accept::All, 1);
            let world = run(model.clone(), Some(drafter), sizes, vec![stopped, limited, ended]);
            let end = |id| world.told[&RequestId(id)].end.clone();
            assert_eq!(end(0), Some(Ok(Finish::Stop(word))));
            assert_eq!(end(1), Some(Ok(Finish::Limit)));
            assert!(
                matches!(end(2), Some(Ok(Finish::Eog(IM_END | TEXT_END) | Finish::Context))),
                "{:?}",
                end(2)
            );
            assert_eq!(world.told[&RequestId(1)].ids(), ids[..10 + seed as usize % 9]);
        }
    }
}

#[test]
fn the_context_is_used_to_its_end() {
    let model = HashModel::new(3, HashKind::Hybrid);
    let sizes = Sizes { n_ctx: 33, n_slot: 1, ..Sizes::ROOMY };
    let requests = vec![
        Request { n_predict: None, ..request(0, "until the end") },
        Request { n_predict: None, ..request(1, "as long as a context may be, 32!!") },
    ];
    let short = requests[0].prompt.len();
    let drafter = oracle(model.clone(), 15, Accept::All, 1);
    let mut requests = requests;
    requests[1].prompt.truncate(32);
    let world = run(model, Some(drafter), sizes, requests);
    for (id, n) in [(0, 33 - short), (1, 1)] {
        let told = &world.told[&RequestId(id)];
        assert_eq!((told.end.clone(), told.tokens.len()), (Some(Ok(Finish::Context)), n));
    }
}

#[test]
fn identical_prompts_in_a_row_get_identical_answers() {
    for n_slot in [1, 2, 8] {
        let model = HashModel::new(9, HashKind::Hybrid);
        let drafter = oracle(model.clone(), 15, Accept::Varying, 1);
        let requests = (0..5).map(|id| request(id, "tell me a story")).collect();
        let world = run(model, Some(drafter), Sizes { n_slot, ..Sizes::ROOMY }, requests);
        let first = &world.told[&RequestId(0)];
        assert!(world.told.values().all(|told| told.ids() == first.ids() && told.text == first.text));
    }
}

#[test]
fn a_faulting_drafter_is_dropped_for_its_request_only() {
    for lie in Lie::ALL {
        let model = HashModel::new(2, HashKind::Hybrid);
        let (mut lies, mut truth) = (
            liar(model.clone(), 15, std::slice::from_ref(Box::leak(Box::new(lie))), 1),
            oracle(model.clone(), 15, Accept::All, 1),
        );
        // The drafter lies to whoever begins with `b`.
        let drafter = Scripted::new("half a liar", 15, move |tokens, request| {
            if tokens[0] == Token::from(b'b') {
                lies.answer(tokens, request)
            } else {
                truth.answer(tokens, request)
            }
        });
        let requests = vec![request(0, "a good one"), request(1, "bad one"), request(2, "another good one")];
        let world = run(model, Some(drafter), Sizes { n_slot: 3, ..Sizes::ROOMY }, requests);
        let note = |id| &world.told[&RequestId(id)].stats.speculation;
        for id in [0, 2] {
            assert_eq!(note(id), &SpeculationNote::Active, "{lie:?}");
            assert!(world.told[&RequestId(id)].stats.accept_len() > 10.0, "{lie:?}");
        }
        assert_eq!(matches!(note(1), SpeculationNote::Faulted(_)), lie.is_fatal(), "{lie:?}: {:?}", note(1));
        assert_eq!(world.engine.counters().n_bad_drafts, u64::from(lie.is_fatal()), "{lie:?}");
    }
}

#[test]
fn unusable_logits_fail_their_request_only() {
    let model = HashModel { nan_token: Some(Token::from(b'!')), ..HashModel::new(4, HashKind::Hybrid) };
    // In the middle of a prompt nobody samples from the row; at its end somebody does.
    let ban = SamplingParams { logit_bias: vec![(u32::from(b'!'), f32::NEG_INFINITY)], ..greedy() };
    let force = SamplingParams { logit_bias: vec![(u32::from(b'!'), 100.0)], ..greedy() };
    let requests = vec![
        Request { sampling: ban.clone(), ..request(0, "fine") },
        Request { sampling: ban.clone(), ..request(1, "bad!") },
        Request { sampling: ban.clone(), ..request(2, "go! on") },
        Request { sampling: force, ..request(3, "answers badly") },
        Request { sampling: ban, ..request(4, "fine, too") },
    ];
    for n_slot in [1, 2, 8] {
        // Drafted rows with such logits are nobody's concern unless the token before them is accepted.
        let drafter = Scripted::new("nan", 15, |_, request| {
            let tokens = vec![Token::from(b'!'); request.n_max];
            Draft { q: vec![1.0; tokens.len()], tokens, fault: None }
        });
        let world = run(model.clone(), Some(drafter), Sizes { n_slot, ..Sizes::ROOMY }, requests.clone());
        for (id, position) in [(0, None), (1, Some(3)), (2, None), (3, Some(13)), (4, None)] {
            let end = world.told[&RequestId(id)].end.clone();
            match (position, &end) {
                (None, Some(Ok(Finish::Limit))) => {}
                (Some(at), Some(Err(RequestError::Logits { position, .. }))) if at == *position => {}
                _ => panic!("request {id} ends with {end:?}"),
            }
        }
        assert_eq!(world.engine.counters().n_bad_logits, 2);
        assert_eq!(world.alone(RequestId(3)).end, End::BadLogits(13));
    }
}

#[test]
fn an_answer_that_ends_before_unusable_logits_is_complete() {
    let mut n_case = 0;
    for seed in 0..60 {
        let model =
            HashModel { nan_token: Some(Token::from(b'q')), ..HashModel::new(seed, HashKind::Hybrid) };
        let drafter = || Some(oracle(model.clone(), 15, Accept::All, 1));
        let failed = run(model.clone(), drafter(), Sizes::ROOMY, vec![request(0, "x")]);
        let text = &failed.told[&RequestId(0)].text;
        let Some(stop) = text.strip_suffix('q').and_then(|before| before.chars().last()) else { continue };
        let request = Request { stop: vec![stop.to_string()], ..request(0, "x") };
        let world = run(model.clone(), drafter(), Sizes::ROOMY, vec![request]);
        assert!(matches!(world.told[&RequestId(0)].end, Some(Ok(Finish::Stop(_)))));
        n_case += 1;
    }
    assert!(n_case > 10, "{n_case} answers went on to a row with unusable logits");
}

#[test]
fn a_cancel_frees_slot_and_memory_at_once() {
    let model = HashModel::new(6, HashKind::Hybrid);
    for n_step in 0..12 {
        let drafter = oracle(model.clone(), 15, Accept::Varying, 1);
        let mut world =
            World::new(model.clone(), Some(drafter), Sizes { n_slot: 1, n_ubatch: 8, ..Sizes::COLD });
        world.submit(request(0, &"a long prompt ".repeat(3))).expect("valid");
        world.submit(request(1, "next")).expect("valid");
        for _ in 0..n_step {
            world.step();
        }
        world.cancel(RequestId(0));
        assert_eq!((world.engine.usage().n_seq, world.states.n_page()), (0, 0), "after {n_step} steps");
        world.step();
        assert_eq!(world.told[&RequestId(1)].slot, Some(0));
        world.run();
        world.check();
    }
}

/// Before they started, in the middle of their prompt and behind drafts: nothing of those who left adds up.
#[test]
fn a_thousand_cancels_leave_nothing() {
    let model = HashModel::new(7, HashKind::Hybrid);
    let drafter = oracle(model.clone(), 15, Accept::Varying, 1);
    let cache = CacheConfig { n_byte_max: 20_000, ..Sizes::ROOMY.cache };
    let mut world = World::new(model, Some(drafter), Sizes { n_slot: 2, n_ubatch: 8, cache, ..Sizes::ROOMY });
    for id in 0..1200 {
        let prompt = format!("{id}: longer than a batch");
        let long = Request { n_predict: Some(200), ..request(id, &prompt) };
        world.submit(long).expect("valid");
        for _ in 0..id % 7 {
            world.step();
        }
        if id >= 2 {
            world.cancel(RequestId(id - 2));
        }
        assert!(world.engine.usage().n_seq <= 2, "{:?} after {id}", world.engine.usage());
    }
    let n_told: Vec<usize> = world.told.values().filter_map(|told| told.cancelled).collect();
    let n_early = n_told.iter().filter(|&&n| n == 0).count();
    assert!(n_told.len() >= 1000 && (100..900).contains(&n_early), "{n_early} of {}", n_told.len());
    world.run();
    world.check();
}

/// Each fits alone, both together do not: one waits while the other runs, and both get all that they get alone.
#[test]
fn a_full_memory_parks_one_and_fails_none() {
    let model = HashModel::new(8, HashKind::Hybrid);
    for cache in [Sizes::ROOMY.cache, CacheConfig::OFF] {
        let sizes = Sizes { n_slot: 2, page_len: 4, n_cell_max: 80, cache, ..Sizes::ROOMY };
        let requests = vec![request(0, "the first of two requests"), request(1, "and the second of the two")];
        let drafter = oracle(model.clone(), 15, Accept::Varying, 1);
        let world = run(model.clone(), Some(drafter), sizes, requests);
        assert!(
            world.told.values().all(|told| told.tokens.len() == 48 && told.end == Some(Ok(Finish::Limit)))
        );
        assert!(world.engine.counters().n_parked > 0);
    }
}

/// More than the whole memory is no context that a request could have.
#[test]
fn a_context_is_no_larger_than_the_memory() {
    let model = HashModel::new(8, HashKind::Hybrid);
    let sizes = Sizes { n_slot: 2, page_len: 4, n_cell_max: 64, ..Sizes::ROOMY };
    let mut world = World::new(model.clone(), None::<Scripted>, sizes);
    let long = world.submit(request(0, &"x".repeat(64))).expect_err("refused");
    assert_eq!(long, SubmitError::ContextExceeded { n_prompt: 64, n_ctx: 64 });
    let requests = vec![request(0, "the first of two requests"), request(1, "and the second of the two")];
    let world = run(model, None::<Scripted>, sizes, requests);
    for told in world.told.values() {
        assert_eq!((told.end.clone(), told.tokens.len()), (Some(Ok(Finish::Context)), 64 - 25));
    }
}

/// Drafts of which nothing is accepted change nothing, not even who has to wait for want of memory, and how often.
#[test]
fn a_draft_costs_nobody_his_room() {
    let mut n_parked = 0;
    for seed in 0..100 {
        let model = HashModel::new(seed, HashKind::Hybrid);
        let sizes = Sizes {
            n_slot: 3,
            page_len: 1 + seed as usize % 5,
            n_cell_max: 100,
            n_ubatch: 512,
            ..Sizes::ROOMY
        };
        let requests: Vec<Request> = (0..6).map(|id| request(id, &"so ".repeat(1 + id as usize))).collect();
        let plain = run(model.clone(), None::<Scripted>, sizes, requests.clone());
        let drafter = oracle(model.clone(), 15, Accept::Exactly(0), 1);
        let drafted = run(model.clone(), Some(drafter), sizes, requests);
        assert_eq!(plain.engine.counters().n_parked, drafted.engine.counters().n_parked, "seed {seed}");
        n_parked += plain.engine.counters().n_parked;
    }
    assert!(n_parked > 50, "{n_parked} times a request had to wait");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let mut world = World::new(HashModel::new(1, HashKind::Attention), None::<Scripted>, Sizes::ROOMY);
    let refused = |world: &mut World, request| world.submit(request).expect_err("refused").to_string();
    assert_eq!(refused(&mut world, request(0, "")), "the prompt is empty: at least one token is needed");
    let long = refused(&mut world, request(0, &"x".repeat(256)));
    assert!(
        long.starts_with("the request has 256 prompt tokens, and the context of a slot has 256"),
        "{long}"
    );
    let bad = Request::new(RequestId(0), vec![1, 9999]);
    assert_eq!(
        world.submit(bad),
        Err(SubmitError::BadToken { token: 9999, index: 1, n_vocab: world.model.n_vocab })
    );
    let slot = Request { slot: Some(2), ..request(0, "x") };
    assert_eq!(world.submit(slot), Err(SubmitError::BadSlot { slot: 2, n_slot: 2 }));
    let params = SamplingParams { top_p: 2.0, ..greedy() };
    let sampling = Request { sampling: params, ..request(0, "x") };
    assert!(matches!(world.submit(sampling), Err(SubmitError::Sampling(_))));
    world.run();
    world.check();
}

/// The engine's planner on a clock where things cost what they are said to: a liar is put to sleep, who is right drafts
/// at full length, and the price of a step decides how much.
#[test]
fn what_does_not_pay_is_not_drafted() {
    let seconds = |accept: Option<Accept>, prices: Prices, n_slot: usize| {
        let model = HashModel::new(4, HashKind::Hybrid);
        let drafters = accept.map(|accept| watched(&model, oracle(model.clone(), 7, accept, 1)));
        let sizes = Sizes { n_slot, n_ctx: 1100, n_draft_max: 7, ..Sizes::ROOMY };
        let mut world = World::several(model, drafters.into_iter().collect(), sizes, Some(prices));
        for id in 0..2 * n_slot as u64 {
            world.submit(Request { n_predict: Some(1000), ..request(id, "once upon") }).expect("valid");
        }
        world.run();
        world.check();
        let n_draft = world.told.values().map(|told| told.stats.n_draft).sum::<usize>();
        let times = world.engine.counters().times;
        ((times.draft + times.verify).as_secs_f64(), n_draft, world)
    };
    let flat = Prices { forward: 10_000, row: 200, draft: 2_000 };
    let steep = Prices { forward: 0, row: 10_000, draft: 2_000 };
    for n_slot in [1, 2, 5, 8] {
        for prices in [flat, steep] {
            let (plain, ..) = seconds(None, prices, n_slot);
            let (lied, n_draft, _) = seconds(Some(Accept::Exactly(0)), prices, n_slot);
            assert!(lied < 1.06 * plain && n_draft > 0, "{n_slot} slots: {lied} seconds, plain {plain}");
        }
        let (plain, ..) = seconds(None, flat, n_slot);
        let (right, _, world) = seconds(Some(Accept::All), flat, n_slot);
        assert!(right < plain / 2.0, "{n_slot} slots: {right} seconds, plain {plain}");
        assert!(world.told.values().all(|told| told.stats.drafter == Some("oracle")));
    }
    // Where every row costs as much as the first, even a drafter that is always right gains nothing.
    let (_, n_draft, world) = seconds(Some(Accept::All), steep, 1);
    assert!(n_draft < 400, "{n_draft} tokens were drafted");
    assert!(world.told.values().any(|told| told.stats.speculation == SpeculationNote::Resting));
}

#[test]
fn a_slot_goes_on_with_the_drafters_that_are_left() {
    let model = HashModel::new(2, HashKind::Hybrid);
    let drafters = vec![
        watched(&model, liar(model.clone(), 15, &[Lie::Fault], 1)),
        watched(&model, liar(model.clone(), 15, &[Lie::Empty], 1)),
        watched(&model, oracle(model.clone(), 15, Accept::All, 1)),
    ];
    let mut world = World::several(model, drafters, Sizes { n_slot: 2, ..Sizes::ROOMY }, None);
    (0..3).for_each(|id| world.submit(request(id, "go on")).expect("valid"));
    world.run();
    world.check();
    for (id, told) in &world.told {
        let stats = &told.stats;
        assert_eq!((&stats.speculation, stats.drafter), (&SpeculationNote::Active, Some("oracle")));
        // The third begins with what the first two found out, and does not ask the liar first.
        let dropped = if id.0 < 2 { vec![("liar", "a lie".to_string())] } else { vec![] };
        assert_eq!(stats.dropped, dropped, "{id:?}");
        // Who says nothing costs nothing: the next one is asked in the same step.
        assert!(stats.accept_len() > 10.0, "{stats:?}");
    }
}

/// Reads some columns of the model's taps, and checks that they are the right rows' and its own.
struct Reads {
    model: HashModel,
    taps: &'static [Tap],
    columns: &'static [usize],
    readings: HashMap<SeqId, Reading>,
    n_row: Arc<AtomicU64>,
}

impl Drafter for Reads {
    fn name(&self) -> &'static str {
        "reader"
    }
    fn contract(&self) -> String {
        "reads".to_string()
    }
    fn taps(&self) -> &[Tap] {
        self.taps
    }
    fn n_draft_max(&self) -> usize {
        3
    }
    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        requests.iter().map(|r| Draft { tokens: vec![r.anchor], q: vec![0.1], fault: None }).collect()
    }
    fn commit(&mut self, kept: &[Kept<'_>]) {
        for rows in kept {
            let reading = self.readings.entry(rows.seq).or_insert_with(|| self.model.reading());
            for (&token, got) in rows.tokens.iter().zip(rows.taps.chunks_exact(self.columns.len())) {
                reading.push(token);
                let all = reading.taps();
                let want: Vec<f32> = self.columns.iter().map(|&column| all[column]).collect();
                assert_eq!(got, want, "columns {:?} of {:?}", self.columns, rows.seq);
                self.n_row.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    fn fork(&mut self, _: SeqId, _: SeqId, _: usize) -> bool {
        false
    }
    fn forget(&mut self, seq: SeqId) {
        self.readings.remove(&seq);
    }
}

#[test]
fn each_drafter_reads_its_own_taps() {
    let model = HashModel::new(3, HashKind::Hybrid);
    let n_row = Arc::new(AtomicU64::new(0));
    let reads = |taps, columns| {
        let (model, n_row) = (model.clone(), n_row.clone());
        Box::new(Reads { model, taps, columns, readings: HashMap::new(), n_row }) as Box<dyn Drafter>
    };
    // The model has four columns, which are those of the union.
    let drafters = vec![
        reads(&[Tap::Layer(0), Tap::Layer(2), Tap::FinalNorm], &[0, 1, 2]),
        reads(&[Tap::Layer(3), Tap::Layer(2)], &[3, 1]),
    ];
    let config = StateConfig { page_len: 16, ..StateConfig::default() };
    let (target, _) = model.target(config, 1 << 16);
    let config = EngineConfig { n_slot: 2, n_ubatch: 8, n_draft_max: 3, ..EngineConfig::default() };
    let mut engine = Engine::new(target, drafters, tiny_vocab(), config);
    for id in 0..5 {
        engine.submit(request(id, "columns of one another")).expect("valid");
    }
    let mut events = Vec::new();
    while engine.has_work() {
        engine.step(&mut events);
    }
    // Twice every row but the last of each answer: 22 + 48 - 1 tokens less what the last step made.
    assert!(n_row.load(Ordering::Relaxed) > 2 * 5 * 60);
}
