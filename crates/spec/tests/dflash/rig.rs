//! Drafter files taken apart and put together again, the targets to load them with, and drafts out of them.

use std::sync::{Arc, OnceLock};

use paceline_backend::{
    Backend, Buf, KvType, KvTypes, Lane, PlanBuilder, StateConfig, StateDecl, States, cpu::CpuBackend,
};
use paceline_convert::{ConvertOptions, convert};
use paceline_gguf::{GgmlType, Gguf, Metadata, Value, to_bytes};
use paceline_memory::Memory;
use paceline_models::{Hparams, Model, SharedWeights, Weights};
use paceline_sampling::{Sampler, SamplingParams};
use paceline_spec::{Draft, DraftRequest, Drafter, Kept, LoadDrafter, LoadError, SeqId, load};
use paceline_testkit::{Golden, Rng, goldens_dir};

/// Block size of the golden drafters.
pub const BLOCK: usize = 6;
/// Their and their target's vocabulary.
pub const N_VOCAB: usize = 131;
/// Their mask token.
pub const MASK: u32 = 113;

/// No point of the golden is red.
pub const GREEN: &[usize] = &[];

/// A tensor of a [`Parts`].
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub ty: GgmlType,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn f32(name: &str, shape: &[u64], values: &[f32]) -> Tensor {
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Tensor { name: name.to_string(), shape: shape.to_vec(), ty: GgmlType::F32, data }
    }

    pub fn values(&self) -> Vec<f32> {
        assert_eq!(self.ty, GgmlType::F32, "{}", self.name);
        self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

/// A file taken apart, for a test to change.
#[derive(Clone)]
pub struct Parts {
    pub metadata: Metadata,
    pub tensors: Vec<Tensor>,
}

impl Parts {
    pub fn of(file: &Gguf) -> Parts {
        let mut metadata = Metadata::for_file("drafter.gguf");
        file.metadata().iter().for_each(|(key, value)| metadata.insert(key, value.clone()));
        let tensors = file.tensors().iter().map(|t| Tensor {
            name: t.name.clone(),
            shape: t.shape.clone(),
            ty: t.ty,
            data: file.data(t).to_vec(),
        });
        Parts { metadata, tensors: tensors.collect() }
    }

    /// What the converter makes of a golden checkpoint.
    pub fn golden(name: &str) -> Parts {
        Parts::of(&converted(name, "f32"))
    }

    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Parts {
        self.metadata.insert(key, value);
        self
    }

    pub fn unset(mut self, key: &str) -> Parts {
        assert!(self.metadata.remove(key).is_some(), "{key} was there");
        self
    }

    /// Moves the keys under one prefix to another, in place.
    pub fn move_keys(mut self, from: &str, to: &str) -> Parts {
        let mut metadata = Metadata::for_file("drafter.gguf");
        for (key, value) in self.metadata.iter() {
            let moved = key.strip_prefix(from).map(|rest| format!("{to}{rest}"));
            metadata.insert(moved.unwrap_or(key.to_string()), value.clone());
        }
        self.metadata = metadata;
        self
    }

    /// Replaces a part of the tensors' names.
    pub fn rename(mut self, from: &str, to: &str) -> Parts {
        let named = self.tensors.iter_mut().filter(|t| t.name.contains(from));
        assert!(named.map(|t| t.name = t.name.replace(from, to)).count() > 0, "{from} was there");
        self
    }

    pub fn with(mut self, tensor: Tensor) -> Parts {
        self.tensors.push(tensor);
        self
    }

    pub fn without(mut self, name: &str) -> Parts {
        let n = self.tensors.len();
        self.tensors.retain(|t| t.name != name);
        assert_eq!(self.tensors.len() + 1, n, "{name} was there");
        self
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Changes the values of a tensor.
    pub fn edit(mut self, name: &str, edit: impl Fn(&mut [f32])) -> Parts {
        let tensor =
            self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"));
        let mut values = tensor.values();
        edit(&mut values);
        *tensor = Tensor::f32(name, &tensor.shape, &values);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let tensors: Vec<_> = self.tensors.iter().map(|t| (&t.name, &t.shape, t.ty, &t.data)).collect();
        to_bytes(&self.metadata, &tensors).unwrap()
    }

    pub fn file(&self) -> Arc<Gguf> {
        Arc::new(Gguf::from_bytes("drafter.gguf", self.bytes()).unwrap())
    }
}

/// A golden checkpoint as the converter writes it.
pub fn converted(name: &str, ty: &str) -> Gguf {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let target_dir = name.starts_with("dflash").then(|| goldens_dir().join("qwen35"));
    let options = ConvertOptions {
        target_dir,
        ty: ty.to_string(),
        ..ConvertOptions::new(goldens_dir().join(name), &out)
    };
    convert(&options, |_| {}).unwrap();
    Gguf::from_bytes(&format!("{name}.gguf"), std::fs::read(&out).unwrap()).unwrap()
}

/// A target and the backend that holds it.
pub struct Target {
    pub backend: Arc<dyn Backend>,
    pub model: Box<dyn Model>,
    pub file: Arc<Gguf>,
}

impl Target {
    /// The target of the golden drafters.
    pub fn golden() -> &'static Target {
        static TARGET: OnceLock<Target> = OnceLock::new();
        TARGET.get_or_init(|| {
            let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
            let file = Arc::new(converted("qwen35", "f32"));
            Target { model: paceline_models::load(&file, &backend).unwrap(), backend, file }
        })
    }

    /// A target of any size that has no layers to run: what a drafter needs of it is its sizes and both ends.
    pub fn ends(n_layer: usize, n_embd: usize, n_vocab: usize) -> Target {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
        let (shape, mut rng) = ([n_embd as u64, n_vocab as u64], Rng::new(5));
        let tensors = ["token_embd.weight", "output.weight"].map(|name| random(name, &shape, 1.0, &mut rng));
        let mut metadata = Metadata::for_file("target.gguf");
        metadata.insert("general.architecture", "ends");
        let file = Parts { metadata, tensors: tensors.to_vec() }.file();
        let weights = Weights::new(file.clone(), backend.clone(), "ends");
        let end = |name| weights.matrix(name, [n_embd, n_vocab], "n_embd, n_vocab").unwrap();
        let shared = SharedWeights {
            tok_embd: end("token_embd.weight"),
            embd_scale: 1.0,
            output: end("output.weight"),
            logit_cap: None,
        };
        let hparams = Hparams {
            arch: "ends".to_string(),
            n_layer,
            n_embd,
            n_vocab,
            n_ctx_train: 4096,
            n_head: 8,
            n_head_kv: 2,
            head_dim: 32,
            n_ff: 512,
            eps: 1e-6,
            n_rot: 32,
            rope_base: 1e6,
            rope_scaling: Default::default(),
        };
        Target { backend, model: Box::new(Ends { hparams, shared }), file }
    }

    pub fn load(&self, file: Arc<Gguf>) -> Result<Box<dyn Drafter>, LoadError> {
        self.load_with_room(file, 4096)
    }

    /// A drafter that may hold `n_cell_max` rows over all sequences.
    pub fn load_with_room(&self, file: Arc<Gguf>, n_cell_max: usize) -> Result<Box<dyn Drafter>, LoadError> {
        let (backend, target, target_states) = (&self.backend, &*self.model, &self.states());
        load(&LoadDrafter {
            file,
            backend,
            target,
            target_states,
            states: STATES,
            n_cell_max,
            n_draft_max: None,
        })
    }

    /// A store for the target's sequences.
    pub fn states(&self) -> Arc<dyn States> {
        self.backend.alloc_states(self.model.states(), STATES).unwrap()
    }
}

/// F32 and pages that blocks and windows cross.
pub const STATES: StateConfig =
    StateConfig { page_len: 16, kv: KvTypes { k: KvType::F32, v: KvType::F32 }, n_tentative_max: 16 };

struct Ends {
    hparams: Hparams,
    shared: SharedWeights,
}

impl Model for Ends {
    fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    fn states(&self) -> &[StateDecl] {
        &[]
    }

    fn shared(&self) -> SharedWeights {
        self.shared
    }

    fn record(&self, _: &mut PlanBuilder<'_>) -> Buf {
        unreachable!("a target that nobody runs")
    }
}

/// Values around 0 that keep the size of a normed row about `gain` times what it was.
pub fn random(name: &str, shape: &[u64], gain: f32, rng: &mut Rng) -> Tensor {
    let scale = gain * (3.0 / shape[0] as f32).sqrt();
    let n = shape.iter().product::<u64>();
    let values: Vec<f32> =
        (0..n).map(|_| scale * ((rng.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0)).collect();
    Tensor::f32(name, shape, &values)
}

/// Sequence ids, which only a memory hands out.
pub fn seq_ids() -> Memory {
    Memory::new(Target::golden().backend.alloc_states(&[], STATES).unwrap(), 0)
}

pub fn greedy(n_vocab: usize) -> Sampler {
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    Sampler::new(params, n_vocab, Arc::default()).unwrap()
}

/// The cells of a target that nobody ran, for drafters that don't look at them.
pub fn no_past() -> Lane<'static> {
    Lane { rows: 0..1, n_past: 0, n_certain: 1, tables: &[], slot: None }
}

/// Greedy drafts of up to `n_max` tokens behind (sequence, committed tokens, anchor).
pub fn draft(
    drafter: &mut dyn Drafter,
    asked: &[(SeqId, usize, u32)],
    n_max: usize,
    n_vocab: usize,
) -> Vec<Draft> {
    let mut samplers: Vec<Sampler> = asked.iter().map(|_| greedy(n_vocab)).collect();
    let mut requests: Vec<DraftRequest<'_>> = asked
        .iter()
        .zip(&mut samplers)
        .map(|(&(seq, position, anchor), sampler)| {
            let past = no_past();
            DraftRequest { seq, anchor, position, n_max, past, sampler }
        })
        .collect();
    drafter.draft(&mut requests)
}

/// A drafter of the golden target, fed from a golden.
pub struct Rig {
    pub drafter: Box<dyn Drafter>,
    pub golden: Golden,
    pub tokens: Vec<u32>,
    /// `[tokens.len(), width]`.
    pub features: Vec<f32>,
    pub width: usize,
    pub ids: Memory,
}

/// A point of a golden where a block of native size was computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub index: usize,
    /// Committed tokens.
    pub n: usize,
    pub anchor: u32,
}

