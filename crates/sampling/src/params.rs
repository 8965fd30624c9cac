//! What a request says about sampling: llama-server's field names and defaults.
//!
//! A field's neutral value switches its sampler off (`top_k` 0, `top_p` 1, `repeat_penalty` 1, …). Nothing here
//! changes a value silently: [`SamplingParams::validate`] refuses, [`SamplingParams::clamp`] is there for a
//! caller that wants llama-server's lenient reading of the fields that it clamps.

use crate::samplers::{SAMPLERS, SamplerKind};
use serde::{Serialize, Serializer};

/// The sampling settings of one request. Serializes to llama-server's `generation_settings` names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplingParams {
    /// The seed of the noise. Every `u64` is an ordinary seed: who wants a random one draws it before.
    pub seed: u64,
    /// Divides the logits; 0 and below is greedy, whatever `samplers` says.
    pub temperature: f32,
    /// Half-width of the entropy-driven temperature range around `temperature`; 0 is off.
    pub dynatemp_range: f32,
    /// Exponent of the normalised entropy in the dynamic temperature.
    pub dynatemp_exponent: f32,
    /// Keep the `k` likeliest; 0 and below is off.
    pub top_k: i32,
    /// Keep the shortest head of the distribution with at least this mass; 1 is off.
    pub top_p: f32,
    /// Keep tokens with at least this fraction of the likeliest token's probability; 0 is off.
    pub min_p: f32,
    /// Keep logits within this many standard deviations of the largest; 0 and below is off.
    pub top_n_sigma: f32,
    /// The chance, per position, that XTC removes the top choices; 0 is off.
    pub xtc_probability: f32,
    /// The probability above which XTC counts a token as a top choice; above 0.5 is off.
    pub xtc_threshold: f32,
    /// Locally typical sampling: keep this much mass, the least surprising deviation first; 1 is off.
    pub typical_p: f32,
    /// How many last tokens the penalties look at: 0 is none, -1 the whole context.
    pub repeat_last_n: i32,
    /// Divides positive logits of seen tokens and multiplies negative ones; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once from the logit of a seen token; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a seen token once per occurrence; 0 is off.
    pub frequency_penalty: f32,
    /// Scale of the DRY penalty; 0 is off.
    pub dry_multiplier: f32,
    /// Base of the DRY penalty, raised to how far a repetition exceeds `dry_allowed_length`.
    pub dry_base: f32,
    /// Repetitions shorter than this go unpunished.
    pub dry_allowed_length: i32,
    /// How many last tokens DRY searches for repetitions: 0 is off, -1 the whole context.
    pub dry_penalty_last_n: i32,
    /// Texts across which DRY sees no repetition. The vocabulary turns them into a [`crate::DryBreakers`].
    pub dry_sequence_breakers: Vec<String>,
    /// Mirostat version. Only 0 (off) is served: its running state makes a token depend on earlier draws.
    pub mirostat: i32,
    /// Mirostat's target surprise; unused while `mirostat` is 0.
    pub mirostat_tau: f32,
    /// Mirostat's learning rate; unused while `mirostat` is 0.
    pub mirostat_eta: f32,
    /// `top_p`, `min_p`, `typical_p` and XTC leave at least this many tokens.
    pub min_keep: u32,
    /// The chain, in order. What is absent does not run.
    pub samplers: Vec<&'static SamplerKind>,
    /// Added to the logits before the chain; -inf bans a token.
    #[serde(serialize_with = "serialize_bias")]
    pub logit_bias: Vec<(u32, f32)>,
    /// How many likeliest tokens to report per position; 0 reports nothing.
    pub n_probs: u32,
    /// Report the distribution that the chain leaves instead of the model's.
    pub post_sampling_probs: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            seed: 0,
            temperature: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            typical_p: 1.0,
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 64,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).to_vec(),
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            min_keep: 0,
            samplers: SAMPLERS.iter().collect(),
            logit_bias: Vec::new(),
            n_probs: 0,
            post_sampling_probs: false,
        }
    }
}

