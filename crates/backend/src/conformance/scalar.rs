//! The definition of every op: a backend that computes as the formulas are written, in f64, one value at a time.
//!
//! It shares nothing with the CPU backend but the formats' conversion to floats (which goldens of their own
//! define). Buffers have memory of their own, ops run in order without waves, and the state of a sequence is not
//! advanced but *derived*: a slot keeps the inputs of every row that was ever committed, and a recurrence
//! starts from zero at each step. A cell that nobody wrote is a panic, not a zero.

use std::{
    any::Any,
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use paceline_kernels::{formats, kv::KvBytes};

use crate::{
    AttentionOp, Backend, BlockMask, Buf, Error, Exec, Factor, HeadMap, KvType, Lane, Op, PageClasses,
    PageId, Pairing, Plan, PlanWork, RopeScaling, RopeSpec, RouterScore, RouterSpec, Rows, SavedId, SlotId,
    StateConfig, StateDecl, StateId, States, Step, StepOut, WeightId, WeightSource,
};

/// The backend that defines the others. Slow.
#[derive(Default)]
pub struct ScalarBackend {
    weights: RwLock<Vec<Weight>>,
}

/// The rows of a tensor.
type Weight = Arc<Vec<Vec<f64>>>;

impl Backend for ScalarBackend {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn describe(&self) -> String {
        "the definition of every op, in f64".into()
    }

    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error> {
        let tensor = &source.file.tensors()[source.tensor];
        let Some(format) = formats::format(tensor.ty) else {
            return Err(Error::UnsupportedType {
                file: source.file.name().to_string(),
                tensor: tensor.name.clone(),
                ty: tensor.ty,
                supported: formats::FORMATS.iter().map(|f| f.ty.name()).collect::<Vec<_>>().join(", "),
            });
        };
        let mut values = vec![0.0; tensor.n_elements() as usize];
        (format.dequantize)(source.file.data(tensor), &mut values);
        let rows = values.chunks_exact(tensor.n_cols() as usize);
        let rows = rows.map(|row| row.iter().copied().map(f64::from).collect()).collect();
        let mut weights = self.weights.write().unwrap_or_else(PoisonError::into_inner);
        weights.push(Arc::new(rows));
        Ok(WeightId(weights.len() as u32 - 1))
    }

    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error> {
        decls.iter().try_for_each(|decl| decl.check_kv(config.kv))?;
        Ok(Arc::new(ScalarStates { decls: decls.to_vec(), config, inner: Arc::default() }))
    }

    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error> {
        let states = states.as_any().downcast_ref::<ScalarStates>().ok_or(Error::ForeignStates("scalar"))?;
        plan.check_windows(&states.decls);
        let weights = self.weights.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (decls, config, inner) = (states.decls.clone(), states.config, states.inner.clone());
        Ok(Box::new(ScalarExec { plan, weights, decls, config, inner }))
    }

    fn work(&self, plan: &Plan) -> PlanWork {
        let weights = self.weights.read().unwrap_or_else(PoisonError::into_inner);
        let mut work = PlanWork::default();
        for op in &plan.ops {
            // Experts are not counted here: how many a step reads is no matter of the plan.
            let Op::MatMul { weight, dst, .. } = op else { continue };
            let n: usize = weights[weight.0 as usize].iter().map(Vec::len).sum();
            work.weight_bytes += (n * size_of::<f64>()) as u64;
            match plan.rows(*dst) {
                Rows::Batch => work.row.float += n as u64,
                Rows::Output => work.output.float += n as u64,
            }
        }
        work
    }
}

/// The cells of a page, by state and place: key and value.
type Cells = HashMap<(StateId, usize), [Vec<f64>; 2]>;

/// Everything that sequences left behind.
#[derive(Default)]
struct Inner {
    pages: HashMap<PageId, Cells>,
    slots: HashMap<SlotId, Slot>,
    saved: HashMap<SavedId, Slot>,
}

/// The rows that made a sequence's recurrent states.
#[derive(Clone, Default)]
struct Slot {
    n_tentative: usize,
    /// By state: what each row brought.
    committed: HashMap<StateId, Vec<RowInput>>,
    tentative: HashMap<StateId, Vec<RowInput>>,
}

/// What a row brings to a recurrent state.
#[derive(Clone)]
enum RowInput {
    /// The row itself.
    Conv(Vec<f64>),
    /// A token for every value head.
    Delta(Vec<Token>),
}

#[derive(Clone)]
struct Token {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    log_decay: f64,
    beta: f64,
}

struct ScalarStates {
    decls: Vec<StateDecl>,
    config: StateConfig,
    inner: Arc<Mutex<Inner>>,
}

impl ScalarStates {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl States for ScalarStates {
    fn decls(&self) -> &[StateDecl] {
        &self.decls
    }

    fn config(&self) -> StateConfig {
        self.config
    }

    fn page_bytes(&self, class: usize) -> usize {
        let classes = PageClasses::of(&self.decls);
        let is_in = |(at, _): &(usize, &StateDecl)| classes.class(StateId(*at as u32)) == Some(class);
        let values: usize =
            self.decls.iter().enumerate().filter(is_in).map(|(_, decl)| decl.cell_width()).sum();
        values * self.config.page_len * size_of::<f64>()
    }

    fn slot_bytes(&self) -> usize {
        0 // grows with the sequence
    }

    fn page_alloc(&self, page: PageId, _: usize) {
        self.lock().pages.insert(page, HashMap::new());
    }

    fn page_release(&self, page: PageId) {
        self.lock().pages.remove(&page);
    }

    fn page_copy(&self, from: PageId, to: PageId) {
        let mut inner = self.lock();
        let cells = inner.pages[&from].clone();
        *inner.pages.get_mut(&to).expect("a page with storage") = cells;
    }

    fn slot_reset(&self, slot: SlotId) {
        self.lock().slots.insert(slot, Slot::default());
    }

    fn slot_save(&self, slot: SlotId, saved: SavedId) {
        let mut inner = self.lock();
        let committed = inner.slots[&slot].committed.clone();
        inner.saved.insert(saved, Slot { committed, ..Slot::default() });
    }

    fn slot_load(&self, saved: SavedId, slot: SlotId) {
        let mut inner = self.lock();
        let of = inner.saved[&saved].clone();
        inner.slots.insert(slot, of);
    }

    fn slot_commit(&self, slot: SlotId, n_rows: usize) {
        let mut inner = self.lock();
        let slot = inner.slots.get_mut(&slot).expect("a slot that was reset once");
        assert!(n_rows <= slot.n_tentative, "commit of {n_rows} tentative rows of {}", slot.n_tentative);
        slot.n_tentative = 0;
        for (state, rows) in slot.tentative.drain() {
            slot.committed.entry(state).or_default().extend(rows.into_iter().take(n_rows));
        }
    }

    fn saved_bytes(&self) -> usize {
        0 // as for slots
    }

    fn saved_release(&self, saved: SavedId) {
        self.lock().saved.remove(&saved);
    }

    // What defines the others is never restarted, so its states have no form as bytes.
    fn page_export(&self, _: PageId, _: &mut Vec<u8>) {}

    fn page_import(&self, _: PageId, _: &[u8]) -> bool {
        false
    }

    fn saved_export(&self, _: SavedId, _: &mut Vec<u8>) {}

    fn saved_import(&self, _: SavedId, _: &[u8]) -> bool {
        false
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct ScalarExec {
    plan: Arc<Plan>,
    weights: Vec<Weight>,
    decls: Vec<StateDecl>,
    config: StateConfig,
    inner: Arc<Mutex<Inner>>,
}

/// `[rows][width]`.
type Matrix = Vec<Vec<f64>>;

impl Exec for ScalarExec {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        step.check(self.config.page_len, self.plan.lane_cells());
        let inner = self.inner.clone();
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        for lane in step.lanes {
            if let Some(slot) = lane.slot {
                let slot = inner.slots.get_mut(&slot).expect("a slot that was reset once");
                slot.n_tentative = lane.rows.len() - lane.n_certain;
                slot.tentative.clear();
            }
        }
        let n_rows = |buf: Buf| match self.plan.rows(buf) {
            Rows::Batch => step.n_rows(),
            Rows::Output => step.outputs.len(),
        };
        let unwritten = |buf: Buf| vec![vec![f64::NAN; self.plan.width(buf)]; n_rows(buf)];
        let mut bufs: Vec<Matrix> = (0..self.plan.bufs.len() as u32).map(|i| unwritten(Buf(i))).collect();
        for op in &self.plan.ops {
            self.op(op, step, &mut bufs, &mut inner);
        }
        let copy = |buf: Option<Buf>, to: &mut Vec<f32>| {
            to.clear();
            buf.map_or(0, |buf| {
                to.extend(bufs[buf.0 as usize].iter().flatten().map(|&x| x as f32));
                self.plan.width(buf)
            })
        };
        out.output_width = copy(self.plan.output, &mut out.output);
        out.taps_width = copy(self.plan.taps, &mut out.taps);
        out.summarize();
    }
}

impl ScalarExec {
    fn weight(&self, id: WeightId) -> &[Vec<f64>] {
        &self.weights[id.0 as usize]
    }

    fn vector(&self, id: WeightId) -> Vec<f64> {
        self.weight(id).concat()
    }

    fn op(&self, op: &Op, step: &Step<'_>, bufs: &mut [Matrix], inner: &mut Inner) {
        let all = |buf: &Buf| bufs[buf.0 as usize].clone();
        // Applies `f` to each group of `n` values of each row.
        let groups = |src: &Buf, n: usize, f: &dyn Fn(&[f64]) -> Vec<f64>| -> Matrix {
            all(src).iter().map(|row| row.chunks_exact(n).flat_map(f).collect()).collect()
        };
        let mut second = None;
        let (dst, result) = match op {
            Op::Embed { table, dst, scale } => {
                let row = |t: &u32| {
                    self.weight(*table)[*t as usize].iter().map(|x| x * f64::from(*scale)).collect()
                };
                (dst, step.tokens.iter().map(row).collect())
            }
            Op::Input { dst } => {
                let rows = step.inputs.chunks_exact(self.plan.width(*dst));
                (dst, rows.map(|row| row.iter().copied().map(f64::from).collect()).collect())
            }
            Op::MatMul { weight, bias, src, dst } => {
                let bias = bias.map(|b| self.vector(b));
                let product = |x: &Vec<f64>| -> Vec<f64> {
                    let outputs = self.weight(*weight).iter().enumerate();
                    outputs.map(|(o, w)| dot(w, x) + bias.as_ref().map_or(0.0, |b| b[o])).collect()
                };
                (dst, all(src).iter().map(product).collect())
            }
            Op::Router { logits, spec, ids, weights } => {
                let mut chosen: Vec<Vec<(usize, f64)>> = all(logits).iter().map(|x| route(x, spec)).collect();
                if let Some(scales) = spec.expert_scale.map(|id| self.vector(id)) {
                    chosen.iter_mut().flatten().for_each(|(expert, w)| *w *= scales[*expert]);
                }
                let row = |row: &Vec<(usize, f64)>| row.iter().map(|(expert, _)| *expert as f64).collect();
                second = Some((ids, chosen.iter().map(row).collect()));
                (weights, chosen.iter().map(|row| row.iter().map(|(_, w)| *w).collect()).collect())
            }
            Op::ExpertMatMul { weight, n_expert, n_in, ids, src, dst } => {
                let w = self.weight(*weight);
                let n_out = w.len() / n_expert;
                let row = |(x, ids): (&Vec<f64>, &Vec<f64>)| -> Vec<f64> {
                    let slots = ids.iter().enumerate().map(|(slot, id)| {
                        let x = if x.len() == *n_in { x } else { &x[slot * n_in..(slot + 1) * n_in] };
                        w[*id as usize * n_out..][..n_out].iter().map(|w| dot(w, x)).collect::<Vec<f64>>()
                    });
                    slots.collect::<Vec<_>>().concat()
                };
                (dst, all(src).iter().zip(&all(ids)).map(row).collect())
            }
            Op::WeightedSum { src, weights, dst } => {
                let n = self.plan.width(*dst);
                let row = |(x, w): (&Vec<f64>, &Vec<f64>)| -> Vec<f64> {
                    (0..n).map(|i| w.iter().enumerate().map(|(slot, w)| w * x[slot * n + i]).sum()).collect()
                };
                (dst, all(src).iter().zip(&all(weights)).map(row).collect())
            }
            Op::RmsNorm { src, weight, dst, eps, group } => {
                let w = weight.map_or(vec![1.0; *group], |w| self.vector(w));
                (dst, groups(src, *group, &|x| rms_norm(x, &w, *eps)))
            }
            Op::GatedRmsNorm { src, gate, weight, dst, eps, group } => {
                let w = self.vector(*weight);
                let normed = groups(src, *group, &|x| rms_norm(x, &w, *eps));
                (dst, zip(&normed, &all(gate), |x, z| x * silu(z)))
            }
            Op::Rope { src, dst, head_dim, rope } => {
                let factors = rope.factors.map(|f| self.vector(f));
                let mut rows = all(src);
                for (row, position) in rows.iter_mut().zip(step.positions) {
                    for head in row.chunks_exact_mut(*head_dim) {
                        rotate(head, *position, rope, factors.as_deref());
                    }
                }
                (dst, rows)
            }
            Op::KvAppend { state, k, v } => {
                let StateDecl::Kv { head_dim, .. } = self.decls[state.0 as usize] else {
                    panic!("keys and values for {:?}", self.decls[state.0 as usize])
                };
                // Head by head to the type and back.
                let stored = |row: &[f64], ty: KvType| -> Vec<f64> {
                    let heads = row.chunks_exact(head_dim).flat_map(|head| {
                        let head: Vec<f32> = head.iter().map(|x| *x as f32).collect();
                        let mut bytes = KvBytes::new(ty.row_bytes(head_dim));
                        let bytes = &mut bytes.bytes_mut()[..ty.row_bytes(head_dim)];
                        ty.write(&head, bytes);
                        let mut back = vec![0.0; head_dim];
                        ty.read(bytes, &mut back);
                        back
                    });
                    heads.map(f64::from).collect()
                };
                let types = self.config.kv;
                let (k, v) = (all(k), all(v));
                for lane in step.lanes {
                    for (i, row) in lane.rows.clone().enumerate() {
                        let (page, cell) = self.place(*state, lane, lane.n_past + i);
                        let page = inner.pages.get_mut(&page).expect("a page with storage");
                        page.insert((*state, cell), [stored(&k[row], types.k), stored(&v[row], types.v)]);
                    }
                }
                return;
            }
            Op::Attention(op) => (&op.dst, self.attention(op, step, &all(&op.q), inner)),
            Op::ShortConv { state, weight, src, dst } => {
                let w = self.weight(*weight);
                let result = recur(
                    *state,
                    step,
                    inner,
                    |row| RowInput::Conv(all(src)[row].clone()),
                    |past| {
                        // Tap j of `width` looks back width - 1 - j rows; before the sequence there are zeros.
                        let tap =
                            |w: &Vec<f64>, ch: usize, j: usize| match (past.len() + j).checked_sub(w.len()) {
                                Some(row) => w[j] * past[row].conv()[ch],
                                None => 0.0,
                            };
                        let channel =
                            |(ch, w): (usize, &Vec<f64>)| silu((0..w.len()).map(|j| tap(w, ch, j)).sum());
                        w.iter().enumerate().map(channel).collect()
                    },
                );
                (dst, result)
            }
            Op::LocalConv { base, delta, side, n_tap, src, dst } => {
                let (base, delta, x) = (self.weight(*base), all(delta), all(src));
                let n_group = delta.first().map_or(1, |row| row.len() / base.len());
                let channel = |lane: &Lane<'_>, row: usize, c: usize| -> f64 {
                    let tap = |t: usize| {
                        let at = side * n_tap + t;
                        let group = c / (x[row].len() / n_group);
                        (base[at][c] + delta[row][at * n_group + group]) * x[row - t][c]
                    };
                    (0..*n_tap).filter(|t| row >= lane.rows.start + t).map(tap).sum()
                };
                let lanes = step.lanes.iter().flat_map(|lane| lane.rows.clone().map(move |row| (lane, row)));
                let width = self.plan.width(*dst);
                (dst, lanes.map(|(lane, row)| (0..width).map(|c| channel(lane, row, c)).collect()).collect())
            }
            Op::DeltaGates { alpha, b, dt_bias, a, decay, beta } => {
                let (dt_bias, a) = (self.vector(*dt_bias), self.vector(*a));
                let row = |x: &Vec<f64>| (0..a.len()).map(|h| softplus(x[h] + dt_bias[h]) * a[h]).collect();
                second = Some((decay, all(alpha).iter().map(row).collect()));
                (beta, groups(b, 1, &|x| vec![sigmoid(x[0])]))
            }
            Op::DeltaRule { state, qkv, decay, beta, dst, heads, eps } => {
                let (qkv, decay, beta) = (all(qkv), all(decay), all(beta));
                let decl = &self.decls[state.0 as usize];
                let tokens = |row: usize| {
                    RowInput::Delta(delta_tokens(
                        decl,
                        *heads,
                        f64::from(*eps),
                        &qkv[row],
                        &decay[row],
                        &beta[row],
                    ))
                };
                let result = recur(*state, step, inner, tokens, |past| {
                    let n_head = past[0].delta().len();
                    (0..n_head).flat_map(|h| delta_output(past.iter().map(|row| &row.delta()[h]))).collect()
                });
                (dst, result)
            }
            Op::SiluMul { gate, up, dst } => (dst, zip(&all(gate), &all(up), |gate, up| silu(gate) * up)),
            Op::GeluMul { gate, up, dst } => (dst, zip(&all(gate), &all(up), |gate, up| gelu(gate) * up)),
            Op::Softcap { src, cap, dst } => {
                let cap = f64::from(*cap);
                (dst, groups(src, 1, &|x| vec![cap * (x[0] / cap).tanh()]))
            }
            Op::Scale { src, factor, dst } => {
                let factor = match factor {
                    Factor::Constant(factor) => f64::from(*factor),
                    Factor::Weight(id) => self.vector(*id)[0],
                };
                (dst, groups(src, 1, &|x| vec![factor * x[0]]))
            }
            Op::SigmoidMul { src, gate, dst } => {
                let (x, mut gate) = (all(src), all(gate));
                if self.plan.width(*dst) != gate.first().map_or(0, Vec::len) {
                    gate.iter_mut().for_each(|gate| *gate = vec![gate[0]; self.plan.width(*dst)]);
                }
                (dst, zip(&x, &gate, |x, gate| x * sigmoid(gate)))
            }
            Op::Add { a, b, dst } => (dst, zip(&all(a), &all(b), |a, b| a + b)),
            Op::Columns { src, dst, group, offset, len } => {
                (dst, groups(src, *group, &|x| x[*offset..offset + len].to_vec()))
            }
            Op::Place { src, dst, column } => {
                let mut rows = all(dst);
                for (row, x) in rows.iter_mut().zip(all(src)) {
                    row[*column..column + x.len()].copy_from_slice(&x);
                }
                (dst, rows)
            }
            Op::SelectOutputs { src, dst } => {
                let rows = all(src);
                (dst, step.outputs.iter().map(|&row| rows[row as usize].clone()).collect())
            }
        };
        bufs[dst.0 as usize] = result;
        if let Some((dst, result)) = second {
            bufs[dst.0 as usize] = result;
        }
    }

    /// The page of a lane's cell, and the cell's place in it.
    fn place(&self, state: StateId, lane: &Lane<'_>, cell: usize) -> (PageId, usize) {
        let class = PageClasses::of(&self.decls).class(state).expect("a KV state");
        (lane.tables[class].page(cell / self.config.page_len), cell % self.config.page_len)
    }

    fn attention(&self, op: &AttentionOp, step: &Step<'_>, q: &Matrix, inner: &Inner) -> Matrix {
        let StateDecl::Kv { n_head: n_head_kv, head_dim, .. } = self.decls[op.state.0 as usize] else {
            panic!("attention over {:?}", self.decls[op.state.0 as usize])
        };
        let mut out = vec![Vec::new(); step.n_rows()];
        for lane in step.lanes {
            for (i, row) in lane.rows.clone().enumerate() {
                let here = lane.n_past + i;
                let sees = |&cell: &usize| {
                    let causal = match op.mask {
                        BlockMask::Causal => cell <= here,
                        BlockMask::Full => true,
                        BlockMask::Past => cell < lane.n_past,
                    };
                    causal && op.window.is_none_or(|window| cell + window > here)
                };
                let cells: Vec<&[Vec<f64>; 2]> = (0..lane.n_past + lane.rows.len())
                    .filter(sees)
                    .map(|cell| {
                        let (page, at) = self.place(op.state, lane, cell);
                        inner.pages[&page].get(&(op.state, at)).expect("a cell that was written")
                    })
                    .collect();
                for h in 0..op.n_head {
                    let h_kv = h / (op.n_head / n_head_kv);
                    let part = |x: &[f64], h: usize| x[h * head_dim..(h + 1) * head_dim].to_vec();
                    let q = part(&q[row], h);
                    let scores: Vec<f64> =
                        cells.iter().map(|[k, _]| f64::from(op.scale) * dot(&q, &part(k, h_kv))).collect();
                    let sink = op.sinks.map(|sinks| self.vector(sinks)[h]);
                    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
                    out[row].extend((0..head_dim).map(|d| {
                        let weighted =
                            weights.iter().zip(&cells).map(|(w, [_, v])| w * v[h_kv * head_dim + d]);
                        weighted.sum::<f64>() / sum
                    }));
                }
            }
        }
        out
    }
}

/// Runs the rows of every lane behind the rows that its slot has committed: `output` sees all rows up to and with
/// the current one. Certain rows are committed, the others are kept for a commit.
fn recur(
    state: StateId,
    step: &Step<'_>,
    inner: &mut Inner,
    input: impl Fn(usize) -> RowInput,
    output: impl Fn(&[RowInput]) -> Vec<f64>,
) -> Matrix {
    let mut out = vec![Vec::new(); step.n_rows()];
    for lane in step.lanes {
        let slot = inner.slots.get_mut(&lane.recurrent_slot()).expect("a slot that was reset once");
        let mut rows = slot.committed.remove(&state).unwrap_or_default();
        let n_past = rows.len();
        for row in lane.rows.clone() {
            rows.push(input(row));
            out[row] = output(&rows);
        }
        let tentative = rows.split_off(n_past + lane.n_certain);
        slot.committed.insert(state, rows);
        slot.tentative.insert(state, tentative);
    }
    out
}

impl RowInput {
    fn conv(&self) -> &[f64] {
        match self {
            RowInput::Conv(row) => row,
            RowInput::Delta(_) => panic!("a convolution over a delta state"),
        }
    }

    fn delta(&self) -> &[Token] {
        match self {
            RowInput::Delta(tokens) => tokens,
            RowInput::Conv(_) => panic!("a delta rule over a convolution's tail"),
        }
    }
}

fn delta_tokens(
    decl: &StateDecl,
    heads: HeadMap,
    eps: f64,
    qkv: &[f64],
    decay: &[f64],
    beta: &[f64],
) -> Vec<Token> {
    let &StateDecl::Delta { n_head_k, n_head_v, dim_k, dim_v } = decl else {
        panic!("a delta rule over {decl:?}")
    };
    let (q, kv) = qkv.split_at(n_head_k * dim_k);
    let (k, v) = kv.split_at(n_head_k * dim_k);
    let token = |h: usize| {
        let h_k = match heads {
            HeadMap::Tiled => h % n_head_k,
            HeadMap::Grouped => h * n_head_k / n_head_v,
        };
        let unit = |x: &[f64]| {
            let x = &x[h_k * dim_k..(h_k + 1) * dim_k];
            x.iter().map(|y| y / (dot(x, x) + eps).sqrt()).collect::<Vec<f64>>()
        };
        Token {
            q: unit(q).iter().map(|x| x / (dim_k as f64).sqrt()).collect(),
            k: unit(k),
            v: v[h * dim_v..(h + 1) * dim_v].to_vec(),
            log_decay: decay[h],
            beta: beta[h],
        }
    };
    (0..n_head_v).map(token).collect()
}

/// The last token's output of one head: `S ← e^g S`, `S ← S + β (v − S k) kᵀ`, `o = S q`, from `S = 0`.
fn delta_output<'a>(tokens: impl Iterator<Item = &'a Token>) -> Vec<f64> {
    let mut s: Matrix = Vec::new(); // [dim_v][dim_k]
    let mut out = Vec::new();
    for Token { q, k, v, log_decay, beta } in tokens {
        s.resize(v.len(), vec![0.0; k.len()]);
        for (row, v) in s.iter_mut().zip(v) {
            row.iter_mut().for_each(|x| *x *= log_decay.exp());
            let correction = beta * (v - dot(row, k));
            row.iter_mut().zip(k).for_each(|(x, k)| *x += correction * k);
        }
        out = s.iter().map(|row| dot(row, q)).collect();
    }
    out
}

fn rotate(head: &mut [f64], position: u32, rope: &RopeSpec, factors: Option<&[f64]>) {
    let n_pair = rope.n_rot / 2;
    for i in 0..n_pair {
        let frequency = f64::from(rope.base).powf(-(2.0 * i as f64) / rope.n_rot as f64);
        let (divisor, stretch) = scaling(rope, i);
        let angle = f64::from(position) * frequency / divisor / factors.map_or(1.0, |f| f[i]);
        let (a, b) = match rope.pairing {
            Pairing::HalfSplit => (i, i + n_pair),
            Pairing::Adjacent => (2 * i, 2 * i + 1),
        };
        let (x, y) = (stretch * head[a], stretch * head[b]);
        head[a] = x * angle.cos() - y * angle.sin();
        head[b] = x * angle.sin() + y * angle.cos();
    }
}

/// What the frequency of pair `i` is divided by, and what its dimensions are multiplied with.
fn scaling(rope: &RopeSpec, i: usize) -> (f64, f64) {
    let yarn = match rope.scaling {
        RopeScaling::None => return (1.0, 1.0),
        RopeScaling::Linear(factor) => return (f64::from(factor), 1.0),
        RopeScaling::Yarn(yarn) => yarn,
    };
    // The pair whose wave is `n_ctx_orig / turns` long.
    let pair = |turns: f32| {
        let wave = f64::from(yarn.n_ctx_orig) / f64::from(turns) / std::f64::consts::TAU;
        wave.log(f64::from(rope.base)) * rope.n_rot as f64 / 2.0
    };
    let (first, last) = (pair(yarn.beta_fast).floor().max(0.0), pair(yarn.beta_slow).ceil());
    let last = last.min(rope.n_rot as f64 - 1.0);
    let divided = match i as f64 {
        i if i <= first => 0.0,
        i if i >= last => 1.0,
        i => (i - first) / (last - first),
    };
    let kept = (1.0 - divided) * f64::from(yarn.ext_factor);
    let factor = f64::from(yarn.factor);
    let stretch = if yarn.ext_factor > 0.0 { factor.ln() / 10.0 + 1.0 } else { 1.0 };
    (1.0 / (kept + (1.0 - kept) / factor), stretch * f64::from(yarn.attn_factor))
}

/// The chosen experts and their weights.
fn route(logits: &[f64], spec: &RouterSpec) -> Vec<(usize, f64)> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let score = |x: &f64| match spec.score {
        RouterScore::Softmax => (x - max).exp() / sum,
        RouterScore::Sigmoid => sigmoid(*x),
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Stable: of equal logits the lower number stays first.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("logits that are numbers"));
    let mut ranked: Vec<(usize, f64)> =
        order[..spec.n_used].iter().map(|&expert| (expert, score(&logits[expert]))).collect();
    let total = if spec.normalise { ranked.iter().map(|(_, w)| w).sum() } else { 1.0 };
    ranked.iter_mut().for_each(|(_, w)| *w *= f64::from(spec.scale) / total);
    ranked
}

fn rms_norm(x: &[f64], w: &[f64], eps: f32) -> Vec<f64> {
    let rms = (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(w).map(|(x, w)| x / rms * w).collect()
}

fn zip(a: &Matrix, b: &Matrix, f: impl Fn(f64, f64) -> f64) -> Matrix {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

fn softplus(x: f64) -> f64 {
    if x > 30.0 { x } else { x.exp().ln_1p() }
}
