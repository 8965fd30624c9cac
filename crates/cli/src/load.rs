//! From files to an engine.
//!
//! ```text
//! files ─▶ backend ─▶ target ─▶ drafters ─▶ plan (needs the drafters' taps) ─▶ states ─▶ memory ─▶ engine
//!                       └── tokenizer, template          └── pair checked
//! ```
//!
//! [`Loaded`] holds what can be shared and used again: the server makes a second engine from it after a failure, the
//! bench one with the drafter and one without.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use paceline_backend::{
    Backend, Exec, KvTypes, NUMERICS, Plan, PlanBuilder, StateConfig, States, Tap, cpu::CpuBackend,
};
use paceline_engine::{CacheConfig, Engine, EngineConfig, Event, Request, RequestId, Step, Target, digest};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_models::Model;
use paceline_spec::{Drafter, DrafterKind, LoadDrafter, Origin, TapUnion, kind_of};
use paceline_text::{ChatTemplate, Tokenizer, Vocab};
use tracing::{info, warn};

use crate::{
    flags::{ModelFlags, SizeFlags, TemplateFlags},
    need::{Demand, MemoryNeed},
    progress,
    sources::Source,
};

/// The largest block that any drafter file may ask for: rows of the drafter's memory beyond the context.
const N_BLOCK_MAX: usize = 64;

/// Tokens drafted per step if nothing is said: later positions are accepted rarely, and rows are not free. On the bundled
/// pair 3 to 7 gain most (`paceline bench --spec-draft-n-max N`); real drafters accept less, and real targets make
/// verified rows cheaper.
const N_DRAFT_DEFAULT: usize = 7;

/// Tokens whose bits tie files of snapshots to what computes them.
const N_PROBE: u32 = 24;

/// Slots, if the number is left to us.
const N_SLOT_AUTO: usize = 4;

/// The least context that is tried when the trained one does not fit into memory.
const N_CTX_MIN: usize = 4096;

/// Everything that engines are made from.
pub struct Loaded {
    /// What to call it.
    pub name: String,
    /// The target's file.
    pub target_file: Arc<Gguf>,
    /// Who drafts, and the file that it is in.
    pub drafters: Vec<(&'static DrafterKind, Arc<Gguf>)>,
    /// Where both run.
    pub backend: Arc<dyn Backend>,
    /// The target.
    pub model: Box<dyn Model>,
    /// Its words.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat form.
    pub template: ChatTemplate,
    /// Sizes of engines.
    pub sizes: Sizes,
    /// True if the target is the toy in this binary.
    pub is_bundled: bool,
    /// No empty run before the first request.
    pub no_warmup: bool,
    /// Digest of what the models compute here, once it was looked at.
    pub computes: u64,
}

/// Sizes of an engine, worked out from flags and model.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Requests at once.
    pub n_slot: usize,
    /// Context of each.
    pub n_ctx: usize,
    /// Cells over all slots, without the room for tentative rows.
    pub n_cell: usize,
    /// Rows of a step.
    pub n_ubatch: usize,
    /// Most tokens drafted, before the drafter's own limit.
    pub n_draft_max: usize,
    /// What the user said about it.
    pub n_draft_wanted: Option<usize>,
    /// Drafts have full length, whether that pays or not.
    pub drafts_always: bool,
    /// Storage of the target's cells.
    pub kv: KvTypes,
    /// Storage of the drafter's cells.
    pub kv_draft: KvTypes,
    /// What the prompt cache may do.
    pub cache: CacheConfig,
    /// Share of a prompt that makes a slot fit for it.
    pub slot_similarity: f32,
}

