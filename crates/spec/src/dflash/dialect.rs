//! The dialects of DFlash files: three tensor naming schemes, five architecture names, two ways to count layers.
//!
//! | `general.architecture` | taps | base | tensors |
//! |---|---|---|---|
//! | `dflash` | `dflash.target_layers` | layer + 1 | `fc`, `enc.output_norm` |
//! | `dflash-draft`, or `dflash` with its tensors | `….dflash.target_layer_ids` | layer | `dflash_fc`, `dflash_hidden_norm` |
//! | `qwen35-dflash-draft` | none: spread evenly, `n_target_layers` is their number | layer | `dflash.fc`, `dflash.hidden_norm` |
//! | `gemma4-dflash-draft` | `….dflash.target_layer_ids` | layer | `dflash.fc`, `dflash.hidden_norm` |
//!
//! The drafter's own keys stand under the architecture or under one of the first two names, with a second `dflash.`
//! or without; where a file has several spellings, they must agree.
//!
//! Version 2 adds tensors, for which there are two naming schemes again, either of them beside any of the above:
//!
//! | convolutions | selector |
//! |---|---|
//! | `blk.N.{attn,ffn}_conv_base`, `…_conv_proj.weight` | `selector_{predecessor,successor,hidden}.weight` |
//! | `blk.N.{attn,ffn}_conv.base`, `…_conv.proj.weight` | `selector.{pred_codebook,succ_codebook,hidden_proj.weight}` |
//!
//! A file is read into one [`Contract`], checked against the target, and from there on nothing knows which dialect
//! it was. One off in a tap is silent (acceptance drops, text stays right), so nothing is guessed.

use paceline_backend::BlockMask;
use paceline_gguf::{GgmlType, Gguf, Metadata};
use paceline_models::{Hparams, SharedWeights, Weights};

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

/// How a naming scheme calls what version 2 adds. Convolutions stand behind `blk.N.attn_` and `blk.N.ffn_`.
#[derive(Debug)]
pub(super) struct Version2Names {
    pub conv_base: &'static str,
    pub conv_proj: &'static str,
    pub predecessor: &'static str,
    pub successor: &'static str,
    pub hidden: &'static str,
}

const VERSION_2_NAMES: &[Version2Names] = &[
    Version2Names {
        conv_base: "conv_base",
        conv_proj: "conv_proj.weight",
        predecessor: "selector_predecessor.weight",
        successor: "selector_successor.weight",
        hidden: "selector_hidden.weight",
    },
    Version2Names {
        conv_base: "conv.base",
        conv_proj: "conv.proj.weight",
        predecessor: "selector.pred_codebook",
        successor: "selector.succ_codebook",
        hidden: "selector.hidden_proj.weight",
    },
];

impl Version2Names {
    fn has(&self, name: &str) -> bool {
        [self.predecessor, self.successor, self.hidden].contains(&name)
            || name
                .strip_prefix("blk.")
                .and_then(|rest| rest.split_once('.'))
                .is_some_and(|(_, part)| self.has_in_layer(part))
    }

    fn has_in_layer(&self, part: &str) -> bool {
        let conv = part.strip_prefix("attn_").or_else(|| part.strip_prefix("ffn_"));
        conv.is_some_and(|conv| [self.conv_base, self.conv_proj].contains(&conv))
    }
}

/// What a file of version 2 says beside version 1.
#[derive(Debug)]
pub(super) struct Version2 {
    pub names: &'static Version2Names,
    /// Rows of a block that its convolutions look at, the own one included.
    pub n_tap: usize,
    /// Channels that share what a row's kernel differs in.
    pub group: usize,
    /// Width of the selector's tables.
    pub n_rank: usize,
    /// Candidates of a row.
    pub n_top: usize,
}

/// Variants that need more than this file implements, by a tensor that only they have.
const OTHER_BY_TENSOR: &[(&str, &str)] =
    &[("markov_", "DSpark"), ("conf_proj", "DSpark"), ("dflash_aux_hidden_norm", "Laguna DFlash")];

