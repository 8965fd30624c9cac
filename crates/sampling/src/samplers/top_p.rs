//! Top-p, or nucleus: keeps the fewest likeliest tokens whose mass reaches `p` (Holtzman et al., 2019).

use super::{Moment, SamplerKind};
use crate::candidates::{Candidate, Candidates};

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "top_p",
    aliases: &["nucleus"],
    letter: 'p',
    keeps_argmax: true,
    is_active: |params| params.top_p < 1.0,
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let (top_p, min_keep) = (f64::from(moment.params.top_p), moment.params.min_keep as usize);
    candidates.softmax();
    candidates.keep_head(Candidate::likelier, |i, mass| mass >= top_p && i + 1 >= min_keep);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row, sorted_probs, tokens};
    use proptest::prelude::*;

    fn check(top_p: f32, min_keep: u32, probs: &[f32], expected: &[u32]) {
        let params = SamplingParams { top_p, min_keep, ..SamplingParams::default() };
        let logits: Vec<f32> = probs.iter().map(|p| p.ln()).collect();
        assert_eq!(tokens(apply(&KIND, &params, 0, &logits)), expected, "{top_p} {probs:?}");
    }

    #[test]
    fn examples() {
        check(0.0, 0, &[0.1, 0.4, 0.3, 0.2], &[1]);
        check(0.39, 0, &[0.1, 0.4, 0.3, 0.2], &[1]);
        check(0.41, 0, &[0.1, 0.4, 0.3, 0.2], &[1, 2]);
        check(0.69, 0, &[0.1, 0.4, 0.3, 0.2], &[1, 2]);
        check(0.71, 0, &[0.1, 0.4, 0.3, 0.2], &[1, 2, 3]);
        check(0.39, 3, &[0.1, 0.4, 0.3, 0.2], &[1, 2, 3]);
        check(0.4, 0, &[0.25, 0.25, 0.25, 0.25], &[0, 1]);
        check(1.0, 0, &[0.1, 0.9], &[0, 1]);
        check(0.9, 0, &[0.0, 1.0], &[1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(row in row(), top_p in 0.0f64..0.999, min_keep in 0usize..5) {
            let probs = sorted_probs(&row);
            let (mut mass, mut n) = (0.0, 0);
            for &(_, p) in &probs {
                mass += p;
                n += 1;
                prop_assume!((mass - top_p).abs() > 1e-5);
                if mass >= top_p && n >= min_keep {
                    break;
                }
            }
            let params = SamplingParams { top_p: top_p as f32, min_keep: min_keep as u32, ..SamplingParams::default() };
            prop_assert_eq!(tokens(apply(&KIND, &params, 0, &row)), tokens(probs.into_iter().take(n)));
        }
    }
}
