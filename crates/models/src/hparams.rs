//! Sizes that every architecture has, read from metadata and checked against each other.

use paceline_backend::{RopeScaling, Yarn};

use crate::{Error, Weights};

/// Sizes of a model, named as in GGUF.
#[derive(Clone, Debug, PartialEq)]
pub struct Hparams {
    /// The prefix of its keys, which for a target is its architecture.
    pub arch: String,
    /// Layers of the main pass; prediction heads behind them are not counted.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Rows of the embedding table.
    pub n_vocab: usize,
    /// Context that the model was trained for.
    pub n_ctx_train: usize,
    /// Query heads.
    pub n_head: usize,
    /// KV heads; the most of any layer, where they differ.
    pub n_head_kv: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of a dense feed-forward layer, of the widest where they differ; 0 in a model of experts that names none.
    pub n_ff: usize,
    /// Added to the mean square in RMS norms.
    pub eps: f32,
    /// Rotated dimensions of a head.
    pub n_rot: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// What is done to them for a context beyond the trained one.
    pub rope_scaling: RopeScaling,
}

impl Hparams {
    /// Reads the keys that all architectures share; `n_layer` counts every block of the file.
    pub fn read(w: &Weights) -> Result<Hparams, Error> {
        Hparams::read_with_vocab(w, w.n_vocab()?)
    }

    /// [`read`](Self::read) for a file that borrows its vocabulary, as drafters do.
    pub fn read_with_vocab(w: &Weights, n_vocab: usize) -> Result<Hparams, Error> {
        let meta = w.metadata();
        let count = |suffix: &str| -> Result<usize, Error> {
            let n = meta.require_u32(&w.key(suffix))? as usize;
            if n == 0 || n > 1 << 24 {
                return Err(w.hparam(&w.key(suffix), "a number from 1 to 16,777,216", n));
            }
            Ok(n)
        };
        let n_layer = count("block_count")?;
        let (n_embd, n_head) = (count("embedding_length")?, count("attention.head_count")?);
        let n_head_kv = per_layer(w, "attention.head_count_kv", n_layer)?.unwrap_or(vec![n_head]);
        if let Some(n) = n_head_kv.iter().find(|&&n| n == 0 || n_head % n != 0) {
            let expected = format!("a divisor of {n_head} query heads");
            return Err(w.hparam(&w.key("attention.head_count_kv"), expected, n));
        }
        let widest = |suffix| -> Result<Option<usize>, Error> {
            let Some(all) = per_layer(w, suffix, n_layer)? else { return Ok(None) };
            if let Some(n) = all.iter().find(|&&n| n == 0 || n > 1 << 24) {
                return Err(w.hparam(&w.key(suffix), "a number from 1 to 16,777,216", n));
            }
            Ok(all.into_iter().max())
        };
        let n_ff = match (widest("feed_forward_length")?, meta.u32(&w.key("expert_count"))?.unwrap_or(0)) {
            (Some(n_ff), _) => n_ff,
            (None, 0) => count("feed_forward_length")?,
            (None, _) => 0,
        };
        let head_dim = match meta.u32(&w.key("attention.key_length"))? {
            Some(n) => n as usize,
            None => n_embd / n_head,
        };
        if let Some(n) = meta.u32(&w.key("attention.value_length"))?
            && n as usize != head_dim
        {
            return Err(w.hparam(
                &w.key("attention.value_length"),
                format!("{head_dim}, the width of a key"),
                n,
            ));
        }
        let n_rot = meta.u32(&w.key("rope.dimension_count"))?.map_or(head_dim, |n| n as usize);
        if head_dim == 0 || head_dim % 2 != 0 || n_rot > head_dim || n_rot % 2 != 0 {
            return Err(w.hparam(
                &w.key("rope.dimension_count"),
                format!("an even number up to the even head width {head_dim}"),
                n_rot,
            ));
        }
        let n_ctx_train = count("context_length")?;
        let hparams = Hparams {
            arch: w.prefix().to_string(),
            n_layer,
            n_embd,
            n_vocab,
            n_ctx_train,
            n_head,
            n_head_kv: n_head_kv.into_iter().max().unwrap_or(n_head),
            head_dim,
            n_ff,
            eps: meta.require_f32(&w.key("attention.layer_norm_rms_epsilon"))?,
            n_rot,
            rope_base: meta.f32(&w.key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: rope_scaling(w, n_ctx_train)?,
        };
        for (what, value) in
            [("attention.layer_norm_rms_epsilon", hparams.eps), ("rope.freq_base", hparams.rope_base)]
        {
            if !(value.is_finite() && value > 0.0) {
                return Err(w.hparam(&w.key(what), "a positive number", value));
            }
        }
        Ok(hparams)
    }
}

/// The keys `rope.scaling.*`: `linear` and `yarn` change frequencies; what Llama 3 does comes as a tensor.
fn rope_scaling(w: &Weights, n_ctx_train: usize) -> Result<RopeScaling, Error> {
    let meta = w.metadata();
    let key = |suffix: &str| w.key(&format!("rope.scaling.{suffix}"));
    let kind = meta.str(&key("type"))?.unwrap_or("none");
    if kind == "none" {
        return Ok(RopeScaling::None);
    }
    if !["linear", "yarn"].contains(&kind) {
        return Err(w.hparam(&key("type"), "none, linear or yarn", kind));
    }
    let number = |suffix: &str, other: f32, least: f32| {
        let value = meta.f32(&key(suffix))?.unwrap_or(other);
        match value.is_finite() && value >= least {
            true => Ok(value),
            false => Err(w.hparam(&key(suffix), format!("a number from {least} on"), value)),
        }
    };
    let factor = number("factor", 1.0, 1e-3)?;
    if kind == "linear" {
        return Ok(RopeScaling::Linear(factor));
    }
    if let Some(n) = meta.f32(&key("yarn_log_multiplier"))?.filter(|&n| n != 0.0) {
        return Err(w.hparam(&key("yarn_log_multiplier"), "0 (others are not supported yet)", n));
    }
    let n_ctx_orig = meta.u32(&key("original_context_length"))?.unwrap_or(n_ctx_train as u32);
    if n_ctx_orig == 0 {
        return Err(w.hparam(&key("original_context_length"), "at least 1", 0));
    }
    let yarn = Yarn::new(factor, n_ctx_orig);
    // Two keys multiply: one that a converter wrote, one that a user overrides.
    let attn_factor = number("attn_factor", 1.0, 0.0)? * number("yarn_attn_factor", 1.0, 0.0)?;
    Ok(RopeScaling::Yarn(Yarn {
        ext_factor: number("yarn_ext_factor", yarn.ext_factor, 0.0)?,
        beta_fast: number("yarn_beta_fast", yarn.beta_fast, 1e-3)?,
        beta_slow: number("yarn_beta_slow", yarn.beta_slow, 1e-3)?,
        attn_factor,
        ..yarn
    }))
}

/// A size of each layer, where the file gives one number for all or a list.
pub(crate) fn per_layer(w: &Weights, suffix: &str, n_layer: usize) -> Result<Option<Vec<usize>>, Error> {
    let numbers = w.metadata().u32_or_array(&w.key(suffix), n_layer)?;
    Ok(numbers.map(|numbers| numbers.into_iter().map(|n| n as usize).collect()))
}
