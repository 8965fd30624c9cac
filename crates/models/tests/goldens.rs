//! Every architecture against transformers: each layer's output and the logits of tiny random models whose
//! dimensions are unequal and odd, whole and in chunks, and with rejected drafts in between.

use std::sync::Arc;

use paceline_backend::{
    Backend, KvType, PlanBuilder, StateConfig, StateId, Step, StepOut, Tap, cpu::CpuBackend,
};
use paceline_convert::{ConvertOptions, convert};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_testkit::{Golden, assert_close, goldens_dir};

/// Absolute tolerance of hidden states; the references are exact to f32.
const HIDDEN: f32 = 1e-4;

/// A golden model as a sequence can run it.
struct Rig {
    exec: Box<dyn paceline_backend::Exec>,
    memory: Memory,
    n_layer: usize,
    out: StepOut,
}

impl Rig {
    fn new(name: &str) -> Rig {
        Rig::with_pages(name, 16)
    }

    fn with_pages(name: &str, page_len: usize) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join(format!("{name}.gguf"));
        convert(&ConvertOptions::new(goldens_dir().join(name), &out), |_| {}).unwrap();
        let file = Arc::new(Gguf::open(&out).unwrap());
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(2).unwrap());
        let model = paceline_models::load(&file, &backend).unwrap();
        let n_layer = model.hparams().n_layer;
        let taps: Vec<Tap> = (0..n_layer).map(Tap::Layer).collect();
        let mut p = PlanBuilder::new(&taps);
        let logits = model.record(&mut p);
        let plan = Arc::new(p.finish(Some(logits)));
        let config = StateConfig { page_len, kv: KvType::F32.into(), n_tentative_max: 16 };
        let states = backend.alloc_states(model.states(), config).unwrap();
        let exec = backend.compile(plan, &states).unwrap();
        Rig { exec, memory: Memory::new(states, 4096), n_layer, out: StepOut::default() }
    }

    /// Runs `tokens` behind the committed ones of `seq` and commits the first `n_commit`. Returns hidden states by
    /// layer and logits of the committed rows.
    fn step(
        &mut self,
        seq: paceline_memory::SeqId,
        tokens: &[u32],
        n_certain: usize,
        n_commit: usize,
    ) -> Rows {
        let n = tokens.len();
        let past = self.memory.len(seq) as u32;
        self.memory.prepare(seq, n, n_certain).unwrap();
        let lanes = [self.memory.lane(seq, 0)];
        let positions: Vec<u32> = (past..past + n as u32).collect();
        let outputs: Vec<u32> = (0..n as u32).collect();
        let step = Step { tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        self.exec.run(&step, &mut self.out);
        self.memory.commit(seq, n_commit);
        self.memory.check();
        let width = self.out.taps_width / self.n_layer;
        let hidden = (0..self.n_layer)
            .map(|il| {
                let rows = self.out.taps.chunks_exact(self.out.taps_width).take(n_commit);
                rows.flat_map(|row| row[il * width..(il + 1) * width].to_vec()).collect()
            })
            .collect();
        let logits = self.out.output[..n_commit * self.out.output_width].to_vec();
        Rows { hidden, logits }
    }
}

#[derive(Default, PartialEq, Debug)]
struct Rows {
    hidden: Vec<Vec<f32>>,
    logits: Vec<f32>,
}

impl Rows {
    fn extend(&mut self, other: Rows) {
        self.hidden.resize(other.hidden.len(), Vec::new());
        for (all, more) in self.hidden.iter_mut().zip(other.hidden) {
            all.extend(more);
        }
        self.logits.extend(other.logits);
    }
}

fn check(name: &str, logits_tolerance: f32) {
    let golden = Golden::open(name);
    let tokens = golden.tokens();
    let mut rig = Rig::new(name);
    let seq = rig.memory.create();
    let whole = rig.step(seq, &tokens, tokens.len(), tokens.len());
    for (il, hidden) in whole.hidden.iter().enumerate() {
        let tensor = format!("hidden.{il}");
        let width = golden.shape(&tensor)[1];
        assert_close(&format!("{name} layer {il}"), hidden, &golden.f32(&tensor), width, HIDDEN);
    }
    let n_vocab = golden.shape("logits")[1];
    assert_close(&format!("{name} logits"), &whole.logits, &golden.f32("logits"), n_vocab, logits_tolerance);
    check_equalities(name, &mut rig, &tokens, &whole);
}

