//! A checkpoint's tokenizer as GGUF metadata: `tokenizer.json`, with the flags of `tokenizer_config.json`, the end tokens
//! and sampling defaults of `generation_config.json`, and the chat template.
//!
//! Two kinds can be expressed: byte-level BPE (`tokenizer.ggml.model = gpt2`), and Gemma's BPE over characters (`gemma4`),
//! which is known by its byte fallback and by spaces that become U+2581. For the first, GGUF does not store the pattern that splits
//! text before merging but its name, so the pattern must be one of [`PRE_TOKENIZERS`], character by character. Ids without
//! a token, up to the rows of the embedding, become `[PADn]` of type unused: never sampled, never matched.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use paceline_gguf::{Strings, Value};
use serde_json::Value as Json;

use crate::Error;
use crate::config::Config;

/// The patterns that have a name in GGUF files: (name, pattern in `tokenizer.json`).
const PRE_TOKENIZERS: &[(&str, &str)] = &[
    (
        "qwen2",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        "qwen35",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        "llama-bpe",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// Special tokens that are known by their text: (the key's middle, texts in order of preference).
const KNOWN_BY_TEXT: &[(&str, &[&str])] = &[
    ("eot", &["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>"]),
    ("eom", &["<|eom_id|>"]),
    ("fim_pre", &["<|fim_prefix|>"]),
    ("fim_suf", &["<|fim_suffix|>"]),
    ("fim_mid", &["<|fim_middle|>"]),
    ("fim_pad", &["<|fim_pad|>"]),
    ("fim_rep", &["<|repo_name|>"]),
    ("fim_sep", &["<|file_sep|>"]),
];

/// Texts that every reader takes for the end of a generation, whatever the keys say.
const ENDS_BY_TEXT: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<turn|>",
    "<eos>",
    "<|tool_response>",
];

/// Gemma's markers that a reader of its answers looks for: shown like text, though its tokenizer calls them special.
const GEMMA_MARKERS: &[&str] = &[
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|\"|>",
];

/// `tokenizer.ggml.token_type`, by the numbers of the format.
#[derive(Clone, Copy)]
enum TokenType {
    Normal = 1,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// How text is cut and merged.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    ByteLevel,
    Gemma,
}

/// What a directory says about text.
pub(crate) struct Tokenizer {
    /// Keys `tokenizer.*` and `general.sampling.*`, in order.
    pub(crate) keys: Vec<(String, Value)>,
    /// What could not be expressed and does not stop a conversion.
    pub(crate) notes: Vec<String>,
}

/// Whether a directory has a tokenizer of its own.
pub(crate) fn exists(dir: &Path) -> bool {
    dir.join("tokenizer.json").exists()
}

/// Reads the tokenizer of `dir` for a model whose embedding has `n_vocab` rows. `pre` overrules the detection.
pub(crate) fn read(dir: &Path, n_vocab: usize, pre: Option<&str>) -> Result<Tokenizer, Error> {
    if !exists(dir) {
        return Err(Error::MissingFile {
            dir: dir.to_owned(),
            expected: "`tokenizer.json`",
            hint: "copy it from the model's original repository, or save it with `AutoTokenizer.save_pretrained`",
        });
    }
    let file = File::read(dir.join("tokenizer.json"))?;
    let config = Config::read_optional(&dir.join("tokenizer_config.json"))?;
    let generation = Config::read_optional(&dir.join("generation_config.json"))?;
    let mut keys: Vec<(String, Value)> = Vec::new();
    let mut notes = Vec::new();
    let mut put = |key: &str, value: Value| keys.push((format!("tokenizer.{key}"), value));

    let (model, pre) = match file.kind {
        Kind::ByteLevel => ("gpt2", file.pre_tokenizer(pre)?),
        Kind::Gemma => ("gemma4", "gemma4"),
    };
    put("ggml.model", model.into());
    put("ggml.pre", pre.into());
    let vocab = file.vocab(n_vocab)?;
    put("ggml.tokens", vocab.texts.clone().into());
    put("ggml.token_type", vocab.types.clone().into());
    put("ggml.merges", file.merges()?.into());

    let mut special = HashMap::new();
    for (key, name) in
        [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("mask", "mask")]
    {
        if let Some(id) = vocab.special(&config, &format!("{key}_token"))? {
            special.insert(name, id);
        }
    }
    let ends = vocab.generation_ends(&generation)?;
    if let Some(&first) = ends.first() {
        special.entry("eos").or_insert(first);
    }
    for &(name, texts) in KNOWN_BY_TEXT {
        if let Some(&id) = texts.iter().find_map(|text| vocab.ids.get(*text)) {
            special.insert(name, id);
        }
    }
    // The format has one end key each for sequence, turn and message; what fits none of them goes by its text.
    for id in ends {
        let by_key = ["eos", "eot", "eom"].iter().any(|name| special.get(name) == Some(&id));
        let text = vocab.text(id);
        if by_key || ENDS_BY_TEXT.contains(&text) {
            continue;
        }
        if special.contains_key("eot") {
            notes.push(format!(
                "token {id} `{text}` ends a generation in generation_config.json; the file can't say so"
            ));
        } else {
            special.insert("eot", id);
        }
    }
    let names = ["bos", "eos", "eot", "eom", "unknown", "padding", "mask"];
    let fim = KNOWN_BY_TEXT.iter().map(|(name, _)| *name).filter(|name| name.starts_with("fim"));
    for name in names.into_iter().chain(fim) {
        if let Some(&id) = special.get(name) {
            put(&format!("ggml.{name}_token_id"), id.into());
        }
    }
    let add_bos = match config.opt_bool("add_bos_token")? {
        Some(add) => add,
        // Its own files leave it out or say false, and answer nonsense without.
        None if file.kind == Kind::Gemma => special.contains_key("bos"),
        None => special.get("bos").is_some_and(|&bos| file.template_starts_with(vocab.text(bos))),
    };
    put("ggml.add_bos_token", add_bos.into());
    if let Some(add) = config.opt_bool("add_eos_token")? {
        put("ggml.add_eos_token", add.into());
    }
    if let Some(ids) = generation.opt_ids("suppress_tokens")? {
        put("ggml.suppress_tokens", ids.into_iter().map(|id| id as i32).collect::<Vec<_>>().into());
    }
    for (key, template) in chat_templates(dir, &config)? {
        put(&key, template);
    }
    keys.extend(sampling(&generation)?);
    Ok(Tokenizer { keys, notes })
}

/// `tokenizer.json`.
struct File {
    config: Config,
    model: Config,
    kind: Kind,
}

impl File {
    fn read(path: PathBuf) -> Result<File, Error> {
        let config = Config::read(&path)?;
        let model = config.section("model").ok_or_else(|| config.error("model", "an object", ""))?;
        let mut file = File { config, model, kind: Kind::ByteLevel };
        // Files from before 2021 leave out the type of a BPE model.
        let ty = file.model.opt_str("type")?.unwrap_or("BPE");
        if ty != "BPE" {
            return Err(file.error("a BPE model", format!("`{ty}`"), ONLY_BPE));
        }
        if file.model.flag("byte_fallback")? {
            // SentencePiece models have more steps, such as a space in front.
            let step = file.config.get("normalizer").unwrap_or(&Json::Null);
            let of_space = step.get("pattern").and_then(|p| p.get("String")) == Some(&Json::from(" "));
            if !of_space || step.get("content") != Some(&Json::from("\u{2581}")) {
                return Err(file.error("byte-level BPE", "BPE with byte fallback (SentencePiece)", ONLY_BPE));
            }
            file.kind = Kind::Gemma;
        }
        Ok(file)
    }

    fn error(&self, expected: impl Into<String>, found: impl Into<String>, hint: &str) -> Error {
        Error::Tokenizer {
            path: self.config.path().to_owned(),
            expected: expected.into(),
            found: found.into(),
            hint: hint.into(),
        }
    }

    /// The name of the pattern of the first `Split` step.
    fn pre_tokenizer(&self, forced: Option<&str>) -> Result<&'static str, Error> {
        let known = || PRE_TOKENIZERS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        if let Some(name) = forced {
            let found = PRE_TOKENIZERS.iter().find(|(known, _)| *known == name);
            return found.map(|(name, _)| *name).ok_or_else(|| {
                self.error(
                    format!("one of {} as pre-tokenizer", known()),
                    format!("`{name}`"),
                    "give another one",
                )
            });
        }
        let pre = self.config.get("pre_tokenizer").unwrap_or(&Json::Null);
        let one = std::slice::from_ref(pre);
        let steps = pre.get("pretokenizers").and_then(Json::as_array).map_or(one, |steps| steps.as_slice());
        let pattern = steps.iter().find_map(|step| step.get("pattern")?.get("Regex")?.as_str());
        let found = PRE_TOKENIZERS.iter().find(|(_, known)| Some(*known) == pattern);
        found.map(|(name, _)| *name).ok_or_else(|| {
            let found = pattern.map_or("no pattern".into(), |pattern| format!("the pattern {pattern}"));
            let hint = "if it splits text like one of them, name that one as pre-tokenizer";
            self.error(format!("the pattern of {}", known()), found, hint)
        })
    }

    fn vocab(&self, n_vocab: usize) -> Result<Vocab, Error> {
        let Some(Json::Object(entries)) = self.model.get("vocab") else {
            return Err(self.model.error("vocab", "an object of ids by text", ""));
        };
        let mut slots: Vec<Option<(String, TokenType)>> = vec![None; n_vocab];
        let mut put = |text: &str, id: Option<u64>, ty| {
            let id = id.ok_or_else(|| self.error("an id", format!("none for `{text}`"), DAMAGED))?;
            let slot = usize::try_from(id).ok().and_then(|id| slots.get_mut(id)).ok_or_else(|| {
                let expected = format!("ids below {n_vocab}, the rows of the embedding");
                self.error(expected, format!("id {id} for `{text}`"), "the tokenizer is of another model")
            })?;
            match slot {
                Some((other, _)) if other != text => {
                    let found = format!("`{other}` and `{text}` with id {id}");
                    Err(self.error("one token for each id", found, DAMAGED))
                }
                _ => {
                    *slot = Some((text.to_owned(), ty));
                    Ok(())
                }
            }
        };
        for (text, id) in entries {
            let byte = self.kind == Kind::Gemma && is_byte(text);
            put(text, id.as_u64(), if byte { TokenType::Byte } else { TokenType::Normal })?;
        }
        for token in self.config.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
            let Some(text) = token.get("content").and_then(Json::as_str) else {
                return Err(self.error("the text of each added token", token.to_string(), DAMAGED));
            };
            let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
            // Some files forget to mark `<|fim_prefix|>` and its like; shown in the output they'd only confuse.
            let control = match self.kind {
                Kind::ByteLevel => special || (text.starts_with("<|") && text.ends_with("|>")),
                Kind::Gemma => special && !GEMMA_MARKERS.contains(&text),
            };
            let ty = if control { TokenType::Control } else { TokenType::UserDefined };
            put(text, token.get("id").and_then(Json::as_u64), ty)?;
        }
        let mut vocab =
            Vocab { texts: Strings::new(), types: Vec::with_capacity(n_vocab), ids: HashMap::new() };
        for (id, slot) in slots.into_iter().enumerate() {
            let (text, ty) = slot.unwrap_or_else(|| (format!("[PAD{id}]"), TokenType::Unused));
            vocab.texts.push(&text);
            vocab.types.push(ty as i32);
            vocab.ids.insert(text, id as u32);
        }
        Ok(vocab)
    }

    /// `left right` for each merge, by rank.
    fn merges(&self) -> Result<Strings, Error> {
        let merges = self.model.opt_array("merges", "merges", Some)?.unwrap_or_default();
        let mut all = Strings::new();
        for merge in merges {
            let text = match merge {
                Json::String(text) => text.clone(),
                Json::Array(pair) => pair.iter().filter_map(Json::as_str).collect::<Vec<_>>().join(" "),
                _ => String::new(),
            };
            // Byte-level text has no spaces, so that exactly one separates the halves.
            if text.split(' ').filter(|half| !half.is_empty()).count() != 2 || text.matches(' ').count() != 1
            {
                return Err(self.error("merges of two byte-level texts", merge.to_string(), DAMAGED));
            }
            all.push(text);
        }
        Ok(all)
    }

    /// Whether the post-processor puts `token` in front of every text.
    fn template_starts_with(&self, token: &str) -> bool {
        let post = self.config.get("post_processor").unwrap_or(&Json::Null);
        let one = std::slice::from_ref(post);
        let steps = post.get("processors").and_then(Json::as_array).map_or(one, |steps| steps.as_slice());
        steps.iter().any(|step| {
            let first =
                step.get("single").and_then(|single| single.get(0)?.get("SpecialToken")?.get("id")?.as_str());
            first == Some(token)
        })
    }
}

