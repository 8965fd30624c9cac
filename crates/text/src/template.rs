//! Chat templates: the model's own Jinja program that writes a conversation as the model saw it in training.
//!
//! Templates come from Python, so [`engine`] gives them what Hugging Face's renderer does: Python's string methods,
//! `tojson`, `raise_exception`, `strftime_now`, `{% break %}`, and blocks that eat the line they stand on. Clients send
//! messages in more forms than most templates take; what a template takes is found out once, by rendering small
//! conversations ([`Capabilities`]), and [`messages`] brings requests into that form.

mod date;
mod engine;
mod messages;
mod probe;
mod pyjson;

use paceline_gguf::Metadata;
use serde_json::{Map, Value};

use crate::{Error, Vocab};

/// ChatML, the form most models know, for files without a template.
const CHATML: &str = "\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}";

/// What a template can do, found out by rendering small conversations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// System messages appear. Where not, they are put in front of the first user message.
    pub system_role: bool,
    /// Tool definitions appear.
    pub tools: bool,
    /// Tool calls of earlier assistant messages appear.
    pub tool_calls: bool,
    /// Arguments of tool calls may be objects; else they are JSON text.
    pub object_arguments: bool,
    /// `enable_thinking` changes the prompt.
    pub enable_thinking: bool,
    /// Content may be a string. Where not, strings become a list of one text part.
    pub string_content: bool,
    /// Content may be a list of parts. Where not, text parts are joined by newlines.
    pub content_parts: bool,
}

/// What to render.
#[derive(Clone, Copy, Debug)]
pub struct RenderRequest<'a> {
    /// The conversation: an array of objects with `role` and `content`, as in OpenAI's chat requests.
    pub messages: &'a Value,
    /// Tool definitions: an array, or none.
    pub tools: Option<&'a Value>,
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// More variables for the template (`chat_template_kwargs`), such as `enable_thinking`. They cannot replace the
    /// messages.
    pub kwargs: &'a Map<String, Value>,
}

/// A compiled chat template. Rendering takes `&self`: one template serves all requests.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    engine: engine::Engine,
    capabilities: Capabilities,
    is_fallback: bool,
}

impl ChatTemplate {
    /// Compiles `source` and finds out what it can do. The texts of BOS and EOS are empty in models without them.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<ChatTemplate, Error> {
        let engine = engine::Engine::new(source, bos_token, eos_token)?;
        let capabilities = probe::probe(&engine);
        Ok(ChatTemplate { engine, capabilities, is_fallback: false })
    }

    /// ChatML, for models that bring no template.
    pub fn chatml() -> ChatTemplate {
        let template = ChatTemplate::new(CHATML, "", "").expect("ChatML compiles");
        ChatTemplate { is_fallback: true, ..template }
    }

    /// The template of a model file (`tokenizer.chat_template`), or ChatML.
    pub fn from_metadata(metadata: &Metadata, vocab: &Vocab) -> Result<ChatTemplate, Error> {
        let text = |token: Option<crate::Token>| {
            token.map(|token| String::from_utf8_lossy(vocab.text(token)).into_owned()).unwrap_or_default()
        };
        match metadata.str("tokenizer.chat_template")? {
            Some(source) => ChatTemplate::new(source, &text(vocab.bos()), &text(vocab.eos())),
            None => Ok(ChatTemplate::chatml()),
        }
    }

    /// The prompt. Tokenize it with special tokens parsed.
    pub fn render(&self, request: &RenderRequest) -> Result<String, Error> {
        let messages = messages::prepare(request.messages, &self.capabilities)?;
        self.engine.render(messages, request.tools, request.add_generation_prompt, request.kwargs)
    }

    /// What the template can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The model brought no template and this is ChatML: answers may be worse than the model can do.
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        self.engine.source()
    }
}
