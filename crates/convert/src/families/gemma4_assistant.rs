//! The assistant of Gemma 4, which drafts for it: layers of [`super::gemma4`] that have no keys and values, two projections
//! between its width and the target's, and in those of E2B and E4B groups of tokens with their centroids.
//!
//! Tensor names and `embedding_length_out` are those of llama.cpp, the keys of the groups those of the forks before it, which
//! llama.cpp leaves out.

use super::gemma4::{Sizes, layer_tensors, write_keys};
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::Layout;
use crate::recipe::Recipe;

pub(super) const FAMILY: Family = Family {
    arch: "gemma4-assistant",
    architectures: &["Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"],
    drafts: true,
    write,
};

fn write(recipe: &mut Recipe, config: &Config, target: Option<&Target>) -> Result<(), Error> {
    // Its own part of the config is around the text model's.
    let own = recipe.checkpoint.config.clone();
    let n_embd_target = own.usize("backbone_hidden_size")?;
    let n_vocab = config.usize("vocab_size")?;
    if let Some(target) = target {
        check_target(recipe, target, n_embd_target, n_vocab)?;
    }
    config.refuse("use_double_wide_mlp", config.flag("use_double_wide_mlp")?, "layers of one width")?;
    config.refuse("enable_moe_block", config.flag("enable_moe_block")?, "no experts")?;
    let mut sizes = Sizes::read(config)?;
    config.refuse("hidden_size_per_layer_input", sizes.n_per_layer > 0, "0")?;
    // All of them read the target's, whether the config says so or nothing.
    sizes.layers.iter_mut().for_each(|layer| layer.owns_kv = false);
    recipe.n_vocab = n_vocab;
    write_keys(recipe, config, &sizes)?;
    recipe.size_key("nextn_predict_layers", sizes.layers.len());
    recipe.size_key("embedding_length_out", n_embd_target);

    let n_embd = sizes.n_embd;
    let mut tensor = |name: &str, part: &str, shape: &[usize]| {
        recipe.tensor(&format!("{name}.weight"), &format!("{part}.weight"), shape, Layout::SAME)
    };
    tensor("token_embd", "model.embed_tokens", &[n_vocab, n_embd])?;
    tensor("output_norm", "model.norm", &[n_embd])?;
    tensor("nextn.pre_projection", "pre_projection", &[n_embd, 2 * n_embd_target])?;
    tensor("nextn.post_projection", "post_projection", &[n_embd_target, n_embd])?;
    for (il, layer) in sizes.layers.iter().enumerate() {
        layer_tensors(recipe, &sizes, il, layer, &format!("model.layers.{il}."))?;
    }
    recipe.skip("the head is tied to the embedding", |name| name == "lm_head.weight");
    write_groups(recipe, &own, n_embd, n_vocab)
}

/// Configs carry numbers of groups where there are none; the flag decides.
fn write_groups(recipe: &mut Recipe, own: &Config, n_embd: usize, n_vocab: usize) -> Result<(), Error> {
    let has_groups = own.flag("use_ordered_embeddings")?;
    recipe.key("use_ordered_embeddings", has_groups);
    if !has_groups {
        return Ok(());
    }
    let n_group = own.opt_usize("num_centroids")?.unwrap_or(2048);
    let n_used = own.opt_usize("centroid_intermediate_top_k")?.unwrap_or(32);
    if !n_vocab.is_multiple_of(n_group) {
        return Err(own.error("num_centroids", format!("a divisor of {n_vocab} tokens"), ""));
    }
    if n_used > n_group {
        return Err(own.error("centroid_intermediate_top_k", format!("at most {n_group} groups"), ""));
    }
    recipe.size_key("n_centroids", n_group);
    recipe.size_key("centroid_top_k", n_used);
    let (name, part) = ("masked_embd_centroids.weight", "masked_embedding.centroids.weight");
    recipe.tensor(name, part, &[n_group, n_embd], Layout::SAME)?;
    recipe.integers("masked_embd_ordering", "masked_embedding.token_ordering", n_vocab)
}

fn check_target(recipe: &Recipe, target: &Target, n_embd_target: usize, n_vocab: usize) -> Result<(), Error> {
    for (what, key, expected) in
        [("size of a hidden state", "hidden_size", n_embd_target), ("vocabulary", "vocab_size", n_vocab)]
    {
        let found = target.config.usize(key)?;
        if found != expected {
            return Err(Error::Mismatch {
                drafter: recipe.checkpoint.dir().to_owned(),
                target: target.dir.to_owned(),
                what,
                expected: expected.to_string(),
                found: found.to_string(),
            });
        }
    }
    Ok(())
}
