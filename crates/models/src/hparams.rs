//! Sizes that every architecture has, read from metadata and checked against each other.

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
        let scaling = meta.str(&w.key("rope.scaling.type"))?.unwrap_or("none");
        if scaling != "none" {
            return Err(w.hparam(
                &w.key("rope.scaling.type"),
                "none (other scalings are not supported yet)",
                scaling,
            ));
        }
        let hparams = Hparams {
            arch: w.prefix().to_string(),
            n_layer,
            n_embd,
            n_vocab,
            n_ctx_train: count("context_length")?,
            n_head,
            n_head_kv: n_head_kv.into_iter().max().unwrap_or(n_head),
            head_dim,
            n_ff,
            eps: meta.require_f32(&w.key("attention.layer_norm_rms_epsilon"))?,
            n_rot,
            rope_base: meta.f32(&w.key("rope.freq_base"))?.unwrap_or(10_000.0),
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

/// A size of each layer, where the file gives one number for all or a list.
pub(crate) fn per_layer(w: &Weights, suffix: &str, n_layer: usize) -> Result<Option<Vec<usize>>, Error> {
    let numbers = w.metadata().u32_or_array(&w.key(suffix), n_layer)?;
    Ok(numbers.map(|numbers| numbers.into_iter().map(|n| n as usize).collect()))
}
