//! The assistant of Gemma 4 against the original code in f64: every step of greedy drafts over what the target itself
//! computes here, in pieces. Then each mistake that would only cost acceptance, made on purpose, which must be seen.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use paceline_backend::{
    AttentionOp, Backend, BlockMask, Buf, Error, Exec, KvType, Lane, LaneCells, Op, Plan, PlanBuilder,
    PlanWork, StateConfig, StateDecl, StateId, States, Step, StepOut, Tap, WeightId, WeightSource,
    cpu::CpuBackend,
};
use paceline_memory::Memory;
use paceline_models::{Hparams, Model, SharedWeights};
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, LoadDrafter, LoadError, SeqId, load};
use paceline_testkit::{Golden, Rng, Seeded};

use crate::rig::{Parts, STATES, Target, Tensor, agrees, greedy, no_past};

const N_DRAFT: usize = 4;
/// The window of the golden targets.
const WINDOW: usize = 11;
/// As that of the 31B, and with the head of E2B.
const DENSE: &str = "gemma4-assistant";
const GROUPED: &str = "gemma4-e-assistant";

fn target_of(golden: &str) -> &'static str {
    if golden == DENSE { "gemma4" } else { "gemma4-e" }
}

fn target(golden: &str, backend: Arc<dyn Backend>) -> Target {
    let file = Parts::golden(target_of(golden)).file();
    Target { model: paceline_models::load(&file, &backend).unwrap(), backend, file }
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(1).unwrap())
}

fn load_for(
    backend: &Arc<dyn Backend>,
    model: &dyn Model,
    states: &Arc<dyn States>,
    parts: &Parts,
) -> Result<Box<dyn Drafter>, LoadError> {
    load(&LoadDrafter {
        file: parts.file(),
        backend,
        target: model,
        target_states: states,
        states: STATES,
        n_cell_max: 0,
        n_draft_max: Some(N_DRAFT),
    })
}

/// A target that runs, and its drafter.
struct Rig {
    drafter: Box<dyn Drafter>,
    exec: Box<dyn Exec>,
    memory: Memory,
    out: StepOut,
    golden: Golden,
    tokens: Vec<u32>,
    n_vocab: usize,
    n_embd: usize,
}

impl Rig {
    fn new(golden: &str) -> Rig {
        Rig::of(golden, &Parts::golden(golden))
    }

    fn of(golden: &str, parts: &Parts) -> Rig {
        Rig::with(golden, parts, cpu(), STATES, Tap::FinalNorm)
    }

    fn with(golden: &str, parts: &Parts, backend: Arc<dyn Backend>, config: StateConfig, tap: Tap) -> Rig {
        let target = target(golden, backend);
        let states = target.backend.alloc_states(target.model.states(), config).unwrap();
        let drafter = load_for(&target.backend, &*target.model, &states, parts)
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(drafter.taps(), [Tap::FinalNorm]);
        let taps = [tap];
        let mut p = PlanBuilder::new(&taps);
        let logits = target.model.record(&mut p);
        let exec = target.backend.compile(Arc::new(p.finish(Some(logits))), &states).unwrap();
        let golden = Golden::open(golden);
        Rig {
            drafter,
            exec,
            memory: Memory::new(states, 1 << 14),
            out: StepOut::default(),
            tokens: golden.tokens(),
            golden,
            n_vocab: target.model.hparams().n_vocab,
            n_embd: target.model.hparams().n_embd,
        }
    }

    /// Runs the target over the rows `first..end` of the golden and commits them in both.
    fn commit(&mut self, seq: SeqId, first: usize, end: usize) {
        let tokens = &self.tokens[first..end];
        self.memory.prepare(seq, tokens.len(), tokens.len()).unwrap();
        let positions: Vec<u32> = (first as u32..end as u32).collect();
        let lanes = [self.memory.lane(seq, 0)];
        let step = Step { tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &[] };
        self.exec.run(&step, &mut self.out);
        self.memory.commit(seq, tokens.len());
        let taps = self.out.taps_rows(0..tokens.len());
        self.drafter.commit(&[Kept { seq, first_position: first, tokens, taps }]);
    }

