//! The ops of a plan as tiles: pieces of work that any thread may take, in any order, each writing values that
//! no other piece touches.
//!
//! How an op is cut never changes its result: a tile is some rows, some outputs of a matrix, a head, or some
//! channels, and every value is computed the same way whichever tile it falls into.

use std::{
    cell::RefCell,
    ops::{Range, RangeInclusive},
    sync::Arc,
};

use paceline_kernels::{
    act,
    conv::local_conv,
    delta::{DeltaRun, delta_run},
    packed::{PackedMatrix, QuantRows, RowWriter},
};

use crate::{AttentionOp, Buf, Factor, HeadMap, Op, Plan, StateDecl, States, WeightId};

use super::{
    attention::{Attention, KvPlace, SpanParts},
    exec::{Cx, Nanos},
    moe::{self, ExpertMatMul, Groups},
    ropes::Ropes,
    states::{CpuStates, DeltaWindow, SlotLayout, shift_in},
    weights::Weight,
};

/// Values that a tile of an elementwise op handles, about.
const TILE_VALUES: usize = 8192;
/// Bytes of a packed matrix that a tile of a product reads: enough that waiting for the first of them does not show, and
/// at most what stays in the second-level cache while many columns pass over it.
pub(super) const TILE_BYTES: RangeInclusive<usize> = 128 << 10..=512 << 10;
/// The least of them for so many columns that waiting is none of the cost: small, so that no thread waits long for the last tile.
const TILE_BYTES_BUSY: usize = 32 << 10;
/// From how many columns on.
const BUSY_COLUMNS: usize = 4;
/// Channels that a tile of a convolution handles.
const TILE_CHANNELS: usize = 256;
/// Rows of a lane that a tile of the delta rule takes at a time: their keys, values and queries stay in the first-level cache.
const DELTA_RUN: usize = 16;
/// Taps of a convolution that need no allocation; known models have 4.
const TAPS_ON_STACK: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Per-thread buffers, kept from tile to tile.
#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    out: Vec<f32>,
    state: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    gates: Vec<f32>,
    tail: Vec<f32>,
}

/// An op with its weights at hand.
pub(super) struct CpuOp {
    op: Op,
    weight: Option<Arc<Weight>>,
    /// The store that a product with a packed matrix reads.
    store: Option<usize>,
    /// The router whose choice a product with experts follows.
    router: usize,
    /// A bias, a norm's weight, the sinks, or the second of two small weights.
    small: Option<Arc<Weight>>,
    /// Among the plan's.
    rope: Option<usize>,
    kv: Option<KvPlace>,
    /// Of attention.
    parts: SpanParts,
    slot: Option<(SlotLayout, StateDecl)>,
}

