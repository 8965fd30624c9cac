//! The keys and tensors of a shape, as files of its architecture have them.

use paceline_gguf::{Metadata, Value};

use super::shapes::{ATTENTION_INTERVAL, DrafterShape, Layers, Shape};
use super::vocabulary;

/// A file to be.
pub(super) struct Draft {
    pub(super) arch: &'static str,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<Tensor>,
}

/// A tensor of it.
pub(super) struct Tensor {
    pub(super) name: String,
    /// ne0 first.
    pub(super) shape: Vec<u64>,
    pub(super) values: Values,
}

/// What a tensor holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Values {
    /// Mean 0 and deviation `1/√ne0`, so that a product with inputs of deviation 1 has deviation 1 again.
    Weights,
    /// This mean, and a deviation of a tenth of it: norms, and the vectors of the delta rule.
    Around(f32),
    /// Divisors of rotary frequencies: 1 for the first so many, and for the others what leaves nothing of them.
    Divisors(usize),
}

/// Width of a key head and of a value head of the delta rule, and the taps of its convolution.
const DELTA_DIM: usize = 128;
const CONV_WIDTH: usize = 4;
/// The architecture that packs the delta rule's projections in its own way.
const NEXT: &str = "qwen3next";
/// Rows that a drafter fills at once.
const BLOCK: usize = 16;

impl Draft {
    /// A target.
    pub(super) fn target(shape: &Shape) -> Draft {
        if let Layers::Windowed { .. } = shape.layers {
            return Draft::windowed(shape);
        }
        let hybrid = shape.is_hybrid();
        let [_, _, head_dim] = shape.heads;
        let mut draft = Draft::new(shape.arch());
        draft.metadata.insert("general.name", format!("synthetic {}", shape.name));
        draft.sizes(shape.n_layer, shape.n_embd, shape.n_ff, shape.heads);
        draft.size("context_length", if hybrid { 262_144 } else { 40_960 });
        draft.key("rope.freq_base", if hybrid { 1e7f32 } else { 1e6 });
        draft.size("rope.dimension_count", if hybrid { head_dim / 4 } else { head_dim });
        match shape.layers {
            Layers::Dense => {}
            Layers::Experts { n, n_used, n_ff } => {
                draft.size("expert_count", n);
                draft.size("expert_used_count", n_used);
                draft.size("expert_feed_forward_length", n_ff);
            }
            Layers::Windowed { .. } => {}
            Layers::Hybrid { n_key, n_value } | Layers::HybridExperts { n_key, n_value, .. } => {
                if let Layers::HybridExperts { experts: [n, n_used, n_ff], .. } = shape.layers {
                    draft.size("expert_count", n);
                    draft.size("expert_used_count", n_used);
                    draft.size("expert_feed_forward_length", n_ff);
                    draft.size("expert_shared_feed_forward_length", n_ff);
                }
                draft.key("rope.dimension_sections", vec![11i32, 11, 10, 0]);
                draft.size("ssm.conv_kernel", CONV_WIDTH);
                draft.size("ssm.state_size", DELTA_DIM);
                draft.size("ssm.group_count", n_key);
                draft.size("ssm.time_step_rank", n_value);
                draft.size("ssm.inner_size", n_value * DELTA_DIM);
                draft.size("full_attention_interval", ATTENTION_INTERVAL);
            }
        }
        let pre = if hybrid && shape.arch() != NEXT { "qwen35" } else { "qwen2" };
        vocabulary::write(&mut draft.metadata, shape.n_vocab, pre);

        draft.add("token_embd.weight", &[shape.n_embd, shape.n_vocab], Values::Weights);
        draft.norm("output_norm.weight", shape.n_embd);
        if !shape.tied {
            draft.add("output.weight", &[shape.n_embd, shape.n_vocab], Values::Weights);
        }
        for il in 0..shape.n_layer {
            let mut layer = Layer { draft: &mut draft, il };
            layer.norm("attn_norm", shape.n_embd);
            match shape.layers {
                Layers::Hybrid { n_key, n_value } | Layers::HybridExperts { n_key, n_value, .. }
                    if shape.is_recurrent(il) =>
                {
                    layer.delta_net(shape.n_embd, n_key, n_value);
                }
                _ => layer.attention(shape.n_embd, shape.heads, hybrid),
            }
            layer.norm(if hybrid { "post_attention_norm" } else { "ffn_norm" }, shape.n_embd);
            match shape.layers {
                Layers::Experts { n, n_ff, .. } => layer.experts(shape.n_embd, n, n_ff),
                Layers::HybridExperts { experts: [n, _, n_ff], .. } => {
                    layer.experts(shape.n_embd, n, n_ff);
                    layer.matrix("ffn_gate_inp_shexp", &[shape.n_embd, 1]);
                    layer.matrix("ffn_gate_shexp", &[shape.n_embd, n_ff]);
                    layer.matrix("ffn_up_shexp", &[shape.n_embd, n_ff]);
                    layer.matrix("ffn_down_shexp", &[n_ff, shape.n_embd]);
                }
                _ => layer.mlp(shape.n_embd, shape.n_ff),
            }
        }
        draft
    }

