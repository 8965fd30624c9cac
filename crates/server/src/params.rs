//! The request fields that say how to generate, the same for every surface: JSON to [`SamplingParams`] and limits.
//!
//! Names, defaults and clamps are llama-server's. What a later version of this server will do, but this one does
//! not, is refused by name (`LATER`) unless its value asks for nothing: a client must not believe that a grammar
//! was honoured.

use std::{sync::Arc, time::Duration};

use paceline_engine::{Request, RequestId, Token};
use paceline_sampling::{DryBreakers, ParamError, SamplerKind, SamplingParams, samplers};
use paceline_text::Encode;
use serde_json::{Value, json};

use crate::{
    app::App,
    error::ApiError,
    fields::{Fields, integer, show},
    prompt,
    random::random_u64,
};

/// How to generate, checked.
#[derive(Clone)]
pub(crate) struct Params {
    pub sampling: SamplingParams,
    pub breakers: Arc<DryBreakers>,
    /// Most tokens; 0 computes the prompt and answers nothing.
    pub n_predict: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub n_draft_max: Option<usize>,
    pub slot: Option<usize>,
    pub cache_prompt: bool,
    /// Prompt tokens before which a later turn may go on differently.
    pub turns: Vec<usize>,
    /// Answers per prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub timings_per_token: bool,
    pub return_tokens: bool,
    pub return_progress: bool,
    pub ping_interval: Option<Duration>,
    /// Paths of the fields of a native answer that are wanted.
    pub response_fields: Option<Vec<String>>,
}

type FloatField = fn(&mut SamplingParams) -> &mut f32;

/// Fields with a number; a later spelling counts only where the earlier ones are absent.
const FLOATS: &[(&[&str], FloatField)] = &[
    (&["temperature"], |p| &mut p.temperature),
    (&["dynatemp_range"], |p| &mut p.dynatemp_range),
    (&["dynatemp_exponent"], |p| &mut p.dynatemp_exponent),
    (&["top_p"], |p| &mut p.top_p),
    (&["min_p"], |p| &mut p.min_p),
    (&["top_n_sigma"], |p| &mut p.top_n_sigma),
    (&["xtc_probability"], |p| &mut p.xtc_probability),
    (&["xtc_threshold"], |p| &mut p.xtc_threshold),
    (&["typical_p", "typ_p"], |p| &mut p.typical_p),
    (&["repeat_penalty", "repetition_penalty"], |p| &mut p.repeat_penalty),
    (&["presence_penalty"], |p| &mut p.presence_penalty),
    (&["frequency_penalty"], |p| &mut p.frequency_penalty),
    (&["dry_multiplier"], |p| &mut p.dry_multiplier),
    (&["dry_base"], |p| &mut p.dry_base),
    (&["mirostat_tau"], |p| &mut p.mirostat_tau),
    (&["mirostat_eta"], |p| &mut p.mirostat_eta),
];

type IntegerField = fn(&mut SamplingParams) -> &mut i32;

const INTEGERS: &[(&str, IntegerField)] = &[
    ("top_k", |p| &mut p.top_k),
    ("repeat_last_n", |p| &mut p.repeat_last_n),
    ("dry_allowed_length", |p| &mut p.dry_allowed_length),
    ("dry_penalty_last_n", |p| &mut p.dry_penalty_last_n),
    ("mirostat", |p| &mut p.mirostat),
];

/// Whether a value asks for nothing.
type AsksNothing = fn(&Value) -> bool;

/// Fields of features that are not there yet.
const LATER: &[(&str, AsksNothing, &str)] = &[
    ("grammar", is_empty, "grammars"),
    ("json_schema", is_empty, "answers that follow a JSON schema"),
    ("lora", is_empty, "LoRA adapters"),
    ("echo", is_off, "repeating the prompt in the answer"),
    ("suffix", is_empty, "filling in the middle"),
    ("n_indent", is_off, "a minimum indentation"),
    ("t_max_predict_ms", is_off, "a time limit per request"),
    ("adaptive_target", is_off, "the adaptive sampler"),
    ("reasoning_control", is_off, "steering a running answer"),
    ("reasoning_budget_tokens", is_off, "a limit on thinking (chat_template_kwargs can switch it off)"),
];

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(on) => !on,
        _ => false,
    }
}

