//! Qwen3 with a mixture of experts in place of the MLP; all else is [`super::qwen3`].

use super::{Family, Target};
use crate::Error;
use crate::config::Config;
use crate::recipe::Recipe;

pub(super) const FAMILY: Family =
    Family { arch: "qwen3moe", architectures: &["Qwen3MoeForCausalLM"], drafts: false, write };

fn write(recipe: &mut Recipe, config: &Config, target: Option<&Target>) -> Result<(), Error> {
    // Absent means no.
    let kept = !config.flag("norm_topk_prob")?;
    config.refuse("norm_topk_prob", kept, "weights of experts that add up to 1")?;
    super::qwen3::write(recipe, config, target)
}
