//! The dialects of DFlash files: three tensor naming schemes, five architecture names, two ways to count layers.
//!
//! | `general.architecture` | taps | base | tensors |
//! |---|---|---|---|
//! | `dflash` | `dflash.target_layers` | layer + 1 | `fc`, `enc.output_norm` |
//! | `dflash-draft`, or `dflash` with its tensors | `….dflash.target_layer_ids` | layer | `dflash_fc`, `dflash_hidden_norm` |
//! | `qwen35-dflash-draft` | none: spread evenly, `n_target_layers` is their number | layer | `dflash.fc`, `dflash.hidden_norm` |
//! | `gemma4-dflash-draft` | `….dflash.target_layer_ids` | layer | `dflash.fc`, `dflash.hidden_norm` |
//!
//! A file is read into one [`Contract`], checked against the target, and from there on nothing knows which dialect
//! it was. One off in a tap is silent (acceptance drops, text stays right), so nothing is guessed.

use paceline_backend::BlockMask;
use paceline_gguf::Gguf;
use paceline_models::{Hparams, Weights};

use crate::{LoadError, Token};

/// Architecture names that hold a DFlash drafter.
pub(super) const ARCHS: &[&str] = &["dflash", "dflash-draft", "qwen35-dflash-draft", "gemma4-dflash-draft"];

/// How a tensor naming scheme calls what differs.
struct Names {
    label: &'static str,
    fc: &'static str,
    hidden_norm: &'static str,
}

const NAMES: &[Names] = &[
    Names { label: "fc", fc: "fc.weight", hidden_norm: "enc.output_norm.weight" },
    Names { label: "dflash_fc", fc: "dflash_fc.weight", hidden_norm: "dflash_hidden_norm.weight" },
    Names { label: "dflash.fc", fc: "dflash.fc.weight", hidden_norm: "dflash.hidden_norm.weight" },
];

/// Variants that need more than this file implements, by a tensor that only they have.
const OTHER_VARIANTS: &[(&str, &str)] = &[
    ("attn_conv", "DFlash2"),
    ("selector", "DFlash2"),
    ("markov_", "DSpark"),
    ("conf_proj", "DSpark"),
    ("dflash_aux_hidden_norm", "Laguna DFlash"),
];

/// One layer's view of the context and of its own block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerMask {
    pub block: BlockMask,
    pub window: Option<usize>,
}

/// Everything that a drafter file says, in one form, checked.
#[derive(Debug)]
pub(super) struct Contract {
    pub arch: String,
    pub dialect: &'static str,
    pub fc: &'static str,
    pub hidden_norm: &'static str,
    /// `ffn_norm` or `post_attention_norm`.
    pub ffn_norm: &'static str,
    pub hparams: Hparams,
    /// Target layers whose outputs are read, from 0.
    pub taps: Vec<usize>,
    /// Width of one tapped row.
    pub n_embd_target: usize,
    pub n_block: usize,
    pub mask: Token,
    pub layers: Vec<LayerMask>,
    /// Target token of each drafter token, where the drafter has a vocabulary of its own.
    pub d2t: Option<Vec<Token>>,
    pub own_embedding: bool,
    pub own_head: bool,
}

/// What the target brings into the contract.
pub(super) struct TargetFacts {
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_vocab: usize,
}

impl Contract {
    pub fn read(w: &Weights, arch: &str, target: &TargetFacts) -> Result<Contract, LoadError> {
        let file = w.file();
        refuse_other_variants(file)?;
        let names = tensor_names(file)?;
        let mut hparams = Hparams::read_with_vocab(w, target.n_vocab)?;
        let taps = taps(w, arch, names, &hparams, target)?;
        let n_embd_target = tapped_width(w, names, taps.len(), target)?;
        if hparams.n_embd != target.n_embd && !(w.has("token_embd.weight") && w.has("output.weight")) {
            return Err(mismatch(
                file,
                "embedding_length of a drafter that shares the target's embedding and head",
                target.n_embd,
                hparams.n_embd,
                "; this drafter was made for another target",
            ));
        }
        if arch == "qwen35-dflash-draft" && w.metadata().f32(&w.key("rope.freq_base"))?.is_none() {
            // The runtime that wrote these files had a base built in that its checkpoints contradict.
            return Err(mismatch(
                file,
                "rope.freq_base, which old files of this kind leave out",
                "the base of the checkpoint",
                "none",
                "; convert the original checkpoint again: paceline convert HF_DIR OUT.gguf --target TARGET_DIR",
            ));
        }
        let d2t = vocabulary_map(file, target.n_vocab)?;
        if let Some(d2t) = &d2t {
            hparams.n_vocab = d2t.len();
        }
        let ffn_norm = match w.has("blk.0.ffn_norm.weight") {
            true => "ffn_norm",
            false => "post_attention_norm",
        };
        let contract = Contract {
            arch: arch.to_string(),
            dialect: names.label,
            fc: names.fc,
            hidden_norm: names.hidden_norm,
            ffn_norm,
            taps,
            n_embd_target,
            n_block: block_size(w)?,
            mask: mask_token(w, target.n_vocab)?,
            layers: layer_masks(w, arch, hparams.n_layer)?,
            d2t,
            own_embedding: w.has("token_embd.weight"),
            own_head: w.has("output.weight"),
            hparams,
        };
        contract.check_windows(file)?;
        contract.check_inventory(file)?;
        Ok(contract)
    }