impl Rig {
    pub fn new(golden: &str) -> Rig {
        Rig::of(golden, &Parts::golden(golden))
    }

    /// `parts` in the place of the golden's own drafter.
    pub fn of(golden: &str, parts: &Parts) -> Rig {
        Rig::with(golden, Target::golden().load(parts.file()).unwrap_or_else(|error| panic!("{error}")))
    }

    pub fn with(golden: &str, drafter: Box<dyn Drafter>) -> Rig {
        let golden = Golden::open(golden);
        let (tokens, features, width) =
            (golden.tokens(), golden.f32("features"), golden.shape("features")[1]);
        Rig { drafter, golden, tokens, features, width, ids: seq_ids() }
    }

    /// Commits the rows `first..end` of the golden to `seq`.
    pub fn commit(&mut self, seq: SeqId, first: usize, end: usize) {
        let taps = &self.features[first * self.width..end * self.width];
        self.drafter.commit(&[Kept { seq, first_position: first, tokens: &self.tokens[first..end], taps }]);
    }

    /// A sequence whose first `n` tokens were committed in chunks of `chunk`.
    pub fn sequence(&mut self, n: usize, chunk: usize) -> SeqId {
        let seq = self.ids.create();
        for first in (0..n).step_by(chunk) {
            self.commit(seq, first, n.min(first + chunk));
        }
        seq
    }

