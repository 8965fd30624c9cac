//! Everything in front of the tensor data of one GGUF file, checked against the file's real length.
//!
//! ```text
//! "GGUF" │ version u32 │ n_tensors u64 │ n_keys u64
//! n_keys    × { key string, value type u32, value }
//! n_tensors × { name string, n_dims u32 (1..=4), ne: n_dims × u64 (ne0 fastest), type u32, offset u64 }
//! zeros up to a multiple of `general.alignment` (32 if not said), from where the offsets count
//! ```

use std::collections::HashSet;

use crate::cursor::{Cursor, Fault};
use crate::error::FETCH_AGAIN;
use crate::{Error, GgmlType, Metadata, Value, foreign};

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
const FORMAT: &str = "a GGUF file";

/// The fewest bytes that a key with its value, and a tensor's entry, can take.
const KEY_MIN_BYTES: u64 = 8 + 4 + 1;
const TENSOR_MIN_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// A tensor's entry in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the model: `blk.3.attn_q.weight`.
    pub name: String,
    /// 1 to 4 dimensions, the fastest first: a matrix `[n_in, n_out]` has `n_out` rows of `n_in` elements. None is 0.
    pub shape: Vec<u64>,
    /// The type of the elements.
    pub ty: GgmlType,
    /// Size of the data.
    pub n_bytes: u64,
    /// Which shard holds it, 0 for an unsplit model.
    pub(crate) shard: usize,
    /// Where its data begins in the shard, counted from the start of the file.
    pub(crate) start: u64,
}

impl TensorInfo {
    /// Product of the dimensions.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Elements of a row: the fastest dimension.
    pub fn n_cols(&self) -> u64 {
        self.shape[0]
    }

    /// Rows, the product of all dimensions but the fastest.
    pub fn n_rows(&self) -> u64 {
        self.shape[1..].iter().product()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.shape[0] as usize)
    }

    /// Where the data begins in its file.
    pub fn file_offset(&self) -> u64 {
        self.start
    }

    /// Which shard of a split model holds the data, from 0.
    pub fn shard(&self) -> usize {
        self.shard
    }
}

/// What stands in front of the data.
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) alignment: u64,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Vec<TensorInfo>,
}

/// Reads and checks the header of the file `file`, whose content is `bytes`.
pub(crate) fn parse(file: &str, bytes: &[u8]) -> Result<Header, Error> {
    let version = parse_version(file, bytes)?;
    let mut cursor = Cursor::new(bytes);
    let preamble = |fault: Fault| fault.at(file, "preamble");
    cursor.take(8).map_err(preamble)?; // magic and version
    let n_tensors = cursor.u64().map_err(preamble)?;
    let n_keys = cursor.u64().map_err(preamble)?;
    let fits = |cursor: &Cursor, n: u64, min_bytes| cursor.expect_left(n.checked_mul(min_bytes));
    fits(&cursor, n_keys, KEY_MIN_BYTES)
        .map_err(|fault| fault.at(file, format!("count of keys, {n_keys}")))?;
    fits(&cursor, n_tensors, TENSOR_MIN_BYTES)
        .map_err(|fault| fault.at(file, format!("count of tensors, {n_tensors}")))?;

    let metadata = parse_metadata(file, &mut cursor, n_keys)?;
    let alignment = parse_alignment(&metadata)?;
    let mut tensors = parse_directory(file, &mut cursor, n_tensors, alignment)?;
    let data_start = (cursor.at() as u64).next_multiple_of(alignment);
    place(file, &mut tensors, data_start, bytes.len() as u64)?;
    Ok(Header { version, alignment, metadata, tensors })
}

fn parse_version(file: &str, bytes: &[u8]) -> Result<u32, Error> {
    let foreign = |found: String, hint| Error::Foreign { file: file.into(), expected: FORMAT, found, hint };
    let big_endian = || foreign("a big-endian GGUF file".into(), "download or convert it as little-endian");
    if bytes.starts_with(b"FUGG") {
        return Err(big_endian());
    }
    let Some(rest) = bytes.strip_prefix(MAGIC) else {
        let (found, hint) = foreign::identify(bytes);
        return Err(foreign(found, hint));
    };
    let version = Cursor::new(rest).u32().map_err(|fault| fault.at(file, "version"))?;
    match version {
        2 | 3 => Ok(version),
        1 => Err(foreign("GGUF version 1".into(), "versions 2 and 3 are read: download or convert it again")),
        swapped if swapped & 0xffff == 0 && swapped != 0 => Err(big_endian()),
        other => Err(foreign(
            format!("GGUF version {other}"),
            "versions 2 and 3 are read: a newer program may know it, or the file is damaged",
        )),
    }
}

