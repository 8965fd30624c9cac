//! What the answers to one HTTP request come to: the requests behind it, their progress, and the parts of a reply
//! that several surfaces share.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use paceline_engine::{Finish, Stats, Token, TokenOut};
use paceline_text::Vocab;
use serde_json::{Map, Value, json};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use crate::{
    app::App,
    error::ApiError,
    params::Params,
    runner::{Ending, Progress, Submission},
    timings::{Timings, speculative},
};

/// The requests behind one HTTP request: prompts × answers per prompt, in that order. Dropping it, as happens when
/// the client hangs up, cancels them.
pub(crate) struct Group {
    receiver: mpsc::UnboundedReceiver<(usize, Progress)>,
    early: VecDeque<(usize, Progress)>,
    /// How many requests there are.
    pub n: usize,
}

impl Group {
    /// Sends the requests on their way and waits until all are taken.
    pub async fn submit(app: &App, prompts: &[Vec<Token>], params: &Params) -> Result<Group, ApiError> {
        let n = prompts.len() * params.n;
        let config = &app.runner.config;
        if n > config.n_slot + config.n_queue_max {
            return Err(ApiError::invalid(format!(
                "{n} answers are asked for at once; at most {} can run and wait",
                config.n_slot + config.n_queue_max
            )));
        }
        let (events, receiver) = mpsc::unbounded_channel();
        let settings = Arc::new(params.settings(app));
        for (index, prompt) in prompts.iter().flat_map(|p| std::iter::repeat_n(p, params.n)).enumerate() {
            let request = params.request(app.runner.request_id(), prompt.clone(), index % params.n);
            let (events, settings) = (events.clone(), settings.clone());
            app.runner.submit(Submission { request, index, events, settings })?;
        }
        drop(events);
        let mut group = Group { receiver, early: VecDeque::new(), n };
        let mut n_queued = 0;
        while n_queued < n {
            match group.receiver.recv().await {
                Some((_, Progress::Queued)) => n_queued += 1,
                Some((_, Progress::Refused(refusal))) => return Err(refusal.into()),
                Some(other) => group.early.push_back(other),
                None => return Err(gone()),
            }
        }
        Ok(group)
    }

    /// The next thing that happens; an error ends the group.
    pub async fn next(&mut self) -> Result<(usize, Progress), ApiError> {
        let next = match self.early.pop_front() {
            Some(early) => Some(early),
            None => self.receiver.recv().await,
        };
        match next {
            Some((_, Progress::Failed(failure))) => Err(failure.into()),
            Some((_, Progress::Refused(refusal))) => Err(refusal.into()),
            Some(next) => Ok(next),
            None => Err(gone()),
        }
    }

    /// Waits for the first token, so that what fails before it can still fail with a status of its own. Not for
    /// longer than `patience`: then the client shall see that something is going on.
    pub async fn first(&mut self, patience: Option<Duration>, progress_counts: bool) -> Result<(), ApiError> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let counts = |progress: &Progress| match progress {
            Progress::Started { .. } | Progress::Queued => false,
            Progress::Prefill { .. } => progress_counts,
            _ => true,
        };
        while !self.early.iter().any(|(_, progress)| counts(progress)) {
            let next = match deadline {
                None => self.receiver.recv().await,
                Some(deadline) => match timeout_at(deadline, self.receiver.recv()).await {
                    Ok(next) => next,
                    Err(_) => return Ok(()),
                },
            };
            self.early.push_back(next.ok_or_else(gone)?);
        }
        match self.early.iter().find_map(|(_, p)| if let Progress::Failed(f) = p { Some(f) } else { None }) {
            Some(failure) => Err(failure.clone().into()),
            None => Ok(()),
        }
    }

    /// All answers, complete.
    pub async fn collect(mut self, params: &Params) -> Result<Vec<Answer>, ApiError> {
        let mut answers: Vec<Answer> = (0..self.n).map(|_| Answer::default()).collect();
        let mut n_done = 0;
        while n_done < self.n {
            let (index, progress) = self.next().await?;
            let answer = &mut answers[index];
            match progress {
                Progress::Started { slot, .. } => answer.slot = slot,
                Progress::Tokens { text, tokens, .. } => {
                    answer.text.push_str(&text);
                    answer.tokens.extend(tokens);
                }
                Progress::Done { text, ending, stats, timings } => {
                    answer.text.push_str(&text);
                    answer.end = Some(End { ending, stats, timings });
                    n_done += 1;
                }
                _ => {}
            }
        }
        if params.n_predict == Some(0) {
            for answer in &mut answers {
                answer.text.clear();
                answer.tokens.clear();
                answer.end = answer.end.take().map(End::of_nothing);
            }
        }
        Ok(answers)
    }
}

fn gone() -> ApiError {
    ApiError::server("the engine's thread has ended")
}

/// One answer, so far.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub slot: usize,
    pub text: String,
    pub tokens: Vec<TokenOut>,
    pub end: Option<End>,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub ending: Ending,
    pub stats: Stats,
    pub timings: Timings,
}

