//! The drafters that exist, and loading one from a file.

use std::sync::Arc;

use paceline_backend::{Backend, StateConfig};
use paceline_gguf::Gguf;
use paceline_models::Model;

use crate::Drafter;

/// A kind of drafter.
pub struct DrafterKind {
    /// Name for `--spec-type`, logs and metrics.
    pub name: &'static str,
    /// Other names that users of other servers type.
    pub aliases: &'static [&'static str],
    /// True if a file with this `general.architecture` holds one.
    pub recognises: fn(&str) -> bool,
    /// Loads and checks one against the target.
    pub load: fn(&LoadDrafter<'_>) -> Result<Box<dyn Drafter>, LoadError>,
}

/// Every drafter; to add one, write its file and add its line.
pub const DRAFTERS: &[DrafterKind] = &[crate::dflash::KIND];

/// What a drafter is loaded from and for.
pub struct LoadDrafter<'a> {
    /// The drafter's file.
    pub file: Arc<Gguf>,
    /// Where it shall run; the target is on the same backend.
    pub backend: &'a Arc<dyn Backend>,
    /// The target.
    pub target: &'a dyn Model,
    /// How its KV is stored.
    pub states: StateConfig,
    /// Most cells that its memory may hold over all sequences.
    pub n_cell_max: usize,
}

/// Why a drafter could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file itself is at fault.
    #[error(transparent)]
    File(#[from] paceline_gguf::Error),
    /// A weight is missing or has the wrong shape.
    #[error(transparent)]
    Model(#[from] paceline_models::Error),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] paceline_backend::Error),
    /// The file is no drafter that we know.
    #[error("{file}: architecture `{arch}` is not a drafter; known drafters: {known}")]
    UnknownArch {
        /// The file.
        file: String,
        /// Its `general.architecture`.
        arch: String,
        /// Names of the registered kinds.
        known: String,
    },
    /// A variant that is recognised and not implemented.
    #[error("{file}: this is a {variant} drafter, which is not supported yet; {way_out}")]
    Unsupported {
        /// The file.
        file: String,
        /// Name of the variant.
        variant: String,
        /// What to do instead.
        way_out: String,
    },
    /// The drafter was made for another target, or the file contradicts itself.
    #[error("{file}: {what}: expected {expected}, found {found}{hint}")]
    Mismatch {
        /// The file.
        file: String,
        /// Which part of the contract.
        what: String,
        /// What the target or the format asks for.
        expected: String,
        /// What the file says.
        found: String,
        /// A way out, starting with `; `, or empty.
        hint: String,
    },
}

/// Loads the drafter in `request.file`, whichever kind it is.
pub fn load(request: &LoadDrafter<'_>) -> Result<Box<dyn Drafter>, LoadError> {
    let arch = request.file.metadata().require_str("general.architecture")?;
    match DRAFTERS.iter().find(|kind| (kind.recognises)(arch)) {
        Some(kind) => (kind.load)(request),
        None => Err(LoadError::UnknownArch {
            file: request.file.name().to_string(),
            arch: arch.to_string(),
            known: DRAFTERS.iter().map(|k| k.name).collect::<Vec<_>>().join(", "),
        }),
    }
}
