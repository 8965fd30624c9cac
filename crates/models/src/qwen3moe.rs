//! Qwen3 with a mixture of experts in place of the feed-forward layer: the decoder of `qwen3` otherwise.

use crate::{
    Arch, Error, Hparams, Weights,
    blocks::{AttentionShape, Decoder},
};

/// The architecture.
pub const ARCH: Arch = Arch { name: "qwen3moe", load: |w| Ok(Box::new(load(w)?)) };

fn load(w: &Weights) -> Result<Decoder, Error> {
    let hp = Hparams::read(w)?;
    let attention = AttentionShape::of(&hp);
    Decoder::load(w, hp, attention)
}