impl End {
    /// For requests that wanted no token: the one that computing a prompt takes is not reported.
    pub fn of_nothing(mut self) -> End {
        self.ending = Ending::Finished(Finish::Limit);
        self.stats.n_predicted = 0;
        (self.timings.predicted_n, self.timings.predicted_ms) = (0, 0.0);
        self
    }

    /// OpenAI's `finish_reason`.
    pub fn finish_reason(&self) -> &'static str {
        match self.ending {
            Ending::Finished(Finish::Eog(_) | Finish::Stop(_)) => "stop",
            Ending::Finished(Finish::Limit | Finish::Context) | Ending::ShutDown => "length",
        }
    }
}

/// OpenAI's `usage` of all answers; the prompt of several answers counts once.
pub(crate) fn usage<'a>(ends: impl IntoIterator<Item = &'a End>, n_per_prompt: usize) -> Value {
    let (mut prompt, mut cached, mut completion) = (0, 0, 0);
    for (i, end) in ends.into_iter().enumerate() {
        if i % n_per_prompt == 0 {
            prompt += end.stats.n_prompt;
            cached += end.stats.n_cached;
        }
        completion += end.stats.n_predicted;
    }
    json!({
        "completion_tokens": completion,
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

/// Adds `timings` and `speculative` to the reply that comes last.
pub(crate) fn add_figures<'a>(reply: &mut Value, ends: impl IntoIterator<Item = &'a End>) {
    let mut ends = ends.into_iter();
    let Some(first) = ends.next() else { return };
    // Of several answers the drafter's state is the first one's, the figures are everybody's.
    let (mut timings, mut stats) = (first.timings, first.stats.clone());
    for end in ends {
        timings = timings.merge(end.timings);
        stats.n_predicted += end.stats.n_predicted;
        stats.n_verify += end.stats.n_verify;
        stats.n_draft += end.stats.n_draft;
        stats.n_accepted += end.stats.n_accepted;
        let n = stats.by_position.len().max(end.stats.by_position.len());
        stats.by_position.resize(n, (0, 0));
        for (sum, more) in stats.by_position.iter_mut().zip(&end.stats.by_position) {
            *sum = (sum.0 + more.0, sum.1 + more.1);
        }
    }
    if let Some(map) = reply.as_object_mut() {
        map.insert("timings".into(), timings.to_json());
        map.insert("speculative".into(), speculative(&stats));
    }
}

/// JSON has no infinity; what can't happen gets OpenAI's number for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// How the probabilities of a token are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProbsForm {
    /// `logprob`, `top_logprobs`.
    Log,
    /// `prob`, `top_probs`: llama-server's form of `post_sampling_probs`.
    Plain,
}

/// One entry of `completion_probabilities` or of a chat's `logprobs.content`; none without probabilities. Of the
/// likeliest tokens the first `n_top` are listed.
pub(crate) fn token_probs(vocab: &Vocab, token: &TokenOut, n_top: usize, form: ProbsForm) -> Option<Value> {
    let probs = token.logprobs.as_ref()?;
    let (value_name, list_name) = match form {
        ProbsForm::Log => ("logprob", "top_logprobs"),
        ProbsForm::Plain => ("prob", "top_probs"),
    };
    let entry = |id: Token, logprob: f32| {
        let bytes = vocab.bytes(id, true);
        let mut entry = Map::new();
        entry.insert("id".into(), id.into());
        entry.insert("token".into(), String::from_utf8_lossy(bytes).into());
        entry.insert("bytes".into(), json!(bytes));
        let value = if form == ProbsForm::Log { finite(logprob) } else { logprob.exp() };
        entry.insert(value_name.into(), value.into());
        entry
    };
    let mut object = entry(token.id, probs.logprob);
    let top = probs.top.iter().take(n_top).map(|&(id, logprob)| Value::Object(entry(id, logprob)));
    object.insert(list_name.into(), top.collect());
    Some(Value::Object(object))
}

/// The legacy `logprobs` of OpenAI completions. `offset` is where in the text, in characters, the tokens begin.
pub(crate) fn legacy_logprobs<'a>(
    vocab: &Vocab,
    tokens: impl IntoIterator<Item = &'a TokenOut>,
    n_top: usize,
    offset: &mut usize,
) -> Value {
    let text = |id: Token| String::from_utf8_lossy(vocab.bytes(id, true)).into_owned();
    let (mut texts, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
    for token in tokens {
        let Some(probs) = &token.logprobs else { continue };
        let spelled = text(token.id);
        offsets.push(*offset);
        *offset += spelled.chars().count();
        texts.push(spelled);
        logprobs.push(finite(probs.logprob));
        let top = probs.top.iter().take(n_top).map(|&(id, logprob)| (text(id), json!(finite(logprob))));
        tops.push(Value::Object(top.collect()));
    }
    json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}
