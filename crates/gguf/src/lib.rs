//! Model files: GGUF (read, written) and safetensors (read). Knows the sizes of tensor types and no maths.
//!
//! A GGUF file, v2 or v3, all little-endian:
//!
//! ```text
//! "GGUF" version n_tensors n_keys │ key type value … │ name n_dims ne… type offset … │ pad │ tensor bytes …
//!        header                     metadata           tensor directory               to a multiple of
//!                                                                                     general.alignment
//! ```
//!
//! Offsets count from the end of the padding. A model may be split over `name-00001-of-0000N.gguf` …: each shard is a file
//! of this form, the first one holds the metadata of all.
//!
//! What a file claims is checked before it is used, and before anything is allocated by its size. So a [`Gguf`] that
//! opened is sound: the data of every tensor lies inside the file, aligned, of exactly the size that its type and shape
//! ask for, and overlaps no other. A file that fails earns an [`Error`] that says which file, which tensor or key, what
//! was expected, what was found, and the way out.
//!
//! Reading order: [`GgmlType`], [`Value`] and [`Metadata`], [`Gguf`], [`Writer`], [`safetensors`].
//!
//! Source: the GGUF specification of the ggml project and the safetensors format description of Hugging Face.

mod bytes;
mod cursor;
mod error;
mod foreign;
mod ggml_type;
mod header;
mod metadata;
mod reader;
pub mod safetensors;
mod shards;
mod strings;
mod value;
mod writer;

pub use error::Error;
pub use ggml_type::GgmlType;
pub use header::TensorInfo;
pub use metadata::Metadata;
pub use reader::Gguf;
pub use strings::Strings;
pub use value::{Array, Value, ValueType};
pub use writer::{TensorSink, TensorSpec, Writer, to_bytes};
