//! Gemma 4: sliding and full layers with heads of their own width, and in some models values that are the keys'
//! projection, experts beside the dense layer, embeddings for each layer, or layers that read the KV of earlier ones.
//!
//! The file has one width of heads for full layers (`attention.key_length`) and one for sliding ones (`…_swa`). The rotation
//! of full layers is `proportional`: frequencies of the whole head, of which a part turns; the file says so by divisors,
//! `rope_freqs.weight`, that are 1 for what turns and 1e30 for what does not.

use super::decoder::root;
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::Layout;
use crate::recipe::Recipe;

pub(super) const FAMILY: Family = Family {
    arch: "gemma4",
    architectures: &[
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    ],
    drafts: false,
    write,
};

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";
/// The divisor that leaves nothing of an angle.
const STILL: f32 = 1e30;

/// A layer's sizes.
pub(super) struct Layer {
    sliding: bool,
    head_dim: usize,
    n_head_kv: usize,
    n_ff: usize,
    /// Whether it has keys and values of its own.
    pub(super) owns_kv: bool,
}

pub(super) struct Sizes {
    pub(super) n_embd: usize,
    n_head: usize,
    /// Width of each layer's own embedding; 0 for none.
    pub(super) n_per_layer: usize,
    k_eq_v: bool,
    experts: Option<Experts>,
    pub(super) layers: Vec<Layer>,
}

struct Experts {
    n_expert: usize,
    n_used: usize,
    n_ff: usize,
}

fn write(recipe: &mut Recipe, config: &Config, _: Option<&Target>) -> Result<(), Error> {
    let sizes = Sizes::read(config)?;
    if sizes.layers.iter().all(|layer| !layer.owns_kv) {
        let expected = format!("less than {} layers", sizes.layers.len());
        return Err(config.error("num_kv_shared_layers", expected, ""));
    }
    let n_vocab = config.usize("vocab_size")?;
    recipe.n_vocab = n_vocab;
    write_keys(recipe, config, &sizes)?;

    let root = root(recipe);
    let n_embd = sizes.n_embd;
    let mut global = |name: &str, part: &str, shape: &[usize]| {
        recipe.tensor(&format!("{name}.weight"), &format!("{root}{part}.weight"), shape, Layout::SAME)
    };
    global("token_embd", "embed_tokens", &[n_vocab, n_embd])?;
    global("output_norm", "norm", &[n_embd])?;
    if sizes.n_per_layer > 0 {
        let all = sizes.layers.len() * sizes.n_per_layer;
        let n_row = config.opt_usize("vocab_size_per_layer_input")?.unwrap_or(n_vocab);
        config.refuse("vocab_size_per_layer_input", n_row != n_vocab, "as many as vocab_size")?;
        global("per_layer_token_embd", "embed_tokens_per_layer", &[n_vocab, all])?;
        global("per_layer_model_proj", "per_layer_model_projection", &[all, n_embd])?;
        global("per_layer_proj_norm", "per_layer_projection_norm", &[sizes.n_per_layer])?;
    }
    for (il, layer) in sizes.layers.iter().enumerate() {
        layer_tensors(recipe, &sizes, il, layer, &format!("{root}layers.{il}."))?;
    }
    recipe.skip("the head is tied to the embedding", |name| name == "lm_head.weight");
    recipe.skip("only the text model is converted", |name| {
        ["vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder."]
            .iter()
            .any(|part| name.strip_prefix("model.").unwrap_or(name).starts_with(part))
    });
    Ok(())
}

