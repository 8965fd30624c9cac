//! What a reply's `logprobs` / `n_probs` report.
//!
//! Either the model's own distribution, the log-softmax of the logits as they came, or (`post_sampling_probs`)
//! the one that the chain left, from which the token was drawn. Drafted or not, the numbers are the target's.

use crate::candidates::{Candidate, top_n};
use crate::log_sum_exp::log_sum_exp;

/// The probability of a chosen token and of the likeliest ones, as natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The chosen token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Up to `n_probs` tokens, likeliest first, with their log-probabilities.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// From logits as the model gave them.
    pub(crate) fn of_logits(
        token: u32,
        logits: &[f32],
        n_probs: usize,
        scratch: &mut Vec<Candidate>,
    ) -> Self {
        top_n(logits, n_probs.max(1), scratch);
        scratch.sort_unstable_by(Candidate::likelier);
        let max = scratch.first().map_or(0.0, |best| best.logit);
        let lse = log_sum_exp(logits, max);
        let logprob = |logit: f32| (f64::from(logit) - lse) as f32;
        Self {
            token,
            logprob: logprob(logits[token as usize]),
            top: scratch.iter().take(n_probs).map(|c| (c.token, logprob(c.logit))).collect(),
        }
    }

    /// From what the chain left, probabilities set.
    pub(crate) fn of_candidates(chosen: &Candidate, list: &[Candidate], n_probs: usize) -> Self {
        let mut top: Vec<&Candidate> = list.iter().filter(|c| c.p > 0.0).collect();
        top.sort_unstable_by(|a, b| Candidate::likelier(a, b));
        top.truncate(n_probs);
        Self {
            token: chosen.token,
            // A draw from far out in the tail may have a probability that underflowed; its log stays finite.
            logprob: chosen.p.max(f32::MIN_POSITIVE).ln(),
            top: top.iter().map(|c| (c.token, c.p.ln())).collect(),
        }
    }

    /// A choice without alternatives.
    pub(crate) fn certain(token: u32) -> Self {
        Self { token, logprob: 0.0, top: vec![(token, 0.0)] }
    }
}
