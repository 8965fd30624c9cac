//! `paceline inspect`: what a file holds, and the memory that it will need.

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context, Result};
use clap::Args;
use paceline_backend::{Backend, KvType, StateConfig, StateDecl, cpu::CpuBackend};
use paceline_convert::synth::{SynthOptions, outline as outline_of};
use paceline_gguf::{GgmlType, Gguf, Metadata, Value as MetaValue};
use paceline_models::{ARCHS, Weights};
use paceline_spec::{DRAFTERS, LoadDrafter, Origin};
use serde_json::{Value, json};

use crate::{
    flags::{ModelFlags, SizeFlags},
    load::{Sizes, bytes, n_params, short},
    need::{Demand, MemoryNeed},
    output::say,
};

/// Shows what a GGUF file holds
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// The file, of a split model the first part
    file: Option<PathBuf>,
    /// A published size in place of a file, as `paceline synth` takes them: what that model would need
    #[arg(long, value_name = "SHAPE", conflicts_with = "file")]
    shape: Option<String>,
    /// The mix of tensor types of --shape
    #[arg(long, value_name = "TYPE", requires = "shape", default_value = "q4_k_m")]
    shape_type: String,
    /// For a drafter, its target: the pair is checked as it would be at load
    #[arg(long, value_name = "FILE")]
    target: Option<PathBuf>,
    /// Lists every tensor
    #[arg(long)]
    tensors: bool,
    /// Prints the memory that a server with these sizes would take, and at most
    #[arg(long)]
    plan: bool,
    /// For the plan, the drafter beside the target (-md)
    #[arg(long, alias = "md", value_name = "FILE", requires = "plan")]
    model_draft: Option<PathBuf>,
    /// For the plan, who drafts, as for `paceline serve`: draft-mtp counts the target's own prediction head
    #[arg(long, value_name = "KINDS", requires = "plan")]
    spec_type: Option<String>,
    /// Shows long values in full
    #[arg(long)]
    full: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    /// Only says whether the model was tuned for instructions: exit code 0 if so, 3 if not
    #[arg(long, conflicts_with = "json")]
    check_instruct: bool,
    /// Context (the trained one by default) and other sizes to work out memory for
    #[command(flatten)]
    sizes: SizeFlags,
}

/// Exit code for a model that was not tuned for instructions; 1 is a file that can't be read.
const NOT_INSTRUCT: u8 = 3;

/// Longest text of a value, in characters, unless all is wanted.
const MAX_CHARS: usize = 100;

/// Elements of an array that are shown, unless all are wanted.
const MAX_ELEMENTS: usize = 16;

