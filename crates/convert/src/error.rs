//! Why a checkpoint can't be converted. Every message says where, what was expected, what was found, and the way out.

use std::io;
use std::path::{Path, PathBuf};

/// Why a conversion stopped. No output file is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{path}: can't {action}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried: `read`, `write` …
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },

    /// A file of the directory is missing.
    #[error("{dir}: expected {expected}, found none; {hint}")]
    MissingFile {
        /// The Hugging Face directory.
        dir: PathBuf,
        /// The file, or the choice of files.
        expected: &'static str,
        /// The way out.
        hint: &'static str,
    },

    /// A file that should be JSON isn't.
    #[error("{path}: expected JSON: {source}; the file is damaged: download it again")]
    Json {
        /// Which file.
        path: PathBuf,
        /// The parser's reason, with the place.
        source: serde_json::Error,
    },

    /// A key of a JSON file is missing, or its value is of another kind or not supported.
    #[error("{path}: `{key}`: expected {expected}, found {found}{}{hint}", if .hint.is_empty() { "" } else { "; " })]
    Config {
        /// Which file.
        path: PathBuf,
        /// Which key, with dots where it is nested.
        key: String,
        /// What this converter can work with.
        expected: String,
        /// What is there.
        found: String,
        /// The way out, where there is one.
        hint: &'static str,
    },

    /// An architecture without a family here.
    #[error("{path}: `architectures`: {found} can't be converted; supported: {supported}")]
    Architecture {
        /// The config file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// Every architecture that is supported.
        supported: String,
    },

    /// A tensor of the checkpoint is missing, or has another type or shape than its config says.
    #[error("{dir}: tensor `{tensor}`: expected {expected}, found {found}; {hint}")]
    Tensor {
        /// The Hugging Face directory.
        dir: PathBuf,
        /// The tensor's name in the checkpoint.
        tensor: String,
        /// What the family asks for.
        expected: String,
        /// What is there.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// Tensors that the family does not know: leaving them out would silently change the model.
    #[error(
        "{dir}: {n} tensors are no part of a {family} model as this converter knows it, first `{first}`; the result would \
         not compute what the checkpoint computes"
    )]
    UnknownTensors {
        /// The Hugging Face directory.
        dir: PathBuf,
        /// The family's GGUF name.
        family: &'static str,
        /// How many.
        n: usize,
        /// The names of the first few.
        first: String,
    },

    /// The tokenizer is of a kind that GGUF metadata, or this converter, can't express.
    #[error("{path}: expected {expected}, found {found}; {hint}")]
    Tokenizer {
        /// Which file.
        path: PathBuf,
        /// What this converter can work with.
        expected: String,
        /// What is there.
        found: String,
        /// The way out.
        hint: String,
    },

    /// A drafter and a target that don't belong together.
    #[error(
        "{drafter} does not fit {target}: {what}: the drafter expects {expected}, the target has {found}"
    )]
    Mismatch {
        /// The drafter's directory.
        drafter: PathBuf,
        /// The target's directory.
        target: PathBuf,
        /// What differs.
        what: &'static str,
        /// The drafter's value.
        expected: String,
        /// The target's value.
        found: String,
    },

    /// The name of a mix of types that a person typed.
    #[error("type `{name}` is unknown; known: {known}")]
    UnknownType {
        /// What was typed.
        name: String,
        /// All names.
        known: String,
    },

    /// The name of a shape that nobody has written down.
    #[error("shape `{name}` is unknown; known: {known}; `:N` behind a name keeps N layers")]
    UnknownShape {
        /// What was asked for.
        name: String,
        /// All names.
        known: String,
    },

    /// A shape cut to a number of layers that it does not have.
    #[error("shape `{name}`: expected 1 to {n_layer} layers behind the colon, found `{found}`")]
    BadCut {
        /// What was asked for.
        name: String,
        /// Layers of the whole.
        n_layer: usize,
        /// What stands behind the colon.
        found: String,
    },

    /// An importance matrix that can't be read, or is another model's.
    #[error("{file}: {what}: expected {expected}, found {found}; {hint}")]
    Importance {
        /// The file.
        file: String,
        /// The tensor, or what is wrong.
        what: String,
        /// What would work.
        expected: String,
        /// What is there.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// A tensor that can't be quantised, or should not be.
    #[error("{file}: tensor `{tensor}`: {why}; {hint}")]
    Quantize {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Why.
        why: String,
        /// The way out.
        hint: &'static str,
    },

    /// A pattern for names of tensors that is none.
    #[error("`{pattern}`: expected a regular expression: {source}")]
    Pattern {
        /// What was typed.
        pattern: String,
        /// What is wrong with it.
        source: regex_lite::Error,
    },

    /// A safetensors file can't be read, or the GGUF file can't be written.
    #[error(transparent)]
    File(#[from] paceline_gguf::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { path: path.to_owned(), action, source }
    }
}
