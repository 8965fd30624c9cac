//! The operations that a plan is made of.

use std::ops::Range;

use paceline_kernels::rope::{Pairing, RopeScaling};

use crate::plan::{Buf, StateId, WeightId};

/// A rotary embedding over the first `n_rot` dimensions of each head.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Rotated dimensions, even, at most the head's width.
    pub n_rot: usize,
    /// Base of the frequencies.
    pub base: f32,
    /// Which dimensions turn together.
    pub pairing: Pairing,
    /// Divisors of the angles, `[n_rot / 2]`, as in `rope_freqs.weight`.
    pub factors: Option<WeightId>,
    /// What is done to them for a longer context.
    pub scaling: RopeScaling,
}

/// How a value head of a delta rule finds its key head; `r = n_head_v / n_head_k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadMap {
    /// Key head `t % n_head_k`: the order of `qwen35` GGUF files.
    Tiled,
    /// Key head `t / r`: the order of Hugging Face checkpoints and `qwen3next` files.
    Grouped,
}

/// What the rows of one lane see of each other in attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockMask {
    /// A row sees the rows before it and itself.
    Causal,
    /// Every row sees every row of the lane: a drafter's block.
    Full,
    /// A row sees no row of the lane, not even itself: queries without keys, over what somebody else has committed. A row
    /// that sees nothing at all has no result (NaN).
    Past,
}

/// How a router turns logits into the weights of the experts that it chooses.
///
/// Experts are ranked by their logits, ties going to the lower number. NaN ranks above all numbers, so that it reaches the
/// output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterSpec {
    /// Experts chosen for each row, the best first.
    pub n_used: usize,
    /// What a logit becomes.
    pub score: RouterScore,
    /// Whether the weights of a row are divided by their sum.
    pub normalise: bool,
    /// Factor on the weights after that.
    pub scale: f32,
    /// A factor of each expert's own on its weight, after that, `[n_expert]`.
    pub expert_scale: Option<WeightId>,
}

/// What a router makes of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterScore {
    /// The softmax over all experts.
    Softmax,
    /// The sigmoid of each.
    Sigmoid,
}

/// What a row is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Factor {
    /// The same for every model of an architecture.
    Constant(f32),
    /// The one value of a weight.
    Weight(WeightId),
}

/// Softmax attention of each row over its sequence's cells and its lane's rows.
#[derive(Clone, Debug)]
pub struct AttentionOp {
    /// The KV state read.
    pub state: StateId,
    /// Queries, `n_head` heads side by side.
    pub q: Buf,
    /// Result, as wide as `q`.
    pub dst: Buf,
    /// Query heads; head `h` reads KV head `h / (n_head / n_head_kv)`.
    pub n_head: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Visibility inside the lane.
    pub mask: BlockMask,
    /// A row at cell `p` sees cell `c` only if `p - c < window`.
    pub window: Option<usize>,
    /// One extra logit per head in the softmax denominator, `[n_head]`.
    pub sinks: Option<WeightId>,
}