/// Runs it.
pub fn run(args: InspectArgs) -> Result<ExitCode> {
    let file = Arc::new(match (&args.file, &args.shape) {
        (Some(path), _) => Gguf::open(path)?,
        (None, Some(shape)) => outline(shape, &args.shape_type)?,
        (None, None) => anyhow::bail!("expected a file, or a shape (--shape)"),
    });
    if args.check_instruct {
        let reason = not_instruct(&file)?;
        say(format_args!("{}: {}", file.name(), reason.unwrap_or("tuned for instructions")))?;
        return Ok(if reason.is_some() { NOT_INSTRUCT.into() } else { ExitCode::SUCCESS });
    }
    if args.plan {
        let plan = MemoryPlan::new(&args, &file)?;
        match args.json {
            true => say(format_args!("{}", serde_json::to_string_pretty(&plan.to_json())?)),
            false => plan.print(),
        }?;
        return Ok(ExitCode::SUCCESS);
    }
    let memory = memory(&file, args.sizes.ctx_size.filter(|&n| n > 0).map(u64::from), args.sizes.n_ubatch()?);
    let contract = contract(&file, args.target.as_ref())?;
    match args.json {
        true => {
            say(format_args!("{}", serde_json::to_string_pretty(&to_json(&args, &file, &memory, &contract))?))
        }
        false => print(&args, &file, &memory, &contract),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// A file of the shape with no weights in it, only their sizes.
fn outline(shape: &str, ty: &str) -> Result<Gguf> {
    let name = format!("paceline-{}-{}.gguf", std::process::id(), shape.replace([':', '/'], "-"));
    let path = std::env::temp_dir().join(name);
    outline_of(&SynthOptions::new(shape, ty, &path))?;
    let file = Gguf::open(&path);
    // The mapping stays when the name is gone.
    fs::remove_file(&path).with_context(|| format!("{}: can't be removed", path.display()))?;
    Ok(file?)
}

/// Why a file seems to hold a base model; none if it seems tuned for instructions. A drafter trained for the one drafts
/// badly for the other, and nothing else would tell.
fn not_instruct(file: &Gguf) -> Result<Option<&'static str>> {
    let meta = file.metadata();
    if meta.str("tokenizer.chat_template")?.is_none_or(|template| template.trim().is_empty()) {
        return Ok(Some("a base model: it has no chat template"));
    }
    // Converters copy a template into base models too; then their name still says what they are.
    for key in ["general.finetune", "general.name", "general.basename"] {
        let words = meta.str(key)?.unwrap_or("").to_ascii_lowercase();
        if words
            .split(|c: char| !c.is_alphanumeric())
            .any(|word| matches!(word, "base" | "pretrained" | "pt"))
        {
            return Ok(Some("a base model: its name says so"));
        }
    }
    Ok(None)
}

/// Memory at a context, or why it is not known.
type Memory = Result<MemoryTable, String>;

struct MemoryTable {
    n_ctx: u64,
    n_ctx_train: u64,
    weights: u64,
    /// Type and bytes of a whole context.
    kv: Vec<(&'static str, u64)>,
    /// Of each class of layers how many cells it keeps (none is all) and the bytes of one in F16.
    classes: Vec<(Option<u64>, u64)>,
    /// Recurrent state of a slot, without drafts.
    slot: u64,
    /// What each drafted token adds to a slot.
    per_draft: u64,
}

/// What a mixture of experts reads.
struct Experts {
    n_expert: u32,
    n_used: u32,
    /// Of all experts.
    bytes: u64,
    /// Of all weights that one token's forward reads.
    token_bytes: u64,
}

fn experts(file: &Gguf) -> Option<Experts> {
    let count = |key: &str| {
        let n = file.metadata().u32(&format!("{}.{key}", arch(file)?)).ok().flatten();
        n.filter(|n| *n > 0)
    };
    let (n_expert, n_used) = (count("expert_count")?, count("expert_used_count")?);
    let of = |wanted: fn(&str) -> bool| -> u64 {
        file.tensors().iter().filter(|tensor| wanted(&tensor.name)).map(|tensor| tensor.n_bytes).sum()
    };
    let bytes = of(|name| name.contains("_exps."));
    let used = u128::from(bytes) * u128::from(n_used.min(n_expert)) / u128::from(n_expert);
    Some(Experts { n_expert, n_used, bytes, token_bytes: of(|name| !name.contains("_exps.")) + used as u64 })
}

fn arch(file: &Gguf) -> Option<&str> {
    file.metadata().str("general.architecture").ok().flatten()
}

fn is_drafter(file: &Gguf) -> bool {
    arch(file).is_some_and(|arch| DRAFTERS.iter().any(|kind| kind.recognises(arch)))
}

fn memory(file: &Arc<Gguf>, ctx: Option<u64>, n_ubatch: usize) -> Memory {
    let name = arch(file).ok_or("the file names no architecture")?;
    let (states, n_ctx_train) = if is_drafter(file) {
        drafter_states(file, name)?
    } else if ARCHS.iter().any(|known| known.name == name) {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).map_err(|e| e.to_string())?);
        let model =
            paceline_models::load(file, &backend).map_err(|e| format!("the model can't be loaded: {e}"))?;
        (model.states().to_vec(), model.hparams().n_ctx_train as u64)
    } else {
        let known: Vec<_> = ARCHS.iter().map(|arch| arch.name).collect();
        return Err(format!("architecture `{name}` is not supported; supported: {}", known.join(", ")));
    };
    let n_ctx = ctx.unwrap_or(n_ctx_train);
    let need = |kv: KvType, n| MemoryNeed::new(&states, kv.into(), n);
    let demand = Demand { n_cell: n_ctx, n_slot: 1, n_row: n_ubatch as u64 };
    let fits = |kv: &KvType| states.iter().all(|state| state.check_kv((*kv).into()).is_ok());
    Ok(MemoryTable {
        n_ctx,
        n_ctx_train,
        weights: file.tensors().iter().map(|tensor| tensor.n_bytes).sum(),
        kv: KvType::ALL
            .into_iter()
            .filter(fits)
            .map(|kv| (kv.name(), need(kv, 0).context_bytes(demand)))
            .collect(),
        classes: need(KvType::F16, 0).classes,
        slot: need(KvType::F16, 0).slot_bytes,
        per_draft: need(KvType::F16, 1).slot_bytes - need(KvType::F16, 0).slot_bytes,
    })
}