/// However the tokens are grouped, and whatever is drafted in between, the bits are those of one pass.
fn check_equalities(name: &str, rig: &mut Rig, tokens: &[u32], whole: &Rows) {
    for chunk in [1, 7, 16, 64] {
        let seq = rig.memory.create();
        let mut rows = Rows::default();
        for part in tokens.chunks(chunk) {
            rows.extend(rig.step(seq, part, part.len(), part.len()));
        }
        assert_eq!(&rows, whole, "{name} in chunks of {chunk}");
        rig.memory.free(seq);
    }
    // Drafts of every length, of which none, some or all are right.
    let seq = rig.memory.create();
    let mut rows = Rows::default();
    let (mut at, mut turn) = (0, 0);
    while at < tokens.len() {
        let n_right = [0, 1, 3, 5, 2][turn % 5].min(tokens.len() - at - 1);
        let n_wrong = [4, 0, 2, 0, 7][turn % 5];
        let mut draft = tokens[at..=at + n_right].to_vec();
        draft.extend((0..n_wrong).map(|i| (tokens[at] + 1 + i) % 100));
        rows.extend(rig.step(seq, &draft, 1, 1 + n_right));
        at += 1 + n_right;
        turn += 1;
    }
    assert_eq!(&rows, whole, "{name} with drafts");
    rig.memory.free(seq);
    // A fork goes its own way and leaves the original alone.
    let seq = rig.memory.create();
    let (head, tail) = tokens.split_at(20);
    rig.step(seq, head, 20, 20);
    let fork = rig.memory.fork(seq);
    let other: Vec<u32> = tail.iter().map(|t| (t + 1) % 100).collect();
    rig.step(fork, &other, other.len(), other.len());
    let rest = rig.step(seq, tail, tail.len(), tail.len());
    let n_vocab = whole.logits.len() / tokens.len();
    assert_eq!(rest.logits, whole.logits[20 * n_vocab..], "{name} beside its fork");
    rig.memory.check();
}

#[test]
fn qwen35() {
    check("qwen35", 5e-4);
}

#[test]
fn qwen35_tied() {
    check("qwen35-tied", 2e-3);
}

#[test]
fn qwen3() {
    check("qwen3", 5e-4);
}

#[test]
fn qwen35moe() {
    check("qwen35moe", 5e-4);
}

#[test]
fn qwen3next() {
    check("qwen3next", 5e-4);
}

#[test]
fn qwen3moe() {
    check("qwen3moe", 5e-4);
}

#[test]
fn gemma4() {
    check("gemma4", 5e-4);
}

#[test]
fn gemma4_with_embeddings_per_layer_and_shared_kv() {
    check("gemma4-e", 5e-4);
}

#[test]
fn gemma4_with_experts() {
    check("gemma4-moe", 5e-4);
}

/// What a memory that drops dead cells needs to know: by layer with keys and values, how far anybody looks back.
#[test]
fn gemma4_windows_are_known() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("gemma4-e.gguf");
    convert(&ConvertOptions::new(goldens_dir().join("gemma4-e"), &out), |_| {}).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
    let model = paceline_models::load(&Arc::new(Gguf::open(&out).unwrap()), &backend).unwrap();
    let mut p = PlanBuilder::new(&[]);
    let logits = model.record(&mut p);
    let plan = p.finish(Some(logits));
    let windows: Vec<_> = (0..model.states().len() as u32).map(|i| plan.window(StateId(i))).collect();
    assert_eq!(windows, [Some(11), None, Some(11), Some(11), None, Some(11)]);
}

/// Behind fifty windows, whose pages are gone but for the last ones: the bits are those of a memory that has one page for all,
/// which gives none back, in one pass and in chunks, with drafts, from a snapshot and from its bytes.
#[test]
fn gemma4_far_behind_its_windows() {
    for name in ["gemma4", "gemma4-e"] {
        let tokens: Vec<u32> = (0..560).map(|i| (i * i * 7 + i / 3) % 128).collect();
        let mut roomy = Rig::with_pages(name, 4096);
        let seq = roomy.memory.create();
        let whole = roomy.step(seq, &tokens, tokens.len(), tokens.len());
        let mut rig = Rig::with_pages(name, 4);
        check_equalities(name, &mut rig, &tokens, &whole);

        let seq = rig.memory.create();
        let (head, tail) = tokens.split_at(301);
        rig.step(seq, head, head.len(), head.len());
        // Full pages, and those that cells 291 .. 301 lie in; gemma4 sees 11 cells, its own among them.
        let n_page = |rig: &Rig| rig.memory.usage().n_page_all;
        let before = n_page(&rig);
        let snapshot = rig.memory.fork(seq);
        let mut bytes = Vec::new();
        rig.memory.export(snapshot, &mut bytes);
        let rest = rig.step(seq, tail, tail.len(), tail.len());
        let n_vocab = whole.logits.len() / tokens.len();
        assert_eq!(rest.logits, whole.logits[301 * n_vocab..], "{name}: on from 301");
        let fork = rig.memory.fork(snapshot);
        let again = rig.step(fork, tail, tail.len(), tail.len());
        assert_eq!(again.logits, rest.logits, "{name}: from a snapshot of 301");
        let back = rig.memory.import(&bytes).unwrap();
        assert_eq!(
            rig.step(back, tail, 1, tail.len()).logits,
            rest.logits,
            "{name}: from the snapshot's bytes"
        );
        assert_eq!(rig.memory.fork_prefix(seq, 301), None, "{name}: its window has gone on");
        for seq in [seq, snapshot, fork, back] {
            rig.memory.free(seq);
        }
        assert_eq!(n_page(&rig), before - (76 + 4), "{name}: what the sequences before left");
    }
}

/// Beyond the trained context.
#[test]
fn scaled_positions() {
    check("qwen3-yarn", 5e-4);
    check("qwen35-yarn", 5e-4);
    check("llama-linear", 2e-3);
}

#[test]
fn llama() {
    check("llama", 2e-3);
}
