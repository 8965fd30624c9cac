//! DRY ("don't repeat yourself"): punishes the token that would continue a repetition.
//!
//! If the context's last `n` tokens also occur earlier, followed by `t`, then choosing `t` extends a repetition of
//! length `n`. For the longest such `n` of each `t`, and `n >= allowed_length`:
//!
//! ```text
//! l'(t) = l(t) - multiplier · base^(n - allowed_length)
//! ```
//!
//! Sequence breakers stop a match: no repetition reaches back over one, and a token that contains one is never
//! punished, so that a chat template's own repetitions stay free. The lengths come from the Z-function of the
//! reversed window, linear in its length. Idea: p-e-w, text-generation-webui PR 5677; breakers as in llama.cpp.

use super::{Moment, SamplerKind};
use crate::candidates::Candidates;
use std::collections::HashMap;

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "dry",
    aliases: &[],
    letter: 'd',
    keeps_argmax: false,
    is_active: |params| {
        params.dry_multiplier > 0.0 && params.dry_base >= 1.0 && params.dry_penalty_last_n != 0
    },
    apply,
};

/// llama.cpp's bounds on what a breaker may cost: characters of its text, tokens after its first.
const MAX_BREAKER_CHARS: usize = 40;
const MAX_TAIL_LEN: usize = 20;

/// The token sequences that spell a sequence breaker in one vocabulary.
///
/// Breakers are texts and tokens do not respect their bounds: `":"` is inside the token `"):"`, and `"<br>"` may
/// start at the end of one token and end in another. So a breaker is a *head* token and the *tail* that must
/// follow; an empty tail means that the head contains all of it. Building from a vocabulary visits every token:
/// keep the result (it is behind an `Arc` in [`crate::Sampler::new`]) while the breakers stay the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DryBreakers {
    tails: HashMap<u32, Vec<Vec<u32>>>,
}

impl DryBreakers {
    /// Tokens that are each a breaker of their own.
    pub fn from_tokens(tokens: impl IntoIterator<Item = u32>) -> Self {
        let mut breakers = Self::default();
        tokens.into_iter().for_each(|token| breakers.add(token, Vec::new()));
        breakers
    }

    /// The breakers of `texts` in a vocabulary: `piece(t)` writes the bytes of token `t` to the (emptied) buffer,
    /// `tokenize` turns a text's remainder into tokens, specials excluded.
    pub fn from_vocab(
        texts: &[String],
        n_vocab: u32,
        mut piece: impl FnMut(u32, &mut Vec<u8>),
        mut tokenize: impl FnMut(&str) -> Vec<u32>,
    ) -> Self {
        let mut breakers = Self::default();
        let texts: Vec<String> = texts
            .iter()
            .filter(|t| !t.is_empty())
            .map(|t| t.chars().take(MAX_BREAKER_CHARS).collect())
            .collect();
        let mut bytes = Vec::new();
        for token in 0..n_vocab {
            bytes.clear();
            piece(token, &mut bytes);
            for text in &texts {
                if bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
                    breakers.add(token, Vec::new());
                    continue;
                }
                // The token may end with the breaker's beginning.
                for (n, _) in text.char_indices().skip(1) {
                    if bytes.ends_with(&text.as_bytes()[..n]) {
                        let mut tail = tokenize(&text[n..]);
                        tail.truncate(MAX_TAIL_LEN);
                        breakers.add(token, tail);
                    }
                }
            }
        }
        breakers
    }

    /// Adds the breaker that starts with `head` and goes on with `tail`.
    pub fn add(&mut self, head: u32, tail: Vec<u32>) {
        let tails = self.tails.entry(head).or_default();
        if !tails.contains(&tail) {
            tails.push(tail);
        }
    }

    /// How many of the last tokens lie after the last breaker: no repetition counts for more.
    fn limit(&self, tokens: &[u32]) -> usize {
        if self.tails.is_empty() {
            return tokens.len();
        }
        for head in (0..tokens.len()).rev() {
            let after = &tokens[head + 1..];
            let tails = self.tails.get(&tokens[head]).map_or(&[][..], Vec::as_slice);
            if let Some(tail) = tails.iter().filter(|tail| after.starts_with(tail)).map(Vec::len).max() {
                return after.len() - tail;
            }
        }
        tokens.len()
    }

    fn is_breaker(&self, token: u32) -> bool {
        self.tails.get(&token).is_some_and(|tails| tails.iter().any(Vec::is_empty))
    }
}