fn is_off(value: &Value) -> bool {
    value.as_f64().map_or(value.as_bool() == Some(false), |x| x <= 0.0)
}

const N_STOP_MAX: usize = 64;

impl Params {
    /// Reads and checks the fields that all surfaces share.
    pub fn parse(fields: &Fields<'_>, app: &App) -> Result<Params, ApiError> {
        for (name, asks_nothing, what) in LATER {
            if let Some(value) = fields.get(name)
                && !asks_nothing(value)
            {
                return Err(ApiError::invalid(format!("`{name}`: {what}: not supported yet by this server")));
            }
        }
        let sampling = sampling(fields, app)?;
        let n = fields.any(&["n_cmpl", "n"], |f, name| f.integer(name))?.unwrap_or(1);
        let n_slot = app.runner.config.n_slot;
        if !(1..=n_slot as i64).contains(&n) {
            let expected = format!("an integer from 1 to {n_slot} (the number of slots)");
            return Err(ApiError::field("n", &expected, n));
        }
        if let Some(best_of) = fields.integer("best_of")?
            && best_of != n
        {
            return Err(ApiError::field(
                "best_of",
                &format!("as many as `n`, {n}: choosing is not supported"),
                best_of,
            ));
        }
        for name in ["n_keep", "n_discard"] {
            fields.integer_from(name, -1)?;
        }
        if let Some(n @ 1..) = fields.integer_from("n_cache_reuse", -1)? {
            return Err(ApiError::field(
                "n_cache_reuse",
                "0: a cached part behind a difference was computed with other tokens before it, so the answer would not be \
                 the prompt's own; equal beginnings are reused anyway",
                n,
            ));
        }
        let n_predict = fields
            .any(&["n_predict", "max_completion_tokens", "max_tokens"], |f, name| f.integer_from(name, -1))?;
        let ping = fields.integer_from("sse_ping_interval", -1)?;
        let options = fields.object("stream_options", "stream_options.")?;
        let flag = |name| Ok::<bool, ApiError>(fields.bool(name)?.unwrap_or(false));
        Ok(Params {
            breakers: if sampling.dry_multiplier > 0.0 {
                app.dry_breakers(&sampling.dry_sequence_breakers)
            } else {
                Arc::default()
            },
            sampling,
            n_predict: n_predict.map_or(app.config.n_predict, |n| usize::try_from(n).ok()),
            stop: stop(fields)?,
            ignore_eos: flag("ignore_eos")?,
            n_draft_max: n_draft_max(fields)?,
            slot: fields.integer_from("id_slot", -1)?.and_then(|slot| usize::try_from(slot).ok()),
            cache_prompt: fields.bool("cache_prompt")?.unwrap_or(app.config.cache_prompt),
            turns: Vec::new(),
            n: n as usize,
            stream: flag("stream")?,
            include_usage: options.map_or(Ok(None), |o| o.bool("include_usage"))?.unwrap_or(false),
            timings_per_token: flag("timings_per_token")?,
            return_tokens: flag("return_tokens")?,
            return_progress: flag("return_progress")?,
            ping_interval: match ping {
                None => app.config.ping_interval,
                Some(seconds) => u64::try_from(seconds).ok().filter(|&s| s > 0).map(Duration::from_secs),
            },
            response_fields: fields.strings("response_fields")?,
        })
    }

