//! The flags, defined once, in groups that subcommands share.
//!
//! Names, aliases and `LLAMA_ARG_*` variables are llama-server's, older generations and forks included, so that the
//! command lines people have go on working. Their names with one dash and several letters (`-md`, `-np`) are given
//! to clap as hidden long names; [`one_dash`] rewrites them before clap looks.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use paceline_backend::{KvType, KvTypes};
use paceline_engine::CacheConfig;
use paceline_sampling::{SamplingParams, samplers};
use paceline_spec::DrafterKind;
use paceline_text::{ChatTemplate, ReasoningFormat};
use serde_json::{Map, Value};

use crate::rope_flags::RopeFlags;

/// Which files.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct ModelFlags {
    /// Target: a GGUF file, of a split one the first part. Without one the bundled toy model is used
    #[arg(short, long, value_name = "FILE", env = "LLAMA_ARG_MODEL", hide_env = true)]
    pub model: Option<PathBuf>,
    /// Target from the Hugging Face hub, downloaded once (-hf). QUANT defaults to Q4_K_M
    #[arg(
        long = "hf-repo",
        aliases = ["hf", "hfr"],
        value_name = "OWNER/REPO[:QUANT]",
        env = "LLAMA_ARG_HF_REPO",
        hide_env = true,
        conflicts_with = "model"
    )]
    pub hf_repo: Option<String>,
    /// File of that repository, in place of QUANT (-hff)
    #[arg(
        long,
        alias = "hff",
        value_name = "FILE",
        env = "LLAMA_ARG_HF_FILE",
        hide_env = true,
        requires = "hf_repo"
    )]
    pub hf_file: Option<String>,
    /// Drafter: a GGUF file (-md)
    #[arg(
        long = "model-draft",
        aliases = ["md", "spec-draft-model", "mtp-head"],
        value_name = "FILE",
        env = "LLAMA_ARG_MODEL_DRAFT",
        hide_env = true
    )]
    pub model_draft: Option<PathBuf>,
    /// Drafter from the Hugging Face hub (-hfd)
    #[arg(
        long = "hf-repo-draft",
        aliases = ["hfd", "hfrd", "spec-draft-hf"],
        value_name = "OWNER/REPO[:QUANT]",
        env = "LLAMA_ARG_HFD_REPO",
        hide_env = true,
        conflicts_with = "model_draft"
    )]
    pub hf_repo_draft: Option<String>,
    /// Token for private and gated repositories (-hft)
    #[arg(long, alias = "hft", value_name = "TOKEN", env = "HF_TOKEN", hide_env_values = true)]
    pub hf_token: Option<String>,
    /// Who drafts, one or several: dflash, draft (a small model), draft-mtp (the target's own prediction head, or with
    /// -md Gemma 4's assistant), ngram-simple (copies from the text); none
    #[arg(long, value_name = "KINDS", env = "LLAMA_ARG_SPEC_TYPE", hide_env = true)]
    pub spec_type: Option<String>,
    /// Same as --spec-type dflash
    #[arg(long, hide = true)]
    pub dflash: bool,
    /// Same as --spec-type none: no drafter is loaded
    #[arg(long)]
    pub no_draft: bool,
    #[command(flatten)]
    pub rope: RopeFlags,
}

impl ModelFlags {
    /// The kinds of drafters that the user asks for; empty if there shall be none, and none if nothing was said. Kinds
    /// that do not exist are refused: going on without them would be slower than what was asked for, and nobody
    /// would know why.
    pub fn drafter_kinds(&self) -> Result<Option<Vec<&'static DrafterKind>>> {
        let dflash = self.dflash.then_some("dflash");
        let said = self.spec_type.as_deref().unwrap_or("").split(',').map(str::trim).chain(dflash);
        let mut kinds: Option<Vec<&'static DrafterKind>> = None;
        for name in said.filter(|name| !name.is_empty()) {
            let kinds = kinds.get_or_insert_default();
            if name != "none" {
                let kind = paceline_spec::kind(name).context("--spec-type")?;
                if !kinds.iter().any(|known| known.name == kind.name) {
                    kinds.push(kind);
                }
            }
        }
        Ok(if self.no_draft { Some(Vec::new()) } else { kinds })
    }
}

