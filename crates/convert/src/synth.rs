//! Models of real sizes with random weights, for measuring.
//!
//! What a forward costs depends on shapes and types and not on what the numbers say, so a model that nobody has to download
//! measures as well as a trained one. Sizes are those of published models ([`SHAPES`]), types those of a mix, tensor by
//! tensor as a conversion would choose them; weights have mean 0 and a deviation of about `1/√n_in`, so that activations
//! stay near 1 and logits are finite and no two alike. The vocabulary has the model's size, with a small real tokenizer in it.
//!
//! ```text
//! name[:N] ─▶ Shape ─▶ Draft: keys and tensors ─▶ types ─▶ Writer ◀─ Noise: quant blocks drawn from small pools
//! ```
//!
//! A name is a shape's, `:N` keeps its first `N` layers, and `dflash:` in front asks for a drafter of that target. The bytes
//! follow from name, mix and seed alone. Nothing is ever held but a few pools and a megabyte of rows.

mod noise;
mod shapes;
mod tensors;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use paceline_gguf::Writer;

pub use shapes::{DRAFTERS, DrafterShape, Layers, SHAPES, Shape};

use crate::{Error, Progress, Report, types};
use noise::Noise;
use tensors::Draft;

/// What to make up, and where.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// The shape: `qwen3-0.6b`, `qwen3.6-27b:8`, `dflash:qwen3-0.6b`.
    pub shape: String,
    /// The mix of types, as for [`convert`](crate::convert()).
    pub ty: String,
    /// The file to write. It appears when it is complete, in place of an older one.
    pub out: PathBuf,
    /// What the weights follow from.
    pub seed: u64,
}

impl SynthOptions {
    /// `shape` in the mix `ty` to `out`, with seed 0.
    pub fn new(shape: impl Into<String>, ty: impl Into<String>, out: impl AsRef<Path>) -> SynthOptions {
        SynthOptions { shape: shape.into(), ty: ty.into(), out: out.as_ref().to_owned(), seed: 0 }
    }
}

/// Writes a file of the shape without weights: keys, tensors and their places, and a hole where the data would be.
pub fn outline(options: &SynthOptions) -> Result<(), Error> {
    writer(options).and_then(|(writer, _)| Ok(writer.write_outline(&options.out)?))
}

/// What may be asked for, for messages and help.
pub fn known_shapes() -> String {
    let mut names: Vec<String> = SHAPES.iter().map(|shape| shape.name.to_string()).collect();
    names.extend(DRAFTERS.iter().map(|drafter| format!("{DRAFTER_PREFIX}{}", drafter.target)));
    names.join(", ")
}

const DRAFTER_PREFIX: &str = "dflash:";

/// Writes a model of the shape. `progress` is called before each tensor and once at the end.
pub fn synthesize(options: &SynthOptions, mut progress: impl FnMut(Progress)) -> Result<Report, Error> {
    let (writer, draft) = writer(options)?;
    let total_bytes = writer.tensors().iter().map(|spec| spec.n_bytes).sum();
    let mut noise = Noise::new(options.seed);
    let mut done_bytes = 0;
    let mut values = draft.tensors.iter().map(|tensor| tensor.values);
    writer.write_file::<Error>(&options.out, |spec, sink| {
        progress(Progress { tensor: &spec.name, done_bytes, total_bytes });
        noise.write(spec, values.next().expect("one for each tensor"), sink)?;
        done_bytes += spec.n_bytes;
        Ok(())
    })?;
    progress(Progress { tensor: "", done_bytes, total_bytes });

    let mut counts = BTreeMap::new();
    for spec in writer.tensors() {
        *counts.entry(spec.ty).or_default() += 1;
    }
    Ok(Report {
        arch: draft.arch,
        file_bytes: std::fs::metadata(&options.out).map_err(Error::io(&options.out, "read"))?.len(),
        n_params: draft.tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum(),
        types: counts,
        skipped: Vec::new(),
        notes: Vec::new(),
    })
}

/// The file, and what goes into it.
fn writer(options: &SynthOptions) -> Result<(Writer, Draft), Error> {
    let mix = types::find(&options.ty)?;
    let mut draft = draft(&options.shape)?;
    draft.metadata.insert("general.file_type", mix.file_type);
    let shapes = draft.tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.shape[..]));
    let types = types::assign(mix, &draft.metadata, shapes)?;
    let mut writer = Writer::new(draft.metadata.clone())?;
    for (tensor, &ty) in draft.tensors.iter().zip(&types) {
        writer.add_tensor(&tensor.name, &tensor.shape, ty)?;
    }
    Ok((writer, draft))
}

fn draft(name: &str) -> Result<Draft, Error> {
    match name.strip_prefix(DRAFTER_PREFIX) {
        None => Ok(Draft::target(&shape(name, name)?)),
        Some(target) => {
            let target = shape(target, name)?;
            let drafter = DRAFTERS.iter().find(|drafter| drafter.target == target.name);
            Ok(Draft::drafter(drafter.ok_or_else(|| unknown(name))?, &target))
        }
    }
}

/// The shape that `name[:N]` stands for; `asked` is what a message calls it.
fn shape(name: &str, asked: &str) -> Result<Shape, Error> {
    let (name, n_layer) = match name.split_once(':') {
        Some((name, n_layer)) => (name, Some(n_layer)),
        None => (name, None),
    };
    let mut shape = *SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| unknown(asked))?;
    if let Some(found) = n_layer {
        let n_layer = found.parse().ok().filter(|n| (1..=shape.n_layer).contains(n));
        shape.n_layer = n_layer.ok_or_else(|| Error::BadCut {
            name: asked.to_owned(),
            n_layer: shape.n_layer,
            found: found.to_owned(),
        })?;
    }
    Ok(shape)
}

fn unknown(name: &str) -> Error {
    Error::UnknownShape { name: name.to_owned(), known: known_shapes() }
}
