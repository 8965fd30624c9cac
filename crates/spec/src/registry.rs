//! The drafters that exist, and loading one from a file.

use std::sync::Arc;

use paceline_backend::{Backend, StateConfig, States};
use paceline_gguf::Gguf;
use paceline_models::{ARCHS, Model};

use crate::Drafter;

/// A kind of drafter.
pub struct DrafterKind {
    /// Name for `--spec-type`, logs and metrics.
    pub name: &'static str,
    /// Other names that users of other servers type.
    pub aliases: &'static [&'static str],
    /// Where one comes from.
    pub origin: Origin,
    /// Loads and checks one against the target.
    pub load: fn(&LoadDrafter<'_>) -> Result<Box<dyn Drafter>, LoadError>,
}

/// Where a drafter comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// A file made for drafting: true if one with this `general.architecture` holds a drafter of the kind.
    File(fn(&str) -> bool),
    /// The file of any model that could be a target too.
    Model,
    /// The target's own file.
    Target,
    /// The text of each sequence: there is no file.
    Text,
}

impl DrafterKind {
    /// True if a file with this `general.architecture` is made to be a drafter of this kind.
    pub fn recognises(&self, arch: &str) -> bool {
        matches!(self.origin, Origin::File(holds) if holds(arch))
    }

    /// True if it comes from a file of its own.
    pub fn needs_file(&self) -> bool {
        matches!(self.origin, Origin::File(_) | Origin::Model)
    }

    /// True if it can come from a file of its own, at least one of another kind that goes by its name.
    pub fn may_have_file(&self) -> bool {
        let is_called_so = |kind: &DrafterKind| kind.needs_file() && kind.aliases.contains(&self.name);
        self.needs_file() || DRAFTERS.iter().any(is_called_so)
    }
}

/// Every drafter; to add one, write its file and add its line.
pub const DRAFTERS: &[DrafterKind] =
    &[crate::dflash::KIND, crate::mtp::KIND, crate::assistant::KIND, crate::small::KIND, crate::ngram::KIND];

/// Kinds that users of other servers know, and why they are refused.
const REFUSED: &[(&[&str], &str)] = &[
    (&["draft-eagle3", "eagle3"], "EAGLE-3 heads are not built yet"),
    (&["draft-dspark", "dspark"], "DSpark drafters are not built yet"),
    (&["domino", "laguna"], "these variants of DFlash are not built yet"),
    (
        &["ngram-map-k", "ngram-map-k4v"],
        "it drafts from counts of what followed an n-gram, which are not kept here; ngram-simple copies what \
         followed its last occurrence",
    ),
    (
        &["ngram-mod"],
        "its table is shared by all users, so that one's text would show in another's speed; ngram-simple keeps to \
         the sequence",
    ),
    (
        &["ngram-cache", "lookup"],
        "it needs files of n-gram statistics, which are not read here; ngram-simple needs none",
    ),
    (&["suffix", "copyspec", "recycle"], "this form of lookup is not built; ngram-simple is the nearest"),
];

/// The kind of that name or alias.
pub fn kind(name: &str) -> Result<&'static DrafterKind, KindError> {
    if let Some(kind) = DRAFTERS.iter().find(|kind| kind.name == name || kind.aliases.contains(&name)) {
        return Ok(kind);
    }
    let name = name.to_string();
    let known = DRAFTERS.iter().map(|k| k.name).collect::<Vec<_>>().join(", ");
    Err(match REFUSED.iter().find(|(names, _)| names.contains(&name.as_str())) {
        Some((_, why)) => KindError::Refused { name, why },
        None => KindError::Unknown { name, known },
    })
}

/// Why a name is no kind of drafter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KindError {
    /// Other servers have it.
    #[error("`{name}` is not supported: {why}")]
    Refused {
        /// The name.
        name: String,
        /// The reason.
        why: &'static str,
    },
    /// Nobody has it.
    #[error("expected {known} or none, found `{name}`")]
    Unknown {
        /// The name.
        name: String,
        /// Names of the registered kinds.
        known: String,
    },
}

/// What a drafter is loaded from and for.
pub struct LoadDrafter<'a> {
    /// The drafter's file; the target's for kinds that have none of their own.
    pub file: Arc<Gguf>,
    /// Where it shall run; the target is on the same backend.
    pub backend: &'a Arc<dyn Backend>,
    /// The target.
    pub target: &'a dyn Model,
    /// Where the target's sequences keep their states, for drafters that look at them.
    pub target_states: &'a Arc<dyn States>,
    /// How its own KV is stored.
    pub states: StateConfig,
    /// Most cells that its memory may hold over all sequences.
    pub n_cell_max: usize,
    /// Most tokens of a draft, as far as the kind has no limit of its own; none leaves the number to the kind.
    pub n_draft_max: Option<usize>,
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
    (kind_of(&request.file)?.load)(request)
}

/// The kind of drafter that `file` is, or can be.
pub fn kind_of(file: &Gguf) -> Result<&'static DrafterKind, LoadError> {
    let arch = file.metadata().require_str("general.architecture")?;
    let is_model = ARCHS.iter().any(|known| known.name == arch);
    let fits = |kind: &&DrafterKind| match kind.origin {
        Origin::File(holds) => holds(arch),
        Origin::Model => is_model,
        Origin::Target | Origin::Text => false,
    };
    match DRAFTERS.iter().find(fits) {
        Some(kind) => Ok(kind),
        None => Err(LoadError::UnknownArch {
            file: file.name().to_string(),
            arch: arch.to_string(),
            known: DRAFTERS.iter().filter(|k| k.needs_file()).map(|k| k.name).collect::<Vec<_>>().join(", "),
        }),
    }
}