    pub fn points(&self) -> Vec<Point> {
        let points = self.golden.i32("points");
        let points = points.chunks(3).enumerate().filter(|(_, p)| p[2] as usize == BLOCK);
        points.map(|(index, p)| Point { index, n: p[0] as usize, anchor: p[1] as u32 }).collect()
    }

    /// A whole block behind the first `n` tokens, which are forgotten again.
    pub fn draft_at(&mut self, n: usize, anchor: u32) -> Draft {
        let seq = self.sequence(n, 75);
        let draft = draft(&mut *self.drafter, &[(seq, n, anchor)], BLOCK - 1, N_VOCAB).remove(0);
        assert_eq!(draft.fault, None);
        self.drafter.forget(seq);
        draft
    }

    /// The drafts at all points.
    pub fn drafts(&mut self) -> Vec<Draft> {
        self.points().into_iter().map(|p| self.draft_at(p.n, p.anchor)).collect()
    }

    /// Logits of the reference at a point, rows 1.. of the block.
    pub fn reference(&self, point: Point) -> Vec<Vec<f32>> {
        let logits = self.golden.f32(&format!("point.{}.logits", point.index));
        logits.chunks_exact(N_VOCAB).skip(1).map(<[f32]>::to_vec).collect()
    }

    /// What the reference drafts at a point: tokens, and the logs of their probabilities.
    pub fn path(&self, point: Point) -> Vec<(u32, f32)> {
        let name = format!("point.{}.path", point.index);
        if !self.golden.has(&name) {
            return self.reference(point).iter().map(|row| likeliest(row)).collect();
        }
        let tokens = self.golden.i32(&name).into_iter().map(|token| token as u32);
        tokens.zip(self.golden.f32(&format!("{name}_log_q"))).collect()
    }