    /// The line that settles reports of low acceptance.
    pub fn line(&self) -> String {
        let masks: Vec<String> = self
            .layers
            .iter()
            .map(|layer| {
                let kind = match layer.block {
                    BlockMask::Causal => "causal",
                    BlockMask::Full => "full",
                };
                layer.window.map_or(kind.to_string(), |window| format!("{kind}/{window}"))
            })
            .collect();
        format!(
            "dflash: arch {}, tensors {}, taps {:?} (from 0), block {}, mask token {}, layers [{}], rope base {}, embedding {}, head {}",
            self.arch,
            self.dialect,
            self.taps,
            self.n_block,
            self.mask,
            masks.join(" "),
            self.hparams.rope_base,
            if self.own_embedding { "own" } else { "target's" },
            match (&self.d2t, self.own_head) {
                (Some(d2t), _) => format!("own, {} tokens", d2t.len()),
                (None, true) => "own".to_string(),
                (None, false) => "target's".to_string(),
            },
        )
    }

    fn check_windows(&self, file: &Gguf) -> Result<(), LoadError> {
        let too_small = |layer: &&LayerMask| {
            layer.block == BlockMask::Full && layer.window.is_some_and(|window| window < self.n_block)
        };
        match self.layers.iter().find(too_small) {
            Some(layer) => Err(mismatch(
                file,
                "attention.sliding_window of layers that see the whole block",
                format!("at least the block size {}", self.n_block),
                layer.window.unwrap_or(0),
                "",
            )),
            None => Ok(()),
        }
    }

    /// A tensor that nobody reads means a variant that this code does not know: it would run and be useless.
    fn check_inventory(&self, file: &Gguf) -> Result<(), LoadError> {
        const PER_LAYER: &[&str] = &[
            "attn_norm.weight",
            "ffn_norm.weight",
            "post_attention_norm.weight",
            "attn_q.weight",
            "attn_k.weight",
            "attn_v.weight",
            "attn_output.weight",
            "attn_q.bias",
            "attn_k.bias",
            "attn_v.bias",
            "attn_output.bias",
            "attn_q_norm.weight",
            "attn_k_norm.weight",
            "attn_sinks.weight",
            "ffn_gate.weight",
            "ffn_up.weight",
            "ffn_down.weight",
        ];
        let global = [self.fc, self.hidden_norm, "output_norm.weight", "token_embd.weight", "output.weight", "d2t"];
        let known = |name: &str| {
            global.contains(&name)
                || name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).is_some_and(|(il, part)| {
                    il.parse::<usize>().is_ok_and(|il| il < self.hparams.n_layer) && PER_LAYER.contains(&part)
                })
        };
        let unknown: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).filter(|n| !known(n)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(mismatch(
            file,
            "tensors of a DFlash drafter",
            format!("{} + 11 per layer, no others", 3),
            unknown.join(", "),
            "; the file holds a variant that is not implemented, or is not a drafter",
        ))
    }
}

pub(super) fn mismatch(
    file: &Gguf,
    what: impl ToString,
    expected: impl ToString,
    found: impl ToString,
    hint: &str,
) -> LoadError {
    LoadError::Mismatch {
        file: file.name().to_string(),
        what: what.to_string(),
        expected: expected.to_string(),
        found: found.to_string(),
        hint: hint.to_string(),
    }
}

