//! What a layer does to each row by itself: a dense feed-forward layer, or a mixture of experts.

use paceline_backend::{Buf, PlanBuilder};

use crate::{
    Error, Hparams, Weights,
    blocks::{Mlp, Moe, MoeShape},
};

/// A feed-forward layer of either kind.
pub enum Ffn {
    /// One layer for all rows.
    Dense(Mlp),
    /// Some of many for each row.
    Moe(Moe),
}

/// Sizes of the feed-forward layers of a model.
#[derive(Clone, Copy, Debug)]
pub struct FfnShape {
    n_embd: usize,
    n_ff: usize,
    moe: Option<MoeShape>,
}

impl FfnShape {
    /// Reads what the file says of experts.
    pub fn read(w: &Weights, hp: &Hparams) -> Result<FfnShape, Error> {
        Ok(FfnShape { n_embd: hp.n_embd, n_ff: hp.n_ff, moe: MoeShape::read(w, hp)? })
    }
}

impl Ffn {
    /// Loads the layer's `{prefix}ffn_*`; in a model with experts, a layer that has no router is a dense one.
    pub fn load(w: &Weights, prefix: &str, shape: &FfnShape) -> Result<Ffn, Error> {
        match &shape.moe {
            Some(moe) if w.has(&format!("{prefix}ffn_gate_inp.weight")) || shape.n_ff == 0 => {
                Ok(Ffn::Moe(Moe::load(w, prefix, moe)?))
            }
            _ => Ok(Ffn::Dense(Mlp::load(w, prefix, shape.n_embd, shape.n_ff)?)),
        }
    }

    /// `[n, n_embd] -> [n, n_embd]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        match self {
            Ffn::Dense(mlp) => mlp.forward(p, x),
            Ffn::Moe(moe) => moe.forward(p, x),
        }
    }
}