/// Sizes: context, slots, batches, cache types, threads.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sizes")]
pub struct SizeFlags {
    /// Context in tokens over all slots; 0 is what the model was trained for, for each slot
    #[arg(short, long, alias = "ctx", value_name = "N", env = "LLAMA_ARG_CTX_SIZE", hide_env = true)]
    pub ctx_size: Option<u32>,
    /// Requests served at once (-np); -1 picks a number
    #[arg(
        long,
        aliases = ["np", "n-parallel"],
        value_name = "N",
        env = "LLAMA_ARG_N_PARALLEL",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub parallel: Option<i32>,
    /// One pool of cells for all slots: each may use the whole context (-kvu)
    #[arg(long, alias = "kvu", env = "LLAMA_ARG_KV_UNIFIED", hide_env = true, value_parser = switch)]
    pub kv_unified: bool,
    /// The context is divided between the slots (default)
    #[arg(long, alias = "no-kvu", hide = true, overrides_with = "kv_unified")]
    pub no_kv_unified: bool,
    /// Most rows of a step, as other servers divide it: the smaller of this and -ub counts
    #[arg(short, long, value_name = "N", env = "LLAMA_ARG_BATCH", hide_env = true)]
    pub batch_size: Option<usize>,
    /// Most rows of a step (-ub); drafts are never cut to fit
    #[arg(long, alias = "ub", value_name = "N", env = "LLAMA_ARG_UBATCH", hide_env = true)]
    pub ubatch_size: Option<usize>,
    /// Storage type of keys (-ctk): f32, f16, bf16, q8_0, q5_0, q4_1, q4_0, iq4_nl; f16 if not given
    #[arg(
        long,
        alias = "ctk",
        value_name = "TYPE",
        env = "LLAMA_ARG_CACHE_TYPE_K",
        hide_env = true,
        value_parser = KvType::from_str
    )]
    pub cache_type_k: Option<KvType>,
    /// Storage type of values (-ctv), likewise
    #[arg(
        long,
        alias = "ctv",
        value_name = "TYPE",
        env = "LLAMA_ARG_CACHE_TYPE_V",
        hide_env = true,
        value_parser = KvType::from_str
    )]
    pub cache_type_v: Option<KvType>,
    /// The drafter's storage type of keys (-ctkd)
    #[arg(long = "spec-draft-type-k", aliases = ["ctkd", "cache-type-k-draft"], value_name = "TYPE", value_parser = KvType::from_str)]
    pub draft_type_k: Option<KvType>,
    /// The drafter's storage type of values (-ctvd)
    #[arg(long = "spec-draft-type-v", aliases = ["ctvd", "cache-type-v-draft"], value_name = "TYPE", value_parser = KvType::from_str)]
    pub draft_type_v: Option<KvType>,
    /// Threads that compute; 0 is one per core
    #[arg(
        short,
        long,
        value_name = "N",
        env = "LLAMA_ARG_THREADS",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub threads: Option<i32>,
    /// No empty run before the first request
    #[arg(long, env = "LLAMA_ARG_NO_WARMUP", hide_env = true, value_parser = switch)]
    pub no_warmup: bool,
    /// An empty run before the first request (default)
    #[arg(long, hide = true, overrides_with = "no_warmup")]
    pub warmup: bool,
    /// Most tokens drafted per step; the drafter's block sets the limit
    #[arg(
        long,
        aliases = ["draft-max", "draft", "draft-n", "draft-n-max", "mtp-draft-n"],
        value_name = "N",
        env = "LLAMA_ARG_DRAFT_MAX",
        hide_env = true
    )]
    pub spec_draft_n_max: Option<usize>,
    /// Drafts at full length always, whether that pays or not
    #[arg(long, alias = "draft-fixed")]
    pub spec_draft_fixed: bool,
    #[command(flatten)]
    pub cache: CacheFlags,
}

