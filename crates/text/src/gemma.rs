//! The BPE of Gemma 4: merges by rank as in [`crate::bpe`], but over characters instead of bytes.
//!
//! Every space becomes U+2581 (none is added in front), text is cut into runs of newlines and runs of anything else,
//! and a run of newlines that is a token is taken whole. A run may be a paragraph long, so this leans on the merge
//! loop being O(n log n). A symbol that is no token is written as its UTF-8 bytes, `<0xE2>` and so on.

use crate::bpe::MergeRules;
use crate::merge::Symbol;
use crate::{Error, Token, TokenTable, Vocab};

/// The tokens `<0x00>` to `<0xFF>`, or the unknown token, for text that no other token writes.
#[derive(Clone, Debug)]
pub(crate) struct ByteFallback {
    tokens: Box<[Option<Token>; 256]>,
}

impl ByteFallback {
    pub fn new(vocab: &Vocab) -> ByteFallback {
        let tokens =
            std::array::from_fn(|byte| vocab.find(format!("<0x{byte:02X}>")).or(vocab.special().unknown));
        ByteFallback { tokens: Box::new(tokens) }
    }

    pub fn encode(&self, bytes: &[u8], tokens: &mut Vec<Token>) {
        tokens.extend(bytes.iter().filter_map(|byte| self.tokens[usize::from(*byte)]));
    }
}

/// The Gemma BPE of one model.
#[derive(Clone, Debug)]
pub struct GemmaBpe {
    rules: MergeRules,
    fallback: ByteFallback,
}

impl GemmaBpe {
    /// Indexes the merges of `table`.
    pub fn new(vocab: &Vocab, table: &TokenTable) -> Result<GemmaBpe, Error> {
        Ok(GemmaBpe { rules: MergeRules::new(vocab, &table.merges)?, fallback: ByteFallback::new(vocab) })
    }

    /// Appends the tokens of `text`, in which no special token is looked for.
    pub fn encode(&self, vocab: &Vocab, text: &str, tokens: &mut Vec<Token>) {
        let text = text.replace(' ', "\u{2581}");
        let mut symbols = Vec::new();
        for run in runs(&text) {
            if run.starts_with('\n')
                && let Some(token) = vocab.find(run)
            {
                tokens.push(token);
                continue;
            }
            symbols.clear();
            symbols.extend(run.char_indices().map(|(start, c)| {
                let end = start + c.len_utf8();
                Symbol { id: self.rules.id_of(vocab, &run.as_bytes()[start..end]), start, end }
            }));
            self.rules.apply(&mut symbols);
            for symbol in &symbols {
                match self.rules.token_of(symbol) {
                    Some(token) => tokens.push(token),
                    None => self.fallback.encode(&run.as_bytes()[symbol.start..symbol.end], tokens),
                }
            }
        }
    }
}

/// Runs of newlines and runs of anything else, in turn.
fn runs(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let newlines = rest.starts_with('\n');
        let end = rest.find(|c| (c == '\n') != newlines).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        rest = after;
        (!run.is_empty()).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_alternate() {
        let check = |text: &str, expected: &[&str]| assert_eq!(runs(text).collect::<Vec<_>>(), expected);
        check("", &[]);
        check("ab c", &["ab c"]);
        check("\n\na\r\nb\n", &["\n\n", "a\r", "\n", "b", "\n"]);
    }
}
