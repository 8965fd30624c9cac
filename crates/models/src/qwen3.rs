//! Qwen3, dense: a plain decoder whose queries and keys are normed per head before rotation.

use paceline_backend::{BlockMask, Pairing, RopeSpec};

use crate::{
    Arch, Error, Hparams, Weights,
    blocks::{AttentionShape, Decoder},
};

/// The architecture.
pub const ARCH: Arch = Arch { name: "qwen3", load: |w| Ok(Box::new(load(w)?)) };

fn load(w: &Weights) -> Result<Decoder, Error> {
    let hp = Hparams::read(w)?;
    let attention = AttentionShape {
        n_embd: hp.n_embd,
        n_head: hp.n_head,
        n_head_kv: hp.n_head_kv,
        head_dim: hp.head_dim,
        rope: RopeSpec { n_rot: hp.n_rot, base: hp.rope_base, pairing: Pairing::HalfSplit, factors: None },
        eps: hp.eps,
        gated: false,
        head_norm: true,
        mask: BlockMask::Causal,
        window: None,
    };
    Decoder::load(w, hp, attention)
}
