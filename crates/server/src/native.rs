//! `POST /completion` and `/completions`: llama-server's own completion. The stream ends with the object that has
//! `"stop": true`; there is no `[DONE]`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use paceline_engine::{Finish, Token, TokenOut};
use serde_json::{Map, Value, json};

use crate::{
    answer::{Answer, End, Group, ProbsForm, add_figures, token_probs},
    app::{App, Body, prepare},
    error::ApiError,
    fields::Fields,
    openai_chat::refuse_formats,
    params::Params,
    prompt,
    runner::{Ending, Progress},
    sse::{self, Chunks},
    timings::Timings,
};

struct NativeAsk {
    params: Params,
    prompts: Vec<Vec<Token>>,
    /// The prompts came as a list, so the answers go as one.
    many: bool,
}

/// Answers a native completion request.
pub(crate) async fn completion(State(app): State<Arc<App>>, body: Body) -> Result<Response, ApiError> {
    let ask = prepare(&app, body, parse).await?;
    let group = Group::submit(&app, &ask.prompts, &ask.params).await?;
    if ask.params.stream {
        let params = ask.params.clone();
        return sse::respond(group, NativeChunks::new(app, ask), &params).await;
    }
    let answers = group.collect(&ask.params).await?;
    let mut replies = answers.iter().enumerate().map(|(index, answer)| whole(&app, &ask, index, answer));
    let reply = match (replies.len(), ask.many) {
        (1, false) => replies.next().unwrap_or_default(),
        _ => replies.collect(),
    };
    Ok(Json(reply).into_response())
}

fn parse(app: &App, body: &Value) -> Result<NativeAsk, ApiError> {
    let fields = Fields::of_body(body)?;
    app.check_model(&fields)?;
    refuse_formats(&fields)?;
    let mut params = Params::parse(&fields, app)?;
    if let Some(n) = fields.get("logprobs").and_then(Value::as_u64)
        && fields.get("n_probs").is_none()
    {
        params.sampling.n_probs = u32::try_from(n).unwrap_or(u32::MAX);
    }
    let prompt = fields.get("prompt").unwrap_or(&Value::Null);
    let (prompts, many) = prompt::prompts(&app.model.tokenizer, prompt)?;
    Ok(NativeAsk { params, prompts, many })
}

fn probabilities(app: &App, ask: &NativeAsk, tokens: &[TokenOut]) -> Option<Value> {
    let sampling = &ask.params.sampling;
    if sampling.n_probs == 0 {
        return None;
    }
    let form = if sampling.post_sampling_probs { ProbsForm::Plain } else { ProbsForm::Log };
    let vocab = app.model.tokenizer.vocab();
    Some(tokens.iter().filter_map(|t| token_probs(vocab, t, sampling.n_probs as usize, form)).collect())
}

fn ids(ask: &NativeAsk, tokens: &[TokenOut]) -> Vec<Token> {
    if ask.params.return_tokens { tokens.iter().map(|token| token.id).collect() } else { Vec::new() }
}

fn whole(app: &App, ask: &NativeAsk, index: usize, answer: &Answer) -> Value {
    let Some(end) = &answer.end else { return Value::Null };
    let mut reply = last_object(app, ask, index, answer.slot, answer.text.contains('\n'), end);
    reply["content"] = answer.text.as_str().into();
    reply["tokens"] = json!(ids(ask, &answer.tokens));
    if let Some(probabilities) = probabilities(app, ask, &answer.tokens) {
        reply["completion_probabilities"] = probabilities;
    }
    select(reply, ask.params.response_fields.as_deref())
}

/// The object that ends an answer, with nothing of its text.
fn last_object(
    app: &App,
    ask: &NativeAsk,
    index: usize,
    slot: usize,
    has_new_line: bool,
    end: &End,
) -> Value {
    let (stop_type, word) = match &end.ending {
        Ending::Finished(Finish::Eog(_)) => ("eos", ""),
        Ending::Finished(Finish::Stop(word)) => ("word", word.as_str()),
        Ending::Finished(Finish::Limit | Finish::Context) => ("limit", ""),
        Ending::ShutDown => ("none", ""),
    };
    let mut params = ask.params.clone();
    params.sampling.seed = params.sampling.seed.wrapping_add((index % params.n) as u64);
    let mut reply = json!({
        "index": index,
        "content": "",
        "tokens": [],
        "id_slot": slot,
        "stop": true,
        "model": app.model.id,
        "tokens_predicted": end.stats.n_predicted,
        "tokens_evaluated": end.stats.n_prompt,
        "generation_settings": params.settings(app),
        "prompt": app.model.tokenizer.decode(&ask.prompts[index / params.n]),
        "has_new_line": has_new_line,
        "truncated": end.ending == Ending::Finished(Finish::Context),
        "stop_type": stop_type,
        "stopping_word": word,
        // The last token has not been computed: nothing came after it.
        "tokens_cached": end.stats.n_prompt + end.stats.n_predicted.saturating_sub(1),
    });
    add_figures(&mut reply, [end]);
    reply
}