/// What a server with the given sizes takes: the weights at once, the rest as it is used.
struct MemoryPlan {
    sizes: Sizes,
    weights: u64,
    weights_draft: u64,
    target: MemoryNeed,
    drafter: Option<MemoryNeed>,
    /// Of the target's own prediction head, if it drafts.
    head: Option<MemoryNeed>,
}

impl MemoryPlan {
    fn new(args: &InspectArgs, file: &Arc<Gguf>) -> Result<MemoryPlan> {
        anyhow::ensure!(
            !is_drafter(file),
            "{}: --plan: expected a target, found a drafter\nhint: give the target, and the drafter with -md",
            file.name()
        );
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1)?);
        let model = paceline_models::load(file, &backend)?;
        let sizes = Sizes::new(&args.sizes, &*model, false)?;
        let weights = |file: &Gguf| file.tensors().iter().map(|tensor| tensor.n_bytes).sum();
        let drafter_file = args.model_draft.as_ref().map(Gguf::open).transpose()?.map(Arc::new);
        let drafter = match &drafter_file {
            Some(file) => {
                let name = arch(file).context("the drafter's file names no architecture")?;
                let states = match is_drafter(file) {
                    true => drafter_states(file, name).map_err(anyhow::Error::msg)?.0,
                    false => paceline_models::load(file, &backend)?.states().to_vec(),
                };
                Some(MemoryNeed::new(&states, sizes.kv_draft, 1))
            }
            None => None,
        };
        let flags = ModelFlags { spec_type: args.spec_type.clone(), ..ModelFlags::default() };
        let kinds = flags.drafter_kinds()?.unwrap_or_default();
        let has_head = kinds.iter().any(|kind| matches!(kind.origin, Origin::Target));
        let head = match has_head {
            true => {
                let name = arch(file).context("the file names no architecture")?;
                let w = Weights::new(file.clone(), backend.clone(), name);
                let head = model.prediction_head(&w)?.with_context(|| {
                    format!("{}: --spec-type draft-mtp: the file has no prediction head", file.name())
                })?;
                Some(MemoryNeed::new(std::slice::from_ref(head.state()), sizes.kv_draft, 0))
            }
            false => None,
        };
        let n_draft = if drafter.is_some() || head.is_some() { sizes.n_draft_max } else { 0 };
        Ok(MemoryPlan {
            weights: weights(file),
            weights_draft: drafter_file.as_ref().map_or(0, |file| weights(file)),
            target: MemoryNeed::new(model.states(), sizes.kv, n_draft),
            drafter,
            head,
            sizes,
        })
    }

    /// Bytes of full slots: cells, recurrent states, the drafter's cells.
    fn full(&self) -> [u64; 3] {
        let cells = |need: &MemoryNeed| need.context_bytes(self.sizes.demand());
        let drafters = self.drafters().map(cells).sum();
        [cells(&self.target), self.slot_bytes().saturating_mul(self.sizes.n_slot as u64), drafters]
    }

    fn drafters(&self) -> impl Iterator<Item = &MemoryNeed> {
        self.drafter.iter().chain(&self.head)
    }

    /// Bytes of recurrent states of a slot. A small model that drafts forks its own, which makes two.
    fn slot_bytes(&self) -> u64 {
        self.target.slot_bytes + 2 * self.drafter.as_ref().map_or(0, |need| need.slot_bytes)
    }

    fn total(&self) -> u64 {
        let cache = self.sizes.cache.n_byte_max as u64;
        self.full()
            .into_iter()
            .fold(self.weights + self.weights_draft, u64::saturating_add)
            .saturating_add(cache)
    }

    fn print(&self) -> Result<()> {
        let Sizes { n_slot, n_ctx, n_cell, cache, .. } = self.sizes;
        let [cells, slots, drafter] = self.full();
        let drafters_cell: u64 = self.drafters().map(MemoryNeed::cell_bytes).sum();
        say(format_args!(
            "memory of {n_slot} slots, each with a context of {n_ctx} tokens, {n_cell} tokens in all"
        ))?;
        let line = |what: &str, most: u64, words: String| {
            say(format_args!("  {what:<17} {:>10}  {words}", bytes(most)))
        };
        line("weights", self.weights + self.weights_draft, "at once".to_string())?;
        line("KV cells", cells, format!("as used, {}", per_token(&self.target)))?;
        line(
            "recurrent states",
            slots,
            format!("as used, {} a slot, its drafts included", bytes(self.slot_bytes())),
        )?;
        line("drafter's cells", drafter, format!("as used, {} a token", bytes(drafters_cell)))?;
        match cache.n_byte_max {
            usize::MAX => say(format_args!("  {:<17} {:>10}  --cache-ram -1", "prompt cache", "no limit"))?,
            n => line(
                "prompt cache",
                n as u64,
                "as used, beyond what running requests use (--cache-ram)".to_string(),
            )?,
        }
        match cache.n_byte_max {
            usize::MAX => Ok(()),
            _ => line("at most", self.total(), "and what a step computes with".to_string()),
        }
    }

    fn to_json(&self) -> Value {
        let Sizes { n_slot, n_ctx, n_cell, cache, .. } = self.sizes;
        let [cells, slots, drafter] = self.full();
        json!({
            "n_slot": n_slot,
            "n_ctx": n_ctx,
            "n_cell": n_cell,
            "weights_bytes": self.weights + self.weights_draft,
            "kv_bytes": cells,
            "kv_token_bytes": self.target.cell_bytes(),
            "kv_far_token_bytes": self.target.far_cell_bytes(),
            "recurrent_bytes": slots,
            "recurrent_slot_bytes": self.slot_bytes(),
            "drafter_kv_bytes": drafter,
            "drafter_kv_token_bytes": self.drafters().map(MemoryNeed::cell_bytes).sum::<u64>(),
            "cache_bytes": (cache.n_byte_max != usize::MAX).then_some(cache.n_byte_max),
            "total_bytes": (cache.n_byte_max != usize::MAX).then(|| self.total()),
        })
    }
}

