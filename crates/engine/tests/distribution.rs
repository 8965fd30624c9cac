//! Speculative output is distributed as plain sampling is, whatever the drafter does: a drafter that insists on the
//! least likely token must not make it likelier, and one that shares the noise must not sharpen anything.

mod world;

use paceline_engine::{Request, RequestId};
use paceline_sampling::SamplingParams;
use paceline_testkit::{Accept, HashModel, Lie, Scripted, liar, oracle};
use world::{Sizes, World};

/// Eight tokens, from 1 in 2.4 down to 1 in 130.
const LOGITS: [f32; 8] = [0.3, 2.0, -1.0, 1.2, 0.0, -2.0, 0.9, -0.4];
const N_REQUEST: u64 = 1500;
const N_PREDICT: usize = 80;

/// What is expected of each token after `temperature` and `top_k`.
fn expected(temperature: f64, top_k: usize) -> Vec<f64> {
    let mut order: Vec<usize> = (0..LOGITS.len()).collect();
    order.sort_by(|&a, &b| LOGITS[b].total_cmp(&LOGITS[a]));
    let mut p = vec![0.0; LOGITS.len()];
    order.iter().take(top_k).for_each(|&v| p[v] = (f64::from(LOGITS[v]) / temperature).exp());
    let sum: f64 = p.iter().sum();
    p.iter().map(|p| p / sum).collect()
}

/// `Σ (seen - expected)² / expected`; what is impossible must not have been seen.
fn chi_square(seen: &[f64], p: &[f64]) -> f64 {
    let n: f64 = seen.iter().sum();
    let term = |(&seen, &p): (&f64, &f64)| {
        assert!(p > 0.0 || seen == 0.0, "{seen} draws of an impossible token");
        if p > 0.0 { (seen - n * p).powi(2) / (n * p) } else { 0.0 }
    };
    seen.iter().zip(p).map(term).sum()
}

/// All tokens drawn, request by request.
fn draw(drafter: Option<Scripted>, temperature: f32, top_k: i32) -> Vec<Vec<u32>> {
    let sizes = Sizes { n_slot: 8, n_draft_max: 4, page_len: 64, ..Sizes::ROOMY };
    let mut world = World::new(HashModel::constant(&LOGITS), drafter, sizes);
    let plain = SamplingParams { temperature, top_k, top_p: 1.0, min_p: 0.0, ..SamplingParams::default() };
    let mut answers = Vec::new();
    for first in (0..N_REQUEST).step_by(100) {
        let ids = first..first + 100;
        for id in ids.clone() {
            let sampling = SamplingParams { seed: id, ..plain.clone() };
            let request =
                Request { sampling, n_predict: Some(N_PREDICT), ..Request::new(RequestId(id), vec![0]) };
            world.submit(request).expect("a valid request");
        }
        world.run();
        answers.extend(ids.map(|id| world.told.remove(&RequestId(id)).expect("told").ids()));
    }
    world.check();
    answers
}

fn check(temperature: f32, top_k: i32) {
    let model = HashModel::constant(&LOGITS);
    let p = expected(f64::from(temperature), if top_k > 0 { top_k as usize } else { LOGITS.len() });
    let pairs: Vec<f64> = p.iter().flat_map(|a| p.iter().map(move |b| a * b)).collect();
    let plain = draw(None, temperature, top_k);
    let drafters: [(&str, Option<Scripted>); 5] = [
        ("none", None),
        ("the least likely token", Some(liar(model.clone(), 4, &[Lie::Unlikely], 1))),
        ("the same noise", Some(liar(model.clone(), 4, &[Lie::SharedNoise], 2))),
        ("random tokens", Some(liar(model.clone(), 4, &[Lie::Random], 3))),
        ("the truth in part", Some(oracle(model, 4, Accept::Varying, 4))),
    ];
    for (name, drafter) in drafters {
        let drawn = if name == "none" { plain.clone() } else { draw(drafter, temperature, top_k) };
        assert_eq!(drawn, plain, "{name}: each seed gives the text that it gives without a drafter");
        let (mut ones, mut twos) = (vec![0.0; 8], vec![0.0; 64]);
        for tokens in &drawn {
            tokens.iter().for_each(|&t| ones[t as usize] += 1.0);
            tokens.chunks_exact(2).for_each(|t| twos[(t[0] * 8 + t[1]) as usize] += 1.0);
        }
        assert_eq!(ones.iter().sum::<f64>() as u64, N_REQUEST * N_PREDICT as u64);
        // Chance alone exceeds these once in a million runs (7 and 63 degrees of freedom).
        let (one, two) = (chi_square(&ones, &p), chi_square(&twos, &pairs));
        assert!(one < 40.5 && two < 128.0, "{name}: chi-square {one} of tokens, {two} of pairs");
    }
}

#[test]
fn speculation_does_not_change_the_distribution() {
    check(1.0, 0);
}

#[test]
fn nor_behind_temperature_and_top_k() {
    check(0.8, 5);
}
