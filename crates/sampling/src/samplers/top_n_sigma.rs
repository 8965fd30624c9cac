//! Top-nσ: keeps logits within `n` standard deviations of the largest, `l >= max - n·σ`.
//!
//! σ is the population deviation over the candidates that are not banned. Working on logits, the set does not
//! depend on the temperature ("Top-nσ: Not All Logits Are You Need", Tang et al., 2024).

use super::{Moment, SamplerKind};
use crate::candidates::Candidates;

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "top_n_sigma",
    aliases: &["topnsigma"],
    letter: 's',
    keeps_argmax: true,
    is_active: |params| params.top_n_sigma > 0.0,
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let Some((_, max)) = candidates.argmax() else { return };
    let n = candidates.logits().count() as f64;
    let mean = candidates.logits().map(f64::from).sum::<f64>() / n;
    let variance = candidates.logits().map(|l| (f64::from(l) - mean).powi(2)).sum::<f64>() / n;
    let floor = f64::from(max) - f64::from(moment.params.top_n_sigma) * variance.sqrt();
    candidates.retain_logit(floor.max(f64::from(f32::MIN)) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row};
    use proptest::prelude::*;

    fn check(top_n_sigma: f32, logits: &[f32], expected: &[u32]) {
        let params = SamplingParams { top_n_sigma, ..SamplingParams::default() };
        let found: Vec<u32> = apply(&KIND, &params, 0, logits).into_iter().map(|(token, _)| token).collect();
        assert_eq!(found, expected, "{top_n_sigma} {logits:?}");
    }

    #[test]
    fn examples() {
        // Mean 0, σ = 2.
        check(0.9, &[2.0, 2.0, -2.0, -2.0], &[0, 1]);
        check(2.1, &[2.0, 2.0, -2.0, -2.0], &[0, 1, 2, 3]);
        check(1.0, &[1.0, 1.0, 1.0], &[0, 1, 2]);
        check(-1.0, &[2.0, -9.0], &[0, 1]);
        check(0.1, &[f32::NEG_INFINITY, 4.0, 3.0], &[1]);
        check(f32::MAX, &[1.0, f32::NEG_INFINITY, 3.0], &[0, 2]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(row in row(), n in 0.1f64..4.0) {
            let live: Vec<f64> = row.iter().map(|&l| f64::from(l)).filter(|l| l.is_finite()).collect();
            let mean = live.iter().sum::<f64>() / live.len() as f64;
            let square = live.iter().map(|l| l * l).sum::<f64>() / live.len() as f64;
            let max = live.iter().copied().fold(f64::MIN, f64::max);
            let floor = max - n * (square - mean * mean).max(0.0).sqrt();
            prop_assume!(live.iter().all(|l| (l - floor).abs() > 1e-4));
            let want: Vec<u32> = (0..row.len() as u32).filter(|&t| f64::from(row[t as usize]) >= floor).collect();
            check(n as f32, &row, &want);
        }
    }
}
