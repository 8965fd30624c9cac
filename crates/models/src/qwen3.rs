//! Qwen3, dense: a plain decoder whose queries and keys are normed per head before rotation.

use crate::{
    Arch, Error, Hparams, Weights,
    blocks::{AttentionShape, Decoder},
};

/// The architecture.
pub const ARCH: Arch = Arch { name: "qwen3", load: |w| Ok(Box::new(load(w)?)) };

fn load(w: &Weights) -> Result<Decoder, Error> {
    let hp = Hparams::read(w)?;
    let attention = AttentionShape::of(&hp);
    Decoder::load(w, hp, attention)
}
