//! Writes GGUF v3. The directory is planned first, then the data streams through in its order, so that converting a model
//! needs memory for one tensor at a time.
//!
//! Data goes to a file with a temporary name that is renamed at the end: a reader sees the old file or the whole new one,
//! and a model that is mapped stays as it was.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::header::{MAGIC, check_shape, parse_alignment};
use crate::shards::file_name;
use crate::value::write_string;
use crate::{Error, GgmlType, Metadata};

const VERSION: u32 = 3;
/// The reference reader keeps names in 64 bytes, the last of them a zero.
const NAME_MAX_BYTES: usize = 63;
const CALLER: &str = "a bug in what writes this file: report it";

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in the file.
    pub name: String,
    /// Dimensions, the fastest first.
    pub shape: Vec<u64>,
    /// Type of the elements.
    pub ty: GgmlType,
    /// Bytes of data to supply.
    pub n_bytes: u64,
}

/// Plans a file, then writes it.
#[derive(Debug)]
pub struct Writer {
    metadata: Metadata,
    alignment: u64,
    tensors: Vec<TensorSpec>,
    names: HashSet<String>,
}

impl Writer {
    /// A file with this metadata and no tensors. `general.alignment` is obeyed; without it, it is 32.
    pub fn new(metadata: Metadata) -> Result<Writer, Error> {
        let alignment = parse_alignment(&metadata)?;
        Ok(Writer { metadata, alignment, tensors: Vec::new(), names: HashSet::new() })
    }

    /// Adds a tensor to the directory; the data comes later.
    pub fn add_tensor(&mut self, name: &str, shape: &[u64], ty: GgmlType) -> Result<(), Error> {
        let wrong = |expected: String, found: String| {
            Error::tensor(self.metadata.file(), name, expected, found, CALLER)
        };
        if name.len() > NAME_MAX_BYTES {
            return Err(wrong(format!("a name of at most {NAME_MAX_BYTES} bytes"), name.len().to_string()));
        }
        let n_bytes = check_shape(ty, shape).map_err(|(expected, found)| wrong(expected, found))?;
        if !self.names.insert(name.into()) {
            return Err(Error::tensor(self.metadata.file(), name, "each name once", "it twice", CALLER));
        }
        self.tensors.push(TensorSpec { name: name.into(), shape: shape.into(), ty, n_bytes });
        Ok(())
    }

    /// What has been added, in order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        let data: u64 =
            self.tensors.iter().map(|tensor| tensor.n_bytes.next_multiple_of(self.alignment)).sum();
        self.header().len() as u64 + data
    }

    /// Writes the file. `fill` is called once per tensor, in order, and puts its data into the sink, in as many parts as it
    /// likes. If anything fails, nothing is left at `path` that was not there before.
    pub fn write_file<E: From<Error>>(
        &self,
        path: impl AsRef<Path>,
        fill: impl FnMut(&TensorSpec, &mut TensorSink) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = path.as_ref();
        let failed = |action| move |source| Error::io(path, action, source);
        let temporary =
            Temporary(path.with_file_name(format!(".{}.{}.part", file_name(path), std::process::id())));
        let file = File::create(&temporary.0).map_err(failed("create"))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        self.write(path, &mut out, fill)?;
        let file = out.into_inner().map_err(|error| failed("write")(error.into_error()))?;
        file.sync_all().map_err(failed("write"))?;
        fs::rename(&temporary.0, path).map_err(failed("replace"))?;
        Ok(())
    }

    /// Writes everything but the data, and leaves a hole for it, which takes no space where the file system has holes: enough
    /// for what reads names, shapes and sizes. Who reads the data gets zeros.
    pub fn write_outline(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let failed = |action| move |source| Error::io(path, action, source);
        let mut file = File::create(path).map_err(failed("create"))?;
        file.write_all(&self.header()).map_err(failed("write"))?;
        file.set_len(self.file_bytes()).map_err(failed("write"))
    }

    /// Writes to memory; see [`write_file`](Self::write_file).
    pub fn to_vec<E: From<Error>>(
        &self,
        fill: impl FnMut(&TensorSpec, &mut TensorSink) -> Result<(), E>,
    ) -> Result<Vec<u8>, E> {
        let mut out = Vec::new();
        self.write(Path::new(self.metadata.file()), &mut out, fill)?;
        Ok(out)
    }

    fn write<E: From<Error>>(
        &self,
        path: &Path,
        out: &mut dyn Write,
        mut fill: impl FnMut(&TensorSpec, &mut TensorSink) -> Result<(), E>,
    ) -> Result<(), E> {
        let failed = |source| Error::io(path, "write", source);
        out.write_all(&self.header()).map_err(failed)?;
        for tensor in &self.tensors {
            let mut sink = TensorSink { path, tensor, out, n_written: 0 };
            fill(tensor, &mut sink)?;
            sink.finish()?;
            out.write_all(&self.padding(tensor.n_bytes)).map_err(failed)?;
        }
        Ok(())
    }

    fn padding(&self, n_bytes: u64) -> Vec<u8> {
        vec![0; (n_bytes.next_multiple_of(self.alignment) - n_bytes) as usize]
    }

    /// All that comes before the data, padding included.
    fn header(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            write_string(&mut out, key.as_bytes());
            value.write(&mut out);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            write_string(&mut out, tensor.name.as_bytes());
            out.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|ne| out.extend_from_slice(&ne.to_le_bytes()));
            out.extend_from_slice(&tensor.ty.id().to_le_bytes());
            out.extend_from_slice(&u64::to_le_bytes(offset));
            offset += tensor.n_bytes.next_multiple_of(self.alignment);
        }
        let padding = self.padding(out.len() as u64);
        out.extend_from_slice(&padding);
        out
    }
}

/// Takes the data of one tensor, and no byte more or less than its type and shape ask for.
pub struct TensorSink<'a> {
    path: &'a Path,
    tensor: &'a TensorSpec,
    out: &'a mut dyn Write,
    n_written: u64,
}

impl TensorSink<'_> {
    /// Writes the next bytes.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let n_written = self.n_written + bytes.len() as u64;
        if n_written > self.tensor.n_bytes {
            return Err(self.wrong_size(n_written));
        }
        self.n_written = n_written;
        self.out.write_all(bytes).map_err(|source| Error::io(self.path, "write", source))
    }

    fn finish(self) -> Result<(), Error> {
        if self.n_written == self.tensor.n_bytes { Ok(()) } else { Err(self.wrong_size(self.n_written)) }
    }

    fn wrong_size(&self, n_bytes: u64) -> Error {
        let TensorSpec { name, shape, ty, n_bytes: expected } = self.tensor;
        let expected = format!("{expected} bytes for {shape:?} of {ty}");
        Error::tensor(&file_name(self.path), name, expected, n_bytes.to_string(), CALLER)
    }
}

/// A file that goes away unless it has been renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // after the rename there is none
    }
}

/// A whole file in memory, for small models: tensors are (name, shape, type, data).
pub fn to_bytes<N: AsRef<str>, S: AsRef<[u64]>, B: AsRef<[u8]>>(
    metadata: &Metadata,
    tensors: &[(N, S, GgmlType, B)],
) -> Result<Vec<u8>, Error> {
    let mut writer = Writer::new(metadata.clone())?;
    for (name, shape, ty, _) in tensors {
        writer.add_tensor(name.as_ref(), shape.as_ref(), *ty)?;
    }
    let mut data = tensors.iter().map(|(.., data)| data.as_ref());
    writer.to_vec(|_, sink| sink.put(data.next().expect("one call per tensor")))
}