impl Loaded {
    /// Opens, loads and checks what the flags name. `n_slot_auto` is the number of slots if they leave it open.
    pub fn load(
        model: &ModelFlags,
        sizes: &SizeFlags,
        template: &TemplateFlags,
        one_slot: bool,
    ) -> Result<Loaded> {
        let (target_source, drafter_source) = (Source::target(model)?, Source::drafter(model)?);
        let mut target_file = target_source.open()?;
        model.rope.apply(&mut target_file)?;
        let target_file = Arc::new(target_file);
        check_kind(&target_file)?;
        let drafter_file = drafter_source.map(|source| source.open().map(Arc::new)).transpose()?;
        let line = progress::words("loading the target");
        let backend = CpuBackend::new(sizes.n_threads())?.on_progress(progress::packing());
        let backend: Arc<dyn Backend> = Arc::new(backend);
        let target = paceline_models::load(&target_file, &backend)?;
        let tokenizer = Tokenizer::from_metadata(target_file.metadata())
            .with_context(|| format!("{}: the tokenizer can't be used", target_file.name()))?;
        let (n_rows, n_tokens) = (target.hparams().n_vocab, tokenizer.vocab().len());
        ensure!(
            n_rows == n_tokens,
            "{}: tokenizer.ggml.tokens: expected {n_rows} tokens, as many as the embedding has rows, found {n_tokens}",
            target_file.name()
        );
        let drafters = drafters(model, &target_file, drafter_file)?;
        for (kind, file) in drafters.iter().filter(|(kind, _)| kind.needs_file()) {
            check_kind(file)?;
            ensure!(
                !matches!(kind.origin, Origin::Model) || file.metadata().contains("tokenizer.ggml.tokens"),
                "{}: tokenizer.ggml.tokens: expected the target's, found none\nhint: a small model drafts only with the target's vocabulary",
                file.name()
            );
            check_pair(&target_file, tokenizer.vocab(), file)?;
        }
        let text = |token: Option<u32>| {
            token.map(|t| String::from_utf8_lossy(tokenizer.vocab().text(t)).into_owned()).unwrap_or_default()
        };
        let given = template.template(&text(tokenizer.vocab().bos()), &text(tokenizer.vocab().eos()))?;
        let template = match given {
            Some(template) => template,
            None => ChatTemplate::from_metadata(target_file.metadata(), tokenizer.vocab())
                .with_context(|| format!("{}: the chat template can't be used", target_file.name()))?,
        };
        line.finish_and_clear();
        Ok(Loaded {
            sizes: Sizes::new(sizes, &*target, one_slot)?,
            name: target_source.name(),
            target_file,
            drafters,
            backend,
            model: target,
            tokenizer: Arc::new(tokenizer),
            template,
            is_bundled: target_source.is_bundled(),
            no_warmup: sizes.no_warmup,
            computes: 0,
        })
    }

    /// An engine, with the drafter if there is one and it is wanted.
    pub fn engine(&self, with_drafter: bool) -> Result<Engine> {
        let sizes = &self.sizes;
        let page_len = StateConfig::default().page_len;
        // A fork of a sequence copies a page before it writes into it.
        let per_slot = (sizes.n_ctx + N_BLOCK_MAX + page_len).next_multiple_of(page_len);
        let has_drafters = with_drafter && !self.drafters.is_empty();
        let states = self.target_states(if has_drafters { sizes.n_draft_max } else { 0 })?;
        let load = |(kind, file): &(&'static DrafterKind, Arc<Gguf>)| {
            (kind.load)(&LoadDrafter {
                file: file.clone(),
                backend: &self.backend,
                target: &*self.model,
                target_states: &states,
                states: StateConfig { kv: sizes.kv_draft, ..StateConfig::default() },
                n_cell_max: per_slot * sizes.n_slot,
                n_draft_max: sizes.n_draft_wanted,
            })
        };
        let wanted = self.drafters.iter().filter(|_| with_drafter);
        let drafters: Vec<Box<dyn Drafter>> = wanted.map(load).collect::<Result<_, _>>()?;
        let n_draft_max = drafters.iter().map(|d| sizes.n_draft_max.min(d.n_draft_max())).max().unwrap_or(0);
        let taps = TapUnion::of(&drafters);
        let (_, exec) = self.target(taps.taps(), &states)?;
        // A slot's last page is never shared with another slot, and tentative rows come on top.
        let room = (n_draft_max + 1 + page_len).next_multiple_of(page_len);
        let memory = Memory::new(states, sizes.n_cell.next_multiple_of(page_len) + sizes.n_slot * room);
        let target = Target { exec, memory, n_vocab: self.model.hparams().n_vocab };
        let config = EngineConfig {
            n_slot: sizes.n_slot,
            n_ctx: sizes.n_ctx,
            n_ubatch: sizes.n_ubatch,
            n_draft_max,
            cache: sizes.cache,
            slot_similarity: sizes.slot_similarity,
            pair: self.pair(with_drafter),
            ..EngineConfig::default()
        };
        let start = Instant::now();
        let engine = Engine::new(target, drafters, self.tokenizer.vocab().clone(), config);
        Ok(engine.with_clock(Box::new(move || start.elapsed())))
    }

