//! Importance matrices: for each tensor, the mean square of the input that each of its columns is multiplied with, as
//! `llama-imatrix` collects it over a text. Both of its files are read:
//!
//! ```text
//! GGUF     general.type = imatrix; for each tensor `NAME.in_sum2` [n_in, n_matrix] and `NAME.counts` [1, n_matrix], F32;
//!          importance = in_sum2 / counts
//! binary   n_entries i32 │ n_entries × { len i32, name, n_call i32, n_value i32, n_value × f32 } │ n_chunk i32, len i32, text
//!          importance = value / n_call; what follows the entries may be missing
//! ```
//!
//! A stack of experts has a matrix for each; one that no token came to has no opinion, and ones stand for it.

use std::collections::BTreeMap;
use std::path::Path;

use paceline_gguf::{GgmlType, Gguf, Metadata, Writer};

use crate::Error;

/// Importances by tensor.
#[derive(Clone, Debug, Default)]
pub struct Importances {
    file: String,
    columns: BTreeMap<String, Vec<f32>>,
    /// The texts that they come from, where that is said.
    pub datasets: Vec<String>,
    /// Chunks of text that were looked at, where that is said.
    pub n_chunk: Option<u32>,
}

/// Sums over the inputs of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Sums {
    /// Σ of squares, `[n_in, n_matrix]`.
    pub squares: Vec<f32>,
    /// Rows that were summed, `[n_matrix]`.
    pub counts: Vec<f32>,
}

const REMAKE: &str = "make it again for this model, or download it again";

impl Importances {
    /// Reads a file of either form.
    pub fn open(path: &Path) -> Result<Importances, Error> {
        let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut read = if bytes.starts_with(b"GGUF") {
            Importances::from_gguf(&Gguf::from_bytes(&file, bytes)?)?
        } else {
            let wrong = |(expected, found)| error(&file, "its form", expected, found);
            Importances::from_binary(&bytes).map_err(wrong)?
        };
        read.file = file;
        for (name, columns) in &read.columns {
            if let Some(x) = columns.iter().find(|x| !x.is_finite() || **x < 0.0) {
                return Err(error(&read.file, name, "finite squares".into(), x.to_string()));
            }
        }
        Ok(read)
    }

