//! Sizes of published models, one line each.

/// The sizes of a target.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// What it is asked for by.
    pub name: &'static str,
    /// Layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Width of the feed-forward layer.
    pub n_ff: usize,
    /// Query heads, KV heads, and the width of one.
    pub heads: [usize; 3],
    /// Tokens.
    pub n_vocab: usize,
    /// Whether the embedding is the head too.
    pub tied: bool,
    /// What the layers are made of.
    pub layers: Layers,
}

/// Kinds of layers, which are architectures of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// `qwen3`: attention and a gated MLP.
    Dense,
    /// `qwen3moe`: attention and experts.
    Experts {
        /// Experts of a layer.
        n: usize,
        /// How many of them a row uses.
        n_used: usize,
        /// Width of one.
        n_ff: usize,
    },
    /// `qwen35`: three layers in four with a gated delta rule, the fourth with gated attention.
    Hybrid {
        /// Key heads of the delta rule.
        n_key: usize,
        /// Its value heads.
        n_value: usize,
    },
    /// `qwen35moe` or `qwen3next`: the same with experts, one of which every row goes through.
    HybridExperts {
        /// The architecture, which says how the delta rule's projections are packed.
        arch: &'static str,
        /// Key heads of the delta rule.
        n_key: usize,
        /// Its value heads.
        n_value: usize,
        /// Experts, those that a row uses, and the width of one.
        experts: [usize; 3],
    },
    /// `gemma4`: layers that look back through a window, and every sixth one that sees everything.
    Windowed {
        /// Cells that a window keeps; the shape's heads are those of its layers.
        window: usize,
        /// KV heads of the other layers, and the width of theirs.
        full: [usize; 2],
        /// Layers with keys and values of their own, the first ones; the others read theirs.
        n_owner: usize,
        /// Width of each layer's own embedding; 0 for none.
        n_per_layer: usize,
        /// Experts, those that a row uses, and the width of one.
        experts: Option<[usize; 3]>,
    },
}

/// The sizes of a target's DFlash drafter, where they are not the target's own.
#[derive(Clone, Copy, Debug)]
pub struct DrafterShape {
    /// The target's shape.
    pub target: &'static str,
    /// Layers.
    pub n_layer: usize,
    /// Width of the feed-forward layer.
    pub n_ff: usize,
    /// Query heads, KV heads, and the width of one.
    pub heads: [usize; 3],
    /// Rows that all layers but the last see of the context; 0 is all.
    pub window: usize,
}

/// What Qwen3 models have in common.
const QWEN3: Shape = Shape {
    name: "",
    n_layer: 0,
    n_embd: 0,
    n_ff: 0,
    heads: [0; 3],
    n_vocab: 151_936,
    tied: false,
    layers: Layers::Dense,
};
const TIED: Shape = Shape { tied: true, ..QWEN3 };
const QWEN35: Shape = Shape { n_vocab: 248_320, layers: HYBRID_32, ..QWEN3 };
const TIED35: Shape = Shape { tied: true, ..QWEN35 };
const TOY: Shape = Shape { n_vocab: 512, ..TIED };

const HYBRID_16: Layers = Layers::Hybrid { n_key: 16, n_value: 16 };
const HYBRID_32: Layers = Layers::Hybrid { n_key: 16, n_value: 32 };
const HYBRID_48: Layers = Layers::Hybrid { n_key: 16, n_value: 48 };
const A3B: Layers = Layers::Experts { n: 128, n_used: 8, n_ff: 768 };

const A3B_35: Layers =
    Layers::HybridExperts { arch: "qwen35moe", n_key: 16, n_value: 32, experts: [256, 8, 512] };
const NEXT: Layers =
    Layers::HybridExperts { arch: "qwen3next", n_key: 16, n_value: 32, experts: [512, 10, 512] };

const GEMMA: Shape = Shape { n_vocab: 262_144, ..TIED };
const GEMMA_31B: Layers =
    Layers::Windowed { window: 1024, full: [4, 512], n_owner: 60, n_per_layer: 0, experts: None };
const GEMMA_26B: Layers = Layers::Windowed {
    window: 1024,
    full: [2, 512],
    n_owner: 30,
    n_per_layer: 0,
    experts: Some([128, 8, 704]),
};
const GEMMA_E4B: Layers =
    Layers::Windowed { window: 512, full: [2, 512], n_owner: 24, n_per_layer: 256, experts: None };