impl CpuOp {
    /// `store` is what a product with a packed matrix reads, if it is one.
    pub fn new(
        op: &Op,
        store: Option<usize>,
        plan: &Plan,
        states: &CpuStates,
        ropes: &mut Ropes,
        weight: &impl Fn(WeightId) -> Arc<Weight>,
    ) -> CpuOp {
        let mut this = CpuOp {
            op: op.clone(),
            store,
            router: 0,
            weight: None,
            small: None,
            rope: None,
            kv: None,
            slot: None,
            parts: SpanParts::default(),
        };
        let kv = |state: crate::StateId| {
            let at = state.0 as usize;
            match states.decls()[at] {
                StateDecl::Kv { n_head, head_dim } => {
                    KvPlace { offsets: states.page_offsets(at), n_head, head_dim }
                }
                ref other => panic!("{other:?} is no KV state"),
            }
        };
        match op {
            Op::Embed { table, dst, .. } => {
                let table = weight(*table);
                assert_eq!(table.n_in(), plan.width(*dst), "embedding width");
                this.weight = Some(table);
            }
            Op::MatMul { weight: id, bias, src, dst } => {
                let w = weight(*id);
                assert_eq!((w.n_in(), w.n_rows()), (plan.width(*src), plan.width(*dst)), "matmul shape");
                this.weight = Some(w);
                this.small = bias.map(weight);
            }
            Op::ExpertMatMul { weight: id, n_expert, n_in, ids, dst, .. } => {
                let w = weight(*id);
                let n_out = plan.width(*dst) / plan.width(*ids);
                assert_eq!((w.n_in(), w.n_rows()), (*n_in, n_out * n_expert), "expert_matmul shape");
                this.weight = Some(w);
            }
            Op::RmsNorm { weight: id, .. } => this.weight = id.map(weight),
            Op::Scale { factor: Factor::Weight(id), .. } => this.weight = Some(weight(*id)),
            Op::Router { spec, .. } => this.weight = spec.expert_scale.map(weight),
            Op::GatedRmsNorm { weight: id, .. } | Op::ShortConv { weight: id, .. } => {
                this.weight = Some(weight(*id))
            }
            Op::LocalConv { base, delta, side, n_tap, src, .. } => {
                let base = weight(*base);
                let (n_side, n_delta) = (base.n_rows() / n_tap, plan.width(*delta));
                assert_eq!(base.n_in(), plan.width(*src), "local_conv channels");
                assert!(*side < n_side && n_delta.is_multiple_of(n_side * n_tap), "local_conv shape");
                this.weight = Some(base);
            }
            Op::Rope { rope, .. } => {
                let factors = rope.factors.map(weight);
                this.rope = Some(ropes.add(rope, factors.as_ref().map(|f| f.floats())));
            }
            Op::KvAppend { state, k, .. } => {
                let place = kv(*state);
                assert_eq!(place.n_head * place.head_dim, plan.width(*k), "width of keys");
                this.kv = Some(place);
            }
            Op::Attention(op) => {
                let place = kv(op.state);
                assert_eq!(op.n_head * place.head_dim, plan.width(op.q), "width of queries");
                this.kv = Some(place);
                this.small = op.sinks.map(weight);
            }
            Op::DeltaGates { dt_bias, a, .. } => {
                this.weight = Some(weight(*dt_bias));
                this.small = Some(weight(*a));
            }
            _ => {}
        }
        if let Op::ShortConv { state, .. } | Op::DeltaRule { state, .. } = op {
            let at = state.0 as usize;
            this.slot = Some((states.layout(at), states.decls()[at].clone()));
        }
        this
    }

    /// Finds the router that this op follows, adding it if it is the first to do so.
    pub fn with_groups(self, groups: &mut Vec<Groups>) -> CpuOp {
        let Op::ExpertMatMul { ids, n_expert, .. } = self.op else { return self };
        let known = groups.iter().position(|g| g.ids == ids);
        let router = known.unwrap_or_else(|| {
            groups.push(Groups::new(ids, n_expert));
            groups.len() - 1
        });
        CpuOp { router, ..self }
    }

