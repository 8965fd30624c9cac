//! Seeded lives of an engine: arrivals, cancels, stops, tight memory, snapshots to and from files, drafters good and bad. Every request gets the
//! tokens, the text and the reason that it gets alone, and nothing stays in use.

mod world;

use std::collections::BTreeMap;

use paceline_engine::{
    CacheConfig, CheckedSnapshot, Finish, Request, RequestError, RequestId, SpeculationNote,
};
use paceline_sampling::SamplingParams;
use paceline_spec::Ngram;
use paceline_testkit::{Accept, Forks, HashKind, HashModel, Lie, Rng, Scripted, Seeded, Token, liar, oracle};
use world::{Prices, Sizes, World, shelf::Folder, watched};

const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz \n.";

fn prompt(rng: &mut Rng, n_max: usize, nan_token: Option<Token>) -> Vec<Token> {
    let n = match rng.range(0..3) {
        0 => rng.range(1..n_max.min(4) + 1),
        1 => rng.range(1..n_max.min(40) + 1),
        _ => rng.range(1..n_max + 1),
    };
    let mut tokens: Vec<Token> = (0..n).map(|_| Token::from(*rng.pick(LETTERS))).collect();
    if let Some(token) = nan_token.filter(|_| rng.chance(0.1)) {
        // Anywhere: only a row that is sampled from matters.
        let at = rng.range(0..n);
        tokens[at] = token;
    }
    tokens
}

fn sampling(rng: &mut Rng) -> SamplingParams {
    let temperature = *rng.pick(&[0.0, 0.0, 0.8, 1.0]);
    let mut params = SamplingParams { temperature, seed: rng.bits(), ..SamplingParams::default() };
    if rng.chance(0.3) {
        (params.top_k, params.top_p, params.min_p) = (0, 1.0, 0.0);
    }
    if rng.chance(0.4) {
        params.repeat_penalty = 1.3;
        params.presence_penalty = 0.5;
        params.frequency_penalty = 0.2;
        params.repeat_last_n = *rng.pick(&[1, 8, 64, -1]);
    }
    if rng.chance(0.2) {
        params.dry_multiplier = 0.8;
    }
    if rng.chance(0.2) {
        params.logit_bias = vec![(u32::from(b'e'), 2.0), (u32::from(b' '), f32::NEG_INFINITY)];
    }
    if rng.chance(0.2) {
        params.n_probs = 3;
        params.post_sampling_probs = rng.chance(0.5);
    }
    params
}

fn request(rng: &mut Rng, id: u64, prompt: Vec<Token>, n_slot: usize) -> Request {
    let mut request = Request::new(RequestId(id), prompt);
    request.sampling = sampling(rng);
    request.n_predict = rng.chance(0.6).then(|| rng.range(1..40));
    if rng.chance(0.4) {
        let words = ["e", "th", "ab", ". ", "é", "€", "the", "\n", "zq", "xyzzy"];
        request.stop = (0..rng.range(1..4)).map(|_| (*rng.pick(&words)).to_owned()).collect();
    }
    request.ignore_eos = rng.chance(0.2);
    request.show_special = rng.chance(0.2);
    request.n_draft_max = rng.chance(0.4).then(|| rng.range(0..16));
    request.slot = rng.chance(0.2).then(|| rng.range(0..n_slot));
    request.cache_prompt = rng.chance(0.9);
    if rng.chance(0.5) {
        request.turns = (0..rng.range(1..4)).map(|_| rng.range(0..request.prompt.len() + 2)).collect();
        request.turns.sort_unstable();
    }
    request
}

/// Budgets from nothing to no limit: pages of these models have some hundred bytes.
fn cache(rng: &mut Rng) -> CacheConfig {
    CacheConfig {
        n_byte_max: *rng.pick(&[0, 300, 3000, 5000, 8000, 12_000, usize::MAX]),
        n_step: *rng.pick(&[0, 1, 16, 50]),
        n_step_max: rng.range(0..6),
        keeps_finished: rng.chance(0.8),
    }
}

fn drafter(rng: &mut Rng, model: &HashModel) -> Option<Scripted> {
    let (model, seed, n_max) = (model.clone(), rng.bits(), rng.range(1..16));
    let forks = *rng.pick(&[Forks::Anywhere, Forks::Anywhere, Forks::Whole, Forks::Within(30), Forks::Never]);
    let drafter = match rng.range(0..8) {
        0 => return None,
        1 => oracle(model, n_max, Accept::All, seed),
        2 => oracle(model, n_max, Accept::Exactly(rng.range(0..4)), seed),
        3 | 4 => oracle(model, n_max, Accept::Varying, seed),
        5 => liar(model, n_max, &Lie::ALL, seed),
        6 => liar(model, n_max, &[Lie::Random, Lie::Unlikely, Lie::Repeat, Lie::Empty], seed),
        _ => liar(model, n_max, &[Lie::TooMany, Lie::BadQ, Lie::SharedNoise], seed),
    };
    Some(drafter.forking(forks))
}