const TOY_GEMMA: Layers =
    Layers::Windowed { window: 64, full: [1, 128], n_owner: 7, n_per_layer: 32, experts: None };

const TOY_HYBRID: Layers = Layers::Hybrid { n_key: 2, n_value: 4 };
const TOY_EXPERTS: Layers = Layers::Experts { n: 8, n_used: 2, n_ff: 256 };

/// Every shape; the toys are for tests.
#[rustfmt::skip]
pub const SHAPES: &[Shape] = &[
    Shape { name: "toy",           n_layer:  8, n_embd:  256, n_ff:   512, heads: [ 4, 2,  64], ..TOY },
    Shape { name: "toy-hybrid",    n_layer:  8, n_embd:  256, n_ff:   512, heads: [ 4, 2,  64], layers: TOY_HYBRID, ..TOY },
    Shape { name: "toy-moe",       n_layer:  8, n_embd:  256, n_ff:   512, heads: [ 4, 2,  64], layers: TOY_EXPERTS, ..TOY },
    Shape { name: "toy-gemma",     n_layer:  8, n_embd:  256, n_ff:   512, heads: [ 4, 2,  64], layers: TOY_GEMMA, ..TOY },
    Shape { name: "qwen3-0.6b",    n_layer: 28, n_embd: 1024, n_ff:  3072, heads: [16, 8, 128], ..TIED },
    Shape { name: "qwen3-1.7b",    n_layer: 28, n_embd: 2048, n_ff:  6144, heads: [16, 8, 128], ..TIED },
    Shape { name: "qwen3-4b",      n_layer: 36, n_embd: 2560, n_ff:  9728, heads: [32, 8, 128], ..TIED },
    Shape { name: "qwen3-8b",      n_layer: 36, n_embd: 4096, n_ff: 12288, heads: [32, 8, 128], ..QWEN3 },
    Shape { name: "qwen3-14b",     n_layer: 40, n_embd: 5120, n_ff: 17408, heads: [40, 8, 128], ..QWEN3 },
    Shape { name: "qwen3-32b",     n_layer: 64, n_embd: 5120, n_ff: 25600, heads: [64, 8, 128], ..QWEN3 },
    Shape { name: "qwen3-30b-a3b", n_layer: 48, n_embd: 2048, n_ff:  6144, heads: [32, 4, 128], layers: A3B, ..QWEN3 },
    Shape { name: "qwen3.5-0.8b",  n_layer: 24, n_embd: 1024, n_ff:  3584, heads: [ 8, 2, 256], layers: HYBRID_16, ..TIED35 },
    Shape { name: "qwen3.5-4b",    n_layer: 32, n_embd: 2560, n_ff:  9216, heads: [16, 4, 256], ..TIED35 },
    Shape { name: "qwen3.5-9b",    n_layer: 32, n_embd: 4096, n_ff: 12288, heads: [16, 4, 256], ..QWEN35 },
    Shape { name: "qwen3.6-27b",   n_layer: 64, n_embd: 5120, n_ff: 17408, heads: [24, 4, 256], layers: HYBRID_48, ..QWEN35 },
    Shape { name: "qwen3.5-35b-a3b",  n_layer: 40, n_embd: 2048, n_ff: 0, heads: [16, 2, 256], layers: A3B_35, ..QWEN35 },
    Shape { name: "qwen3-coder-next", n_layer: 48, n_embd: 2048, n_ff: 0, heads: [16, 2, 256], layers: NEXT, ..QWEN3 },
    Shape { name: "gemma4-e4b",     n_layer: 42, n_embd: 2560, n_ff: 10240, heads: [ 8,  2, 256], layers: GEMMA_E4B, ..GEMMA },
    Shape { name: "gemma4-26b-a4b", n_layer: 30, n_embd: 2816, n_ff:  2112, heads: [16,  8, 256], layers: GEMMA_26B, ..GEMMA },
    Shape { name: "gemma4-31b",     n_layer: 60, n_embd: 5376, n_ff: 21504, heads: [32, 16, 256], layers: GEMMA_31B, ..GEMMA },
];