fn refuse_other_variants(file: &Gguf) -> Result<(), LoadError> {
    let variant = OTHER_VARIANTS
        .iter()
        .find(|(part, _)| file.tensors().iter().any(|t| t.name.contains(part)))
        .map(|(_, variant)| *variant)
        .or(match file.metadata().str("dflash.decoder_arch")? {
            Some("laguna") => Some("Laguna DFlash"),
            _ => None,
        })
        .or(match file.metadata().get("dflash.hyper_connection.count") {
            Some(_) => Some("DeepSeek DSpark"),
            None => None,
        });
    match variant {
        Some(variant) => Err(LoadError::Unsupported {
            file: file.name().to_string(),
            variant: variant.to_string(),
            way_out: "use a DFlash v1 drafter of the same target, or go without".to_string(),
        }),
        None => Ok(()),
    }
}

fn tensor_names(file: &Gguf) -> Result<&'static Names, LoadError> {
    let found: Vec<&Names> = NAMES.iter().filter(|names| file.tensor(names.fc).is_some()).collect();
    match found[..] {
        [names] => Ok(names),
        [] => Err(mismatch(
            file,
            "fusion weight",
            NAMES.iter().map(|n| n.fc).collect::<Vec<_>>().join(" or "),
            "none of them",
            "; is this a drafter?",
        )),
        _ => Err(mismatch(
            file,
            "tensor names",
            "one dialect",
            found.iter().map(|n| n.fc).collect::<Vec<_>>().join(" and "),
            "",
        )),
    }
}

fn taps(
    w: &Weights,
    arch: &str,
    names: &Names,
    hparams: &Hparams,
    target: &TargetFacts,
) -> Result<Vec<usize>, LoadError> {
    let (file, meta) = (w.file(), w.metadata());
    let list = |key: &str| -> Result<Option<Vec<usize>>, LoadError> {
        Ok(meta.u32_array(key)?.map(|ids| ids.into_iter().map(|id| id as usize).collect()))
    };
    let taps = if let Some(ids) = list("dflash.target_layers")? {
        // This dialect counts the embedding as layer 0.
        let shifted: Option<Vec<usize>> = ids.iter().map(|id| id.checked_sub(1)).collect();
        shifted.ok_or_else(|| mismatch(file, "dflash.target_layers", "layers counted from 1", format!("{ids:?}"), ""))?
    } else if let Some(ids) = first_some([
        list(&w.key("dflash.target_layer_ids"))?,
        list("dflash.target_layer_ids")?,
        list("dflash-draft.dflash.target_layer_ids")?,
    ]) {
        if arch == "dflash" && names.label == "fc" {
            return Err(mismatch(
                file,
                "dflash.target_layers",
                "layers counted from 1",
                format!("only target_layer_ids {ids:?}, whose base differs between the programs that wrote it"),
                "; convert the original checkpoint again: paceline convert HF_DIR OUT.gguf --target TARGET_DIR",
            ));
        }
        ids
    } else if arch == "qwen35-dflash-draft" {
        let n_taps = meta.require_u32(&w.key("dflash.n_target_layers"))? as usize;
        spread(n_taps, target.n_layer)
    } else {
        return Err(mismatch(file, "tapped target layers", "dflash.target_layers", "no such key", ""));
    };
    let ascending = taps.windows(2).all(|pair| pair[0] < pair[1]);
    if taps.is_empty() || !ascending || taps.iter().any(|&tap| tap >= target.n_layer) {
        return Err(mismatch(
            file,
            "tapped target layers, counted from 0",
            format!("ascending layers below {}, the target's number of layers", target.n_layer),
            format!("{taps:?}"),
            "; this drafter was made for another target",
        ));
    }
    debug_assert!(hparams.n_layer > 0);
    Ok(taps)
}

/// The layers that the reference taps if it is not told which: evenly spread, ties to even.
fn spread(n_taps: usize, n_layer: usize) -> Vec<usize> {
    if n_taps <= 1 {
        return vec![n_layer / 2; n_taps];
    }
    let span = n_layer.saturating_sub(4) as f64 / (n_taps - 1) as f64;
    (0..n_taps).map(|i| (1.0 + i as f64 * span).round_ties_even() as usize).collect()
}

fn first_some<T>(options: impl IntoIterator<Item = Option<T>>) -> Option<T> {
    options.into_iter().flatten().next()
}

