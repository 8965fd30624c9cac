//! Qwen3.5 and its successors, dense: most layers mix tokens with a gated delta rule, every `interval`-th attends.
//!
//! Three things differ between checkpoint and file. Norms hold their distance from 1 in the checkpoint, all but the one
//! inside the delta rule. The decay is stored as its logarithm. And value heads are grouped by key head in the checkpoint
//! but tiled in the file ([`Order::ValueHeads`]): rows of v, z, a, b, channels of the convolution, *columns* of the output.

use super::decoder::{Decoder, root};
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::{Layout, Map, Order};
use crate::recipe::Recipe;

pub(super) const FAMILY: Family = Family {
    arch: "qwen35",
    architectures: &["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"],
    drafts: false,
    write,
};

const LINEAR: &str = "linear_attention";
const FULL: &str = "full_attention";

pub(super) fn write(recipe: &mut Recipe, config: &Config, _: Option<&Target>) -> Result<(), Error> {
    let decoder = Decoder::read(config, 0.25)?;
    decoder.rope.check_kind(&["default", "linear", "yarn"])?;
    let hybrid = Hybrid::read(config, decoder)?;
    hybrid.write_keys(recipe)?;
    let decoder = &hybrid.decoder;
    if let Some(sections) =
        decoder.rope.parameters.as_ref().map(|rope| rope.opt_ids("mrope_section")).transpose()?.flatten()
    {
        let mut sections: Vec<i32> = sections.into_iter().map(|n| n as i32).collect();
        sections.resize(sections.len().max(4), 0);
        recipe.key("rope.dimension_sections", sections);
    }
    hybrid.tensors(recipe, config, DeltaNet::tensors)
}

/// Layers with a delta rule and layers with gated attention, as all these families have them.
pub(super) struct Hybrid {
    decoder: Decoder,
    delta: DeltaNet,
    /// For each layer, whether it is one with a delta rule.
    is_linear: Vec<bool>,
}

impl Hybrid {
    pub(super) fn read(config: &Config, decoder: Decoder) -> Result<Hybrid, Error> {
        let gate_off = config.opt_bool("attn_output_gate")? == Some(false);
        config.refuse("attn_output_gate", gate_off, "attention with an output gate")?;
        let is_linear = layer_kinds(config, decoder.n_layer)?;
        Ok(Hybrid { decoder, delta: DeltaNet::read(config)?, is_linear })
    }

    pub(super) fn write_keys(&self, recipe: &mut Recipe) -> Result<(), Error> {
        let Hybrid { decoder, delta, is_linear } = self;
        decoder.write_keys(recipe)?;
        recipe.size_key("ssm.conv_kernel", delta.conv_width);
        recipe.size_key("ssm.state_size", delta.head_dim);
        recipe.size_key("ssm.group_count", delta.n_key);
        recipe.size_key("ssm.time_step_rank", delta.n_value);
        recipe.size_key("ssm.inner_size", delta.n_value * delta.head_dim);
        match interval(is_linear) {
            Some(interval) => recipe.size_key("full_attention_interval", interval),
            None => recipe.key("attention.recurrent_layers", is_linear.clone()),
        }
        Ok(())
    }

