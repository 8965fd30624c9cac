//! `POST /v1/chat/completions`: OpenAI's chat, with llama-server's additions.
//!
//! ```text
//! messages ── template ──▶ prompt ── tokens ──▶ engine ── text ──▶ thoughts | answer ──▶ message or deltas
//! ```
//!
//! Tool definitions are given to the template; what the model writes to call one stays content, since tool calls are
//! not parsed yet.

use std::{slice, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use paceline_engine::{Token, TokenOut};
use paceline_text::{
    Delta, Encode, ReasoningFormat, ReasoningParser, RenderRequest, reasoning::prompt_ends_in_think,
};
use serde_json::{Map, Value, json};

use crate::{
    answer::{Answer, End, Group, ProbsForm, add_figures, token_probs, usage},
    app::{App, Body, prepare},
    config::Reasoning,
    envelope::Envelope,
    error::ApiError,
    fields::{Fields, show},
    params::Params,
    runner::Progress,
    sse::{self, Chunks},
};

const N_TOP_MAX: i64 = 20;

/// A chat request, checked and rendered.
struct ChatAsk {
    params: Params,
    prompt: Vec<Token>,
    format: ReasoningFormat,
    /// The answer begins inside a thought that the prompt has opened.
    in_thought: bool,
    /// How many alternatives each token's log-probability comes with; none without `logprobs`.
    n_top: Option<usize>,
}

/// Answers a chat request.
pub(crate) async fn chat(State(app): State<Arc<App>>, body: Body) -> Result<Response, ApiError> {
    let ask = prepare(&app, body, parse).await?;
    let group = Group::submit(&app, slice::from_ref(&ask.prompt), &ask.params).await?;
    if ask.params.stream {
        let params = ask.params.clone();
        return sse::respond(group, ChatChunks::new(app, ask), &params).await;
    }
    let answers = group.collect(&ask.params).await?;
    Ok(Json(whole(&app, &ask, &answers)).into_response())
}

fn parse(app: &App, body: &Value) -> Result<ChatAsk, ApiError> {
    let fields = Fields::of_body(body)?;
    app.check_model(&fields)?;
    let mut params = Params::parse(&fields, app)?;
    let n_top = logprobs(&fields)?;
    if let Some(n_top) = n_top {
        params.sampling.n_probs = params.sampling.n_probs.max(n_top as u32).max(1);
    }
    refuse_formats(&fields)?;
    let format = match fields.string("reasoning_format")? {
        None => app.config.reasoning_format,
        Some(name) => {
            name.parse().map_err(|e: String| ApiError::invalid(format!("`reasoning_format`: {e}")))?
        }
    };
    let rendered = render(&fields, app)?;
    let options = Encode { add_bos: true, parse_special: true };
    let encode = |text: &str| app.model.tokenizer.encode(text, options);
    let in_thought = prompt_ends_in_think(&rendered.text);
    let prompt = encode(&rendered.text);
    if params.cache_prompt {
        // A token across a border belongs to neither side.
        let turn = |&n_byte: &usize| common(&encode(&rendered.text[..n_byte]), &prompt);
        params.turns = rendered.borders.iter().map(turn).collect();
    }
    Ok(ChatAsk { params, prompt, format, in_thought, n_top })
}

/// How many items both begin with.
fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn logprobs(fields: &Fields<'_>) -> Result<Option<usize>, ApiError> {
    let on = fields.bool("logprobs")?.unwrap_or(false);
    let n_top = fields.integer_from("top_logprobs", 0)?;
    match n_top {
        Some(n) if n > N_TOP_MAX => {
            Err(ApiError::field("top_logprobs", &format!("an integer from 0 to {N_TOP_MAX}"), n))
        }
        Some(n) if n > 0 && !on => {
            Err(ApiError::invalid(format!("`top_logprobs`: {n} needs `logprobs` to be true")))
        }
        n => Ok(on.then(|| n.unwrap_or(0) as usize)),
    }
}

/// Only free text can be promised so far.
pub(crate) fn refuse_formats(fields: &Fields<'_>) -> Result<(), ApiError> {
    if let Some(format) = fields.object("response_format", "response_format.")? {
        match format.string("type")? {
            None | Some("text") => {}
            Some(kind) => {
                return Err(ApiError::invalid(format!(
                    "`response_format.type`: `{kind}` is not supported yet by this server, only `text`"
                )));
            }
        }
    }
    Ok(())
}

/// The prompt of a chat.
pub(crate) struct Rendered {
    pub text: String,
    /// Bytes of it that other prompts of the conversation begin with, ascending: all before the last message of the user,
    /// which may be edited, and all before the opening of the answer, which later turns may render differently.
    borders: Vec<usize>,
}

/// The prompt of a chat, template applied.
pub(crate) fn render(fields: &Fields<'_>, app: &App) -> Result<Rendered, ApiError> {
    let mut messages = messages(fields)?;
    let tools = tools(fields)?;
    let mut kwargs = app.config.chat_template_kwargs.clone();
    match app.config.reasoning {
        Reasoning::Auto => {}
        Reasoning::On => drop(kwargs.insert("enable_thinking".into(), true.into())),
        Reasoning::Off => drop(kwargs.insert("enable_thinking".into(), false.into())),
    }
    if let Some(effort) = fields.string("reasoning_effort")? {
        kwargs.insert("reasoning_effort".into(), effort.into());
    }
    if let Some(more) = fields.object("chat_template_kwargs", "chat_template_kwargs.")? {
        kwargs.extend(more.map().clone());
    }
    let ends_in_answer =
        messages.last().is_some_and(|m| m["role"] == "assistant" && m.get("tool_calls").is_none());
    let add_generation_prompt = fields.bool("add_generation_prompt")?;
    let prefill = if ends_in_answer && add_generation_prompt != Some(true) { messages.pop() } else { None };
    if prefill.is_some() && !kwargs.contains_key("enable_thinking") {
        // The answer has begun, so the time for thoughts is over.
        kwargs.insert("enable_thinking".into(), false.into());
    }
    let render = |messages: &[Value], add_generation_prompt: bool| {
        let messages = &Value::Array(messages.to_vec());
        let request =
            RenderRequest { messages, tools: tools.as_ref(), add_generation_prompt, kwargs: &kwargs };
        app.model.chat_template.render(&request)
    };
    let opens_answer = add_generation_prompt.unwrap_or(true) || prefill.is_some();
    let mut text = render(&messages, opens_answer).map_err(|e| ApiError::invalid(e.to_string()))?;
    let last_user = messages.iter().rposition(|message| message["role"] == "user").unwrap_or(0);
    let stems = [&messages[..last_user], &messages[..]];
    // A template may refuse to render a part; then there is no border.
    let stems = stems.into_iter().filter(|stem| !stem.is_empty()).filter_map(|stem| render(stem, false).ok());
    let border = |stem: String| {
        let n_byte = common(stem.as_bytes(), text.as_bytes());
        (0..=n_byte).rev().find(|&n| text.is_char_boundary(n)).unwrap_or(0)
    };
    let borders = stems.map(border).collect();
    if let Some(prefill) = prefill {
        if prompt_ends_in_think(&text) {
            return Err(ApiError::invalid(
                "`messages`: the last one begins the assistant's answer, but the template opens a thought; send \
                 \"chat_template_kwargs\": {\"enable_thinking\": false} with it",
            ));
        }
        text.push_str(&content_text(&prefill));
    }
    Ok(Rendered { text, borders })
}

fn messages(fields: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let list = match fields.array("messages")? {
        Some(list) if !list.is_empty() => list,
        Some(_) => return Err(ApiError::field("messages", "at least one message", "an empty list")),
        None => return Err(ApiError::field("messages", "a list of messages", "nothing")),
    };
    let mut messages = list.clone();
    for (i, message) in messages.iter_mut().enumerate() {
        let Some(map) = message.as_object_mut() else {
            return Err(ApiError::field(&format!("messages[{i}]"), "an object", show(message)));
        };
        let role = map.get("role").cloned().unwrap_or_default();
        match role.as_str() {
            Some("developer") => drop(map.insert("role".into(), "system".into())),
            Some("system" | "user" | "assistant" | "tool" | "function") => {}
            _ => {
                let expected = "one of system, developer, user, assistant, tool";
                return Err(ApiError::field(&format!("messages[{i}].role"), expected, show(&role)));
            }
        }
        let parts = map.get("content").and_then(Value::as_array);
        for (j, part) in parts.into_iter().flatten().enumerate() {
            let kind = part["type"].as_str().unwrap_or_default();
            if ["image", "audio", "video", "file"].iter().any(|medium| kind.contains(medium)) {
                return Err(ApiError::invalid(format!(
                    "`messages[{i}].content[{j}]`: `{kind}`: this model has no vision or hearing, it takes text only"
                )));
            }
        }
    }
    Ok(messages)
}

/// The tools that the template shall show.
fn tools(fields: &Fields<'_>) -> Result<Option<Value>, ApiError> {
    let tools = fields.array("tools")?.filter(|tools| !tools.is_empty()).cloned().map(Value::Array);
    match fields.get("tool_choice") {
        None => Ok(tools),
        Some(Value::String(choice)) if choice == "auto" => Ok(tools),
        Some(Value::String(choice)) if choice == "none" => Ok(None),
        Some(choice) => Err(ApiError::invalid(format!(
            "`tool_choice`: expected \"auto\" or \"none\", found {}: forcing a tool call is not supported yet by this \
             server",
            show(choice)
        ))),
    }
}

fn content_text(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

/// The reply that is not streamed.
fn whole(app: &App, ask: &ChatAsk, answers: &[Answer]) -> Value {
    let choices = answers.iter().enumerate().map(|(index, answer)| {
        let mut parser = ReasoningParser::new(ask.format, ask.in_thought);
        let (mut content, mut reasoning) = (String::new(), String::new());
        for delta in parser.push(&answer.text).into_iter().chain(parser.finish()) {
            match delta {
                Delta::Content(text) => content.push_str(&text),
                Delta::Reasoning(text) => reasoning.push_str(&text),
            }
        }
        let mut message = json!({"role": "assistant", "content": content});
        if !reasoning.is_empty() {
            message["reasoning_content"] = reasoning.into();
        }
        let reason = answer.end.as_ref().map(End::finish_reason);
        let mut choice = json!({"finish_reason": reason, "index": index, "message": message});
        if let Some(logprobs) = content_logprobs(app, ask, &answer.tokens) {
            choice["logprobs"] = logprobs;
        }
        choice
    });
    let mut reply = Envelope::new(app, "chat.completion").wrap(choices.collect());
    reply["usage"] = usage(answers.iter().flat_map(|a| &a.end), ask.params.n);
    add_figures(&mut reply, answers.iter().flat_map(|a| &a.end));
    reply
}

/// `logprobs` of the tokens that are part of a message: not of the one that ends it.
fn content_logprobs(app: &App, ask: &ChatAsk, tokens: &[TokenOut]) -> Option<Value> {
    let n_top = ask.n_top?;
    let vocab = app.model.tokenizer.vocab();
    let shown = tokens.iter().filter(|token| !vocab.is_eog(token.id));
    let content: Vec<Value> =
        shown.filter_map(|token| token_probs(vocab, token, n_top, ProbsForm::Log)).collect();
    Some(json!({ "content": content }))
}

/// One choice of a stream.
struct Choice {
    parser: ReasoningParser,
    has_role: bool,
    /// Tokens whose text is not certain yet.
    held: Vec<TokenOut>,
    end: Option<End>,
}

struct ChatChunks {
    app: Arc<App>,
    ask: ChatAsk,
    envelope: Envelope,
    choices: Vec<Choice>,
}

impl ChatChunks {
    fn new(app: Arc<App>, ask: ChatAsk) -> ChatChunks {
        let choice = || Choice {
            parser: ReasoningParser::new(ask.format, ask.in_thought),
            has_role: false,
            held: Vec::new(),
            end: None,
        };
        ChatChunks {
            envelope: Envelope::new(&app, "chat.completion.chunk"),
            choices: (0..ask.params.n).map(|_| choice()).collect(),
            app,
            ask,
        }
    }

    fn chunk(&self, index: usize, delta: Value, finish_reason: Option<&str>) -> Value {
        self.envelope.wrap(vec![json!({"finish_reason": finish_reason, "index": index, "delta": delta})])
    }

    fn deltas(&mut self, index: usize, deltas: Vec<Delta>, is_last: bool) -> Vec<Value> {
        let mut chunks = Vec::new();
        let n = deltas.len();
        for (i, delta) in deltas.into_iter().enumerate() {
            let delta = match delta {
                Delta::Content(text) => json!({ "content": text }),
                Delta::Reasoning(text) => json!({ "reasoning_content": text }),
            };
            let mut chunk = self.chunk(index, delta, None);
            if i + 1 == n {
                self.attach_logprobs(index, &mut chunk);
            }
            chunks.push(chunk);
        }
        if is_last
            && n == 0
            && self.choices[index].held.iter().any(|t| !self.is_end(t))
            && self.ask.n_top.is_some()
        {
            // Tokens without text, such as part of a stop string: their probabilities are still owed.
            let mut chunk = self.chunk(index, json!({"content": ""}), None);
            self.attach_logprobs(index, &mut chunk);
            chunks.push(chunk);
        }
        chunks
    }

    fn is_end(&self, token: &TokenOut) -> bool {
        self.app.model.tokenizer.vocab().is_eog(token.id)
    }

    fn attach_logprobs(&mut self, index: usize, chunk: &mut Value) {
        let held = std::mem::take(&mut self.choices[index].held);
        if let Some(logprobs) = content_logprobs(&self.app, &self.ask, &held) {
            chunk["choices"][0]["logprobs"] = logprobs;
        }
    }
}

impl Chunks for ChatChunks {
    fn chunks(&mut self, index: usize, progress: Progress) -> Vec<Value> {
        let mut chunks = Vec::new();
        if matches!(progress, Progress::Tokens { .. } | Progress::Prefill { .. } | Progress::Done { .. })
            && !std::mem::replace(&mut self.choices[index].has_role, true)
        {
            chunks.push(self.chunk(index, json!({"role": "assistant", "content": null}), None));
        }
        match progress {
            Progress::Prefill { n_computed, n_prompt, n_cached, ms } if self.ask.params.return_progress => {
                let mut chunk = self.chunk(index, json!({}), None);
                chunk["prompt_progress"] =
                    json!({"total": n_prompt, "cache": n_cached, "processed": n_computed, "time_ms": ms});
                chunks.push(chunk);
            }
            Progress::Tokens { text, tokens, timings } => {
                self.choices[index].held.extend(tokens);
                let deltas = self.choices[index].parser.push(&text);
                chunks.extend(self.deltas(index, deltas, false));
                if self.ask.params.timings_per_token
                    && let Some(Value::Object(chunk)) = chunks.last_mut()
                {
                    chunk.insert("timings".into(), timings.to_json());
                }
            }
            Progress::Done { text, ending, stats, timings } => {
                let choice = &mut self.choices[index];
                let mut deltas = choice.parser.push(&text);
                deltas.extend(choice.parser.finish());
                let end = End { ending, stats, timings };
                let reason = end.finish_reason();
                choice.end = Some(end);
                chunks.extend(self.deltas(index, deltas, true));
                let mut chunk = self.chunk(index, Value::Object(Map::new()), Some(reason));
                let is_last = self.choices.iter().all(|choice| choice.end.is_some());
                if is_last && !self.ask.params.include_usage {
                    add_figures(&mut chunk, self.choices.iter().flat_map(|c| &c.end));
                }
                chunks.push(chunk);
            }
            _ => {}
        }
        chunks
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.ask.params.include_usage {
            return Vec::new();
        }
        let mut chunk = self.envelope.wrap(Vec::new());
        chunk["usage"] = usage(self.choices.iter().flat_map(|c| &c.end), self.ask.params.n);
        add_figures(&mut chunk, self.choices.iter().flat_map(|c| &c.end));
        vec![chunk]
    }

    fn says_done(&self) -> bool {
        true
    }
}