    fn sequence(&mut self, n: usize, chunk: usize) -> SeqId {
        let seq = self.memory.create();
        (0..n).step_by(chunk).for_each(|first| self.commit(seq, first, n.min(first + chunk)));
        seq
    }

    fn forget(&mut self, seq: SeqId) {
        self.drafter.forget(seq);
        self.memory.free(seq);
    }

    fn draft(&mut self, asked: &[(SeqId, usize, u32)], n_max: usize) -> Vec<Draft> {
        let mut samplers: Vec<_> = asked.iter().map(|_| greedy(self.n_vocab)).collect();
        let mut requests: Vec<DraftRequest<'_>> = asked
            .iter()
            .zip(&mut samplers)
            .map(|(&(seq, position, anchor), sampler)| {
                let past = self.memory.past(seq);
                DraftRequest { seq, anchor, position, n_max, past, sampler }
            })
            .collect();
        self.drafter.draft(&mut requests)
    }

    fn draft_at(&mut self, n: usize, anchor: u32, chunk: usize) -> Draft {
        let seq = self.sequence(n, chunk);
        let draft = self.draft(&[(seq, n, anchor)], N_DRAFT).remove(0);
        self.forget(seq);
        draft
    }

    /// (committed tokens, anchor, logits of each step).
    fn points(&self) -> Vec<(usize, u32, Vec<Vec<f32>>)> {
        let logits = |i: usize| -> Vec<Vec<f32>> {
            let all = self.golden.f32(&format!("point.{i}.logits"));
            all.chunks_exact(self.n_vocab).map(<[f32]>::to_vec).collect()
        };
        let points = self.golden.i32("points");
        points.chunks(2).enumerate().map(|(i, p)| (p[0] as usize, p[1] as u32, logits(i))).collect()
    }

    /// The sizes of context at whose points the draft is not the reference's.
    fn red(&mut self) -> Vec<usize> {
        self.red_among(&ALL)
    }

    fn red_among(&mut self, sizes: &[usize]) -> Vec<usize> {
        let mut red = Vec::new();
        let points = self.points().into_iter().filter(|(n, ..)| sizes.contains(n));
        for (i, (n, anchor, logits)) in points.enumerate() {
            if !agrees(&self.draft_at(n, anchor, [75, 20, 3][i % 3]), &logits) {
                red.push(n);
            }
        }
        red
    }
}

/// A backend that changes what the drafter asks for: mistakes that no file can make. The target's plans stay as they are.
struct Bent {
    inner: CpuBackend,
    plan: fn(&mut Plan),
    /// What a row's position becomes, in which step of its draft.
    position: fn(u32, usize) -> u32,
    lane: fn(&mut Lane<'_>),
    /// What the drafter is told in place of the states that it wrote: it is told the first one again.
    keeps_state: bool,
}

impl Bent {
    fn straight() -> Bent {
        let inner = CpuBackend::new(1).unwrap();
        Bent { inner, plan: |_| (), position: |position, _| position, lane: |_| (), keeps_state: false }
    }

    fn plan(plan: fn(&mut Plan)) -> Bent {
        Bent { plan, ..Bent::straight() }
    }