/// The same by a key whose number is not 0.
const OTHER_BY_NUMBER: &[(&str, &str)] =
    &[("hyper_connection.count", "DeepSeek DSpark"), ("backbone_rotary_base", "MiMo DFlash")];

/// The same by a flag.
const OTHER_BY_FLAG: &[(&str, &str)] = &[("laguna", "Laguna DFlash"), ("sample_from_anchor", "DSpark")];

/// Most candidates of a row: they are kept sorted by moving them one by one.
const N_TOP_MAX: usize = 256;

const RECONVERT: &str =
    "; convert the original checkpoint again: paceline convert HF_DIR OUT.gguf --target TARGET_DIR";
const OTHER_TARGET: &str = "; this drafter was made for another target: load it with that one";
const CONTRADICTS: &str = "; the file contradicts itself: convert it again or download it from elsewhere";

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
    pub ends: Ends,
    pub version2: Option<Version2>,
}

/// What is done to embedded rows and to logits: the file's word, else what the target does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ends {
    /// Factor on embedded rows.
    pub embd_scale: f32,
    /// Factor on what the head gives.
    pub logit_scale: f32,
    /// Bound on the logits after that.
    pub logit_cap: Option<f32>,
}

/// What the target brings into the contract.
pub(super) struct TargetFacts {
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_vocab: usize,
    /// Factor on embedded rows, which the drafter's blocks are embedded with too.
    pub embd_scale: f32,
    /// Bound on the logits, which the drafter's go through too.
    pub logit_cap: Option<f32>,
}

impl TargetFacts {
    pub fn of(hp: &Hparams, shared: &SharedWeights) -> TargetFacts {
        let &Hparams { n_layer, n_embd, n_vocab, .. } = hp;
        let &SharedWeights { embd_scale, logit_cap, .. } = shared;
        TargetFacts { n_layer, n_embd, n_vocab, embd_scale, logit_cap }
    }
}

impl Contract {
    pub fn read(w: &Weights, arch: &str, target: &TargetFacts) -> Result<Contract, LoadError> {
        let file = w.file();
        refuse_other_variants(w)?;
        let names = tensor_names(file)?;
        let mut hparams = Hparams::read_with_vocab(w, target.n_vocab)?;
        refuse_scaled_rope(w)?;
        let taps = taps(w, arch, names, target)?;
        let n_embd_target = tapped_width(w, names, taps.len(), target)?;
        if hparams.n_embd != target.n_embd && !(w.has("token_embd.weight") && w.has("output.weight")) {
            return Err(mismatch(
                file,
                "embedding_length of a drafter that shares the target's embedding and head",
                target.n_embd,
                hparams.n_embd,
                OTHER_TARGET,
            ));
        }
        if arch == "qwen35-dflash-draft" {
            require_what_old_files_leave_out(w)?;
        }
        let d2t = vocabulary_map(file, target.n_vocab)?;
        match (&d2t, w.metadata().u32(&w.key("vocab_size"))?) {
            (Some(_), _) if !w.has("output.weight") => {
                return Err(mismatch(
                    file,
                    "tensor `d2t`",
                    "a head beside it",
                    "no `output.weight`",
                    RECONVERT,
                ));
            }
            (Some(d2t), _) => hparams.n_vocab = d2t.len(),
            (None, Some(n)) if n as usize != target.n_vocab => {
                let expected = format!("{}, the target's", target.n_vocab);
                return Err(mismatch(file, w.key("vocab_size"), expected, n, OTHER_TARGET));
            }
            (None, _) => {}
        }
        let version2 = version2(w, &hparams)?;
        if let (Some(_), Some(_)) = (&version2, &d2t) {
            let expected = "none in a drafter with a selector, whose tables have a row for each token";
            return Err(mismatch(file, "tensor `d2t`", expected, "one", RECONVERT));
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
            layers: layer_masks(w, arch, names, hparams.n_layer, version2.is_some())?,
            d2t,
            own_embedding: w.has("token_embd.weight"),
            own_head: w.has("output.weight"),
            ends: ends(w, target)?,
            version2,
            hparams,
        };
        contract.check_windows(file)?;
        contract.check_inventory(file)?;
        check_vectors_finite(file)?;
        Ok(contract)
    }

