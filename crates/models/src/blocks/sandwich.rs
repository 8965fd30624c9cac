//! A layer as Gemma has it, with norms on both sides of every part, and at its end one factor on the residual stream.
//!
//! ```text
//! a = x + norm(attention(norm x))
//! x = a + norm(ffn(norm a))
//! ```

use paceline_backend::{Buf, PlanBuilder, Vector};

use crate::{
    Error, Weights,
    blocks::{Act, Attention, Mlp},
};

/// A layer, its attention loaded by whoever knows its shape.
pub struct Sandwich {
    attn_norm: Vector,
    attention: Attention,
    post_attention_norm: Vector,
    ffn_norm: Vector,
    ffn: Mlp,
    post_ffw_norm: Vector,
    output_scale: Option<Vector>,
    eps: f32,
}

/// Sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub struct SandwichShape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Width of the feed-forward part.
    pub n_ff: usize,
    /// Added to the mean square in the norms.
    pub eps: f32,
}

impl Sandwich {
    /// Loads `{prefix}attn_norm`, `post_attention_norm`, `ffn_norm`, `ffn_*`, `post_ffw_norm` and, where the file has it,
    /// `layer_output_scale`, with `.weight` behind it or without.
    pub fn load(
        w: &Weights,
        prefix: &str,
        shape: SandwichShape,
        attention: Attention,
    ) -> Result<Sandwich, Error> {
        let norm = |name: &str| w.vector(&format!("{prefix}{name}.weight"), shape.n_embd, "n_embd");
        let scale = format!("{prefix}layer_output_scale");
        let output_scale = match w.vector_opt(&format!("{scale}.weight"), 1, "one factor")? {
            Some(scale) => Some(scale),
            None => w.vector_opt(&scale, 1, "one factor")?,
        };
        Ok(Sandwich {
            attn_norm: norm("attn_norm")?,
            attention,
            post_attention_norm: norm("post_attention_norm")?,
            ffn_norm: norm("ffn_norm")?,
            ffn: Mlp::load(w, prefix, shape.n_embd, shape.n_ff)?.with_act(Act::Gelu),
            post_ffw_norm: norm("post_ffw_norm")?,
            output_scale,
            eps: shape.eps,
        })
    }

    /// `[n, n_embd] -> [n, n_embd]`, before [`scale`](Self::scale). `beside` gets `a` and what the feed-forward part made of
    /// it, and returns what goes through the last norm.
    pub fn forward(
        &self,
        p: &mut PlanBuilder<'_>,
        x: Buf,
        beside: impl FnOnce(&mut PlanBuilder<'_>, Buf, Buf) -> Buf,
    ) -> Buf {
        let h = p.rms_norm(x, &self.attn_norm, self.eps);
        let h = self.attention.forward(p, h);
        let h = p.rms_norm(h, &self.post_attention_norm, self.eps);
        let a = p.add(x, h);
        let h = p.rms_norm(a, &self.ffn_norm, self.eps);
        let h = self.ffn.forward(p, h);
        let h = beside(p, a, h);
        let h = p.rms_norm(h, &self.post_ffw_norm, self.eps);
        p.add(a, h)
    }

    /// The factor at the end of the layer.
    pub fn scale(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        match &self.output_scale {
            Some(scale) => p.scale_by(x, scale),
            None => x,
        }
    }
}