/// Every drafter. Those of the smaller targets were never published: their layers are the target's.
#[rustfmt::skip]
pub const DRAFTERS: &[DrafterShape] = &[
    DrafterShape { target: "toy",           n_layer: 2, n_ff:   512, heads: [ 4, 2,  64], window: 0 },
    DrafterShape { target: "toy-hybrid",    n_layer: 2, n_ff:   512, heads: [ 4, 2,  64], window: 64 },
    DrafterShape { target: "toy-moe",       n_layer: 2, n_ff:   512, heads: [ 4, 2,  64], window: 0 },
    DrafterShape { target: "qwen3-0.6b",    n_layer: 5, n_ff:  3072, heads: [16, 8, 128], window: 0 },
    DrafterShape { target: "qwen3-1.7b",    n_layer: 5, n_ff:  6144, heads: [16, 8, 128], window: 0 },
    DrafterShape { target: "qwen3-4b",      n_layer: 5, n_ff:  9728, heads: [32, 8, 128], window: 0 },
    DrafterShape { target: "qwen3-8b",      n_layer: 5, n_ff: 12288, heads: [32, 8, 128], window: 0 },
    DrafterShape { target: "qwen3-30b-a3b", n_layer: 8, n_ff:  6144, heads: [32, 4, 128], window: 4096 },
    DrafterShape { target: "qwen3.6-27b",   n_layer: 5, n_ff: 17408, heads: [32, 8, 128], window: 2048 },
];

impl Shape {
    /// `general.architecture`.
    pub fn arch(&self) -> &'static str {
        match self.layers {
            Layers::Dense => "qwen3",
            Layers::Experts { .. } => "qwen3moe",
            Layers::Hybrid { .. } => "qwen35",
            Layers::HybridExperts { arch, .. } => arch,
            Layers::Windowed { .. } => "gemma4",
        }
    }

    /// Whether layer `il` has a delta rule in place of attention.
    pub fn is_recurrent(&self, il: usize) -> bool {
        self.is_hybrid() && !(il + 1).is_multiple_of(ATTENTION_INTERVAL)
    }

    /// Whether most layers have a delta rule.
    pub fn is_hybrid(&self) -> bool {
        matches!(self.layers, Layers::Hybrid { .. } | Layers::HybridExperts { .. })
    }

    /// Whether layer `il` looks back through a window.
    pub fn is_sliding(&self, il: usize) -> bool {
        matches!(self.layers, Layers::Windowed { .. }) && !(il + 1).is_multiple_of(FULL_INTERVAL)
    }

    /// The layers that a drafter taps, from 0: five evenly spread ones, as published drafters do, or the first ones of a target
    /// too small for that.
    pub fn taps(&self) -> Vec<usize> {
        const N: usize = 5;
        if self.n_layer < 8 {
            return (0..self.n_layer.min(N)).collect();
        }
        let span = (self.n_layer - 4) as f64 / (N - 1) as f64;
        (0..N).map(|i| (1.0 + i as f64 * span).round_ties_even() as usize).collect()
    }
}

/// In models with windows, every so many layers see everything.
const FULL_INTERVAL: usize = 6;
/// In hybrids, every so many layers attend.
pub(super) const ATTENTION_INTERVAL: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_published_ones() {
        let check = |name: &str, billions: f64| {
            let shape = SHAPES.iter().find(|shape| shape.name == name).unwrap();
            let draft = crate::synth::tensors::Draft::target(shape);
            let n: u64 = draft.tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
            let found = n as f64 / 1e9;
            assert!((found / billions - 1.0).abs() < 0.002, "{name}: {found} B parameters");
        };
        check("qwen3-0.6b", 0.596);
        check("qwen3-4b", 4.022);
        check("qwen3-30b-a3b", 30.53);
        check("qwen3.5-0.8b", 0.752);
        check("qwen3.5-4b", 4.206);
        check("qwen3.5-9b", 8.954);
        check("qwen3.6-27b", 26.896);
        check("qwen3.5-35b-a3b", 34.661);
        check("qwen3-coder-next", 79.674);
        check("gemma4-e4b", 7.52);
        check("gemma4-26b-a4b", 25.23);
        check("gemma4-31b", 30.70);
    }

    #[test]
    fn taps_are_the_published_ones() {
        let of = |n_layer| Shape { n_layer, ..SHAPES[0] }.taps();
        assert_eq!(of(36), [1, 9, 17, 25, 33]);
        assert_eq!(of(64), [1, 16, 31, 46, 61]);
        assert_eq!(of(8), [1, 2, 3, 4, 5]);
        assert_eq!(of(3), [0, 1, 2]);
    }

    #[test]
    fn every_drafter_has_a_target() {
        for drafter in DRAFTERS {
            assert!(SHAPES.iter().any(|shape| shape.name == drafter.target), "{}", drafter.target);
        }
    }
}
