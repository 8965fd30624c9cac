//! Hugging Face directories to GGUF files.
//!
//! ```text
//! config.json ───────┐
//! *.safetensors ─────┼─ family → recipe: keys, and for each tensor its source and layout ─┬─ types ─→ file
//! tokenizer.json … ──┘                                                                    └─ rows: read, reorder, quantise
//! ```
//!
//! Everything that can be wrong with a checkpoint is found while the recipe is written, before the first byte of output;
//! then tensors stream through, some rows at a time, in the memory of a few rows. A tensor of the checkpoint that no family
//! names stops the conversion: leaving it out would change the model without a word.
//!
//! A family is one file under `families/` and one line in its registry. Key and tensor names are those that llama.cpp and
//! its relatives read.
//!
//! [`synth`] writes models of known sizes with random weights, for measuring. [`quantize`] gives the tensors of a GGUF file
//! other types; all three ask `types` which.
#![forbid(unsafe_code)]

mod checkpoint;
mod config;
mod error;
mod families;
mod importance;
mod layout;
pub mod quantize;
mod recipe;
pub mod synth;
mod tokenizer;
mod types;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

use paceline_gguf::{GgmlType, Metadata, TensorSink, Writer};
use paceline_kernels::formats::quantize_rows;

use checkpoint::{Checkpoint, read_config};
pub use error::Error;
use families::{FAMILIES, Target, text_config};
pub use importance::{Importances, Sums, write_importances};
use recipe::{Recipe, Source, Tensor};

/// What to convert, and to what.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The Hugging Face directory: `config.json`, safetensors, tokenizer.
    pub hf_dir: PathBuf,
    /// The GGUF file to write. It appears when it is complete, in place of an older one.
    pub out: PathBuf,
    /// The mix of types: `f32`, `bf16`, `q8_0`, `q4_k_m` … ([`MIXES`](paceline_kernels::formats::mix::MIXES)).
    pub ty: String,
    /// For a drafter, the directory of its target: supplies the tokenizer, and the two are checked against each other.
    pub target_dir: Option<PathBuf>,
    /// The pre-tokenizer's name where the tokenizer's own pattern is not a known one.
    pub pre_tokenizer: Option<String>,
}

impl ConvertOptions {
    /// Converts `hf_dir` to `out` with every value at 32 bits.
    pub fn new(hf_dir: impl Into<PathBuf>, out: impl Into<PathBuf>) -> ConvertOptions {
        ConvertOptions {
            hf_dir: hf_dir.into(),
            out: out.into(),
            ty: "f32".into(),
            target_dir: None,
            pre_tokenizer: None,
        }
    }
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor that comes next.
    pub tensor: &'a str,
    /// Bytes of tensor data written so far.
    pub done_bytes: u64,
    /// Bytes of tensor data in all.
    pub total_bytes: u64,
}

/// What has been written, and what has not.
#[derive(Clone, Debug)]
pub struct Report {
    /// `general.architecture` of the file.
    pub arch: &'static str,
    /// Size of the file.
    pub file_bytes: u64,
    /// Parameters of the model.
    pub n_params: u64,
    /// Number of tensors of each type.
    pub types: BTreeMap<GgmlType, usize>,
    /// Tensors of the checkpoint that the file does not have.
    pub skipped: Vec<Skipped>,
    /// What the user may want to know: things that the file can't express.
    pub notes: Vec<String>,
}

/// A tensor that was left out on purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its name in the checkpoint.
    pub tensor: String,
    /// Why.
    pub reason: &'static str,
}

/// The names that Hugging Face configs give to the architectures that can be converted.
pub fn supported_architectures() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|family| family.architectures).copied().collect()
}

/// Converts a directory. `progress` is called before each tensor and once at the end.
pub fn convert(options: &ConvertOptions, mut progress: impl FnMut(Progress)) -> Result<Report, Error> {
    let mix = types::find(&options.ty)?;
    let checkpoint = Checkpoint::open(&options.hf_dir)?;
    let family = families::find(&checkpoint.config)?;
    let target = match &options.target_dir {
        Some(dir) if family.drafts => Some(Target { dir, config: text_config(&read_config(dir)?) }),
        Some(_) => {
            let expected = "a drafter, as a target is given";
            return Err(checkpoint.config.error("architectures", expected, "convert a target without one"));
        }
        None => None,
    };

    let mut recipe = Recipe::new(&checkpoint, family.arch);
    write_general_keys(&mut recipe, options, mix.file_type);
    (family.write)(&mut recipe, &text_config(&checkpoint.config), target.as_ref())?;
    recipe.check_complete()?;
    write_tokenizer(&mut recipe, family.drafts, options)?;

    let shapes = recipe.tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.shape[..]));
    let mut types = types::assign(mix, &recipe.metadata, shapes)?;
    for (tensor, ty) in recipe.tensors.iter().zip(&mut types) {
        if matches!(tensor.source, Source::Integers(_)) {
            *ty = GgmlType::I32;
        }
    }
    let Recipe { arch, metadata, tensors, skipped, notes, .. } = recipe;
    write_file(&options.out, metadata, &checkpoint, &tensors, &types, &mut progress)?;

    let mut report = Report {
        arch,
        file_bytes: std::fs::metadata(&options.out).map_err(Error::io(&options.out, "read"))?.len(),
        n_params: tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum(),
        types: BTreeMap::new(),
        skipped,
        notes,
    };
    for ty in types {
        *report.types.entry(ty).or_default() += 1;
    }
    Ok(report)
}