    /// This op as a product with experts, if it is one.
    fn experts<'a>(&'a self, cx: &'a Cx<'_>) -> Option<ExpertMatMul<'a>> {
        let Op::ExpertMatMul { n_expert, src, dst, .. } = self.op else { return None };
        let groups = cx.groups(self.router);
        Some(ExpertMatMul { weight: self.weight(), packed: self.packed(), n_expert, groups, src, dst })
    }

    fn weight(&self) -> &Weight {
        match &self.weight {
            Some(weight) => weight,
            None => unreachable!("set when the op was compiled"),
        }
    }

    /// The packed matrix of a product and the store of its activations.
    fn packed(&self) -> Option<(&PackedMatrix, usize)> {
        self.store.map(|store| match self.weight().packed() {
            Some(matrix) => (matrix, store),
            None => unreachable!("a store is for packed matrices"),
        })
    }

    fn kv(&self) -> KvPlace {
        match self.kv {
            Some(kv) => kv,
            None => unreachable!("set when the op was compiled"),
        }
    }

    fn attention<'a>(&'a self, op: &'a AttentionOp) -> Attention<'a> {
        Attention { op, place: self.kv(), sinks: self.small.as_ref().map(|w| w.floats()), parts: &self.parts }
    }

    /// Called before the tiles of a wave that several threads share.
    pub fn prepare(&self, cx: &Cx<'_>, n_threads: usize) {
        if let Op::Attention(op) = &self.op {
            self.attention(op).prepare(cx, n_threads);
        }
    }

    /// Pieces that this op falls into for the rows of the step.
    pub fn n_tiles(&self, cx: &Cx<'_>, n_threads: usize) -> usize {
        if let Some(product) = self.experts(cx) {
            return product.n_tiles(n_threads);
        }
        match &self.op {
            Op::MatMul { dst, .. } => match (cx.n_rows(*dst), self.packed()) {
                (0, _) => 0,
                (n, Some((w, _))) => w.n_groups().div_ceil(group_chunk(w, n, n_threads)),
                (_, None) => cx.plan.width(*dst).div_ceil(matmul_chunk(cx.plan.width(*dst), n_threads)),
            },
            Op::KvAppend { .. } => cx.step.lanes.len() * self.kv().n_head,
            Op::Attention(op) => self.attention(op).n_tiles(cx, n_threads),
            Op::ShortConv { src, .. } => cx.step.lanes.len() * cx.plan.width(*src).div_ceil(TILE_CHANNELS),
            Op::DeltaRule { .. } => cx.step.lanes.len() * self.delta().1.n_head_v,
            op => {
                let dst = row_wise_dst(op);
                cx.n_rows(dst).div_ceil(row_chunk(cx.plan.width(dst)))
            }
        }
    }

    /// About how long this op takes one thread. The factors are measured on one machine and right within two or
    /// three times elsewhere, which is enough to tell a wave worth sharing.
    pub fn work(&self, cx: &Cx<'_>) -> Nanos {
        if let Some(product) = self.experts(cx) {
            return product.work();
        }
        let values = |buf: Buf| cx.n_rows(buf) * cx.plan.width(buf);
        match &self.op {
            Op::MatMul { src, dst, .. } => {
                let (n_weights, n) = (cx.plan.width(*src) * cx.plan.width(*dst), cx.n_rows(*dst));
                match self.packed() {
                    // Reading the tiles, and products in vectors.
                    Some((w, _)) => w.bytes() / 16 + n * n_weights / 256,
                    // Widening a weight costs about as much as four products with it.
                    None => n_weights * (4 + n) / 64,
                }
            }
            Op::Attention(op) => self.attention(op).work(cx),
            Op::DeltaRule { .. } => cx.step.n_rows() * self.delta().1.state_len() / 8,
            // An exponential for every value.
            Op::ShortConv { dst, .. } | Op::GatedRmsNorm { dst, .. } => 4 * values(*dst),
            Op::SiluMul { dst, .. } | Op::SigmoidMul { dst, .. } => 4 * values(*dst),
            Op::GeluMul { dst, .. } | Op::Softcap { dst, .. } => 5 * values(*dst),
            Op::DeltaGates { decay, .. } => 20 * values(*decay),
            Op::Router { logits, .. } => 2 * values(*logits),
            Op::WeightedSum { src, .. } => values(*src) / 2,
            Op::KvAppend { k, .. } => 2 * values(*k),
            op => values(row_wise_dst(op)) / 2,
        }
    }

    fn delta(&self) -> (SlotLayout, DeltaWindow, usize) {
        match self.slot {
            Some((layout, StateDecl::Delta { n_head_k, n_head_v, dim_k, dim_v })) => {
                (layout, DeltaWindow { n_head_v, dim_k, dim_v }, n_head_k)
            }
            _ => panic!("a delta rule over a state of another kind"),
        }
    }

    /// Computes one piece; whole rows go through `writers` too, which are this op's.
    pub fn run(&self, cx: &Cx<'_>, writers: &[RowWriter<'_>], n_threads: usize, tile: usize) {
        if let Some(product) = self.experts(cx) {
            return product.run(cx, n_threads, tile);
        }
        match &self.op {
            Op::MatMul { src, dst, .. } => match self.packed() {
                Some((w, store)) => {
                    let chunk = group_chunk(w, cx.n_rows(*dst), n_threads);
                    let groups = tile * chunk..((tile + 1) * chunk).min(w.n_groups());
                    self.packed_matmul(cx, w, groups, cx.quantized(store), *dst);
                }
                None => self.matmul(cx, n_threads, tile, *src, *dst),
            },
            Op::KvAppend { k, v, .. } => {
                let place = self.kv();
                place.append(cx, &cx.step.lanes[tile / place.n_head], tile % place.n_head, *k, *v);
            }
            Op::Attention(op) => self.attention(op).run(cx, n_threads, tile),
            Op::ShortConv { src, dst, .. } => {
                let n_chunks = cx.plan.width(*src).div_ceil(TILE_CHANNELS);
                self.short_conv(cx, *src, *dst, tile / n_chunks, tile % n_chunks);
            }
            Op::DeltaRule { .. } => self.delta_rule(cx, tile),
            op => {
                let dst = row_wise_dst(op);
                let chunk = row_chunk(cx.plan.width(dst));
                let n_rows = cx.n_rows(dst);
                for row in tile * chunk..((tile + 1) * chunk).min(n_rows) {
                    self.row_wise(cx, row);
                    if !writers.is_empty() {
                        // SAFETY: rows are dealt out once each, and no other task of the wave has these writers.
                        unsafe { cx.quantize(writers, dst, row) };
                    }
                }
            }
        }
    }

    /// One row of an op that handles each row by itself.
    fn row_wise(&self, cx: &Cx<'_>, row: usize) {
        // SAFETY of every `row_mut` and `part_mut` here: rows are dealt out once each, so this tile alone writes
        // row `row` of the op's destination.
        match &self.op {
            Op::Embed { dst, scale, .. } => {
                let token = cx.step.tokens[row] as usize;
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                self.weight().rows(token, 1).dequantize_row(0, out);
                if *scale != 1.0 {
                    out.iter_mut().for_each(|x| *x *= scale);
                }
            }
            Op::Input { dst } => {
                let width = cx.plan.width(*dst);
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                out.copy_from_slice(&cx.step.inputs[row * width..(row + 1) * width]);
            }
            Op::RmsNorm { src, dst, eps, group, .. } => {
                let w = self.weight.as_ref().map(|w| w.floats());
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                for (x, out) in cx.row(*src, row).chunks_exact(*group).zip(out.chunks_exact_mut(*group)) {
                    (cx.table.rows.rms_norm)(x, w, *eps, out);
                }
            }
            Op::GatedRmsNorm { src, gate, dst, eps, group, .. } => {
                let w = self.weight().floats();
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                let groups =
                    cx.row(*src, row).chunks_exact(*group).zip(cx.row(*gate, row).chunks_exact(*group));
                for ((x, z), out) in groups.zip(out.chunks_exact_mut(*group)) {
                    (cx.table.rows.gated_rms_norm)(x, w, z, *eps, out);
                }
            }
            Op::Rope { src, dst, head_dim, rope: spec } => {
                let Some(rope) = self.rope else { unreachable!("set when the op was compiled") };
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                out.copy_from_slice(cx.row(*src, row));
                let turns = cx.ropes.turns(rope, row);
                for head in out.chunks_exact_mut(*head_dim) {
                    (cx.table.rows.rotate)(head, turns, spec.pairing);
                }
            }
            Op::LocalConv { delta, side, n_tap, src, dst, .. } => {
                let (base, n_side) = (self.weight().floats(), self.weight().n_rows() / n_tap);
                let (delta, lanes) = (cx.row(*delta, row), cx.step.lanes);
                // Lanes cover the rows in order.
                let lane = &lanes[lanes.partition_point(|lane| lane.rows.end <= row)];
                let side = |values: usize| side * values..(side + 1) * values;
                let base = &base[side(n_tap * cx.plan.width(*src))];
                let delta = &delta[side(delta.len() / n_side)];
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                let past = (lane.rows.start..=row).rev().take(*n_tap).map(|row| cx.row(*src, row));
                local_conv(past, base, delta, *n_tap, out);
            }
            Op::DeltaGates { alpha, b, decay, beta, .. } => {
                let (dt_bias, a) =
                    (self.weight().floats(), self.small.as_ref().map_or(&[][..], |w| w.floats()));
                // SAFETY: see above; the two destinations are different buffers.
                let (decay, beta) = unsafe { (cx.row_mut(*decay, row), cx.row_mut(*beta, row)) };
                let (alpha, b) = (cx.row(*alpha, row), cx.row(*b, row));
                for h in 0..decay.len() {
                    decay[h] = act::softplus(alpha[h] + dt_bias[h]) * a[h];
                    beta[h] = act::sigmoid(b[h]);
                }
            }
            Op::Router { logits, spec, ids, weights } => {
                // SAFETY: see above; the two destinations are different buffers.
                let (ids, weights) = unsafe { (cx.row_mut(*ids, row), cx.row_mut(*weights, row)) };
                moe::route(cx.row(*logits, row), spec, ids, weights);
                if let Some(scales) = &self.weight {
                    let scales = scales.floats();
                    ids.iter().zip(weights).for_each(|(id, w)| *w *= scales[*id as usize]);
                }
            }
            Op::WeightedSum { src, weights, dst } => {
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                moe::weighted_sum(cx.row(*src, row), cx.row(*weights, row), out);
            }
            Op::SiluMul { gate, up, dst } => {
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                (cx.table.rows.silu_mul)(cx.row(*gate, row), cx.row(*up, row), out);
            }
            Op::GeluMul { gate, up, dst } => {
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                (cx.table.rows.gelu_mul)(cx.row(*gate, row), cx.row(*up, row), out);
            }
            Op::Softcap { src, cap, dst } => {
                // SAFETY: see above.
                (cx.table.rows.softcap)(cx.row(*src, row), *cap, unsafe { cx.row_mut(*dst, row) });
            }
            Op::Scale { src, factor, dst } => {
                let factor = match factor {
                    Factor::Constant(factor) => *factor,
                    Factor::Weight(_) => self.weight().floats()[0],
                };
                // SAFETY: see above.
                (cx.table.rows.scale)(cx.row(*src, row), factor, unsafe { cx.row_mut(*dst, row) });
            }
            Op::SigmoidMul { src, gate, dst } => {
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                match (cx.row(*gate, row), cx.row(*src, row)) {
                    (gate, x) if gate.len() == x.len() => (cx.table.rows.sigmoid_mul)(gate, x, out),
                    (gate, x) => {
                        let factor = act::sigmoid(gate[0]);
                        out.iter_mut().zip(x).for_each(|(out, x)| *out = factor * x);
                    }
                }
            }
            Op::Add { a, b, dst } => {
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                (cx.table.rows.add)(cx.row(*a, row), cx.row(*b, row), out);
            }
            Op::Columns { src, dst, group, offset, len } => {
                // SAFETY: see above.
                let out = unsafe { cx.row_mut(*dst, row) };
                for (x, out) in cx.row(*src, row).chunks_exact(*group).zip(out.chunks_exact_mut(*len)) {
                    out.copy_from_slice(&x[*offset..offset + len]);
                }
            }
            Op::Place { src, dst, column } => {
                let x = cx.row(*src, row);
                // SAFETY: see above; other ops of the wave place other columns.
                unsafe { cx.part_mut(*dst, row, *column..column + x.len()) }.copy_from_slice(x);
            }
            Op::SelectOutputs { src, dst } => {
                let from = cx.step.outputs[row] as usize;
                // SAFETY: see above.
                unsafe { cx.row_mut(*dst, row) }.copy_from_slice(cx.row(*src, from));
            }
            Op::MatMul { .. }
            | Op::ExpertMatMul { .. }
            | Op::KvAppend { .. }
            | Op::Attention(_)
            | Op::ShortConv { .. }
            | Op::DeltaRule { .. } => unreachable!("cut in other ways"),
        }
    }

    fn matmul(&self, cx: &Cx<'_>, n_threads: usize, tile: usize, src: Buf, dst: Buf) {
        let (n_out, n) = (cx.plan.width(dst), cx.n_rows(dst));
        let chunk = matmul_chunk(n_out, n_threads);
        let outputs: Range<usize> = tile * chunk..((tile + 1) * chunk).min(n_out);
        let m = outputs.len();
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { weights, out, .. } = scratch;
            out.resize(n * m, 0.0);
            (cx.table.matmul_tile)(&self.weight().rows(outputs.start, m), cx.all(src), weights, out);
            let bias = self.small.as_ref().map(|b| &b.floats()[outputs.clone()]);
            for (row, values) in out.chunks_exact_mut(m).enumerate() {
                if let Some(bias) = bias {
                    values.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
                // SAFETY: this tile alone writes these columns.
                unsafe { cx.part_mut(dst, row, outputs.clone()) }.copy_from_slice(values);
            }
        });
    }

    /// The outputs of some groups of a packed matrix, of all rows.
    fn packed_matmul(&self, cx: &Cx<'_>, w: &PackedMatrix, groups: Range<usize>, x: &QuantRows, dst: Buf) {
        let (arena, first) = cx.place(dst);
        // SAFETY: this tile alone touches the columns of these groups in `dst`, and the product writes no others.
        unsafe { cx.packed.product_into(w, groups.clone(), x, arena, first, w.n_out()) };
        if let Some(bias) = &self.small {
            let outputs = w.rows(groups);
            let bias = &bias.floats()[outputs.clone()];
            for row in 0..cx.n_rows(dst) {
                // SAFETY: these are the columns that this tile has just written.
                let out = unsafe { cx.part_mut(dst, row, outputs.clone()) };
                out.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }

    /// Some channels of one lane: all its rows in order, then the tail.
    fn short_conv(&self, cx: &Cx<'_>, src: Buf, dst: Buf, lane: usize, chunk: usize) {
        let Some((layout, StateDecl::ConvTail { channels, width })) = self.slot else {
            panic!("a convolution over a state of another kind")
        };
        let lane = &cx.step.lanes[lane];
        let slot = lane.recurrent_slot();
        let columns = chunk * TILE_CHANNELS..((chunk + 1) * TILE_CHANNELS).min(channels);
        let n_tail = width - 1;
        let weights = &self.weight().floats()[columns.start * width..columns.end * width];
        let input = |i: usize| &cx.row(src, lane.rows.start + i)[columns.clone()];
        SCRATCH.with_borrow_mut(|Scratch { tail, .. }| {
            // A copy of these channels' tail, row by row, so that nothing borrows the state when it moves.
            tail.clear();
            let start = layout.state(slot).start;
            let tail_at = |j: usize| start + j * channels + columns.start..start + j * channels + columns.end;
            for j in 0..n_tail {
                // SAFETY: this tile alone touches these channels of this slot's tail.
                tail.extend_from_slice(unsafe { cx.slots.get(tail_at(j)) });
            }
            let (mut few, mut many): ([&[f32]; TAPS_ON_STACK], Vec<&[f32]>) =
                ([&[]; TAPS_ON_STACK], Vec::new());
            let taps = match few.get_mut(..width) {
                Some(taps) => taps,
                None => {
                    many.resize(width, &[]);
                    &mut many[..]
                }
            };
            for i in 0..lane.rows.len() {
                for (j, tap) in taps.iter_mut().enumerate() {
                    // Tap j looks back n_tail - j rows: into the lane, or before it into the tail.
                    *tap = match (i + j).checked_sub(n_tail) {
                        Some(row) => input(row),
                        None => &tail[(i + j) * columns.len()..(i + j + 1) * columns.len()],
                    };
                }
                // SAFETY: this tile alone writes these channels of the lane's rows.
                let out = unsafe { cx.part_mut(dst, lane.rows.start + i, columns.clone()) };
                (cx.table.rows.short_conv_silu)(taps, weights, out);
            }
            for (i, row) in (lane.n_certain..lane.rows.len()).enumerate() {
                let start = layout.row(slot, i).start;
                // SAFETY: this tile alone writes these channels of this slot's window.
                unsafe { cx.windows.range(start + columns.start..start + columns.end) }
                    .copy_from_slice(input(row));
            }
            for i in lane.n_certain.saturating_sub(n_tail)..lane.n_certain {
                shift_in(tail, input(i), columns.len());
            }
            for (j, values) in tail.chunks_exact(columns.len()).enumerate() {
                // SAFETY: this tile alone touches these channels of this slot's tail.
                unsafe { cx.slots.range(tail_at(j)) }.copy_from_slice(values);
            }
        });
    }

    /// One value head of one lane: certain rows advance the state, tentative ones a copy of it.
    fn delta_rule(&self, cx: &Cx<'_>, tile: usize) {
        let Op::DeltaRule { qkv, decay, beta, dst, heads, eps, .. } = self.op else { unreachable!() };
        let (layout, window, n_head_k) = self.delta();
        let DeltaWindow { n_head_v, dim_k, dim_v } = window;
        let (lane, head) = (&cx.step.lanes[tile / n_head_v], tile % n_head_v);
        let head_k = match heads {
            HeadMap::Tiled => head % n_head_k,
            HeadMap::Grouped => head / (n_head_v / n_head_k),
        };
        let slot = lane.recurrent_slot();
        let len = dim_k * dim_v;
        let start = layout.state(slot).start + head * len;
        // SAFETY: this tile alone touches this head's matrix of this slot.
        let committed = unsafe { cx.slots.range(start..start + len) };
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { state: copy, keys, queries, values, gates, out, .. } = scratch;
            let (n_past_keys, scale) = (n_head_k * dim_k, 1.0 / (dim_k as f32).sqrt());
            // Certain rows first, and then the tentative ones on a copy.
            let certain = lane.rows.start..lane.rows.start + lane.n_certain;
            for (rows, tentative) in [(certain.clone(), false), (certain.end..lane.rows.end, true)] {
                if rows.is_empty() {
                    continue;
                }
                if tentative {
                    copy.clear();
                    copy.extend_from_slice(committed);
                }
                for first in rows.clone().step_by(DELTA_RUN) {
                    let rows = first..rows.end.min(first + DELTA_RUN);
                    let n = rows.len();
                    queries.resize(n * dim_k, 0.0);
                    keys.resize(n * dim_k, 0.0);
                    out.resize(n * dim_v, 0.0);
                    values.clear();
                    gates.resize(2 * n, 0.0);
                    let (decays, betas) = gates.split_at_mut(n);
                    for (t, row) in rows.clone().enumerate() {
                        let inputs = cx.row(qkv, row);
                        let q = &mut queries[t * dim_k..(t + 1) * dim_k];
                        let k = &mut keys[t * dim_k..(t + 1) * dim_k];
                        (cx.table.rows.l2_norm)(&inputs[head_k * dim_k..(head_k + 1) * dim_k], eps, q);
                        q.iter_mut().for_each(|q| *q *= scale);
                        let key = n_past_keys + head_k * dim_k..n_past_keys + (head_k + 1) * dim_k;
                        (cx.table.rows.l2_norm)(&inputs[key], eps, k);
                        let at = 2 * n_past_keys + head * dim_v;
                        values.extend_from_slice(&inputs[at..at + dim_v]);
                        let (g, beta) = (cx.row(decay, row)[head], cx.row(beta, row)[head]);
                        (decays[t], betas[t]) = (g.exp(), beta);
                        if tentative {
                            let at = layout.row(slot, row - certain.end).start;
                            let (k_at, v_at, gates_at) = window.parts(head);
                            let part = |at: usize, len: usize| {
                                // SAFETY: this tile alone writes this head's parts of this slot's window.
                                unsafe { cx.windows.range(at..at + len) }
                            };
                            part(at + k_at, dim_k).copy_from_slice(k);
                            part(at + v_at, dim_v).copy_from_slice(&values[t * dim_v..]);
                            part(at + gates_at, 2).copy_from_slice(&[g, beta]);
                        }
                    }
                    let run = DeltaRun { dim_k, k: keys, v: values, decay: decays, beta: betas };
                    let state = if tentative { &mut copy[..] } else { &mut *committed };
                    delta_run(cx.table, state, &run, queries, out);
                    for (row, out) in rows.zip(out.chunks_exact(dim_v)) {
                        // SAFETY: this tile alone writes this head's columns of the lane's rows.
                        unsafe { cx.part_mut(dst, row, head * dim_v..(head + 1) * dim_v) }
                            .copy_from_slice(out);
                    }
                }
            }
        });
    }
}

