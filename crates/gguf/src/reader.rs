//! An open GGUF model: one file, or all shards of a split one, mapped into memory.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};

use crate::bytes::Bytes;
use crate::error::FETCH_AGAIN;
use crate::header::{self, Header};
use crate::shards::{ShardName, file_name};
use crate::{Error, Metadata, TensorInfo};

/// A GGUF model. Opening reads the header only; tensor data is paged in when it is touched.
///
/// Invariants, proved by `open`: every tensor's data lies inside its file, is aligned to at least 8 bytes, has exactly the
/// size of its type and shape, and overlaps no other; names are unique over all shards; `ne0` is whole blocks.
pub struct Gguf {
    path: PathBuf,
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    shards: Vec<Shard>,
}

struct Shard {
    name: String,
    bytes: Bytes,
}

/// Keys that speak of one shard; a model that has been put together again has none of them.
const SPLIT_NO: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_N_TENSORS: &str = "split.tensors.count";

impl Gguf {
    /// Opens a model; for a split one, `path` is any of its shards and the others are found beside it.
    ///
    /// The files must not be changed while the model is open.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf, Error> {
        let path = path.as_ref();
        let split = ShardName::of(path).filter(|shard| shard.count > 1 && path.exists());
        let paths = match &split {
            Some(shard) => shard.all()?,
            None => vec![path.to_path_buf()],
        };
        let mut gguf = Gguf::open_file(&paths[0])?;
        gguf.check_split(&gguf.metadata, &gguf.shards[0].name, 0, paths.len())?;
        for (no, path) in paths.iter().enumerate().skip(1) {
            let shard = Gguf::open_file(path)?;
            gguf.check_split(&shard.metadata, &shard.shards[0].name, no, paths.len())?;
            gguf.append(shard)?;
        }
        if split.is_some() {
            gguf.finish_split()?;
        }
        Ok(gguf)
    }

    /// A model that is in memory already, such as one that a test has built. `name` stands for it in messages.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Gguf, Error> {
        Gguf::new(PathBuf::from(name), Bytes::from_vec(name, &bytes)?)
    }

    fn open_file(path: &Path) -> Result<Gguf, Error> {
        Gguf::new(path.to_path_buf(), Bytes::open(path, "a GGUF file")?)
    }

    fn new(path: PathBuf, bytes: Bytes) -> Result<Gguf, Error> {
        let name = file_name(&path);
        let Header { version, alignment, metadata, tensors } = header::parse(&name, bytes.as_slice())?;
        let index = tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(Gguf { path, version, alignment, metadata, tensors, index, shards: vec![Shard { name, bytes }] })
    }

    /// What a shard's metadata says about the split must agree with its file name; silence agrees.
    fn check_split(&self, metadata: &Metadata, file: &str, no: usize, count: usize) -> Result<(), Error> {
        let said_count = metadata.u32(SPLIT_COUNT)?.map_or(count, |n| n.max(1) as usize);
        let said_no = metadata.u32(SPLIT_NO)?.map_or(no, |n| n as usize);
        if (said_no, said_count) == (no, count) {
            return Ok(());
        }
        Err(Error::Shards {
            file: file.into(),
            expected: format!("shard {} of {count}, as its name says", no + 1),
            found: format!("metadata of shard {} of {said_count}", said_no as u64 + 1),
            hint: "give the shards back the names they were published with, name-00001-of-0000N.gguf",
        })
    }

    /// Adds the tensors of the next shard; its metadata is that of the first one or nothing.
    fn append(&mut self, shard: Gguf) -> Result<(), Error> {
        let no = self.shards.len();
        self.shards.extend(shard.shards);
        for tensor in shard.tensors {
            match self.index.entry(tensor.name.clone()) {
                Entry::Vacant(entry) => entry.insert(self.tensors.len()),
                Entry::Occupied(entry) => {
                    let first = &self.shards[self.tensors[*entry.get()].shard].name;
                    let found = format!("it in {first} too");
                    return Err(Error::tensor(
                        &self.shards[no].name,
                        &tensor.name,
                        "each name once",
                        found,
                        FETCH_AGAIN,
                    ));
                }
            };
            self.tensors.push(TensorInfo { shard: no, ..tensor });
        }
        Ok(())
    }

    fn finish_split(&mut self) -> Result<(), Error> {
        if let Some(n) = self.metadata.u32(SPLIT_N_TENSORS)?
            && n as usize != self.tensors.len()
        {
            return Err(Error::Shards {
                file: self.name().into(),
                expected: format!("{n} tensors in {} shards", self.shards.len()),
                found: self.tensors.len().to_string(),
                hint: "the shards are of different models or versions: download all of them again",
            });
        }
        for key in [SPLIT_NO, SPLIT_COUNT, SPLIT_N_TENSORS] {
            self.metadata.remove(key);
        }
        Ok(())
    }

    /// Keys and values; of a split model those of the first shard, less what speaks of the split.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The same, to be changed in memory: what the file itself says stays.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }

    /// All tensors in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// The tensor of this name, which must be there.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo, Error> {
        self.tensor(name).ok_or_else(|| {
            let hint = "the file does not hold a complete model of this kind: convert it again with a newer converter";
            Error::tensor(self.name(), name, "this tensor", "no such name", hint)
        })
    }

    /// The data of one of this model's tensors: `n_bytes` bytes, aligned to at least 8.
    ///
    /// # Panics
    /// May, if `tensor` is of another model.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let start = tensor.start as usize;
        &self.shards[tensor.shard].bytes.as_slice()[start..start + tensor.n_bytes as usize]
    }

    /// Gives a tensor's pages back to the system, for whoever has made something else of them. [`data`](Self::data)
    /// reads them again when it is used.
    pub fn release(&self, tensor: &TensorInfo) {
        let start = tensor.start as usize;
        self.shards[tensor.shard].bytes.release(start..start + tensor.n_bytes as usize);
    }

    /// File name for messages; of a split model the first shard's.
    pub fn name(&self) -> &str {
        &self.shards[0].name
    }

    /// Path of the file, of a split model the first shard's; of a model in memory its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the files, one unless the model is split.
    pub fn file_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.shards.iter().map(|shard| shard.name.as_str())
    }

    /// Size of all files.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes.as_slice().len() as u64).sum()
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What tensor data is aligned to.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let n_keys = self.metadata.len();
        write!(f, "Gguf({}, {n_keys} keys, {} tensors)", self.path.display(), self.tensors.len())
    }
}
