//! The gated feed-forward layer: `down(silu(gate x) * up x)` ("GLU Variants Improve Transformer", Shazeer).

use paceline_backend::{Buf, Matrix, PlanBuilder};

use crate::{Error, Weights};

/// A dense SwiGLU layer.
pub struct Mlp {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Mlp {
    /// Loads `{prefix}ffn_gate`, `ffn_up` and `ffn_down`.
    pub fn load(w: &Weights, prefix: &str, n_embd: usize, n_ff: usize) -> Result<Mlp, Error> {
        Mlp::load_named(w, prefix, "", n_embd, n_ff)
    }

    /// [`load`](Self::load) of tensors whose names end in `{suffix}.weight`.
    pub fn load_named(
        w: &Weights,
        prefix: &str,
        suffix: &str,
        n_embd: usize,
        n_ff: usize,
    ) -> Result<Mlp, Error> {
        let name = |part: &str| format!("{prefix}ffn_{part}{suffix}.weight");
        let up_dims = [n_embd, n_ff];
        Ok(Mlp {
            gate: w.matrix(&name("gate"), up_dims, "n_embd, n_ff")?,
            up: w.matrix(&name("up"), up_dims, "n_embd, n_ff")?,
            down: w.matrix(&name("down"), [n_ff, n_embd], "n_ff, n_embd")?,
        })
    }

    /// `[n, n_embd] -> [n, n_embd]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let [gate, up] = p.matmuls(x, [&self.gate, &self.up]);
        let h = p.silu_mul(gate, up);
        p.matmul(h, &self.down)
    }
}
