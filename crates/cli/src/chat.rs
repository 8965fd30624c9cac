//! From a conversation to the tokens of a prompt.

use anyhow::{Result, ensure};
use paceline_engine::Token;
use paceline_text::{ChatTemplate, Encode, RenderRequest, Tokenizer, reasoning::prompt_ends_in_think};
use serde_json::{Map, Value, json};

use crate::flags::{TemplateFlags, Thinking};

/// What renders conversations.
pub struct Chat<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    kwargs: Map<String, Value>,
}

/// A rendered prompt.
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// The answer begins inside a thought.
    pub thinks: bool,
}

impl<'a> Chat<'a> {
    /// With the template variables that the flags give.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        flags: &TemplateFlags,
    ) -> Result<Chat<'a>> {
        let mut kwargs = flags.kwargs()?;
        match flags.thinking()? {
            Thinking::Auto => {}
            thinking => drop(kwargs.insert("enable_thinking".into(), (thinking == Thinking::On).into())),
        }
        Ok(Chat { tokenizer, template, kwargs })
    }

    /// The prompt of a conversation.
    pub fn prompt(&self, messages: &Value) -> Result<Prompt> {
        let text = self.template.render(&RenderRequest {
            messages,
            tools: None,
            add_generation_prompt: true,
            kwargs: &self.kwargs,
        })?;
        self.raw(&text)
    }

    /// The prompt of one question.
    pub fn question(&self, system: Option<&str>, question: &str) -> Result<Prompt> {
        let mut messages = Vec::new();
        messages.extend(system.map(|text| json!({ "role": "system", "content": text })));
        messages.push(json!({ "role": "user", "content": question }));
        self.prompt(&Value::Array(messages))
    }

    /// Text as it is.
    pub fn raw(&self, text: &str) -> Result<Prompt> {
        let tokens = self.tokenizer.encode(text, Encode { add_bos: true, parse_special: true });
        ensure!(!tokens.is_empty(), "the prompt is empty: at least one token is needed");
        Ok(Prompt { tokens, thinks: prompt_ends_in_think(text) })
    }
}
