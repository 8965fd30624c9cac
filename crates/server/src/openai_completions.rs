//! `POST /v1/completions`: OpenAI's text completion. Several prompts and several answers per prompt become choices,
//! the answers of a prompt next to each other.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use paceline_engine::{Token, TokenOut};
use serde_json::{Value, json};

use crate::{
    answer::{Answer, End, Group, add_figures, legacy_logprobs, usage},
    app::{App, Body, prepare},
    envelope::Envelope,
    error::ApiError,
    fields::Fields,
    openai_chat::refuse_formats,
    params::Params,
    prompt,
    runner::Progress,
    sse::{self, Chunks},
};

struct CompletionAsk {
    params: Params,
    prompts: Vec<Vec<Token>>,
    n_top: Option<usize>,
}

/// Answers a completion request.
pub(crate) async fn completions(State(app): State<Arc<App>>, body: Body) -> Result<Response, ApiError> {
    let ask = prepare(&app, body, parse).await?;
    let group = Group::submit(&app, &ask.prompts, &ask.params).await?;
    if ask.params.stream {
        let params = ask.params.clone();
        return sse::respond(group, CompletionChunks::new(app, ask), &params).await;
    }
    let answers = group.collect(&ask.params).await?;
    Ok(Json(whole(&app, &ask, &answers)).into_response())
}

fn parse(app: &App, body: &Value) -> Result<CompletionAsk, ApiError> {
    let fields = Fields::of_body(body)?;
    app.check_model(&fields)?;
    refuse_formats(&fields)?;
    let mut params = Params::parse(&fields, app)?;
    let n_top = fields.integer_from("logprobs", 0)?.map(|n| n as usize);
    if let Some(n_top) = n_top {
        let n_top = u32::try_from(n_top).unwrap_or(u32::MAX);
        params.sampling.n_probs = params.sampling.n_probs.max(n_top).max(1);
    }
    let prompt = fields.get("prompt").unwrap_or(&Value::Null);
    let (prompts, _) = prompt::prompts(&app.model.tokenizer, prompt)?;
    Ok(CompletionAsk { params, prompts, n_top })
}

fn logprobs(app: &App, ask: &CompletionAsk, tokens: &[TokenOut], offset: &mut usize) -> Value {
    let vocab = app.model.tokenizer.vocab();
    match ask.n_top {
        None => Value::Null,
        Some(n_top) => legacy_logprobs(vocab, tokens.iter().filter(|t| !vocab.is_eog(t.id)), n_top, offset),
    }
}

fn whole(app: &App, ask: &CompletionAsk, answers: &[Answer]) -> Value {
    let choices = answers.iter().enumerate().map(|(index, answer)| {
        json!({
            "text": answer.text,
            "index": index,
            "logprobs": logprobs(app, ask, &answer.tokens, &mut 0),
            "finish_reason": answer.end.as_ref().map(End::finish_reason),
        })
    });
    let mut reply = Envelope::new(app, "text_completion").wrap(choices.collect());
    reply["usage"] = usage(answers.iter().flat_map(|a| &a.end), ask.params.n);
    add_figures(&mut reply, answers.iter().flat_map(|a| &a.end));
    reply
}

#[derive(Default)]
struct Choice {
    held: Vec<TokenOut>,
    /// Characters of the tokens reported so far.
    offset: usize,
    end: Option<End>,
}

struct CompletionChunks {
    app: Arc<App>,
    ask: CompletionAsk,
    envelope: Envelope,
    choices: Vec<Choice>,
}

impl CompletionChunks {
    fn new(app: Arc<App>, ask: CompletionAsk) -> CompletionChunks {
        let n = ask.prompts.len() * ask.params.n;
        CompletionChunks {
            envelope: Envelope::new(&app, "text_completion"),
            choices: (0..n).map(|_| Choice::default()).collect(),
            app,
            ask,
        }
    }

    fn chunk(&mut self, index: usize, text: &str, finish_reason: Option<&str>) -> Value {
        let choice = &mut self.choices[index];
        let held = std::mem::take(&mut choice.held);
        let logprobs = if held.is_empty() {
            Value::Null
        } else {
            logprobs(&self.app, &self.ask, &held, &mut choice.offset)
        };
        let choice =
            json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason});
        self.envelope.wrap(vec![choice])
    }
}

impl Chunks for CompletionChunks {
    fn chunks(&mut self, index: usize, progress: Progress) -> Vec<Value> {
        match progress {
            Progress::Tokens { text, tokens, timings } => {
                self.choices[index].held.extend(tokens);
                if text.is_empty() {
                    return Vec::new();
                }
                let mut chunk = self.chunk(index, &text, None);
                if self.ask.params.timings_per_token {
                    chunk["timings"] = timings.to_json();
                }
                vec![chunk]
            }
            Progress::Done { text, ending, stats, timings } => {
                let end = End { ending, stats, timings };
                let reason = end.finish_reason();
                self.choices[index].end = Some(end);
                let mut chunk = self.chunk(index, &text, Some(reason));
                let is_last = self.choices.iter().all(|choice| choice.end.is_some());
                if is_last && !self.ask.params.include_usage {
                    add_figures(&mut chunk, self.choices.iter().flat_map(|c| &c.end));
                }
                vec![chunk]
            }
            _ => Vec::new(),
        }
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