    /// What a request gets that says nothing.
    pub fn defaults(app: &App) -> Params {
        Params {
            sampling: app.model.sampling.clone(),
            breakers: Arc::default(),
            n_predict: app.config.n_predict,
            stop: Vec::new(),
            ignore_eos: false,
            n_draft_max: None,
            slot: None,
            cache_prompt: app.config.cache_prompt,
            turns: Vec::new(),
            n: 1,
            stream: false,
            include_usage: false,
            timings_per_token: false,
            return_tokens: false,
            return_progress: false,
            ping_interval: app.config.ping_interval,
            response_fields: None,
        }
    }

    /// The request for `prompt`, as the `i`-th of its answers.
    pub fn request(&self, id: RequestId, prompt: Vec<Token>, i: usize) -> Request {
        let mut sampling = self.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(i as u64);
        Request {
            sampling,
            dry_breakers: self.breakers.clone(),
            // With nothing to answer the prompt is still computed, which takes one token; it is dropped.
            n_predict: self.n_predict.map(|n| n.max(1)),
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            n_draft_max: self.n_draft_max,
            slot: self.slot,
            cache_prompt: self.cache_prompt,
            turns: self.turns.clone(),
            ..Request::new(id, prompt)
        }
    }

    /// The settings as `generation_settings` reports them, with the seed that is really used.
    pub fn settings(&self, app: &App) -> Value {
        let mut settings = json!(self.sampling);
        let n_predict = self.n_predict.map_or(-1, |n| n as i64);
        let n_draft =
            self.n_draft_max.unwrap_or(app.runner.config.n_draft_max).min(app.runner.config.n_draft_max);
        if let Some(map) = settings.as_object_mut() {
            map.insert("n_predict".into(), n_predict.into());
            map.insert("max_tokens".into(), n_predict.into());
            map.insert("n_keep".into(), 0.into());
            map.insert("n_discard".into(), 0.into());
            map.insert("cache_prompt".into(), self.cache_prompt.into());
            map.insert("ignore_eos".into(), self.ignore_eos.into());
            map.insert("stop".into(), json!(self.stop));
            map.insert("stream".into(), self.stream.into());
            map.insert("timings_per_token".into(), self.timings_per_token.into());
            map.insert(
                "speculative.n_max".into(),
                if app.runner.drafter.is_some() { n_draft } else { 0 }.into(),
            );
            map.insert(
                "speculative.types".into(),
                app.runner.drafter.as_ref().map_or("none", |(name, _)| name).into(),
            );
        }
        settings
    }
}

fn sampling(fields: &Fields<'_>, app: &App) -> Result<SamplingParams, ApiError> {
    let mut params = app.model.sampling.clone();
    for (names, field) in FLOATS {
        if let Some(x) = fields.any(names, |f, name| f.number(name))? {
            *field(&mut params) = x as f32;
        }
    }
    for (name, field) in INTEGERS {
        if let Some(n) = fields.integer(name)? {
            // Beyond 32 bits nothing differs from the largest value.
            *field(&mut params) = n.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        }
    }
    if let Some(n) = fields.integer_from("min_keep", 0)? {
        params.min_keep = u32::try_from(n).unwrap_or(u32::MAX);
    }
    if let Some(n) = fields.integer_from("n_probs", 0)? {
        params.n_probs = u32::try_from(n).unwrap_or(u32::MAX);
    }
    params.post_sampling_probs = fields.bool("post_sampling_probs")?.unwrap_or(params.post_sampling_probs);
    if let Some(breakers) = fields.strings("dry_sequence_breakers")? {
        params.dry_sequence_breakers = breakers;
    }
    if let Some(value) = fields.get("samplers") {
        params.samplers = chain(value)?;
    }
    if let Some(value) = fields.get("logit_bias") {
        params.logit_bias = logit_bias(value, app)?;
    }
    params.seed = seed(fields)?.or(app.model.seed).unwrap_or_else(|| random_u64() & 0xffff_ffff);
    params.clamp();
    params
        .validate(app.model.tokenizer.vocab().len())
        .map_err(|e: ParamError| ApiError::invalid(e.to_string()))?;
    Ok(params)
}

