//! Every drafter on every kind of target, at 1, 2, 5 and 8 slots: what a request gets is bit for bit what it gets without
//! one, greedy or sampled, whoever is cancelled beside it and whoever had its slot before.
//!
//! The blocks' drafters are random ones, and of a good drafter there is one for each target: the target itself.

mod pairs;

use std::sync::Arc;

use paceline_engine::{Request, RequestId};
use paceline_gguf::Gguf;
use paceline_testkit::{DrafterSizes, Rng, Seeded};

use pairs::{Pair, bits, check_end, serve};

/// More than there are slots, so that slots are used again.
const N_REQUEST: u64 = 11;

/// A target with a drafter of each kind that can have one.
fn pair(target: &'static str) -> Pair {
    let mut pair = Pair::new(target, &[("draft", target)]);
    let hp = pair.model.hparams();
    let sizes = DrafterSizes { n_layer: hp.n_layer, n_embd: hp.n_embd, n_vocab: hp.n_vocab };
    for (name, is_version2) in [("dflash", false), ("dflash2", true)] {
        let file = Gguf::from_bytes(name, sizes.drafter(is_version2)).unwrap();
        pair.files.insert(name, Arc::new(file));
    }
    pair
}

/// Tokens drafted and accepted of all requests that were not cancelled.
fn check(pair: &Pair, drafter: &str) -> (usize, usize) {
    let mut requests = pair.requests(N_REQUEST, 3);
    for request in &mut requests {
        request.n_predict = request.n_predict.map(|n| n.min(16));
        request.prompt.truncate(30);
        // Some say little but two tokens: such text repeats itself, and even who knows nothing is right at times.
        if request.id.0 % 3 == 1 {
            request.n_predict = Some(24);
            request.sampling.logit_bias = vec![(17, 30.0), (29, 30.0)];
        }
    }
    // A cancelled one is asked again, and so has somebody else's slot.
    let again = |id: u64| Request { id: RequestId(100 + id), ..requests[id as usize].clone() };
    let all: Vec<Request> = requests.iter().cloned().chain((0..N_REQUEST).step_by(4).map(again)).collect();
    let is_greedy = |request: &&Request| request.sampling.temperature == 0.0;
    let n_greedy = all.iter().filter(is_greedy).count();
    assert!(n_greedy > 3 && n_greedy + 3 < all.len(), "{n_greedy} are greedy");
    let plain = serve(&mut pair.engine(&[], 1, false), &all, &[]);
    let (mut n_draft, mut n_accepted) = (0, 0);
    for n_slot in [1, 2, 5, 8] {
        let seed = n_slot as u64;
        let _seeded = Seeded::new("drafters of all targets", seed);
        let mut rng = Rng::new(seed);
        let cancels: Vec<(usize, RequestId)> =
            (0..N_REQUEST).step_by(4).map(|id| (rng.range(1..12), RequestId(id))).collect();
        let mut engine = pair.engine(&[drafter], n_slot, false);
        let drafted = serve(&mut engine, &all, &cancels);
        check_end(engine);
        assert!(drafted.len() + cancels.len() >= all.len(), "everybody else was answered");
        for (id, (tokens, stats)) in &drafted {
            let want = &plain[id].0;
            let n = if cancels.iter().any(|(_, gone)| gone == id) { tokens.len() } else { want.len() };
            assert_eq!(bits(tokens), bits(&want[..n]), "{drafter}, {n_slot} slots, {id:?}");
            assert!(stats.dropped.is_empty(), "{drafter}: {:?}", stats.dropped);
            n_draft += stats.n_draft;
            n_accepted += stats.n_accepted;
        }
    }
    (n_draft, n_accepted)
}

fn check_all(target: &'static str) {
    let pair = pair(target);
    for drafter in ["dflash", "dflash2"] {
        let (n_draft, n_accepted) = check(&pair, drafter);
        assert!(n_draft > 1000 && n_accepted > 0, "{target}, {drafter}: {n_accepted} of {n_draft}");
    }
    let (n_draft, n_accepted) = check(&pair, "ngram-simple");
    assert!(n_draft > 100 && n_accepted > 0, "{target}: {n_accepted} of {n_draft} copied");
    let (n_draft, n_accepted) = check(&pair, "draft");
    // It sees what was accepted and not what it guessed, so penalties may mislead it.
    assert!(n_accepted * 2 > n_draft, "{target}: {n_accepted} of its own {n_draft}");
    if target.ends_with("-mtp") {
        let (n_draft, n_accepted) = check(&pair, "draft-mtp");
        assert!(n_draft > 1000 && n_accepted > 0, "{target}: {n_accepted} of {n_draft}");
    }
}

macro_rules! targets {
    ($($test:ident: $target:literal,)*) => {
        $(#[test]
        fn $test() {
            check_all($target);
        })*
    };
}

targets! {
    qwen3: "qwen3",
    qwen35: "qwen35",
    qwen35_with_a_head: "qwen35-mtp",
    qwen3moe: "qwen3moe",
    qwen35moe: "qwen35moe",
    qwen35moe_with_a_head: "qwen35moe-mtp",
    qwen3next: "qwen3next",
    llama: "llama",
    gemma4: "gemma4",
    gemma4_with_embeddings_of_each_layer: "gemma4-e",
    gemma4_with_experts: "gemma4-moe",
}

/// Trained or not, the goldens' own drafters have sizes that no two of which are equal.
#[test]
fn goldens_and_their_own_drafters() {
    for (target, drafter, golden) in [
        ("qwen35", "dflash", "dflash-noncausal"),
        ("qwen35", "dflash2", "dflash2"),
        ("gemma4", "dflash", "dflash-gemma4"),
        ("gemma4", "dflash2", "dflash2-gemma4"),
    ] {
        let (n_draft, _) = check(&Pair::new(target, &[(drafter, golden)]), drafter);
        assert!(n_draft > 1000, "{golden}: {n_draft} drafted");
    }
}