    /// Where drafts and reference part: sizes of context of the points that are red.
    pub fn red(&mut self) -> Vec<usize> {
        let points = self.points();
        let drafts: Vec<Draft> = self.drafts();
        let differs =
            |(point, draft): (&Point, Draft)| (!follows(&draft, &self.path(*point))).then_some(point.n);
        points.iter().zip(drafts).filter_map(differs).collect()
    }
}

/// The greedy token of a row and the log of its probability, which hangs on every logit of the row.
pub fn likeliest(row: &[f32]) -> (u32, f32) {
    let (token, max) =
        row.iter().enumerate().fold((0, f32::MIN), |m, (i, &x)| if x > m.1 { (i, x) } else { m });
    let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
    (token as u32, -sum.ln())
}

/// True if a draft is what the logits say, within the tolerance of the goldens: 5e-4.
pub fn agrees(draft: &Draft, logits: &[Vec<f32>]) -> bool {
    follows(draft, &logits.iter().map(|row| likeliest(row)).collect::<Vec<_>>())
}

/// True if a draft is these tokens with these logs of probabilities, within that tolerance.
pub fn follows(draft: &Draft, want: &[(u32, f32)]) -> bool {
    let got = draft.tokens.iter().zip(&draft.q);
    draft.tokens.len() == want.len()
        && got.zip(want).all(|((token, q), (want, log_q))| token == want && (q.ln() - log_q).abs() < 5e-4)
}

/// A random drafter, upstream dialect, F32, of width 256 so that every type fits its rows.
pub fn random_drafter(target_layers: &[u32], n_layer: usize) -> Parts {
    let (n_embd, n_head, n_kv, head_dim, n_ff) = (256u64, 8u64, 2u64, 32u64, 512u64);
    let mut metadata = Metadata::for_file("drafter.gguf");
    metadata.insert("general.architecture", "dflash");
    for (key, n) in [
        ("block_count", n_layer as u64),
        ("context_length", 4096),
        ("embedding_length", n_embd),
        ("feed_forward_length", n_ff),
        ("attention.head_count", n_head),
        ("attention.head_count_kv", n_kv),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("block_size", 16),
    ] {
        metadata.insert(format!("dflash.{key}"), n as u32);
    }
    metadata.insert("dflash.attention.layer_norm_rms_epsilon", 1e-6f32);
    metadata.insert("dflash.rope.freq_base", 1e7f32);
    metadata.insert("dflash.target_layers", target_layers.to_vec());
    metadata.insert("tokenizer.ggml.mask_token_id", 4u32);
    let mut rng = Rng::new(11);
    let mut tensors = Vec::new();
    let mut matrix = |name: String, shape: [u64; 2]| tensors.push(random(&name, &shape, 1.0, &mut rng));
    matrix("fc.weight".into(), [n_embd * target_layers.len() as u64, n_embd]);
    for il in 0..n_layer {
        for (part, shape) in [
            ("attn_q", [n_embd, n_head * head_dim]),
            ("attn_k", [n_embd, n_kv * head_dim]),
            ("attn_v", [n_embd, n_kv * head_dim]),
            ("attn_output", [n_head * head_dim, n_embd]),
            ("ffn_gate", [n_embd, n_ff]),
            ("ffn_up", [n_embd, n_ff]),
            ("ffn_down", [n_ff, n_embd]),
        ] {
            matrix(format!("blk.{il}.{part}.weight"), shape);
        }
    }
    let mut norm = |name: String, len: u64| {
        let values: Vec<f32> = (0..len).map(|_| 0.5 + (rng.bits() >> 40) as f32 / (1 << 24) as f32).collect();
        tensors.push(Tensor::f32(&name, &[len], &values));
    };
    norm("enc.output_norm.weight".into(), n_embd);
    norm("output_norm.weight".into(), n_embd);
    for il in 0..n_layer {
        for (part, len) in [
            ("attn_norm", n_embd),
            ("ffn_norm", n_embd),
            ("attn_q_norm", head_dim),
            ("attn_k_norm", head_dim),
        ] {
            norm(format!("blk.{il}.{part}.weight"), len);
        }
    }
    Parts { metadata, tensors }
}