    fn red(self, golden: &str) -> Vec<usize> {
        Rig::with(golden, &Parts::golden(golden), Arc::new(self), STATES, Tap::FinalNorm).red()
    }
}

struct BentExec {
    inner: Box<dyn Exec>,
    position: fn(u32, usize) -> u32,
    lane: fn(&mut Lane<'_>),
    keeps_state: bool,
    n_run: usize,
}

impl Exec for BentExec {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        let at = self.n_run % N_DRAFT;
        self.n_run += 1;
        let positions: Vec<u32> = step.positions.iter().map(|p| (self.position)(*p, at)).collect();
        let mut lanes = step.lanes.to_vec();
        lanes.iter_mut().for_each(self.lane);
        self.inner.run(&Step { positions: &positions, lanes: &lanes, ..step.clone() }, out);
        if self.keeps_state {
            out.taps.copy_from_slice(step.inputs);
        }
    }
}

impl Backend for Bent {
    fn name(&self) -> &'static str {
        "bent"
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error> {
        self.inner.upload(source)
    }

    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error> {
        self.inner.alloc_states(decls, config)
    }

    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error> {
        if plan.lane_cells() == LaneCells::Own {
            return self.inner.compile(plan, states);
        }
        let mut plan = Plan::clone(&plan);
        (self.plan)(&mut plan);
        let inner = self.inner.compile(Arc::new(plan), states)?;
        let &Bent { position, lane, keeps_state, .. } = self;
        Ok(Box::new(BentExec { inner, position, lane, keeps_state, n_run: 0 }))
    }

