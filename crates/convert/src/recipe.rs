//! What a file will hold, decided before anything is written: metadata, and for each tensor where it comes from.
//!
//! A family writes its recipe by naming every tensor of the checkpoint with the shape that the config promises. Shapes are
//! checked as they are named; at the end every tensor must have been named or skipped for a reason.

use std::collections::HashSet;

use paceline_gguf::{Metadata, Value};

use crate::checkpoint::Checkpoint;
use crate::layout::Layout;
use crate::{Error, Skipped};

const OTHER_CONFIG: &str =
    "the config is of another model, or the checkpoint is incomplete: download it again";

/// Where a tensor's values come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Tensors of the checkpoint of one shape, one behind the other, seen as rows of `row_len`.
    Checkpoint { tensors: Vec<String>, row_len: usize, layout: Layout },
    /// Computed from the config.
    Values(Vec<f32>),
    /// Whole numbers of the checkpoint, which stay such whatever type the weights get.
    Integers(Vec<i32>),
}

/// A tensor of the file.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// ne0 first.
    pub(crate) shape: Vec<u64>,
    pub(crate) source: Source,
}

/// The file to be.
pub(crate) struct Recipe<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) arch: &'static str,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) notes: Vec<String>,
    /// Rows of the embedding.
    pub(crate) n_vocab: usize,
    claimed: HashSet<String>,
}

impl<'a> Recipe<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, arch: &'static str) -> Recipe<'a> {
        Recipe {
            checkpoint,
            arch,
            metadata: Metadata::new(),
            tensors: Vec::new(),
            skipped: Vec::new(),
            notes: Vec::new(),
            n_vocab: 0,
            claimed: HashSet::new(),
        }
    }

    /// Sets `<arch>.<key>`.
    pub(crate) fn key(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.insert(format!("{}.{key}", self.arch), value);
    }

    /// Sets `<arch>.<key>` to a size.
    pub(crate) fn size_key(&mut self, key: &str, n: usize) {
        self.key(key, u32::try_from(n).expect("the config keeps sizes below 2^31"));
    }

    /// `name` is `tensor` of the checkpoint, whose shape (slowest first, as there) must be `shape`. A depthwise
    /// convolution's axis of one input channel, `[n, 1, width]`, is gone in the file.
    pub(crate) fn tensor(
        &mut self,
        name: &str,
        tensor: &str,
        shape: &[usize],
        layout: Layout,
    ) -> Result<(), Error> {
        self.part(name, tensor, shape, shape, layout)
    }

    /// `name` is a part of `tensor`, or all of it: of the rows of a tensor of this shape, `layout` picks as many as
    /// `part` has.
    pub(crate) fn part(
        &mut self,
        name: &str,
        tensor: &str,
        shape: &[usize],
        part: &[usize],
        layout: Layout,
    ) -> Result<(), Error> {
        self.claim(tensor, shape)?;
        self.push(name, vec![tensor.to_owned()], part, layout);
        Ok(())
    }

    /// `name` is a stack of matrices of the checkpoint, all of this shape, the first of them slowest.
    pub(crate) fn stack(
        &mut self,
        name: &str,
        tensors: Vec<String>,
        shape: &[usize; 2],
    ) -> Result<(), Error> {
        tensors.iter().try_for_each(|tensor| self.claim(tensor, shape))?;
        let shape = [tensors.len(), shape[0], shape[1]];
        self.push(name, tensors, &shape, Layout::SAME);
        Ok(())
    }

    fn claim(&mut self, tensor: &str, shape: &[usize]) -> Result<(), Error> {
        let Some(found) = self.checkpoint.shape(tensor) else {
            return Err(self.error(tensor, format!("shape {shape:?}"), "no such tensor"));
        };
        if found != shape {
            return Err(self.error(tensor, format!("shape {shape:?}"), format!("shape {found:?}")));
        }
        self.checkpoint.check_floats(tensor)?;
        self.claimed.insert(tensor.to_owned());
        Ok(())
    }

    fn push(&mut self, name: &str, tensors: Vec<String>, shape: &[usize], layout: Layout) {
        let mut file_shape: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        if matches!(shape, [_, 1, _]) {
            file_shape.remove(1);
        }
        let row_len = *shape.last().expect("a family names at least one axis");
        let source = Source::Checkpoint { tensors, row_len, layout };
        self.tensors.push(Tensor { name: name.to_owned(), shape: file_shape, source });
    }

    /// As [`Recipe::tensor`], if the checkpoint has it.
    pub(crate) fn optional_tensor(
        &mut self,
        name: &str,
        tensor: &str,
        shape: &[usize],
        layout: Layout,
    ) -> Result<bool, Error> {
        let there = self.checkpoint.has(tensor);
        if there {
            self.tensor(name, tensor, shape, layout)?;
        }
        Ok(there)
    }

    /// A tensor that the checkpoint implies without holding it.
    pub(crate) fn computed(&mut self, name: &str, values: Vec<f32>) {
        let shape = vec![values.len() as u64];
        self.tensors.push(Tensor { name: name.to_owned(), shape, source: Source::Values(values) });
    }

    /// `name` is the vector `tensor` of `len` whole numbers.
    pub(crate) fn integers(&mut self, name: &str, tensor: &str, len: usize) -> Result<(), Error> {
        let found = self.checkpoint.shape(tensor);
        if found.as_deref() != Some(&[len]) {
            let found = found.map_or("no such tensor".to_owned(), |found| format!("shape {found:?}"));
            return Err(self.error(tensor, format!("shape [{len}]"), found));
        }
        let numbers = self.checkpoint.integers(tensor)?;
        self.claimed.insert(tensor.to_owned());
        let (name, shape) = (name.to_owned(), vec![len as u64]);
        self.tensors.push(Tensor { name, shape, source: Source::Integers(numbers) });
        Ok(())
    }

    /// Leaves out the tensors for which `applies` holds.
    pub(crate) fn skip(&mut self, reason: &'static str, applies: impl Fn(&str) -> bool) {
        for tensor in self.checkpoint.names() {
            if applies(tensor) && self.claimed.insert(tensor.to_owned()) {
                self.skipped.push(Skipped { tensor: tensor.to_owned(), reason });
            }
        }
    }

    /// Fails if a tensor of the checkpoint has been neither named nor skipped.
    pub(crate) fn check_complete(&self) -> Result<(), Error> {
        const N_SHOWN: usize = 5;
        let unknown: Vec<&str> =
            self.checkpoint.names().filter(|name| !self.claimed.contains(*name)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(Error::UnknownTensors {
            dir: self.checkpoint.dir().to_owned(),
            family: self.arch,
            n: unknown.len(),
            first: unknown[..unknown.len().min(N_SHOWN)].join("`, `"),
        })
    }

    fn error(&self, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Tensor {
            dir: self.checkpoint.dir().to_owned(),
            tensor: tensor.into(),
            expected: expected.into(),
            found: found.into(),
            hint: OTHER_CONFIG,
        }
    }
}