    /// The target, compiled with these hidden states tapped, over `states`.
    pub fn target(&self, taps: &[Tap], states: &Arc<dyn States>) -> Result<(Arc<Plan>, Box<dyn Exec>)> {
        let mut plan = PlanBuilder::new(taps);
        let logits = self.model.record(&mut plan);
        let plan = Arc::new(plan.finish(Some(logits)));
        let exec = self.backend.compile(plan.clone(), states)?;
        Ok((plan, exec))
    }

    /// Where sequences of the target keep their states, with at most so many drafted rows of each in a step. It exists before
    /// the drafters, of which some read it, and so before it is known that all of them draft less.
    pub fn target_states(&self, n_draft_max: usize) -> Result<Arc<dyn States>> {
        let n_tentative_max = n_draft_max.max(1);
        let config = StateConfig { kv: self.sizes.kv, n_tentative_max, ..StateConfig::default() };
        Ok(self.backend.alloc_states(self.model.states(), config)?)
    }

    /// An engine that drafts as much as pays, or at full length if the flags say so.
    pub fn planning_engine(&self) -> Result<Engine> {
        let engine = self.engine(true)?;
        Ok(if self.sizes.drafts_always { engine } else { engine.with_planner() })
    }

    /// Computes a few tokens and takes a digest of the bits that they leave in all memories, which files of snapshots are
    /// tied to from then on: another build, another machine or another file of weights with the same bits may use them, one
    /// with others is told apart. It sees every weight and every kernel of a short prompt; what changes for long ones only,
    /// such as how attention merges its spans, is [`NUMERICS`]'s to say.
    pub fn probe(&mut self) -> Result<()> {
        let cache = std::mem::take(&mut self.sizes.cache);
        let engine = self.engine(true);
        self.sizes.cache = cache;
        let mut engine = engine?;
        let n_vocab = self.model.hparams().n_vocab as u32;
        let prompt =
            (0..N_PROBE.min(self.sizes.n_ctx as u32 - 1)).map(|i| i.wrapping_mul(2_654_435_761) % n_vocab);
        let mut request = Request::new(RequestId(0), prompt.collect());
        request.n_predict = Some(1);
        request.ignore_eos = true;
        engine.submit(request)?;
        let mut events = Vec::new();
        while engine.has_work() {
            engine.step(&mut events);
        }
        self.computes = digest(&engine.save(0).context("the run that snapshots are tied to failed")?.bytes);
        Ok(())
    }

