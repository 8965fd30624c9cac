//! Gumbel-max draws follow the chain's distribution, and the drafter's draws are coupled to the target's.

use paceline_sampling::{DryBreakers, Sampler, SamplingParams, noise::gumbel};

fn sampler(n_vocab: usize, edit: impl FnOnce(&mut SamplingParams)) -> Sampler {
    let mut params =
        SamplingParams { top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..Default::default() };
    edit(&mut params);
    Sampler::new(params, n_vocab, DryBreakers::default().into()).unwrap()
}

/// What the chain leaves of these logits, as probabilities, computed apart from the crate.
fn softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|l| l.exp()).sum();
    logits.iter().map(|l| l.exp() / sum).collect()
}

const N_DRAWS: u64 = 200_000;

/// `draw` over fixed seeds against `expected`; the bound is the 99.99th percentile for 7 degrees of freedom.
fn check(name: &str, expected: &[f64], mut draw: impl FnMut(u64) -> u32) {
    let mut n = vec![0u64; expected.len()];
    (0..N_DRAWS).for_each(|i| n[draw(i) as usize] += 1);
    let mut chi2 = 0.0;
    for (&n, &p) in n.iter().zip(expected) {
        if p == 0.0 {
            assert_eq!(n, 0, "{name}: a token outside the support was drawn");
            continue;
        }
        let want = p * N_DRAWS as f64;
        chi2 += (n as f64 - want).powi(2) / want;
    }
    println!("{name}: chi-square {chi2:.2}");
    assert!(chi2 < 29.9, "{name}: chi-square {chi2} of {n:?} against {expected:?}");
}

const LOGITS: [f32; 8] = [0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 1.9];

fn kept(tokens: &[usize], temperature: f64) -> Vec<f64> {
    let logit = |t: usize| f64::from(LOGITS[t]) / temperature;
    let left: Vec<f64> =
        (0..8).map(|t| if tokens.contains(&t) { logit(t) } else { f64::NEG_INFINITY }).collect();
    softmax(&left)
}

#[test]
fn draws_follow_the_chains_distribution() {
    let all = [0, 1, 2, 3, 4, 5, 6, 7];
    let mut s = sampler(8, |p| p.seed = 11);
    check("over positions", &kept(&all, 1.0), |i| s.choose(i, &LOGITS).unwrap().token);
    let mut s = sampler(8, |p| (p.seed, p.temperature) = (12, 0.6));
    check("temperature 0.6", &kept(&all, 0.6), |i| s.choose(i, &LOGITS).unwrap().token);
    let mut s = sampler(8, |p| (p.seed, p.temperature, p.top_k) = (13, 1.7, 4));
    check("top-k 4, temperature 1.7", &kept(&[1, 2, 5, 7], 1.7), |i| s.choose(i, &LOGITS).unwrap().token);
    let mut s = sampler(8, |p| (p.seed, p.min_p) = (14, 0.3));
    check("min-p 0.3", &kept(&[1, 2, 5, 7], 1.0), |i| s.choose(i, &LOGITS).unwrap().token);
    let mut s = sampler(8, |p| (p.seed, p.logit_bias) = (15, vec![(2, f32::NEG_INFINITY)]));
    check("a ban", &kept(&[0, 1, 3, 4, 5, 6, 7], 1.0), |i| s.propose(i, &LOGITS).unwrap().token);
    check("over seeds", &kept(&all, 1.0), |seed| {
        sampler(8, |p| p.seed = seed).choose(5, &LOGITS).unwrap().token
    });
}

#[test]
fn neighbouring_positions_are_drawn_independently() {
    let mut s = sampler(2, |p| p.seed = 21);
    let [p, q] = [0.5, 0.25].map(|p: f64| ((p / (1.0 - p)).ln()) as f32);
    check("pairs", &[0.375, 0.125, 0.375, 0.125], |i| {
        let first = s.choose(2 * i, &[0.0, p]).unwrap().token;
        let second = s.choose(2 * i + 1, &[0.0, q]).unwrap().token;
        2 * first + second
    });
}