    /// A target with windows.
    fn windowed(shape: &Shape) -> Draft {
        let Layers::Windowed { window, full, n_owner, n_per_layer, experts } = shape.layers else {
            panic!("{} has no windows", shape.name)
        };
        let [n_head, n_head_kv, head_dim] = shape.heads;
        let (n_embd, n_layer, [full_kv, full_dim]) = (shape.n_embd, shape.n_layer, full);
        let mut draft = Draft::new(shape.arch());
        draft.metadata.insert("general.name", format!("synthetic {}", shape.name));
        draft.sizes(n_layer, n_embd, shape.n_ff, [n_head, n_head_kv, full_dim]);
        let sliding: Vec<bool> = (0..n_layer).map(|il| shape.is_sliding(il)).collect();
        let kv = |sliding: &bool| if *sliding { n_head_kv } else { full_kv } as i32;
        draft.key("attention.head_count_kv", sliding.iter().map(kv).collect::<Vec<_>>());
        draft.key("attention.sliding_window_pattern", sliding);
        draft.size("attention.sliding_window", window);
        draft.size("attention.key_length_swa", head_dim);
        draft.size("attention.value_length_swa", head_dim);
        draft.size("attention.shared_kv_layers", n_layer.saturating_sub(n_owner));
        draft.size("embedding_length_per_layer_input", n_per_layer);
        draft.size("context_length", if n_per_layer > 0 { 131_072 } else { 262_144 });
        draft.key("final_logit_softcapping", 30f32);
        draft.key("rope.freq_base", 1e6f32);
        draft.key("rope.freq_base_swa", 1e4f32);
        draft.size("rope.dimension_count", full_dim);
        draft.size("rope.dimension_count_swa", head_dim);
        if let Some([n, n_used, n_ff]) = experts {
            draft.size("expert_count", n);
            draft.size("expert_used_count", n_used);
            draft.size("expert_feed_forward_length", n_ff);
        }
        vocabulary::write(&mut draft.metadata, shape.n_vocab, "qwen2");

        draft.add("token_embd.weight", &[n_embd, shape.n_vocab], Values::Weights);
        draft.norm("output_norm.weight", n_embd);
        // A quarter of a full layer's dimensions turn.
        draft.add("rope_freqs.weight", &[full_dim / 2], Values::Divisors(full_dim / 8));
        if n_per_layer > 0 {
            let all = n_layer * n_per_layer;
            draft.add("per_layer_token_embd.weight", &[all, shape.n_vocab], Values::Weights);
            draft.add("per_layer_model_proj.weight", &[n_embd, all], Values::Weights);
            draft.norm("per_layer_proj_norm.weight", n_per_layer);
        }
        for il in 0..n_layer {
            let is_sliding = shape.is_sliding(il);
            let (n_kv, dim) = if is_sliding { (n_head_kv, head_dim) } else { (full_kv, full_dim) };
            let mut layer = Layer { draft: &mut draft, il };
            for norm in ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"] {
                layer.norm(norm, n_embd);
            }
            layer.matrix("attn_q", &[n_embd, n_head * dim]);
            layer.norm("attn_q_norm", dim);
            // Published files have keys and values where nobody reads them too. In those without embeddings of each layer's own,
            // full layers have values that are their keys.
            layer.matrix("attn_k", &[n_embd, n_kv * dim]);
            layer.norm("attn_k_norm", dim);
            if is_sliding || n_per_layer > 0 {
                layer.matrix("attn_v", &[n_embd, n_kv * dim]);
            }
            layer.matrix("attn_output", &[n_head * dim, n_embd]);
            layer.mlp(n_embd, shape.n_ff);
            if let Some([n, _, n_ff]) = experts {
                layer.matrix("ffn_gate_inp", &[n_embd, n]);
                layer.add("ffn_gate_inp.scale", &[n_embd], Values::Around(1.0));
                layer.matrix("ffn_gate_up_exps", &[n_embd, 2 * n_ff, n]);
                layer.matrix("ffn_down_exps", &[n_ff, n_embd, n]);
                layer.add("ffn_down_exps.scale", &[n], Values::Around(1.0));
                for norm in ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"] {
                    layer.norm(norm, n_embd);
                }
            }
            if n_per_layer > 0 {
                layer.matrix("inp_gate", &[n_embd, n_per_layer]);
                layer.matrix("proj", &[n_per_layer, n_embd]);
                layer.norm("post_norm", n_embd);
            }
            layer.norm("layer_output_scale", 1);
        }
        draft
    }

    /// A DFlash drafter of `target`, which lends it embedding and head.
    pub(super) fn drafter(drafter: &DrafterShape, target: &Shape) -> Draft {
        let hybrid = target.is_hybrid();
        let [_, _, head_dim] = drafter.heads;
        let taps = target.taps();
        let mut draft = Draft::new("dflash");
        draft.metadata.insert("general.name", format!("synthetic drafter of {}", target.name));
        draft.sizes(drafter.n_layer, target.n_embd, drafter.n_ff, drafter.heads);
        draft.size("context_length", 40_960);
        draft.key("rope.freq_base", if hybrid { 1e7f32 } else { 1e6 });
        draft.size("rope.dimension_count", head_dim);
        draft.size("vocab_size", target.n_vocab);
        draft.size("block_size", BLOCK);
        draft.size("target_hidden_size", target.n_embd);
        // This dialect counts the embedding as layer 0.
        draft.key("target_layers", taps.iter().map(|&tap| tap as i32 + 1).collect::<Vec<_>>());
        if drafter.window > 0 {
            draft.size("attention.sliding_window", drafter.window);
            let sliding: Vec<bool> = (1..=drafter.n_layer).map(|n| n < drafter.n_layer).collect();
            draft.key("attention.sliding_window_pattern", sliding);
        }
        let pre = if hybrid { "qwen35" } else { "qwen2" };
        vocabulary::write(&mut draft.metadata, target.n_vocab, pre);

        draft.add("fc.weight", &[taps.len() * target.n_embd, target.n_embd], Values::Weights);
        draft.norm("enc.output_norm.weight", target.n_embd);
        draft.norm("output_norm.weight", target.n_embd);
        for il in 0..drafter.n_layer {
            let mut layer = Layer { draft: &mut draft, il };
            layer.norm("attn_norm", target.n_embd);
            layer.attention(target.n_embd, drafter.heads, false);
            layer.norm("ffn_norm", target.n_embd);
            layer.mlp(target.n_embd, drafter.n_ff);
        }
        draft
    }

    fn new(arch: &'static str) -> Draft {
        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", arch);
        metadata.insert("general.type", "model");
        metadata.insert("general.quantization_version", 2u32);
        Draft { arch, metadata, tensors: Vec::new() }
    }

    fn key(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.insert(format!("{}.{key}", self.arch), value);
    }

    fn size(&mut self, key: &str, n: usize) {
        self.key(key, n as u32);
    }

    fn sizes(&mut self, n_layer: usize, n_embd: usize, n_ff: usize, [n_head, n_head_kv, dim]: [usize; 3]) {
        self.size("block_count", n_layer);
        self.size("embedding_length", n_embd);
        if n_ff > 0 {
            self.size("feed_forward_length", n_ff);
        }
        self.size("attention.head_count", n_head);
        self.size("attention.head_count_kv", n_head_kv);
        self.size("attention.key_length", dim);
        self.size("attention.value_length", dim);
        self.key("attention.layer_norm_rms_epsilon", 1e-6f32);
    }

    fn add(&mut self, name: &str, shape: &[usize], values: Values) {
        let shape = shape.iter().map(|&n| n as u64).collect();
        self.tensors.push(Tensor { name: name.to_owned(), shape, values });
    }

    fn norm(&mut self, name: &str, len: usize) {
        self.add(name, &[len], Values::Around(1.0));
    }
}