    /// Digest of all that a snapshot depends on, bit for bit: the target's file, who drafts and from which files, how cells
    /// are stored, the kernels, and what they compute.
    fn pair(&self, with_drafters: bool) -> u64 {
        let backend = self.backend.describe();
        // The number of threads changes no bit.
        let backend = backend.split(", ").filter(|part| !part.ends_with(" threads"));
        let mut text =
            [u64::from(NUMERICS), self.computes].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        backend.for_each(|part| text.extend(part.bytes()));
        text.extend(format!("{:?} {:?}", self.sizes.kv, self.sizes.kv_draft).bytes());
        let drafters = self.drafters.iter().filter(|_| with_drafters);
        let drafters = drafters.map(|(kind, file)| (kind.name, file));
        for (role, file) in std::iter::once(("target", &self.target_file)).chain(drafters) {
            text.extend(format!("{role}:").bytes());
            for (key, value) in file.metadata().iter() {
                text.extend(format!("{key}={value};").bytes());
            }
            for tensor in file.tensors() {
                text.extend(format!("{} {:?} {};", tensor.name, tensor.shape, tensor.ty).bytes());
                // Some of every tensor: finetunes of one model have the same shapes.
                let data = file.data(tensor);
                let (first, last) = (data.first_chunk::<64>(), data.last_chunk::<64>());
                text.extend(first.into_iter().chain(last).flatten());
            }
        }
        digest(&text)
    }

    /// Says what was loaded, and runs a token or two so that the first request finds everything touched.
    ///
    /// The run has an engine of its own, so that it shows in no counter.
    pub fn announce_and_warm_up(&self) -> Result<()> {
        let line = progress::words("loading the drafter");
        let mut engine = self.engine(true)?;
        line.finish_and_clear();
        let (sizes, hp) = (&self.sizes, self.model.hparams());
        let n_tentative = if engine.drafters().is_empty() { 0 } else { sizes.n_draft_max };
        let memory = MemoryNeed::new(self.model.states(), sizes.kv, n_tentative);
        info!("{}", self.backend.describe());
        info!(
            "target: {}, {}, {} layers, {} weights in {}",
            self.target_file.path().display(),
            self.target_file.metadata().str("general.architecture")?.unwrap_or("?"),
            hp.n_layer,
            short(n_params(&self.target_file) as f64),
            bytes(self.target_file.file_bytes()),
        );
        for drafter in engine.drafters() {
            info!("drafter: {}", drafter.contract());
        }
        match (engine.drafters().is_empty(), sizes.drafts_always) {
            (true, _) => info!("no drafter: every token takes a forward of its own"),
            (false, true) => info!("drafts of at most {} tokens, always", engine.config().n_draft_max),
            (false, false) => {
                info!("drafts of at most {} tokens, as far as they pay", engine.config().n_draft_max);
            }
        }
        let arch = self.target_file.metadata().str("general.architecture")?.unwrap_or("");
        let n_head = self.target_file.metadata().u32(&format!("{arch}.nextn_predict_layers"))?;
        if n_head.is_some_and(|n| n > 0)
            && !self.drafters.iter().any(|(kind, _)| matches!(kind.origin, Origin::Target))
        {
            info!("the target's file has a prediction head that could draft: --spec-type draft-mtp");
        }
        info!(
            "memory, taken as it is used: {} a token of context{}, up to {}; {} a slot for recurrent state",
            bytes(memory.cell_bytes()),
            match memory.far_cell_bytes() {
                far if far == memory.cell_bytes() => String::new(),
                far => format!(", {} once windows are full", bytes(far)),
            },
            bytes(memory.context_bytes(sizes.demand())),
            bytes(memory.slot_bytes),
        );
        if self.is_bundled {
            info!(
                "this is the bundled toy model, trained on synthetic stories: give a real one with -m or -hf"
            );
        }
        if !self.no_warmup {
            let token = self.tokenizer.vocab().eos().unwrap_or(0);
            let mut request = Request::new(RequestId(0), vec![token; 2]);
            request.n_predict = Some(2);
            request.ignore_eos = true;
            let mut events = Vec::new();
            if engine.submit(request).is_ok() {
                while engine.step(&mut events) != Step::Idle {}
            }
            if let Some(Event::Failed { error, .. }) = events.last() {
                warn!("the empty run failed: {error}");
            }
        }
        Ok(())
    }
}

impl Sizes {
    /// What full slots ask of memory.
    pub fn demand(&self) -> Demand {
        Demand { n_cell: self.n_cell as u64, n_slot: self.n_slot as u64, n_row: self.n_ubatch as u64 }
    }