/// What is kept of prompts and answers for those that begin alike.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Prompt cache")]
pub struct CacheFlags {
    /// MiB that cached prompts may hold beyond what running requests use; 0 is none, -1 no limit [default: 8192]
    #[arg(
        long,
        alias = "cram",
        value_name = "N",
        env = "LLAMA_ARG_CACHE_RAM",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub cache_ram: Option<i64>,
    /// Requests reuse nothing unless they ask for it
    #[arg(long, env = "LLAMA_ARG_NO_CACHE_PROMPT", hide_env = true, value_parser = switch)]
    pub no_cache_prompt: bool,
    /// Requests reuse what is cached unless they ask not to (default)
    #[arg(long, hide = true, overrides_with = "no_cache_prompt")]
    pub cache_prompt: bool,
    /// A request that ends leaves its prompt in the cache and not its answer
    #[arg(long)]
    pub no_cache_idle_slots: bool,
    /// A request that ends leaves all that was computed (default)
    #[arg(long, hide = true, overrides_with = "no_cache_idle_slots")]
    pub cache_idle_slots: bool,
    /// Most snapshots in the course of one prompt, for models that can't go on from anywhere (-ctxcp) [default: 32]
    #[arg(long, aliases = ["ctxcp", "swa-checkpoints"], value_name = "N")]
    pub ctx_checkpoints: Option<usize>,
    /// Tokens from one of them to the next [default: 8192]
    #[arg(long, value_name = "N")]
    pub checkpoint_min_step: Option<usize>,
    /// Share of a prompt that a slot's last tokens must make up to be given it; what is reused is the same anyway (-sps)
    /// [default: 0.1]
    #[arg(long, alias = "sps", value_name = "X")]
    pub slot_prompt_similarity: Option<f32>,
}

impl CacheFlags {
    /// What the cache may do.
    pub fn config(&self) -> Result<CacheConfig> {
        let default = CacheConfig::default();
        let n_byte_max = match self.cache_ram {
            None => default.n_byte_max,
            Some(-1) => usize::MAX,
            Some(n) => {
                let bytes = usize::try_from(n).ok().and_then(|n| n.checked_mul(1 << 20));
                bytes.with_context(|| format!("--cache-ram: expected a number of MiB, 0 or -1, found {n}"))?
            }
        };
        Ok(CacheConfig {
            n_byte_max,
            n_step: self.checkpoint_min_step.unwrap_or(default.n_step),
            n_step_max: self.ctx_checkpoints.unwrap_or(default.n_step_max),
            keeps_finished: !self.no_cache_idle_slots,
        })
    }
}

impl SizeFlags {
    /// Storage of the target's cells and of the drafter's: f16, each, if nothing is said.
    pub fn kv_types(&self) -> (KvTypes, KvTypes) {
        let one = |k: Option<KvType>, v: Option<KvType>| KvTypes {
            k: k.unwrap_or(KvType::F16),
            v: v.unwrap_or(KvType::F16),
        };
        (one(self.cache_type_k, self.cache_type_v), one(self.draft_type_k, self.draft_type_v))
    }

    /// Threads to compute with, 0 for one per core.
    pub fn n_threads(&self) -> usize {
        self.threads.and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
    }

    /// Rows of a step.
    pub fn n_ubatch(&self) -> Result<usize> {
        let n = self.ubatch_size.unwrap_or(512).min(self.batch_size.unwrap_or(2048));
        ensure!(n > 0, "-b, -ub: expected at least 1, found 0");
        Ok(n)
    }
}

/// How long an answer may be.
#[derive(Args, Clone, Copy, Debug)]
pub struct LengthFlags {
    /// Most tokens of an answer (for a server: unless a request says otherwise); -1 is until the context is full
    #[arg(
        short = 'n',
        long = "n-predict",
        alias = "predict",
        value_name = "N",
        env = "LLAMA_ARG_N_PREDICT",
        hide_env = true,
        default_value_t = -1,
        allow_negative_numbers = true
    )]
    pub n_predict: i64,
}

