//! The vocabulary: what each token is, what it writes, and which tokens end an answer.
//!
//! A token has a *text*, the spelling in the file, and *bytes*, what it adds to the output. They differ:
//!
//! | kind         | byte-level BPE                        | gemma4 and SentencePiece   |
//! |--------------|---------------------------------------|----------------------------|
//! | normal       | characters mapped back to bytes       | U+2581 becomes a space     |
//! | byte         | as normal                             | `<0xE2>` becomes byte E2   |
//! | user-defined | verbatim                              | verbatim                   |
//! | control, unknown, unused | nothing, or verbatim when specials are shown | the same |
//!
//! Bytes of one token need not be whole UTF-8 characters; [`crate::StreamDecoder`] puts them together.

use std::collections::HashMap;
use std::fmt;

use paceline_gguf::{Metadata, Strings};
use rustc_hash::FxBuildHasher;

use crate::bpe::byte_of_char;
use crate::{Error, Token, TokenTable, TokenizerModel};

/// What a token is for (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TokenKind {
    /// Ordinary text.
    Normal = 1,
    /// Stands for text that no token can write.
    Unknown = 2,
    /// Structure, such as a turn marker; not shown.
    Control = 3,
    /// Always matched in text before the tokenizer runs, and shown.
    UserDefined = 4,
    /// A row of padding: never sampled and never matched.
    Unused = 5,
    /// One raw byte.
    Byte = 6,
}

impl TokenKind {
    /// The kind with this number in a file; numbers that later formats may add read as normal text.
    pub fn from_number(number: i32) -> TokenKind {
        match number {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        }
    }
}

/// The ids that files give a role by key: `tokenizer.ggml.{bos,eos,…}_token_id`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begins a sequence.
    pub bos: Option<Token>,
    /// Ends a sequence.
    pub eos: Option<Token>,
    /// Ends a turn.
    pub eot: Option<Token>,
    /// Ends a message that expects a tool's answer.
    pub eom: Option<Token>,
    /// Stands for what cannot be written.
    pub unknown: Option<Token>,
    /// Separates two texts.
    pub separator: Option<Token>,
    /// Fills a batch.
    pub padding: Option<Token>,
    /// Stands for a token to be guessed; DFlash drafters fill their block with it.
    pub mask: Option<Token>,
    /// Fill in the middle: before the prefix.
    pub fim_prefix: Option<Token>,
    /// Fill in the middle: before the suffix.
    pub fim_suffix: Option<Token>,
    /// Fill in the middle: before the answer.
    pub fim_middle: Option<Token>,
    /// Fill in the middle: padding.
    pub fim_pad: Option<Token>,
    /// Fill in the middle: before a repository's name.
    pub fim_repo: Option<Token>,
    /// Fill in the middle: before a file's name.
    pub fim_separator: Option<Token>,
}

impl SpecialIds {
    /// Key stem and id, in a fixed order: the file's key is `tokenizer.ggml.{stem}_token_id`.
    ///
    /// "seperator" is how the format spells it.
    pub fn by_key(&self) -> [(&'static str, Option<Token>); 14] {
        [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("eom", self.eom),
            ("unknown", self.unknown),
            ("seperator", self.separator),
            ("padding", self.padding),
            ("mask", self.mask),
            ("fim_pre", self.fim_prefix),
            ("fim_suf", self.fim_suffix),
            ("fim_mid", self.fim_middle),
            ("fim_pad", self.fim_pad),
            ("fim_rep", self.fim_repo),
            ("fim_sep", self.fim_separator),
        ]
    }

    /// Sets the id of the role whose key stem is `stem`.
    ///
    /// # Panics
    /// If no role has that stem.
    pub fn set(&mut self, stem: &str, id: Token) {
        let role = match stem {
            "bos" => &mut self.bos,
            "eos" => &mut self.eos,
            "eot" => &mut self.eot,
            "eom" => &mut self.eom,
            "unknown" => &mut self.unknown,
            "seperator" => &mut self.separator,
            "padding" => &mut self.padding,
            "mask" => &mut self.mask,
            "fim_pre" => &mut self.fim_prefix,
            "fim_suf" => &mut self.fim_suffix,
            "fim_mid" => &mut self.fim_middle,
            "fim_pad" => &mut self.fim_pad,
            "fim_rep" => &mut self.fim_repo,
            "fim_sep" => &mut self.fim_separator,
            _ => panic!("no special token has the key stem `{stem}`"),
        };
        *role = Some(id);
    }
}

/// Texts that end an answer whatever the file's keys say: files of one family differ in which ids they name.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_text|>",
];

