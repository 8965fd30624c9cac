//! Qwen3-Next and Qwen3-Coder-Next: the hybrid decoder with experts that came before Qwen3.5. Value heads stay in the order of
//! the checkpoint, grouped by key head; some projections are packed in other ways, which the delta-rule block knows.

use paceline_backend::HeadMap;

use crate::{Arch, blocks::Hybrid};

/// The architecture.
pub const ARCH: Arch = Arch { name: "qwen3next", load: |w| Ok(Box::new(Hybrid::load(w, HeadMap::Grouped)?)) };