/// `82 kB a token`, and what it comes to once windows are full.
fn per_token(need: &MemoryNeed) -> String {
    match need.far_cell_bytes() {
        far if far == need.cell_bytes() => format!("{} a token", bytes(far)),
        far => format!("{} a token, {} once windows are full", bytes(need.cell_bytes()), bytes(far)),
    }
}

/// A drafter keeps keys and values of each of its layers and nothing else.
fn drafter_states(file: &Gguf, arch: &str) -> Result<(Vec<StateDecl>, u64), String> {
    if looks_at_target(file) {
        let n_ctx = file.metadata().u32(&format!("{arch}.context_length")).ok().flatten();
        return Ok((Vec::new(), n_ctx.unwrap_or(0).into()));
    }
    let count = |suffix: &str| -> Result<usize, String> {
        let key = format!("{arch}.{suffix}");
        let n = file.metadata().require_u32(&key).map_err(|e| e.to_string())?;
        if n > 1 << 20 { Err(format!("`{key}`: {n} can't be right")) } else { Ok(n as usize) }
    };
    let n_head = count("attention.head_count_kv").or_else(|_| count("attention.head_count"))?;
    let head_dim = match count("attention.key_length") {
        Ok(n) => n,
        Err(_) => count("embedding_length")? / count("attention.head_count")?.max(1),
    };
    let n_layer = count("block_count")?.min(4096);
    let window = count("attention.sliding_window").ok().filter(|&n| n > 0);
    let key = format!("{arch}.attention.sliding_window_pattern");
    // A window without a pattern is every layer's.
    let sliding = file.metadata().bool_array(&key).ok().flatten().unwrap_or_default();
    let window = |il: usize| window.filter(|_| sliding.get(il).copied().unwrap_or(sliding.is_empty()));
    let states = (0..n_layer).map(|il| StateDecl::Kv { n_head, head_dim, window: window(il) });
    Ok((states.collect(), count("context_length").unwrap_or(0) as u64))
}

