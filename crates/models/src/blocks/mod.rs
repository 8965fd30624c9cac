//! The parts that architectures share.

pub mod attention;
pub mod decoder;
pub mod delta_net;
pub mod embedding;
pub mod ffn;
pub mod hybrid;
pub mod mlp;
pub mod moe;
pub mod nextn;
pub mod per_layer;
pub mod sandwich;

pub use attention::{Attention, AttentionShape, Values};
pub use decoder::Decoder;
pub use delta_net::{DeltaNet, DeltaNetShape};
pub use embedding::Ends;
pub use ffn::{Ffn, FfnShape};
pub use hybrid::Hybrid;
pub use mlp::{Act, Mlp};
pub use moe::{Moe, MoeShape};
pub use nextn::NextN;
pub use per_layer::{PerLayerEmbedding, PerLayerInput};
pub use sandwich::{Sandwich, SandwichShape};
