//! A GGUF file with the weights of another one in other types.
//!
//! ```text
//! file ─ plan: the type of each tensor, sizes ─▶ write: rows dequantised and quantised by all threads, tensor by tensor
//!                  ▲ mix, wishes, importances
//! ```
//!
//! Everything that can be wrong is found while planning, before the first byte of output. Then tensors stream through in
//! the memory of some rows; pages of the source are given back behind each. Metadata stays as it is, except for what names the
//! types. Any file with named tensors will do, drafters and files with prediction heads included: what is no matrix, and the
//! small matrices that decide much, stay as they are, bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use paceline_gguf::{GgmlType, Gguf, Metadata, TensorInfo, TensorSink, Writer};
use paceline_kernels::formats::{Format, format, quantize_rows, quantize_rows_weighted};
use regex_lite::Regex;

use crate::types::{self, Types};
use crate::{Error, Importances, Progress, in_parts};

/// What to quantise, and to what.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// The mix of types: `q4_k_m`, `q8_0` … ([`MIXES`](paceline_kernels::formats::mix::MIXES)); `copy` changes no type.
    pub ty: String,
    /// Importances of columns.
    pub importances: Option<PathBuf>,
    /// The mix's base type for all tensors that it would quantise.
    pub pure: bool,
    /// The type of `output.weight`, and of the embedding where that is the head too.
    pub output_type: Option<GgmlType>,
    /// The type of the token embeddings.
    pub embedding_type: Option<GgmlType>,
    /// Types of tensors by a regular expression that is looked for in their names; the first that matches counts.
    pub tensor_types: Vec<(String, GgmlType)>,
    /// `output.weight` stays as it is.
    pub leave_output: bool,
    /// Tensors that are quantised already may be quantised again, which adds error to error.
    pub allow_requantize: bool,
    /// Threads, 0 for one per core.
    pub n_thread: usize,
}

impl QuantizeOptions {
    /// The mix `ty`, and nothing else.
    pub fn new(ty: impl Into<String>) -> QuantizeOptions {
        QuantizeOptions {
            ty: ty.into(),
            importances: None,
            pure: false,
            output_type: None,
            embedding_type: None,
            tensor_types: Vec::new(),
            leave_output: false,
            allow_requantize: false,
            n_thread: 0,
        }
    }
}

/// What becomes of one tensor.
#[derive(Clone, Debug)]
pub struct TensorPlan {
    /// Its type in the source.
    pub from: GgmlType,
    /// Its new type.
    pub to: GgmlType,
    /// The type that it should have had, if its rows are not whole blocks of that.
    pub instead_of: Option<GgmlType>,
    /// Bytes in the new type.
    pub n_bytes: u64,
    /// Whether importances guide the fit.
    pub weighted: bool,
}

/// What will be written.
pub struct QuantizePlan {
    source: Gguf,
    importances: Option<Importances>,
    writer: Writer,
    tensors: Vec<TensorPlan>,
    n_thread: usize,
}

/// Works out the type of every tensor of `source`.
pub fn plan(source: Gguf, options: &QuantizeOptions) -> Result<QuantizePlan, Error> {
    let importances = options.importances.as_deref().map(Importances::open).transpose()?;
    let chosen = if options.ty.eq_ignore_ascii_case("copy") {
        vec![None; source.tensors().len()]
    } else {
        let shapes = source.tensors().iter().map(|tensor| (tensor.name.as_str(), &tensor.shape[..]));
        wishes(options)?.assign(source.metadata(), shapes)?
    };
    let mut tensors = Vec::with_capacity(chosen.len());
    for (tensor, chosen) in source.tensors().iter().zip(chosen) {
        let to = chosen.map_or(tensor.ty, |chosen| chosen.ty);
        if to != tensor.ty {
            check_types(&source, tensor, to, options.allow_requantize)?;
        }
        let weights = match &importances {
            Some(importances) if to != tensor.ty => {
                importances.of(&tensor.name, tensor.shape[0], n_matrix(tensor))?
            }
            _ => None,
        };
        tensors.push(TensorPlan {
            from: tensor.ty,
            to,
            instead_of: chosen.map(|chosen| chosen.wanted).filter(|&wanted| wanted != to),
            n_bytes: to.tensor_bytes(&tensor.shape).expect("a type is chosen to fit"),
            weighted: weights.is_some() && to.is_quantized(),
        });
    }
    if let Some(importances) = &importances {
        let changed = tensors.iter().any(|tensor| tensor.from != tensor.to && tensor.to.is_quantized());
        if changed && !tensors.iter().any(|tensor| tensor.weighted) {
            return Err(Error::Importance {
                file: importances.file().into(),
                what: "its tensors".into(),
                expected: format!("some of those of {}", source.name()),
                found: format!("{} others", importances.len()),
                hint: "it was made for another model",
            });
        }
    }
    let mut writer = Writer::new(metadata(&source, options, importances.as_ref())?)?;
    for (info, tensor) in source.tensors().iter().zip(&tensors) {
        writer.add_tensor(&info.name, &info.shape, tensor.to)?;
    }
    Ok(QuantizePlan { source, importances, writer, tensors, n_thread: options.n_thread })
}

fn wishes(options: &QuantizeOptions) -> Result<Types, Error> {
    let by_name = options.tensor_types.iter().map(|(pattern, ty)| match Regex::new(pattern) {
        Ok(regex) => Ok((regex, *ty)),
        Err(source) => Err(Error::Pattern { pattern: pattern.clone(), source }),
    });
    Ok(Types {
        pure: options.pure,
        weighted: options.importances.is_some(),
        output: options.output_type,
        embedding: options.embedding_type,
        by_name: by_name.collect::<Result<_, _>>()?,
        leaves_output: options.leave_output,
        ..Types::of(types::find(&options.ty)?)
    })
}

