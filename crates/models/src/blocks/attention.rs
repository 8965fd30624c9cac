//! Softmax attention with grouped KV heads, per-head norms of queries and keys, partial rotary embedding, and
//! the sigmoid output gate of Qwen3.5 where the query projection carries one.
//!
//! ```text
//! q = rope(norm(Wq x))   k = rope(norm(Wk x))   v = Wv x   [or norm(Wv x), or norm(Wk x)]
//! y = Wo ( softmax(q·k · scale) v  [* sigmoid(gate)] )
//! ```
//!
//! Keys are cached after norm and rotation, values as they come or after their norm. A layer may have queries only and
//! read what another layer cached.

use paceline_backend::{
    AttentionOp, BlockMask, Buf, Matrix, Pairing, PlanBuilder, RopeSpec, StateDecl, StateId, Vector,
};

use crate::{Error, Hparams, Weights};

/// Where values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// A projection of their own.
    Projected,
    /// As in Gemma 4: that projection, or where the file has none that of the keys, before their norm and rotation; then
    /// normed per head, without a weight.
    Normed,
}

/// Sizes and variants of an attention layer.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    /// Width of the input.
    pub n_embd: usize,
    /// Query heads.
    pub n_head: usize,
    /// KV heads.
    pub n_head_kv: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// Added to the mean square in the head norms.
    pub eps: f32,
    /// True if each head of the query projection is followed by a gate of the same width.
    pub gated: bool,
    /// True if queries and keys are normed per head.
    pub head_norm: bool,
    /// Visibility among the rows of a lane.
    pub mask: BlockMask,
    /// Sliding window.
    pub window: Option<usize>,
    /// Factor on the scores.
    pub scale: f32,
    /// Where values come from.
    pub values: Values,
}

impl AttentionShape {
    /// The common case: causal, no window, no gate, head norms, dimensions that turn half a head apart.
    /// Architectures name only what differs.
    pub fn of(hp: &Hparams) -> AttentionShape {
        AttentionShape {
            n_embd: hp.n_embd,
            n_head: hp.n_head,
            n_head_kv: hp.n_head_kv,
            head_dim: hp.head_dim,
            rope: RopeSpec {
                n_rot: hp.n_rot,
                base: hp.rope_base,
                pairing: Pairing::HalfSplit,
                factors: None,
                scaling: hp.rope_scaling,
            },
            eps: hp.eps,
            gated: false,
            head_norm: true,
            mask: BlockMask::Causal,
            window: None,
            scale: 1.0 / (hp.head_dim as f32).sqrt(),
            values: Values::Projected,
        }
    }

    /// What the layer remembers.
    pub fn state(&self) -> StateDecl {
        StateDecl::Kv { n_head: self.n_head_kv, head_dim: self.head_dim, window: self.window }
    }

    fn q_width(&self) -> usize {
        self.n_head * self.head_dim * if self.gated { 2 } else { 1 }
    }

    fn kv_width(&self) -> usize {
        self.n_head_kv * self.head_dim
    }
}

/// Projections as the file has them.
enum Qkv {
    Split {
        q: Matrix,
        k: Matrix,
        /// None if the keys' projection gives the values too.
        v: Option<Matrix>,
        bias: [Option<Vector>; 3],
    },
    /// Rows: all of q, then k, then v.
    Fused(Matrix),
    /// Keys and values are another layer's.
    Query(Matrix),
}

/// An attention layer.
pub struct Attention {
    shape: AttentionShape,
    qkv: Qkv,
    q_norm: Option<Vector>,
    k_norm: Option<Vector>,
    output: Matrix,
    output_bias: Option<Vector>,
    sinks: Option<Vector>,
    state: StateId,
}

impl Attention {
    /// Loads `{prefix}attn_q`, `attn_k`, `attn_v` (or a fused `attn_qkv`), `attn_output`, and the optional norms,
    /// biases and sinks.
    pub fn load(
        w: &Weights,
        prefix: &str,
        shape: AttentionShape,
        state: StateId,
    ) -> Result<Attention, Error> {
        let name = |part: &str| format!("{prefix}attn_{part}.weight");
        let bias =
            |part: &str, len: usize| w.vector_opt(&format!("{prefix}attn_{part}.bias"), len, "outputs");
        let (n_embd, n_q, n_kv) = (shape.n_embd, shape.q_width(), shape.kv_width());
        let qkv = if w.has(&name("qkv")) {
            Qkv::Fused(w.matrix(&name("qkv"), [n_embd, n_q + 2 * n_kv], "n_embd, q|k|v rows")?)
        } else {
            Qkv::Split {
                q: w.matrix(&name("q"), [n_embd, n_q], "n_embd, n_head·head_dim")?,
                k: w.matrix(&name("k"), [n_embd, n_kv], "n_embd, n_head_kv·head_dim")?,
                v: match shape.values {
                    Values::Normed if !w.has(&name("v")) => None,
                    _ => Some(w.matrix(&name("v"), [n_embd, n_kv], "n_embd, n_head_kv·head_dim")?),
                },
                bias: [bias("q", n_q)?, bias("k", n_kv)?, bias("v", n_kv)?],
            }
        };
        Attention::load_rest(w, prefix, shape, state, qkv)
    }

