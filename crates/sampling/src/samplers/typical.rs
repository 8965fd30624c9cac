//! Locally typical sampling: keeps the tokens whose surprise is nearest to the expected one.
//!
//! With entropy `H = -Σ p ln p`, candidates are taken in order of `|-ln p - H|` until their mass exceeds
//! `typical_p` ("Locally Typical Sampling", Meister et al., 2022). The likeliest token may be among the removed.

use super::{Moment, SamplerKind};
use crate::candidates::{Candidate, Candidates};

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "typ_p",
    aliases: &["typical_p", "typical", "typ"],
    letter: 'y',
    keeps_argmax: false,
    is_active: |params| params.typical_p < 1.0,
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let list = candidates.softmax();
    let live = list.iter().filter(|c| c.p > 0.0);
    let entropy = -live.map(|c| f64::from(c.p) * f64::from(c.p).ln()).sum::<f64>();
    for c in list.iter_mut() {
        c.key = (-f64::from(c.p).ln() - entropy).abs() as f32; // infinite, so last, where p underflowed
    }
    let (typical_p, min_keep) = (f64::from(moment.params.typical_p), moment.params.min_keep as usize);
    candidates.keep_head(
        |a: &Candidate, b: &Candidate| a.key.total_cmp(&b.key).then(a.token.cmp(&b.token)),
        |i, mass| mass > typical_p && i + 1 >= min_keep,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row, sorted_probs, tokens};
    use proptest::prelude::*;

    fn check(typical_p: f32, min_keep: u32, probs: &[f32], expected: &[u32]) {
        let params = SamplingParams { typical_p, min_keep, ..SamplingParams::default() };
        let logits: Vec<f32> = probs.iter().map(|p| p.ln()).collect();
        assert_eq!(tokens(apply(&KIND, &params, 0, &logits)), expected, "{typical_p} {probs:?}");
    }

    #[test]
    fn examples() {
        // H = 1.1; surprises 0.69, 1.39, 2.08, 2.08.
        check(0.2, 0, &[0.5, 0.25, 0.13, 0.12], &[1]);
        check(0.5, 0, &[0.5, 0.25, 0.13, 0.12], &[0, 1]);
        check(0.2, 3, &[0.5, 0.25, 0.13, 0.12], &[0, 1, 2]);
        check(1.0, 0, &[0.5, 0.25, 0.13, 0.12], &[0, 1, 2, 3]);
        check(0.5, 0, &[1.0], &[0]);
        check(0.0, 0, &[0.0, 0.6, 0.4], &[1]); // H = 0.67; surprises 0.51, 0.92
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(row in row(), typical_p in 0.05f64..0.99, min_keep in 0usize..5) {
            let mut probs = sorted_probs(&row);
            let entropy: f64 = -probs.iter().map(|&(_, p)| p * p.ln()).sum::<f64>();
            let key = |p: f64| (-p.ln() - entropy).abs();
            probs.sort_by(|a, b| key(a.1).total_cmp(&key(b.1)));
            prop_assume!(probs.windows(2).all(|w| key(w[1].1) - key(w[0].1) > 1e-5));
            let (mut mass, mut n) = (0.0, 0);
            for &(_, p) in &probs {
                mass += p;
                n += 1;
                prop_assume!((mass - typical_p).abs() > 1e-5);
                if mass > typical_p && n >= min_keep {
                    break;
                }
            }
            let params =
                SamplingParams { typical_p: typical_p as f32, min_keep: min_keep as u32, ..SamplingParams::default() };
            prop_assert_eq!(tokens(apply(&KIND, &params, 0, &row)), tokens(probs.into_iter().take(n)));
        }
    }
}