/// True of a drafter without keys and values of its own, between projections from and to the target's width.
fn looks_at_target(file: &Gguf) -> bool {
    let names = ["nextn.pre_projection", "mtp.pre_projection", "mtp_pre_proj"];
    names.iter().any(|name| file.tensor(&format!("{name}.weight")).is_some())
}

/// The contract of a drafter: checked against a target, or what the file alone says. None for other files.
fn contract(file: &Arc<Gguf>, target: Option<&PathBuf>) -> Result<Option<String>> {
    if !is_drafter(file) {
        anyhow::ensure!(
            target.is_none(),
            "{}: --target: expected a drafter to check against it, found architecture `{}`",
            file.name(),
            arch(file).unwrap_or("none")
        );
        return Ok(None);
    }
    let Some(target) = target else { return Ok(Some(contract_alone(file))) };
    let target_file = Arc::new(Gguf::open(target)?);
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1)?);
    let model = paceline_models::load(&target_file, &backend)?;
    crate::load::check_pair(&target_file, &target_vocab(&target_file)?, file)?;
    let target_states = backend.alloc_states(model.states(), StateConfig::default())?;
    let drafter = paceline_spec::load(&LoadDrafter {
        file: file.clone(),
        backend: &backend,
        target: &*model,
        target_states: &target_states,
        states: StateConfig::default(),
        n_cell_max: 0,
        n_draft_max: None,
    })?;
    Ok(Some(drafter.contract()))
}

fn target_vocab(file: &Gguf) -> Result<paceline_text::Vocab> {
    paceline_text::Vocab::from_metadata(file.metadata())
        .with_context(|| format!("{}: the tokenizer can't be used", file.name()))
}

/// Keys that a contract is made of, as far as they are there.
fn contract_alone(file: &Gguf) -> String {
    const PARTS: &[(&str, &[&str])] = &[
        ("number of taps", &["dflash.n_target_layers"]),
        ("block", &["block_size", "dflash.block_size"]),
        ("mask token", &["mask_token_id", "dflash.mask_token_id"]),
        ("layers", &["block_count"]),
        ("target width", &["target_hidden_size", "embedding_length_out", "n_embd_backbone"]),
        ("target features", &["dflash.n_target_features"]),
        ("window", &["attention.sliding_window"]),
        ("window pattern", &["attention.sliding_window_pattern"]),
        ("causal", &["attention.causal"]),
        ("rope base", &["rope.freq_base"]),
    ];
    let meta = file.metadata();
    let name = arch(file).unwrap_or("?");
    let mut parts = vec![format!("arch {name}")];
    let fc = ["fc", "dflash_fc", "dflash.fc"]
        .into_iter()
        .find(|fc| file.tensor(&format!("{fc}.weight")).is_some());
    parts.extend(fc.map(|fc| format!("tensors {fc}")));
    parts.extend(taps_alone(meta, name, fc));
    for (what, suffixes) in PARTS {
        let prefixes = [name, "dflash", "dflash-draft"];
        let keys = prefixes
            .iter()
            .flat_map(|prefix| suffixes.iter().map(move |suffix| format!("{prefix}.{suffix}")));
        let keys = keys.chain((*what == "mask token").then(|| "tokenizer.ggml.mask_token_id".to_string()));
        if let Some(value) = keys.into_iter().find_map(|key| meta.get(&key).cloned()) {
            parts.push(format!("{what} {}", shown(&value, false)));
        }
    }
    if let Some(map) = file.tensor("d2t") {
        parts.push(format!("own vocabulary of {} tokens", map.n_elements()));
    }
    let ends = match looks_at_target(file) {
        // Its table is its head.
        true => [("embedding", "embedding"), ("head", "token_embd.weight")],
        false => [("embedding", "token_embd.weight"), ("head", "output.weight")],
    };
    for (what, tensor) in ends {
        let own = if file.tensor(tensor).is_some() { "own" } else { "target's" };
        parts.push(format!("{what} {own}"));
    }
    format!("{}; not checked: give its target with --target", parts.join(", "))
}

