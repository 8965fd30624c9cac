//! Embeddings of each layer's own, as in Gemma 4 E2B and E4B: a second table gives every token a short vector for every
//! layer, the residual stream's first state adds to it, and each layer lets its vector in through a gate.
//!
//! ```text
//! e = ( √P · table[token] + rms_norm_P(W x0 / √n_embd) ) / √2      [n_layer, P] a row
//! x = x + rms_norm( Wp (gelu(Wg x) * e[il]) )
//! ```
//!
//! The table holds about as much as the rest of the model and a token reads one row of it: it stays where it is mapped.

use paceline_backend::{Buf, Matrix, PlanBuilder, Vector};

use crate::{Error, Hparams, Weights};

/// Where the vectors of all layers come from.
pub struct PerLayerEmbedding {
    table: Matrix,
    proj: Matrix,
    proj_norm: Vector,
    n_embd: usize,
    eps: f32,
}

impl PerLayerEmbedding {
    /// Loads `per_layer_token_embd`, `per_layer_model_proj` and `per_layer_proj_norm`; `width` values for each layer.
    pub fn load(w: &Weights, hp: &Hparams, width: usize) -> Result<PerLayerEmbedding, Error> {
        let all = hp.n_layer * width;
        let (table, proj) = ([all, hp.n_vocab], [hp.n_embd, all]);
        Ok(PerLayerEmbedding {
            table: w.matrix("per_layer_token_embd.weight", table, "n_layer·width, n_vocab")?,
            proj: w.matrix("per_layer_model_proj.weight", proj, "n_embd, n_layer·width")?,
            proj_norm: w.vector("per_layer_proj_norm.weight", width, "width")?,
            n_embd: hp.n_embd,
            eps: hp.eps,
        })
    }

    /// The embedded tokens `[n, n_embd]` (and the tokens) `-> [n, n_layer·width]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let of_token = p.embed(&self.table, (self.proj_norm.len as f32).sqrt());
        let of_state = p.matmul(x, &self.proj);
        // Not lost in the norm: beside its eps the scale counts.
        let of_state = p.scale(of_state, 1.0 / (self.n_embd as f32).sqrt());
        let of_state = p.rms_norm(of_state, &self.proj_norm, self.eps);
        let both = p.add(of_token, of_state);
        p.scale(both, std::f32::consts::FRAC_1_SQRT_2)
    }
}

/// How one layer takes its vector in.
pub struct PerLayerInput {
    il: usize,
    gate: Matrix,
    proj: Matrix,
    norm: Vector,
    eps: f32,
}

impl PerLayerInput {
    /// Loads `inp_gate`, `proj` and `post_norm` of layer `il`.
    pub fn load(w: &Weights, hp: &Hparams, il: usize, width: usize) -> Result<PerLayerInput, Error> {
        let name = |part: &str| format!("blk.{il}.{part}.weight");
        Ok(PerLayerInput {
            il,
            gate: w.matrix(&name("inp_gate"), [hp.n_embd, width], "n_embd, width")?,
            proj: w.matrix(&name("proj"), [width, hp.n_embd], "width, n_embd")?,
            norm: w.vector(&name("post_norm"), hp.n_embd, "n_embd")?,
            eps: hp.eps,
        })
    }

    /// `[n, n_embd] -> [n, n_embd]`, with the vectors of all layers in `all`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf, all: Buf) -> Buf {
        let (width, whole) = (self.gate.n_out, p.width(all));
        let mine = p.columns(all, whole, self.il * width, width);
        let gate = p.matmul(x, &self.gate);
        let h = p.gelu_mul(gate, mine);
        let h = p.matmul(h, &self.proj);
        let h = p.rms_norm(h, &self.norm, self.eps);
        p.add(x, h)
    }
}
