//! The mixture of experts that decoders of several families have in place of their MLP: a router, experts, and in some
//! an expert that every token goes through, behind a gate.
//!
//! The file stacks the experts of one projection. Checkpoints hold them one by one (`experts.{e}.gate_proj.weight`), or
//! stacked, with gate and up in one tensor (`experts.gate_up_proj`, the gate's rows first).

use crate::Error;
use crate::config::Config;
use crate::layout::{Layout, Order};
use crate::recipe::Recipe;

/// Sizes of a mixture of experts.
pub(crate) struct Moe {
    n_expert: usize,
    n_used: usize,
    n_ff: usize,
    /// Width of the expert that every token goes through, if there is one.
    n_ff_shared: Option<usize>,
    /// Layers that have an MLP instead: these, and all but every `step`-th.
    dense: Vec<u32>,
    step: usize,
}

impl Moe {
    /// Reads the sizes, or nothing if the config has no experts.
    pub(crate) fn read(config: &Config) -> Result<Option<Moe>, Error> {
        let key = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        let Some(n_expert) = config.opt_usize(key)? else { return Ok(None) };
        let n_used = config.usize("num_experts_per_tok")?;
        if n_used > n_expert {
            return Err(config.error("num_experts_per_tok", format!("at most {n_expert} ({key})"), ""));
        }
        // There is no key in the file for this: readers divide by the sum.
        let kept = config.opt_bool("norm_topk_prob")? == Some(false);
        config.refuse("norm_topk_prob", kept, "weights of experts that add up to 1")?;
        Ok(Some(Moe {
            n_expert,
            n_used,
            n_ff: config.usize("moe_intermediate_size")?,
            n_ff_shared: config.opt_usize("shared_expert_intermediate_size")?,
            dense: config.opt_ids("mlp_only_layers")?.unwrap_or_default(),
            step: config.opt_usize("decoder_sparse_step")?.unwrap_or(1),
        }))
    }

    pub(crate) fn write_keys(&self, recipe: &mut Recipe) {
        recipe.size_key("expert_count", self.n_expert);
        recipe.size_key("expert_used_count", self.n_used);
        recipe.size_key("expert_feed_forward_length", self.n_ff);
        if let Some(n_ff) = self.n_ff_shared {
            recipe.size_key("expert_shared_feed_forward_length", n_ff);
        }
    }

    /// Whether this layer is one with experts.
    pub(crate) fn is_in(&self, il: usize) -> bool {
        !self.dense.contains(&(il as u32)) && (il + 1).is_multiple_of(self.step)
    }

    /// The tensors of a layer whose names begin with `layer`.
    pub(crate) fn tensors(
        &self,
        recipe: &mut Recipe,
        n_embd: usize,
        il: usize,
        layer: &str,
    ) -> Result<(), Error> {
        let &Moe { n_expert, n_ff, .. } = self;
        let name = |part: &str| format!("blk.{il}.{part}.weight");
        let gate = format!("{layer}mlp.gate.weight");
        recipe.tensor(&name("ffn_gate_inp"), &gate, &[n_expert, n_embd], Layout::SAME)?;
        let fused = format!("{layer}mlp.experts.gate_up_proj");
        if recipe.checkpoint.has(&fused) {
            for (part, first) in [("gate", 0), ("up", n_ff)] {
                let rows = Order::Sections {
                    n: n_expert,
                    stride: 2 * n_ff,
                    sections: [(first, n_ff), (0, 0), (0, 0)],
                };
                let shape = [n_expert, 2 * n_ff, n_embd];
                let part = name(&format!("ffn_{part}_exps"));
                recipe.part(&part, &fused, &shape, &[n_expert, n_ff, n_embd], Layout::rows(rows))?;
            }
            let down = format!("{layer}mlp.experts.down_proj");
            recipe.tensor(&name("ffn_down_exps"), &down, &[n_expert, n_embd, n_ff], Layout::SAME)?;
        } else {
            for (part, shape) in [("gate", [n_ff, n_embd]), ("up", [n_ff, n_embd]), ("down", [n_embd, n_ff])]
            {
                let experts = (0..n_expert).map(|e| format!("{layer}mlp.experts.{e}.{part}_proj.weight"));
                recipe.stack(&name(&format!("ffn_{part}_exps")), experts.collect(), &shape)?;
            }
        }
        let Some(n_ff) = self.n_ff_shared else { return Ok(()) };
        let gate = format!("{layer}mlp.shared_expert_gate.weight");
        recipe.tensor(&name("ffn_gate_inp_shexp"), &gate, &[1, n_embd], Layout::SAME)?;
        for (part, shape) in [("gate", [n_ff, n_embd]), ("up", [n_ff, n_embd]), ("down", [n_embd, n_ff])] {
            let tensor = format!("{layer}mlp.shared_expert.{part}_proj.weight");
            recipe.tensor(&name(&format!("ffn_{part}_shexp")), &tensor, &shape, Layout::SAME)?;
        }
        Ok(())
    }
}