impl Sizes {
    /// Reads and checks what this family has in common.
    pub(super) fn read(config: &Config) -> Result<Sizes, Error> {
        let act = config.opt_str("hidden_activation")?.unwrap_or("gelu_pytorch_tanh");
        config.refuse("hidden_activation", act != "gelu_pytorch_tanh", "`gelu_pytorch_tanh`")?;
        config.refuse("attention_bias", config.flag("attention_bias")?, "no biases")?;
        let both_ways = config.opt_str("use_bidirectional_attention")? == Some("all");
        config.refuse("use_bidirectional_attention", both_ways, "a text model that looks back only")?;
        let (n_layer, n_head) = (config.usize("num_hidden_layers")?, config.usize("num_attention_heads")?);
        let kinds = config.opt_strings("layer_types")?.unwrap_or_default();
        if kinds.len() != n_layer || kinds.iter().any(|kind| ![SLIDING, FULL].contains(kind)) {
            return Err(config.error("layer_types", format!("{n_layer} times `{SLIDING}` or `{FULL}`"), ""));
        }
        let k_eq_v = config.flag("attention_k_eq_v")?;
        let (head_dim, n_head_kv) = (config.usize("head_dim")?, config.usize("num_key_value_heads")?);
        // Older configs name the sizes of full layers, newer ones those of each layer that differs.
        let full_dim = config.opt_usize("global_head_dim")?.unwrap_or(512);
        let full_kv = config.opt_usize("num_global_key_value_heads")?.filter(|_| k_eq_v).unwrap_or(n_head_kv);
        let own = config.section("per_layer_config");
        let n_ff = config.usize("intermediate_size")?;
        let wide = if config.flag("use_double_wide_mlp")? { 2 } else { 1 };
        // Absent and 0 mean none.
        let n_reader = config.get("num_kv_shared_layers").and_then(|n| n.as_u64()).unwrap_or(0) as usize;
        if n_reader > n_layer {
            return Err(config.error("num_kv_shared_layers", format!("at most {n_layer} layers"), ""));
        }
        let mut layers = Vec::with_capacity(n_layer);
        for (il, kind) in kinds.iter().enumerate() {
            let sliding = *kind == SLIDING;
            let (mut head_dim, mut n_head_kv) = match (&own, sliding) {
                (None, false) => (full_dim, full_kv),
                _ => (head_dim, n_head_kv),
            };
            // The numbers of layers may be padded: `05`.
            let entries = own.iter().flat_map(|own| own.keys().map(move |key| (own, key)));
            let mine =
                entries.filter(|(_, key)| key.parse() == Ok(il)).find_map(|(own, key)| own.section(key));
            if let Some(mine) = mine {
                head_dim = mine.opt_usize("head_dim")?.unwrap_or(head_dim);
                n_head_kv = mine.opt_usize("num_key_value_heads")?.unwrap_or(n_head_kv);
            }
            let owns_kv = il + n_reader < n_layer;
            let n_ff = if owns_kv { n_ff } else { wide * n_ff };
            if !n_head.is_multiple_of(n_head_kv) || !head_dim.is_multiple_of(2) {
                let expected = format!("for layer {il} an even head_dim, and KV heads that divide {n_head}");
                return Err(config.error("per_layer_config", expected, ""));
            }
            layers.push(Layer { sliding, head_dim, n_head_kv, n_ff, owns_kv });
        }
        let alike = |sliding| {
            let mut dims = layers.iter().filter(|l| l.sliding == sliding).map(|l| l.head_dim);
            let first = dims.next();
            dims.all(|dim| Some(dim) == first)
        };
        if !(alike(true) && alike(false)) {
            return Err(config.error("per_layer_config", "one head_dim for all layers of a kind", ""));
        }
        let experts = match config.flag("enable_moe_block")? {
            false => None,
            true => Some(Experts {
                n_expert: config.usize("num_experts")?,
                n_used: config.usize("top_k_experts")?,
                n_ff: config.usize("moe_intermediate_size")?,
            }),
        };
        let n_per_layer =
            config.get("hidden_size_per_layer_input").and_then(|n| n.as_u64()).unwrap_or(0) as usize;
        Ok(Sizes { n_embd: config.usize("hidden_size")?, n_head, n_per_layer, k_eq_v, experts, layers })
    }

    fn head_dim(&self, sliding: bool) -> Option<usize> {
        self.layers.iter().find(|layer| layer.sliding == sliding).map(|layer| layer.head_dim)
    }
}

