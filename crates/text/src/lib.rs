//! Text in, tokens through, text out: everything between a request's strings and the model's token ids.
//!
//! Reading order: [`table`] takes a model file's tokenizer keys apart and checks them; [`vocab`] answers questions
//! about single tokens; [`tokenizer`] turns text into tokens with one of three algorithms ([`bpe`], [`gemma`],
//! [`spm`]), the first of which cuts text with a [`pretokenizer`]; [`detokenizer`] turns a stream of tokens back into
//! text. Above tokens, [`template`] renders a chat into a prompt, [`stop`] watches the answer for stop strings and
//! [`reasoning`] separates thoughts from the answer.
//!
//! Key names and algorithms are those of GGUF files as llama.cpp writes and reads them.

#![forbid(unsafe_code)]

pub mod bpe;
pub mod detokenizer;
mod error;
pub mod gemma;
mod memo;
mod merge;
pub mod pretokenizer;
pub mod reasoning;
mod special;
pub mod spm;
pub mod stop;
pub mod table;
pub mod template;
pub mod tokenizer;
pub mod vocab;

pub use detokenizer::StreamDecoder;
pub use error::Error;
pub use pretokenizer::{PRETOKENIZERS, PreTokenizer};
pub use reasoning::{Delta, ReasoningFormat, ReasoningParser};
pub use stop::{StopMatcher, StopStep};
pub use table::{TokenTable, TokenizerModel};
pub use template::{Capabilities, ChatTemplate, RenderRequest};
pub use tokenizer::{Encode, Tokenizer};
pub use vocab::{MergeDiff, SpecialIds, TokenKind, Vocab, VocabDiff};

/// A token id: an index into the vocabulary and a row of the embedding matrix.
pub type Token = u32;