    fn work(&self, plan: &Plan) -> PlanWork {
        self.inner.work(plan)
    }
}

fn each_attention(plan: &mut Plan, change: impl Fn(&mut AttentionOp)) {
    for op in &mut plan.ops {
        if let Op::Attention(op) = op {
            change(op);
        }
    }
}

fn each_op(plan: &mut Plan, change: impl Fn(&mut Op)) {
    plan.ops.iter_mut().for_each(change);
}

const GREEN: [usize; 0] = [];
const ALL: [usize; 10] = [1, 2, 9, 10, 11, 12, 13, 40, 64, 75];

/// Where a mistake is seen that concerns what queries choose: with one cell there is no choice.
fn is_seen(red: &[usize], what: &str) {
    assert!(red.len() >= 8 && red.iter().all(|n| ALL.contains(n)), "{what}: red only at {red:?}");
}

#[test]
fn drafts_are_the_references() {
    let mut rig = Rig::new(DENSE);
    assert_eq!(rig.red(), GREEN);
    assert_eq!(
        rig.drafter.contract(),
        "gemma4-assistant: layers [sliding/11 of 3, sliding/11 of 3, full of 4], state behind the target's final norm (44), \
         one position a draft, head of all 133 tokens, drafts of 4"
    );
    // Layers of the target that own no keys are seen through.
    let mut rig = Rig::new(GROUPED);
    assert_eq!(rig.red(), GREEN);
    assert_eq!(
        rig.drafter.contract(),
        "gemma4-assistant: layers [sliding/11 of 5, full of 4, full of 4], state behind the target's final norm (40), \
         one position a draft, head of the best 3 of 7 groups of 19 tokens, drafts of 4"
    );
}

/// Not only the choices but all numbers: `q` is compared within 5e-4, and here it is shown that this can fail.
#[test]
fn a_straight_plan_is_green() {
    assert_eq!(Bent::straight().red(DENSE), GREEN);
    assert_eq!(Bent::straight().red(GROUPED), GREEN);
}

#[test]
fn a_window_that_is_off_by_one_is_seen() {
    let from = |first: usize| -> Vec<usize> { ALL.into_iter().filter(|n| *n >= first).collect() };
    for golden in [DENSE, GROUPED] {
        // The target keeps no more than its window, so nobody gets to look beyond it.
        let refused = |bent: Bent| {
            let panic =
                catch_unwind(AssertUnwindSafe(|| bent.red(golden))).expect_err("looked behind the window");
            let message = panic.downcast_ref::<String>().expect("a message");
            assert!(message.contains("its reader looks back"), "{golden}: {message}");
        };
        refused(Bent::plan(|p| each_attention(p, |op| op.window = op.window.map(|w| w + 1))));
        refused(Bent::plan(|p| each_attention(p, |op| op.window = None)));
        let narrower = Bent::plan(|p| each_attention(p, |op| op.window = op.window.map(|w| w - 1)));
        assert_eq!(narrower.red(golden), from(WINDOW - 1), "{golden}, narrower");
        let all = Bent::plan(|p| each_attention(p, |op| op.window = Some(WINDOW)));
        assert_eq!(all.red(golden), from(WINDOW), "{golden}, in full layers too");
        // A file may ask for less than the target's window, never for more.
        let window = |n: u32| Parts::golden(golden).set("gemma4-assistant.attention.sliding_window", n);
        assert_eq!(Rig::of(golden, &window(10)).red(), from(WINDOW - 1), "{golden}");
        assert_eq!(Rig::of(golden, &window(99)).red(), GREEN, "{golden}");
    }
}

#[test]
fn a_mask_that_is_off_by_one_is_seen() {
    for golden in [DENSE, GROUPED] {
        // The last committed cell is not seen; where it was the only one there is nothing left, which is a fault.
        let hidden = Bent { lane: |lane| lane.n_past -= 1, ..Bent::straight() };
        assert_eq!(hidden.red(golden), ALL, "{golden}");
        // A row sees itself, which nobody wrote. Behind whole pages the cell is not even there.
        let own = Bent::plan(|p| each_attention(p, |op| op.mask = BlockMask::Full));
        let mut rig = Rig::with(golden, &Parts::golden(golden), Arc::new(own), STATES, Tap::FinalNorm);
        let partly: Vec<usize> = ALL.into_iter().filter(|n| n % STATES.page_len != 0).collect();
        assert_eq!(rig.red_among(&partly), partly, "{golden}");
    }
}

#[test]
fn a_position_that_is_off_by_one_is_seen() {
    for golden in [DENSE, GROUPED] {
        is_seen(&Bent { position: |p, _| p + 1, ..Bent::straight() }.red(golden), "one later");
        is_seen(&Bent { position: |p, _| p - 1, ..Bent::straight() }.red(golden), "one earlier");
        is_seen(&Bent { position: |p, at| p + at as u32, ..Bent::straight() }.red(golden), "growing");
    }
}

#[test]
fn a_scale_is_seen() {
    for golden in [DENSE, GROUPED] {
        let scores = Bent::plan(|p| each_attention(p, |op| op.scale = 12f32.powf(-0.5)));
        is_seen(&scores.red(golden), "scores scaled by the head's width");
        let embedding = Bent::plan(|p| {
            each_op(p, |op| {
                if let Op::Embed { scale, .. } = op {
                    *scale = 1.0;
                }
            });
        });
        assert_eq!(embedding.red(golden), ALL, "rows of the embedding as they are");
        let half = Bent::plan(|p| {
            each_op(p, |op| {
                if let Op::Rope { rope, .. } = op {
                    rope.factors = None;
                }
            });
        });
        is_seen(&half.red(golden), "all of a full layer's dimensions turn");
        let no_scale = Parts::golden(golden).without("blk.1.layer_output_scale.weight");
        assert_eq!(Rig::of(golden, &no_scale).red(), ALL, "the factor of a layer missing");
    }
}

#[test]
fn a_wrong_layer_of_the_target_is_seen() {
    // The first sliding layer in the place of the last; full layers stay.
    let first = Bent::plan(|p| {
        each_attention(p, |op| {
            if op.window.is_some() {
                op.state = StateId(0);
            }
        });
    });
    assert_eq!(first.red(DENSE), ALL);
    // Of the layers of this target that own keys, 1 and 4 are full.
    let other = Bent::plan(|p| {
        each_attention(p, |op| {
            if op.window.is_none() {
                op.state = StateId(1);
            }
        });
    });
    assert_eq!(other.red(GROUPED), ALL);
}

#[test]
fn a_wrong_state_is_seen() {
    for golden in [DENSE, GROUPED] {
        let parts = Parts::golden(golden);
        let mut before_norm = Rig::with(golden, &parts, cpu(), STATES, Tap::Layer(4));
        assert_eq!(before_norm.red(), ALL, "another tap");
        let kept = Bent { keeps_state: true, ..Bent::straight() };
        assert_eq!(kept.red(golden), ALL, "the target's state at every step");
        let n_embd = Rig::new(golden).n_embd;
        let halves = parts.clone().edit("nextn.pre_projection.weight", |values| {
            values.chunks_exact_mut(2 * n_embd).for_each(|row| row.rotate_left(n_embd));
        });
        assert_eq!(Rig::of(golden, &halves).red(), ALL, "halves of the projection swapped");
        // Behind n tokens the state of token n - 2, with cells of n.
        let mut late = Rig::new(golden);
        let mut red = Vec::new();
        for (n, anchor, logits) in late.points().into_iter().filter(|(n, ..)| *n > 1) {
            let before = late.sequence(n - 1, 75);
            let mut taps = late.out.taps_rows(0..n - 1).to_vec();
            taps.extend_from_within((n - 2) * late.n_embd..);
            let seq = late.sequence(n, 75);
            late.drafter.forget(seq);
            let tokens = &late.tokens[..n];
            late.drafter.commit(&[Kept { seq, first_position: 0, tokens, taps: &taps }]);
            let got = late.draft(&[(seq, n, anchor)], N_DRAFT).remove(0);
            if !agrees(&got, &logits) {
                red.push(n);
            }
            late.forget(seq);
            late.forget(before);
        }
        assert_eq!(red, ALL[1..], "the state of the token before");
    }
}

#[test]
fn norms_and_groups_that_are_mixed_up_are_seen() {
    for golden in [DENSE, GROUPED] {
        let norms = Parts::golden(golden)
            .rename("post_attention_norm", "other")
            .rename("ffn_norm", "post_attention_norm")
            .rename("other", "ffn_norm");
        assert_eq!(Rig::of(golden, &norms).red(), ALL, "{golden}");
    }
    let used = |n: u32| Parts::golden(GROUPED).set("gemma4-assistant.centroid_top_k", n);
    for n in [2, 4] {
        is_seen(&Rig::of(GROUPED, &used(n)).red(), "another number of groups");
    }
    let mut order = Parts::golden(GROUPED);
    let ordering = order.tensors.iter_mut().find(|t| t.name == "masked_embd_ordering").unwrap();
    ordering.data.rotate_left(4);
    assert_eq!(Rig::of(GROUPED, &order).red(), ALL, "tokens one place off");
    // All tokens: the best of more, so the likeliest is at least as likely, and found without the tensors too.
    let dense = Parts::golden(GROUPED).set("gemma4-assistant.use_ordered_embeddings", false);
    let bare = Parts::golden(GROUPED).without("masked_embd_ordering").without("masked_embd_centroids.weight");
    let (mut dense, mut bare) = (Rig::of(GROUPED, &dense), Rig::of(GROUPED, &bare));
    assert!(dense.drafter.contract().contains("head of all 133 tokens"));
    assert!(dense.red().len() > 5);
    for (n, anchor, _) in dense.points() {
        assert_eq!(dense.draft_at(n, anchor, 75), bare.draft_at(n, anchor, 75));
    }
}

/// The first files, of forks, have other names for the same.
#[test]
fn both_dialects_of_files_are_read() {
    for golden in [DENSE, GROUPED] {
        let mut old = Parts::golden(golden)
            .move_keys("gemma4-assistant.", "gemma4_assistant.")
            .set("general.architecture", "gemma4_assistant")
            .move_keys("gemma4_assistant.embedding_length_out", "gemma4_assistant.n_embd_backbone")
            .set("gemma4_assistant.requires_target_arch", "gemma4")
            .rename("nextn.", "mtp.")
            .rename(".layer_output_scale.weight", ".layer_output_scale");
        if golden == GROUPED {
            old = old
                .rename("masked_embd_centroids.weight", "mtp.centroids.weight")
                .rename("masked_embd_ordering", "mtp.token_ordering.weight");
        }
        assert_eq!(Rig::of(golden, &old).red(), GREEN);
        // Keys under the one name in a file of the other.
        let mixed = old.set("general.architecture", "gemma4-assistant");
        assert_eq!(Rig::of(golden, &mixed).red(), GREEN);
        let short = Parts::golden(golden)
            .rename("nextn.pre_projection", "mtp_pre_proj")
            .rename("nextn.post_projection", "mtp_post_proj")
            .without("rope_freqs.weight");
        assert_eq!(Rig::of(golden, &short).red(), GREEN, "angles are the target's");
    }
    let mut wide = Parts::golden(GROUPED);
    let ordering = wide.tensors.iter_mut().find(|t| t.name == "masked_embd_ordering").unwrap();
    let numbers = ordering.data.as_chunks().0.iter().map(|x| i32::from_le_bytes(*x)).collect::<Vec<i32>>();
    ordering.ty = paceline_gguf::GgmlType::I64;
    ordering.data = numbers.into_iter().flat_map(|x| i64::from(x).to_le_bytes()).collect();
    assert_eq!(Rig::of(GROUPED, &wide).red(), GREEN);
}

/// What the target keeps in fewer bits is read as it is.
#[test]
fn cells_of_other_types_are_read() {
    for golden in [DENSE, GROUPED] {
        for kv in [KvType::F16, KvType::Bf16] {
            let config = StateConfig { kv: kv.into(), ..STATES };
            let mut rig = Rig::with(golden, &Parts::golden(golden), cpu(), config, Tap::FinalNorm);
            let (mut n, mut n_same) = (0, 0);
            for (n_token, anchor, logits) in rig.points() {
                let draft = rig.draft_at(n_token, anchor, 75);
                assert_eq!(draft.fault, None);
                let first = draft
                    .tokens
                    .iter()
                    .zip(&logits)
                    .take_while(|(token, row)| row.iter().all(|x| *x <= row[**token as usize]));
                (n, n_same) = (n + N_DRAFT, n_same + first.count());
            }
            assert!(n_same * 10 > n * 8, "{golden}, {kv}: {n_same} of {n}");
        }
    }
}

/// A target of one full layer that nobody runs.
struct NoWindows<'a>(&'a Hparams, SharedWeights, [StateDecl; 1]);