pub(super) fn write_keys(recipe: &mut Recipe, config: &Config, sizes: &Sizes) -> Result<(), Error> {
    let layers = &sizes.layers;
    recipe.size_key("block_count", layers.len());
    recipe.size_key("context_length", config.usize("max_position_embeddings")?);
    recipe.size_key("embedding_length", sizes.n_embd);
    per_layer_key(recipe, "feed_forward_length", layers.iter().map(|layer| layer.n_ff));
    recipe.size_key("attention.head_count", sizes.n_head);
    per_layer_key(recipe, "attention.head_count_kv", layers.iter().map(|layer| layer.n_head_kv));
    recipe.key("attention.layer_norm_rms_epsilon", config.f32("rms_norm_eps")?);
    // A model without one of the kinds has no use for the key, but readers look for it.
    let (near, far) = (sizes.head_dim(true), sizes.head_dim(false));
    let (near, far) = (near.or(far).unwrap_or_default(), far.or(near).unwrap_or_default());
    for (suffix, head_dim) in [("", far), ("_swa", near)] {
        recipe.size_key(&format!("attention.key_length{suffix}"), head_dim);
        recipe.size_key(&format!("attention.value_length{suffix}"), head_dim);
        recipe.size_key(&format!("rope.dimension_count{suffix}"), head_dim);
    }
    recipe.size_key("attention.sliding_window", config.usize("sliding_window")?);
    let pattern: Vec<bool> = layers.iter().map(|layer| layer.sliding).collect();
    recipe.key("attention.sliding_window_pattern", pattern);
    let n_reader = layers.iter().filter(|layer| !layer.owns_kv).count();
    recipe.size_key("attention.shared_kv_layers", n_reader);
    recipe.size_key("embedding_length_per_layer_input", sizes.n_per_layer);
    if let Some(cap) = config.opt_f32("final_logit_softcapping")? {
        recipe.key("final_logit_softcapping", cap);
    }
    if let Some(experts) = &sizes.experts {
        recipe.size_key("expert_count", experts.n_expert);
        recipe.size_key("expert_used_count", experts.n_used);
        recipe.size_key("expert_feed_forward_length", experts.n_ff);
    }

    let ropes = config.section("rope_parameters");
    let ropes =
        ropes.ok_or_else(|| config.error("rope_parameters", "the angles of both kinds of layers", ""))?;
    let rope = |kind: &str| ropes.section(kind).ok_or_else(|| ropes.error(kind, "an object", ""));
    let (far_rope, near_rope) = (rope(FULL)?, rope(SLIDING)?);
    let kind = near_rope.opt_str("rope_type")?.unwrap_or("default");
    near_rope.refuse("rope_type", kind != "default", "`default`")?;
    recipe.key("rope.freq_base", far_rope.f32("rope_theta")?);
    recipe.key("rope.freq_base_swa", near_rope.f32("rope_theta")?);
    let part = match far_rope.opt_str("rope_type")?.unwrap_or("default") {
        "default" => 1.0,
        "proportional" => far_rope.opt_f32("partial_rotary_factor")?.unwrap_or(1.0),
        _ => return Err(far_rope.error("rope_type", "`proportional` or `default`", "")),
    };
    let factor = far_rope.opt_f32("factor")?.unwrap_or(1.0);
    far_rope.refuse("factor", factor != 1.0, "1")?;
    // As the reference rounds: whole pairs, downwards. The part is often a fraction that binary numbers can't hold.
    let n_turned = ((f64::from(part) * far as f64 + 1e-6) / 2.0).floor() as usize;
    if n_turned > far / 2 {
        return Err(far_rope.error("partial_rotary_factor", "at most 1", ""));
    }
    recipe.computed(
        "rope_freqs.weight",
        (0..far / 2).map(|i| if i < n_turned { 1.0 } else { STILL }).collect(),
    );
    Ok(())
}

/// One number where all layers agree, else a list.
fn per_layer_key(recipe: &mut Recipe, key: &str, sizes: impl Iterator<Item = usize>) {
    let sizes: Vec<i32> =
        sizes.map(|n| i32::try_from(n).expect("the config keeps sizes below 2^31")).collect();
    match sizes.iter().all(|n| *n == sizes[0]) {
        true => recipe.size_key(key, sizes[0] as usize),
        false => recipe.key(key, sizes),
    }
}