fn parse_metadata(file: &str, cursor: &mut Cursor, n_keys: u64) -> Result<Metadata, Error> {
    let mut metadata = Metadata::for_file(file);
    for i in 0..n_keys {
        let key = cursor.text().map_err(|fault| fault.at(file, format!("key {} of {n_keys}", i + 1)))?;
        let value = Value::read(cursor).map_err(|fault| fault.at(file, format!("value of key `{key}`")))?;
        if metadata.contains(key) {
            return Err(Error::key(file, key, "each key once", "it twice", FETCH_AGAIN));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// The alignment of tensor data: at least 8, so that what is mapped can be read as any number type.
pub(crate) fn parse_alignment(metadata: &Metadata) -> Result<u64, Error> {
    let alignment = metadata.u32(ALIGNMENT_KEY)?.map_or(DEFAULT_ALIGNMENT, u64::from);
    if alignment.is_power_of_two() && alignment >= 8 {
        return Ok(alignment);
    }
    let (expected, found) = ("a power of two from 8 on", alignment.to_string());
    Err(Error::key(metadata.file(), ALIGNMENT_KEY, expected, found, FETCH_AGAIN))
}

fn parse_directory(
    file: &str,
    cursor: &mut Cursor,
    n_tensors: u64,
    alignment: u64,
) -> Result<Vec<TensorInfo>, Error> {
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for i in 0..n_tensors {
        let name =
            cursor.text().map_err(|fault| fault.at(file, format!("tensor {} of {n_tensors}", i + 1)))?;
        if !names.insert(name) {
            return Err(Error::tensor(file, name, "each name once", "it twice", FETCH_AGAIN));
        }
        tensors.push(parse_tensor(file, cursor, name, alignment)?);
    }
    Ok(tensors)
}

/// Reads an entry after its name; `start` is still the offset into the data section.
fn parse_tensor(file: &str, cursor: &mut Cursor, name: &str, alignment: u64) -> Result<TensorInfo, Error> {
    let cut = |fault: Fault| fault.at(file, format!("entry of tensor `{name}`"));
    let wrong = |expected: String, found: String| Error::tensor(file, name, expected, found, FETCH_AGAIN);

    let n_dims = cursor.u32().map_err(cut)?;
    if !(1..=4).contains(&n_dims) {
        return Err(wrong("1 to 4 dimensions".into(), n_dims.to_string()));
    }
    let mut shape = Vec::new();
    for _ in 0..n_dims {
        shape.push(cursor.u64().map_err(cut)?);
    }
    let id = cursor.u32().map_err(cut)?;
    let offset = cursor.u64().map_err(cut)?;

    let ty = GgmlType::from_id(id).ok_or_else(|| {
        let hint = "download another quantization of the model, or convert it again";
        Error::tensor(file, name, "a known tensor type", GgmlType::describe_unknown(id), hint)
    })?;
    let n_bytes = check_shape(ty, &shape).map_err(|(expected, found)| wrong(expected, found))?;
    if !offset.is_multiple_of(alignment) {
        return Err(wrong(format!("an offset aligned to {alignment}"), offset.to_string()));
    }
    Ok(TensorInfo { name: name.into(), shape, ty, n_bytes, shard: 0, start: offset })
}

/// Size of a tensor of this type and shape, or what is (expected, found) in the shape. Reader and writer share it.
pub(crate) fn check_shape(ty: GgmlType, shape: &[u64]) -> Result<u64, (String, String)> {
    if !(1..=4).contains(&shape.len()) {
        return Err(("1 to 4 dimensions".into(), shape.len().to_string()));
    }
    if shape.contains(&0) {
        return Err(("dimensions above 0".into(), format!("shape {shape:?}")));
    }
    if !shape[0].is_multiple_of(ty.block_len() as u64) {
        let expected = format!("rows of whole {ty} blocks of {} elements", ty.block_len());
        return Err((expected, format!("shape {shape:?}")));
    }
    // Elements too: a type of less than a byte per element could overflow only their count.
    let n_elements = shape.iter().try_fold(1u64, |n, &ne| n.checked_mul(ne));
    match (ty.tensor_bytes(shape), n_elements) {
        (Some(n_bytes), Some(_)) if i64::try_from(n_bytes).is_ok() => Ok(n_bytes),
        _ => Err(("a size below 2^63 bytes".into(), format!("shape {shape:?} of {ty}"))),
    }
}

/// Turns offsets into places in the file; all must lie inside it and none inside another.
fn place(file: &str, tensors: &mut [TensorInfo], data_start: u64, file_bytes: u64) -> Result<(), Error> {
    let mut implied: Option<(usize, u64)> = None; // first tensor that does not fit, size that would hold all
    for (i, tensor) in tensors.iter_mut().enumerate() {
        let start = data_start.checked_add(tensor.start);
        let end = start.and_then(|start| start.checked_add(tensor.n_bytes));
        let (Some(start), Some(end)) = (start, end) else {
            let found = format!("offset {} for {} bytes", tensor.start, tensor.n_bytes);
            return Err(Error::tensor(file, &tensor.name, "an end below 2^64", found, FETCH_AGAIN));
        };
        tensor.start = start;
        if end > file_bytes {
            let (first, size) = implied.unwrap_or((i, end));
            implied = Some((first, size.max(end)));
        }
    }
    if let Some((first, size)) = implied {
        return Err(Error::short(file, &tensors[first].name, size, file_bytes));
    }
    let mut by_start: Vec<&TensorInfo> = tensors.iter().collect();
    by_start.sort_by_key(|tensor| tensor.start);
    for pair in by_start.windows(2) {
        let end = pair[0].start + pair[0].n_bytes;
        if end > pair[1].start {
            let expected = format!("its data to begin at {end}, behind `{}`", pair[0].name);
            return Err(Error::tensor(file, &pair[1].name, expected, pair[1].start.to_string(), FETCH_AGAIN));
        }
    }
    Ok(())
}
