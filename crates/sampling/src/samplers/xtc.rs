//! XTC ("exclude top choices"): sometimes removes every likely token but the least likely of them.
//!
//! With chance `xtc_probability` at each position: of the tokens with at least `xtc_threshold` probability, all but
//! the last are removed, so what is left is still plausible. The coin is a function of seed and position, on a
//! stream apart from the Gumbel noise. Idea: p-e-w, text-generation-webui PR 6335.

use super::{Moment, SamplerKind};
use crate::candidates::{Candidate, Candidates};
use crate::noise::{PositionNoise, XTC_STREAM};

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "xtc",
    aliases: &[],
    letter: 'x',
    keeps_argmax: false,
    // Above one half there can't be two top choices.
    is_active: |params| params.xtc_probability > 0.0 && params.xtc_threshold <= 0.5,
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let params = moment.params;
    let coin = PositionNoise::new(params.seed, moment.position).uniform(XTC_STREAM);
    if coin > f64::from(params.xtc_probability) {
        return;
    }
    let threshold = params.xtc_threshold;
    let list = candidates.softmax();
    let top = list.iter().filter(|c| c.p >= threshold);
    let n_removed = top.clone().count().saturating_sub(1);
    let Some(last) = top.max_by(|a, b| Candidate::likelier(a, b)).map(|c| c.token) else { return };
    if list.len() - n_removed >= params.min_keep as usize {
        list.retain(|c| c.p < threshold || c.token == last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row, sorted_probs, tokens};
    use proptest::prelude::*;

    fn params(xtc_probability: f32, xtc_threshold: f32, min_keep: u32) -> SamplingParams {
        SamplingParams { xtc_probability, xtc_threshold, min_keep, ..SamplingParams::default() }
    }

    fn check(params: &SamplingParams, probs: &[f32], expected: &[u32]) {
        let logits: Vec<f32> = probs.iter().map(|p| p.ln()).collect();
        assert_eq!(tokens(apply(&KIND, params, 0, &logits)), expected, "{probs:?}");
    }

    #[test]
    fn examples() {
        let probs = [0.1, 0.4, 0.3, 0.2];
        check(&params(1.0, 0.15, 0), &probs, &[0, 3]);
        check(&params(1.0, 0.25, 0), &probs, &[0, 2, 3]);
        check(&params(1.0, 0.35, 0), &probs, &[0, 1, 2, 3]);
        check(&params(1.0, 0.01, 0), &probs, &[0]);
        check(&params(1.0, 0.15, 3), &probs, &[0, 1, 2, 3]); // two would be left
        check(&params(1.0, 0.15, 2), &probs, &[0, 3]);
        check(&params(0.0, 0.15, 0), &probs, &[0, 1, 2, 3]);
        check(&params(1.0, 0.51, 0), &probs, &[0, 1, 2, 3]);
        check(&params(1.0, 0.1, 0), &[1.0], &[0]);
        check(&params(1.0, 0.2, 0), &[0.25, 0.25, 0.25, 0.25], &[3]);
    }

    #[test]
    fn the_coin_follows_its_chance_seed_and_position() {
        let logits = [1.0, 1.0, 0.0];
        let fires = |seed, position| {
            let params = SamplingParams { seed, ..params(0.3, 0.2, 0) };
            apply(&KIND, &params, position, &logits).len() == 2
        };
        let by_position: Vec<bool> = (0..4000).map(|position| fires(1, position)).collect();
        let n = by_position.iter().filter(|&&fired| fired).count();
        assert!((1060..1340).contains(&n), "{n} of 4000 at 0.3");
        assert_eq!(by_position, (0..4000).map(|position| fires(1, position)).collect::<Vec<_>>());
        assert_ne!(by_position, (0..4000).map(|position| fires(2, position)).collect::<Vec<_>>());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(row in row(), threshold in 0.001f64..0.5) {
            let probs = sorted_probs(&row);
            prop_assume!(probs.iter().all(|&(_, p)| (p - threshold).abs() > 1e-6));
            let n_top = probs.iter().filter(|&&(_, p)| p >= threshold).count();
            let left = probs.into_iter().skip(n_top.saturating_sub(1));
            prop_assert_eq!(tokens(apply(&KIND, &params(1.0, threshold as f32, 0), 0, &row)), tokens(left));
        }
    }
}
