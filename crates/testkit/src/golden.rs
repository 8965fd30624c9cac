//! Reference values from the `goldens` folder of the repository.

use std::path::{Path, PathBuf};

use paceline_gguf::safetensors::{DType, SafeTensors};

use crate::Token;

/// The `goldens` folder.
pub fn goldens_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens")
}

/// The references of one checkpoint, `golden.safetensors`. A missing tensor panics: the file is part of the
/// repository.
#[derive(Debug)]
pub struct Golden {
    tensors: SafeTensors,
}

impl Golden {
    /// Those of the checkpoint in `goldens/{name}`.
    pub fn open(name: &str) -> Golden {
        let path = goldens_dir().join(name).join("golden.safetensors");
        match SafeTensors::open_file(&path) {
            Ok(tensors) => Golden { tensors },
            Err(error) => panic!("{error}"),
        }
    }

    /// Values of `tensor`.
    pub fn f32(&self, tensor: &str) -> Vec<f32> {
        self.tensors.to_f32(tensor).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Shape of `tensor`, rows first.
    pub fn shape(&self, tensor: &str) -> Vec<usize> {
        let found = self.tensors.require_tensor(tensor).unwrap_or_else(|error| panic!("{error}"));
        found.shape.iter().map(|&n| n as usize).collect()
    }

    /// Values of an I32 `tensor`.
    pub fn i32(&self, tensor: &str) -> Vec<i32> {
        let found = self.tensors.require_tensor(tensor).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(found.dtype, DType::I32, "{tensor}");
        found.data.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// The tokens that the references were computed for.
    pub fn tokens(&self) -> Vec<Token> {
        self.i32("tokens").into_iter().map(|t| t as Token).collect()
    }

    /// True if there is such a tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.tensors.tensor(tensor).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_committed_ones() {
        let golden = Golden::open("qwen35");
        let n = golden.tokens().len();
        let shape = golden.shape("logits");
        assert_eq!((shape[0], shape[0] * shape[1]), (n, golden.f32("logits").len()));
        assert!(golden.has("hidden.0") && !golden.has("hidden.99"));
    }
}