/// Absent and -1 mean that any seed will do.
fn seed(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    match fields.get("seed") {
        None => Ok(None),
        Some(value) => match value.as_u64().or_else(|| integer(value).map(|n| n as u64)) {
            Some(u64::MAX) => Ok(None),
            Some(seed) => Ok(Some(seed)),
            None => Err(ApiError::field("seed", "an integer (-1 for a random seed)", show(value))),
        },
    }
}

/// Names in a list, or llama-server's letters in a string.
fn chain(value: &Value) -> Result<Vec<&'static SamplerKind>, ApiError> {
    let refuse = |error: ParamError| ApiError::invalid(error.to_string());
    match value {
        Value::String(letters) => samplers::by_letters(letters).map_err(refuse),
        Value::Array(names) => (names.iter())
            .map(|name| match name.as_str() {
                Some(name) => samplers::by_name(name).map_err(refuse),
                None => Err(ApiError::field("samplers", "a list of names", show(value))),
            })
            .collect(),
        other => Err(ApiError::field("samplers", "a list of names, or a string of letters", show(other))),
    }
}

/// Pairs `[token, bias]` or an object; a token is an id, an id in a string (OpenAI), or a text, all of whose tokens
/// are meant; `false` bans.
fn logit_bias(value: &Value, app: &App) -> Result<Vec<(Token, f32)>, ApiError> {
    let tokenizer = &app.model.tokenizer;
    let name = "logit_bias";
    let pairs: Vec<(Value, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, bias)| (json!(key), bias)).collect(),
        Value::Array(list) => (list.iter())
            .map(|pair| match pair.as_array().map(Vec::as_slice) {
                Some([token, bias]) => Ok((token.clone(), bias)),
                _ => Err(ApiError::field(name, "pairs of a token and a bias", show(pair))),
            })
            .collect::<Result<_, _>>()?,
        other => return Err(ApiError::field(name, "a list of pairs or an object", show(other))),
    };
    let mut out = Vec::with_capacity(pairs.len());
    for (token, bias) in pairs {
        let bias = match bias {
            Value::Bool(false) => f32::NEG_INFINITY,
            bias => match bias.as_f64() {
                Some(x) => x as f32,
                None => return Err(ApiError::field(name, "a number, or false to ban", show(bias))),
            },
        };
        let tokens = match token.as_str() {
            Some(text) => match text.parse::<u32>() {
                Ok(id) => vec![prompt::token(tokenizer, &json!(id), name)?],
                Err(_) => tokenizer.encode(text, Encode { add_bos: false, parse_special: true }),
            },
            None => vec![prompt::token(tokenizer, &token, name)?],
        };
        out.extend(tokens.into_iter().map(|token| (token, bias)));
    }
    Ok(out)
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let mut stop = fields.strings("stop")?.unwrap_or_default();
    stop.retain(|text| !text.is_empty());
    if stop.len() > N_STOP_MAX {
        return Err(ApiError::field("stop", &format!("at most {N_STOP_MAX} strings"), stop.len()));
    }
    Ok(stop)
}

/// The spellings in use: `speculative.n_max` as a dotted name or nested, `speculative: false`, and Ollama's.
fn n_draft_max(fields: &Fields<'_>) -> Result<Option<usize>, ApiError> {
    let dotted = fields.integer_from("speculative.n_max", -1)?;
    let nested = match fields.get("speculative") {
        Some(Value::Bool(false)) => Some(0),
        Some(Value::Bool(true)) | None => None,
        Some(_) => match fields.object("speculative", "speculative.")? {
            Some(speculative) => speculative.integer_from("n_max", -1)?,
            None => None,
        },
    };
    let ollama = match fields.object("options", "options.")? {
        Some(options) => options.integer_from("draft_num_predict", -1)?,
        None => None,
    };
    Ok(dotted.or(nested).or(ollama).and_then(|n| usize::try_from(n).ok()))
}
