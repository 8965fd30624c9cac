//! A forward as data: ops over row buffers, and the waves in which they may run side by side.
//!
//! Every buffer has one row per row of the step (or per output row) and a fixed width, so one plan serves
//! every number of rows. `waves` cuts the op list into runs between which a backend needs a barrier: inside a
//! wave no op reads or writes what another one writes. `offsets` places the buffers in an arena whose total
//! width is fixed here, by liveness over waves, so that running a plan allocates nothing of its own.

use std::ops::Range;

use paceline_kernels::rope::Pairing;

/// A row buffer of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buf(pub(crate) u32);

/// A weight that a backend holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(pub u32);

/// A state that every sequence has: an index into the model's declarations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateId(pub u32);

/// Which rows a buffer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One per row of the step.
    Batch,
    /// One per output row of the step.
    Output,
}

/// Shape of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct BufDecl {
    /// Values in a row.
    pub width: usize,
    /// Which rows it has.
    pub rows: Rows,
}

/// What one layer remembers of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateDecl {
    /// Keys and values of every position, in pages.
    Kv {
        /// KV heads.
        n_head: usize,
        /// Width of a key or value head.
        head_dim: usize,
    },
    /// The last `width - 1` inputs of a short convolution.
    ConvTail {
        /// Channels.
        channels: usize,
        /// Taps of the convolution, the current row included.
        width: usize,
    },
    /// One matrix per value head of a gated delta rule.
    Delta {
        /// Key heads.
        n_head_k: usize,
        /// Value heads, a multiple of the key heads.
        n_head_v: usize,
        /// Width of a key head.
        dim_k: usize,
        /// Width of a value head.
        dim_v: usize,
    },
}

impl StateDecl {
    /// Values of K and V together in one KV cell, 0 for states that are not paged.
    pub fn cell_width(&self) -> usize {
        match self {
            StateDecl::Kv { n_head, head_dim } => 2 * n_head * head_dim,
            _ => 0,
        }
    }

    /// Values of the committed per-sequence state, 0 for KV.
    pub fn slot_width(&self) -> usize {
        match self {
            StateDecl::Kv { .. } => 0,
            StateDecl::ConvTail { channels, width } => channels * (width - 1),
            StateDecl::Delta { n_head_v, dim_k, dim_v, .. } => n_head_v * dim_k * dim_v,
        }
    }

    /// Values that one tentative row leaves behind for a commit, 0 for KV.
    pub fn window_width(&self) -> usize {
        match self {
            StateDecl::Kv { .. } => 0,
            StateDecl::ConvTail { channels, .. } => *channels,
            // Normalised key, value, decay and beta of every value head.
            StateDecl::Delta { n_head_v, dim_k, dim_v, .. } => n_head_v * (dim_k + dim_v + 2),
        }
    }
}

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
    /// `dst = src * sigmoid(gate)`.
    SigmoidMul {
        /// Input.
        src: Buf,
        /// Through the sigmoid.
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
    /// Copies `src` into columns of `dst` from `column` on: how taps are gathered.
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
    fn overlaps(&self, other: &BufRange) -> bool {
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
            Op::KvAppend { k, v, .. } => vec![k, v],
            Op::Attention(ref op) => vec![op.q],
            Op::DeltaGates { alpha, b, .. } => vec![alpha, b],
            Op::DeltaRule { qkv, decay, beta, .. } => vec![qkv, decay, beta],
            Op::SiluMul { gate, up, .. } => vec![gate, up],
            Op::Add { a, b, .. } => vec![a, b],
        }
    }

    /// Buffers written, with the columns where not all are.
    pub fn writes(&self, width: impl Fn(Buf) -> usize) -> Vec<BufRange> {
        let whole = |buf: Buf| BufRange { buf, columns: 0..width(buf) };
        match *self {
            Op::KvAppend { .. } => vec![],
            Op::DeltaGates { decay, beta, .. } => vec![whole(decay), whole(beta)],
            Op::Place { src, dst, column } => vec![BufRange { buf: dst, columns: column..column + width(src) }],
            Op::Attention(ref op) => vec![whole(op.dst)],
            Op::Embed { dst, .. }
            | Op::Input { dst }
            | Op::MatMul { dst, .. }
            | Op::RmsNorm { dst, .. }
            | Op::GatedRmsNorm { dst, .. }
            | Op::Rope { dst, .. }
            | Op::ShortConv { dst, .. }
            | Op::DeltaRule { dst, .. }
            | Op::SiluMul { dst, .. }
            | Op::SigmoidMul { dst, .. }
            | Op::Add { dst, .. }
            | Op::Columns { dst, .. }
            | Op::SelectOutputs { dst, .. } => vec![whole(dst)],
        }
    }

    /// The state touched, if any. States are few and rarely independent, so two ops on KV never share a wave.
    fn state(&self) -> Option<StateAccess> {
        match *self {
            Op::KvAppend { .. } => Some(StateAccess::WritesKv),
            Op::Attention(_) => Some(StateAccess::ReadsKv),
            Op::ShortConv { state, .. } | Op::DeltaRule { state, .. } => Some(StateAccess::Slot(state)),
            _ => None,
        }
    }
}

