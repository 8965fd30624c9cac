//! The committed tokens that penalties and DRY look back at.
//!
//! Only committed tokens enter ([`crate::Sampler::accept`]), so nothing is ever taken back. A window of -1 in the
//! settings is the whole context, which here is everything that was accepted. Nothing is kept for a sampler that
//! is off.

use crate::params::SamplingParams;
use crate::samplers::{dry, penalties};
use std::collections::HashMap;

/// The last committed tokens, and how often each occurs in the penalties' window.
#[derive(Debug, Clone)]
pub(crate) struct History {
    tokens: Vec<u32>,
    /// The penalties' window and DRY's; 0 where the sampler is off.
    repeat_window: usize,
    dry_window: usize,
    counts: HashMap<u32, u32>,
}

impl History {
    pub(crate) fn new(params: &SamplingParams) -> Self {
        // -1, the whole context, is the one negative value that validation lets through.
        let window =
            |on: bool, last_n: i32| if on { usize::try_from(last_n).unwrap_or(usize::MAX) } else { 0 };
        Self {
            tokens: Vec::new(),
            repeat_window: window((penalties::KIND.is_active)(params), params.repeat_last_n),
            dry_window: window((dry::KIND.is_active)(params), params.dry_penalty_last_n),
            counts: HashMap::new(),
        }
    }

    pub(crate) fn accept(&mut self, token: u32) {
        let window = self.repeat_window.max(self.dry_window);
        if window == 0 {
            return;
        }
        self.tokens.push(token);
        if self.repeat_window > 0 {
            *self.counts.entry(token).or_insert(0) += 1;
            if self.tokens.len() > self.repeat_window {
                self.forget(self.tokens[self.tokens.len() - 1 - self.repeat_window]);
            }
        }
        // Trimmed in large strides, so that a token costs O(1) on average.
        if self.tokens.len() >= window.saturating_mul(2).saturating_add(256) {
            let n_old = self.tokens.len() - window;
            self.tokens.drain(..n_old);
        }
    }

    fn forget(&mut self, token: u32) {
        let count =
            self.counts.get_mut(&token).expect("a token that leaves the window was counted when it came");
        *count -= 1;
        if *count == 0 {
            self.counts.remove(&token);
        }
    }

    /// Occurrences per token in the last `repeat_last_n` tokens.
    pub(crate) fn counts(&self) -> &HashMap<u32, u32> {
        &self.counts
    }

    /// The last `dry_penalty_last_n` tokens, oldest first.
    pub(crate) fn dry_tokens(&self) -> &[u32] {
        &self.tokens[self.tokens.len().saturating_sub(self.dry_window)..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(repeat_last_n: i32, dry_penalty_last_n: i32) {
        let params = SamplingParams {
            repeat_last_n,
            dry_penalty_last_n,
            repeat_penalty: 1.1,
            dry_multiplier: 1.0,
            ..SamplingParams::default()
        };
        let all: Vec<u32> = (0..3000).map(|i| i * i % 37).collect();
        let mut history = History::new(&params);
        for n in 1..=all.len() {
            history.accept(all[n - 1]);
            let last = |n_last: i32| &all[n.saturating_sub(usize::try_from(n_last).unwrap_or(usize::MAX))..n];
            if n % 97 == 0 || n < 80 {
                let mut counts = HashMap::new();
                last(repeat_last_n).iter().for_each(|&t| *counts.entry(t).or_insert(0) += 1);
                assert_eq!(history.counts(), &counts, "after {n} tokens");
                assert_eq!(history.dry_tokens(), last(dry_penalty_last_n), "after {n} tokens");
            }
        }
    }

    #[test]
    fn windows_equal_the_tails_of_everything_accepted() {
        for (repeat, dry) in [(64, 64), (1, 10), (10, 1), (0, 5), (5, 0), (-1, 7), (7, -1), (-1, -1), (0, 0)]
        {
            check(repeat, dry);
        }
    }

    #[test]
    fn keeps_nothing_when_nothing_looks() {
        let mut history = History::new(&SamplingParams::default());
        (0..1000).for_each(|t| history.accept(t));
        assert!(history.tokens.is_empty() && history.counts.is_empty());
    }
}
