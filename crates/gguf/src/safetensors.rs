//! safetensors checkpoints, the form in which models are published before they are converted.
//!
//! ```text
//! n u64 │ n bytes of JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …} │ data
//! ```
//!
//! Offsets count from the end of the JSON. Shapes are slowest first, the reverse of GGUF. A checkpoint is one file, or
//! several with an index that says which tensor is in which. Everything is checked when a file is opened: each tensor's
//! range lies inside the data, has the size of its dtype and shape, and overlaps no other.
//!
//! Source: the format description of the safetensors project of Hugging Face.

mod dtype;
mod folder;
mod header;
mod writer;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

pub use dtype::DType;
pub use writer::to_bytes;

use crate::Error;
use crate::bytes::Bytes;
use crate::error::FETCH_AGAIN;
use crate::shards::file_name;

/// A checkpoint of one or several files, mapped into memory.
pub struct SafeTensors {
    path: PathBuf,
    files: Vec<File>,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
}

struct File {
    name: String,
    bytes: Bytes,
}

/// A tensor's entry, checked, and the file that holds it.
struct Place {
    file: usize,
    entry: header::Entry,
}

/// A tensor of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct SafeTensor<'a> {
    /// Name, unique in the checkpoint.
    pub name: &'a str,
    /// Type of the elements.
    pub dtype: DType,
    /// Dimensions, the slowest first; none for a scalar.
    pub shape: &'a [u64],
    /// Little-endian elements, row-major. Not aligned to anything.
    pub data: &'a [u8],
    /// The file that holds it, for messages.
    pub file: &'a str,
}

impl SafeTensors {
    /// Opens a checkpoint: a folder as [`open_dir`](Self::open_dir), a file as [`open_file`](Self::open_file).
    pub fn open(path: impl AsRef<Path>) -> Result<SafeTensors, Error> {
        let path = path.as_ref();
        if path.is_dir() { SafeTensors::open_dir(path) } else { SafeTensors::open_file(path) }
    }

    /// Opens the checkpoint in a folder. Taken is, whatever is there first: `model.safetensors`; the files that an index
    /// (`model.safetensors.index.json`, or the only one of that ending) names; the only `*.safetensors` file; the only
    /// complete set of `name-00001-of-0000N.safetensors`.
    pub fn open_dir(dir: impl AsRef<Path>) -> Result<SafeTensors, Error> {
        let dir = dir.as_ref();
        let folder::Checkpoint { paths, index } = folder::find(dir)?;
        let mut all = SafeTensors::empty(dir);
        for path in &paths {
            all.add(path, Bytes::open(path, FORMAT)?)?;
        }
        if let Some(index) = index {
            all.check_index(&index)?;
        }
        Ok(all)
    }

    /// Opens one file, even if it is a part of a checkpoint.
    pub fn open_file(path: impl AsRef<Path>) -> Result<SafeTensors, Error> {
        let path = path.as_ref();
        let mut one = SafeTensors::empty(path);
        one.add(path, Bytes::open(path, FORMAT)?)?;
        Ok(one)
    }

    /// A file that is in memory already. `name` stands for it in messages.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<SafeTensors, Error> {
        let path = Path::new(name);
        let mut one = SafeTensors::empty(path);
        one.add(path, Bytes::from_vec(name, &bytes)?)?;
        Ok(one)
    }

    fn empty(path: &Path) -> SafeTensors {
        let path = path.to_path_buf();
        SafeTensors { path, files: Vec::new(), places: BTreeMap::new(), metadata: BTreeMap::new() }
    }

    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<(), Error> {
        let name = file_name(path);
        let header = header::parse(&name, bytes.as_slice())?;
        let file = self.files.len();
        for (tensor, entry) in header.entries {
            match self.places.entry(tensor) {
                Entry::Vacant(place) => place.insert(Place { file, entry }),
                Entry::Occupied(place) => {
                    let found = format!("it in {} too", self.files[place.get().file].name);
                    return Err(Error::tensor(&name, place.key(), "each name once", found, FETCH_AGAIN));
                }
            };
        }
        self.metadata.extend(header.metadata);
        self.files.push(File { name, bytes });
        Ok(())
    }

    /// Every tensor must be in the file that the index names.
    fn check_index(&self, index: &folder::Index) -> Result<(), Error> {
        for (tensor, file) in &index.weight_map {
            let found = match self.tensor(tensor) {
                Some(place) if place.file == file => continue,
                Some(place) => format!("it in {}", place.file),
                None => "no such name".into(),
            };
            let expected = format!("this tensor, as {} says", index.name);
            return Err(Error::tensor(file, tensor, expected, found, FETCH_AGAIN));
        }
        Ok(())
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<SafeTensor<'_>> {
        self.places.get_key_value(name).map(|(name, place)| self.view(name, place))
    }

    /// The tensor of this name, which must be there.
    pub fn require_tensor(&self, name: &str) -> Result<SafeTensor<'_>, Error> {
        self.tensor(name).ok_or_else(|| {
            let hint = "the checkpoint is incomplete, or of another architecture";
            Error::tensor(&self.name(), name, "this tensor", "no such name", hint)
        })
    }

    /// The elements of the tensor of this name as f32; it must be there and of floats.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>, Error> {
        self.require_tensor(name)?.to_f32()
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = SafeTensor<'_>> {
        self.places.iter().map(|(name, place)| self.view(name, place))
    }

    /// All names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// What the files say about themselves, such as `format: pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Name of the file or folder, for messages.
    pub fn name(&self) -> String {
        file_name(&self.path)
    }

    /// Path of the file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of all files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.as_slice().len() as u64).sum()
    }

    fn view<'a>(&'a self, name: &'a str, place: &'a Place) -> SafeTensor<'a> {
        let Place { file, entry } = place;
        let file = &self.files[*file];
        let data = &file.bytes.as_slice()[entry.range.clone()];
        SafeTensor { name, dtype: entry.dtype, shape: &entry.shape, data, file: &file.name }
    }
}

const FORMAT: &str = "a safetensors file";

impl SafeTensor<'_> {
    /// Product of the dimensions.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The elements as f32; exact for F16, BF16 and F32, rounded for F64.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        self.dtype.to_f32(self.data).ok_or_else(|| {
            let expected = "floats (F16, BF16, F32 or F64)";
            let hint = "this dtype can't be converted: use a checkpoint in BF16";
            Error::tensor(self.file, self.name, expected, self.dtype.name(), hint)
        })
    }
}

impl std::fmt::Debug for SafeTensors {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "SafeTensors({}, {} files, {} tensors)", self.path.display(), self.files.len(), self.len())
    }
}