/// One recorded operation. All values are f32; `R` is the number of rows of the buffers involved.
#[derive(Clone, Debug)]
pub enum Op {
    /// `dst[r] = scale * table[tokens[r]]`.
    Embed {
        /// Token embedding table, one row a token.
        table: WeightId,
        /// Result.
        dst: Buf,
        /// Factor on the rows; 1 for most models.
        scale: f32,
    },
    /// `dst = Step::inputs`.
    Input {
        /// Result.
        dst: Buf,
    },
    /// `dst = W src (+ bias)`.
    MatMul {
        /// Weight of shape `[n_in, n_out]` in file order.
        weight: WeightId,
        /// Bias of `n_out` values.
        bias: Option<WeightId>,
        /// Input, `n_in` wide.
        src: Buf,
        /// Result, `n_out` wide.
        dst: Buf,
    },
    /// Chooses experts for each row.
    Router {
        /// `[n_expert]` a row.
        logits: Buf,
        /// How to choose and weigh.
        spec: RouterSpec,
        /// Numbers of the chosen experts, `[n_used]` a row, as floats.
        ids: Buf,
        /// Their weights, `[n_used]` a row.
        weights: Buf,
    },
    /// Slot `s` of a row, `dst[s] = W[ids[s]] src` or `W[ids[s]] src[s]`: a product with the expert of each slot.
    ///
    /// An expert is read once for all the rows that chose it, and not at all if none did.
    ExpertMatMul {
        /// Weight of shape `[n_in, n_out, n_expert]` in file order.
        weight: WeightId,
        /// Number of experts.
        n_expert: usize,
        /// Width of a slot's input.
        n_in: usize,
        /// The `ids` of a router, `[n_used]` a row.
        ids: Buf,
        /// Input, `n_in` values for all slots or `n_used · n_in` for each its own.
        src: Buf,
        /// Result, `n_used · n_out` wide.
        dst: Buf,
    },
    /// `dst = Σ_s weights[s] · src[s]`, slot by slot from the first on.
    WeightedSum {
        /// Input, a part as wide as `dst` for each slot.
        src: Buf,
        /// A weight for each slot.
        weights: Buf,
        /// Result.
        dst: Buf,
    },
    /// Over each group of `group` values: `dst = src * rsqrt(mean(src²) + eps) * weight`.
    RmsNorm {
        /// Input.
        src: Buf,
        /// `[group]`; none means all ones.
        weight: Option<WeightId>,
        /// Result.
        dst: Buf,
        /// Added to the mean square.
        eps: f32,
        /// Values normalised together: the row's width, or a head's.
        group: usize,
    },
    /// `dst = rms_norm(src; weight) * silu(gate)` over groups.
    GatedRmsNorm {
        /// Input.
        src: Buf,
        /// Gate, as wide as `src`.
        gate: Buf,
        /// `[group]`.
        weight: WeightId,
        /// Result.
        dst: Buf,
        /// Added to the mean square.
        eps: f32,
        /// Values normalised together.
        group: usize,
    },
    /// Rotary embedding of every head at the row's position.
    Rope {
        /// Input, heads side by side.
        src: Buf,
        /// Result.
        dst: Buf,
        /// Width of a head.
        head_dim: usize,
        /// Frequencies and pairing.
        rope: RopeSpec,
    },
    /// Writes each row's key and value into its cell.
    KvAppend {
        /// The KV state written.
        state: StateId,
        /// Keys, KV heads side by side.
        k: Buf,
        /// Values, KV heads side by side.
        v: Buf,
    },
    /// See [`AttentionOp`].
    Attention(AttentionOp),
    /// Depthwise causal convolution over the rows of the lane and its tail, then SiLU.
    ShortConv {
        /// The tail.
        state: StateId,
        /// `[width, channels]` taps, the current row's last.
        weight: WeightId,
        /// Input, `channels` wide.
        src: Buf,
        /// Result.
        dst: Buf,
    },
    /// Depthwise causal convolution over the rows of a lane alone: nothing is remembered, and before its first row there are
    /// zeros. Each row brings what its kernel differs in from the common one ("dynamic convolution"):
    /// `dst[i][c] = Σ_t (base[t][c] + delta[i][t][c / group]) · src[i - t][c]`, from `t` = 0 on.
    LocalConv {
        /// Common kernels, `[channels, n_tap, n_side]` in file order.
        base: WeightId,
        /// Differences, `[n_side, n_tap, channels / group]` a row.
        delta: Buf,
        /// Which of the kernels is meant.
        side: usize,
        /// Rows that one value is made of, its own the first.
        n_tap: usize,
        /// Input, `channels` wide.
        src: Buf,
        /// Result.
        dst: Buf,
    },
    /// `decay = softplus(alpha + dt_bias) * a` (the logarithm of the decay), `beta = sigmoid(b)`.
    DeltaGates {
        /// `[n_head_v]` a row.
        alpha: Buf,
        /// `[n_head_v]` a row.
        b: Buf,
        /// `[n_head_v]`.
        dt_bias: WeightId,
        /// `[n_head_v]`, at most 0.
        a: WeightId,
        /// Result.
        decay: Buf,
        /// Result.
        beta: Buf,
    },
    /// The gated delta rule over the rows of each lane, in order, state by state.
    DeltaRule {
        /// The matrices.
        state: StateId,
        /// `q | k | v` of a row: `n_head_k·dim_k`, `n_head_k·dim_k`, `n_head_v·dim_v` values.
        qkv: Buf,
        /// Logarithm of the decay, `[n_head_v]` a row.
        decay: Buf,
        /// `[n_head_v]` a row.
        beta: Buf,
        /// Result, `n_head_v·dim_v` wide.
        dst: Buf,
        /// Which key head a value head reads.
        heads: HeadMap,
        /// Added to the squared norm of q and k.
        eps: f32,
    },
    /// `dst = silu(gate) * up`.
    SiluMul {
        /// Through the SiLU.
        gate: Buf,
        /// Multiplied.
        up: Buf,
        /// Result.
        dst: Buf,
    },
    /// `dst = gelu(gate) * up`, the tanh form.
    GeluMul {
        /// Through the GELU.
        gate: Buf,
        /// Multiplied.
        up: Buf,
        /// Result.
        dst: Buf,
    },
    /// `dst = cap * tanh(src / cap)`.
    Softcap {
        /// Input.
        src: Buf,
        /// Bound on the result.
        cap: f32,
        /// Result.
        dst: Buf,
    },
    /// `dst = factor * src`.
    Scale {
        /// Input.
        src: Buf,
        /// One value for all.
        factor: Factor,
        /// Result.
        dst: Buf,
    },
    /// `dst = src * sigmoid(gate)`.
    SigmoidMul {
        /// Input.
        src: Buf,
        /// Through the sigmoid: as wide as `src`, or one value for the whole row.
        gate: Buf,
        /// Result.
        dst: Buf,
    },
    /// `dst = a + b`.
    Add {
        /// First term.
        a: Buf,
        /// Second term.
        b: Buf,
        /// Result.
        dst: Buf,
    },
    /// From each group of `group` values of `src` takes `len` from `offset` on.
    Columns {
        /// Input.
        src: Buf,
        /// Result.
        dst: Buf,
        /// Width of a group.
        group: usize,
        /// First value taken of each group.
        offset: usize,
        /// Values taken of each group.
        len: usize,
    },
    /// Copies `src` into columns of `dst` from `column` on: how taps are gathered, and parts joined.
    Place {
        /// Input.
        src: Buf,
        /// Receives the columns.
        dst: Buf,
        /// First column.
        column: usize,
    },
    /// Keeps the output rows.
    SelectOutputs {
        /// Input, one row per row of the step.
        src: Buf,
        /// Result, one row per output row.
        dst: Buf,
    },
}