#[test]
fn xtcs_coin_does_not_bias_the_draw() {
    // Fair coin: half the time tokens 1 and 2 are out (token 0 stays as the last of the top), else nothing is.
    let logits: [f32; 4] = [0.3f32.ln(), 0.31f32.ln(), 0.32f32.ln(), 0.07f32.ln()];
    let rest = 0.3 + 0.07;
    let expected = [0.15 + 0.5 * 0.3 / rest, 0.155, 0.16, 0.035 + 0.5 * 0.07 / rest];
    let mut s = sampler(4, |p| (p.seed, p.xtc_probability, p.xtc_threshold) = (31, 0.5, 0.1));
    check("xtc", &expected, |i| s.choose(i, &logits).unwrap().token);
}

/// A target row and a drafter's row: the same normal scores plus independent error on the drafter's side.
fn rows(case: u64, n_vocab: u32, spread: f32, error: f32) -> (Vec<f32>, Vec<f32>) {
    // The difference of two Gumbels is logistic: bell-shaped enough.
    let bell = |stream: u64, t: u32| gumbel(case, stream, t) - gumbel(case, stream + 1, t);
    let p: Vec<f32> = (0..n_vocab).map(|t| spread * bell(1 << 40, t)).collect();
    let q = (0..n_vocab).map(|t| p[t as usize] + error * bell(1 << 41, t)).collect();
    (p, q)
}

/// Mean over cases of: coupled agreement, Σ q·p, Σ min(p, q), and the coupling's guarantee.
fn acceptance(error: f32, temperature: f32) -> [f64; 4] {
    let (n_case, n_draw, n_vocab) = (20, 2000, 500);
    let mut sum = [0.0; 4];
    for case in 0..n_case {
        let (p_row, q_row) = rows(case, n_vocab, 1.2, error);
        let mut s = sampler(n_vocab as usize, |p| (p.seed, p.temperature) = (case, temperature));
        let agreed = (0..n_draw)
            .filter(|&i| s.propose(i, &q_row).unwrap().token == s.choose(i, &p_row).unwrap().token)
            .count();
        let probs = |row: &[f32]| {
            softmax(&row.iter().map(|&l| f64::from(l) / f64::from(temperature)).collect::<Vec<_>>())
        };
        let (p, q) = (probs(&p_row), probs(&q_row));
        let overlap: f64 = p.iter().zip(&q).map(|(p, q)| p.min(*q)).sum();
        sum[0] += agreed as f64 / n_draw as f64;
        sum[1] += p.iter().zip(&q).map(|(p, q)| p * q).sum::<f64>();
        sum[2] += overlap;
        sum[3] += overlap / (2.0 - overlap);
    }
    sum.map(|s| s / n_case as f64)
}

#[test]
fn common_noise_couples_drafter_and_target() {
    for (error, temperature) in [(0.1, 1.0), (0.3, 1.0), (0.6, 1.0), (0.3, 0.7)] {
        let [coupled, independent, overlap, guarantee] = acceptance(error, temperature);
        println!(
            "error {error}, temperature {temperature}: coupled {coupled:.3}, Σqp {independent:.3}, \
             Σmin(p,q) {overlap:.3}, guarantee (1-d)/(1+d) {guarantee:.3}"
        );
        // 40 000 draws: a standard error of 0.0025. No coupling can exceed the overlap.
        assert!(coupled > guarantee - 0.01 && coupled < overlap + 0.01);
        assert!(coupled > independent + 0.5 * (overlap - independent), "the coupling gains little");
    }
}

#[test]
fn seeds_reproduce_and_differ() {
    let text = |seed| -> Vec<u32> {
        let mut s = sampler(8, |p| p.seed = seed);
        (0..64).map(|i| s.choose(i, &LOGITS).unwrap().token).collect()
    };
    assert_eq!(text(1), text(1));
    let texts: std::collections::HashSet<_> =
        (0..200).chain([u64::MAX, 1 << 32, 1 << 63]).map(text).collect();
    assert_eq!(texts.len(), 203);
}