impl Model for NoWindows<'_> {
    fn hparams(&self) -> &Hparams {
        self.0
    }

    fn states(&self) -> &[StateDecl] {
        &self.2
    }

    fn shared(&self) -> SharedWeights {
        self.1
    }

    fn record(&self, p: &mut PlanBuilder<'_>) -> Buf {
        let x = p.input(40);
        let rope = paceline_backend::RopeSpec {
            n_rot: 20,
            base: 1e6,
            pairing: paceline_backend::Pairing::HalfSplit,
            factors: None,
            scaling: paceline_backend::RopeScaling::None,
        };
        let k = p.rope(x, 20, &rope);
        p.kv_append(StateId(0), k, x);
        let mask = BlockMask::Causal;
        let (state, n_head, scale, window, sinks) = (StateId(0), 2, 1.0, None, None);
        p.attention(|dst| AttentionOp { state, q: x, dst, n_head, scale, mask, window, sinks })
    }
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let (backend, parts) = (cpu(), Parts::golden(DENSE));
    let own = target(DENSE, backend.clone());
    let check = |target: &dyn Model, parts: &Parts, message: &str| {
        let states = backend.alloc_states(target.states(), STATES).unwrap();
        let error = load_for(&backend, target, &states, parts).err().expect(message).to_string();
        assert!(error.contains(message), "{error}, expected {message}");
    };
    let other = paceline_models::load(&Parts::golden("qwen35").file(), &backend).unwrap();
    check(
        &*other,
        &parts,
        "architecture of the target: expected `gemma4`, found `qwen35`; use the assistant",
    );
    let narrow = target(GROUPED, backend.clone());
    check(&*narrow.model, &parts, "width of the target's states: expected 44, found 40; use the assistant");
    let shared = own.model.shared();
    let windowless =
        NoWindows(own.model.hparams(), shared, [StateDecl::Kv { n_head: 2, head_dim: 20, window: None }]);
    check(
        &windowless,
        &parts,
        "layers of the target: expected a sliding layer, whose keys and values layer 0 reads",
    );
    let model = &*own.model;
    let key = |suffix: &str| format!("gemma4-assistant.{suffix}");
    let set = |suffix: &str, n: u32| parts.clone().set(&key(suffix), n);
    check(
        model,
        &set("attention.key_length_swa", 14),
        "attention.key_length_swa`: expected 12, the target's",
    );
    check(model, &set("attention.sliding_window", 1), "at least 2, or nothing is seen, found 1");
    check(model, &set("embedding_length_out", 43), "expected 43, found 44");
    check(
        model,
        &parts.clone().set(&key("requires_target_arch"), "gemma5"),
        "expected `gemma5`, found `gemma4`",
    );
    let pattern = parts.clone().set(&key("attention.sliding_window_pattern"), vec![true, false]);
    check(model, &pattern, "expected one value for each of 3 layers, found 2");
    check(model, &parts.clone().without("nextn.post_projection.weight"), "nextn.post_projection.weight");
    check(model, &parts.clone().without("blk.2.attn_q.weight"), "blk.2.attn_q.weight");
    let shape = Tensor::f32("nextn.pre_projection.weight", &[44, 36], &[0.0; 44 * 36]);
    check(model, &parts.clone().without("nextn.pre_projection.weight").with(shape), "[88, 36]");
    let grouped = Parts::golden(GROUPED);
    let model = &*narrow.model;
    check(model, &grouped.clone().set(&key("centroid_top_k"), 8u32), "expected 1 to 7 groups, found 8");
    let mut twice = grouped.clone();
    let ordering = twice.tensors.iter_mut().find(|t| t.name == "masked_embd_ordering").unwrap();
    ordering.data.copy_within(0..4, 4);
    check(model, &twice, "masked_embd_ordering`: expected each of 133 tokens once");
}