const ONLY_BPE: &str =
    "only byte-level BPE and that of Gemma 4 can be converted: use a published GGUF of this model";
const DAMAGED: &str = "the file is damaged: download it again";

/// Whether a token is `<0x00>` to `<0xFF>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Every id's text and type, padding included.
struct Vocab {
    texts: Strings,
    types: Vec<i32>,
    ids: HashMap<String, u32>,
}

impl Vocab {
    fn text(&self, id: u32) -> &str {
        self.texts.get(id as usize).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or("")
    }

    /// The id of `bos_token` and its like: a text, or an object with the text as `content`.
    fn special(&self, config: &Config, key: &str) -> Result<Option<u32>, Error> {
        let Some(value) = config.get(key) else { return Ok(None) };
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        let id = text.and_then(|text| self.ids.get(text));
        id.map(|&id| Some(id))
            .ok_or_else(|| config.error(key, "the text of a token", "the vocabulary has none like it"))
    }

    /// `eos_token_id` of the generation config: one id or several.
    fn generation_ends(&self, generation: &Config) -> Result<Vec<u32>, Error> {
        let ids = match generation.get("eos_token_id") {
            Some(Json::Array(_)) => generation.opt_ids("eos_token_id")?.unwrap_or_default(),
            Some(Json::Number(id)) => vec![id.as_u64().and_then(|id| id.try_into().ok()).unwrap_or(u32::MAX)],
            _ => return Ok(Vec::new()),
        };
        if ids.iter().any(|&id| id as usize >= self.types.len()) {
            let expected = format!("ids below {}", self.types.len());
            return Err(generation.error("eos_token_id", expected, "the file is of another model"));
        }
        Ok(ids)
    }
}

