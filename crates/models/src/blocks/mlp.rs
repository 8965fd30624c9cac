//! The gated feed-forward layer: `down(act(gate x) * up x)` ("GLU Variants Improve Transformer", Shazeer).

use paceline_backend::{Buf, Matrix, PlanBuilder};

use crate::{Error, Weights};

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// SwiGLU, the common one.
    Silu,
    /// GeGLU, in the tanh form.
    Gelu,
}

impl Act {
    /// `act(gate) * up`.
    pub fn mul(self, p: &mut PlanBuilder<'_>, gate: Buf, up: Buf) -> Buf {
        match self {
            Act::Silu => p.silu_mul(gate, up),
            Act::Gelu => p.gelu_mul(gate, up),
        }
    }
}

/// A dense gated layer.
pub struct Mlp {
    act: Act,
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
            act: Act::Silu,
            gate: w.matrix(&name("gate"), up_dims, "n_embd, n_ff")?,
            up: w.matrix(&name("up"), up_dims, "n_embd, n_ff")?,
            down: w.matrix(&name("down"), [n_ff, n_embd], "n_ff, n_embd")?,
        })
    }

    /// The same layer with another activation.
    pub fn with_act(self, act: Act) -> Mlp {
        Mlp { act, ..self }
    }

    /// `[n, n_embd] -> [n, n_embd]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let [gate, up] = p.matmuls(x, [&self.gate, &self.up]);
        let h = self.act.mul(p, gate, up);
        p.matmul(h, &self.down)
    }
}
