//! DFlash drafters, both versions, in the layout of the z-lab checkpoints: the layers of [`super::qwen3`], no embedding and no head of
//! their own, and `fc` with `hidden_norm` to fuse the target's tapped hidden states.
//!
//! `target_layer_ids` counts layers from 0; the file's `dflash.target_layers` counts the inputs of layers, so each is one
//! more. A layer sees the context through a window or in full, and the rows of its block causally or not:
//!
//! | config | file |
//! |---|---|
//! | `is_causal`, else `dflash_config.causal` | `attention.causal`, for all layers |
//! | `dflash_config.use_swa` without `layer_types` | all layers sliding, `attention.causal` false |
//! | `layer_types` | `attention.sliding_window_pattern`; sliding layers are causal, full ones are not |
//! | none of these | nothing: full and not causal |
//!
//! Version 2 is never causal unless it says so. It has convolutions around the sublayers and a selector, with the names and
//! axes that the file has too: the channels of `base_kernel` `[2, taps, channels]` are the fastest, and a row of the projection
//! is `(side · taps + tap) · groups + group`.

use super::decoder::Decoder;
use super::qwen3::decoder_layer;
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::Layout;
use crate::recipe::Recipe;

pub(super) const FAMILY: Family =
    Family { arch: "dflash", architectures: &["DFlashDraftModel", "DFlash2DraftModel"], drafts: true, write };

const VERSION_2: &str = "DFlash2DraftModel";

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

