//! Every drafter on real (tiny) models, alone and in company, at any number of slots: each request gets, bit for bit, the
//! tokens and log probabilities that it gets without any, whoever is cancelled beside it.

mod pairs;

use paceline_engine::{CacheConfig, CheckedSnapshot, Request, RequestId, Stats, TokenOut};
use paceline_testkit::{Rng, Seeded};

use pairs::{Pair, bits, check_end, serve};

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
fn an_assistant_that_looks_at_the_target() {
    for (target, assistant) in [("gemma4", "gemma4-assistant"), ("gemma4-e", "gemma4-e-assistant")] {
        let pair = Pair::new(target, &[("gemma4-assistant", assistant)]);
        assert!(check(&pair, &["gemma4-assistant"], false).0 > 1000);
        check(&pair, &["gemma4-assistant", "ngram-simple"], true);
    }
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
    let dflash2 = Pair::new("qwen35", &[("dflash2", "dflash2")]);
    let gemma = Pair::new("gemma4", &[("gemma4-assistant", "gemma4-assistant")]);
    let qwen3 = Pair::new("qwen3", &[("draft", "qwen3")]);
    // Layers with a window, shorter than most of these prompts.
    let windowed = Pair::new("gemma4", &[("draft", "gemma4"), ("dflash", "dflash-gemma4")]);
    let lists: [(&Pair, &[&str]); 17] = [
        (&gemma, &["gemma4-assistant"]),
        (&gemma, &["gemma4-assistant", "ngram-simple"]),
        (&hybrid, &["draft-mtp"]),
        (&hybrid, &["ngram-simple"]),
        (&hybrid, &["draft"]),
        (&hybrid, &["draft-mtp", "ngram-simple", "draft"]),
        (&dense, &["ngram-simple"]),
        (&dense, &["draft"]),
        (&dense, &["draft", "ngram-simple"]),
        (&dflash, &["dflash"]),
        (&dflash, &["dflash", "ngram-simple"]),
        (&dflash2, &["dflash2"]),
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