#[derive(PartialEq)]
enum StateAccess {
    ReadsKv,
    WritesKv,
    Slot(StateId),
}

/// A recorded forward.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The operations, in an order in which they may run one after the other.
    pub ops: Vec<Op>,
    /// Shapes of the buffers.
    pub bufs: Vec<BufDecl>,
    /// Runs of `ops` whose members do not depend on each other.
    pub waves: Vec<Range<usize>>,
    /// First column of each buffer in its arena (one arena per kind of [`Rows`]).
    pub offsets: Vec<usize>,
    /// Total widths of the arenas of batch and of output rows.
    pub arena_width: [usize; 2],
    /// What [`StepOut::output`](crate::StepOut::output) holds, if anything.
    pub output: Option<Buf>,
    /// What [`StepOut::taps`](crate::StepOut::taps) holds, if anything.
    pub taps: Option<Buf>,
}

impl Plan {
    pub(crate) fn new(ops: Vec<Op>, bufs: Vec<BufDecl>, output: Option<Buf>, taps: Option<Buf>) -> Plan {
        let waves = waves(&ops, &bufs);
        let kept: Vec<Buf> = output.into_iter().chain(taps).collect();
        let (offsets, arena_width) = place(&ops, &bufs, &waves, &kept);
        Plan { ops, bufs, waves, offsets, arena_width, output, taps }
    }

    /// Width of a buffer.
    pub fn width(&self, buf: Buf) -> usize {
        self.bufs[buf.0 as usize].width
    }

    /// Which rows a buffer has.
    pub fn rows(&self, buf: Buf) -> Rows {
        self.bufs[buf.0 as usize].rows
    }

    /// Columns of the arena that `buf` occupies.
    pub fn columns(&self, buf: Buf) -> Range<usize> {
        let start = self.offsets[buf.0 as usize];
        start..start + self.width(buf)
    }
}

/// Cuts the ops, in order, wherever one touches what an earlier op of the same wave wrote, or writes what it
/// reads.
fn waves(ops: &[Op], bufs: &[BufDecl]) -> Vec<Range<usize>> {
    let width = |b: Buf| bufs[b.0 as usize].width;
    let mut waves = Vec::new();
    let (mut start, mut read, mut written, mut states) = (0, Vec::new(), Vec::<BufRange>::new(), Vec::new());
    for (i, op) in ops.iter().enumerate() {
        let (reads, writes, state) = (op.reads(), op.writes(width), op.state());
        let clash = reads.iter().any(|r| written.iter().any(|w| w.buf == *r))
            || writes.iter().any(|w| read.contains(&w.buf) || written.iter().any(|o| o.overlaps(w)))
            || state.as_ref().is_some_and(|s| {
                states.iter().any(|o| match (s, o) {
                    (StateAccess::ReadsKv, StateAccess::ReadsKv) => false,
                    (StateAccess::Slot(_), StateAccess::Slot(_)) => s == o,
                    (StateAccess::Slot(_), _) | (_, StateAccess::Slot(_)) => false,
                    _ => true,
                })
            });
        if clash {
            waves.push(start..i);
            start = i;
            read.clear();
            written.clear();
            states.clear();
        }
        read.extend(reads);
        written.extend(writes);
        states.extend(state);
    }
    if start < ops.len() {
        waves.push(start..ops.len());
    }
    waves
}