    fn from_gguf(gguf: &Gguf) -> Result<Importances, Error> {
        let mut read = Importances::default();
        let metadata = gguf.metadata();
        if let Some(names) = metadata.bytes_array("imatrix.datasets")? {
            read.datasets = names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        }
        read.n_chunk = metadata.u32("imatrix.chunk_count")?;
        let floats = |name: &str| -> Result<Vec<f32>, Error> {
            let tensor = gguf.require_tensor(name)?;
            match tensor.ty {
                GgmlType::F32 => {
                    Ok(gguf.data(tensor).as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
                }
                ty => Err(error(gguf.name(), name, "type f32".into(), ty.to_string())),
            }
        };
        for tensor in gguf.tensors() {
            let Some(name) = tensor.name.strip_suffix(".in_sum2") else { continue };
            let (sums, counts) = (floats(&tensor.name)?, floats(&format!("{name}.counts"))?);
            if !sums.len().is_multiple_of(counts.len()) {
                let found = format!("{} of them for {} sums", counts.len(), sums.len());
                return Err(error(gguf.name(), name, "a count for each matrix".into(), found));
            }
            read.columns.insert(name.to_owned(), Sums { squares: sums, counts }.means());
        }
        if read.columns.is_empty() {
            let found = format!("{} tensors, none of them `….in_sum2`", gguf.tensors().len());
            return Err(error(gguf.name(), "its form", "an importance matrix".into(), found));
        }
        Ok(read)
    }

    /// (expected, found) if it is none.
    fn from_binary(bytes: &[u8]) -> Result<Importances, (String, String)> {
        let mut read = Importances::default();
        let mut rest = bytes;
        let n_entry = int(&mut rest)?;
        if !(1..=1 << 20).contains(&n_entry) {
            return Err(("an importance matrix, GGUF or binary".into(), format!("{n_entry} entries")));
        }
        for i in 0..n_entry {
            let len = int(&mut rest)?;
            let name = take(&mut rest, len, 1)?;
            let name =
                std::str::from_utf8(name).map_err(|_| ("names in UTF-8".to_owned(), format!("entry {i}")))?;
            let (n_call, n_value) = (int(&mut rest)?, int(&mut rest)?);
            let values = take(&mut rest, n_value, 4)?.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
            let sums = Sums { squares: values.collect(), counts: vec![n_call as f32] };
            read.columns.insert(name.to_owned(), sums.means());
        }
        if !rest.is_empty() {
            read.n_chunk = u32::try_from(int(&mut rest)?).ok();
            let len = int(&mut rest)?;
            read.datasets = vec![String::from_utf8_lossy(take(&mut rest, len, 1)?).into_owned()];
        }
        Ok(read)
    }

    /// The importances of a tensor of `n_in` columns and `n_matrix` matrices, `[n_in, n_matrix]`; none if it has none.
    pub fn of(&self, name: &str, n_in: u64, n_matrix: u64) -> Result<Option<&[f32]>, Error> {
        let Some(columns) = self.columns.get(name) else { return Ok(None) };
        if columns.len() as u64 == n_in * n_matrix {
            return Ok(Some(columns));
        }
        // A lookup has no input: what is written for one comes from elsewhere.
        if name == "token_embd.weight" {
            return Ok(None);
        }
        let expected = format!("{} values ({n_in} columns of {n_matrix})", n_in * n_matrix);
        Err(error(&self.file, name, expected, columns.len().to_string()))
    }

    /// The name of the file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// How many tensors it speaks of.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether it speaks of none.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }
}

impl Sums {
    /// Mean squares, `[n_in, n_matrix]`.
    fn means(&self) -> Vec<f32> {
        let n_in = self.squares.len() / self.counts.len().max(1);
        let counts = self.counts.iter().flat_map(|&count| std::iter::repeat_n(count, n_in));
        let mean = |(&sum, count): (&f32, f32)| if count > 0.0 { sum / count } else { 1.0 };
        self.squares.iter().zip(counts).map(mean).collect()
    }
}

/// Writes the GGUF form: what was summed for each tensor over `n_chunk` chunks of `n_ctx` tokens of the text `dataset`.
pub fn write_importances(
    path: &Path,
    sums: &BTreeMap<String, Sums>,
    dataset: &str,
    n_chunk: u32,
    n_ctx: u32,
) -> Result<(), Error> {
    let mut metadata = Metadata::new();
    metadata.insert("general.type", "imatrix");
    metadata.insert("imatrix.datasets", vec![dataset.as_bytes().to_vec()]);
    metadata.insert("imatrix.chunk_count", n_chunk);
    metadata.insert("imatrix.chunk_size", n_ctx);
    let mut writer = Writer::new(metadata)?;
    let mut parts: Vec<&[f32]> = Vec::new();
    for (name, Sums { squares, counts }) in sums {
        let n = counts.len();
        writer.add_tensor(
            &format!("{name}.in_sum2"),
            &[(squares.len() / n) as u64, n as u64],
            GgmlType::F32,
        )?;
        writer.add_tensor(&format!("{name}.counts"), &[1, n as u64], GgmlType::F32)?;
        parts.extend([&squares[..], &counts[..]]);
    }
    let mut parts = parts.into_iter();
    writer.write_file::<Error>(path, |_, sink| {
        let values = parts.next().expect("one part for each tensor");
        Ok(sink.put(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?)
    })
}

fn error(file: &str, what: &str, expected: String, found: String) -> Error {
    Error::Importance { file: file.into(), what: what.into(), expected, found, hint: REMAKE }
}

fn int(rest: &mut &[u8]) -> Result<i32, (String, String)> {
    let bytes = take(rest, 4, 1)?;
    Ok(i32::from_le_bytes(bytes.try_into().expect("four bytes")))
}

/// The next `n` things of `size` bytes.
fn take<'a>(rest: &mut &'a [u8], n: i32, size: usize) -> Result<&'a [u8], (String, String)> {
    let len = usize::try_from(n).ok().and_then(|n| n.checked_mul(size)).unwrap_or(usize::MAX);
    let Some((taken, left)) = rest.split_at_checked(len) else {
        let expected = "an importance matrix, GGUF or binary".to_owned();
        return Err((expected, format!("{} bytes where {n} things of {size} should be", rest.len())));
    };
    *rest = left;
    Ok(taken)
}