/// Why a request's sampling settings are refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParamError {
    /// A number outside what its field allows, NaN and infinities included.
    #[error("`{field}`: expected {expected}, found {found}")]
    OutOfRange {
        /// The field's name, as in the request.
        field: &'static str,
        /// The allowed range, in words.
        expected: String,
        /// The offending value.
        found: String,
    },
    /// A sampler name that no registered sampler answers to.
    #[error("`samplers`: unknown sampler {found:?}, expected one of {known}")]
    UnknownSampler {
        /// The name, or the letter, that was asked for.
        found: String,
        /// The registered names or letters.
        known: String,
    },
    /// Mirostat is not served.
    #[error(
        "`mirostat`: version {0} is not supported, expected 0 (off): its state would make the text depend on \
         how tokens were drafted; `top_n_sigma` or `min_p` with `temperature` are the nearest substitutes"
    )]
    Mirostat(i32),
}

impl SamplingParams {
    /// Whether the choice is the likeliest token, without noise.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// Pulls the fields that llama-server clamps into their range; NaN stays for [`Self::validate`] to refuse.
    pub fn clamp(&mut self) {
        self.temperature = if self.temperature < 0.0 { 0.0 } else { self.temperature };
        self.top_k = self.top_k.max(0);
        for fraction in [&mut self.top_p, &mut self.min_p, &mut self.xtc_probability, &mut self.xtc_threshold]
        {
            *fraction = fraction.clamp(0.0, 1.0);
        }
        self.dynatemp_range = if self.dynatemp_range < 0.0 { 0.0 } else { self.dynatemp_range };
    }

    /// Refuses what no sampler could give a meaning to, naming the field, its range and the value.
    pub fn validate(&self, n_vocab: usize) -> Result<(), ParamError> {
        const INF: f32 = f32::INFINITY;
        within("temperature", self.temperature, -INF, INF)?;
        within("dynatemp_range", self.dynatemp_range, 0.0, INF)?;
        within("dynatemp_exponent", self.dynatemp_exponent, 0.0, INF)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("top_n_sigma", self.top_n_sigma, -INF, INF)?;
        within("xtc_probability", self.xtc_probability, 0.0, 1.0)?;
        within("xtc_threshold", self.xtc_threshold, 0.0, 1.0)?;
        within("typical_p", self.typical_p, 0.0, 1.0)?;
        if self.repeat_penalty <= 0.0 {
            return Err(out_of_range("repeat_penalty", "a number above 0 (1 is off)", self.repeat_penalty));
        }
        within("repeat_penalty", self.repeat_penalty, 0.0, INF)?;
        within("presence_penalty", self.presence_penalty, -INF, INF)?;
        within("frequency_penalty", self.frequency_penalty, -INF, INF)?;
        within("dry_multiplier", self.dry_multiplier, 0.0, INF)?;
        // A client that leaves DRY off may send anything harmless as its base.
        within("dry_base", self.dry_base, if self.dry_multiplier > 0.0 { 1.0 } else { -INF }, INF)?;
        at_least("dry_allowed_length", self.dry_allowed_length, 0, "")?;
        at_least("dry_penalty_last_n", self.dry_penalty_last_n, -1, " (-1 is the whole context, 0 off)")?;
        at_least("repeat_last_n", self.repeat_last_n, -1, " (-1 is the whole context, 0 off)")?;
        at_most_vocab("min_keep", self.min_keep, n_vocab)?;
        at_most_vocab("n_probs", self.n_probs, n_vocab)?;
        if self.mirostat != 0 {
            return Err(ParamError::Mirostat(self.mirostat));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= n_vocab {
                let expected = format!("token ids below {n_vocab} (the vocabulary's size)");
                return Err(out_of_range("logit_bias", expected, token));
            }
            if bias.is_nan() || bias == INF {
                let expected = format!("a finite bias, or false to ban, for token {token}");
                return Err(out_of_range("logit_bias", expected, bias));
            }
        }
        Ok(())
    }
}