    /// Sizes for `model`, and words on how they came about.
    pub fn new(flags: &SizeFlags, model: &dyn Model, one_slot: bool) -> Result<Sizes> {
        let (kv, kv_draft) = flags.kv_types();
        model.states().iter().try_for_each(|state| state.check_kv(kv))?;
        let auto = if one_slot { 1 } else { N_SLOT_AUTO };
        let n_slot = match flags.parallel {
            None | Some(-1 | 0) => auto,
            Some(n) => usize::try_from(n).ok().filter(|n| *n <= 256).with_context(|| {
                format!("-np: expected 1 to 256 slots, or -1 to leave the number open, found {n}")
            })?,
        };
        let n_train = model.hparams().n_ctx_train;
        let need = MemoryNeed::new(model.states(), kv, 0);
        let n_ubatch = flags.n_ubatch()?;
        let n_ctx = match flags.ctx_size.filter(|&n| n > 0) {
            Some(total) if flags.kv_unified => total as usize,
            Some(total) => total as usize / n_slot,
            None => {
                // Most of what the machine has free, as far as that can be known.
                let n_fit = available_memory().map_or(usize::MAX, |free| {
                    need.n_ctx_within(free / 10 * 8, n_slot as u64, n_ubatch as u64) as usize
                });
                let n_ctx = n_train.min(n_fit.max(N_CTX_MIN));
                if n_ctx < n_train {
                    warn!(
                        "context cut from {n_train}, the trained one, to {n_ctx} so that full slots fit into memory; -c sets it"
                    );
                }
                n_ctx
            }
        };
        ensure!(
            n_ctx >= 2,
            "-c {}: leaves {n_ctx} tokens to each of {n_slot} slots, expected at least 2\n\
             hint: a larger -c, fewer slots (-np), or one pool for all (-kvu)",
            flags.ctx_size.unwrap_or(0)
        );
        let why = match flags.ctx_size.filter(|&n| n > 0) {
            None => "what the model was trained for".to_string(),
            Some(total) if flags.kv_unified => format!("-c {total}, one pool for all (-kvu)"),
            Some(total) => format!("-c {total} over -np {n_slot}"),
        };
        info!("{n_slot} slots, each with a context of {n_ctx} tokens ({why})");
        if n_ctx > n_train {
            warn!(
                "the model was trained for a context of {n_train} tokens: beyond, answers get worse (-c asks for {n_ctx} a slot); --rope-scaling yarn --rope-scale N stretches what it knows"
            );
        }
        let n_cell = if flags.kv_unified { n_ctx } else { n_ctx * n_slot };
        let demand = Demand { n_cell: n_cell as u64, n_slot: n_slot as u64, n_row: n_ubatch as u64 };
        let n_byte = need.context_bytes(demand);
        if let Some(free) = available_memory()
            && n_byte > free
        {
            warn!(
                "full slots would need {} of memory, {} are free: requests fail when it runs out; a smaller -c is safer",
                bytes(n_byte),
                bytes(free)
            );
        }
        Ok(Sizes {
            n_slot,
            n_ctx,
            n_cell,
            n_ubatch,
            n_draft_max: flags.spec_draft_n_max.unwrap_or(N_DRAFT_DEFAULT),
            n_draft_wanted: flags.spec_draft_n_max,
            drafts_always: flags.spec_draft_fixed,
            kv,
            kv_draft,
            cache: flags.cache.config()?,
            slot_similarity: flags
                .cache
                .slot_prompt_similarity
                .unwrap_or(EngineConfig::default().slot_similarity),
        })
    }
}