/// Columns of a buffer that an op touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufRange {
    /// The buffer.
    pub buf: Buf,
    /// Its columns.
    pub columns: Range<usize>,
}

impl BufRange {
    /// Whether some column belongs to both.
    pub fn overlaps(&self, other: &BufRange) -> bool {
        self.buf == other.buf
            && self.columns.start < other.columns.end
            && other.columns.start < self.columns.end
    }
}

impl Op {
    /// Buffers read.
    pub fn reads(&self) -> Vec<Buf> {
        match *self {
            Op::Embed { .. } | Op::Input { .. } => vec![],
            Op::MatMul { src, .. }
            | Op::RmsNorm { src, .. }
            | Op::Rope { src, .. }
            | Op::ShortConv { src, .. }
            | Op::Columns { src, .. }
            | Op::Place { src, .. }
            | Op::SelectOutputs { src, .. } => vec![src],
            Op::GatedRmsNorm { src, gate, .. } | Op::SigmoidMul { src, gate, .. } => vec![src, gate],
            Op::Router { logits, .. } => vec![logits],
            Op::ExpertMatMul { ids, src, .. } => vec![ids, src],
            Op::WeightedSum { src, weights, .. } => vec![src, weights],
            Op::KvAppend { k, v, .. } => vec![k, v],
            Op::LocalConv { delta, src, .. } => vec![delta, src],
            Op::Attention(ref op) => vec![op.q],
            Op::DeltaGates { alpha, b, .. } => vec![alpha, b],
            Op::DeltaRule { qkv, decay, beta, .. } => vec![qkv, decay, beta],
            Op::SiluMul { gate, up, .. } | Op::GeluMul { gate, up, .. } => vec![gate, up],
            Op::Softcap { src, .. } | Op::Scale { src, .. } => vec![src],
            Op::Add { a, b, .. } => vec![a, b],
        }
    }