/// What clients may do with slots between steps: save, restore, erase; and what a server does that is about to stop.
fn meddle(
    rng: &mut Rng,
    world: &mut World,
    files: &mut Vec<Vec<u8>>,
    n_slot: usize,
    seen: &mut BTreeMap<&'static str, usize>,
) {
    let slot = rng.range(0..n_slot);
    match rng.range(0..8) {
        0..3 => {
            let saved = world.engine.save(slot);
            *seen.entry("saved").or_default() += usize::from(saved.is_ok());
            files.extend(saved.ok().map(|saved| saved.bytes));
        }
        3..6 if !files.is_empty() => {
            let mut file = rng.pick(files).clone();
            if rng.chance(0.2) {
                let at = rng.range(0..file.len());
                file[at] ^= 1 << rng.range(0..8);
                assert!(CheckedSnapshot::new(file).is_err(), "damage is seen");
                return;
            }
            let file = CheckedSnapshot::new(file).expect("what was saved");
            let restored = world.engine.restore(slot, &file);
            *seen.entry("restored").or_default() += usize::from(restored.is_ok());
        }
        6 => {
            let erased = world.engine.erase(slot);
            *seen.entry("erased").or_default() += usize::from(erased.is_ok_and(|e| e.n_snapshot > 0));
        }
        7 if rng.chance(0.3) => world.engine.put_away(),
        _ => {}
    }
}

