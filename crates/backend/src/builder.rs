//! Recording a plan: code that reads like eager maths and leaves a list of ops.

use crate::plan::{
    AttentionOp, Buf, BufDecl, HeadMap, Op, Plan, RopeSpec, Rows, StateId, WeightId,
};

/// A weight matrix that a backend holds: `y[o] = Σ_i W[o, i] x[i]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Where the backend keeps it.
    pub id: WeightId,
    /// Width of the input.
    pub n_in: usize,
    /// Width of the output; for an embedding table, the number of tokens.
    pub n_out: usize,
}

/// A vector of weights that a backend holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector {
    /// Where the backend keeps it.
    pub id: WeightId,
    /// Number of values.
    pub len: usize,
}

/// Records ops. Shapes are proven when weights are loaded, so a mismatch here is a bug and panics with both
/// shapes.
pub struct PlanBuilder<'a> {
    ops: Vec<Op>,
    bufs: Vec<BufDecl>,
    tap_layers: &'a [usize],
    taps: Option<Buf>,
}

impl<'a> PlanBuilder<'a> {
    /// A recorder that keeps the hidden states after the layers of `tap_layers`, in that order.
    pub fn new(tap_layers: &'a [usize]) -> Self {
        PlanBuilder { ops: Vec::new(), bufs: Vec::new(), tap_layers, taps: None }
    }

    /// The finished plan; `output` is what [`StepOut::output`](crate::StepOut) will hold.
    ///
    /// Panics if a tap layer was never offered through [`tap`](Self::tap).
    pub fn finish(self, output: Option<Buf>) -> Plan {
        let placed = self.ops.iter().filter(|op| matches!(op, Op::Place { .. })).count();
        assert_eq!(placed, self.tap_layers.len(), "tap layers {:?} were not all reached", self.tap_layers);
        Plan::new(self.ops, self.bufs, output, self.taps)
    }

    fn buf(&mut self, width: usize, rows: Rows) -> Buf {
        self.bufs.push(BufDecl { width, rows });
        Buf(self.bufs.len() as u32 - 1)
    }

    fn like(&mut self, buf: Buf) -> Buf {
        let BufDecl { width, rows } = self.decl(buf);
        self.buf(width, rows)
    }

    fn decl(&self, buf: Buf) -> BufDecl {
        self.bufs[buf.0 as usize]
    }

    /// Width of a row of `buf`.
    pub fn width(&self, buf: Buf) -> usize {
        self.decl(buf).width
    }

    fn same_shape(&self, what: &str, a: Buf, b: Buf) {
        let (a, b) = (self.decl(a), self.decl(b));
        assert!(
            a.width == b.width && a.rows == b.rows,
            "{what}: {} values of {:?} rows against {} of {:?}",
            a.width,
            a.rows,
            b.width,
            b.rows
        );
    }

    /// `[n] -> [n, n_embd]`: rows of the token embedding table, times `scale`.
    pub fn embed(&mut self, table: &Matrix, scale: f32) -> Buf {
        let dst = self.buf(table.n_in, Rows::Batch);
        self.ops.push(Op::Embed { table: table.id, dst, scale });
        dst
    }

    /// `[n, width]` rows handed in with each step.
    pub fn input(&mut self, width: usize) -> Buf {
        let dst = self.buf(width, Rows::Batch);
        self.ops.push(Op::Input { dst });
        dst
    }

    /// `[r, n_in] -> [r, n_out]`.
    pub fn matmul(&mut self, src: Buf, weight: &Matrix) -> Buf {
        self.matmul_bias(src, weight, None)
    }

    /// [`matmul`](Self::matmul) plus a bias, where the model has one.
    pub fn matmul_bias(&mut self, src: Buf, weight: &Matrix, bias: Option<&Vector>) -> Buf {
        let BufDecl { width, rows } = self.decl(src);
        assert_eq!(width, weight.n_in, "matmul: input of {width} values for a weight of {}", weight.n_in);
        if let Some(bias) = bias {
            assert_eq!(bias.len, weight.n_out, "matmul: bias of {} for {} outputs", bias.len, weight.n_out);
        }
        let dst = self.buf(weight.n_out, rows);
        self.ops.push(Op::MatMul { weight: weight.id, bias: bias.map(|b| b.id), src, dst });
        dst
    }

    /// Several products of one input, recorded side by side so that they share a wave.
    pub fn matmuls<const N: usize>(&mut self, src: Buf, weights: [&Matrix; N]) -> [Buf; N] {
        weights.map(|w| self.matmul(src, w))
    }

    /// RMS norm over groups as long as `weight`: the whole row, or each head.
    pub fn rms_norm(&mut self, src: Buf, weight: &Vector, eps: f32) -> Buf {
        let width = self.width(src);
        assert_eq!(width % weight.len, 0, "rms_norm: {width} values in groups of {}", weight.len);
        let dst = self.like(src);
        self.ops.push(Op::RmsNorm { src, weight: Some(weight.id), dst, eps, group: weight.len });
        dst
    }

