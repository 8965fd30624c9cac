//! The plain pre-norm decoder that Llama made common: attention and a gated feed-forward layer, each behind a
//! norm and added to the residual stream. Architectures that differ only in the attention's details share it.

use paceline_backend::{Buf, PlanBuilder, StateDecl, StateId, Vector};

use crate::{
    Error, Hparams, Model, SharedWeights, Weights,
    blocks::{Attention, AttentionShape, Ends, Ffn, FfnShape},
};

/// A decoder of identical layers.
pub struct Decoder {
    hparams: Hparams,
    states: Vec<StateDecl>,
    ends: Ends,
    layers: Vec<Layer>,
}

struct Layer {
    attn_norm: Vector,
    attention: Attention,
    ffn_norm: Vector,
    ffn: Ffn,
}

impl Decoder {
    /// Loads `n_layer` blocks whose attention has the shape `attention`.
    pub fn load(w: &Weights, hparams: Hparams, attention: AttentionShape) -> Result<Decoder, Error> {
        let (n_embd, ffn) = (hparams.n_embd, FfnShape::read(w, &hparams)?);
        let layers = (0..hparams.n_layer)
            .map(|il| {
                let prefix = format!("blk.{il}.");
                Ok(Layer {
                    attn_norm: w.vector(&format!("{prefix}attn_norm.weight"), n_embd, "n_embd")?,
                    attention: Attention::load(w, &prefix, attention.clone(), StateId(il as u32))?,
                    ffn_norm: w.vector(&format!("{prefix}ffn_norm.weight"), n_embd, "n_embd")?,
                    ffn: Ffn::load(w, &prefix, &ffn)?,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let states = vec![attention.state(); hparams.n_layer];
        Ok(Decoder { ends: Ends::load(w, &hparams)?, hparams, states, layers })
    }
}

impl Model for Decoder {
    fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    fn states(&self) -> &[StateDecl] {
        &self.states
    }

    fn shared(&self) -> SharedWeights {
        self.ends.shared()
    }

    fn record(&self, p: &mut PlanBuilder<'_>) -> Buf {
        let mut x = self.ends.embed(p); // [n, n_embd]
        for (il, layer) in self.layers.iter().enumerate() {
            let h = p.rms_norm(x, &layer.attn_norm, self.hparams.eps);
            let h = layer.attention.forward(p, h);
            x = p.add(x, h);
            let h = p.rms_norm(x, &layer.ffn_norm, self.hparams.eps);
            let h = layer.ffn.forward(p, h);
            x = p.add(x, h);
            p.tap(il, x);
        }
        self.ends.logits(p, x)
    }
}
