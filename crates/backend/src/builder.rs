//! Recording a plan: code that reads like eager maths and leaves a list of ops.

use crate::{
    op::{AttentionOp, Factor, HeadMap, Op, RopeSpec, RouterSpec},
    plan::{Buf, BufDecl, Plan, Rows, StateId, WeightId},
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

/// The weights of all experts for one product, that a backend holds: `n_expert` matrices one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Where the backend keeps them.
    pub id: WeightId,
    /// Width of the input.
    pub n_in: usize,
    /// Width of one expert's output.
    pub n_out: usize,
    /// Number of experts.
    pub n_expert: usize,
}

/// The kernels of local convolutions, that a backend holds: `[channels, n_tap, n_side]` in file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalKernels {
    /// Where the backend keeps them.
    pub id: WeightId,
    /// Values in a row that is convolved.
    pub channels: usize,
    /// Rows that one value is made of.
    pub n_tap: usize,
    /// Convolutions whose kernels lie here.
    pub n_side: usize,
}

/// What a router chose: `n_used` slots a row, each with an expert and its weight.
#[derive(Clone, Copy, Debug)]
pub struct Routes {
    /// Numbers of the experts.
    pub ids: Buf,
    /// Their weights.
    pub weights: Buf,
    /// Experts that there are.
    pub n_expert: usize,
}

/// A hidden state that somebody outside the plan wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tap {
    /// The residual stream behind a layer, counted from 0, before any norm.
    Layer(usize),
    /// What the head reads: the last layer's output behind the model's final norm.
    FinalNorm,
}

impl From<usize> for Tap {
    fn from(il: usize) -> Tap {
        Tap::Layer(il)
    }
}

/// Where the input of a product lies in the taps of a plan that keeps them
/// ([`finish_with_inputs`](PlanBuilder::finish_with_inputs)).
#[derive(Clone, Debug)]
pub struct ProductInput {
    /// The weight that it is multiplied with.
    pub weight: WeightId,
    /// Its first column.
    pub column: usize,
    /// Columns that a row of the weight meets.
    pub n_in: usize,
    /// For a product with experts, who is met.
    pub experts: Option<ExpertInput>,
}

/// The experts that an input meets.
#[derive(Clone, Debug)]
pub struct ExpertInput {
    /// Experts that there are.
    pub n_expert: usize,
    /// First column of their numbers.
    pub ids_column: usize,
    /// Slots of a row.
    pub n_used: usize,
    /// Whether each slot has an input of its own, side by side.
    pub per_slot: bool,
}

impl ProductInput {
    /// Columns in the taps.
    pub fn width(&self) -> usize {
        self.n_in
            * self.experts.as_ref().filter(|experts| experts.per_slot).map_or(1, |experts| experts.n_used)
    }
}

/// Records ops. Shapes are proven when weights are loaded, so a mismatch here is a bug and panics with both
/// shapes.
pub struct PlanBuilder<'a> {
    ops: Vec<Op>,
    bufs: Vec<BufDecl>,
    wanted: &'a [Tap],
    n_tapped: usize,
    taps: Option<Buf>,
}

impl<'a> PlanBuilder<'a> {
    /// A recorder that keeps the hidden states at `taps`, side by side in that order.
    pub fn new(taps: &'a [Tap]) -> Self {
        PlanBuilder { ops: Vec::new(), bufs: Vec::new(), wanted: taps, n_tapped: 0, taps: None }
    }

    /// The finished plan; `output` is what [`StepOut::output`](crate::StepOut) will hold.
    ///
    /// Panics if a tap was never offered through [`tap`](Self::tap), or if an op's result is read by nothing:
    /// computing what nobody wants is a slip in the model's code.
    pub fn finish(self, output: Option<Buf>) -> Plan {
        assert_eq!(self.n_tapped, self.wanted.len(), "taps {:?} were not all reached", self.wanted);
        let plan = Plan::new(self.ops, self.bufs, output, self.taps);
        if let Some(op) = plan.unread() {
            panic!("nothing reads the result of {op:?} in\n{plan}");
        }
        plan
    }

