//! From a file's tensors to weights that a backend holds, every shape proven on the way.

use std::{fmt::Display, sync::Arc};

use paceline_backend::{Backend, Experts, LocalKernels, Matrix, Vector, WeightId, WeightSource};
use paceline_gguf::{Gguf, Metadata, TensorInfo};

use crate::Error;

/// The weights of one file, on their way to one backend.
pub struct Weights {
    file: Arc<Gguf>,
    backend: Arc<dyn Backend>,
    prefix: String,
}

impl Weights {
    /// The weights of `file`; keys are looked up under `prefix`.
    pub fn new(file: Arc<Gguf>, backend: Arc<dyn Backend>, prefix: &str) -> Weights {
        Weights { file, backend, prefix: prefix.to_string() }
    }

    /// The prefix of the architecture's keys.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &Metadata {
        self.file.metadata()
    }

    /// The file.
    pub fn file(&self) -> &Arc<Gguf> {
        &self.file
    }

    /// `suffix` under the architecture's prefix.
    pub fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    /// True if the file has the tensor.
    pub fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// Rows of the token embedding table.
    pub fn n_vocab(&self) -> Result<usize, Error> {
        let table = self.file.require_tensor("token_embd.weight")?;
        Ok(table.shape.get(1).map_or(1, |&n| n as usize))
    }

    /// The matrix `name` of shape `[n_in, n_out]`, fastest dimension first; `meaning` explains the dimensions.
    pub fn matrix(&self, name: &str, [n_in, n_out]: [usize; 2], meaning: &str) -> Result<Matrix, Error> {
        let id = self.upload(self.table(name, [n_in, n_out], meaning)?)?;
        Ok(Matrix { id, n_in, n_out })
    }

    /// The same matrix, its shape proven, for who reads rows of it in the file.
    pub fn table(&self, name: &str, [n_in, n_out]: [usize; 2], meaning: &str) -> Result<&TensorInfo, Error> {
        let tensor = self.file.require_tensor(name)?;
        let found = &tensor.shape;
        let dims = [n_in as u64, n_out as u64];
        // A matrix of one row may be stored as a vector.
        let fits = found.as_slice() == dims
            || (found.len() == 1 && n_out == 1 && found[0] == dims[0])
            || (found.len() > 2 && found[..2] == dims && found[2..].iter().all(|&n| n == 1));
        match fits {
            true => Ok(tensor),
            false => Err(self.shape(tensor, format!("[{n_in}, {n_out}]"), meaning)),
        }
    }

    /// The matrices of all experts, `name` of shape `[n_in, n_out, n_expert]`.
    pub fn experts(
        &self,
        name: &str,
        [n_in, n_out, n_expert]: [usize; 3],
        meaning: &str,
    ) -> Result<Experts, Error> {
        let tensor = self.file.require_tensor(name)?;
        if tensor.shape != [n_in, n_out, n_expert].map(|n| n as u64) {
            return Err(self.shape(tensor, format!("[{n_in}, {n_out}, {n_expert}]"), meaning));
        }
        Ok(Experts { id: self.upload(tensor)?, n_in, n_out, n_expert })
    }

    /// The kernels of local convolutions, `name` of shape `[channels, n_tap, n_side]`.
    pub fn local_kernels(
        &self,
        name: &str,
        [channels, n_tap, n_side]: [usize; 3],
        meaning: &str,
    ) -> Result<LocalKernels, Error> {
        let id = self.experts(name, [channels, n_tap, n_side], meaning)?.id;
        Ok(LocalKernels { id, channels, n_tap, n_side })
    }

    /// The vector `name` of `len` values.
    pub fn vector(&self, name: &str, len: usize, meaning: &str) -> Result<Vector, Error> {
        let tensor = self.file.require_tensor(name)?;
        if tensor.n_elements() != len as u64 {
            return Err(self.shape(tensor, format!("[{len}]"), meaning));
        }
        Ok(Vector { id: self.upload(tensor)?, len })
    }

    /// [`matrix`](Self::matrix), where the file has it.
    pub fn matrix_opt(&self, name: &str, dims: [usize; 2], meaning: &str) -> Result<Option<Matrix>, Error> {
        self.has(name).then(|| self.matrix(name, dims, meaning)).transpose()
    }

    /// [`vector`](Self::vector), where the file has it.
    pub fn vector_opt(&self, name: &str, len: usize, meaning: &str) -> Result<Option<Vector>, Error> {
        self.has(name).then(|| self.vector(name, len, meaning)).transpose()
    }

    /// An error about a hyperparameter.
    pub fn hparam(&self, what: &str, expected: impl Display, found: impl Display) -> Error {
        Error::Hparam {
            file: self.file.name().to_string(),
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn shape(&self, tensor: &TensorInfo, expected: String, meaning: &str) -> Error {
        Error::Shape {
            file: self.file.name().to_string(),
            tensor: tensor.name.clone(),
            expected,
            meaning: meaning.to_string(),
            found: format!("{:?}", tensor.shape),
        }
    }

    fn upload(&self, tensor: &TensorInfo) -> Result<WeightId, Error> {
        let index = self.file.tensors().iter().position(|t| t.name == tensor.name);
        let Some(index) = index else { unreachable!("the tensor came from this file") };
        Ok(self.backend.upload(&WeightSource { file: self.file.clone(), tensor: index })?)
    }
}
