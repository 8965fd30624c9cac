//! Repetition, frequency and presence penalties, for tokens seen in the last `repeat_last_n`.
//!
//! ```text
//! l' = (l > 0 ? l / repeat : l · repeat) - n · frequency - presence      n: occurrences, at least 1
//! ```
//!
//! The repetition penalty is CTRL's (Keskar et al., 2019) with the sign handled so that it always lowers; the
//! other two are the OpenAI API's. The prompt counts like generated text, as in llama-server.

use super::{Moment, SamplerKind};
use crate::candidates::Candidates;

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "penalties",
    aliases: &["penalty"],
    letter: 'e',
    keeps_argmax: false,
    is_active: |params| {
        params.repeat_last_n != 0
            && (params.repeat_penalty != 1.0
                || params.frequency_penalty != 0.0
                || params.presence_penalty != 0.0)
    },
    apply,
};

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let params = moment.params;
    let repeat = f64::from(params.repeat_penalty);
    let (frequency, presence) = (f64::from(params.frequency_penalty), f64::from(params.presence_penalty));
    candidates.edit(moment.history.counts(), |logit, &n| {
        let scaled = if logit > 0.0 { logit / repeat } else { logit * repeat };
        scaled - f64::from(n) * frequency - presence
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DryBreakers;
    use crate::params::SamplingParams;
    use crate::samplers::tests::apply_after;

    /// Token 0 has logit 2, token 1 has -2, token 2 has 1.
    fn check(edit: impl FnOnce(&mut SamplingParams), committed: &[u32], expected: [f32; 3]) {
        let mut params = SamplingParams::default();
        edit(&mut params);
        let left = apply_after(&KIND, &params, 0, committed, &DryBreakers::default(), &[2.0, -2.0, 1.0]);
        let found: Vec<f32> = left.into_iter().map(|(_, logit)| logit).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn lowers_whichever_sign() {
        check(|p| p.repeat_penalty = 2.0, &[0, 1], [1.0, -4.0, 1.0]);
        check(|p| p.repeat_penalty = 2.0, &[0, 0, 0], [1.0, -2.0, 1.0]); // once, however often seen
    }

    #[test]
    fn frequency_counts_and_presence_does_not() {
        check(|p| p.frequency_penalty = 0.5, &[2, 2, 2, 1], [2.0, -2.5, -0.5]);
        check(|p| p.presence_penalty = 0.5, &[2, 2, 2, 1], [2.0, -2.5, 0.5]);
        check(
            |p| (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) = (2.0, 1.0, 0.25),
            &[2, 2],
            [2.0, -2.0, 0.5 - 2.0 - 0.25],
        );
        check(|p| p.frequency_penalty = -1.0, &[1], [2.0, -1.0, 1.0]);
    }

    #[test]
    fn looks_back_as_far_as_told() {
        let last_n = |n| move |p: &mut SamplingParams| (p.presence_penalty, p.repeat_last_n) = (1.0, n);
        check(last_n(2), &[0, 1, 2], [2.0, -3.0, 0.0]);
        check(last_n(0), &[0, 1, 2], [2.0, -2.0, 1.0]);
        check(last_n(-1), &[vec![0], vec![1; 5000]].concat(), [1.0, -3.0, 1.0]);
        check(last_n(64), &[vec![0], vec![1; 64]].concat(), [2.0, -3.0, 1.0]);
        check(last_n(65), &[vec![0], vec![1; 64]].concat(), [1.0, -3.0, 1.0]);
        check(last_n(64), &[7, 99], [2.0, -2.0, 1.0]); // tokens without a logit are harmless
    }
}