    /// As [`finish`](Self::finish), and what every product of the batch's rows reads is kept as taps: for statistics of what
    /// weights meet. The rows are wide. Not for products of output rows alone, and not beside other taps.
    pub fn finish_with_inputs(mut self, output: Option<Buf>) -> (Plan, Vec<ProductInput>) {
        assert!(self.taps.is_none() && self.wanted.is_empty(), "inputs of products are kept alone");
        let (mut kept, mut width): (Vec<(Buf, usize)>, usize) = (Vec::new(), 0);
        let mut column = |buf: Buf, bufs: &[BufDecl]| match kept.iter().find(|(known, _)| *known == buf) {
            Some(&(_, column)) => column,
            None => {
                kept.push((buf, width));
                width += bufs[buf.0 as usize].width;
                width - bufs[buf.0 as usize].width
            }
        };
        let mut inputs = Vec::new();
        for op in &self.ops {
            let (weight, n_in, src, experts) = match *op {
                Op::MatMul { weight, src, .. } => (weight, self.width(src), src, None),
                Op::ExpertMatMul { weight, n_expert, n_in, ids, src, .. } => {
                    (weight, n_in, src, Some((n_expert, ids)))
                }
                _ => continue,
            };
            if self.decl(src).rows != Rows::Batch {
                continue;
            }
            let experts = experts.map(|(n_expert, ids)| ExpertInput {
                n_expert,
                ids_column: column(ids, &self.bufs),
                n_used: self.width(ids),
                per_slot: self.width(src) != n_in,
            });
            inputs.push(ProductInput { weight, column: column(src, &self.bufs), n_in, experts });
        }
        if width > 0 {
            let dst = self.buf(width, Rows::Batch);
            self.taps = Some(dst);
            self.ops.extend(kept.iter().map(|&(src, column)| Op::Place { src, dst, column }));
        }
        (self.finish(output), inputs)
    }