fn write(recipe: &mut Recipe, config: &Config, target: Option<&Target>) -> Result<(), Error> {
    let draft = config.section("dflash_config").unwrap_or_else(|| config.clone());
    let decoder = Decoder::read(config, 1.0)?;
    decoder.rope.check_kind(&["default", "linear", "yarn"])?;
    if decoder.rope.n_rot != decoder.head_dim {
        return Err(config.error("partial_rotary_factor", "1", "this variant is not supported yet"));
    }
    for key in ["backbone_rotary_base", "attention_sink_bias"] {
        let is_set = draft.get(key).is_some_and(|value| value.as_bool() != Some(false));
        draft.refuse(key, is_set, "a drafter of DFlash version 1 or 2 without it")?;
    }
    let version2 = Version2::read(config, &draft, decoder.n_embd)?;
    if recipe.checkpoint.dir().join("mask_embedding.pt").exists() {
        return Err(draft.error(
            "mask_token_id",
            "no `mask_embedding.pt` beside the config",
            "this variant is not supported yet",
        ));
    }
    let block_size = match draft.opt_usize("block_size")? {
        Some(n) => n,
        None => config.usize("block_size")?,
    };
    let n_vocab = config.usize("vocab_size")?;
    let mask = draft.get("mask_token_id").and_then(|id| id.as_u64()).filter(|&id| id < n_vocab as u64);
    let mask =
        mask.ok_or_else(|| draft.error("mask_token_id", format!("an id below {n_vocab} (vocab_size)"), ""))?;
    let taps = taps(&draft, config.opt_usize("num_target_layers")?)?;
    let n_embd_target = config.opt_usize("target_hidden_size")?.unwrap_or(decoder.n_embd);
    if let Some(target) = target {
        check_target(recipe, config, target, &taps, n_embd_target)?;
    }

    recipe.n_vocab = n_vocab;
    decoder.write_keys(recipe)?;
    recipe.size_key("vocab_size", n_vocab);
    recipe.size_key("block_size", block_size);
    recipe.key("target_layers", taps.iter().map(|&tap| tap as i32 + 1).collect::<Vec<_>>());
    recipe.size_key("target_hidden_size", n_embd_target);
    recipe.metadata.insert("tokenizer.ggml.mask_token_id", mask as u32);
    attention_keys(recipe, config, &draft, decoder.n_layer, version2.is_some())?;
    for (theirs, ours) in [
        ("input_embedding_scale", "embedding_scale"),
        ("output_multiplier", "logit_scale"),
        ("logit_scale", "logit_scale"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ] {
        if let Some(x) = draft.opt_f32(theirs)?.or(config.opt_f32(theirs)?) {
            recipe.key(ours, x);
        }
    }

    let root = if recipe.checkpoint.has("model.fc.weight") { "model." } else { "" };
    let n_embd = decoder.n_embd;
    recipe.tensor(
        "fc.weight",
        &format!("{root}fc.weight"),
        &[n_embd, taps.len() * n_embd_target],
        Layout::SAME,
    )?;
    recipe.tensor("enc.output_norm.weight", &format!("{root}hidden_norm.weight"), &[n_embd], Layout::SAME)?;
    recipe.tensor("output_norm.weight", &format!("{root}norm.weight"), &[n_embd], Layout::SAME)?;
    // Most drafters borrow both from the target.
    recipe.optional_tensor(
        "token_embd.weight",
        &format!("{root}embed_tokens.weight"),
        &[n_vocab, n_embd],
        Layout::SAME,
    )?;
    recipe.optional_tensor("output.weight", "lm_head.weight", &[n_vocab, n_embd], Layout::SAME)?;
    for il in 0..decoder.n_layer {
        decoder_layer(recipe, &decoder, il, &format!("{root}layers.{il}."))?;
    }
    version2.map_or(Ok(()), |v2| v2.write(recipe, root, decoder.n_layer))
}

/// Sizes of what version 2 adds.
struct Version2 {
    n_embd: usize,
    n_tap: usize,
    group: usize,
    n_rank: usize,
    n_top: usize,
}

impl Version2 {
    /// Reads the sizes, or nothing of version 1.
    fn read(config: &Config, draft: &Config, n_embd: usize) -> Result<Option<Version2>, Error> {
        let architectures = config.opt_strings("architectures")?.unwrap_or_default();
        let keys = ["conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"];
        if !architectures.contains(&VERSION_2) && keys.iter().all(|key| draft.get(key).is_none()) {
            return Ok(None);
        }
        let [n_tap, group, n_rank, n_top] = keys.map(|key| draft.usize(key));
        let (n_tap, group) = (n_tap?, group?);
        if n_tap < 2 {
            return Err(draft.error("conv_kernel_size", "2 rows or more", ""));
        }
        if !n_embd.is_multiple_of(group) {
            return Err(draft.error("conv_group_size", format!("a divisor of {n_embd} (hidden_size)"), ""));
        }
        Ok(Some(Version2 { n_embd, n_tap, group, n_rank: n_rank?, n_top: n_top? }))
    }

    fn write(&self, recipe: &mut Recipe, root: &str, n_layer: usize) -> Result<(), Error> {
        let &Version2 { n_embd, n_tap, group, n_rank, n_top } = self;
        for (key, n) in [
            ("conv_kernel_size", n_tap),
            ("conv_group_size", group),
            ("selector_rank", n_rank),
            ("selector_top_k", n_top),
        ] {
            recipe.size_key(key, n);
        }
        for il in 0..n_layer {
            for (ours, theirs) in [("attn", "attention"), ("ffn", "mlp")] {
                let (name, conv) =
                    (format!("blk.{il}.{ours}_conv"), format!("{root}layers.{il}.{theirs}_conv"));
                let (base, shape) = (format!("{conv}.base_kernel"), [2, n_tap, n_embd]);
                recipe.tensor(&format!("{name}_base"), &base, &shape, Layout::SAME)?;
                let (proj, shape) =
                    (format!("{conv}.kernel_projection.weight"), [2 * n_tap * n_embd / group, n_embd]);
                recipe.tensor(&format!("{name}_proj.weight"), &proj, &shape, Layout::SAME)?;
            }
        }
        for (ours, theirs, shape) in [
            ("predecessor", "predecessor_codebook", [recipe.n_vocab, n_rank]),
            ("successor", "successor_codebook", [recipe.n_vocab, n_rank]),
            ("hidden", "hidden_projection", [n_rank, n_embd]),
        ] {
            // Some checkpoints say `.weight` behind the tables too, as all do behind the projection.
            let bare = format!("{root}candidate_selector.{theirs}");
            let tensor = if recipe.checkpoint.has(&bare) { bare } else { format!("{bare}.weight") };
            recipe.tensor(&format!("selector_{ours}.weight"), &tensor, &shape, Layout::SAME)?;
        }
        Ok(())
    }
}

/// The tapped layers. There is a formula for configs that leave them out, and trainers that used another one: a wrong guess
/// drafts badly and says nothing, so they must be named.
fn taps(draft: &Config, n_layer_target: Option<usize>) -> Result<Vec<u32>, Error> {
    let n_layer = n_layer_target.unwrap_or(i32::MAX as usize);
    let taps = draft.opt_ids("target_layer_ids")?.unwrap_or_default();
    if taps.is_empty() || !taps.is_sorted_by(|a, b| a < b) || taps.iter().any(|&tap| tap as usize >= n_layer)
    {
        return Err(draft.error(
            "target_layer_ids",
            format!("increasing layers of the target, each below {n_layer}"),
            "",
        ));
    }
    Ok(taps)
}

fn check_target(
    recipe: &Recipe,
    config: &Config,
    target: &Target,
    taps: &[u32],
    n_embd_target: usize,
) -> Result<(), Error> {
    let n_layer = target.config.usize("num_hidden_layers")?;
    let last_tap = *taps.last().expect("there is a tap") as usize;
    let differs = |what, expected: String, found: usize| Error::Mismatch {
        drafter: recipe.checkpoint.dir().to_owned(),
        target: target.dir.to_owned(),
        what,
        expected,
        found: found.to_string(),
    };
    if last_tap >= n_layer {
        return Err(differs("layers", format!("more than {last_tap}, the last one that it taps"), n_layer));
    }
    let sizes = [
        ("layers", "num_hidden_layers", config.opt_usize("num_target_layers")?),
        ("size of a hidden state", "hidden_size", Some(n_embd_target)),
        ("vocabulary", "vocab_size", config.opt_usize("vocab_size")?),
    ];
    for (what, key, expected) in sizes {
        let found = target.config.usize(key)?;
        if let Some(expected) = expected.filter(|&expected| expected != found) {
            return Err(differs(what, expected.to_string(), found));
        }
    }
    Ok(())
}

/// Windows and causality; see the table above.
fn attention_keys(
    recipe: &mut Recipe,
    config: &Config,
    draft: &Config,
    n_layer: usize,
    is_version2: bool,
) -> Result<(), Error> {
    let mut causal = match config.opt_bool("is_causal")? {
        Some(causal) => Some(causal),
        None => draft.opt_bool("causal")?,
    };
    causal = causal.or(is_version2.then_some(false));
    let window = match draft.opt_usize("swa_window_size")? {
        Some(window) => Some(window),
        None => config.opt_usize("sliding_window")?,
    };
    let kinds = config.opt_strings("layer_types")?;
    let sliding: Vec<bool> = match &kinds {
        Some(kinds) if kinds.len() == n_layer && kinds.iter().all(|kind| [SLIDING, FULL].contains(kind)) => {
            kinds.iter().map(|kind| *kind == SLIDING).collect()
        }
        Some(_) => {
            return Err(config.error("layer_types", format!("{n_layer} times `{SLIDING}` or `{FULL}`"), ""));
        }
        None => {
            let sliding = draft.flag("use_swa")?;
            causal = causal.or(sliding.then_some(false));
            vec![sliding; n_layer]
        }
    };
    if sliding.contains(&true) {
        let window =
            window.ok_or_else(|| config.error("sliding_window", "the window of the sliding layers", ""))?;
        recipe.size_key("attention.sliding_window", window);
        recipe.key("attention.sliding_window_pattern", sliding);
    }
    if let Some(causal) = causal {
        recipe.key("attention.causal", causal);
    }
    Ok(())
}
