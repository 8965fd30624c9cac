//! What the decoder-only transformers of Hugging Face have in common: the sizes in the config, the keys that hold them, and
//! the names of embedding, head, attention and gated MLP.

use super::moe::Moe;
use crate::Error;
use crate::config::Config;
use crate::layout::{Layout, Map, Order};
use crate::recipe::Recipe;

/// The sizes of a decoder.
pub(crate) struct Decoder {
    pub(crate) n_layer: usize,
    pub(crate) n_embd: usize,
    /// Width of the MLP; 0 if no layer has one.
    pub(crate) n_ff: usize,
    /// The mixture of experts that some or all layers have instead.
    pub(crate) moe: Option<Moe>,
    pub(crate) n_head: usize,
    pub(crate) n_head_kv: usize,
    pub(crate) head_dim: usize,
    pub(crate) n_ctx: usize,
    pub(crate) eps: f32,
    pub(crate) rope: Rope,
}

/// Rotary positions, from either of the two places that configs keep them in.
pub(crate) struct Rope {
    pub(crate) theta: f32,
    /// Rotated dimensions of a head.
    pub(crate) n_rot: usize,
    /// `default`, `llama3`, `yarn` …
    pub(crate) kind: String,
    /// The scaling's parameters.
    pub(crate) parameters: Option<Config>,
}

impl Decoder {
    /// Reads and checks the sizes. `partial` is the rotated part of a head where the config says nothing.
    pub(crate) fn read(config: &Config, partial: f32) -> Result<Decoder, Error> {
        let (n_embd, n_head) = (config.usize("hidden_size")?, config.usize("num_attention_heads")?);
        let n_head_kv = config.opt_usize("num_key_value_heads")?.unwrap_or(n_head);
        if !n_head.is_multiple_of(n_head_kv) {
            return Err(config.error(
                "num_key_value_heads",
                format!("a divisor of {n_head} (num_attention_heads)"),
                "",
            ));
        }
        let head_dim = match config.opt_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if n_embd.is_multiple_of(n_head) => n_embd / n_head,
            None => return Err(config.error("head_dim", "the size of a head", "")),
        };
        let act = config.opt_str("hidden_act")?.unwrap_or("silu");
        config.refuse("hidden_act", act != "silu", "`silu`")?;
        let moe = Moe::read(config)?;
        let n_ff = match (config.opt_usize("intermediate_size")?, &moe) {
            (Some(n_ff), _) => n_ff,
            (None, Some(_)) => 0,
            (None, None) => config.usize("intermediate_size")?,
        };
        Ok(Decoder {
            n_layer: config.usize("num_hidden_layers")?,
            n_embd,
            n_ff,
            moe,
            n_head,
            n_head_kv,
            head_dim,
            n_ctx: config.usize("max_position_embeddings")?,
            eps: config.f32("rms_norm_eps")?,
            rope: Rope::read(config, head_dim, partial)?,
        })
    }

    /// The keys that every architecture has.
    pub(crate) fn write_keys(&self, recipe: &mut Recipe) -> Result<(), Error> {
        recipe.size_key("block_count", self.n_layer);
        recipe.size_key("context_length", self.n_ctx);
        recipe.size_key("embedding_length", self.n_embd);
        if self.n_ff > 0 {
            recipe.size_key("feed_forward_length", self.n_ff);
        }
        if let Some(moe) = &self.moe {
            moe.write_keys(recipe);
        }
        recipe.size_key("attention.head_count", self.n_head);
        recipe.size_key("attention.head_count_kv", self.n_head_kv);
        recipe.size_key("attention.key_length", self.head_dim);
        recipe.size_key("attention.value_length", self.head_dim);
        recipe.key("attention.layer_norm_rms_epsilon", self.eps);
        recipe.key("rope.freq_base", self.rope.theta);
        recipe.size_key("rope.dimension_count", self.rope.n_rot);
        self.rope.write_scaling(recipe)
    }

    /// Embedding, final norm and head. `root` is the text model's prefix; the head is outside of it.
    pub(crate) fn ends(
        &self,
        recipe: &mut Recipe,
        config: &Config,
        root: &str,
        norm: Map,
    ) -> Result<(), Error> {
        let n_vocab = config.usize("vocab_size")?;
        recipe.n_vocab = n_vocab;
        recipe.tensor(
            "token_embd.weight",
            &format!("{root}embed_tokens.weight"),
            &[n_vocab, self.n_embd],
            Layout::SAME,
        )?;
        recipe.tensor(
            "output_norm.weight",
            &format!("{root}norm.weight"),
            &[self.n_embd],
            Layout::map(norm),
        )?;
        // Multimodal configs say it at the top, beside `text_config`.
        let tied = match config.opt_bool("tie_word_embeddings")? {
            Some(tied) => tied,
            None => recipe.checkpoint.config.flag("tie_word_embeddings")?,
        };
        if tied {
            recipe.skip("the head is tied to the embedding", |name| name == "lm_head.weight");
            return Ok(());
        }
        recipe.tensor("output.weight", "lm_head.weight", &[n_vocab, self.n_embd], Layout::SAME)
    }

    /// Keys, values and output of an attention layer; q differs from family to family.
    pub(crate) fn attention(
        &self,
        recipe: &mut Recipe,
        il: usize,
        layer: &str,
        k_rows: Order,
    ) -> Result<(), Error> {
        let (n_embd, kv) = (self.n_embd, self.n_head_kv * self.head_dim);
        let mut matrix = |name: &str, part: &str, shape: [usize; 2], rows| {
            let (name, tensor) =
                (format!("blk.{il}.{name}.weight"), format!("{layer}self_attn.{part}.weight"));
            recipe.tensor(&name, &tensor, &shape, Layout::rows(rows))
        };
        matrix("attn_k", "k_proj", [kv, n_embd], k_rows)?;
        matrix("attn_v", "v_proj", [kv, n_embd], Order::Same)?;
        matrix("attn_output", "o_proj", [n_embd, self.n_head * self.head_dim], Order::Same)
    }

    /// The norms of each head of q and k.
    pub(crate) fn head_norms(
        &self,
        recipe: &mut Recipe,
        il: usize,
        layer: &str,
        norm: Map,
    ) -> Result<(), Error> {
        for part in ["q", "k"] {
            let (name, tensor) =
                (format!("blk.{il}.attn_{part}_norm.weight"), format!("{layer}self_attn.{part}_norm.weight"));
            recipe.tensor(&name, &tensor, &[self.head_dim], Layout::map(norm))?;
        }
        Ok(())
    }

    /// The gated MLP, or the experts in its place.
    pub(crate) fn ffn(&self, recipe: &mut Recipe, il: usize, layer: &str) -> Result<(), Error> {
        match &self.moe {
            Some(moe) if moe.is_in(il) => moe.tensors(recipe, self.n_embd, il, layer),
            _ => self.mlp(recipe, il, layer),
        }
    }

    fn mlp(&self, recipe: &mut Recipe, il: usize, layer: &str) -> Result<(), Error> {
        let (n_embd, n_ff) = (self.n_embd, self.n_ff);
        for (part, shape) in [("gate", [n_ff, n_embd]), ("up", [n_ff, n_embd]), ("down", [n_embd, n_ff])] {
            let (name, tensor) =
                (format!("blk.{il}.ffn_{part}.weight"), format!("{layer}mlp.{part}_proj.weight"));
            recipe.tensor(&name, &tensor, &shape, Layout::SAME)?;
        }
        Ok(())
    }
}