    /// [`finish`](Self::finish) with a second result in the place of taps, of which there are none:
    /// [`StepOut::taps`](crate::StepOut) will hold it.
    pub fn finish_with(mut self, output: Buf, beside: Buf) -> Plan {
        assert!(self.taps.is_none() && self.wanted.is_empty(), "a second result beside taps");
        self.taps = Some(beside);
        self.finish(Some(output))
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

    /// Positions and states belong to the rows of the step, not to those selected for output.
    fn all_rows(&self, what: &str, buf: Buf) {
        let rows = self.decl(buf).rows;
        assert!(rows == Rows::Batch, "{what}: {rows:?} rows where those of the batch are needed");
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

    /// [`rms_norm`](Self::rms_norm) over groups of `group` values, without a weight.
    pub fn rms_norm_plain(&mut self, src: Buf, group: usize, eps: f32) -> Buf {
        let width = self.width(src);
        assert_eq!(width % group, 0, "rms_norm: {width} values in groups of {group}");
        let dst = self.like(src);
        self.ops.push(Op::RmsNorm { src, weight: None, dst, eps, group });
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
        self.all_rows("rope", src);
        assert_eq!(width % head_dim, 0, "rope: {width} values in heads of {head_dim}");
        let n_rot = rope.n_rot;
        assert!(
            n_rot <= head_dim && n_rot.is_multiple_of(2),
            "rope: {n_rot} rotated dimensions of {head_dim}"
        );
        let dst = self.like(src);
        self.ops.push(Op::Rope { src, dst, head_dim, rope: rope.clone() });
        dst
    }

    /// Writes keys and values of each row into its cell of `state`.
    pub fn kv_append(&mut self, state: StateId, k: Buf, v: Buf) {
        self.same_shape("kv_append", k, v);
        self.all_rows("kv_append", k);
        self.ops.push(Op::KvAppend { state, k, v });
    }

    /// Attention with the fields of `op`; its `dst` is made here. Returns the result, as wide as the queries.
    pub fn attention(&mut self, make: impl FnOnce(Buf) -> AttentionOp) -> Buf {
        // The destination needs the width of the queries, which only the op knows.
        let op = make(Buf(u32::MAX));
        self.all_rows("attention", op.q);
        let dst = self.like(op.q);
        assert_eq!(
            self.width(op.q) % op.n_head,
            0,
            "attention: {} values in {} heads",
            self.width(op.q),
            op.n_head
        );
        self.ops.push(Op::Attention(AttentionOp { dst, ..op }));
        dst
    }

    /// Depthwise causal convolution with SiLU.
    pub fn short_conv(&mut self, state: StateId, src: Buf, weight: &Matrix) -> Buf {
        self.all_rows("short_conv", src);
        let width = self.width(src);
        assert_eq!(width, weight.n_out, "short_conv: {width} values for {} channels", weight.n_out);
        let dst = self.like(src);
        self.ops.push(Op::ShortConv { state, weight: weight.id, src, dst });
        dst
    }

    /// Depthwise causal convolution over the rows of a lane alone, with the kernels of `side`; `delta` has what a row's own
    /// kernels, those of all sides, differ in for each group of channels.
    pub fn local_conv(&mut self, src: Buf, delta: Buf, kernels: &LocalKernels, side: usize) -> Buf {
        self.all_rows("local_conv", src);
        self.all_rows("local_conv", delta);
        let &LocalKernels { id, channels, n_tap, n_side } = kernels;
        let (width, n_delta) = (self.width(src), self.width(delta));
        assert_eq!(width, channels, "local_conv: {width} values for {channels} channels");
        assert!(side < n_side, "local_conv: side {side} of {n_side}");
        let n_group = n_delta / (n_side * n_tap);
        assert!(
            n_group > 0 && n_delta == n_side * n_tap * n_group && channels.is_multiple_of(n_group),
            "local_conv: {n_delta} differences for {channels} channels, {n_tap} taps and {n_side} sides"
        );
        let dst = self.like(src);
        self.ops.push(Op::LocalConv { base: id, delta, side, n_tap, src, dst });
        dst
    }

    /// Decay and beta of a gated delta rule from their projections.
    pub fn delta_gates(&mut self, alpha: Buf, b: Buf, dt_bias: &Vector, a: &Vector) -> (Buf, Buf) {
        self.same_shape("delta_gates", alpha, b);
        let (width, n_bias, n_a) = (self.width(alpha), dt_bias.len, a.len);
        assert!(
            width == n_bias && width == n_a,
            "delta_gates: {width} heads, dt_bias of {n_bias}, a of {n_a}"
        );
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
        self.same_shape("delta_rule: decay and beta", decay, beta);
        self.all_rows("delta_rule", qkv);
        self.all_rows("delta_rule", decay);
        let n_head_v = self.width(decay);
        assert_eq!(width % n_head_v, 0, "delta_rule: {width} values in {n_head_v} heads");
        let dst = self.buf(width, Rows::Batch);
        self.ops.push(Op::DeltaRule { state, qkv, decay, beta, dst, heads, eps });
        dst
    }

    /// `[r, n_expert] ->` the experts of each row and their weights.
    pub fn router(&mut self, logits: Buf, spec: RouterSpec) -> Routes {
        let BufDecl { width: n_expert, rows } = self.decl(logits);
        let n_used = spec.n_used;
        assert!(0 < n_used && n_used <= n_expert, "router: {n_used} of {n_expert} experts");
        let (ids, weights) = (self.buf(n_used, rows), self.buf(n_used, rows));
        self.ops.push(Op::Router { logits, spec, ids, weights });
        Routes { ids, weights, n_expert }
    }

    /// `[r, n_in]`, or `[r, n_used · n_in]` with an input for each slot, `-> [r, n_used · n_out]`.
    pub fn expert_matmul(&mut self, src: Buf, routes: Routes, weight: &Experts) -> Buf {
        let (BufDecl { width, rows }, ids) = (self.decl(src), self.decl(routes.ids));
        let &Experts { id, n_in, n_out, n_expert } = weight;
        assert!(
            width == n_in || width == ids.width * n_in,
            "expert_matmul: input of {width} values for weights of {n_in} and {} slots",
            ids.width
        );
        assert!(rows == ids.rows, "expert_matmul: {rows:?} rows of input, {:?} rows of experts", ids.rows);
        assert_eq!(n_expert, routes.n_expert, "expert_matmul: experts of the weights and of the router");
        let dst = self.buf(ids.width * n_out, rows);
        self.ops.push(Op::ExpertMatMul { weight: id, n_expert, n_in, ids: routes.ids, src, dst });
        dst
    }

    /// `[r, n_used · width] -> [r, width]`: the slots of each row, weighted and added from the first on.
    pub fn weighted_sum(&mut self, src: Buf, routes: Routes) -> Buf {
        let (BufDecl { width, rows }, weights) = (self.decl(src), self.decl(routes.weights));
        assert!(
            width % weights.width == 0 && rows == weights.rows,
            "weighted_sum: {width} values of {rows:?} rows in {} slots of {:?}",
            weights.width,
            weights.rows
        );
        let dst = self.buf(width / weights.width, rows);
        self.ops.push(Op::WeightedSum { src, weights: routes.weights, dst });
        dst
    }

    /// `silu(gate) * up`.
    pub fn silu_mul(&mut self, gate: Buf, up: Buf) -> Buf {
        self.same_shape("silu_mul", gate, up);
        let dst = self.like(up);
        self.ops.push(Op::SiluMul { gate, up, dst });
        dst
    }

    /// `gelu(gate) * up`.
    pub fn gelu_mul(&mut self, gate: Buf, up: Buf) -> Buf {
        self.same_shape("gelu_mul", gate, up);
        let dst = self.like(up);
        self.ops.push(Op::GeluMul { gate, up, dst });
        dst
    }

    /// `cap * tanh(src / cap)`.
    pub fn softcap(&mut self, src: Buf, cap: f32) -> Buf {
        assert!(cap > 0.0, "softcap: a cap of {cap}");
        let dst = self.like(src);
        self.ops.push(Op::Softcap { src, cap, dst });
        dst
    }

    /// `factor * src`.
    pub fn scale(&mut self, src: Buf, factor: f32) -> Buf {
        let dst = self.like(src);
        self.ops.push(Op::Scale { src, factor: Factor::Constant(factor), dst });
        dst
    }

    /// `factor * src`, the factor being the one value of a weight.
    pub fn scale_by(&mut self, src: Buf, factor: &Vector) -> Buf {
        assert_eq!(factor.len, 1, "scale_by: {} factors", factor.len);
        let dst = self.like(src);
        self.ops.push(Op::Scale { src, factor: Factor::Weight(factor.id), dst });
        dst
    }

    /// `src * sigmoid(gate)`; the gate is as wide as `src`, or one value for the whole row.
    pub fn sigmoid_mul(&mut self, src: Buf, gate: Buf) -> Buf {
        if self.width(gate) != 1 || self.decl(gate).rows != self.decl(src).rows {
            self.same_shape("sigmoid_mul", src, gate);
        }
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

    /// The parts side by side.
    pub fn concat(&mut self, parts: &[Buf]) -> Buf {
        let rows = self.decl(parts[0]).rows;
        let width = parts.iter().map(|part| self.width(*part)).sum();
        let dst = self.buf(width, rows);
        let mut column = 0;
        for &src in parts {
            let part = self.decl(src);
            assert!(part.rows == rows, "concat: {:?} rows beside {rows:?} rows", part.rows);
            self.ops.push(Op::Place { src, dst, column });
            column += part.width;
        }
        dst
    }

    /// True if somebody asked for the hidden state at `tap`.
    pub fn is_tapped(&self, tap: Tap) -> bool {
        self.wanted.contains(&tap)
    }

    /// Offers the hidden state at `tap` (a layer's index, or another place); kept only if somebody asked for it.
    pub fn tap(&mut self, tap: impl Into<Tap>, x: Buf) {
        self.all_rows("tap", x);
        let (tap, width) = (tap.into(), self.width(x));
        for (i, _) in self.wanted.iter().enumerate().filter(|&(_, &wanted)| wanted == tap) {
            let dst = match self.taps {
                Some(taps) => taps,
                None => self.buf(width * self.wanted.len(), Rows::Batch),
            };
            self.taps = Some(dst);
            self.n_tapped += 1;
            self.ops.push(Op::Place { src: x, dst, column: i * width });
        }
    }

    /// `[n, w] -> [n_out, w]`: the rows whose output is wanted.
    pub fn select_outputs(&mut self, src: Buf) -> Buf {
        self.all_rows("select_outputs", src);
        let width = self.width(src);
        let dst = self.buf(width, Rows::Output);
        self.ops.push(Op::SelectOutputs { src, dst });
        dst
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::{BlockMask, Pairing, RopeScaling, RouterScore};

    fn matrix(n_in: usize, n_out: usize) -> Matrix {
        Matrix { id: WeightId(0), n_in, n_out }
    }

    fn vector(len: usize) -> Vector {
        Vector { id: WeightId(0), len }
    }

    /// `record` is given rows of 6 values, rows of 4, and output rows of 4; it must panic with `message`.
    fn check(record: impl Fn(&mut PlanBuilder<'_>, [Buf; 3]), message: &str) {
        let mut p = PlanBuilder::new(&[Tap::Layer(0)]);
        let (six, four) = (p.input(6), p.input(4));
        let out = p.select_outputs(four);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            record(&mut p, [six, four, out]);
            p.finish(None);
        }))
        .expect_err(message);
        let got = panic.downcast_ref::<String>().expect("a panic with a message");
        assert!(got.contains(message), "{got}, expected {message}");
    }

    #[test]
    fn mismatched_shapes_panic_with_both() {
        let rope = RopeSpec {
            n_rot: 4,
            base: 1e4,
            pairing: Pairing::HalfSplit,
            factors: None,
            scaling: RopeScaling::None,
        };
        check(|p, [six, four, _]| _ = p.add(six, four), "add: 6 values of Batch rows against 4 of Batch");
        check(|p, [_, four, out]| _ = p.add(four, out), "add: 4 values of Batch rows against 4 of Output");
        check(|p, [six, four, _]| _ = p.silu_mul(six, four), "silu_mul: 6 values of Batch rows against 4");
        check(|p, [six, four, _]| _ = p.gelu_mul(six, four), "gelu_mul: 6 values of Batch rows against 4");
        check(|p, [six, ..]| _ = p.softcap(six, 0.0), "softcap: a cap of 0");
        check(|p, [six, ..]| _ = p.scale_by(six, &vector(2)), "scale_by: 2 factors");
        check(|p, [six, ..]| _ = p.rms_norm_plain(six, 4, 0.0), "rms_norm: 6 values in groups of 4");
        check(
            |p, [six, four, _]| _ = p.sigmoid_mul(six, four),
            "sigmoid_mul: 6 values of Batch rows against 4",
        );
        check(|p, [six, ..]| _ = p.matmul(six, &matrix(5, 2)), "matmul: input of 6 values for a weight of 5");
        check(
            |p, [six, ..]| _ = p.matmul_bias(six, &matrix(6, 2), Some(&vector(3))),
            "matmul: bias of 3 for 2 outputs",
        );
        check(|p, [six, ..]| _ = p.rms_norm(six, &vector(4), 0.0), "rms_norm: 6 values in groups of 4");
        check(
            |p, [six, four, _]| _ = p.gated_rms_norm(six, four, &vector(2), 0.0),
            "gated_rms_norm: 6 values of Batch rows against 4",
        );
        check(|p, [six, ..]| _ = p.rope(six, 4, &rope), "rope: 6 values in heads of 4");
        check(|p, [_, four, _]| _ = p.rope(four, 2, &rope), "rope: 4 rotated dimensions of 2");
        check(|p, [_, _, out]| _ = p.rope(out, 4, &rope), "rope: Output rows where those of the batch");
        check(
            |p, [six, four, _]| p.kv_append(StateId(0), six, four),
            "kv_append: 6 values of Batch rows against 4",
        );
        let attend = |p: &mut PlanBuilder<'_>, q, n_head| {
            p.attention(|dst| AttentionOp {
                state: StateId(0),
                q,
                dst,
                n_head,
                scale: 1.0,
                mask: BlockMask::Causal,
                window: None,
                sinks: None,
            })
        };
        check(|p, [six, ..]| _ = attend(p, six, 4), "attention: 6 values in 4 heads");
        check(|p, [_, _, out]| _ = attend(p, out, 4), "attention: Output rows");
        check(
            |p, [six, ..]| _ = p.short_conv(StateId(0), six, &matrix(4, 5)),
            "short_conv: 6 values for 5 channels",
        );
        let kernels = |channels| LocalKernels { id: WeightId(0), channels, n_tap: 2, n_side: 1 };
        check(
            |p, [six, four, _]| _ = p.local_conv(six, four, &kernels(5), 0),
            "local_conv: 6 values for 5 channels",
        );
        check(|p, [six, four, _]| _ = p.local_conv(six, four, &kernels(6), 1), "local_conv: side 1 of 1");
        check(
            |p, [six, four, _]| _ = p.local_conv(four, six, &kernels(4), 0),
            "local_conv: 6 differences for 4 channels, 2 taps and 1 sides",
        );
        check(|p, [_, four, out]| _ = p.local_conv(out, four, &kernels(4), 0), "local_conv: Output rows");
        check(
            |p, [six, ..]| _ = p.delta_gates(six, six, &vector(6), &vector(5)),
            "delta_gates: 6 heads, dt_bias of 6, a of 5",
        );
        check(
            |p, [six, four, _]| _ = p.delta_rule(StateId(0), six, (four, six), 4, HeadMap::Tiled, 0.0),
            "delta_rule: decay and beta: 4 values of Batch rows against 6",
        );
        check(
            |p, [six, four, _]| _ = p.delta_rule(StateId(0), six, (four, four), 6, HeadMap::Tiled, 0.0),
            "delta_rule: 6 values in 4 heads",
        );
        let spec = |n_used| RouterSpec {
            n_used,
            score: RouterScore::Softmax,
            normalise: true,
            scale: 1.0,
            expert_scale: None,
        };
        let experts = |n_in, n_expert| Experts { id: WeightId(0), n_in, n_out: 2, n_expert };
        check(|p, [_, four, _]| _ = p.router(four, spec(5)), "router: 5 of 4 experts");
        check(|p, [_, four, _]| _ = p.router(four, spec(0)), "router: 0 of 4 experts");
        check(
            |p, [six, four, _]| {
                let routes = p.router(four, spec(2));
                p.expert_matmul(six, routes, &experts(4, 4));
            },
            "expert_matmul: input of 6 values for weights of 4 and 2 slots",
        );
        check(
            |p, [_, four, out]| {
                let routes = p.router(four, spec(2));
                p.expert_matmul(out, routes, &experts(4, 4));
            },
            "expert_matmul: Output rows of input, Batch rows of experts",
        );
        check(
            |p, [_, four, _]| {
                let routes = p.router(four, spec(2));
                p.expert_matmul(four, routes, &experts(4, 5));
            },
            "experts of the weights and of the router",
        );
        check(
            |p, [six, four, _]| {
                let routes = p.router(six, spec(3));
                p.weighted_sum(four, routes);
            },
            "weighted_sum: 4 values of Batch rows in 3 slots of Batch",
        );
        check(|p, [six, ..]| _ = p.columns(six, 4, 0, 2), "columns: 0+2 of 4 in 6");
        check(|p, [_, four, out]| _ = p.concat(&[four, out]), "concat: Output rows beside Batch rows");
        check(|p, [_, _, out]| p.tap(0, out), "tap: Output rows");
        check(|p, [_, _, out]| _ = p.select_outputs(out), "select_outputs: Output rows");
    }

    #[test]
    fn a_plan_must_reach_its_taps_and_use_what_it_computes() {
        check(|_, _| (), "taps [Layer(0)] were not all reached");
        check(|p, [six, ..]| p.tap(0, six), "nothing reads the result of SelectOutputs");
        // What only a state sees is read.
        let mut p = PlanBuilder::new(&[]);
        let x = p.input(4);
        p.kv_append(StateId(0), x, x);
        assert_eq!(p.finish(None).unread().map(|op| format!("{op:?}")), None);
    }
}