/// The templates' keys and sources. A file of its own wins over the config's.
fn chat_templates(dir: &Path, config: &Config) -> Result<Vec<(String, Value)>, Error> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        let source = fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
        return Ok(vec![("chat_template".into(), source.into())]);
    }
    match config.get("chat_template") {
        None => Ok(Vec::new()),
        Some(Json::String(source)) => Ok(vec![("chat_template".into(), source.as_str().into())]),
        Some(_) => {
            let text = |value: &Json, key: &str| value.get(key)?.as_str().map(str::to_owned);
            let named = config.opt_array("chat_template", "named templates", |value| {
                Some((text(value, "name")?, text(value, "template")?))
            })?;
            let (mut names, mut keys) = (Vec::new(), Vec::new());
            for (name, source) in named.unwrap_or_default() {
                let key =
                    if name == "default" { "chat_template".into() } else { format!("chat_template.{name}") };
                keys.push((key, source.into()));
                names.extend((name != "default").then_some(name));
            }
            if !names.is_empty() {
                keys.push(("chat_templates".into(), names.into()));
            }
            Ok(keys)
        }
    }
}

/// The settings that the model's makers recommend.
fn sampling(generation: &Config) -> Result<Vec<(String, Value)>, Error> {
    let mut keys = Vec::new();
    for (theirs, ours) in [("temperature", "temp"), ("top_p", "top_p"), ("min_p", "min_p")] {
        if let Some(x) = generation.opt_f32(theirs)? {
            keys.push((format!("general.sampling.{ours}"), x.into()));
        }
    }
    if let Some(k) = generation.get("top_k").and_then(Json::as_i64).and_then(|k| i32::try_from(k).ok()) {
        keys.push(("general.sampling.top_k".into(), k.into()));
    }
    Ok(keys)
}