    /// The line that settles reports of low acceptance.
    pub fn line(&self) -> String {
        let masks: Vec<String> = self
            .layers
            .iter()
            .map(|layer| {
                let kind = layer.block;
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
        ) + &self.version2.as_ref().map_or(String::new(), |v2| {
            let Version2 { n_tap, group, n_rank, n_top, .. } = v2;
            format!(
                ", convolution of {n_tap} rows in groups of {group}, selector of rank {n_rank} among {n_top}"
            )
        })
    }

    fn version(&self) -> &'static str {
        if self.version2.is_some() { "DFlash2" } else { "DFlash v1" }
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
                CONTRADICTS,
            )),
            None => Ok(()),
        }
    }

    /// A tensor that nobody reads means a variant that this code does not know: it would run and be useless.
    fn check_inventory(&self, file: &Gguf) -> Result<(), LoadError> {
        const PER_LAYER: &[&str] = &[
            "attn_norm.weight",
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
        let global =
            [self.fc, self.hidden_norm, "output_norm.weight", "token_embd.weight", "output.weight", "d2t"];
        let v2 = self.version2.as_ref().map(|v2| v2.names);
        let in_layer = |part: &str| {
            PER_LAYER.contains(&part)
                || v2.is_some_and(|names| names.has_in_layer(part))
                || part.strip_suffix(".weight").is_some_and(|norm| norm == self.ffn_norm)
        };
        let known = |name: &str| {
            global.contains(&name)
                || v2.is_some_and(|v2| [v2.predecessor, v2.successor, v2.hidden].contains(&name))
                || name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).is_some_and(
                    |(il, part)| {
                        il.parse::<usize>().is_ok_and(|il| il < self.hparams.n_layer) && in_layer(part)
                    },
                )
        };
        let unknown: Vec<&str> =
            file.tensors().iter().map(|t| t.name.as_str()).filter(|n| !known(n)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(mismatch(
            file,
            "tensors",
            format!("those of a {} drafter of {} layers", self.version(), self.hparams.n_layer),
            format!("also {}", unknown.join(", ")),
            "; the file holds a variant that is not implemented, or is not a drafter",
        ))
    }
}

fn mismatch(
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

/// The prefix of a file's keys: its architecture, or the name that it had before a repack gave it another.
pub(super) fn key_prefix<'a>(file: &Gguf, arch: &'a str) -> &'a str {
    let has_keys = |prefix: &&str| file.metadata().contains(&format!("{prefix}.block_count"));
    [arch, "dflash", "dflash-draft"].into_iter().find(has_keys).unwrap_or(arch)
}

/// One of the drafter's own keys, wherever the writer put it.
fn own<'a, T: PartialEq>(
    w: &'a Weights,
    key: &str,
    get: impl Fn(&'a Metadata, &str) -> Result<Option<T>, paceline_gguf::Error>,
) -> Result<Option<T>, LoadError> {
    let meta = w.metadata();
    let mut found: Option<(String, T)> = None;
    for prefix in [w.key(""), "dflash.".to_string(), "dflash-draft.".to_string()] {
        for name in [format!("{prefix}{key}"), format!("{prefix}dflash.{key}")] {
            let Some(value) = get(meta, &name)? else { continue };
            match &found {
                Some((first, agreed)) if *agreed != value => {
                    let what = format!("keys `{first}` and `{name}`");
                    return Err(mismatch(w.file(), what, "the same value", "two values", CONTRADICTS));
                }
                Some(_) => {}
                None => found = Some((name, value)),
            }
        }
    }
    Ok(found.map(|(_, value)| value))
}

