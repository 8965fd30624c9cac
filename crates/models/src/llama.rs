//! Llama: a plain decoder. GGUF files store the rows of its query and key projections so that the dimensions
//! which turn together are neighbours; Llama 3.1 and later scale the rotary angles by a table in the file.

use paceline_backend::Pairing;

use crate::{
    Arch, Error, Hparams, Weights,
    blocks::{AttentionShape, Decoder},
};

/// The architecture.
pub const ARCH: Arch = Arch { name: "llama", load: |w| Ok(Box::new(load(w)?)) };

fn load(w: &Weights) -> Result<Decoder, Error> {
    let n_expert = w.metadata().u32(&w.key("expert_count"))?.unwrap_or(0);
    if n_expert > 0 {
        return Err(w.hparam(
            &w.key("expert_count"),
            "0 (a mixture of experts is not supported yet)",
            n_expert,
        ));
    }
    let hp = Hparams::read(w)?;
    let factors = w.vector_opt("rope_freqs.weight", hp.n_rot / 2, "n_rot / 2")?;
    let mut attention = AttentionShape { head_norm: false, ..AttentionShape::of(&hp) };
    attention.rope.pairing = Pairing::Adjacent;
    attention.rope.factors = factors.map(|f| f.id);
    Decoder::load(w, hp, attention)
}