fn check_types(source: &Gguf, tensor: &TensorInfo, to: GgmlType, allow: bool) -> Result<(), Error> {
    let refuse = |why: String, hint| {
        Err(Error::Quantize { file: source.name().into(), tensor: tensor.name.clone(), why, hint })
    };
    if format(tensor.ty).is_none() {
        return refuse(format!("type {} can't be read here", tensor.ty), "begin with a file in F16 or BF16");
    }
    if format(to).is_none() {
        return refuse(format!("type {to} can't be written here"), "choose another type");
    }
    if tensor.ty.is_quantized() && !allow {
        let why = format!("it is quantised already ({}), and {to} would add its error to that", tensor.ty);
        return refuse(why, "begin with a file in F16 or BF16, or insist with --allow-requantize");
    }
    Ok(())
}

/// The source's, with what is new.
fn metadata(
    source: &Gguf,
    options: &QuantizeOptions,
    importances: Option<&Importances>,
) -> Result<Metadata, Error> {
    let mut metadata = source.metadata().clone();
    for key in ["split.no", "split.count", "split.tensors.count"] {
        metadata.remove(key);
    }
    if !options.ty.eq_ignore_ascii_case("copy") {
        metadata.insert("general.file_type", types::find(&options.ty)?.file_type);
        metadata.insert("general.quantization_version", 2u32);
    }
    if let Some(importances) = importances {
        metadata.insert("quantize.imatrix.file", importances.file());
        if let Some(dataset) = importances.datasets.first() {
            metadata.insert("quantize.imatrix.dataset", dataset.as_str());
        }
        metadata.insert("quantize.imatrix.entries_count", importances.len() as u32);
        if let Some(n_chunk) = importances.n_chunk {
            metadata.insert("quantize.imatrix.chunks_count", n_chunk);
        }
    }
    Ok(metadata)
}

/// Matrices that lie one behind the other in a tensor: experts.
fn n_matrix(tensor: &TensorInfo) -> u64 {
    tensor.shape.iter().skip(2).product()
}

impl QuantizePlan {
    /// The source's tensors and what becomes of them.
    pub fn tensors(&self) -> impl Iterator<Item = (&TensorInfo, &TensorPlan)> {
        self.source.tensors().iter().zip(&self.tensors)
    }

    /// The source.
    pub fn source(&self) -> &Gguf {
        &self.source
    }

    /// Size of the new file.
    pub fn file_bytes(&self) -> u64 {
        self.writer.file_bytes()
    }

    /// Number of tensors of each new type.
    pub fn types(&self) -> BTreeMap<GgmlType, usize> {
        let mut types = BTreeMap::new();
        for tensor in &self.tensors {
            *types.entry(tensor.to).or_default() += 1;
        }
        types
    }

    /// Bits that a weight takes in the new file, over all tensors.
    pub fn bits_per_weight(&self) -> f64 {
        let bytes: u64 = self.tensors.iter().map(|tensor| tensor.n_bytes).sum();
        let n: u64 = self.source.tensors().iter().map(TensorInfo::n_elements).sum();
        8.0 * bytes as f64 / n as f64
    }

    /// Writes the file to `out`, where it appears when it is complete. `progress` is called before each tensor and once at the
    /// end.
    pub fn write(&self, out: &Path, mut progress: impl FnMut(Progress)) -> Result<(), Error> {
        let total_bytes = self.tensors.iter().map(|tensor| tensor.n_bytes).sum();
        let mut done_bytes = 0;
        let mut tensors = self.tensors();
        self.writer.write_file::<Error>(out, |spec, sink| {
            let (info, tensor) = tensors.next().expect("the writer asks for as many tensors as it was given");
            progress(Progress { tensor: &spec.name, done_bytes, total_bytes });
            self.write_tensor(info, tensor, sink)?;
            self.source.release(info);
            done_bytes += spec.n_bytes;
            Ok(())
        })?;
        progress(Progress { tensor: "", done_bytes, total_bytes });
        Ok(())
    }

    fn write_tensor(&self, info: &TensorInfo, plan: &TensorPlan, sink: &mut TensorSink) -> Result<(), Error> {
        /// Values at once.
        const CHUNK_LEN: usize = 1 << 22;
        let data = self.source.data(info);
        if plan.from == plan.to {
            return Ok(sink.put(data)?);
        }
        let (from, n_in) = (format(plan.from).expect("checked"), info.shape[0] as usize);
        let row_bytes = plan.from.row_bytes(n_in);
        let weights = match &self.importances {
            Some(importances) if plan.weighted => {
                importances.of(&info.name, info.shape[0], n_matrix(info))?
            }
            _ => None,
        };
        let matrices = n_matrix(info) as usize;
        for (m, matrix) in data.chunks(data.len() / matrices).enumerate() {
            let weights = weights.map(|weights| &weights[m * n_in..(m + 1) * n_in]);
            for chunk in matrix.chunks((CHUNK_LEN / n_in).max(1) * row_bytes) {
                let encode = |rows: &[u8]| encode(from, plan.to, n_in, weights, rows);
                for part in in_parts(self.n_thread, row_bytes, n_in, chunk, encode) {
                    sink.put(&part)?;
                }
            }
        }
        Ok(())
    }
}

/// Rows of a type as rows of another.
fn encode(from: &Format, to: GgmlType, n_in: usize, weights: Option<&[f32]>, rows: &[u8]) -> Vec<u8> {
    let mut values = vec![0.0; rows.len() / from.ty.row_bytes(n_in) * n_in];
    (from.dequantize)(rows, &mut values);
    match weights {
        Some(weights) => quantize_rows_weighted(to, weights, &values),
        None => quantize_rows(to, n_in, &values),
    }
}