    /// `rms_norm(src) * silu(gate)` over groups as long as `weight`.
    pub fn gated_rms_norm(&mut self, src: Buf, gate: Buf, weight: &Vector, eps: f32) -> Buf {
        self.same_shape("gated_rms_norm", src, gate);
        let width = self.width(src);
        assert_eq!(width % weight.len, 0, "gated_rms_norm: {width} values in groups of {}", weight.len);
        let dst = self.like(src);
        self.ops.push(Op::GatedRmsNorm { src, gate, weight: weight.id, dst, eps, group: weight.len });
        dst
    }

    /// Rotary embedding of heads of `head_dim` values.
    pub fn rope(&mut self, src: Buf, head_dim: usize, rope: &RopeSpec) -> Buf {
        let width = self.width(src);
        assert!(width % head_dim == 0 && rope.n_rot <= head_dim && rope.n_rot % 2 == 0, "rope: {width} {rope:?}");
        let dst = self.like(src);
        self.ops.push(Op::Rope { src, dst, head_dim, rope: rope.clone() });
        dst
    }

    /// Writes keys and values of each row into its cell of `state`.
    pub fn kv_append(&mut self, state: StateId, k: Buf, v: Buf) {
        self.same_shape("kv_append", k, v);
        self.ops.push(Op::KvAppend { state, k, v });
    }

    /// Attention with the fields of `op`; its `dst` is made here. Returns the result, as wide as the queries.
    pub fn attention(&mut self, make: impl FnOnce(Buf) -> AttentionOp) -> Buf {
        // The destination needs the width of the queries, which only the op knows.
        let op = make(Buf(u32::MAX));
        let dst = self.like(op.q);
        assert_eq!(self.width(op.q) % op.n_head, 0, "attention: {} values in {} heads", self.width(op.q), op.n_head);
        self.ops.push(Op::Attention(AttentionOp { dst, ..op }));
        dst
    }

    /// Depthwise causal convolution with SiLU.
    pub fn short_conv(&mut self, state: StateId, src: Buf, weight: &Matrix) -> Buf {
        assert_eq!(self.width(src), weight.n_out, "short_conv: channels");
        let dst = self.like(src);
        self.ops.push(Op::ShortConv { state, weight: weight.id, src, dst });
        dst
    }

    /// Decay and beta of a gated delta rule from their projections.
    pub fn delta_gates(&mut self, alpha: Buf, b: Buf, dt_bias: &Vector, a: &Vector) -> (Buf, Buf) {
        self.same_shape("delta_gates", alpha, b);
        assert!(self.width(alpha) == dt_bias.len && dt_bias.len == a.len, "delta_gates: heads");
        let (decay, beta) = (self.like(alpha), self.like(alpha));
        self.ops.push(Op::DeltaGates { alpha, b, dt_bias: dt_bias.id, a: a.id, decay, beta });
        (decay, beta)
    }

    /// The gated delta rule; `width` is `n_head_v · dim_v`.
    pub fn delta_rule(
        &mut self,
        state: StateId,
        qkv: Buf,
        (decay, beta): (Buf, Buf),
        width: usize,
        heads: HeadMap,
        eps: f32,
    ) -> Buf {
        let dst = self.buf(width, Rows::Batch);
        self.ops.push(Op::DeltaRule { state, qkv, decay, beta, dst, heads, eps });
        dst
    }

    /// `silu(gate) * up`.
    pub fn silu_mul(&mut self, gate: Buf, up: Buf) -> Buf {
        self.same_shape("silu_mul", gate, up);
        let dst = self.like(up);
        self.ops.push(Op::SiluMul { gate, up, dst });
        dst
    }

    /// `src * sigmoid(gate)`.
    pub fn sigmoid_mul(&mut self, src: Buf, gate: Buf) -> Buf {
        self.same_shape("sigmoid_mul", src, gate);
        let dst = self.like(src);
        self.ops.push(Op::SigmoidMul { src, gate, dst });
        dst
    }

    /// `a + b`.
    pub fn add(&mut self, a: Buf, b: Buf) -> Buf {
        self.same_shape("add", a, b);
        let dst = self.like(a);
        self.ops.push(Op::Add { a, b, dst });
        dst
    }

    /// From each group of `group` columns, `len` columns from `offset` on.
    pub fn columns(&mut self, src: Buf, group: usize, offset: usize, len: usize) -> Buf {
        let BufDecl { width, rows } = self.decl(src);
        assert!(width % group == 0 && offset + len <= group, "columns: {offset}+{len} of {group} in {width}");
        let dst = self.buf(width / group * len, rows);
        self.ops.push(Op::Columns { src, dst, group, offset, len });
        dst
    }

    /// Offers the hidden state after layer `il`; kept only if somebody asked for it.
    pub fn tap(&mut self, il: usize, x: Buf) {
        let width = self.width(x);
        for (i, _) in self.tap_layers.iter().enumerate().filter(|&(_, &layer)| layer == il) {
            let dst = match self.taps {
                Some(taps) => taps,
                None => self.buf(width * self.tap_layers.len(), Rows::Batch),
            };
            self.taps = Some(dst);
            self.ops.push(Op::Place { src: x, dst, column: i * width });
        }
    }

    /// `[n, w] -> [n_out, w]`: the rows whose output is wanted.
    pub fn select_outputs(&mut self, src: Buf) -> Buf {
        let width = self.width(src);
        let dst = self.buf(width, Rows::Output);
        self.ops.push(Op::SelectOutputs { src, dst });
        dst
    }
}