/// It has no part in a sequence that it was not told of in full, and says so.
#[test]
fn a_draft_needs_what_it_is_made_of() {
    let mut rig = Rig::new(DENSE);
    let seq = rig.sequence(20, 7);
    let fault = |drafts: Vec<Draft>| drafts[0].fault.clone().unwrap();
    assert_eq!(
        fault(rig.draft(&[(seq, 21, 3)], 2)),
        "it knows 20 of 21 committed tokens, and the target keeps 20"
    );
    let mut sampler = greedy(rig.n_vocab);
    let (anchor, position, n_max, sampler) = (3, 20, 2, &mut sampler);
    let request = DraftRequest { seq, anchor, position, n_max, past: no_past(), sampler };
    let fault_of = rig.drafter.draft(&mut [request]);
    assert_eq!(fault(fault_of), "it knows 20 of 20 committed tokens, and the target keeps 0");
    rig.drafter.forget(seq);
    assert_eq!(
        fault(rig.draft(&[(seq, 20, 3)], 2)),
        "it knows 0 of 20 committed tokens, and the target keeps 20"
    );
    // Rows behind tokens that it forgot change nothing.
    rig.commit(seq, 20, 21);
    assert_eq!(rig.drafter.state_bytes(), 0);
}

/// Drafts of several sequences in one call, one row each, between commits in pieces of any size, cancelled and begun anew,
/// forked, at times by way of bytes: each is what a fresh drafter makes of the same tokens, bit for bit. Two slots are where others
/// crashed, on a reshape by the batch's token count.
#[test]
fn any_history_drafts_as_a_fresh_drafter() {
    for golden in [DENSE, GROUPED] {
        let mut fresh = Rig::new(golden);
        let mut alone: HashMap<usize, Draft> = HashMap::new();
        let n_all = fresh.tokens.len();
        for n_slot in [1, 2, 5, 8] {
            let seed = 70 + n_slot as u64;
            let _seeded = Seeded::new("assistants of several sequences", seed);
            let mut rng = Rng::new(seed);
            let mut rig = Rig::new(golden);
            let mut slots: Vec<(SeqId, usize)> = (0..n_slot).map(|_| (rig.memory.create(), 0)).collect();
            let (mut n_compared, mut n_fork) = (0, 0);
            for _ in 0..20 {
                for slot in &mut slots {
                    let n = rng.range(0..9).min(n_all - 1 - slot.1);
                    if n > 0 {
                        rig.commit(slot.0, slot.1, slot.1 + n);
                        slot.1 += n;
                    }
                    if slot.1 == n_all - 1 || rng.chance(0.05) {
                        rig.forget(slot.0);
                        *slot = (rig.memory.create(), 0);
                    }
                }
                let asked: Vec<(SeqId, usize, u32)> =
                    slots.iter().filter(|s| s.1 > 0).map(|&(seq, n)| (seq, n, rig.tokens[n])).collect();
                if asked.is_empty() {
                    continue;
                }
                let n_max = rng.range(1..N_DRAFT + 1);
                let usage = rig.memory.usage();
                let drafts = rig.draft(&asked, n_max);
                assert_eq!(rig.memory.usage(), usage, "nothing of the target's is taken");
                for (&(_, n, anchor), got) in asked.iter().zip(drafts) {
                    let want = alone.entry(n).or_insert_with(|| fresh.draft_at(n, anchor, 75)).clone();
                    let (tokens, q) = (want.tokens[..n_max].to_vec(), want.q[..n_max].to_vec());
                    assert_eq!(got, Draft { tokens, q, fault: None }, "{n_slot} slots, {n} tokens");
                    n_compared += 1;
                }
                let (from, n) = slots[rng.range(0..n_slot)];
                if n > 0 && rng.chance(0.5) {
                    let mut to = rig.memory.fork(from);
                    assert!(
                        !rig.drafter.fork(from, to, n - 1),
                        "the state behind an earlier token is not kept"
                    );
                    assert!(rig.drafter.fork(from, to, n));
                    if rng.chance(0.5) {
                        let bytes = rig.drafter.export(to).unwrap();
                        rig.forget(to);
                        to = rig.memory.fork(from);
                        let before = rig.drafter.state_bytes();
                        assert!(rig.drafter.import(to, n + 1, &bytes).is_err(), "of another length");
                        assert!(rig.drafter.import(to, n, &bytes[..bytes.len() - 1]).is_err(), "cut");
                        assert!(rig.drafter.import(to, n, &[]).is_err(), "empty");
                        assert_eq!(rig.drafter.state_bytes(), before);
                        rig.drafter.import(to, n, &bytes).unwrap();
                    }
                    assert_eq!(rig.drafter.resting_bytes(), 4 * rig.n_embd);
                    let slot = rng.range(0..n_slot);
                    rig.forget(slots[slot].0);
                    slots[slot] = (to, n);
                    n_fork += 1;
                    // It may be asked before it is given a row.
                    let got = rig.draft(&[(to, n, rig.tokens[n])], N_DRAFT).remove(0);
                    assert_eq!(&got, alone.get(&n).unwrap());
                    if n + 1 < n_all {
                        rig.commit(to, n, n + 1);
                        slots[slot].1 += 1;
                        assert_eq!(rig.drafter.resting_bytes(), 0);
                    }
                }
                rig.memory.check();
            }
            slots.iter().for_each(|slot| rig.forget(slot.0));
            assert_eq!(rig.drafter.state_bytes(), 0);
            assert_eq!(rig.memory.usage().bytes, 0);
            assert!(n_compared >= 12 * n_slot && n_fork > 3, "{n_compared} drafts, {n_fork} forks");
        }
    }
}