/// Runs one life; adds what happened in it to `seen`.
fn simulate(seed: u64, seen: &mut BTreeMap<&'static str, usize>) {
    let _seeded = Seeded::new("a simulated engine", seed);
    let mut rng = Rng::new(seed);
    let mut model = HashModel::new(rng.bits(), *rng.pick(&HashKind::ALL));
    model.nan_token = rng.chance(0.2).then_some(Token::from(b'q'));
    let n_ctx = *rng.pick(&[8, 40, 220, 300]);
    let sizes = Sizes {
        n_slot: *rng.pick(&[1, 2, 3, 8]),
        n_ctx,
        n_ubatch: rng.range(1..65),
        n_draft_max: rng.range(0..16),
        page_len: *rng.pick(&[1, 4, 16, 64]),
        n_cell_max: if rng.chance(0.4) { rng.range(n_ctx / 3..n_ctx) } else { 1 << 20 },
        cache: cache(&mut rng),
    };
    let n_ctx = sizes.n_ctx_of(&model);
    let n_drafter = *rng.pick(&[1, 1, 2, 3]);
    let mut drafters: Vec<_> = (0..n_drafter).filter_map(|_| drafter(&mut rng, &model)).collect::<Vec<_>>();
    let mut watchful: Vec<_> = drafters.drain(..).map(|drafter| watched(&model, drafter)).collect();
    if rng.chance(0.3) {
        watchful.push(watched(&model, Ngram::new(rng.range(1..16))));
    }
    let prices = rng.chance(0.4).then(|| Prices {
        forward: rng.range(1..2000) as u64,
        row: rng.range(0..500) as u64,
        draft: rng.range(0..1000) as u64,
    });
    *seen.entry("several drafters").or_default() += usize::from(watchful.len() > 1);
    let mut world = World::several(model.clone(), watchful, sizes, prices);

    let folder = Folder::default();
    if rng.chance(0.7) {
        let (seed, n_fault) = (rng.bits(), *rng.pick(&[0, 3]));
        let n_byte_max = *rng.pick(&[5000, 20_000, 1 << 40]);
        world = world.with_shelf(folder.shelf(seed, n_fault), n_byte_max);
    }

    let n_request = rng.range(1..13);
    let mut arrivals: Vec<(usize, Request)> = Vec::new();
    for id in 0..n_request as u64 {
        // The same prompt in a row, at times with other settings.
        let prompt = match arrivals.last() {
            Some((_, last)) if rng.chance(0.3) => last.prompt.clone(),
            _ => prompt(&mut rng, 200.min(n_ctx - 1), model.nan_token),
        };
        // Or its beginning and then something else.
        let prompt = match arrivals.last() {
            Some((_, last)) if rng.chance(0.3) => {
                let mut edited = last.prompt[..rng.range(0..last.prompt.len() + 1)].to_vec();
                edited.extend(&prompt[..rng.range(1..prompt.len() + 1)]);
                edited.truncate(n_ctx - 1);
                edited
            }
            _ => prompt,
        };
        let mut request = request(&mut rng, id, prompt, sizes.n_slot);
        if let Some((_, last)) = arrivals.last().filter(|_| rng.chance(0.2)) {
            request = Request { id: request.id, ..last.clone() };
        }
        arrivals.push((rng.range(0..120), request));
    }
    arrivals.sort_by_key(|(step, _)| *step);
    let mut cancels: Vec<(usize, RequestId)> = Vec::new();
    for (step, request) in &arrivals {
        if rng.chance(0.15) {
            cancels.push((step + rng.range(0..20), request.id));
        }
    }
    let mut arrivals = arrivals.into_iter().peekable();
    let mut files: Vec<Vec<u8>> = Vec::new();
    while world.engine.has_work() || arrivals.peek().is_some() {
        while let Some((_, mut request)) = arrivals.next_if(|(step, _)| *step <= world.n_step) {
            // Another turn of a conversation, its answer so far included.
            let earlier: Vec<RequestId> = world.requests.keys().copied().collect();
            if let Some(id) = earlier.iter().min().filter(|_| rng.chance(0.3)) {
                let mut prompt = [&world.requests[id].prompt[..], &world.told[id].ids()].concat();
                prompt.extend(&request.prompt[..request.prompt.len().min(5)]);
                prompt.truncate(n_ctx - 1);
                request.prompt = prompt;
            } else if rng.chance(0.6) {
                // One from long ago, asked again.
                let long: Vec<RequestId> =
                    earlier.into_iter().filter(|id| world.requests[id].prompt.len() > 70).collect();
                if !long.is_empty() {
                    // No order of a map may decide.
                    let mut long = long;
                    long.sort_unstable();
                    request.prompt = world.requests[rng.pick(&long)].prompt.clone();
                }
            }
            world.submit(request).expect("a valid request");
        }
        for &(step, id) in &cancels {
            if step == world.n_step {
                world.cancel(id);
            }
        }
        if rng.chance(0.1) {
            meddle(&mut rng, &mut world, &mut files, sizes.n_slot, seen);
        }
        world.step();
    }
    let (parked, evicted) = (world.engine.counters().n_parked, world.engine.cache_usage().n_evicted);
    world.rest();
    let shelf = world.engine.cache_usage().shelf.unwrap_or_default();
    assert_eq!(shelf.bytes, folder.bytes() as u64, "what is reckoned is there");
    *seen.entry("written to the shelf").or_default() += shelf.n_stored as usize;
    *seen.entry("not written").or_default() += shelf.n_not_stored as usize;
    *seen.entry("fetched from the shelf").or_default() += shelf.n_fetched as usize;
    *seen.entry("removed from the shelf").or_default() += shelf.n_removed as usize;
    *seen.entry("parked").or_default() += parked as usize;
    *seen.entry("evicted").or_default() += evicted as usize;
    world.check();
    for told in world.told.values() {
        let end = match &told.end {
            None => "cancelled",
            Some(Ok(Finish::Eog(_))) => "end of generation",
            Some(Ok(Finish::Stop(_))) => "stop string",
            Some(Ok(Finish::Limit)) => "limit",
            Some(Ok(Finish::Context)) => "context",
            Some(Err(RequestError::Logits { .. })) => "unusable logits",
            Some(Err(RequestError::NoRoom(error))) => panic!("{error}"),
        };
        *seen.entry(end).or_default() += 1;
        if told.tokens.last().is_some_and(|t| t.drafted) && matches!(told.end, Some(Ok(_))) {
            *seen.entry("the end was drafted").or_default() += 1;
        }
        if told.n_cached > 0 {
            *seen.entry("a cached prefix").or_default() += 1;
        }
        if told.n_prefill > told.n_cached {
            *seen.entry("prompt in chunks").or_default() += 1;
        }
        if matches!(told.stats.speculation, SpeculationNote::Faulted(_)) {
            *seen.entry("drafter dropped").or_default() += 1;
        } else if !told.stats.dropped.is_empty() {
            *seen.entry("one of several dropped").or_default() += 1;
        }
        if told.stats.speculation == SpeculationNote::Resting {
            *seen.entry("drafts did not pay").or_default() += 1;
        }
    }
}

#[test]
fn every_request_gets_what_it_gets_alone() {
    let mut seen = BTreeMap::new();
    (0..5000).for_each(|seed| simulate(seed, &mut seen));
    assert_eq!(seen.len(), 22, "{seen:?}");
    assert!(seen.values().all(|&n| n >= 20), "too rare to prove anything: {seen:?}");
}