/// Outputs of a matrix that one tile computes.
pub(super) fn matmul_chunk(n_out: usize, n_threads: usize) -> usize {
    (n_out / (4 * n_threads)).clamp(16, 64)
}

/// Groups of outputs of a packed matrix that one tile computes for `n` columns.
fn group_chunk(w: &PackedMatrix, n: usize, n_threads: usize) -> usize {
    let of_bytes = |bytes: usize| (bytes * w.n_groups() / w.bytes()).max(1);
    let least = if n < BUSY_COLUMNS { *TILE_BYTES.start() } else { TILE_BYTES_BUSY };
    w.n_groups().div_ceil(8 * n_threads).clamp(of_bytes(least), of_bytes(*TILE_BYTES.end()))
}

/// Whether a tile of this op computes whole rows of its one result.
pub(super) fn computes_whole_rows(op: &Op) -> bool {
    match op {
        Op::MatMul { .. }
        | Op::ExpertMatMul { .. }
        | Op::KvAppend { .. }
        | Op::Attention(_)
        | Op::ShortConv { .. }
        | Op::DeltaRule { .. } => false,
        Op::Place { .. } | Op::DeltaGates { .. } | Op::Router { .. } => false,
        op => {
            row_wise_dst(op);
            true
        }
    }
}

pub(super) fn row_chunk(width: usize) -> usize {
    (TILE_VALUES / width.max(1)).max(1)
}

/// Where an op that handles each row by itself writes.
fn row_wise_dst(op: &Op) -> Buf {
    match *op {
        Op::Embed { dst, .. }
        | Op::Input { dst }
        | Op::RmsNorm { dst, .. }
        | Op::GatedRmsNorm { dst, .. }
        | Op::Rope { dst, .. }
        | Op::SiluMul { dst, .. }
        | Op::GeluMul { dst, .. }
        | Op::Softcap { dst, .. }
        | Op::Scale { dst, .. }
        | Op::SigmoidMul { dst, .. }
        | Op::Add { dst, .. }
        | Op::WeightedSum { dst, .. }
        | Op::LocalConv { dst, .. }
        | Op::Columns { dst, .. }
        | Op::SelectOutputs { dst, .. } => dst,
        // The source has the width of what is written.
        Op::Place { src, .. } => src,
        // Ranking the logits is the work.
        Op::Router { logits, .. } => logits,
        Op::DeltaGates { decay, .. } => decay,
        Op::MatMul { .. }
        | Op::ExpertMatMul { .. }
        | Op::KvAppend { .. }
        | Op::Attention(_)
        | Op::ShortConv { .. }
        | Op::DeltaRule { .. } => {
            unreachable!("cut in other ways")
        }
    }
}
