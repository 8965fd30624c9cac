//! Qwen3-Next: the layers of [`super::qwen35`] with the projections of the delta rule packed in another way, and experts.
//!
//! The checkpoint interleaves q, k, v and z by key head in one matrix, and b and a in another. The file has q, k and v one
//! behind the other, z by itself, and b and a as they are. Value heads stay grouped by key head in both.

use super::decoder::Decoder;
use super::qwen35::{DeltaNet, Hybrid};
use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::layout::{Layout, Map, Order};
use crate::recipe::Recipe;

pub(super) const FAMILY: Family =
    Family { arch: "qwen3next", architectures: &["Qwen3NextForCausalLM"], drafts: false, write };

fn write(recipe: &mut Recipe, config: &Config, _: Option<&Target>) -> Result<(), Error> {
    let decoder = Decoder::read(config, 0.25)?;
    decoder.rope.check_kind(&["default", "linear", "yarn"])?;
    let hybrid = Hybrid::read(config, decoder)?;
    hybrid.write_keys(recipe)?;
    hybrid.tensors(recipe, config, delta_net)
}

fn delta_net(
    delta: &DeltaNet,
    recipe: &mut Recipe,
    n_embd: usize,
    il: usize,
    layer: &str,
) -> Result<(), Error> {
    let &DeltaNet { n_key: n, n_value, head_dim, conv_width } = delta;
    let n_value_rows = n_value * head_dim;
    let n_conv = 2 * n * head_dim + n_value_rows;
    // A key head's rows: q, k, and v and z of all its value heads.
    let (qk, v) = (head_dim, n_value_rows / n);
    let stride = 2 * qk + 2 * v;
    let sections = |sections| Layout::rows(Order::Sections { n, stride, sections });
    let (qkvz, shape) = (format!("{layer}linear_attn.in_proj_qkvz.weight"), [n * stride, n_embd]);
    let name = |name: &str| format!("blk.{il}.{name}");
    let qkv = sections([(0, qk), (qk, qk), (2 * qk, v)]);
    recipe.part(&name("attn_qkv.weight"), &qkvz, &shape, &[n_conv, n_embd], qkv)?;
    let z = sections([(2 * qk + v, v), (0, 0), (0, 0)]);
    recipe.part(&name("attn_gate.weight"), &qkvz, &shape, &[n_value_rows, n_embd], z)?;
    let mut tensor = |file: &str, part: &str, shape: &[usize], layout: Layout| {
        recipe.tensor(&name(file), &format!("{layer}linear_attn.{part}"), shape, layout)
    };
    tensor("ssm_ba.weight", "in_proj_ba.weight", &[2 * n_value, n_embd], Layout::SAME)?;
    tensor("ssm_a", "A_log", &[n_value], Layout::map(Map::NegExp))?;
    tensor("ssm_dt.bias", "dt_bias", &[n_value], Layout::SAME)?;
    tensor("ssm_conv1d.weight", "conv1d.weight", &[n_conv, 1, conv_width], Layout::SAME)?;
    tensor("ssm_norm.weight", "norm.weight", &[head_dim], Layout::SAME)?;
    tensor("ssm_out.weight", "out_proj.weight", &[n_embd, n_value_rows], Layout::SAME)
}