/// Fill-in-the-middle tokens that end an answer: a model that begins another file has finished this one.
const FIM_END_TEXTS: &[&str] = &[
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<|file_sep|>",
];

/// Tags by which thoughts and tool calls are found in an answer. They show even where a file types them as control
/// tokens: else an answer would begin with its thought, and nobody could tell where that ends.
const TAG_TEXTS: &[&str] = &["<think>", "</think>", "<tool_call>", "</tool_call>"];

/// Gemma 4 stops here to wait for a tool, although the token is shown like text.
const GEMMA_END_TEXT: &str = "<|tool_response>";

/// The tokens of a model. Cheap to ask, never changed after it is built.
#[derive(Clone, Debug)]
pub struct Vocab {
    model: TokenizerModel,
    texts: Strings,
    outputs: Strings,
    kinds: Vec<TokenKind>,
    tags: Vec<Token>,
    scores: Vec<f32>,
    merges: Strings,
    by_text: HashMap<Box<[u8]>, Token, FxBuildHasher>,
    special: SpecialIds,
    end_of_generation: Vec<Token>,
    suppressed: Vec<Token>,
    add_bos: bool,
    add_eos: bool,
}

impl Vocab {
    /// Reads the vocabulary of a model file.
    pub fn from_metadata(metadata: &Metadata) -> Result<Vocab, Error> {
        Vocab::new(&TokenTable::from_metadata(metadata)?)
    }

    /// Builds the vocabulary of a table, checking it first.
    pub fn new(table: &TokenTable) -> Result<Vocab, Error> {
        table.check()?;
        let mut kinds = if table.kinds.is_empty() {
            vec![TokenKind::Normal; table.tokens.len()]
        } else {
            table.kinds.clone()
        };
        let end_of_generation = end_of_generation(table, &mut kinds);

        let mut texts = Strings::new();
        let mut outputs = Strings::new();
        let mut by_text = HashMap::with_capacity_and_hasher(table.tokens.len(), FxBuildHasher);
        let mut suppressed = table.suppress.clone();
        for (id, (text, kind)) in (0..).zip(table.tokens.iter().zip(&kinds)) {
            texts.push(text);
            outputs.push(output_bytes(table.model, text, *kind));
            if *kind == TokenKind::Unused {
                suppressed.push(id);
            } else {
                by_text.entry(text.into()).or_insert(id);
            }
        }
        suppressed.sort_unstable();
        suppressed.dedup();

        let mut special = table.special.clone();
        if table.model == TokenizerModel::Spm {
            // SentencePiece's own layout, for files that leave the keys out.
            let control = |id: Token| (kinds.get(id as usize) == Some(&TokenKind::Control)).then_some(id);
            special.bos = special.bos.or(control(1));
            special.eos = special.eos.or(control(2));
            special.unknown = special.unknown.or((kinds[0] == TokenKind::Unknown).then_some(0));
        }
        let wants_bos = match table.model {
            TokenizerModel::Gemma => true, // some files say false and answer nonsense without it
            TokenizerModel::Spm => table.add_bos.unwrap_or(true),
            TokenizerModel::ByteLevelBpe => match table.add_bos {
                Some(said) => said,
                None => crate::pretokenizer::find(table.pre.as_deref())?.add_bos,
            },
        };
        let tags: Vec<Token> =
            TAG_TEXTS.iter().filter_map(|tag| by_text.get(tag.as_bytes()).copied()).collect();
        Ok(Vocab {
            model: table.model,
            tags,
            texts,
            outputs,
            kinds,
            scores: table.scores.clone(),
            merges: table.merges.clone(),
            by_text,
            add_bos: wants_bos && special.bos.is_some(),
            add_eos: table.add_eos.unwrap_or(false) && special.eos.is_some(),
            special,
            end_of_generation,
            suppressed,
        })
    }