fn refuse_other_variants(w: &Weights) -> Result<(), LoadError> {
    let file = w.file();
    let refuse = |variant: String| {
        Err(LoadError::Unsupported {
            file: file.name().to_string(),
            variant,
            way_out: "use a DFlash or DFlash2 drafter of the same target, or go without".to_string(),
        })
    };
    for (part, variant) in OTHER_BY_TENSOR {
        if let Some(tensor) = file.tensors().iter().find(|t| t.name.contains(part)) {
            return refuse(format!("{variant} (tensor `{}`)", tensor.name));
        }
    }
    if own(w, "decoder_arch", |meta, key| meta.str(key))? == Some("laguna") {
        return refuse("Laguna DFlash (decoder_arch)".to_string());
    }
    for (key, variant) in OTHER_BY_FLAG {
        if own(w, key, |meta, key| meta.bool(key))? == Some(true) {
            return refuse(format!("{variant} ({key})"));
        }
    }
    for (key, variant) in OTHER_BY_NUMBER {
        if let Some(x) = own(w, key, |meta, key| meta.f32(key))?.filter(|&x| x != 0.0) {
            return refuse(format!("{variant} ({key} {x})"));
        }
    }
    Ok(())
}

/// The scheme and sizes of version 2, if the file is one.
fn version2(w: &Weights, hp: &Hparams) -> Result<Option<Version2>, LoadError> {
    let file = w.file();
    let of = |names: &&Version2Names| file.tensors().iter().any(|t| names.has(&t.name));
    let found: Vec<&'static Version2Names> = VERSION_2_NAMES.iter().filter(of).collect();
    let size = |key: &str| own(w, key, |meta, key| meta.u32(key));
    let names = match found[..] {
        [names] => names,
        [] => {
            for key in ["conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"] {
                if size(key)?.is_some() {
                    let expected = format!("those of DFlash2, as there is `{key}`");
                    return Err(mismatch(file, "tensors", expected, "those of DFlash v1 alone", CONTRADICTS));
                }
            }
            return Ok(None);
        }
        _ => {
            let first = |names: &Version2Names| {
                file.tensors().iter().find(|t| names.has(&t.name)).map_or("", |t| t.name.as_str())
            };
            let found = found.iter().map(|names| first(names)).collect::<Vec<_>>().join(" and ");
            return Err(mismatch(file, "tensor names of version 2", "one dialect", found, CONTRADICTS));
        }
    };
    let need = |key: &str, expected: String, fits: &dyn Fn(usize) -> bool| match size(key)? {
        Some(n) if fits(n as usize) => Ok(n as usize),
        Some(n) => Err(mismatch(file, key, expected, n, RECONVERT)),
        None => Err(mismatch(file, key, expected, "no such key", RECONVERT)),
    };
    let (n_embd, n_vocab) = (hp.n_embd, hp.n_vocab);
    let divides = |n: usize| n > 0 && n_embd.is_multiple_of(n);
    let n_top_max = n_vocab.min(N_TOP_MAX);
    Ok(Some(Version2 {
        names,
        n_tap: need("conv_kernel_size", "2 to 16".to_string(), &|n| (2..=16).contains(&n))?,
        group: need("conv_group_size", format!("a divisor of {n_embd} (embedding_length)"), &divides)?,
        n_rank: need("selector_rank", "at least 1".to_string(), &|n| n > 0)?,
        n_top: need("selector_top_k", format!("1 to {n_top_max}"), &|n| (1..=n_top_max).contains(&n))?,
    }))
}

