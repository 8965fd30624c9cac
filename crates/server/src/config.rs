//! What the command line tells the server, and what it needs to know of the model.

use std::{path::PathBuf, sync::Arc, time::Duration};

use paceline_sampling::SamplingParams;
use paceline_text::{ChatTemplate, ReasoningFormat, Tokenizer};
use serde_json::{Map, Value};

/// Whether the model shall think before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reasoning {
    /// As the chat template decides.
    #[default]
    Auto,
    /// The template is given `enable_thinking = true`.
    On,
    /// The template is given `enable_thinking = false`.
    Off,
}

/// Settings of the server itself.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Keys of which a request must show one; none means that anybody may ask.
    pub api_keys: Vec<String>,
    /// Serves `GET /slots`.
    pub slots: bool,
    /// Serves `GET /metrics`.
    pub metrics: bool,
    /// Largest request body in bytes.
    pub body_limit: usize,
    /// Silence after which a stream gets a comment line; none means never.
    pub ping_interval: Option<Duration>,
    /// How long running answers may take to finish after the server was asked to stop.
    pub shutdown_grace: Duration,
    /// Name and version of this build, reported as `system_fingerprint` and `build_info`.
    pub build_info: String,
    /// Whether models that can think do, unless a request says otherwise.
    pub reasoning: Reasoning,
    /// What becomes of thoughts, unless a request says otherwise.
    pub reasoning_format: ReasoningFormat,
    /// Variables for the chat template, unless a request says otherwise.
    pub chat_template_kwargs: Map<String, Value>,
    /// Most tokens of an answer, unless a request says otherwise; none means until the context is full.
    pub n_predict: Option<usize>,
    /// Whether prompts begin with what is cached, unless a request says otherwise.
    pub cache_prompt: bool,
    /// Folder for files of slots; none means that they can't be saved.
    pub slot_save_path: Option<PathBuf>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            api_keys: Vec::new(),
            slots: true,
            metrics: true,
            body_limit: 64 << 20,
            ping_interval: Some(Duration::from_secs(30)),
            shutdown_grace: Duration::from_secs(10),
            build_info: concat!("paceline-", env!("CARGO_PKG_VERSION")).to_string(),
            reasoning: Reasoning::Auto,
            reasoning_format: ReasoningFormat::Auto,
            chat_template_kwargs: Map::new(),
            n_predict: None,
            cache_prompt: true,
            slot_save_path: None,
        }
    }
}

/// The model as the outside sees it: words, templates and figures, no weights.
pub struct ServerModel {
    /// Name in answers and in `/v1/models`.
    pub id: String,
    /// Other names under which requests may ask for it.
    pub aliases: Vec<String>,
    /// Where the file is; its file name is a valid name too.
    pub path: String,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Renders chats.
    pub chat_template: ChatTemplate,
    /// Settings for requests that say nothing. Their seed is not used: such requests get a random one.
    pub sampling: SamplingParams,
    /// The seed of requests that say nothing, if it shall not be random.
    pub seed: Option<u64>,
    /// Context that the model was trained with.
    pub n_ctx_train: usize,
    /// Width of the hidden states.
    pub n_embd: usize,
    /// Weights.
    pub n_params: u64,
    /// Bytes of the weights.
    pub size: u64,
    /// The file's mix of formats, e.g. `Q4_K - Medium`.
    pub ftype: String,
    /// Kind of tokenizer, as the file names it.
    pub vocab_type: String,
}
