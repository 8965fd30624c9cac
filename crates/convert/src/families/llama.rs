//! Llama: a dense decoder. The file rotates neighbouring dimensions, so the rows of q and k are reordered; and it holds the
//! `llama3` scaling as a divisor per frequency, `rope_freqs.weight`.
//!
//! With wavelength `w = 2 pi / inv_freq` and original context `O`: `w < O / high` keeps the frequency, `w > O / low` divides
//! it by `factor`, in between the two are blended, `1 / ((1 - s) / factor + s)` with `s = (O / w - low) / (high - low)`.

use std::f64::consts::TAU;

use super::decoder::{Decoder, Rope, root};
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::{Layout, Map, Order};
use crate::recipe::Recipe;

pub(super) const FAMILY: Family =
    Family { arch: "llama", architectures: &["LlamaForCausalLM"], drafts: false, write };

fn write(recipe: &mut Recipe, config: &Config, _: Option<&Target>) -> Result<(), Error> {
    let decoder = Decoder::read(config, 1.0)?;
    decoder.rope.check_kind(&["default", "linear", "yarn", "llama3"])?;
    let head_dim = decoder.head_dim;
    if decoder.rope.n_rot != head_dim || !head_dim.is_multiple_of(2) {
        return Err(config.error("head_dim", "an even number, all of it rotated", ""));
    }
    decoder.write_keys(recipe)?;
    recipe.size_key("vocab_size", config.usize("vocab_size")?);

    let root = root(recipe);
    decoder.ends(recipe, config, root, Map::Same)?;
    if decoder.rope.kind == "llama3" {
        recipe.computed("rope_freqs.weight", rope_freqs(&decoder.rope)?);
    }
    let (n_embd, n_q, n_kv) = (decoder.n_embd, decoder.n_head * head_dim, decoder.n_head_kv * head_dim);
    let pairs = Order::RopePairs { head_dim };
    for il in 0..decoder.n_layer {
        let layer = format!("{root}layers.{il}.");
        for (name, norm) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
            recipe.tensor(
                &format!("blk.{il}.{name}.weight"),
                &format!("{layer}{norm}.weight"),
                &[n_embd],
                Layout::SAME,
            )?;
        }
        let (q, tensor) = (format!("blk.{il}.attn_q.weight"), format!("{layer}self_attn.q_proj.weight"));
        recipe.tensor(&q, &tensor, &[n_q, n_embd], Layout::rows(pairs))?;
        decoder.attention(recipe, il, &layer, pairs)?;
        let biases = [
            ("q", "q", n_q, pairs),
            ("k", "k", n_kv, pairs),
            ("v", "v", n_kv, Order::Same),
            ("output", "o", n_embd, Order::Same),
        ];
        for (name, part, n, order) in biases {
            let (name, tensor) =
                (format!("blk.{il}.attn_{name}.bias"), format!("{layer}self_attn.{part}_proj.bias"));
            recipe.optional_tensor(&name, &tensor, &[n], Layout::cols(order))?;
        }
        decoder.ffn(recipe, il, &layer)?;
    }
    recipe.skip("computed from the config", |name| name.ends_with(".rotary_emb.inv_freq"));
    Ok(())
}

fn rope_freqs(rope: &Rope) -> Result<Vec<f32>, Error> {
    let parameters = rope.parameters();
    let get = |key| parameters.f32(key).map(f64::from);
    let (factor, low, high) = (get("factor")?, get("low_freq_factor")?, get("high_freq_factor")?);
    let original = parameters.usize("original_max_position_embeddings")? as f64;
    if !(factor > 0.0 && low > 0.0 && high > low) {
        return Err(parameters.error("high_freq_factor", format!("more than {low} (low_freq_factor)"), ""));
    }
    let divisor = |i: usize| {
        let wavelength = TAU * f64::from(rope.theta).powf(2.0 * i as f64 / rope.n_rot as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let s = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - s) / factor + s)
        }
    };
    Ok((0..rope.n_rot / 2).map(|i| divisor(i) as f32).collect())
}
