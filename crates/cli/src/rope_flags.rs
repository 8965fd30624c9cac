//! Flags on how far a target's positions reach: they stand for keys of its file, and are set as if the file had them.

use anyhow::{Context, Result, ensure};
use clap::Args;
use paceline_gguf::Gguf;

/// Context beyond the trained one.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Context beyond the trained one")]
pub struct RopeFlags {
    /// How the target's positions are scaled: none, linear, yarn; the file's own way if not given
    #[arg(long, value_name = "WAY", env = "LLAMA_ARG_ROPE_SCALING_TYPE", hide_env = true, value_parser = ["none", "linear", "yarn"])]
    pub rope_scaling: Option<String>,
    /// Times that the context is longer than the trained one
    #[arg(long, value_name = "N", env = "LLAMA_ARG_ROPE_SCALE", hide_env = true)]
    pub rope_scale: Option<f32>,
    /// The same as a fraction: 1/N
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_ROPE_FREQ_SCALE",
        hide_env = true,
        conflicts_with = "rope_scale"
    )]
    pub rope_freq_scale: Option<f32>,
    /// Base of the frequencies; 0 is the file's
    #[arg(long, value_name = "N", env = "LLAMA_ARG_ROPE_FREQ_BASE", hide_env = true)]
    pub rope_freq_base: Option<f32>,
    /// YaRN: the trained context; 0 is the file's
    #[arg(long, value_name = "N", env = "LLAMA_ARG_YARN_ORIG_CTX", hide_env = true)]
    pub yarn_orig_ctx: Option<u32>,
    /// YaRN: how much of fast frequencies stays, 0 to 1; -1 is the file's, or 1
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_YARN_EXT_FACTOR",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub yarn_ext_factor: Option<f32>,
    /// YaRN: factor on the stretch of attention
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_YARN_ATTN_FACTOR",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub yarn_attn_factor: Option<f32>,
    /// YaRN: turns up to which a frequency is divided
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_YARN_BETA_SLOW",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub yarn_beta_slow: Option<f32>,
    /// YaRN: turns from which on a frequency stays
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_YARN_BETA_FAST",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub yarn_beta_fast: Option<f32>,
}