/// The tapped layers, counted as the contract counts them where the key settles that: `target_layers` has the embedding
/// as layer 0, `target_layer_ids` has not, but for the files whose writers disagree.
fn taps_alone(meta: &Metadata, arch: &str, fc: Option<&str>) -> Option<String> {
    let list = |key: &str| {
        let keys = [arch, "dflash", "dflash-draft"]
            .into_iter()
            .flat_map(|prefix| [format!("{prefix}.{key}"), format!("{prefix}.dflash.{key}")]);
        keys.into_iter().find_map(|key| meta.u32_array(&key).ok().flatten())
    };
    if let Some(taps) = list("target_layers") {
        let from_0: Option<Vec<u32>> = taps.iter().map(|tap| tap.checked_sub(1)).collect();
        return Some(from_0.map_or_else(
            || format!("taps as written {taps:?}, which should begin at 1"),
            |taps| format!("taps {taps:?} (from 0)"),
        ));
    }
    let taps = list("target_layer_ids")?;
    let is_open = arch == "dflash" && fc == Some("fc");
    Some(format!(
        "taps {taps:?} ({})",
        if is_open { "from 0 or from 1, depending on the writer" } else { "from 0" }
    ))
}

fn shown(value: &MetaValue, full: bool) -> String {
    let (n_element, n_char) = if full { (usize::MAX, usize::MAX) } else { (MAX_ELEMENTS, MAX_CHARS) };
    match value {
        MetaValue::Array(array) => {
            let few: Vec<String> =
                array.iter().take(n_element).map(|x| cut(&escaped(&x), 24.max(n_char / 4))).collect();
            let more =
                if array.len() > n_element { format!(", … {} in all", array.len()) } else { String::new() };
            format!("[{}{more}]", few.join(", "))
        }
        other => cut(&escaped(other), n_char),
    }
}

/// Text with control characters spelled out: a file must not steer the terminal.
fn escaped(value: &MetaValue) -> String {
    let text = value.to_string();
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

fn cut(text: &str, n_char: usize) -> String {
    match text.char_indices().nth(n_char) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_string(),
    }
}

fn by_type(file: &Gguf) -> BTreeMap<GgmlType, (usize, u64, u64)> {
    let mut types = BTreeMap::new();
    for tensor in file.tensors() {
        let (n, n_elements, n_bytes) = types.entry(tensor.ty).or_insert((0, 0, 0));
        (*n, *n_elements, *n_bytes) = (*n + 1, *n_elements + tensor.n_elements(), *n_bytes + tensor.n_bytes);
    }
    types
}

fn print(args: &InspectArgs, file: &Gguf, memory: &Memory, contract: &Option<String>) -> Result<()> {
    let names: Vec<_> = file.file_names().collect();
    say(format_args!(
        "{}: GGUF v{}, {}, {} weights, {} tensors",
        names.join(", "),
        file.version(),
        bytes(file.file_bytes()),
        short(n_params(file) as f64),
        file.tensors().len()
    ))?;
    say(format_args!("\nmetadata"))?;
    let width = file.metadata().keys().map(str::len).max().unwrap_or(0).min(48);
    for (key, value) in file.metadata().iter() {
        say(format_args!("  {key:width$} {}", shown(value, args.full)))?;
    }
    say(format_args!("\ntensors by type"))?;
    for (ty, (n, n_elements, n_bytes)) in by_type(file) {
        say(format_args!(
            "  {ty:<8} {n:>5} tensors {:>10} weights {:>10}",
            short(n_elements as f64),
            bytes(n_bytes)
        ))?;
    }
    if args.tensors {
        say(format_args!("\ntensors"))?;
        let width = file.tensors().iter().map(|tensor| tensor.name.len()).max().unwrap_or(0).min(64);
        for tensor in file.tensors() {
            let name = escaped(&MetaValue::from(tensor.name.as_str()));
            let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
            say(format_args!(
                "  {name:width$} {:<8} {:>20} {:>10}",
                tensor.ty,
                shape.join(" × "),
                bytes(tensor.n_bytes)
            ))?;
        }
    }
    match memory {
        Ok(table) => {
            say(format_args!(
                "\nmemory at a context of {} tokens (trained for {})",
                table.n_ctx, table.n_ctx_train
            ))?;
            say(format_args!("  weights            {:>10}", bytes(table.weights)))?;
            if let Some(Experts { n_expert, n_used, bytes: n, token_bytes }) = experts(file) {
                say(format_args!(
                    "  of these, experts  {:>10}, {n_used} of {n_expert} for a token, which reads {} in all",
                    bytes(n),
                    bytes(token_bytes)
                ))?;
            }
            for (name, n_bytes) in &table.kv {
                say(format_args!("  KV cells, {name:<8} {:>10}", bytes(*n_bytes)))?;
            }
            for (window, cell) in table.classes.iter().filter(|_| table.classes.len() > 1) {
                let which = window.map_or("all cells".to_string(), |n| format!("the last {n}"));
                say(format_args!("  layers that keep {which}: {} a token in f16", bytes(*cell)))?;
            }
            say(format_args!(
                "  recurrent state    {:>10} a slot, {} more for each drafted token",
                bytes(table.slot),
                bytes(table.per_draft)
            ))?;
        }
        Err(why) => say(format_args!("\nmemory: not known: {why}"))?,
    }
    if let Some(contract) = contract {
        say(format_args!("\ncontract\n  {contract}"))?;
    }
    Ok(())
}