fn out_of_range(field: &'static str, expected: impl Into<String>, found: impl ToString) -> ParamError {
    ParamError::OutOfRange { field, expected: expected.into(), found: found.to_string() }
}

fn within(field: &'static str, value: f32, low: f32, high: f32) -> Result<(), ParamError> {
    if value.is_finite() && (low..=high).contains(&value) {
        return Ok(());
    }
    let expected = match (low.is_finite(), high.is_finite()) {
        (true, true) => format!("a number from {low} to {high}"),
        (true, false) => format!("a finite number of at least {low}"),
        _ => "a finite number".to_owned(),
    };
    Err(out_of_range(field, expected, value))
}

fn at_least(field: &'static str, value: i32, low: i32, note: &str) -> Result<(), ParamError> {
    if value >= low {
        return Ok(());
    }
    Err(out_of_range(field, format!("an integer of at least {low}{note}"), value))
}

fn at_most_vocab(field: &'static str, value: u32, n_vocab: usize) -> Result<(), ParamError> {
    if value as usize <= n_vocab {
        return Ok(());
    }
    Err(out_of_range(field, format!("an integer from 0 to {n_vocab} (the vocabulary's size)"), value))
}

/// `[{"bias": -1.5, "token": 7}, {"bias": false, "token": 8}]`: JSON has no infinity, `false` is the ban.
fn serialize_bias<S: Serializer>(bias: &[(u32, f32)], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Bias {
        Add(f32),
        Ban(bool),
    }
    #[derive(Serialize)]
    struct Entry {
        bias: Bias,
        token: u32,
    }
    serializer.collect_seq(bias.iter().map(|&(token, bias)| Entry {
        bias: if bias == f32::NEG_INFINITY { Bias::Ban(false) } else { Bias::Add(bias) },
        token,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(edit: impl FnOnce(&mut SamplingParams), expected: &str) {
        let mut params = SamplingParams::default();
        edit(&mut params);
        let found = params.validate(100).err().map_or("ok".to_owned(), |e| e.to_string());
        assert_eq!(found, expected);
    }

    #[test]
    fn the_defaults_and_the_odd_but_meaningful_are_accepted() {
        check(|_| {}, "ok");
        check(|p| p.temperature = -3.0, "ok");
        check(|p| p.top_k = -1, "ok");
        check(|p| p.dry_base = 0.0, "ok");
        check(|p| p.logit_bias = vec![(99, f32::NEG_INFINITY), (0, -100.0)], "ok");
        check(|p| (p.repeat_last_n, p.dry_penalty_last_n) = (-1, -1), "ok");
        check(|p| p.samplers.clear(), "ok");
        check(|p| p.seed = u64::MAX, "ok");
    }

    #[test]
    fn refusals_name_field_range_and_value() {
        check(|p| p.temperature = f32::NAN, "`temperature`: expected a finite number, found NaN");
        check(|p| p.temperature = f32::INFINITY, "`temperature`: expected a finite number, found inf");
        check(|p| p.top_p = 1.5, "`top_p`: expected a number from 0 to 1, found 1.5");
        check(|p| p.top_p = f32::NAN, "`top_p`: expected a number from 0 to 1, found NaN");
        check(|p| p.min_p = -0.1, "`min_p`: expected a number from 0 to 1, found -0.1");
        check(|p| p.typical_p = 2.0, "`typical_p`: expected a number from 0 to 1, found 2");
        check(|p| p.xtc_probability = 9.0, "`xtc_probability`: expected a number from 0 to 1, found 9");
        check(|p| p.xtc_threshold = -1.0, "`xtc_threshold`: expected a number from 0 to 1, found -1");
        check(|p| p.top_n_sigma = f32::NAN, "`top_n_sigma`: expected a finite number, found NaN");
        check(
            |p| p.dynatemp_range = -1.0,
            "`dynatemp_range`: expected a finite number of at least 0, found -1",
        );
        check(
            |p| p.dynatemp_exponent = f32::NAN,
            "`dynatemp_exponent`: expected a finite number of at least 0, found NaN",
        );
        check(|p| p.repeat_penalty = 0.0, "`repeat_penalty`: expected a number above 0 (1 is off), found 0");
        check(
            |p| p.repeat_penalty = f32::NAN,
            "`repeat_penalty`: expected a finite number of at least 0, found NaN",
        );
        check(|p| p.presence_penalty = f32::NAN, "`presence_penalty`: expected a finite number, found NaN");
        check(|p| p.frequency_penalty = f32::NAN, "`frequency_penalty`: expected a finite number, found NaN");
        check(
            |p| p.dry_multiplier = -1.0,
            "`dry_multiplier`: expected a finite number of at least 0, found -1",
        );
        check(
            |p| (p.dry_multiplier, p.dry_base) = (1.0, 0.5),
            "`dry_base`: expected a finite number of at least 1, found 0.5",
        );
        check(
            |p| p.dry_allowed_length = -1,
            "`dry_allowed_length`: expected an integer of at least 0, found -1",
        );
        check(
            |p| p.dry_penalty_last_n = -2,
            "`dry_penalty_last_n`: expected an integer of at least -1 (-1 is the whole context, 0 off), found -2",
        );
        check(
            |p| p.repeat_last_n = -2,
            "`repeat_last_n`: expected an integer of at least -1 (-1 is the whole context, 0 off), found -2",
        );
        check(
            |p| p.min_keep = 101,
            "`min_keep`: expected an integer from 0 to 100 (the vocabulary's size), found 101",
        );
        check(
            |p| p.n_probs = 101,
            "`n_probs`: expected an integer from 0 to 100 (the vocabulary's size), found 101",
        );
        check(
            |p| p.logit_bias = vec![(100, 1.0)],
            "`logit_bias`: expected token ids below 100 (the vocabulary's size), found 100",
        );
        check(
            |p| p.logit_bias = vec![(5, f32::NAN)],
            "`logit_bias`: expected a finite bias, or false to ban, for token 5, found NaN",
        );
        let mirostat = SamplingParams { mirostat: 2, ..SamplingParams::default() }.validate(9).unwrap_err();
        assert!(mirostat.to_string().starts_with("`mirostat`: version 2 is not supported, expected 0 (off)"));
    }

    #[test]
    fn clamping_is_llama_servers() {
        let mut params = SamplingParams {
            temperature: -1.0,
            top_k: -5,
            top_p: 7.0,
            min_p: -2.0,
            ..SamplingParams::default()
        };
        params.clamp();
        assert_eq!((params.temperature, params.top_k, params.top_p, params.min_p), (0.0, 0, 1.0, 0.0));
        params.top_p = f32::NAN;
        params.clamp();
        assert!(params.validate(9).is_err(), "clamping hides no NaN");
    }

    #[test]
    fn serializes_under_llama_servers_names() {
        let params = SamplingParams {
            logit_bias: vec![(7, -1.5), (8, f32::NEG_INFINITY)],
            ..SamplingParams::default()
        };
        let json = serde_json::to_value(&params).unwrap();
        let order =
            ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"];
        assert_eq!(json["samplers"], serde_json::json!(order));
        assert_eq!(
            json["logit_bias"],
            serde_json::json!([{"bias": -1.5, "token": 7}, {"bias": false, "token": 8}])
        );
        assert_eq!(json["dry_sequence_breakers"], serde_json::json!(["\n", ":", "\"", "*"]));
        for (field, value) in
            [("top_k", 40), ("repeat_last_n", 64), ("dry_allowed_length", 2), ("mirostat", 0)]
        {
            assert_eq!(json[field], value, "{field}");
        }
    }
}