/// First-fit placement: two buffers share columns only if no wave needs both.
fn place(ops: &[Op], bufs: &[BufDecl], waves: &[Range<usize>], kept: &[Buf]) -> (Vec<usize>, [usize; 2]) {
    let width = |b: Buf| bufs[b.0 as usize].width;
    let mut live: Vec<Option<Range<usize>>> = vec![None; bufs.len()];
    for (iw, wave) in waves.iter().enumerate() {
        for op in &ops[wave.clone()] {
            for buf in op.reads().into_iter().chain(op.writes(width).into_iter().map(|w| w.buf)) {
                let range = live[buf.0 as usize].get_or_insert(iw..iw + 1);
                range.end = iw + 1;
            }
        }
    }
    for buf in kept {
        if let Some(range) = &mut live[buf.0 as usize] {
            range.end = waves.len() + 1;
        }
    }
    let mut offsets = vec![0; bufs.len()];
    let mut totals = [0; 2];
    let mut placed: Vec<usize> = Vec::new();
    let mut order: Vec<usize> = (0..bufs.len()).filter(|&i| live[i].is_some()).collect();
    order.sort_by_key(|&i| (live[i].as_ref().map(|r| r.start), i));
    for i in order {
        let Some(mine) = live[i].clone() else { continue };
        let mut taken: Vec<Range<usize>> = placed
            .iter()
            .filter(|&&j| bufs[j].rows == bufs[i].rows)
            .filter(|&&j| live[j].as_ref().is_some_and(|r| r.start < mine.end && mine.start < r.end))
            .map(|&j| offsets[j]..offsets[j] + bufs[j].width)
            .collect();
        taken.sort_by_key(|r| r.start);
        let mut at = 0;
        for r in taken {
            if at + bufs[i].width <= r.start {
                break;
            }
            at = at.max(r.end);
        }
        offsets[i] = at;
        let total = &mut totals[bufs[i].rows as usize];
        *total = (*total).max(at + bufs[i].width);
        placed.push(i);
    }
    (offsets, totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decl(width: usize) -> BufDecl {
        BufDecl { width, rows: Rows::Batch }
    }

    fn add(a: u32, b: u32, dst: u32) -> Op {
        Op::Add { a: Buf(a), b: Buf(b), dst: Buf(dst) }
    }

    fn check_waves(ops: Vec<Op>, n_buf: usize, want: &[Range<usize>]) {
        let plan = Plan::new(ops, vec![decl(4); n_buf], None, None);
        assert_eq!(plan.waves, want);
    }

    #[test]
    fn independent_ops_share_a_wave() {
        check_waves(vec![add(0, 0, 1), add(0, 0, 2), add(1, 2, 3)], 4, &[0..2, 2..3]);
    }

    #[test]
    fn a_write_after_a_read_starts_a_wave() {
        check_waves(vec![add(0, 0, 1), add(2, 2, 0)], 3, &[0..1, 1..2]);
    }

    #[test]
    fn an_append_and_its_attention_are_apart() {
        let attend = Op::Attention(AttentionOp {
            state: StateId(0),
            q: Buf(2),
            dst: Buf(3),
            n_head: 1,
            scale: 1.0,
            mask: BlockMask::Causal,
            window: None,
            sinks: None,
        });
        check_waves(vec![Op::KvAppend { state: StateId(0), k: Buf(0), v: Buf(1) }, attend], 4, &[0..1, 1..2]);
    }

    #[test]
    fn taps_of_different_layers_share_a_buffer_and_a_wave() {
        let place = |column| Op::Place { src: Buf(0), dst: Buf(1), column };
        let bufs = vec![decl(4), decl(8)];
        let plan = Plan::new(vec![place(0), place(4)], bufs, None, Some(Buf(1)));
        assert_eq!(plan.waves, [0..2]);
    }

    #[test]
    fn buffers_of_one_wave_never_overlap_and_dead_ones_are_reused() {
        // A chain of ten buffers needs room for two at a time only.
        let ops: Vec<Op> = (0..9).map(|i| add(i, i, i + 1)).collect();
        let plan = Plan::new(ops, vec![decl(4); 10], Some(Buf(9)), None);
        assert_eq!(plan.arena_width[0], 8);
        for wave in &plan.waves {
            for op in &plan.ops[wave.clone()] {
                for w in op.writes(|b| plan.width(b)) {
                    for r in op.reads() {
                        let (a, b) = (plan.columns(w.buf), plan.columns(r));
                        assert!(a.end <= b.start || b.end <= a.start, "{op:?} overlaps in the arena");
                    }
                }
            }
        }
    }
}