/// How tokens are chosen.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// Temperature; 0 is greedy [default: 0.8]
    #[arg(
        long,
        alias = "temperature",
        value_name = "X",
        env = "LLAMA_ARG_TEMP",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub temp: Option<f32>,
    /// Keep the K likeliest; 0 is off [default: 40]
    #[arg(long, value_name = "K", env = "LLAMA_ARG_TOP_K", hide_env = true, allow_negative_numbers = true)]
    pub top_k: Option<i32>,
    /// Keep the shortest head with this mass; 1 is off [default: 0.95]
    #[arg(long, value_name = "P", env = "LLAMA_ARG_TOP_P", hide_env = true)]
    pub top_p: Option<f32>,
    /// Keep tokens with this share of the likeliest one's probability; 0 is off [default: 0.05]
    #[arg(long, value_name = "P", env = "LLAMA_ARG_MIN_P", hide_env = true)]
    pub min_p: Option<f32>,
    /// Locally typical sampling; 1 is off [default: 1]
    #[arg(long = "typical", alias = "typical-p", value_name = "P")]
    pub typical_p: Option<f32>,
    /// Keep logits within this many standard deviations of the largest; -1 is off [default: -1]
    #[arg(long = "top-nsigma", alias = "top-n-sigma", value_name = "N", allow_negative_numbers = true)]
    pub top_n_sigma: Option<f32>,
    /// Chance per token that XTC removes the top choices; 0 is off [default: 0]
    #[arg(long, value_name = "P")]
    pub xtc_probability: Option<f32>,
    /// Probability above which XTC counts a token as a top choice [default: 0.1]
    #[arg(long, value_name = "P")]
    pub xtc_threshold: Option<f32>,
    /// Half-width of the dynamic temperature; 0 is off [default: 0]
    #[arg(long, value_name = "X")]
    pub dynatemp_range: Option<f32>,
    /// Exponent of the dynamic temperature [default: 1]
    #[arg(long = "dynatemp-exp", value_name = "X")]
    pub dynatemp_exponent: Option<f32>,
    /// Tokens that the penalties look at; 0 is none, -1 all [default: 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub repeat_last_n: Option<i32>,
    /// Penalty on seen tokens; 1 is off [default: 1]
    #[arg(long, value_name = "X")]
    pub repeat_penalty: Option<f32>,
    /// Subtracted once for a seen token; 0 is off [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtracted per occurrence of a token; 0 is off [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Scale of the DRY penalty; 0 is off [default: 0]
    #[arg(long, value_name = "X")]
    pub dry_multiplier: Option<f32>,
    /// Base of the DRY penalty [default: 1.75]
    #[arg(long, value_name = "X")]
    pub dry_base: Option<f32>,
    /// Repetitions that DRY leaves alone [default: 2]
    #[arg(long, value_name = "N")]
    pub dry_allowed_length: Option<i32>,
    /// Tokens that DRY searches; 0 is off, -1 all [default: 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub dry_penalty_last_n: Option<i32>,
    /// Text across which DRY sees no repetition; may be given several times, `none` for no such text
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub dry_sequence_breaker: Vec<String>,
    /// The chain by name, in order, separated by `;`
    #[arg(long, value_name = "NAMES")]
    pub samplers: Option<String>,
    /// The chain by letters, such as edskypmxt
    #[arg(long = "sampling-seq", alias = "sampler-seq", value_name = "LETTERS", conflicts_with = "samplers")]
    pub sampling_seq: Option<String>,
    /// Seed of the noise; -1 is random
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<i64>,
}

impl SamplingFlags {
    /// llama-server's defaults with what was given in their place. The seed is 0 unless given.
    pub fn params(&self) -> Result<SamplingParams> {
        let mut params = SamplingParams::default();
        let floats = [
            (self.temp, &mut params.temperature),
            (self.top_p, &mut params.top_p),
            (self.min_p, &mut params.min_p),
            (self.typical_p, &mut params.typical_p),
            (self.top_n_sigma, &mut params.top_n_sigma),
            (self.xtc_probability, &mut params.xtc_probability),
            (self.xtc_threshold, &mut params.xtc_threshold),
            (self.dynatemp_range, &mut params.dynatemp_range),
            (self.dynatemp_exponent, &mut params.dynatemp_exponent),
            (self.repeat_penalty, &mut params.repeat_penalty),
            (self.presence_penalty, &mut params.presence_penalty),
            (self.frequency_penalty, &mut params.frequency_penalty),
            (self.dry_multiplier, &mut params.dry_multiplier),
            (self.dry_base, &mut params.dry_base),
        ];
        for (given, field) in floats {
            *field = given.unwrap_or(*field);
        }
        let integers = [
            (self.top_k, &mut params.top_k),
            (self.repeat_last_n, &mut params.repeat_last_n),
            (self.dry_allowed_length, &mut params.dry_allowed_length),
            (self.dry_penalty_last_n, &mut params.dry_penalty_last_n),
        ];
        for (given, field) in integers {
            *field = given.unwrap_or(*field);
        }
        if !self.dry_sequence_breaker.is_empty() {
            params.dry_sequence_breakers = self.dry_sequence_breaker.clone();
            params.dry_sequence_breakers.retain(|text| text != "none");
        }
        if let Some(names) = &self.samplers {
            let names = names.split([';', ',']).map(str::trim).filter(|name| !name.is_empty());
            params.samplers = names.map(samplers::by_name).collect::<Result<_, _>>().context("--samplers")?;
        }
        if let Some(letters) = &self.sampling_seq {
            params.samplers = samplers::by_letters(letters).context("--sampling-seq")?;
        }
        params.seed = self.fixed_seed().unwrap_or(0);
        params.clamp();
        Ok(params)
    }