/// Only the fields at these paths, each under its path; missing ones are left out.
fn select(reply: Value, paths: Option<&[String]>) -> Value {
    let Some(paths) = paths.filter(|paths| !paths.is_empty()) else { return reply };
    let mut selected = Map::new();
    for path in paths {
        if let Some(value) = reply.pointer(&format!("/{path}")) {
            selected.insert(path.clone(), value.clone());
        }
    }
    Value::Object(selected)
}

#[derive(Default)]
struct Choice {
    slot: usize,
    n_predicted: usize,
    held: Vec<TokenOut>,
    has_new_line: bool,
}

struct NativeChunks {
    app: Arc<App>,
    ask: NativeAsk,
    choices: Vec<Choice>,
}

impl NativeChunks {
    fn new(app: Arc<App>, ask: NativeAsk) -> NativeChunks {
        let n = ask.prompts.len() * ask.params.n;
        NativeChunks { app, choices: (0..n).map(|_| Choice::default()).collect(), ask }
    }

    fn partial(&mut self, index: usize, text: &str, timings: Option<Timings>) -> Value {
        let n_prompt = self.ask.prompts[index / self.ask.params.n].len();
        let choice = &mut self.choices[index];
        choice.has_new_line |= text.contains('\n');
        let held = std::mem::take(&mut choice.held);
        let mut chunk = json!({
            "index": index,
            "content": text,
            "tokens": ids(&self.ask, &held),
            "stop": false,
            "id_slot": choice.slot,
            "tokens_predicted": choice.n_predicted,
            "tokens_evaluated": n_prompt,
        });
        if let Some(probabilities) = probabilities(&self.app, &self.ask, &held) {
            chunk["completion_probabilities"] = probabilities;
        }
        if let Some(timings) = timings {
            chunk["timings"] = timings.to_json();
        }
        chunk
    }
}

impl Chunks for NativeChunks {
    fn chunks(&mut self, index: usize, progress: Progress) -> Vec<Value> {
        match progress {
            Progress::Started { slot, .. } => {
                self.choices[index].slot = slot;
                Vec::new()
            }
            Progress::Prefill { n_computed, n_prompt, n_cached, ms } if self.ask.params.return_progress => {
                let mut chunk = self.partial(index, "", None);
                chunk["prompt_progress"] =
                    json!({"total": n_prompt, "cache": n_cached, "processed": n_computed, "time_ms": ms});
                vec![chunk]
            }
            Progress::Tokens { text, tokens, timings } => {
                let choice = &mut self.choices[index];
                choice.n_predicted += tokens.len();
                choice.held.extend(tokens);
                if text.is_empty() {
                    return Vec::new();
                }
                vec![self.partial(index, &text, self.ask.params.timings_per_token.then_some(timings))]
            }
            Progress::Done { text, ending, stats, timings } => {
                let mut chunks = Vec::new();
                // Text and tokens that were held back come before the end.
                if !text.is_empty() || !self.choices[index].held.is_empty() {
                    chunks.push(self.partial(index, &text, None));
                }
                let end = End { ending, stats, timings };
                let choice = &self.choices[index];
                let reply = last_object(&self.app, &self.ask, index, choice.slot, choice.has_new_line, &end);
                chunks.push(select(reply, self.ask.params.response_fields.as_deref()));
                chunks
            }
            _ => Vec::new(),
        }
    }

    fn last(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn says_done(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selected_fields_keep_their_path_as_name() {
        let reply = json!({"content": "x", "timings": {"cache_n": 1}, "prompt": "p"});
        let paths = ["content", "timings/cache_n", "nothing/here"].map(str::to_owned);
        assert_eq!(select(reply.clone(), Some(&paths)), json!({"content": "x", "timings/cache_n": 1}));
        assert_eq!(select(reply.clone(), None), reply);
    }
}