    /// All tensors; `delta_net` names those of a delta rule, given the width of the input, the layer and its prefix.
    pub(super) fn tensors(
        &self,
        recipe: &mut Recipe,
        config: &Config,
        delta_net: impl Fn(&DeltaNet, &mut Recipe, usize, usize, &str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Hybrid { decoder, delta, is_linear } = self;
        let root = root(recipe);
        decoder.ends(recipe, config, root, Map::AddOne)?;
        for (il, &is_linear) in is_linear.iter().enumerate() {
            let layer = format!("{root}layers.{il}.");
            for (name, norm) in
                [("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")]
            {
                let (name, tensor) = (format!("blk.{il}.{name}.weight"), format!("{layer}{norm}.weight"));
                recipe.tensor(&name, &tensor, &[decoder.n_embd], Layout::map(Map::AddOne))?;
            }
            if is_linear {
                delta_net(delta, recipe, decoder.n_embd, il, &layer)?;
            } else {
                // Each head has its query rows and then its gate rows.
                let (name, tensor) =
                    (format!("blk.{il}.attn_q.weight"), format!("{layer}self_attn.q_proj.weight"));
                let n_q = 2 * decoder.n_head * decoder.head_dim;
                recipe.tensor(&name, &tensor, &[n_q, decoder.n_embd], Layout::SAME)?;
                decoder.attention(recipe, il, &layer, Order::Same)?;
                decoder.head_norms(recipe, il, &layer, Map::AddOne)?;
            }
            decoder.ffn(recipe, il, &layer)?;
        }
        prediction_head(recipe, config, decoder, is_linear)?;
        recipe.skip("not part of the text model", |name| {
            name.starts_with("model.visual.") || name.starts_with("visual.")
        });
        Ok(())
    }
}

/// The prediction head becomes one more block behind the layers, as other programs write it too. Checkpoints that were
/// saved again often lost it, whatever their config says.
fn prediction_head(
    recipe: &mut Recipe,
    config: &Config,
    decoder: &Decoder,
    is_linear: &[bool],
) -> Result<(), Error> {
    if !recipe.checkpoint.has("mtp.fc.weight") {
        return Ok(());
    }
    if config.opt_usize("mtp_num_hidden_layers")?.unwrap_or(1) != 1 {
        recipe.skip("prediction heads of several layers are not used yet", |name| name.starts_with("mtp."));
        return Ok(());
    }
    let (il, n_embd, layer) = (decoder.n_layer, decoder.n_embd, "mtp.layers.0.");
    recipe.size_key("block_count", il + 1);
    recipe.size_key("nextn_predict_layers", 1);
    if interval(is_linear).is_none() {
        recipe.key("attention.recurrent_layers", [is_linear, &[false]].concat());
    }
    let block = |name: &str| format!("blk.{il}.{name}.weight");
    // Columns: those of the embedding, then those of the state.
    recipe.tensor(&block("nextn.eh_proj"), "mtp.fc.weight", &[n_embd, 2 * n_embd], Layout::SAME)?;
    for (name, norm) in [
        ("nextn.enorm", "mtp.pre_fc_norm_embedding"),
        ("nextn.hnorm", "mtp.pre_fc_norm_hidden"),
        ("nextn.shared_head_norm", "mtp.norm"),
        ("attn_norm", "mtp.layers.0.input_layernorm"),
        ("post_attention_norm", "mtp.layers.0.post_attention_layernorm"),
    ] {
        recipe.tensor(&block(name), &format!("{norm}.weight"), &[n_embd], Layout::map(Map::AddOne))?;
    }
    let (table, n_vocab) = (block("nextn.embed_tokens"), recipe.n_vocab);
    recipe.optional_tensor(&table, "mtp.embed_tokens.weight", &[n_vocab, n_embd], Layout::SAME)?;
    let n_q = 2 * decoder.n_head * decoder.head_dim;
    recipe.tensor(&block("attn_q"), "mtp.layers.0.self_attn.q_proj.weight", &[n_q, n_embd], Layout::SAME)?;
    decoder.attention(recipe, il, layer, Order::Same)?;
    decoder.head_norms(recipe, il, layer, Map::AddOne)?;
    decoder.ffn(recipe, il, layer)
}

/// Sizes of the gated delta rule.
pub(super) struct DeltaNet {
    pub(super) n_key: usize,
    pub(super) n_value: usize,
    pub(super) head_dim: usize,
    pub(super) conv_width: usize,
}

impl DeltaNet {
    fn read(config: &Config) -> Result<DeltaNet, Error> {
        let delta = DeltaNet {
            n_key: config.usize("linear_num_key_heads")?,
            n_value: config.usize("linear_num_value_heads")?,
            head_dim: config.usize("linear_key_head_dim")?,
            conv_width: config.usize("linear_conv_kernel_dim")?,
        };
        if !delta.n_value.is_multiple_of(delta.n_key) {
            let expected = format!("a multiple of {} (linear_num_key_heads)", delta.n_key);
            return Err(config.error("linear_num_value_heads", expected, ""));
        }
        let same = config.usize("linear_value_head_dim")? == delta.head_dim;
        config.refuse(
            "linear_value_head_dim",
            !same,
            &format!("{} (linear_key_head_dim)", delta.head_dim),
        )?;
        Ok(delta)
    }