fn tapped_width(w: &Weights, names: &Names, n_taps: usize, target: &TargetFacts) -> Result<usize, LoadError> {
    let file = w.file();
    let fc = file.require_tensor(names.fc)?;
    let n_in = fc.n_cols() as usize;
    let declared = match w.metadata().u32(&w.key("target_hidden_size"))? {
        Some(n) => Some(n as usize),
        None => w.metadata().u32(&w.key("dflash.n_target_features"))?.map(|n| n as usize / n_taps),
    };
    let width = declared.unwrap_or(n_in / n_taps);
    if width * n_taps != n_in {
        return Err(mismatch(
            file,
            format!("tensor `{}`, inputs", names.fc),
            format!("{n_taps} taps of {width} values"),
            n_in,
            "",
        ));
    }
    if width != target.n_embd {
        return Err(mismatch(
            file,
            "width of the target's hidden states",
            format!("{}, the target's", target.n_embd),
            width,
            "; this drafter was made for another target",
        ));
    }
    Ok(width)
}

fn block_size(w: &Weights) -> Result<usize, LoadError> {
    let meta = w.metadata();
    let found = first_some([
        meta.u32(&w.key("block_size"))?,
        meta.u32(&w.key("dflash.block_size"))?,
        meta.u32("dflash.block_size")?,
    ]);
    match found {
        Some(n) if (2..=64).contains(&n) => Ok(n as usize),
        Some(n) => Err(mismatch(w.file(), "block_size", "2 to 64", n, "")),
        None => Err(mismatch(w.file(), "block_size", "a number", "no such key", "")),
    }
}

/// Never falls back to a number: a wrong mask token drafts rubbish without an error.
fn mask_token(w: &Weights, n_vocab: usize) -> Result<Token, LoadError> {
    let meta = w.metadata();
    let found = first_some([
        meta.u32(&w.key("mask_token_id"))?,
        meta.u32(&w.key("dflash.mask_token_id"))?,
        meta.u32("dflash.mask_token_id")?,
        meta.u32("tokenizer.ggml.mask_token_id")?,
    ]);
    match found {
        Some(id) if (id as usize) < n_vocab => Ok(id),
        Some(id) => Err(mismatch(
            w.file(),
            "mask token",
            format!("a token of the target's {n_vocab}"),
            id,
            "; this drafter was made for another target",
        )),
        None => Err(mismatch(
            w.file(),
            "mask token",
            "mask_token_id or tokenizer.ggml.mask_token_id",
            "neither",
            "",
        )),
    }
}

/// Which rows see what. A flag for all layers counts only in the dialect whose writer means it; then sliding
/// layers are causal inside the block and full ones are not.
fn layer_masks(w: &Weights, arch: &str, n_layer: usize) -> Result<Vec<LayerMask>, LoadError> {
    let meta = w.metadata();
    let window = meta.u32(&w.key("attention.sliding_window"))?.filter(|&n| n > 0).map(|n| n as usize);
    let key = w.key("attention.sliding_window_pattern");
    let pattern = match meta.bool_array(&key)? {
        Some(pattern) if pattern.len() < n_layer => {
            return Err(mismatch(w.file(), key, format!("one value for each of {n_layer} layers"), pattern.len(), ""));
        }
        Some(pattern) => pattern,
        None => vec![window.is_some(); n_layer],
    };
    if window.is_none() && pattern[..n_layer].contains(&true) {
        return Err(mismatch(w.file(), w.key("attention.sliding_window"), "a window for the sliding layers", "none", ""));
    }
    let causal = match arch {
        "dflash" => meta.bool("dflash.attention.causal")?,
        _ => None,
    };
    Ok(pattern[..n_layer]
        .iter()
        .map(|&sliding| LayerMask {
            block: if causal.unwrap_or(sliding) { BlockMask::Causal } else { BlockMask::Full },
            window: window.filter(|_| sliding),
        })
        .collect())
}

/// `d2t`, one 64-bit target token for each drafter token.
fn vocabulary_map(file: &Gguf, n_vocab: usize) -> Result<Option<Vec<Token>>, LoadError> {
    let Some(tensor) = file.tensor("d2t") else { return Ok(None) };
    if tensor.ty != paceline_gguf::GgmlType::I64 {
        return Err(mismatch(file, "tensor `d2t`", "type i64", tensor.ty, ""));
    }
    let (ids, _) = file.data(tensor).as_chunks::<8>();
    let ids: Option<Vec<Token>> = ids
        .iter()
        .map(|bytes| Token::try_from(i64::from_le_bytes(*bytes)).ok().filter(|&t| (t as usize) < n_vocab))
        .collect();
    match ids {
        Some(ids) => Ok(Some(ids)),
        None => Err(mismatch(file, "tensor `d2t`", format!("tokens below {n_vocab}"), "others", "")),
    }
}
