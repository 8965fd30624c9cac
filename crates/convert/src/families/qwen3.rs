//! Qwen3: a dense decoder whose attention norms each head of q and k.

use super::decoder::{Decoder, root};
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::{Layout, Map, Order};
use crate::recipe::Recipe;

pub(super) const FAMILY: Family =
    Family { arch: "qwen3", architectures: &["Qwen3ForCausalLM"], drafts: false, write };

pub(super) fn write(recipe: &mut Recipe, config: &Config, _: Option<&Target>) -> Result<(), Error> {
    let decoder = Decoder::read(config, 1.0)?;
    decoder.rope.check_kind(&["default", "linear", "yarn"])?;
    config.refuse("use_sliding_window", config.flag("use_sliding_window")?, "no sliding window")?;
    decoder.write_keys(recipe)?;

    let root = root(recipe);
    decoder.ends(recipe, config, root, Map::Same)?;
    for il in 0..decoder.n_layer {
        let layer = format!("{root}layers.{il}.");
        decoder_layer(recipe, &decoder, il, &layer)?;
    }
    Ok(())
}

/// One layer, as the DFlash drafters have it too.
pub(super) fn decoder_layer(
    recipe: &mut Recipe,
    decoder: &Decoder,
    il: usize,
    layer: &str,
) -> Result<(), Error> {
    let n_embd = decoder.n_embd;
    for (name, norm) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
        recipe.tensor(
            &format!("blk.{il}.{name}.weight"),
            &format!("{layer}{norm}.weight"),
            &[n_embd],
            Layout::SAME,
        )?;
    }
    let (q, tensor) = (format!("blk.{il}.attn_q.weight"), format!("{layer}self_attn.q_proj.weight"));
    recipe.tensor(&q, &tensor, &[decoder.n_head * decoder.head_dim, n_embd], Layout::SAME)?;
    decoder.attention(recipe, il, layer, Order::Same)?;
    decoder.head_norms(recipe, il, layer, Map::Same)?;
    decoder.ffn(recipe, il, layer)
}