fn to_json(args: &InspectArgs, file: &Gguf, memory: &Memory, contract: &Option<String>) -> Value {
    let tensors = args.tensors.then(|| {
        let one = |tensor: &paceline_gguf::TensorInfo| {
            json!({ "name": tensor.name, "shape": tensor.shape, "type": tensor.ty.name(), "bytes": tensor.n_bytes })
        };
        file.tensors().iter().map(one).collect::<Vec<_>>()
    });
    let memory = match memory {
        Ok(table) => json!({
            "n_ctx": table.n_ctx,
            "n_ctx_train": table.n_ctx_train,
            "weights_bytes": table.weights,
            "kv_bytes": table.kv.iter().map(|(name, n)| (name.to_string(), json!(n))).collect::<serde_json::Map<_, _>>(),
            "kv_classes": table.classes.iter().map(|(window, cell)| json!({ "window": window, "cell_bytes_f16": cell })).collect::<Vec<_>>(),
            "slot_bytes": table.slot,
            "draft_row_bytes": table.per_draft,
        }),
        Err(why) => json!({ "unknown": why }),
    };
    let experts = experts(file).map(
        |e| json!({ "count": e.n_expert, "used": e.n_used, "bytes": e.bytes, "token_bytes": e.token_bytes }),
    );
    json!({
        "files": file.file_names().collect::<Vec<_>>(),
        "version": file.version(),
        "file_bytes": file.file_bytes(),
        "n_params": n_params(file),
        "n_tensors": file.tensors().len(),
        "metadata": file.metadata().iter().map(|(k, v)| (k.to_string(), json_value(v, args.full))).collect::<serde_json::Map<_, _>>(),
        "types": by_type(file).iter().map(|(ty, (n, n_elements, n_bytes))| {
            (ty.name().to_string(), json!({ "n_tensors": n, "n_params": n_elements, "bytes": n_bytes }))
        }).collect::<serde_json::Map<_, _>>(),
        "tensors": tensors,
        "memory": memory,
        "experts": experts,
        "contract": contract,
    })
}

/// As JSON; of long arrays the first elements and the length.
fn json_value(value: &MetaValue, full: bool) -> Value {
    match value {
        MetaValue::Bool(x) => json!(x),
        MetaValue::F32(x) => json!(x),
        MetaValue::F64(x) => json!(x),
        MetaValue::String(text) => json!(String::from_utf8_lossy(text)),
        MetaValue::Array(array) => {
            let n = if full { usize::MAX } else { MAX_ELEMENTS };
            let few: Vec<Value> = array.iter().take(n).map(|x| json_value(&x, full)).collect();
            if array.len() > n { json!({ "first": few, "len": array.len() }) } else { json!(few) }
        }
        int => match int.as_int() {
            Some(n) => i64::try_from(n).map_or_else(|_| json!(n as u64), |n| json!(n)),
            None => Value::Null,
        },
    }
}
