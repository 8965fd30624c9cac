#![forbid(unsafe_code)]
//! Target architectures: each one a page that loads its weights, proves their shapes, says what its layers
//! remember, and records its forward.
//!
//! A model never asks which device it runs on and never touches memory itself: it declares states
//! ([`Model::states`]) and records ops ([`Model::record`]). To add an architecture, write its file and add its
//! line to [`ARCHS`].

pub mod blocks;
mod gemma4;
mod hparams;
mod llama;
mod model;
mod qwen3;
mod qwen35;
mod qwen35moe;
mod qwen3moe;
mod qwen3next;
mod weights;

pub use hparams::Hparams;
pub use model::{Arch, Model, SharedWeights};
pub use weights::Weights;

use std::sync::Arc;

use paceline_backend::Backend;
use paceline_gguf::Gguf;

/// Every architecture; to add one, write its file and add its line.
pub const ARCHS: &[Arch] =
    &[qwen35::ARCH, qwen35moe::ARCH, qwen3next::ARCH, qwen3::ARCH, qwen3moe::ARCH, llama::ARCH, gemma4::ARCH];

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file itself is at fault: a key or tensor is missing or of the wrong type.
    #[error(transparent)]
    File(#[from] paceline_gguf::Error),
    /// The backend refused a weight.
    #[error(transparent)]
    Backend(#[from] paceline_backend::Error),
    /// No file of that name, though another model needs it.
    #[error("{file}: architecture `{arch}` is not supported; supported: {known}{hint}")]
    UnknownArch {
        /// The file.
        file: String,
        /// Its `general.architecture`.
        arch: String,
        /// Names of the registered architectures.
        known: String,
        /// A way out, starting with `; `, or empty.
        hint: &'static str,
    },
    /// A tensor's shape is not what the hyperparameters say.
    #[error("{file}: tensor `{tensor}`: expected shape {expected} ({meaning}), found {found}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shape that follows from the metadata, fastest dimension first.
        expected: String,
        /// What the dimensions mean.
        meaning: String,
        /// The shape in the file.
        found: String,
    },
    /// Hyperparameters that contradict each other or name something not implemented.
    #[error("{file}: {what}: expected {expected}, found {found}")]
    Hparam {
        /// The file.
        file: String,
        /// Which of them.
        what: String,
        /// What would work.
        expected: String,
        /// What the file says.
        found: String,
    },
}

/// Loads the target in `file`, whichever architecture it is.
pub fn load(file: &Arc<Gguf>, backend: &Arc<dyn Backend>) -> Result<Box<dyn Model>, Error> {
    let name = file.metadata().require_str("general.architecture")?;
    let Some(arch) = ARCHS.iter().find(|arch| arch.name == name) else {
        return Err(Error::UnknownArch {
            file: file.name().to_string(),
            arch: name.to_string(),
            known: ARCHS.iter().map(|a| a.name).collect::<Vec<_>>().join(", "),
            hint: if name.contains("dflash") {
                "; this is a drafter: give it with -md and its target with -m"
            } else {
                ""
            },
        });
    };
    (arch.load)(&Weights::new(file.clone(), backend.clone(), arch.name))
}
