//! Temperature: `l' = l / T`; at 0 only the likeliest stays.
//!
//! With `dynatemp_range` r, T follows the candidates' entropy H relative to its maximum: between `T-r` (not below
//! 0) for a certain distribution and `T+r` for a flat one,
//!
//! ```text
//! T = lo + (hi - lo) · (H / ln n)^exponent
//! ```
//!
//! (Entropix-style dynamic temperature as in llama.cpp.) The maximum is subtracted before dividing, which changes
//! no distribution and keeps a tiny T from overflowing.

use super::{Moment, SamplerKind};
use crate::candidates::Candidates;

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "temperature",
    aliases: &["temp"],
    letter: 't',
    keeps_argmax: true,
    is_active: |params| params.is_greedy() || params.temperature != 1.0 || params.dynatemp_range > 0.0,
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let params = moment.params;
    let mut temperature = f64::from(params.temperature);
    let n = candidates.list().len();
    if params.dynatemp_range > 0.0 && !params.is_greedy() && n > 1 {
        let range = f64::from(params.dynatemp_range);
        let (low, high) = ((temperature - range).max(0.0), temperature + range);
        let live = candidates.softmax().iter().map(|c| f64::from(c.p)).filter(|&p| p > 0.0);
        let entropy = -live.map(|p| p * p.ln()).sum::<f64>();
        let share = (entropy / (n as f64).ln()).clamp(0.0, 1.0);
        temperature = low + (high - low) * share.powf(f64::from(params.dynatemp_exponent));
    }
    if temperature <= 0.0 {
        candidates.keep_top(1);
        return;
    }
    let Some((_, max)) = candidates.argmax() else { return };
    for c in candidates.list() {
        c.logit = ((f64::from(c.logit) - f64::from(max)) / temperature) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row, sorted_probs};
    use proptest::prelude::*;

    fn check(edit: impl FnOnce(&mut SamplingParams), logits: &[f32], expected: &[(u32, f32)]) {
        let mut params = SamplingParams::default();
        edit(&mut params);
        let found = apply(&KIND, &params, 0, logits);
        let close =
            |(a, b): (&(u32, f32), &(u32, f32))| a.0 == b.0 && (a.1 == b.1 || (a.1 - b.1).abs() < 1e-5);
        assert!(
            found.len() == expected.len() && found.iter().zip(expected).all(close),
            "{found:?} {expected:?}"
        );
    }

    #[test]
    fn examples() {
        check(|p| p.temperature = 2.0, &[1.0, 3.0, -1.0], &[(0, -1.0), (1, 0.0), (2, -2.0)]);
        check(|p| p.temperature = 0.5, &[1.0, 3.0], &[(0, -4.0), (1, 0.0)]);
        check(|p| p.temperature = 0.0, &[1.0, 3.0, 3.0], &[(1, 3.0)]);
        check(|p| p.temperature = -1.0, &[1.0, 3.0, 3.0], &[(1, 3.0)]);
        check(|p| p.temperature = 1.0, &[1.0, 3.0], &[(0, 1.0), (1, 3.0)]);
        check(|p| p.temperature = 1e-38, &[3e38, 3e38, 0.0], &[(0, 0.0), (1, 0.0), (2, f32::NEG_INFINITY)]);
        // A flat distribution gets T + r, a certain one T - r.
        check(|p| (p.temperature, p.dynatemp_range) = (1.5, 0.5), &[1.0, 1.0], &[(0, 0.0), (1, 0.0)]);
        check(|p| (p.temperature, p.dynatemp_range) = (1.5, 0.5), &[50.0, 0.0], &[(0, 0.0), (1, -50.0)]);
        check(|p| (p.temperature, p.dynatemp_range) = (0.5, 2.0), &[90.0, 0.0], &[(0, 90.0)]);
        check(|p| (p.temperature, p.dynatemp_range) = (0.0, 2.0), &[1.0, 1.0], &[(0, 1.0)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(
            row in row(), temperature in 0.1f64..3.0, range in 0.0f64..2.0, exponent in 0.2f64..3.0,
        ) {
            let probs = sorted_probs(&row);
            prop_assume!(probs.len() > 1);
            let entropy: f64 = -probs.iter().map(|&(_, p)| p * p.ln()).sum::<f64>();
            let (low, high) = ((temperature - range).max(0.0), temperature + range);
            let t = low + (high - low) * (entropy / (probs.len() as f64).ln()).powf(exponent);
            prop_assume!(t > 0.05);
            let params = SamplingParams {
                temperature: temperature as f32,
                dynatemp_range: range as f32,
                dynatemp_exponent: exponent as f32,
                ..SamplingParams::default()
            };
            for (token, logit) in apply(&KIND, &params, 0, &row) {
                let want = (f64::from(row[token as usize]) - f64::from(row[probs[0].0 as usize])) / t;
                prop_assert!((f64::from(logit) - want).abs() < 1e-4 * (1.0 + want.abs()), "{} {}", logit, want);
            }
        }
    }
}