    /// The seed, if one was given that is not "random".
    pub fn fixed_seed(&self) -> Option<u64> {
        self.seed.filter(|&seed| seed != -1).map(|seed| seed as u64)
    }
}

/// Whether the model shall think.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Thinking {
    /// The template is told to.
    On,
    /// The template is told not to.
    Off,
    /// As the template decides.
    #[default]
    Auto,
}

/// From a conversation to a prompt.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Chat template")]
pub struct TemplateFlags {
    /// Jinja source of the chat template, or `chatml`; the model's own by default
    #[arg(long, value_name = "JINJA", env = "LLAMA_ARG_CHAT_TEMPLATE", hide_env = true)]
    pub chat_template: Option<String>,
    /// File with the chat template
    #[arg(
        long,
        value_name = "FILE",
        env = "LLAMA_ARG_CHAT_TEMPLATE_FILE",
        hide_env = true,
        conflicts_with = "chat_template"
    )]
    pub chat_template_file: Option<PathBuf>,
    /// Variables for the template, a JSON object
    #[arg(long, value_name = "JSON", env = "LLAMA_CHAT_TEMPLATE_KWARGS", hide_env = true)]
    pub chat_template_kwargs: Option<String>,
    /// Whether the model shall think (-rea)
    #[arg(long, alias = "rea", value_name = "WHEN", env = "LLAMA_ARG_REASONING", hide_env = true)]
    pub reasoning: Option<Thinking>,
    /// 0 is the same as --reasoning off, -1 leaves it open
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_THINK_BUDGET",
        hide_env = true,
        hide = true,
        allow_negative_numbers = true
    )]
    pub reasoning_budget: Option<i32>,
    /// What becomes of thoughts: auto, deepseek, deepseek-legacy, none
    #[arg(long, value_name = "FORMAT", env = "LLAMA_ARG_THINK", hide_env = true)]
    pub reasoning_format: Option<ReasoningFormat>,
}

impl TemplateFlags {
    /// The variables.
    pub fn kwargs(&self) -> Result<Map<String, Value>> {
        let Some(text) = &self.chat_template_kwargs else { return Ok(Map::new()) };
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => bail!("--chat-template-kwargs: expected a JSON object, found `{text}`"),
            Err(error) => bail!("--chat-template-kwargs: expected a JSON object, found `{text}`: {error}"),
        }
    }

    /// Whether the model shall think.
    pub fn thinking(&self) -> Result<Thinking> {
        match (self.reasoning, self.reasoning_budget) {
            (Some(thinking), _) => Ok(thinking),
            (None, None | Some(-1)) => Ok(Thinking::Auto),
            (None, Some(0)) => Ok(Thinking::Off),
            (None, Some(n)) => {
                bail!(
                    "--reasoning-budget {n}: a limit on thinking is not built yet\nhint: 0 turns it off, -1 is no limit"
                )
            }
        }
    }

    /// The template in place of the model's, if one was given.
    pub fn template(&self, bos: &str, eos: &str) -> Result<Option<ChatTemplate>> {
        let (source, flag) = match (&self.chat_template, &self.chat_template_file) {
            (Some(name), _) if name == "chatml" => return Ok(Some(ChatTemplate::chatml())),
            (Some(source), _) => {
                ensure!(
                    source.contains("{{") || source.contains("{%"),
                    "--chat-template: expected Jinja source or `chatml`, found `{source}`\n\
                     hint: the model's own template is used without this flag; a file is given with --chat-template-file"
                );
                (source.clone(), "--chat-template")
            }
            (None, Some(path)) => (
                std::fs::read_to_string(path).with_context(|| format!("{}: can't read", path.display()))?,
                "--chat-template-file",
            ),
            (None, None) => return Ok(None),
        };
        Ok(Some(ChatTemplate::new(&source, bos, eos).context(flag)?))
    }
}