impl Rope {
    fn read(config: &Config, head_dim: usize, partial: f32) -> Result<Rope, Error> {
        let section = config.section("rope_parameters").or_else(|| config.section("rope_scaling"));
        let mut kind = "default".to_string();
        let (mut theta, mut factor) =
            (config.opt_f32("rope_theta")?, config.opt_f32("partial_rotary_factor")?);
        if let Some(section) = &section {
            if let Some(name) = section.opt_str("rope_type")?.or(section.opt_str("type")?) {
                kind = name.to_string();
            }
            theta = section.opt_f32("rope_theta")?.or(theta);
            factor = section.opt_f32("partial_rotary_factor")?.or(factor);
        }
        let theta = theta.ok_or_else(|| config.error("rope_theta", "the base of the rotary angles", ""))?;
        let n_rot = head_dim as f64 * f64::from(factor.unwrap_or(partial));
        // Rotated dimensions come in pairs, and the part is often a fraction that f32 can't hold.
        let whole = n_rot.round();
        if whole < 2.0 || whole as usize > head_dim || whole % 2.0 != 0.0 || (n_rot - whole).abs() > 1e-3 {
            let expected =
                format!("a part that rotates an even number of the {head_dim} dimensions of a head");
            return Err(config.error("partial_rotary_factor", expected, ""));
        }
        Ok(Rope { theta, n_rot: whole as usize, kind, parameters: section })
    }

    /// The scaling's parameters, where `kind` needs some.
    pub(crate) fn parameters(&self) -> &Config {
        self.parameters.as_ref().expect("a kind other than `default` was read from them")
    }

    /// Refuses every kind but those in `supported`.
    pub(crate) fn check_kind(&self, supported: &[&str]) -> Result<(), Error> {
        let Some(parameters) = &self.parameters else { return Ok(()) };
        let key = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
        parameters.refuse(
            key,
            !supported.contains(&self.kind.as_str()),
            &format!("one of {}", supported.join(", ")),
        )
    }

    /// Keys of the scalings that are done from metadata: `linear` and `yarn`.
    fn write_scaling(&self, recipe: &mut Recipe) -> Result<(), Error> {
        if !["linear", "yarn"].contains(&self.kind.as_str()) {
            return Ok(());
        }
        recipe.key("rope.scaling.type", self.kind.as_str());
        let parameters = self.parameters();
        let factor = parameters.f32("factor")?;
        recipe.key("rope.scaling.factor", factor);
        if let Some(n_ctx) = parameters.opt_usize("original_max_position_embeddings")? {
            recipe.size_key("rope.scaling.original_context_length", n_ctx);
        }
        for beta in ["beta_fast", "beta_slow"] {
            if let Some(turns) = parameters.opt_f32(beta)? {
                recipe.key(&format!("rope.scaling.yarn_{beta}"), turns);
            }
        }
        // The file's factor comes on top of the paper's own.
        if let Some(whole) = parameters.opt_f32("attention_factor")? {
            recipe.key("rope.scaling.attn_factor", whole / (1.0 + 0.1 * factor.ln()));
        }
        for other in ["mscale", "mscale_all_dim"] {
            parameters.refuse(other, parameters.get(other).is_some(), "YaRN without it")?;
        }
        let whole_pairs = parameters.opt_bool("truncate")? != Some(false);
        parameters.refuse("truncate", !whole_pairs, "a blend that begins and ends at whole pairs")
    }
}

/// The prefix of the layers: text-only checkpoints have `model.`, multimodal ones one more level.
pub(crate) fn root(recipe: &Recipe) -> &'static str {
    let prefixes = ["model.language_model.", "language_model.model."];
    let there = |prefix: &&str| recipe.checkpoint.has(&format!("{prefix}embed_tokens.weight"));
    prefixes.into_iter().find(there).unwrap_or("model.")
}
