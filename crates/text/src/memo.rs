//! Texts that were encoded lately, with their tokens: every turn of a chat brings all turns before it along.
//!
//! What lies between two special tokens is encoded by itself, so it has the same tokens wherever it stands and may be
//! remembered. Two generations: when the young one is full it becomes the old one, and what the old one still had is
//! forgotten unless somebody has asked for it since.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::Token;

/// Shorter texts are encoded about as fast as they are found.
const N_BYTE_MIN: usize = 128;

/// Bytes of text in a generation: many conversations of full length.
const N_BYTE_MAX: usize = 8 << 20;

/// The memory of a tokenizer; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memo(Arc<Mutex<Generations>>);

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<Box<str>, Arc<[Token]>>,
    old: HashMap<Box<str>, Arc<[Token]>>,
    /// Bytes of the young one's texts.
    n_byte: usize,
}

impl Generations {
    fn find(&mut self, text: &str) -> Option<Arc<[Token]>> {
        if let Some(tokens) = self.young.get(text) {
            return Some(tokens.clone());
        }
        let (text, tokens) = self.old.remove_entry(text)?;
        self.keep(text, tokens.clone());
        Some(tokens)
    }

    fn keep(&mut self, text: Box<str>, tokens: Arc<[Token]>) {
        if self.n_byte + text.len() > N_BYTE_MAX {
            self.old = std::mem::take(&mut self.young);
            self.n_byte = 0;
        }
        self.n_byte += text.len();
        self.young.insert(text, tokens);
    }
}

impl Memo {
    /// Appends the tokens of `text`, which `encode` appends if they are not remembered.
    pub fn encode(&self, text: &str, tokens: &mut Vec<Token>, encode: impl FnOnce(&mut Vec<Token>)) {
        if !(N_BYTE_MIN..N_BYTE_MAX).contains(&text.len()) {
            return encode(tokens);
        }
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner).find(text);
        if let Some(found) = found {
            return tokens.extend_from_slice(&found);
        }
        let start = tokens.len();
        encode(tokens);
        let made = tokens[start..].into();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keep(text.into(), made);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_stays() {
        let memo = Memo::default();
        let text = |i: usize| format!("{i} ").repeat(1_000_000 / format!("{i} ").len());
        let ask = |i: usize| {
            let (mut tokens, mut was_made) = (vec![7], false);
            memo.encode(&text(i), &mut tokens, |tokens| {
                was_made = true;
                tokens.push(i as Token);
            });
            assert_eq!(tokens, [7, i as Token]);
            was_made
        };
        assert!(ask(0) && !ask(0));
        for i in 1..40 {
            assert!(ask(i), "{i} is new");
            assert!(!ask(0), "asked for all the time, {i}");
        }
        assert!(ask(1), "forgotten long ago");
        let inner = memo.0.lock().unwrap();
        assert!(inner.young.len() + inner.old.len() <= 2 * N_BYTE_MAX / 1_000_000);
        drop(inner);
        // A short one is not kept at all.
        let mut n = 0;
        (0..2).for_each(|_| memo.encode("short", &mut Vec::new(), |_| n += 1));
        assert_eq!(n, 2);
    }
}
