//! The tokenizer keys of a model file, read and checked once.
//!
//! GGUF keeps a tokenizer as parallel arrays under `tokenizer.ggml.*`: `tokens` (id -> text), `token_type`, `scores`
//! (SentencePiece), `merges` (BPE, rank = index), and single ids such as `bos_token_id`. After
//! [`TokenTable::check`] the arrays agree in length and every id lies in the table, so nothing later looks back.

use paceline_gguf::{Metadata, Strings};

use crate::{Error, SpecialIds, Token, TokenKind};

/// Which of the three algorithms turns text into tokens (`tokenizer.ggml.model`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerModel {
    /// `gpt2`: BPE over bytes, each written as one printable character.
    ByteLevelBpe,
    /// `gemma4`: BPE over characters, a space being U+2581.
    Gemma,
    /// `llama`: SentencePiece, merging by score.
    Spm,
}

/// Names in files and what they mean; the one place to add a model to.
const MODELS: &[(&str, TokenizerModel)] = &[
    ("gpt2", TokenizerModel::ByteLevelBpe),
    ("gemma4", TokenizerModel::Gemma),
    ("llama", TokenizerModel::Spm),
];

impl TokenizerModel {
    /// The model that files call `name`.
    pub fn named(name: &str) -> Result<TokenizerModel, Error> {
        let known = || MODELS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        MODELS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, model)| *model)
            .ok_or_else(|| Error::UnknownModel { found: name.to_owned(), known: known() })
    }

    /// The name that files use.
    pub fn name(self) -> &'static str {
        MODELS.iter().find(|(_, model)| *model == self).expect("every model is listed").0
    }
}

/// A tokenizer as data: what a file says, before any index over it is built.
#[derive(Clone, Debug)]
pub struct TokenTable {
    /// The algorithm.
    pub model: TokenizerModel,
    /// `tokenizer.ggml.pre`, where the file has it.
    pub pre: Option<String>,
    /// Token texts by id, in the file's own spelling; not necessarily UTF-8.
    pub tokens: Strings,
    /// Token kinds by id, as many as `tokens`; empty in a file without them: all normal.
    pub kinds: Vec<TokenKind>,
    /// SentencePiece scores by id; empty where the model has none.
    pub scores: Vec<f32>,
    /// BPE merges, `left right`, best first; empty where the model has none.
    pub merges: Strings,
    /// The ids that files name.
    pub special: SpecialIds,
    /// `add_bos_token`, where the file says.
    pub add_bos: Option<bool>,
    /// `add_eos_token`, where the file says.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`, where the file says (SentencePiece only).
    pub add_space_prefix: Option<bool>,
    /// `suppress_tokens`: never sampled.
    pub suppress: Vec<Token>,
}

impl TokenTable {
    /// An empty table for `model`, to be filled in.
    pub fn new(model: TokenizerModel) -> TokenTable {
        TokenTable {
            model,
            pre: None,
            tokens: Strings::new(),
            kinds: Vec::new(),
            scores: Vec::new(),
            merges: Strings::new(),
            special: SpecialIds::default(),
            add_bos: None,
            add_eos: None,
            add_space_prefix: None,
            suppress: Vec::new(),
        }
    }

    /// Reads and checks the `tokenizer.ggml.*` keys.
    pub fn from_metadata(metadata: &Metadata) -> Result<TokenTable, Error> {
        let mut table =
            TokenTable::new(TokenizerModel::named(metadata.require_str("tokenizer.ggml.model")?)?);
        table.pre = metadata.str("tokenizer.ggml.pre")?.map(str::to_owned);
        table.tokens = metadata.require_bytes_array("tokenizer.ggml.tokens")?.clone();
        if let Some(numbers) = metadata.i32_array("tokenizer.ggml.token_type")? {
            table.kinds = numbers.into_iter().map(TokenKind::from_number).collect();
        }
        if table.model == TokenizerModel::Spm {
            table.scores = metadata.require_f32_array("tokenizer.ggml.scores")?;
            table.add_space_prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?;
        } else {
            table.merges = metadata.require_bytes_array("tokenizer.ggml.merges")?.clone();
        }
        for (stem, _) in SpecialIds::default().by_key() {
            if let Some(id) = id(metadata, &format!("tokenizer.ggml.{stem}_token_id"))? {
                table.special.set(stem, id);
            }
        }
        table.add_bos = metadata.bool("tokenizer.ggml.add_bos_token")?;
        table.add_eos = metadata.bool("tokenizer.ggml.add_eos_token")?;
        table.suppress = metadata.u32_array("tokenizer.ggml.suppress_tokens")?.unwrap_or_default();
        table.check()?;
        Ok(table)
    }

    /// Arrays agree in length and ids lie in the table.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let n = self.tokens.len();
        let bad = |key: &str, expected: String, found: String| {
            Err(Error::BadKey { key: format!("tokenizer.ggml.{key}"), expected, found })
        };
        if n == 0 || n > i32::MAX as usize {
            return bad("tokens", "at least one token and at most 2^31".to_owned(), format!("{n}"));
        }
        let as_many = || format!("{n} entries, one for each of `tokenizer.ggml.tokens`");
        if !self.kinds.is_empty() && self.kinds.len() != n {
            return bad("token_type", as_many(), format!("{}", self.kinds.len()));
        }
        let needs_scores = self.model == TokenizerModel::Spm;
        if self.scores.len() != n && (needs_scores || !self.scores.is_empty()) {
            return bad("scores", as_many(), format!("{}", self.scores.len()));
        }
        if let Some(at) = self.scores.iter().position(|score| score.is_nan()) {
            return bad("scores", "numbers".to_owned(), format!("NaN at {at}"));
        }
        let in_table = || format!("an id below {n}, the number of tokens");
        for (stem, id) in self.special.by_key() {
            if let Some(id) = id.filter(|id| *id as usize >= n) {
                return bad(&format!("{stem}_token_id"), in_table(), format!("{id}"));
            }
        }
        match self.suppress.iter().find(|id| **id as usize >= n) {
            Some(id) => bad("suppress_tokens", in_table(), format!("{id}")),
            None => Ok(()),
        }
    }
}

/// The token id under `key`. Some converters write −1, signed or as the largest u32, for "none".
fn id(metadata: &Metadata, key: &str) -> Result<Option<Token>, Error> {
    match metadata.get(key).and_then(|value| value.as_int()) {
        Some(-1 | 0xffff_ffff) => Ok(None),
        _ => Ok(metadata.u32(key)?),
    }
}
