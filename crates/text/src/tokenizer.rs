//! Text to tokens: special tokens are cut out first, the algorithm of the model does the rest.

use std::sync::Arc;

use paceline_gguf::Metadata;

use crate::bpe::ByteLevelBpe;
use crate::gemma::GemmaBpe;
use crate::memo::Memo;
use crate::special::{Fragment, SpecialTokens};
use crate::spm::Spm;
use crate::{Error, Token, TokenTable, TokenizerModel, Vocab};

/// How a text is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encode {
    /// Begin with the BOS token, in models that want one ([`Vocab::add_bos`]), unless the text already does.
    pub add_bos: bool,
    /// Read the texts of control tokens as these tokens. Right for the output of a chat template; for text from a user
    /// it would let them write turn markers. User-defined tokens are read either way.
    pub parse_special: bool,
}

/// A vocabulary and the algorithm over it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    vocab: Arc<Vocab>,
    special: SpecialTokens,
    algorithm: Algorithm,
    /// Of fragments that open a text or follow a special token, and of others.
    memos: [Memo; 2],
}

#[derive(Clone, Debug)]
enum Algorithm {
    ByteLevelBpe(ByteLevelBpe),
    Gemma(GemmaBpe),
    Spm(Spm),
}

impl Tokenizer {
    /// Reads the tokenizer of a model file.
    pub fn from_metadata(metadata: &Metadata) -> Result<Tokenizer, Error> {
        Tokenizer::new(&TokenTable::from_metadata(metadata)?)
    }

    /// Builds the tokenizer of a table, checking it first.
    pub fn new(table: &TokenTable) -> Result<Tokenizer, Error> {
        let vocab = Vocab::new(table)?;
        let algorithm = match table.model {
            TokenizerModel::ByteLevelBpe => Algorithm::ByteLevelBpe(ByteLevelBpe::new(&vocab, table)?),
            TokenizerModel::Gemma => Algorithm::Gemma(GemmaBpe::new(&vocab, table)?),
            TokenizerModel::Spm => Algorithm::Spm(Spm::new(&vocab, table)),
        };
        let special = SpecialTokens::new(&vocab)?;
        Ok(Tokenizer { special, vocab: Arc::new(vocab), algorithm, memos: Default::default() })
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Arc<Vocab> {
        &self.vocab
    }

    /// The tokens of `text`.
    pub fn encode(&self, text: &str, options: Encode) -> Vec<Token> {
        let vocab = &*self.vocab;
        let mut tokens = Vec::with_capacity(text.len() / 3 + 1);
        if options.add_bos && vocab.add_bos() {
            tokens.extend(vocab.bos());
        }
        let mut opens = true;
        for (i, fragment) in self.special.partition(text, options.parse_special).into_iter().enumerate() {
            match fragment {
                // Templates that write BOS themselves must not get a second one.
                Fragment::Special(token) if i == 0 && tokens.first() == Some(&token) => {}
                Fragment::Special(token) => tokens.push(token),
                Fragment::Text(text) => {
                    let memo = &self.memos[usize::from(opens)];
                    memo.encode(text, &mut tokens, |tokens| match &self.algorithm {
                        Algorithm::ByteLevelBpe(bpe) => bpe.encode(vocab, text, tokens),
                        Algorithm::Gemma(bpe) => bpe.encode(vocab, text, tokens),
                        Algorithm::Spm(spm) => spm.encode(vocab, text, opens, tokens),
                    });
                }
            }
            opens = matches!(fragment, Fragment::Special(_));
        }
        tokens
    }

    /// The text of `tokens`, special ones shown; bytes that are not UTF-8 become U+FFFD.
    ///
    /// For the text that a model's user sees, special tokens hidden, there is [`crate::StreamDecoder`].
    pub fn decode(&self, tokens: &[Token]) -> String {
        let bytes: Vec<u8> =
            tokens.iter().flat_map(|&token| self.vocab.bytes(token, true)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