/// Buffers kept between positions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scratch {
    z: Vec<usize>,
    penalties: HashMap<u32, f64>,
}

fn apply(candidates: &mut Candidates, moment: &mut Moment<'_>) {
    let params = moment.params;
    let tokens = moment.history.dry_tokens();
    let allowed = params.dry_allowed_length as usize; // validated as not negative
    let limit = moment.breakers.limit(tokens);
    if tokens.len() <= allowed || limit < allowed {
        return;
    }
    let Scratch { z, penalties } = &mut *moment.dry;
    z_function_reversed(tokens, z);
    penalties.clear();
    for (ago, &common) in z.iter().enumerate().skip(1) {
        // The text `ago` tokens back ends with the same `length` tokens as the text now; `next` came then.
        let (length, next) = (common.min(limit), tokens[tokens.len() - ago]);
        if length >= allowed && !moment.breakers.is_breaker(next) {
            let longest = penalties.entry(next).or_insert(0.0);
            *longest = longest.max(length as f64);
        }
    }
    let (multiplier, base) = (f64::from(params.dry_multiplier), f64::from(params.dry_base));
    // What f32 still holds: beyond that a penalty means "never", and infinity would be a ban.
    let exponent_max =
        if base > 1.000_001 { (f64::from(f32::MAX).ln() / base.ln()).floor() } else { f64::MAX };
    for penalty in penalties.values_mut() {
        *penalty = multiplier * base.powf((*penalty - allowed as f64).min(exponent_max));
    }
    candidates.edit(penalties, |logit, penalty| logit - penalty);
}