/// A switch as environment variables say it.
pub fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "on" | "enabled" => Ok(true),
        "false" | "0" | "off" | "disabled" => Ok(false),
        _ => Err("expected true, 1, on, enabled, false, 0, off or disabled".to_string()),
    }
}

/// Names of flags that take free text, which may begin with a dash.
const FREE_TEXT: &[&str] =
    &["-p", "--prompt", "-sys", "--system-prompt", "--chat-template", "--dry-sequence-breaker"];

/// Gives `-md` and other names of one dash and several letters the second dash that clap wants.
pub fn one_dash(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::new();
    let mut verbatim = false;
    for arg in args {
        let is_value = out
            .last()
            .is_some_and(|last| FREE_TEXT.iter().any(|name| last == name || *last == *format!("-{name}")));
        verbatim |= arg == "--";
        let rewritten = match arg.to_str() {
            Some(text) if !verbatim && !is_value && is_long_name(text) => format!("-{text}").into(),
            _ => arg,
        };
        out.push(rewritten);
    }
    out
}

/// `-md`, `-hf=x`; not `-m`, `-1`, `-vv`.
fn is_long_name(arg: &str) -> bool {
    let Some(rest) = arg.strip_prefix('-') else { return false };
    let name = rest.split_once('=').map_or(rest, |(name, _)| name);
    let plain = name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    name.len() > 1 && plain && !name.starts_with('-') && !name.bytes().all(|b| b == b'v')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &str, expected: &str) {
        let got = one_dash(args.split(' ').map(OsString::from));
        let got: Vec<_> = got.iter().map(|arg| arg.to_string_lossy()).collect();
        assert_eq!(got.join(" "), expected);
    }

    #[test]
    fn names_of_one_dash() {
        check("serve -m a -md b -np 2", "serve -m a --md b --np 2");
        check("run -p -np -c 5 -vv", "run -p -np -c 5 -vv");
        check("run -hf=a/b --temp -1 --top-k -2", "run --hf=a/b --temp -1 --top-k -2");
        check("run -- -md", "run -- -md");
        check("run -sys -md -ngll 3", "run --sys -md --ngll 3");
    }

    #[test]
    fn kinds_of_speculation() {
        let check = |kinds: &str, expected: Result<&[&str], &str>| {
            let flags = ModelFlags { spec_type: Some(kinds.to_string()), ..ModelFlags::default() };
            let got = flags.drafter_kinds().map_err(|e| format!("{e:#}"));
            let got = got.map(|kinds| kinds.unwrap_or_default().iter().map(|k| k.name).collect::<Vec<_>>());
            match expected {
                Ok(names) => assert_eq!(got.as_deref(), Ok(names), "{kinds}"),
                Err(part) => assert!(got.as_ref().is_err_and(|e| e.contains(part)), "{kinds}: {got:?}"),
            }
        };
        check("dflash", Ok(&["dflash"]));
        check("draft-dflash", Ok(&["dflash"]));
        check("dflash2", Ok(&["dflash"]));
        check("none", Ok(&[]));
        check("none,dflash", Ok(&["dflash"]));
        check("dflash, draft-mtp,ngram,mtp", Ok(&["dflash", "draft-mtp", "ngram-simple"]));
        check("draft-simple", Ok(&["draft"]));
        for name in ["ngram-map-k", "ngram-mod", "ngram-cache", "eagle3", "dspark", "suffix"] {
            check(name, Err(&format!("--spec-type: `{name}` is not supported: ")));
        }
        assert!(ModelFlags::default().drafter_kinds().unwrap().is_none());
        let none = ModelFlags { no_draft: true, dflash: true, ..ModelFlags::default() };
        assert_eq!(none.drafter_kinds().unwrap().map(|kinds| kinds.len()), Some(0));
        check(
            "dflsh",
            Err("expected dflash, draft-mtp, gemma4-assistant, draft, ngram-simple or none, found `dflsh`"),
        );
    }
}
