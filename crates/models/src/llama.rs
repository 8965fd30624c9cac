//! Llama: a plain decoder. GGUF files store the rows of its query and key projections so that the dimensions
//! which turn together are neighbours; Llama 3.1 and later scale the rotary angles by a table in the file.

use paceline_backend::{BlockMask, Pairing, RopeSpec};

use crate::{
    Arch, Error, Hparams, Weights,
    blocks::{AttentionShape, Decoder},
};

/// The architecture.
pub const ARCH: Arch = Arch { name: "llama", load: |w| Ok(Box::new(load(w)?)) };

fn load(w: &Weights) -> Result<Decoder, Error> {
    let n_expert = w.metadata().u32(&w.key("expert_count"))?.unwrap_or(0);
    if n_expert > 0 {
        return Err(w.hparam(&w.key("expert_count"), "0 (a mixture of experts is not supported yet)", n_expert));
    }
    let hp = Hparams::read(w)?;
    let factors = w.vector_opt("rope_freqs.weight", hp.n_rot / 2, "n_rot / 2")?;
    let attention = AttentionShape {
        n_embd: hp.n_embd,
        n_head: hp.n_head,
        n_head_kv: hp.n_head_kv,
        head_dim: hp.head_dim,
        rope: RopeSpec {
            n_rot: hp.n_rot,
            base: hp.rope_base,
            pairing: Pairing::Adjacent,
            factors: factors.map(|f| f.id),
        },
        eps: hp.eps,
        gated: false,
        head_norm: false,
        mask: BlockMask::Causal,
        window: None,
    };
    Decoder::load(w, hp, attention)
}