    /// How many tokens there are, padding included: the rows of the output matrix.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a vocabulary without tokens is refused when it is built"
    )]
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The algorithm that this vocabulary belongs to.
    pub fn model(&self) -> TokenizerModel {
        self.model
    }

    /// The token's spelling in the file.
    ///
    /// # Panics
    /// If `token` is not in the vocabulary, as every method that takes one.
    pub fn text(&self, token: Token) -> &[u8] {
        &self.texts[token as usize]
    }

    /// What the token adds to the output, which may be part of a UTF-8 character.
    ///
    /// Control, unknown and unused tokens add nothing unless `show_special`; tags of thoughts and tool calls always
    /// do.
    pub fn bytes(&self, token: Token, show_special: bool) -> &[u8] {
        match self.kind(token) {
            TokenKind::Control if self.tags.contains(&token) => &self.outputs[token as usize],
            TokenKind::Control | TokenKind::Unknown | TokenKind::Unused if !show_special => &[],
            _ => &self.outputs[token as usize],
        }
    }

    /// What the token is for.
    pub fn kind(&self, token: Token) -> TokenKind {
        self.kinds[token as usize]
    }

    /// The token with this spelling; unused tokens are not found.
    pub fn find(&self, text: impl AsRef<[u8]>) -> Option<Token> {
        self.by_text.get(text.as_ref()).copied()
    }

    /// The SentencePiece score; 0 in vocabularies without scores.
    pub fn score(&self, token: Token) -> f32 {
        self.scores.get(token as usize).copied().unwrap_or(0.0)
    }

    /// The ids with a role.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// Begins a sequence, in models that have such a token.
    pub fn bos(&self) -> Option<Token> {
        self.special.bos
    }

    /// Ends a sequence. [`Vocab::is_eog`] is the question to ask of a generated token.
    pub fn eos(&self) -> Option<Token> {
        self.special.eos
    }

    /// Ends a turn, in models that tell it from the end of a sequence.
    pub fn eot(&self) -> Option<Token> {
        self.special.eot
    }

    /// The token that stands for one to be guessed.
    pub fn mask(&self) -> Option<Token> {
        self.special.mask
    }

    /// Whether a prompt should begin with [`Vocab::bos`].
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether the file asks for [`Vocab::eos`] after a text. Left to the caller: a prompt to be continued must not
    /// end so.
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// Whether generating this token ends the answer.
    pub fn is_eog(&self, token: Token) -> bool {
        self.end_of_generation.binary_search(&token).is_ok()
    }

    /// Every token that ends an answer, in order.
    pub fn end_of_generation(&self) -> &[Token] {
        &self.end_of_generation
    }

    /// Tokens never to be sampled, in order: the file's own list and all padding.
    pub fn suppressed(&self) -> &[Token] {
        &self.suppressed
    }

    /// Tokens of `kind`, in order.
    pub fn of_kind(&self, kind: TokenKind) -> impl Iterator<Item = Token> + '_ {
        (0..).zip(&self.kinds).filter(move |(_, k)| **k == kind).map(|(id, _)| id)
    }

    /// A number that two vocabularies share when all ids mean the same text: FNV-1a over lengths and texts.
    ///
    /// Stable across versions and machines, so that files on disk may carry it.
    pub fn digest(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut eat = |bytes: &[u8]| {
            for byte in bytes {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        for id in 0..self.len() {
            let text = &self.texts[id];
            eat(&(text.len() as u32).to_le_bytes());
            eat(text);
        }
        hash
    }

    /// How `other` differs, for the check that a drafter speaks its target's language.
    pub fn diff(&self, other: &Vocab) -> VocabDiff {
        let n_shared = self.len().min(other.len());
        let mut differing = (0..n_shared).filter(|&id| self.texts.get(id) != other.texts.get(id));
        let first_text = differing.next().map(|id| id as Token);
        let n_text = usize::from(first_text.is_some()) + differing.count();
        let special = (self.special.by_key().into_iter().zip(other.special.by_key()))
            .filter(|((_, ours), (_, theirs))| ours != theirs)
            .map(|((name, ours), (_, theirs))| (name, ours, theirs))
            .collect();
        let first_merge = first_merge(&self.merges, &other.merges);
        VocabDiff { n_vocab: (self.len(), other.len()), first_text, n_text, first_merge, special }
    }
}

/// The first rank at which two lists of merges differ. One that a file leaves out claims nothing.
fn first_merge(ours: &Strings, theirs: &Strings) -> Option<MergeDiff> {
    if ours.is_empty() || theirs.is_empty() {
        return None;
    }
    let rank = (0..ours.len().max(theirs.len())).find(|&rank| ours.get(rank) != theirs.get(rank))?;
    let text = |merges: &Strings| merges.get(rank).map(|rule| String::from_utf8_lossy(rule).into_owned());
    Some(MergeDiff { rank, ours: text(ours), theirs: text(theirs) })
}

/// What the output shows of a token.
fn output_bytes(model: TokenizerModel, text: &[u8], kind: TokenKind) -> Vec<u8> {
    let written = matches!(kind, TokenKind::Normal | TokenKind::Byte);
    match (model, std::str::from_utf8(text)) {
        (_, Err(_)) => text.to_vec(),
        _ if !written => text.to_vec(),
        (TokenizerModel::ByteLevelBpe, Ok(text)) => {
            let mut out = Vec::with_capacity(text.len());
            for c in text.chars() {
                match byte_of_char(c) {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
            out
        }
        (TokenizerModel::Gemma | TokenizerModel::Spm, Ok(text)) => match byte_token(text) {
            Some(byte) if kind == TokenKind::Byte => vec![byte],
            _ => text.replace('\u{2581}', " ").into_bytes(),
        },
    }
}

/// The byte that `<0xE2>` stands for.
fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Tokens that end an answer, in order. One named by text in a file that types it as plain text is made a control
/// token: such files come from converters that lost the type, and a turn marker must neither show nor be typed in.
fn end_of_generation(table: &TokenTable, kinds: &mut [TokenKind]) -> Vec<Token> {
    let ids = &table.special;
    let mut ends: Vec<Token> = [ids.eos, ids.eot, ids.eom, ids.fim_pad, ids.fim_repo, ids.fim_separator]
        .into_iter()
        .flatten()
        .collect();
    for (id, text) in (0..).zip(table.tokens.iter()) {
        let kind = &mut kinds[id as usize];
        let is_text = |known: &&str| known.as_bytes() == text;
        if *kind == TokenKind::Unused {
            continue;
        }
        if END_TEXTS.iter().any(is_text) || FIM_END_TEXTS.iter().any(is_text) {
            ends.push(id);
            if *kind == TokenKind::Normal {
                *kind = TokenKind::Control;
            }
        }
        if table.model == TokenizerModel::Gemma && is_text(&GEMMA_END_TEXT) {
            ends.push(id);
        }
    }
    if table.model == TokenizerModel::Gemma {
        // In Gemma 4 `</s>` is a plain HTML tag, though some files name it as an end.
        ends.retain(|&id| table.tokens[id as usize] != *b"</s>");
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// The first merge rule that two vocabularies do not share. One of the texts is missing where its list has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeDiff {
    /// Where it is in both lists.
    pub rank: usize,
    /// The first vocabulary's rule, `left right`.
    pub ours: Option<String>,
    /// The second one's.
    pub theirs: Option<String>,
}

impl fmt::Display for MergeDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show =
            |rule: &Option<String>| rule.as_ref().map_or("none".to_owned(), |rule| format!("`{rule}`"));
        write!(
            f,
            "merges differ from rank {} on: {} against {}",
            self.rank,
            show(&self.ours),
            show(&self.theirs)
        )
    }
}

/// How two vocabularies differ; see [`Vocab::diff`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabDiff {
    /// Sizes of the first and the second.
    pub n_vocab: (usize, usize),
    /// The first id below both sizes whose text differs.
    pub first_text: Option<Token>,
    /// How many ids below both sizes have differing texts.
    pub n_text: usize,
    /// The first merge that differs: the same text becomes other tokens.
    pub first_merge: Option<MergeDiff>,
    /// Roles given to different ids: key stem, first, second.
    pub special: Vec<(&'static str, Option<Token>, Option<Token>)>,
}

impl VocabDiff {
    /// Nothing differs.
    pub fn is_same(&self) -> bool {
        self.same_size() && self.same_texts() && self.same_merges() && self.special.is_empty()
    }

    /// Both have as many tokens.
    pub fn same_size(&self) -> bool {
        self.n_vocab.0 == self.n_vocab.1
    }

    /// Every id that both have means the same text.
    pub fn same_texts(&self) -> bool {
        self.first_text.is_none()
    }

    /// Text becomes tokens by the same rules.
    pub fn same_merges(&self) -> bool {
        self.first_merge.is_none()
    }

    /// Sizes, texts and merges agree, and only roles such as BOS are given to different ids.
    pub fn only_special_ids(&self) -> bool {
        self.same_size() && self.same_texts() && self.same_merges() && !self.special.is_empty()
    }
}

impl fmt::Display for VocabDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.same_size() {
            parts.push(format!("{} tokens against {}", self.n_vocab.0, self.n_vocab.1));
        }
        if let Some(first) = self.first_text {
            parts.push(format!("{} tokens have other texts, the first is {first}", self.n_text));
        }
        parts.extend(self.first_merge.iter().map(MergeDiff::to_string));
        let show = |id: &Option<Token>| id.map_or("none".to_owned(), |id| id.to_string());
        for (name, ours, theirs) in &self.special {
            parts.push(format!("{name} is {} against {}", show(ours), show(theirs)));
        }
        if parts.is_empty() {
            parts.push("the same vocabulary".to_owned());
        }
        f.write_str(&parts.join("; "))
    }
}