    /// A layer without keys and values of its own: it reads those that another one, of the same shape, writes to `state`.
    /// Tensors for them are left in the file.
    pub fn load_reader(
        w: &Weights,
        prefix: &str,
        shape: AttentionShape,
        state: StateId,
    ) -> Result<Attention, Error> {
        let dims = [shape.n_embd, shape.q_width()];
        let q = w.matrix(&format!("{prefix}attn_q.weight"), dims, "n_embd, n_head·head_dim")?;
        Attention::load_rest(w, prefix, shape, state, Qkv::Query(q))
    }

    fn load_rest(
        w: &Weights,
        prefix: &str,
        shape: AttentionShape,
        state: StateId,
        qkv: Qkv,
    ) -> Result<Attention, Error> {
        let name = |part: &str| format!("{prefix}attn_{part}.weight");
        let norm = |part| match shape.head_norm {
            true => w.vector(&name(part), shape.head_dim, "head_dim").map(Some),
            false => Ok(None),
        };
        let (n_embd, n_out) = (shape.n_embd, shape.n_head * shape.head_dim);
        Ok(Attention {
            q_norm: norm("q_norm")?,
            k_norm: match qkv {
                Qkv::Query(_) => None,
                _ => norm("k_norm")?,
            },
            qkv,
            output: w.matrix(&name("output"), [n_out, n_embd], "n_head·head_dim, n_embd")?,
            output_bias: w.vector_opt(&format!("{prefix}attn_output.bias"), n_embd, "outputs")?,
            sinks: w.vector_opt(&name("sinks"), shape.n_head, "n_head")?,
            state,
            shape,
        })
    }

    /// `[n, n_embd] -> [n, n_embd]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let shape = &self.shape;
        let (q, kv) = self.project(p, x);
        let (q, gate) = match shape.gated {
            true => {
                let (d, pair) = (shape.head_dim, 2 * shape.head_dim);
                (p.columns(q, pair, 0, d), Some(p.columns(q, pair, d, d)))
            }
            false => (q, None),
        };
        let q = self.turn(p, q, self.q_norm.as_ref());
        if let Some((k, v)) = kv {
            self.append(p, k, v);
        }
        let y = p.attention(|dst| AttentionOp {
            state: self.state,
            q,
            dst,
            n_head: shape.n_head,
            scale: shape.scale,
            mask: shape.mask,
            window: shape.window,
            sinks: self.sinks.map(|s| s.id),
        });
        let y = match gate {
            Some(gate) => p.sigmoid_mul(y, gate),
            None => y,
        };
        p.matmul_bias(y, &self.output, self.output_bias.as_ref())
    }

    /// Writes keys and values of rows that somebody else computed the features of: how a drafter's context comes
    /// to be. Same weights, norm and rotation as in [`forward`](Self::forward).
    pub fn append_only(&self, p: &mut PlanBuilder<'_>, context: Buf) {
        if let Some((k, v)) = self.project_kv(p, context) {
            self.append(p, k, v);
        }
    }

    fn append(&self, p: &mut PlanBuilder<'_>, k: Buf, v: Buf) {
        let v = match self.shape.values {
            Values::Projected => v,
            Values::Normed => p.rms_norm_plain(v, self.shape.head_dim, self.shape.eps),
        };
        let k = self.turn(p, k, self.k_norm.as_ref());
        p.kv_append(self.state, k, v);
    }

    /// Queries, and keys and values where they are the layer's own.
    fn project(&self, p: &mut PlanBuilder<'_>, x: Buf) -> (Buf, Option<(Buf, Buf)>) {
        match &self.qkv {
            Qkv::Split { q, bias: [bq, ..], .. } => {
                let q = p.matmul_bias(x, q, bq.as_ref());
                (q, self.project_kv(p, x))
            }
            Qkv::Query(q) => (p.matmul(x, q), None),
            Qkv::Fused(qkv) => {
                let all = p.matmul(x, qkv);
                let (n_q, n_kv, width) = (self.shape.q_width(), self.shape.kv_width(), qkv.n_out);
                let q = p.columns(all, width, 0, n_q);
                let (k, v) = (p.columns(all, width, n_q, n_kv), p.columns(all, width, n_q + n_kv, n_kv));
                (q, Some((k, v)))
            }
        }
    }

    fn project_kv(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Option<(Buf, Buf)> {
        match &self.qkv {
            Qkv::Split { k, v, bias: [_, bk, bv], .. } => {
                let k = p.matmul_bias(x, k, bk.as_ref());
                Some((k, v.as_ref().map_or(k, |v| p.matmul_bias(x, v, bv.as_ref()))))
            }
            Qkv::Fused(_) => self.project(p, x).1,
            Qkv::Query(_) => None,
        }
    }

    fn turn(&self, p: &mut PlanBuilder<'_>, x: Buf, norm: Option<&Vector>) -> Buf {
        let x = match norm {
            Some(norm) => p.rms_norm(x, norm, self.shape.eps),
            None => x,
        };
        p.rope(x, self.shape.head_dim, &self.shape.rope)
    }
}
