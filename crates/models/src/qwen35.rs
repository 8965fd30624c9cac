//! Qwen3.5 and 3.6, dense: a hybrid decoder.

use paceline_backend::HeadMap;

use crate::{Arch, blocks::Hybrid};

/// The architecture.
pub const ARCH: Arch = Arch { name: "qwen35", load: |w| Ok(Box::new(Hybrid::load(w, HeadMap::Tiled)?)) };
