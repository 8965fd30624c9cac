//! Qwen3.5 and 3.6 with a mixture of experts and a gated shared expert in place of the feed-forward layer.

use paceline_backend::HeadMap;

use crate::{Arch, blocks::Hybrid};

/// The architecture.
pub const ARCH: Arch = Arch { name: "qwen35moe", load: |w| Ok(Box::new(Hybrid::load(w, HeadMap::Tiled)?)) };