/// `z[k]`: how many tokens the sequence and the sequence without its last `k` tokens have in common, from the end.
fn z_function_reversed(tokens: &[u32], z: &mut Vec<usize>) {
    let n = tokens.len();
    let at = |i: usize| tokens[n - 1 - i];
    z.clear();
    z.resize(n, 0);
    // [left, right) is the match found so far that reaches furthest; inside it an earlier answer is reused.
    let (mut left, mut right) = (0, 0);
    for k in 1..n {
        let mut common = if k < right { z[k - left].min(right - k) } else { 0 };
        while k + common < n && at(common) == at(k + common) {
            common += 1;
        }
        z[k] = common;
        if k + common > right {
            (left, right) = (k, k + common);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::apply_after;
    use proptest::prelude::*;

    fn params(allowed: i32, last_n: i32) -> SamplingParams {
        SamplingParams {
            dry_multiplier: 0.5,
            dry_base: 2.0,
            dry_allowed_length: allowed,
            dry_penalty_last_n: last_n,
            ..SamplingParams::default()
        }
    }

    /// Penalties of tokens 0..6 after `committed`, in units of the multiplier.
    fn penalties(params: &SamplingParams, committed: &[u32], breakers: &DryBreakers) -> Vec<f32> {
        let left = apply_after(&KIND, params, 0, committed, breakers, &[0.0; 6]);
        left.into_iter().map(|(_, logit)| -logit / 0.5).collect()
    }

    fn check(allowed: i32, last_n: i32, committed: &[u32], breakers: &DryBreakers, expected: [f32; 6]) {
        assert_eq!(penalties(&params(allowed, last_n), committed, breakers), expected, "{committed:?}");
    }

    const A: u32 = 0;
    const B: u32 = 1;
    const C: u32 = 2;
    const Y: u32 = 3;

    #[test]
    fn punishes_what_would_continue_a_repetition() {
        let none = DryBreakers::default();
        // "abc" came before and went on with c; "bc" with y; "c" with b.
        let text = [A, B, C, C, B, C, Y, A, B, C];
        check(2, 64, &text, &none, [0., 0., 2., 1., 0., 0.]);
        check(1, 64, &text, &none, [0., 1., 4., 2., 0., 0.]);
        check(3, 64, &text, &none, [0., 0., 1., 0., 0., 0.]);
        check(4, 64, &text, &none, [0.; 6]);
        check(0, 64, &[A, B], &none, [0., 1., 0., 0., 0., 0.]);
        check(2, 64, &[A, A, A, A], &none, [2., 0., 0., 0., 0., 0.]); // overlaps count
        check(2, 64, &[A, B], &none, [0.; 6]);
        check(2, 64, &[], &none, [0.; 6]);
    }

    #[test]
    fn looks_back_as_far_as_told() {
        let none = DryBreakers::default();
        let text = [A, B, C, Y, A, B];
        check(2, 6, &text, &none, [0., 0., 1., 0., 0., 0.]);
        check(2, 5, &text, &none, [0.; 6]);
        check(2, 0, &text, &none, [0.; 6]);
        let long = [&text[..4], &[4, 5].repeat(50)[..], &text[4..]].concat();
        check(2, 64, &long, &none, [0.; 6]);
        check(2, -1, &long, &none, [0., 0., 1., 0., 0., 0.]);
    }

    #[test]
    fn breakers_stop_matches_and_are_never_punished() {
        let text = [A, B, C, Y, A, B, C];
        check(1, 64, &text, &DryBreakers::default(), [0., 0., 0., 4., 0., 0.]);
        check(1, 64, &text, &DryBreakers::from_tokens([A]), [0., 0., 0., 2., 0., 0.]);
        check(1, 64, &text, &DryBreakers::from_tokens([B]), [0., 0., 0., 1., 0., 0.]);
        check(1, 64, &text, &DryBreakers::from_tokens([C]), [0.; 6]);
        check(1, 64, &text, &DryBreakers::from_tokens([Y]), [0.; 6]);
        let mut pair = DryBreakers::default();
        pair.add(A, vec![B]);
        check(1, 64, &text, &pair, [0., 0., 0., 1., 0., 0.]);
        let mut other = DryBreakers::default();
        other.add(A, vec![C]);
        check(1, 64, &text, &other, [0., 0., 0., 4., 0., 0.]);
    }

    #[test]
    fn a_huge_penalty_stays_finite() {
        let text = [A; 500];
        let found = apply_after(&KIND, &params(2, -1), 0, &text, &DryBreakers::default(), &[0.0, 0.0]);
        assert!(found[0].1 < -1e30 && found[0].1.is_finite() && found[1].1 == 0.0, "{found:?}");
    }

    #[test]
    fn breakers_are_found_in_a_vocabulary() {
        let pieces = ["a", ":", "x:y", "<b", "r>", "<", "br>", "<br>!", "\n\n"];
        let tokenize = |text: &str| match text {
            "br>" => vec![6],
            "r>" => vec![4],
            ">" => vec![],
            _ => panic!("{text:?}"),
        };
        let texts = [":", "<br>", "\n", ""].map(str::to_owned);
        let piece = |t: u32, out: &mut Vec<u8>| out.extend_from_slice(pieces[t as usize].as_bytes());
        let found = DryBreakers::from_vocab(&texts, pieces.len() as u32, piece, tokenize);
        let mut expected = DryBreakers::from_tokens([1, 2, 7, 8]);
        expected.add(5, vec![6]);
        expected.add(3, vec![4]);
        assert_eq!(found, expected);
    }

    /// By definition: for every earlier place, count back while the tokens agree.
    fn twin(tokens: &[u32], allowed: usize, breakers: &DryBreakers) -> Vec<f32> {
        let n = tokens.len();
        let limit = (0..n).rev().find(|&i| breakers.is_breaker(tokens[i])).map_or(n, |i| n - 1 - i);
        let mut longest = [None; 6];
        for end in 1..n {
            let common =
                (0..end).take_while(|&i| tokens[end - 1 - i] == tokens[n - 1 - i]).count().min(limit);
            let next = tokens[end];
            if common >= allowed && n > allowed && limit >= allowed && !breakers.is_breaker(next) {
                longest[next as usize] = longest[next as usize].max(Some(common));
            }
        }
        longest.iter().map(|l| l.map_or(0.0, |l| 2f32.powi((l - allowed) as i32))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn equals_the_definition(
            tokens in prop::collection::vec(0u32..3, 0..40),
            allowed in 0i32..4,
            breaker in prop::option::of(0u32..6),
        ) {
            let breakers = DryBreakers::from_tokens(breaker);
            let found = penalties(&params(allowed, 64), &tokens, &breakers);
            prop_assert_eq!(found, twin(&tokens, allowed as usize, &breakers));
        }
    }
}