/// Scales and cap: the file's, where it has them. What is the target's own but for rounding is the target's own.
fn ends(w: &Weights, target: &TargetFacts) -> Result<Ends, LoadError> {
    let factor = |key: &str| -> Result<Option<f32>, LoadError> {
        match own(w, key, |meta, key| meta.f32(key))? {
            Some(x) if !x.is_finite() || x <= 0.0 => {
                Err(mismatch(w.file(), key, "a positive number", x, RECONVERT))
            }
            x => Ok(x),
        }
    };
    let is_targets = |x: &f32| (x / target.embd_scale - 1.0).abs() < 0.005;
    let cap = own(w, "final_logit_softcapping", |meta, key| meta.f32(key))?;
    let logit_cap = match cap {
        Some(cap) if !cap.is_finite() || cap < 0.0 => {
            return Err(mismatch(w.file(), "final_logit_softcapping", "a positive number", cap, RECONVERT));
        }
        // Zero is how files say nothing.
        cap => cap.filter(|&cap| cap > 0.0).or(target.logit_cap),
    };
    Ok(Ends {
        embd_scale: factor("embedding_scale")?.filter(|x| !is_targets(x)).unwrap_or(target.embd_scale),
        logit_scale: factor("logit_scale")?.unwrap_or(1.0),
        logit_cap,
    })
}

/// Scaled angles: no published drafter has them, so nothing says how they would have to be read.
fn refuse_scaled_rope(w: &Weights) -> Result<(), LoadError> {
    let key = w.key("rope.scaling.type");
    if let Some(kind) = w.metadata().str(&key)?.filter(|&kind| kind != "none") {
        let expected = "none (other scalings are not supported yet)";
        return Err(mismatch(w.file(), key, expected, kind, ""));
    }
    for key in ["rope.scaling.factor", "rope.scale_linear"].map(|key| w.key(key)) {
        if let Some(factor) = w.metadata().f32(&key)?.filter(|&factor| factor != 0.0 && factor != 1.0) {
            let expected = "1 (scaled rotary angles are not supported yet)";
            return Err(mismatch(w.file(), key, expected, factor, "; use a drafter without them"));
        }
    }
    Ok(())
}

/// The runtime that wrote these files had a rotary base built in that its checkpoints contradict, and no windows.
fn require_what_old_files_leave_out(w: &Weights) -> Result<(), LoadError> {
    for (key, expected) in [
        ("rope.freq_base", "the base of the checkpoint"),
        ("attention.sliding_window", "the window of the checkpoint, 0 if it has none"),
    ] {
        let key = w.key(key);
        if !w.metadata().contains(&key) {
            let what = format!("{key}, which old files of this kind leave out");
            return Err(mismatch(w.file(), what, expected, "no such key", RECONVERT));
        }
    }
    Ok(())
}

/// One NaN in a norm makes every draft useless and nothing else wrong, so it is looked for. All vectors are small.
fn check_vectors_finite(file: &Gguf) -> Result<(), LoadError> {
    let bits_of_infinity = |ty| match ty {
        GgmlType::F32 => Some((4, 0x7f80_0000)),
        GgmlType::F16 => Some((2, 0x7c00)),
        GgmlType::BF16 => Some((2, 0x7f80)),
        _ => None,
    };
    for tensor in file.tensors().iter().filter(|tensor| tensor.n_rows() == 1) {
        let Some((width, infinity)) = bits_of_infinity(tensor.ty) else { continue };
        let is_finite = |bytes: &[u8]| {
            let bits = bytes.iter().rev().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
            bits & infinity != infinity
        };
        if let Some(at) = file.data(tensor).chunks_exact(width).position(|value| !is_finite(value)) {
            let what = format!("tensor `{}`", tensor.name);
            return Err(mismatch(
                file,
                what,
                "finite values",
                format!("NaN or infinity at {at}"),
                CONTRADICTS,
            ));
        }
    }
    Ok(())
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
            CONTRADICTS,
        )),
    }
}