impl RopeFlags {
    /// Sets the keys in `file`, a target.
    pub fn apply(&self, file: &mut Gguf) -> Result<()> {
        let given = |x: Option<f32>| x.filter(|&x| x > 0.0);
        let factor = given(self.rope_scale).or(given(self.rope_freq_scale).map(|scale| 1.0 / scale));
        let orig = self.yarn_orig_ctx.filter(|&n| n > 0);
        let numbers = [
            ("yarn_ext_factor", self.yarn_ext_factor.filter(|&x| x >= 0.0)),
            ("yarn_attn_factor", given(self.yarn_attn_factor)),
            ("yarn_beta_slow", given(self.yarn_beta_slow)),
            ("yarn_beta_fast", given(self.yarn_beta_fast)),
        ];
        let meta = file.metadata();
        let arch = meta.require_str("general.architecture")?.to_string();
        let key = |suffix: &str| format!("{arch}.{suffix}");
        let own = meta.str(&key("rope.scaling.type"))?.unwrap_or("none");
        // As elsewhere, a factor alone is a linear one.
        let way = match (&self.rope_scaling, factor) {
            (Some(way), _) => way.clone(),
            (None, Some(_)) if own == "none" => "linear".to_string(),
            _ => own.to_string(),
        };
        let of_yarn = numbers.iter().any(|(_, number)| number.is_some()) || orig.is_some();
        ensure!(
            way == "yarn" || !of_yarn,
            "{}: flags of YaRN and positions that are scaled another way ({way})\nhint: --rope-scaling yarn",
            file.name()
        );
        let n_train = meta.require_u32(&key("context_length"))?;
        let own_orig = meta.u32(&key("rope.scaling.original_context_length"))?;
        let n_orig = orig.or(own_orig).unwrap_or(n_train);
        let factor_of_file = meta.f32(&key("rope.scaling.factor"))?;
        let meta = file.metadata_mut();
        if let Some(base) = given(self.rope_freq_base) {
            meta.insert(key("rope.freq_base"), base);
        }
        if self.rope_scaling.is_none() && factor.is_none() && !of_yarn {
            return Ok(());
        }
        meta.insert(key("rope.scaling.type"), way.as_str());
        if way == "none" {
            return Ok(());
        }
        let factor = factor.or(factor_of_file).context(
            "--rope-scaling: expected how many times longer the context is than the trained one\nhint: --rope-scale 4",
        )?;
        meta.insert(key("rope.scaling.factor"), factor);
        meta.insert(key("rope.scaling.original_context_length"), n_orig);
        for (name, number) in numbers {
            number.into_iter().for_each(|number| meta.insert(key(&format!("rope.scaling.{name}")), number));
        }
        // So far the model reaches now.
        let reach = f64::from(n_orig) * f64::from(factor);
        meta.insert(key("context_length"), n_train.max(reach.min(f64::from(u32::MAX)) as u32));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_gguf::{GgmlType, Metadata, to_bytes};

    fn check(flags: RopeFlags, own: &str, expected: Result<&[(&str, f64)], &str>) {
        let mut meta = Metadata::new();
        meta.insert("general.architecture", "qwen3");
        meta.insert("qwen3.context_length", 32_768u32);
        meta.insert("qwen3.rope.freq_base", 1e6f32);
        if own != "none" {
            meta.insert("qwen3.rope.scaling.type", own);
            meta.insert("qwen3.rope.scaling.factor", 2f32);
        }
        let tensors: [(&str, [u64; 1], GgmlType, Vec<u8>); 0] = [];
        let mut file = Gguf::from_bytes("test", to_bytes(&meta, &tensors).unwrap()).unwrap();
        let outcome = flags.apply(&mut file).map_err(|e| format!("{e:#}"));
        let Ok(expected) = expected else {
            let part = expected.unwrap_err();
            assert!(outcome.as_ref().is_err_and(|e| e.contains(part)), "{flags:?}: {outcome:?}");
            return;
        };
        outcome.unwrap();
        for (name, value) in expected {
            let key = format!("qwen3.{name}");
            let meta = file.metadata();
            let found = meta.f32(&key).ok().flatten().map(f64::from);
            let found = found.or(meta.u32(&key).ok().flatten().map(f64::from));
            assert_eq!(found, Some(*value), "{key} with {flags:?}");
        }
    }

    #[test]
    fn flags_are_keys() {
        let none = RopeFlags::default;
        let yarn = || RopeFlags { rope_scaling: Some("yarn".to_string()), ..none() };
        check(none(), "none", Ok(&[("context_length", 32_768.0)]));
        check(
            RopeFlags { rope_scale: Some(4.0), yarn_beta_fast: Some(16.0), ..yarn() },
            "none",
            Ok(&[
                ("rope.scaling.factor", 4.0),
                ("rope.scaling.original_context_length", 32_768.0),
                ("rope.scaling.yarn_beta_fast", 16.0),
                ("context_length", 131_072.0),
            ]),
        );
        // The file's own factor, and a trained context that is not the file's.
        check(
            RopeFlags { yarn_orig_ctx: Some(1000), ..none() },
            "yarn",
            Ok(&[("rope.scaling.factor", 2.0), ("rope.scaling.original_context_length", 1000.0)]),
        );
        check(
            RopeFlags { rope_freq_scale: Some(0.5), ..none() },
            "none",
            Ok(&[("rope.scaling.factor", 2.0), ("context_length", 65_536.0)]),
        );
        check(RopeFlags { rope_freq_base: Some(5e6), ..none() }, "none", Ok(&[("rope.freq_base", 5e6)]));
        check(RopeFlags { rope_freq_base: Some(0.0), ..none() }, "none", Ok(&[("rope.freq_base", 1e6)]));
        check(yarn(), "none", Err("--rope-scale 4"));
        check(RopeFlags { yarn_orig_ctx: Some(8), ..none() }, "linear", Err("--rope-scaling yarn"));
    }
}
