//! SentencePiece BPE (`llama`): the adjacent pair whose joint text is the token with the highest score is joined until
//! no pair is a token ("SentencePiece", Kudo and Richardson).
//!
//! Spaces become U+2581, with one more in front of a text that begins the prompt or follows a special token (unless
//! `add_space_prefix` is false). Symbols start as characters; joined ones are always tokens, so only single
//! characters can be left without one, and those are written as their UTF-8 bytes.

use std::cmp::Reverse;

use crate::gemma::ByteFallback;
use crate::merge::{NO_SYMBOL, Symbol, merge_pairs};
use crate::{Token, TokenTable, Vocab};

/// The SentencePiece algorithm of one model.
#[derive(Clone, Debug)]
pub struct Spm {
    fallback: ByteFallback,
    add_space_prefix: bool,
    longest: usize,
}

/// A score as a merge priority: the highest first, in the total order of floats.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Priority(Reverse<i32>);

impl Priority {
    fn of(score: f32) -> Priority {
        // Two's complement order of the bits equals numeric order once negative numbers are flipped.
        let bits = (score + 0.0).to_bits() as i32; // −0 becomes 0
        Priority(Reverse(bits ^ (((bits >> 31) as u32) >> 1) as i32))
    }
}

impl Spm {
    /// Takes from `table` what the algorithm needs beyond the vocabulary.
    pub fn new(vocab: &Vocab, table: &TokenTable) -> Spm {
        Spm {
            fallback: ByteFallback::new(vocab),
            add_space_prefix: table.add_space_prefix.unwrap_or(true),
            longest: table.tokens.iter().map(<[u8]>::len).max().unwrap_or(0),
        }
    }

    /// Appends the tokens of `text`, in which no special token is looked for. `opens` says that `text` begins the
    /// prompt or follows a special token.
    pub fn encode(&self, vocab: &Vocab, text: &str, opens: bool, tokens: &mut Vec<Token>) {
        if text.is_empty() {
            return;
        }
        let mut spelled = String::with_capacity(text.len() + 3);
        if opens && self.add_space_prefix {
            spelled.push('\u{2581}');
        }
        spelled.extend(text.chars().map(|c| if c == ' ' { '\u{2581}' } else { c }));
        let bytes = spelled.as_bytes();
        let mut symbols: Vec<Symbol> = spelled
            .char_indices()
            .map(|(start, c)| {
                let end = start + c.len_utf8();
                Symbol { id: vocab.find(&bytes[start..end]).unwrap_or(NO_SYMBOL), start, end }
            })
            .collect();
        merge_pairs(&mut symbols, |left, right| {
            let joint = &bytes[left.start..right.end];
            let token = (joint.len() <= self.longest).then(|| vocab.find(joint))??;
            Some((Priority::of(vocab.score(token)), token))
        });
        for symbol in &symbols {
            match symbol.id {
                NO_SYMBOL => self.fallback.encode(&bytes[symbol.start..symbol.end], tokens),
                token => tokens.push(token),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn higher_scores_come_first() {
        let mut scores = [-3.5, 2.0, 0.0, -1e9, 1e-30, -1e-30, f32::INFINITY];
        scores.sort_by_key(|s| Priority::of(*s));
        assert_eq!(scores, [f32::INFINITY, 2.0, 1e-30, 0.0, -1e-30, -3.5, -1e9]);
        assert!(Priority::of(0.0) == Priority::of(-0.0));
    }
}
