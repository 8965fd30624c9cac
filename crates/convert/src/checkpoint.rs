//! A Hugging Face directory: `config.json` and safetensors files.

use std::path::{Path, PathBuf};

use paceline_gguf::safetensors::{DType, SafeTensor, SafeTensors};

use crate::Error;
use crate::config::Config;

/// An open directory. Weights are mapped, not read.
pub(crate) struct Checkpoint {
    dir: PathBuf,
    /// `config.json`.
    pub(crate) config: Config,
    tensors: SafeTensors,
}

impl Checkpoint {
    pub(crate) fn open(dir: &Path) -> Result<Checkpoint, Error> {
        let config = read_config(dir)?;
        let quantized = config.get("quantization_config").is_some();
        let hint = "convert the original in BF16 instead";
        if quantized {
            return Err(config.error("quantization_config", "weights that are plain floats", hint));
        }
        Ok(Checkpoint { dir: dir.to_owned(), config, tensors: SafeTensors::open_dir(dir)? })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn has(&self, tensor: &str) -> bool {
        self.tensors.tensor(tensor).is_some()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.names()
    }

    /// Dimensions, the slowest first.
    pub(crate) fn shape(&self, tensor: &str) -> Option<Vec<usize>> {
        let tensor = self.tensors.tensor(tensor)?;
        // What is mapped has sizes that fit memory's addresses.
        Some(tensor.shape.iter().map(|&n| n as usize).collect())
    }

    /// Fails unless the elements can be read as floats.
    pub(crate) fn check_floats(&self, tensor: &str) -> Result<(), Error> {
        let tensor = self.tensors.require_tensor(tensor)?;
        SafeTensor { data: &[], ..tensor }.to_f32()?;
        Ok(())
    }

    /// All values of a tensor of whole numbers.
    pub(crate) fn integers(&self, tensor: &str) -> Result<Vec<i32>, Error> {
        let found = self.tensors.require_tensor(tensor)?;
        let narrow = |x: &[u8; 8]| i32::try_from(i64::from_le_bytes(*x)).ok();
        let numbers = match found.dtype {
            DType::I32 => Some(found.data.as_chunks().0.iter().map(|x| i32::from_le_bytes(*x)).collect()),
            DType::I64 => found.data.as_chunks().0.iter().map(narrow).collect(),
            _ => None,
        };
        numbers.ok_or_else(|| Error::Tensor {
            dir: self.dir.clone(),
            tensor: tensor.to_owned(),
            expected: "whole numbers of 32 bits".to_owned(),
            found: format!("{} values", found.dtype),
            hint: "the checkpoint is damaged: download it again",
        })
    }

    /// The tensor as rows of `row_len`, which must divide it.
    pub(crate) fn rows(&self, tensor: &str, row_len: usize) -> Result<Rows<'_>, Error> {
        let tensor = self.tensors.require_tensor(tensor)?;
        let row_bytes = row_len * tensor.dtype.n_bytes();
        assert!(
            row_bytes > 0 && tensor.data.len().is_multiple_of(row_bytes),
            "rows of {row_len} don't fill {tensor:?}"
        );
        Ok(Rows { tensor, row_bytes })
    }
}

/// A tensor that is decoded row by row.
pub(crate) struct Rows<'a> {
    tensor: SafeTensor<'a>,
    row_bytes: usize,
}

impl Rows<'_> {
    pub(crate) fn len(&self) -> usize {
        self.tensor.data.len() / self.row_bytes
    }

    pub(crate) fn row(&self, i: usize) -> Result<Vec<f32>, Error> {
        let data = &self.tensor.data[i * self.row_bytes..][..self.row_bytes];
        Ok(SafeTensor { data, ..self.tensor }.to_f32()?)
    }
}

/// `config.json` of a directory.
pub(crate) fn read_config(dir: &Path) -> Result<Config, Error> {
    let path = dir.join("config.json");
    if !path.exists() {
        return Err(Error::MissingFile {
            dir: dir.to_owned(),
            expected: "`config.json`",
            hint: "give the directory of a Hugging Face model with its safetensors files",
        });
    }
    Config::read(&path)
}