pub(super) fn layer_tensors(
    recipe: &mut Recipe,
    sizes: &Sizes,
    il: usize,
    layer: &Layer,
    source: &str,
) -> Result<(), Error> {
    let &Layer { head_dim, n_head_kv, n_ff, owns_kv, sliding } = layer;
    let (n_embd, n_q, n_kv) = (sizes.n_embd, sizes.n_head * head_dim, n_head_kv * head_dim);
    let mut weight = |name: &str, part: &str, shape: &[usize]| {
        let (name, tensor) = (format!("blk.{il}.{name}.weight"), format!("{source}{part}.weight"));
        recipe.tensor(&name, &tensor, shape, Layout::SAME)
    };
    for (name, norm) in [
        ("attn_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ] {
        weight(name, norm, &[n_embd])?;
    }
    weight("attn_q", "self_attn.q_proj", &[n_q, n_embd])?;
    weight("attn_q_norm", "self_attn.q_norm", &[head_dim])?;
    weight("attn_output", "self_attn.o_proj", &[n_embd, n_q])?;
    for (part, shape) in [("gate", [n_ff, n_embd]), ("up", [n_ff, n_embd]), ("down", [n_embd, n_ff])] {
        weight(&format!("ffn_{part}"), &format!("mlp.{part}_proj"), &shape)?;
    }
    if sizes.n_per_layer > 0 {
        weight("inp_gate", "per_layer_input_gate", &[sizes.n_per_layer, n_embd])?;
        weight("proj", "per_layer_projection", &[n_embd, sizes.n_per_layer])?;
        weight("post_norm", "post_per_layer_input_norm", &[n_embd])?;
    }
    if let Some(&Experts { n_expert, n_ff, .. }) = sizes.experts.as_ref() {
        weight("ffn_gate_inp", "router.proj", &[n_expert, n_embd])?;
        for (name, norm) in [
            ("pre_ffw_norm_2", "pre_feedforward_layernorm_2"),
            ("post_ffw_norm_1", "post_feedforward_layernorm_1"),
            ("post_ffw_norm_2", "post_feedforward_layernorm_2"),
        ] {
            weight(name, norm, &[n_embd])?;
        }
        let mut plain = |name: &str, part: &str, shape: &[usize]| {
            let (name, tensor) = (format!("blk.{il}.{name}"), format!("{source}{part}"));
            recipe.tensor(&name, &tensor, shape, Layout::SAME)
        };
        plain("ffn_gate_inp.scale", "router.scale", &[n_embd])?;
        plain("ffn_down_exps.scale", "router.per_expert_scale", &[n_expert])?;
        plain("ffn_gate_up_exps.weight", "experts.gate_up_proj", &[n_expert, 2 * n_ff, n_embd])?;
        plain("ffn_down_exps.weight", "experts.down_proj", &[n_expert, n_embd, n_ff])?;
    }
    let scale = format!("blk.{il}.layer_output_scale.weight");
    recipe.optional_tensor(&scale, &format!("{source}layer_scalar"), &[1], Layout::SAME)?;
    // Published checkpoints have keys and values where nobody reads them too.
    for (name, part, shape) in [
        ("attn_k", "k_proj", &[n_kv, n_embd][..]),
        ("attn_v", "v_proj", &[n_kv, n_embd]),
        ("attn_k_norm", "k_norm", &[head_dim]),
    ] {
        let without = !owns_kv || (name == "attn_v" && sizes.k_eq_v && !sliding);
        let (name, tensor) = (format!("blk.{il}.{name}.weight"), format!("{source}self_attn.{part}.weight"));
        match without {
            true => _ = recipe.optional_tensor(&name, &tensor, shape, Layout::SAME)?,
            false => recipe.tensor(&name, &tensor, shape, Layout::SAME)?,
        }
    }
    Ok(())
}