    /// Buffers written, with the columns where not all are.
    pub fn writes(&self, width: impl Fn(Buf) -> usize) -> Vec<BufRange> {
        let whole = |buf: Buf| BufRange { buf, columns: 0..width(buf) };
        match *self {
            Op::KvAppend { .. } => vec![],
            Op::DeltaGates { decay, beta, .. } => vec![whole(decay), whole(beta)],
            Op::Router { ids, weights, .. } => vec![whole(ids), whole(weights)],
            Op::Place { src, dst, column } => {
                vec![BufRange { buf: dst, columns: column..column + width(src) }]
            }
            Op::Attention(ref op) => vec![whole(op.dst)],
            Op::Embed { dst, .. }
            | Op::Input { dst }
            | Op::MatMul { dst, .. }
            | Op::ExpertMatMul { dst, .. }
            | Op::WeightedSum { dst, .. }
            | Op::RmsNorm { dst, .. }
            | Op::GatedRmsNorm { dst, .. }
            | Op::Rope { dst, .. }
            | Op::ShortConv { dst, .. }
            | Op::LocalConv { dst, .. }
            | Op::DeltaRule { dst, .. }
            | Op::SiluMul { dst, .. }
            | Op::GeluMul { dst, .. }
            | Op::Softcap { dst, .. }
            | Op::Scale { dst, .. }
            | Op::SigmoidMul { dst, .. }
            | Op::Add { dst, .. }
            | Op::Columns { dst, .. }
            | Op::SelectOutputs { dst, .. } => vec![whole(dst)],
        }
    }

    /// The state touched, if any.
    pub(crate) fn state(&self) -> Option<StateAccess> {
        match *self {
            Op::KvAppend { .. } => Some(StateAccess::WritesKv),
            Op::Attention(_) => Some(StateAccess::ReadsKv),
            Op::ShortConv { state, .. } | Op::DeltaRule { state, .. } => Some(StateAccess::Slot(state)),
            _ => None,
        }
    }
}

/// What an op does to the states of sequences.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum StateAccess {
    /// Reads pages.
    ReadsKv,
    /// Writes pages.
    WritesKv,
    /// Advances a recurrent state.
    Slot(StateId),
}

impl StateAccess {
    /// Whether two ops with these accesses must keep their order.
    ///
    /// Pages hold the cells of all layers side by side, so two ops on KV conflict unless both only read.
    pub fn conflicts(self, other: StateAccess) -> bool {
        match (self, other) {
            (StateAccess::ReadsKv, StateAccess::ReadsKv) => false,
            (StateAccess::Slot(a), StateAccess::Slot(b)) => a == b,
            (StateAccess::Slot(_), _) | (_, StateAccess::Slot(_)) => false,
            (StateAccess::WritesKv, _) | (_, StateAccess::WritesKv) => true,
        }
    }
}
