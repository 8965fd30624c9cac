//! Min-p: keeps tokens with at least `min_p` times the likeliest token's probability.
//!
//! On logits that is `l >= max + ln(min_p)`, no softmax needed ("Turning Up the Heat: Min-p Sampling", Nguyen et
//! al., 2024).

use super::{Moment, SamplerKind};
use crate::candidates::Candidates;

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "min_p",
    aliases: &[],
    letter: 'm',
    keeps_argmax: true,
    is_active: |params| params.min_p > 0.0,
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let Some((_, max)) = candidates.argmax() else { return };
    let floor = max + moment.params.min_p.ln();
    let min_keep = moment.params.min_keep as usize;
    if candidates.logits().filter(|&l| l >= floor).take(min_keep).count() < min_keep {
        candidates.keep_top(min_keep);
    } else {
        candidates.retain_logit(floor.max(f32::MIN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row, sorted_probs, tokens};
    use proptest::prelude::*;

    fn check(min_p: f32, min_keep: u32, probs: &[f32], expected: &[u32]) {
        let params = SamplingParams { min_p, min_keep, ..SamplingParams::default() };
        let logits: Vec<f32> = probs.iter().map(|p| p.ln()).collect();
        assert_eq!(tokens(apply(&KIND, &params, 0, &logits)), expected, "{min_p} {probs:?}");
    }

    #[test]
    fn examples() {
        check(0.0, 0, &[0.1, 0.4, 0.3, 0.2], &[0, 1, 2, 3]);
        check(0.2, 0, &[0.1, 0.4, 0.3, 0.2], &[0, 1, 2, 3]);
        check(0.26, 0, &[0.1, 0.4, 0.3, 0.2], &[1, 2, 3]);
        check(0.74, 0, &[0.1, 0.4, 0.3, 0.2], &[1, 2]);
        check(0.76, 0, &[0.1, 0.4, 0.3, 0.2], &[1]);
        check(0.76, 3, &[0.1, 0.4, 0.3, 0.2], &[1, 2, 3]);
        check(1.0, 0, &[0.4, 0.4, 0.2], &[0, 1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(row in row(), min_p in 0.001f64..1.0, min_keep in 0usize..5) {
            let probs = sorted_probs(&row);
            prop_assume!(probs.iter().all(|&(_, p)| (p / probs[0].1 - min_p).abs() > 1e-5));
            let n = probs.iter().filter(|&&(_, p)| p >= min_p * probs[0].1).count().max(min_keep);
            let params = SamplingParams { min_p: min_p as f32, min_keep: min_keep as u32, ..SamplingParams::default() };
            prop_assert_eq!(tokens(apply(&KIND, &params, 0, &row)), tokens(probs.into_iter().take(n)));
        }
    }
}
