//! The whole chain through the public door: order, greedy, errors, logprobs, purity.

use paceline_sampling::{
    DryBreakers, Known, ParamError, SampleError, Sampler, SamplingParams, noise::gumbel, samplers,
};
use proptest::prelude::*;

const BAN: f32 = f32::NEG_INFINITY;

fn sampler(n_vocab: usize, edit: impl FnOnce(&mut SamplingParams)) -> Sampler {
    let mut params = SamplingParams::default();
    edit(&mut params);
    Sampler::new(params, n_vocab, DryBreakers::default().into()).unwrap()
}

/// Sampling without truncation.
fn plain(p: &mut SamplingParams) {
    (p.temperature, p.top_k, p.top_p, p.min_p) = (1.0, 0, 1.0, 0.0);
}

fn greedy(p: &mut SamplingParams) {
    p.temperature = 0.0;
}

/// The tokens that ever come up over many positions.
fn support(sampler: &mut Sampler, logits: &[f32]) -> Vec<u32> {
    let mut tokens: Vec<u32> =
        (0..400).map(|position| sampler.choose(position, logits).unwrap().token).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn the_choice_is_the_argmax_of_logit_plus_noise() {
    let logits = [0.3, -1.0, 2.0, 1.5, 0.0, BAN];
    for seed in 0..40 {
        let mut sampler = sampler(6, |p| {
            plain(p);
            p.seed = seed;
        });
        for position in 0..40 {
            let value = |t: u32| logits[t as usize] + gumbel(seed, position, t);
            let want = (0..6).max_by(|&a, &b| value(a).total_cmp(&value(b))).unwrap();
            assert_eq!(
                sampler.choose(position, &logits).unwrap().token,
                want,
                "seed {seed} position {position}"
            );
        }
    }
}

#[test]
fn what_is_known_of_a_row_changes_nothing() {
    for (seed, temperature, bias) in [(1, 0.0, 0.0), (2, 0.0, 9.0), (3, 0.7, 0.0)] {
        let logits: Vec<f32> = (0..3000).map(|t| 2.0 * gumbel(77, seed, t)).collect();
        let best = (0..3000u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap();
        let log_sum = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        let known = Some(Known { token: best, log_sum });
        let mut sampler = sampler(3000, |p| {
            (p.temperature, p.seed, p.n_probs) = (temperature, seed, 3);
            if bias > 0.0 {
                p.logit_bias = vec![(5, bias)];
            }
        });
        for position in 0..20 {
            let want = sampler.choose(position, &logits).unwrap();
            assert_eq!(sampler.choose_known(position, &logits, known).unwrap(), want);
            let (want, got) = (
                sampler.propose(position, &logits).unwrap(),
                sampler.propose_known(position, &logits, known).unwrap(),
            );
            assert_eq!(got.token, want.token);
            assert!((got.q - want.q).abs() < 1e-5, "{} {}", got.q, want.q);
        }
    }
}

#[test]
fn skipping_hopeless_tokens_changes_no_choice() {
    // Flat enough that far-out noise wins at times, in a vocabulary where most tokens are skipped.
    for (seed, spread) in [(1, 0.01), (2, 1.0), (3, 4.0)] {
        let logits: Vec<f32> = (0..3000).map(|t| spread * gumbel(77, seed, t)).collect();
        let mut sampler = sampler(3000, |p| {
            plain(p);
            p.seed = seed;
        });
        for position in 0..300 {
            let value = |t: u32| f64::from(logits[t as usize]) + f64::from(gumbel(seed, position, t));
            let want = (0..3000).max_by(|&a, &b| value(a).total_cmp(&value(b))).unwrap();
            assert_eq!(
                sampler.choose(position, &logits).unwrap().token,
                want,
                "seed {seed} position {position}"
            );
        }
    }
}

#[test]
fn order_matters() {
    // Top-k 2 keeps tokens 0 and 1. Bans come first, always.
    let logits = [4.0, 3.9, 3.8, 3.7];
    let chain = |letters: &str| {
        let samplers = samplers::by_letters(letters).unwrap();
        let mut sampler = sampler(4, |p| {
            plain(p);
            (p.top_k, p.presence_penalty, p.samplers) = (2, 100.0, samplers);
        });
        sampler.accept_prompt(&[0]);
        support(&mut sampler, &logits)
    };
    assert_eq!(chain("ek"), [1, 2]); // punished out of the two
    assert_eq!(chain("ke"), [1]); // one of the two, and the other is punished
    assert_eq!(chain("k"), [0, 1]);
    assert_eq!(chain("e"), [1, 2, 3]);

    // Temperature before min-p flattens what min-p compares.
    let chain = |letters: &str| {
        let samplers = samplers::by_letters(letters).unwrap();
        let mut sampler = sampler(4, |p| {
            plain(p);
            (p.temperature, p.min_p, p.samplers) = (10.0, 0.9, samplers);
        });
        support(&mut sampler, &[1.0, 0.5, 0.0, -9.0])
    };
    assert_eq!(chain("tm"), [0, 1, 2]);
    assert_eq!(chain("mt"), [0]);
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_of_ties() {
    for edit in [greedy, |p: &mut SamplingParams| p.temperature = -2.0] {
        let mut sampler = sampler(5, edit);
        assert!(sampler.is_plain_argmax());
        assert_eq!(sampler.choose(3, &[1.0, 2.0, 5.0, 5.0, BAN]).unwrap().token, 2);
        assert_eq!(sampler.choose(3, &[0.0; 5]).unwrap().token, 0);
        assert_eq!(sampler.choose(3, &[-0.0, 0.0, 0.0, 0.0, 0.0]).unwrap().token, 0);
        assert_eq!(sampler.choose(3, &[BAN, BAN, BAN, BAN, -9.0]).unwrap().token, 4);
        assert_eq!(sampler.choose(3, &[f32::MIN, f32::MAX, 0.0, 0.0, 0.0]).unwrap().token, 1);
    }
    assert!(!sampler(5, |_| ()).is_plain_argmax());
    assert!(!sampler(5, |p| (p.temperature, p.presence_penalty) = (0.0, 1.0)).is_plain_argmax());
    assert!(!sampler(5, |p| (p.temperature, p.logit_bias) = (0.0, vec![(0, 1.0)])).is_plain_argmax());
    assert!(!sampler(5, |p| (p.temperature, p.n_probs) = (0.0, 1)).is_plain_argmax());
}

#[test]
fn bias_bans_and_lifts() {
    let logits = [3.0, 2.0, 1.0];
    let choose = |bias: &[(u32, f32)]| {
        let mut sampler = sampler(3, |p| (p.temperature, p.logit_bias) = (0.0, bias.to_vec()));
        let (chosen, proposed) = (sampler.choose(0, &logits), sampler.propose(0, &logits));
        assert_eq!(chosen.clone().map(|c| c.token), proposed.map(|p| p.token), "the drafter is biased too");
        chosen.map(|c| c.token)
    };
    assert_eq!(choose(&[(0, BAN)]), Ok(1));
    assert_eq!(choose(&[(0, BAN), (0, 50.0), (1, BAN)]), Ok(2));
    assert_eq!(choose(&[(2, 1.5), (2, 1.5)]), Ok(2));
    assert_eq!(choose(&[(0, BAN), (1, BAN), (2, BAN)]), Err(SampleError::NothingLeft { position: 0 }));
}

#[test]
fn rows_that_are_no_logits_are_errors_and_leave_the_sampler_well() {
    for edit in [greedy, plain, |_: &mut SamplingParams| ()] {
        let mut sampler = sampler(20, edit);
        let good: Vec<f32> = (0..20).map(|t| t as f32 / 3.0).collect();
        let before = sampler.choose(7, &good);
        for value in [f32::NAN, f32::INFINITY] {
            let mut bad = good.clone();
            (bad[13], bad[17]) = (value, value);
            let errors = [sampler.choose(7, &bad).unwrap_err(), sampler.propose(7, &bad).unwrap_err()];
            for error in errors {
                let shown = format!("position 7: expected finite logits, found {value} for token 13");
                assert_eq!(error.to_string(), shown);
            }
        }
        assert_eq!(sampler.choose(7, &[BAN; 20]), Err(SampleError::NothingLeft { position: 7 }));
        let short = SampleError::WrongWidth { position: 7, expected: 20, found: 19 };
        assert_eq!(sampler.choose(7, &good[..19]), Err(short));
        assert_eq!(sampler.choose(7, &good), before);
    }
}

#[test]
fn bad_settings_make_no_sampler() {
    let params = SamplingParams { top_p: f32::NAN, ..SamplingParams::default() };
    let refused = Sampler::new(params, 10, DryBreakers::default().into());
    assert!(matches!(refused, Err(ParamError::OutOfRange { field: "top_p", .. })));
}

#[test]
fn equal_logits_are_drawn_evenly_and_one_token_vocabularies_work() {
    let mut even = sampler(4, plain);
    let mut n = [0; 4];
    for position in 0..8000 {
        n[even.choose(position, &[1.0; 4]).unwrap().token as usize] += 1;
    }
    assert!(n.iter().all(|&n| (1800..2200).contains(&n)), "{n:?}");
    assert_eq!(sampler(1, |_| ()).choose(0, &[-3.0]).unwrap().token, 0);
}

#[test]
fn penalties_move_greedy_choices_along() {
    let mut sampler = sampler(3, |p| (p.temperature, p.presence_penalty) = (0.0, 1.5));
    let mut text = Vec::new();
    for position in 0..5 {
        let token = sampler.choose(position, &[2.0, 1.0, 0.9]).unwrap().token;
        sampler.accept(token);
        text.push(token);
    }
    assert_eq!(text, [0, 1, 2, 0, 0]);
    sampler.reset_history();
    assert_eq!(sampler.choose(0, &[2.0, 1.0, 0.9]).unwrap().token, 0);
}

#[test]
fn dry_breakers_reach_the_chain() {
    let text = [1, 2, 3, 1, 2];
    let choose = |breakers: DryBreakers| {
        let params = SamplingParams { temperature: 0.0, dry_multiplier: 5.0, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, 4, breakers.into()).unwrap();
        sampler.accept_prompt(&text);
        sampler.choose(5, &[0.0, 0.5, 0.0, 1.0]).unwrap().token
    };
    assert_eq!(choose(DryBreakers::default()), 1);
    assert_eq!(choose(DryBreakers::from_tokens([2])), 3);
}

#[test]
fn logprobs_before_sampling_are_the_models() {
    let logits = [1.0f32, 3.0, BAN, 2.0];
    let sum: f32 = logits.iter().map(|l| l.exp()).sum();
    for edit in [greedy, plain, |_: &mut SamplingParams| ()] {
        let mut sampler = sampler(4, |p| {
            edit(p);
            (p.n_probs, p.presence_penalty, p.logit_bias) = (2, 0.5, vec![(1, -0.5)]);
        });
        sampler.accept(1);
        let choice = sampler.choose(9, &logits).unwrap();
        let probs = choice.logprobs.unwrap();
        assert_eq!(probs.token, choice.token);
        assert!((probs.logprob - (logits[choice.token as usize].exp() / sum).ln()).abs() < 1e-5);
        let tokens: Vec<u32> = probs.top.iter().map(|&(token, _)| token).collect();
        assert_eq!(tokens, [1, 3], "neither penalty nor bias shows");
        assert!(probs.top.iter().all(|&(t, lp)| (lp - (logits[t as usize].exp() / sum).ln()).abs() < 1e-5));
        let forced = sampler.forced(9, 0, &logits).unwrap();
        assert_eq!(forced.token, 0);
        assert!((forced.logprobs.unwrap().logprob - (1f32.exp() / sum).ln()).abs() < 1e-5);
    }
    assert_eq!(sampler(4, plain).choose(9, &logits).unwrap().logprobs, None);
}

#[test]
fn logprobs_after_sampling_are_what_the_token_was_drawn_from() {
    let mut sampler = sampler(4, |p| {
        plain(p);
        (p.temperature, p.top_k, p.n_probs, p.post_sampling_probs) = (0.5, 2, 4, true);
    });
    let choice = sampler.choose(1, &[1.0, 3.0, 0.0, 2.5]).unwrap();
    let probs = choice.logprobs.unwrap();
    let p = 1.0 / (1.0 + (-1.0f32).exp());
    let found: Vec<(u32, f32)> = probs.top.iter().map(|&(token, lp)| (token, lp.exp())).collect();
    assert_eq!(found.len(), 2);
    assert!(found[0].0 == 1 && (found[0].1 - p).abs() < 1e-6, "{found:?}");
    assert!(found[1].0 == 3 && (found[1].1 - (1.0 - p)).abs() < 1e-6, "{found:?}");
    assert_eq!(probs.logprob, probs.top.iter().find(|&&(token, _)| token == choice.token).unwrap().1);

    let mut sampler =
        self::sampler(2, |p| (p.temperature, p.n_probs, p.post_sampling_probs) = (0.0, 2, true));
    let probs = sampler.choose(1, &[1.0, 3.0]).unwrap().logprobs.unwrap();
    assert_eq!((probs.token, probs.logprob, probs.top), (1, 0.0, vec![(1, 0.0)]));
}

#[test]
fn a_proposals_q_is_its_probability() {
    let logits = [1.0f32, 3.0, 0.0, 2.5];
    let sum: f32 = logits.iter().map(|l| l.exp()).sum();
    for edit in [greedy, plain] {
        let proposal = sampler(4, edit).propose(3, &logits).unwrap();
        assert!((proposal.q - logits[proposal.token as usize].exp() / sum).abs() < 1e-6, "{proposal:?}");
    }
    assert_eq!(sampler(4, |p| p.top_k = 1).propose(3, &logits).unwrap().q, 1.0);
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let off_or = |off: f32, on: std::ops::Range<f32>| prop_oneof![Just(off), on];
    let cuts = (
        prop_oneof![Just(0), 1..40],
        off_or(1.0, 0.1..1.0),
        off_or(0.0, 0.01..0.9),
        off_or(1.0, 0.2..1.0),
        off_or(-1.0, 0.2..3.0),
        off_or(0.0, 0.0..1.0),
        0u32..4,
    );
    let penalties = (
        off_or(1.0, 0.8..1.5),
        off_or(0.0, -0.5..1.5),
        off_or(0.0, 0.0..1.0),
        off_or(0.0, 0.1..2.0),
        prop_oneof![Just(0), Just(-1), Just(5), Just(64)],
    );
    let rest = (
        prop_oneof![Just(0.0f32), Just(1.0), 0.2f32..2.0],
        off_or(0.0, 0.1..1.0),
        any::<u64>(),
        Just(SamplingParams::default().samplers).prop_shuffle(),
        prop::collection::vec((0u32..60, prop_oneof![Just(BAN), -2.0f32..2.0]), 0..3),
        prop_oneof![Just((0, false)), Just((3, false)), Just((3, true))],
    );
    (cuts, penalties, rest).prop_map(|(cuts, penalties, rest)| {
        let mut p = SamplingParams::default();
        (p.top_k, p.top_p, p.min_p, p.typical_p, p.top_n_sigma, p.xtc_probability, p.min_keep) = cuts;
        (p.repeat_penalty, p.presence_penalty, p.frequency_penalty, p.dry_multiplier, p.repeat_last_n) =
            penalties;
        (
            p.temperature,
            p.dynatemp_range,
            p.seed,
            p.samplers,
            p.logit_bias,
            (p.n_probs, p.post_sampling_probs),
        ) = rest;
        p.dry_penalty_last_n = p.repeat_last_n;
        p
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The engine asks again after a rejected draft, in other groups, from a restored clone: always the same.
    #[test]
    fn a_choice_depends_on_nothing_but_its_inputs(
        params in any_params(),
        text in prop::collection::vec(0u32..60, 0..80),
        rows in prop::collection::vec(prop::collection::vec(-6.0f32..6.0, 60), 1..4),
    ) {
        let mut sampler = Sampler::new(params.clone(), 60, DryBreakers::from_tokens([7]).into()).unwrap();
        sampler.accept_prompt(&text);
        let once: Vec<_> = (0u64..).zip(&rows).map(|(i, row)| sampler.choose(i, row)).collect();
        for i in (0..rows.len() as u64).rev() {
            let row = &rows[i as usize];
            let _ = sampler.propose(i, row);
            let _ = sampler.choose(i + 9, row);
            prop_assert_eq!(&sampler.choose(i, row), &once[i as usize]);
        }
        // Token by token in a fresh one, with rows in between that choose and commit nothing.
        let mut other = Sampler::new(params, 60, DryBreakers::from_tokens([7]).into()).unwrap();
        for &token in &text {
            let _ = other.choose(3, &rows[0]);
            other.accept(token);
        }
        for (i, row) in (0u64..).zip(&rows) {
            prop_assert_eq!(&other.clone().choose(i, row), &once[i as usize]);
        }
    }

    /// Equal rows, equal tokens: a perfect drafter is always accepted, at any temperature.
    #[test]
    fn a_drafter_with_the_targets_logits_proposes_the_choice(
        params in any_params(),
        text in prop::collection::vec(0u32..60, 0..80),
        row in prop::collection::vec(-6.0f32..6.0, 60),
        position in any::<u64>(),
    ) {
        let mut sampler = Sampler::new(params, 60, DryBreakers::default().into()).unwrap();
        sampler.accept_prompt(&text);
        let chosen = sampler.choose(position, &row).map(|c| c.token);
        let proposed = sampler.propose(position, &row);
        if let Ok(proposal) = &proposed {
            prop_assert!((0.0..=1.0).contains(&proposal.q), "{:?}", proposal);
        }
        prop_assert_eq!(proposed.map(|p| p.token), chosen);
    }

    /// The shortcut of greedy against the whole chain, run to its end: the same settings with a temperature so
    /// low that noise can't turn any order of distinct logits, and with logprobs, which must change nothing.
    #[test]
    fn greedy_shortcuts_choose_what_the_whole_chain_chooses(
        mut params in any_params(),
        text in prop::collection::vec(0u32..60, 0..80),
        ranks in Just((0..60).collect::<Vec<u8>>()).prop_shuffle(),
    ) {
        let row: Vec<f32> = ranks.iter().map(|&rank| f32::from(rank) / 7.0).collect();
        params.temperature = 0.0;
        params.dynatemp_range = 0.0;
        // Where temperature 0 comes before a sampler it leaves one token, as a low temperature would.
        params.samplers.retain(|kind| kind.name != "temperature");
        params.samplers.push(samplers::by_name("temperature").unwrap());
        let whole = SamplingParams { temperature: 1e-7, ..params.clone() };
        let unreported = SamplingParams { n_probs: 0, ..params.clone() };
        let [greedy, whole, unreported] = [params, whole, unreported].map(|params| {
            let mut sampler = Sampler::new(params, 60, DryBreakers::default().into()).unwrap();
            sampler.accept_prompt(&text);
            sampler.choose(5, &row).map(|c| c.token)
        });
        prop_assert_eq!(&greedy, &whole);
        prop_assert_eq!(&greedy, &unreported);
    }
}
