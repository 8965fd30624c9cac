//! Byte-level BPE (`gpt2`: Qwen, Llama 3 and most others).
//!
//! Text is cut by the [pre-tokenizer](crate::pretokenizer); each piece's UTF-8 bytes become symbols, and the adjacent
//! pair with the lowest merge rank is joined until none has one ("Neural Machine Translation of Rare Words with
//! Subword Units", Sennrich et al., over bytes as in GPT-2). Every byte is a token in any sane vocabulary, so every
//! text can be written; a byte that is not is dropped.
//!
//! Files write bytes as characters, so that token texts are printable: `!`–`~`, `¡`–`¬` and `®`–`ÿ` stand for
//! themselves, the other 68 bytes, in order, for U+0100 and up. A space is thus `Ġ` (U+0120).

use std::collections::HashMap;

use paceline_gguf::Strings;
use rustc_hash::FxBuildHasher;

use crate::merge::{NO_SYMBOL, Symbol, merge_pairs};
use crate::{Error, PreTokenizer, Token, TokenTable, Vocab};

/// Whether a byte is written as the character with its own number.
const fn is_printable(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)
}

/// The character for each byte.
const CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let mut byte = 0;
    let mut next = 0x100_u32;
    while byte < 256 {
        chars[byte] = if is_printable(byte as u8) {
            byte as u8 as char
        } else {
            next += 1;
            char::from_u32(next - 1).expect("below the surrogates")
        };
        byte += 1;
    }
    chars
};

/// The byte for each character below U+0144; bytes that are not characters' images are absent.
const BYTES: [Option<u8>; 0x144] = {
    let mut bytes = [None; 0x144];
    let mut byte = 0;
    while byte < 256 {
        bytes[CHARS[byte] as usize] = Some(byte as u8);
        byte += 1;
    }
    bytes
};

/// The character that stands for `byte` in token texts.
pub fn char_of_byte(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte that `c` stands for in token texts.
pub fn byte_of_char(c: char) -> Option<u8> {
    BYTES.get(c as usize).copied().flatten()
}

/// Merge rules over symbol ids: a pair's rank and what it becomes.
///
/// A symbol's id is its token id. Texts that occur in rules without being tokens get ids from the vocabulary's size
/// on: files may merge through them, and end at them, in which case they are written byte by byte.
#[derive(Clone, Debug)]
pub(crate) struct MergeRules {
    pairs: HashMap<(u32, u32), (u32, u32), FxBuildHasher>,
    beyond: HashMap<Box<[u8]>, u32, FxBuildHasher>,
    n_vocab: u32,
}

impl MergeRules {
    /// Reads `left right` lines; rank = index, the first of two equal lines counts.
    pub fn new(vocab: &Vocab, merges: &Strings) -> Result<MergeRules, Error> {
        let mut rules = MergeRules {
            pairs: HashMap::with_capacity_and_hasher(merges.len(), FxBuildHasher),
            beyond: HashMap::default(),
            n_vocab: vocab.len() as u32,
        };
        for (rank, line) in (0..).zip(merges.iter()) {
            // The left side may itself begin with a space, so it is looked for from the second byte on.
            let space = line.iter().skip(1).position(|b| *b == b' ').map(|at| at + 1);
            let Some(space) = space.filter(|at| at + 1 < line.len()) else {
                return Err(Error::BadKey {
                    key: format!("tokenizer.ggml.merges[{rank}]"),
                    expected: "two symbols with a space between them".to_owned(),
                    found: format!("{:?}", String::from_utf8_lossy(line)),
                });
            };
            let (left, right) = (&line[..space], &line[space + 1..]);
            let pair = (rules.intern(vocab, left), rules.intern(vocab, right));
            let joined = rules.intern(vocab, &[left, right].concat());
            rules.pairs.entry(pair).or_insert((rank, joined));
        }
        Ok(rules)
    }

    fn intern(&mut self, vocab: &Vocab, text: &[u8]) -> u32 {
        match self.id_of(vocab, text) {
            NO_SYMBOL => {
                let id = self.n_vocab + self.beyond.len() as u32;
                self.beyond.insert(text.into(), id);
                id
            }
            id => id,
        }
    }

    /// The symbol id of a text.
    pub fn id_of(&self, vocab: &Vocab, text: &[u8]) -> u32 {
        vocab.find(text).or_else(|| self.beyond.get(text).copied()).unwrap_or(NO_SYMBOL)
    }

    /// Joins symbols until no rule applies.
    pub fn apply(&self, symbols: &mut Vec<Symbol>) {
        merge_pairs(symbols, |left, right| self.pairs.get(&(left.id, right.id)).copied());
    }

    /// The token that a symbol is, if it is one.
    pub fn token_of(&self, symbol: &Symbol) -> Option<Token> {
        (symbol.id < self.n_vocab).then_some(symbol.id)
    }
}

/// The byte-level BPE algorithm of one model.
#[derive(Clone, Debug)]
pub struct ByteLevelBpe {
    rules: MergeRules,
    pre: &'static PreTokenizer,
    byte_ids: Box<[u32; 256]>,
}

impl ByteLevelBpe {
    /// Indexes the merges of `table`.
    pub fn new(vocab: &Vocab, table: &TokenTable) -> Result<ByteLevelBpe, Error> {
        let pre = crate::pretokenizer::find(table.pre.as_deref())?;
        let rules = MergeRules::new(vocab, &table.merges)?;
        let byte_ids = std::array::from_fn(|byte| {
            rules.id_of(vocab, char_of_byte(byte as u8).encode_utf8(&mut [0; 4]).as_bytes())
        });
        Ok(ByteLevelBpe { rules, pre, byte_ids: Box::new(byte_ids) })
    }

    /// The pre-tokenizer in use.
    pub fn pretokenizer(&self) -> &'static PreTokenizer {
        self.pre
    }

    /// Appends the tokens of `text`, in which no special token is looked for.
    pub fn encode(&self, vocab: &Vocab, text: &str, tokens: &mut Vec<Token>) {
        let mut symbols = Vec::new();
        for piece in self.pre.split(text) {
            if self.pre.ignore_merges {
                let spelling: String = piece.bytes().map(char_of_byte).collect();
                if let Some(token) = vocab.find(&spelling) {
                    tokens.push(token);
                    continue;
                }
            }
            symbols.clear();
            symbols.extend(piece.bytes().enumerate().map(|(at, byte)| Symbol {
                id: self.byte_ids[usize::from(byte)],
                start: at,
                end: at + 1,
            }));
            self.rules.apply(&mut symbols);
            for symbol in &symbols {
                match self.rules.token_of(symbol) {
                    Some(token) => tokens.push(token),
                    None => {
                        let bytes = piece.as_bytes()[symbol.start..symbol.end].iter();
                        tokens.extend(
                            bytes
                                .map(|b| self.byte_ids[usize::from(*b)])
                                .filter(|id| *id < vocab.len() as u32),
                        );
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_characters_map_one_to_one() {
        for byte in 0..=255 {
            assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
        }
        assert_eq!(char_of_byte(b' '), 'Ġ');
        assert_eq!(char_of_byte(b'\n'), 'Ċ');
        assert_eq!(byte_of_char('你'), None);
        assert_eq!(byte_of_char(' '), None);
    }
}
