//! The gated DeltaNet mixer: a short convolution, then a matrix per value head that is decayed and corrected
//! towards each new key and value ("Gated Delta Networks", Yang et al.). Its memory does not grow.
//!
//! ```text
//! u = Wqkv x            c = silu(conv(u))          q | k | v = c, q and k normalised per head
//! g = softplus(Wa x + dt)·a    beta = sigmoid(Wb x)
//! S = e^g S;  S += k (beta (v - Sᵀk))ᵀ;  o = Sᵀq
//! y = Wo ( rms_norm(o) * silu(Wz x) )
//! ```

use paceline_backend::{Buf, HeadMap, Matrix, PlanBuilder, StateDecl, StateId, Vector};

use crate::{Error, Weights};

/// Added to the squared norm of queries and keys, as in the reference implementation.
const L2_EPS: f32 = 1e-6;

/// Sizes of a gated DeltaNet layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaNetShape {
    /// Width of the input.
    pub n_embd: usize,
    /// Key heads.
    pub n_head_k: usize,
    /// Value heads.
    pub n_head_v: usize,
    /// Width of a key head.
    pub dim_k: usize,
    /// Width of a value head.
    pub dim_v: usize,
    /// Taps of the convolution.
    pub conv_width: usize,
    /// Order of the value heads in the file.
    pub heads: HeadMap,
    /// Added to the mean square in the output norm.
    pub eps: f32,
}

impl DeltaNetShape {
    /// Channels of the convolution.
    pub fn channels(&self) -> usize {
        2 * self.n_head_k * self.dim_k + self.width()
    }

    /// Width of the mixer's output before its projection.
    pub fn width(&self) -> usize {
        self.n_head_v * self.dim_v
    }

    /// What the layer remembers: the convolution's tail, then the matrices.
    pub fn states(&self) -> [StateDecl; 2] {
        let &DeltaNetShape { n_head_k, n_head_v, dim_k, dim_v, .. } = self;
        [
            StateDecl::ConvTail { channels: self.channels(), width: self.conv_width },
            StateDecl::Delta { n_head_k, n_head_v, dim_k, dim_v },
        ]
    }
}

/// The projections to q, k, v and to the output's gate, as the file has them.
enum Qkvz {
    Split {
        qkv: Matrix,
        z: Matrix,
    },
    /// For each key head, its rows of q, of k, and those of v and z of all its value heads.
    Interleaved(Matrix),
}

/// The projections to the gates, as the file has them.
enum Gates {
    Split {
        alpha: Matrix,
        beta: Matrix,
    },
    /// For each key head, the rows of beta of its value heads and then those of alpha.
    Interleaved(Matrix),
}

/// A gated DeltaNet layer.
pub struct DeltaNet {
    shape: DeltaNetShape,
    qkvz: Qkvz,
    gates: Gates,
    a: Vector,
    dt_bias: Vector,
    conv: Matrix,
    norm: Vector,
    output: Matrix,
    conv_tail: StateId,
    delta: StateId,
}

impl DeltaNet {
    /// Loads the `{prefix}attn_*` and `{prefix}ssm_*` tensors; Qwen3-Next files have `ssm_ba` for `ssm_alpha` and `ssm_beta`,
    /// and old ones `ssm_in` for `attn_qkv` and `attn_gate`. `states` are the ids of
    /// [`DeltaNetShape::states`].
    pub fn load(
        w: &Weights,
        prefix: &str,
        shape: DeltaNetShape,
        states: [StateId; 2],
    ) -> Result<DeltaNet, Error> {
        let name = |part: &str| format!("{prefix}{part}");
        let DeltaNetShape { n_embd, n_head_v, dim_v, .. } = shape;
        let (both, meaning) = (name("ssm_in.weight"), "n_embd, q|k|v|z rows of each key head");
        let qkvz = match w.matrix_opt(&both, [n_embd, shape.channels() + shape.width()], meaning)? {
            Some(both) => Qkvz::Interleaved(both),
            None => Qkvz::Split {
                qkv: w.matrix(
                    &name("attn_qkv.weight"),
                    [n_embd, shape.channels()],
                    "n_embd, q|k|v channels",
                )?,
                z: w.matrix(&name("attn_gate.weight"), [n_embd, shape.width()], "n_embd, n_head_v·dim_v")?,
            },
        };
        let (both, meaning) = (name("ssm_ba.weight"), "n_embd, beta|alpha rows of each key head");
        let gates = match w.matrix_opt(&both, [n_embd, 2 * n_head_v], meaning)? {
            Some(both) => Gates::Interleaved(both),
            None => Gates::Split {
                alpha: w.matrix(&name("ssm_alpha.weight"), [n_embd, n_head_v], "n_embd, n_head_v")?,
                beta: w.matrix(&name("ssm_beta.weight"), [n_embd, n_head_v], "n_embd, n_head_v")?,
            },
        };
        Ok(DeltaNet {
            qkvz,
            gates,
            a: w.vector(&name("ssm_a"), n_head_v, "n_head_v")?,
            dt_bias: w.vector(&name("ssm_dt.bias"), n_head_v, "n_head_v")?,
            conv: w.matrix(
                &name("ssm_conv1d.weight"),
                [shape.conv_width, shape.channels()],
                "conv width, channels",
            )?,
            norm: w.vector(&name("ssm_norm.weight"), dim_v, "dim_v")?,
            output: w.matrix(&name("ssm_out.weight"), [shape.width(), n_embd], "n_head_v·dim_v, n_embd")?,
            conv_tail: states[0],
            delta: states[1],
            shape,
        })
    }

    /// `[n, n_embd] -> [n, n_embd]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let (u, z) = self.qkvz(p, x);
        let (alpha, b) = match &self.gates {
            Gates::Split { alpha, beta } => (p.matmul(x, alpha), p.matmul(x, beta)),
            Gates::Interleaved(both) => {
                let both = p.matmul(x, both);
                // Value heads of a key head.
                let r = self.shape.n_head_v / self.shape.n_head_k;
                let [b, alpha] = [0, r].map(|first| p.columns(both, 2 * r, first, r));
                (alpha, b)
            }
        };
        let gates = p.delta_gates(alpha, b, &self.dt_bias, &self.a);
        let qkv = p.short_conv(self.conv_tail, u, &self.conv);
        let o = p.delta_rule(self.delta, qkv, gates, self.shape.width(), self.shape.heads, L2_EPS);
        let y = p.gated_rms_norm(o, z, &self.norm, self.shape.eps);
        p.matmul(y, &self.output)
    }

    /// Channels of the convolution, and the output's gate.
    fn qkvz(&self, p: &mut PlanBuilder<'_>, x: Buf) -> (Buf, Buf) {
        match &self.qkvz {
            Qkvz::Split { qkv, z } => (p.matmul(x, qkv), p.matmul(x, z)),
            Qkvz::Interleaved(all) => {
                let all = p.matmul(x, all);
                let &DeltaNetShape { n_head_k, dim_k, .. } = &self.shape;
                let v = self.shape.width() / n_head_k;
                let part = |p: &mut PlanBuilder<'_>, first, len| p.columns(all, 2 * (dim_k + v), first, len);
                let qkv =
                    [(0, dim_k), (dim_k, dim_k), (2 * dim_k, v)].map(|(first, len)| part(p, first, len));
                (p.concat(&qkv), part(p, 2 * dim_k + v, v))
            }
        }
    }
}