    /// Value heads of `len` indices each, behind `first` others.
    fn heads(&self, first: usize, len: usize) -> Order {
        Order::ValueHeads { first, len, n_key: self.n_key, n_value: self.n_value }
    }

    fn tensors(&self, recipe: &mut Recipe, n_embd: usize, il: usize, layer: &str) -> Result<(), Error> {
        let (n_key_rows, n_value_rows) = (self.n_key * self.head_dim, self.n_value * self.head_dim);
        let n_conv = 2 * n_key_rows + n_value_rows;
        let (qkv, value_rows) = (self.heads(2 * n_key_rows, self.head_dim), self.heads(0, self.head_dim));
        let per_head = self.heads(0, 1);
        let mut tensor = |name: &str, part: &str, shape: &[usize], layout: Layout| {
            recipe.tensor(&format!("blk.{il}.{name}"), &format!("{layer}linear_attn.{part}"), shape, layout)
        };
        tensor("attn_qkv.weight", "in_proj_qkv.weight", &[n_conv, n_embd], Layout::rows(qkv))?;
        tensor("attn_gate.weight", "in_proj_z.weight", &[n_value_rows, n_embd], Layout::rows(value_rows))?;
        tensor("ssm_alpha.weight", "in_proj_a.weight", &[self.n_value, n_embd], Layout::rows(per_head))?;
        tensor("ssm_beta.weight", "in_proj_b.weight", &[self.n_value, n_embd], Layout::rows(per_head))?;
        tensor("ssm_a", "A_log", &[self.n_value], Layout { map: Map::NegExp, ..Layout::cols(per_head) })?;
        tensor("ssm_dt.bias", "dt_bias", &[self.n_value], Layout::cols(per_head))?;
        tensor("ssm_conv1d.weight", "conv1d.weight", &[n_conv, 1, self.conv_width], Layout::rows(qkv))?;
        tensor("ssm_norm.weight", "norm.weight", &[self.head_dim], Layout::SAME)?;
        tensor("ssm_out.weight", "out_proj.weight", &[n_embd, n_value_rows], Layout::cols(value_rows))
    }
}

/// For each layer, whether it is a linear one.
fn layer_kinds(config: &Config, n_layer: usize) -> Result<Vec<bool>, Error> {
    let Some(kinds) = config.opt_strings("layer_types")? else {
        let interval = config.opt_usize("full_attention_interval")?.unwrap_or(4);
        return Ok((0..n_layer).map(|il| !(il + 1).is_multiple_of(interval)).collect());
    };
    if kinds.len() != n_layer || kinds.iter().any(|kind| ![LINEAR, FULL].contains(kind)) {
        return Err(config.error("layer_types", format!("{n_layer} times `{LINEAR}` or `{FULL}`"), ""));
    }
    Ok(kinds.iter().map(|kind| *kind == LINEAR).collect())
}

/// `n` such that exactly each `n`-th layer is a full one.
fn interval(is_linear: &[bool]) -> Option<usize> {
    let interval = is_linear.iter().position(|linear| !linear)? + 1;
    let fits = |(il, linear): (usize, &bool)| *linear != (il + 1).is_multiple_of(interval);
    is_linear.iter().enumerate().all(fits).then_some(interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_found_or_there_is_none() {
        let check = |kinds: &str, want| {
            let is_linear: Vec<bool> = kinds.chars().map(|kind| kind == 'l').collect();
            assert_eq!(interval(&is_linear), want, "{kinds}");
        };
        check("lllflllf", Some(4));
        check("llflllfl", None);
        check("llfllfl", Some(3));
        check("ff", Some(1));
        check("lf", Some(2));
        check("flf", None);
        check("lll", None);
    }
}