fn taps(w: &Weights, arch: &str, names: &Names, target: &TargetFacts) -> Result<Vec<usize>, LoadError> {
    let file = w.file();
    let list = |key: &str| -> Result<Option<Vec<usize>>, LoadError> {
        let ids = own(w, key, |meta, key| meta.u32_array(key))?;
        Ok(ids.map(|ids| ids.into_iter().map(|id| id as usize).collect()))
    };
    let n_target_layers = own(w, "n_target_layers", |meta, key| meta.u32(key))?.map(|n| n as usize);
    let taps = if let Some(ids) = list("target_layers")? {
        // This dialect counts the embedding as layer 0.
        let shifted: Option<Vec<usize>> = ids.iter().map(|id| id.checked_sub(1)).collect();
        shifted.ok_or_else(|| {
            mismatch(file, "dflash.target_layers", "layers counted from 1", format!("{ids:?}"), RECONVERT)
        })?
    } else if let Some(ids) = list("target_layer_ids")? {
        if arch == "dflash" && names.label == "fc" {
            return Err(mismatch(
                file,
                "dflash.target_layers",
                "layers counted from 1",
                format!(
                    "only target_layer_ids {ids:?}, whose base differs between the programs that wrote it"
                ),
                RECONVERT,
            ));
        }
        ids
    } else if let (true, Some(n_taps)) = (arch == "qwen35-dflash-draft", n_target_layers) {
        // A number that `fc` contradicts is refused below; this bound keeps the list small until then.
        spread(n_taps.min(target.n_layer + 1), target.n_layer)
    } else {
        return Err(mismatch(file, "tapped target layers", "dflash.target_layers", "no such key", RECONVERT));
    };
    // In this dialect alone the key means what its name says.
    if arch == "gemma4-dflash-draft" && n_target_layers.is_some_and(|n| n != target.n_layer) {
        let (expected, found) = (format!("{}, the target's", target.n_layer), n_target_layers.unwrap_or(0));
        return Err(mismatch(file, "dflash.n_target_layers", expected, found, OTHER_TARGET));
    }
    let ascending = taps.windows(2).all(|pair| pair[0] < pair[1]);
    if taps.is_empty() || !ascending || taps.iter().any(|&tap| tap >= target.n_layer) {
        return Err(mismatch(
            file,
            "tapped target layers, counted from 0",
            format!("ascending layers below {}, the target's number of layers", target.n_layer),
            format!("{taps:?}"),
            OTHER_TARGET,
        ));
    }
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

fn tapped_width(w: &Weights, names: &Names, n_taps: usize, target: &TargetFacts) -> Result<usize, LoadError> {
    let file = w.file();
    let n_in = file.require_tensor(names.fc)?.n_cols() as usize;
    let declared = own(w, "target_hidden_size", |meta, key| meta.u32(key))?.map(|n| n as usize);
    let width = declared.unwrap_or(n_in / n_taps);
    if width * n_taps != n_in {
        let what = format!("tensor `{}`, inputs", names.fc);
        return Err(mismatch(file, what, format!("{n_taps} taps of {width} values"), n_in, CONTRADICTS));
    }
    if let Some(n) = own(w, "n_target_features", |meta, key| meta.u32(key))?.filter(|&n| n as usize != n_in) {
        let expected = format!("{n_in}, the inputs of `{}`", names.fc);
        return Err(mismatch(file, "n_target_features", expected, n, CONTRADICTS));
    }
    if width != target.n_embd {
        let expected = format!("{}, the target's", target.n_embd);
        return Err(mismatch(file, "width of the target's hidden states", expected, width, OTHER_TARGET));
    }
    Ok(width)
}

fn block_size(w: &Weights) -> Result<usize, LoadError> {
    match own(w, "block_size", |meta, key| meta.u32(key))? {
        Some(n) if (2..=64).contains(&n) => Ok(n as usize),
        Some(n) => Err(mismatch(w.file(), "block_size", "2 to 64", n, RECONVERT)),
        None => Err(mismatch(w.file(), "block_size", "2 to 64", "no such key", RECONVERT)),
    }
}

/// Never falls back to a number: a wrong mask token drafts rubbish without an error.
fn mask_token(w: &Weights, n_vocab: usize) -> Result<Token, LoadError> {
    let found = match own(w, "mask_token_id", |meta, key| meta.u32(key))? {
        Some(id) => Some(id),
        None => w.metadata().u32("tokenizer.ggml.mask_token_id")?,
    };
    let expected = format!("a token of the target's {n_vocab}");
    match found {
        Some(id) if (id as usize) < n_vocab => Ok(id),
        Some(id) => Err(mismatch(w.file(), "mask token", expected, id, OTHER_TARGET)),
        None => {
            let none = "neither mask_token_id nor tokenizer.ggml.mask_token_id";
            Err(mismatch(w.file(), "mask token", expected, none, RECONVERT))
        }
    }
}

/// Which rows see what. A flag for all layers counts only in the dialect whose writer means it; without it, sliding layers
/// of version 1 are causal inside the block and no others are.
fn layer_masks(
    w: &Weights,
    arch: &str,
    names: &Names,
    n_layer: usize,
    is_version2: bool,
) -> Result<Vec<LayerMask>, LoadError> {
    let meta = w.metadata();
    let window = meta.u32(&w.key("attention.sliding_window"))?.filter(|&n| n > 0).map(|n| n as usize);
    let key = w.key("attention.sliding_window_pattern");
    let pattern = match meta.bool_array(&key)? {
        Some(pattern) if pattern.len() != n_layer => {
            let expected = format!("one value for each of {n_layer} layers");
            return Err(mismatch(w.file(), key, expected, pattern.len(), RECONVERT));
        }
        Some(pattern) => pattern,
        None => vec![window.is_some(); n_layer],
    };
    if window.is_none() && pattern.contains(&true) {
        let key = w.key("attention.sliding_window");
        return Err(mismatch(w.file(), key, "a window for the sliding layers", "none", RECONVERT));
    }
    // Others write `false` whatever the checkpoint says.
    let causal = match (arch, names.label) {
        ("dflash", "fc") => meta.bool(&w.key("attention.causal"))?,
        _ => None,
    };
    // All drafters of version 2 were trained so.
    let causal = causal.or(is_version2.then_some(false));
    Ok(pattern
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
    if tensor.ty != GgmlType::I64 {
        return Err(mismatch(file, "tensor `d2t`", "type i64", tensor.ty, RECONVERT));
    }
    let mut seen = vec![false; n_vocab];
    let (ids, _) = file.data(tensor).as_chunks::<8>();
    let ids = ids.iter().map(|bytes| i64::from_le_bytes(*bytes));
    let mut once = |id: i64| {
        let seen = seen.get_mut(usize::try_from(id).ok()?)?;
        (!std::mem::replace(seen, true)).then_some(id as Token)
    };
    match ids.clone().map(&mut once).collect() {
        Some(tokens) => Ok(Some(tokens)),
        None => {
            let expected = format!("tokens below {n_vocab}, each once");
            let found = format!(
                "{} from {} to {}",
                ids.len(),
                ids.clone().min().unwrap_or(0),
                ids.max().unwrap_or(0)
            );
            Err(mismatch(file, "tensor `d2t`", expected, found, OTHER_TARGET))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Taps of published drafters, which were trained with the formula.
    #[test]
    fn spread_taps_are_the_published_ones() {
        let check =
            |n_layer, taps: &[usize]| assert_eq!(spread(taps.len(), n_layer), taps, "{n_layer} layers");
        check(36, &[1, 9, 17, 25, 33]);
        check(40, &[1, 10, 19, 28, 37]);
        check(60, &[1, 12, 23, 35, 46, 57]);
        check(64, &[1, 16, 31, 46, 61]);
        check(7, &[1, 2, 4]); // 2.5 goes to the even one
        check(7, &[3]);
        check(7, &[]);
    }
}