fn write_general_keys(recipe: &mut Recipe, options: &ConvertOptions, file_type: u32) {
    let metadata = &mut recipe.metadata;
    metadata.insert("general.architecture", recipe.arch);
    metadata.insert("general.type", "model");
    let dir = options.hf_dir.canonicalize();
    let name = dir.ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    metadata.insert("general.name", name.unwrap_or_else(|| recipe.arch.to_string()));
    metadata.insert("general.file_type", file_type);
    metadata.insert("general.quantization_version", 2u32);
}

/// A drafter speaks its target's tokens, so its tokenizer is the target's; it may go without.
fn write_tokenizer(recipe: &mut Recipe, drafts: bool, options: &ConvertOptions) -> Result<(), Error> {
    let dir = options.target_dir.as_deref().unwrap_or(&options.hf_dir);
    if drafts && options.target_dir.is_none() && !tokenizer::exists(dir) {
        recipe
            .notes
            .push("no tokenizer: give the drafter's target, and the file can be checked against it".into());
        return Ok(());
    }
    let tokenizer = tokenizer::read(dir, recipe.n_vocab, options.pre_tokenizer.as_deref())?;
    for (key, value) in tokenizer.keys {
        // What the model's own config says, such as a drafter's mask token, stays.
        if !recipe.metadata.contains(&key) {
            recipe.metadata.insert(key, value);
        }
    }
    recipe.notes.extend(tokenizer.notes);
    Ok(())
}

fn write_file(
    out: &Path,
    metadata: Metadata,
    checkpoint: &Checkpoint,
    tensors: &[Tensor],
    types: &[GgmlType],
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    let mut writer = Writer::new(metadata)?;
    for (tensor, &ty) in tensors.iter().zip(types) {
        writer.add_tensor(&tensor.name, &tensor.shape, ty)?;
    }
    let total_bytes = writer.tensors().iter().map(|spec| spec.n_bytes).sum();
    let mut done_bytes = 0;
    let mut sources = tensors.iter();
    writer.write_file::<Error>(out, |spec, sink| {
        progress(Progress { tensor: &spec.name, done_bytes, total_bytes });
        let tensor = sources.next().expect("the writer asks for as many tensors as it was given");
        write_tensor(checkpoint, tensor, spec.ty, sink)?;
        done_bytes += spec.n_bytes;
        Ok(())
    })?;
    progress(Progress { tensor: "", done_bytes, total_bytes });
    Ok(())
}

/// Streams one tensor, a few rows at a time.
fn write_tensor(
    checkpoint: &Checkpoint,
    tensor: &Tensor,
    ty: GgmlType,
    sink: &mut TensorSink,
) -> Result<(), Error> {
    const CHUNK_LEN: usize = 1 << 22;
    match &tensor.source {
        Source::Integers(numbers) => {
            sink.put(&numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>())?
        }
        Source::Values(values) => sink.put(&quantize_rows(ty, values.len(), values))?,
        Source::Checkpoint { tensors, row_len, layout } => {
            let rows = tensors.iter().map(|tensor| checkpoint.rows(tensor, *row_len));
            let rows = rows.collect::<Result<Vec<_>, _>>()?;
            let n_row = tensor.shape.iter().product::<u64>() as usize / row_len;
            let n_chunk = (CHUNK_LEN / row_len).max(1);
            let mut values = Vec::with_capacity(n_chunk.min(n_row) * row_len);
            for first in (0..n_row).step_by(n_chunk) {
                values.clear();
                for i in first..(first + n_chunk).min(n_row) {
                    let source = layout.rows.source(i);
                    let (at, row) = (source / rows[0].len(), source % rows[0].len());
                    layout.convert_row(&rows[at].row(row)?, &mut values);
                }
                for part in quantize(ty, *row_len, &values) {
                    sink.put(&part)?;
                }
            }
        }
    }
    Ok(())
}

/// The rows' bytes, made by all cores: some types search long for the best scales. The parts are in order, and how the
/// rows were divided leaves no trace in them.
fn quantize(ty: GgmlType, row_len: usize, values: &[f32]) -> Vec<Vec<u8>> {
    in_parts(0, row_len, row_len, values, |part| quantize_rows(ty, row_len, part))
}

/// Works on rows of `row_len` things, `n_value` values each, on `n_thread` threads (0 for all cores). Results are in order.
fn in_parts<T: Sync, R: Send>(
    n_thread: usize,
    row_len: usize,
    n_value: usize,
    rows: &[T],
    work: impl Fn(&[T]) -> R + Sync,
) -> Vec<R> {
    const MIN_LEN: usize = 1 << 14;
    let n_thread = match n_thread {
        0 => thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    let n_row = (rows.len() / row_len).div_ceil(n_thread).max(MIN_LEN.div_ceil(n_value));
    let work = &work;
    thread::scope(|scope| {
        let running: Vec<_> =
            rows.chunks(n_row * row_len).map(|part| scope.spawn(move || work(part))).collect();
        running.into_iter().map(|part| part.join().expect("whole rows can be quantised")).collect()
    })
}