/// Where the tensors of one layer go.
struct Layer<'a> {
    draft: &'a mut Draft,
    il: usize,
}

impl Layer<'_> {
    /// `shape` is ne0 first.
    fn add(&mut self, name: &str, shape: &[usize], values: Values) {
        self.draft.add(&format!("blk.{}.{name}", self.il), shape, values);
    }

    fn matrix(&mut self, name: &str, shape: &[usize]) {
        self.add(&format!("{name}.weight"), shape, Values::Weights);
    }

    fn norm(&mut self, name: &str, len: usize) {
        self.add(&format!("{name}.weight"), &[len], Values::Around(1.0));
    }

    /// With a gate, each head of q has its query rows and then as many gate rows.
    fn attention(&mut self, n_embd: usize, [n_head, n_head_kv, dim]: [usize; 3], gated: bool) {
        self.matrix("attn_q", &[n_embd, n_head * dim * if gated { 2 } else { 1 }]);
        self.matrix("attn_k", &[n_embd, n_head_kv * dim]);
        self.matrix("attn_v", &[n_embd, n_head_kv * dim]);
        self.matrix("attn_output", &[n_head * dim, n_embd]);
        self.norm("attn_q_norm", dim);
        self.norm("attn_k_norm", dim);
    }

    fn delta_net(&mut self, n_embd: usize, n_key: usize, n_value: usize) {
        let (inner, channels) = (n_value * DELTA_DIM, (2 * n_key + n_value) * DELTA_DIM);
        self.matrix("attn_qkv", &[n_embd, channels]);
        self.matrix("attn_gate", &[n_embd, inner]);
        if self.draft.arch == NEXT {
            self.matrix("ssm_ba", &[n_embd, 2 * n_value]);
        } else {
            self.matrix("ssm_alpha", &[n_embd, n_value]);
            self.matrix("ssm_beta", &[n_embd, n_value]);
        }
        self.add("ssm_a", &[n_value], Values::Around(-1.0));
        // Softplus of it is a step of 0.02: a memory of some fifty tokens.
        self.add("ssm_dt.bias", &[n_value], Values::Around(-4.0));
        self.matrix("ssm_conv1d", &[CONV_WIDTH, channels]);
        self.norm("ssm_norm", DELTA_DIM);
        self.matrix("ssm_out", &[inner, n_embd]);
    }

    fn mlp(&mut self, n_embd: usize, n_ff: usize) {
        self.matrix("ffn_gate", &[n_embd, n_ff]);
        self.matrix("ffn_up", &[n_embd, n_ff]);
        self.matrix("ffn_down", &[n_ff, n_embd]);
    }

    fn experts(&mut self, n_embd: usize, n_expert: usize, n_ff: usize) {
        self.matrix("ffn_gate_inp", &[n_embd, n_expert]);
        self.matrix("ffn_gate_exps", &[n_embd, n_ff, n_expert]);
        self.matrix("ffn_up_exps", &[n_embd, n_ff, n_expert]);
        self.matrix("ffn_down_exps", &[n_ff, n_embd, n_expert]);
    }
}