/// Who drafts: what the flags name, or what the drafter's file holds.
fn drafters(
    flags: &ModelFlags,
    target: &Arc<Gguf>,
    file: Option<Arc<Gguf>>,
) -> Result<Vec<(&'static DrafterKind, Arc<Gguf>)>> {
    let Some(kinds) = flags.drafter_kinds()? else {
        return file.map(|file| Ok((kind_of(&file)?, file))).into_iter().collect();
    };
    let mut drafters = Vec::with_capacity(kinds.len());
    let mut left = file;
    for kind in kinds {
        // A head may be in the target's file or in its own: both go by one name.
        let own = left.as_ref().and_then(|file| kind_of(file).ok());
        let kind = own.filter(|own| own.aliases.contains(&kind.name)).unwrap_or(kind);
        if !kind.needs_file() {
            drafters.push((kind, target.clone()));
            continue;
        }
        let Some(file) = left.take() else {
            bail!(
                "--spec-type {}: only one kind can have the drafter's file\nhint: kinds without a file of their own can be added: draft-mtp, ngram-simple",
                flags.spec_type.as_deref().unwrap_or(kind.name)
            );
        };
        let found = kind_of(&file)?;
        ensure!(
            found.name == kind.name,
            "{}: expected a drafter of kind {}, found {}\nhint: --spec-type {}",
            file.name(),
            kind.name,
            found.name,
            found.name
        );
        drafters.push((kind, file));
    }
    if let Some(file) = left {
        let found = kind_of(&file)?.name;
        bail!(
            "{}: a drafter of kind {found}, which --spec-type {} does not name\nhint: --spec-type {found}",
            file.name(),
            flags.spec_type.as_deref().unwrap_or("")
        );
    }
    Ok(drafters)
}

/// Adapters, projectors and other parts come in GGUF files too.
fn check_kind(file: &Gguf) -> Result<()> {
    match file.metadata().str("general.type")? {
        None | Some("model") => Ok(()),
        Some(other) => bail!(
            "{}: general.type: expected `model`, found `{other}`\nhint: give the model itself",
            file.name()
        ),
    }
}

/// A drafter that speaks other tokens drafts rubbish without an error, so the vocabularies are compared if the drafter
/// brings one; which ids play special roles may differ, drafters do not look at roles.
pub fn check_pair(target: &Gguf, ours: &Vocab, drafter: &Gguf) -> Result<()> {
    if drafter.metadata().contains("tokenizer.ggml.tokens") {
        match Vocab::from_metadata(drafter.metadata()) {
            Ok(theirs) => {
                let diff = ours.diff(&theirs);
                if diff.only_special_ids() {
                    info!(
                        "target and drafter differ in special tokens only ({diff}): fine, the target's count"
                    );
                } else if !diff.is_same() {
                    bail!(
                        "{}: its vocabulary is not the target's: {diff}\nhint: use the drafter that was trained for {}, or go without (--no-draft)",
                        drafter.name(),
                        target.name()
                    );
                }
            }
            Err(error) => {
                warn!("{}: its tokenizer can't be compared with the target's: {error}", drafter.name())
            }
        }
    }
    let window = |file: &Gguf| -> Result<Option<u32>> {
        let arch = file.metadata().require_str("general.architecture")?;
        Ok(file.metadata().u32(&format!("{arch}.attention.sliding_window"))?.filter(|&n| n > 0))
    };
    if let (Some(target_window), Some(drafter_window)) = (window(target)?, window(drafter)?)
        && target_window != drafter_window
    {
        warn!(
            target_window,
            drafter_window,
            "sliding windows of target and drafter differ: acceptance may suffer, the text does not"
        );
    }
    Ok(())
}

/// Weights in a file.
pub fn n_params(file: &Gguf) -> u64 {
    file.tensors().iter().map(|tensor| tensor.n_elements()).sum()
}

/// Memory that the system could give, where it says so.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// `7.4 MB`.
pub fn bytes(n: u64) -> String {
    match n {
        0..1000 => format!("{n} B"),
        _ => format!("{}B", short(n as f64)),
    }
}

/// `7.4 M`.
pub fn short(n: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(unit, _)| n >= *unit) {
        Some((unit, name)) if n / unit < 10.0 => format!("{:.1} {name}", n / unit),
        Some((unit, name)) => format!("{:.0} {name}", n / unit),
        None => format!("{n:.0} "),
    }
}
