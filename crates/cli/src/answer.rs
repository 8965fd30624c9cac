//! One request from prompt to last token, with a clock beside the engine.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use paceline_engine::{Engine, Event, Finish, Request, RequestId, SpeculationNote, Stats, TokenOut};
use serde_json::{Value, json};

/// A finished answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its tokens.
    pub tokens: Vec<TokenOut>,
    /// Its text.
    pub text: String,
    /// Why it ended; none if it was stopped from outside.
    pub finish: Option<Finish>,
    /// What the engine counted.
    pub stats: Stats,
    /// From the start to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
}

impl Answer {
    /// Prompt tokens per second; the forward that computes the last of them also gives the first token.
    pub fn prompt_per_second(&self) -> f64 {
        rate(self.stats.n_prompt, self.prompt_time)
    }

    /// Tokens after the first one per second.
    pub fn decode_per_second(&self) -> f64 {
        rate(self.stats.n_predicted.saturating_sub(1), self.decode_time)
    }

    /// The figures under llama-server's names, and the state of speculation.
    pub fn to_json(&self) -> Value {
        let mut timings = json!({
            "prompt_n": self.stats.n_prompt,
            "prompt_ms": self.prompt_time.as_secs_f64() * 1e3,
            "prompt_per_second": self.prompt_per_second(),
            "predicted_n": self.stats.n_predicted,
            "predicted_ms": self.decode_time.as_secs_f64() * 1e3,
            "predicted_per_second": self.decode_per_second(),
        });
        if self.stats.n_draft > 0 {
            timings["draft_n"] = self.stats.n_draft.into();
            timings["draft_n_accepted"] = self.stats.n_accepted.into();
        }
        json!({
            "text": self.text,
            "finish_reason": finish_name(self.finish.as_ref()),
            "tokens": self.tokens.iter().map(|t| t.id).collect::<Vec<_>>(),
            "timings": timings,
            "speculation": {
                "state": state_name(&self.stats.speculation),
                "drafter": self.stats.drafter,
                "note": state_words(&self.stats),
                "n_verify": self.stats.n_verify,
                "accept_len": self.stats.accept_len(),
                "by_position": by_position(&self.stats),
            },
        })
    }

    /// Two lines for people.
    pub fn summary(&self) -> String {
        let stats = &self.stats;
        let speed = format!(
            "prompt {} tokens, {:.0} tok/s · answer {} tokens, {:.1} tok/s",
            stats.n_prompt,
            self.prompt_per_second(),
            stats.n_predicted,
            self.decode_per_second(),
        );
        let state = state_words(stats);
        if stats.n_draft == 0 {
            return format!("{speed}\nspeculation: {state}");
        }
        format!(
            "{speed}\nspeculation: {state} · {} of {} drafted tokens accepted ({:.0} %) · {:.2} tokens per forward",
            stats.n_accepted,
            stats.n_draft,
            100.0 * stats.n_accepted as f64 / stats.n_draft as f64,
            stats.accept_len(),
        )
    }
}

/// `[[drafted, accepted], …]`, first position first.
pub fn by_position(stats: &Stats) -> Value {
    stats.by_position.iter().map(|&(drafted, accepted)| json!([drafted, accepted])).collect()
}

fn rate(n: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() }
}

fn finish_name(finish: Option<&Finish>) -> &'static str {
    match finish {
        Some(Finish::Eog(_) | Finish::Stop(_)) => "stop",
        Some(Finish::Limit | Finish::Context) => "length",
        None => "cancelled",
    }
}

fn state_name(note: &SpeculationNote) -> &'static str {
    match note {
        SpeculationNote::NoDrafter => "no_drafter",
        SpeculationNote::OffByRequest => "off_by_request",
        SpeculationNote::Active => "active",
        SpeculationNote::Faulted(_) => "faulted",
        SpeculationNote::Useless => "useless",
        SpeculationNote::Resting => "resting",
    }
}

fn state_words(stats: &Stats) -> String {
    match &stats.speculation {
        SpeculationNote::NoDrafter => "no drafter".to_string(),
        SpeculationNote::OffByRequest => "off".to_string(),
        SpeculationNote::Active => {
            stats.drafter.map_or("active".to_string(), |drafter| format!("{drafter} active"))
        }
        SpeculationNote::Resting => "resting, since drafting costs more than it gains here".to_string(),
        SpeculationNote::Faulted(reason) => format!("the drafter was dropped: {reason}"),
        SpeculationNote::Useless => {
            format!("useless here, {} tokens drafted and none accepted", stats.n_draft)
        }
    }
}

/// Runs requests side by side until all are answered. `watch` sees text and tokens of each as they come and says whether
/// to go on with it; a request that it stops ends there.
pub fn answer_all(
    engine: &mut Engine,
    requests: Vec<Request>,
    mut watch: impl FnMut(usize, &str, &[TokenOut]) -> Result<bool>,
) -> Result<Vec<Answer>> {
    let start = Instant::now();
    let ids: Vec<RequestId> = requests.iter().map(|request| request.id).collect();
    let mut answers: Vec<Answer> = (requests.iter())
        .map(|request| Answer {
            tokens: Vec::new(),
            text: String::new(),
            finish: None,
            stats: Stats { n_prompt: request.prompt.len(), ..Stats::default() },
            prompt_time: Duration::ZERO,
            decode_time: Duration::ZERO,
        })
        .collect();
    for request in requests {
        engine.submit(request)?;
    }
    let mut events = Vec::new();
    while engine.has_work() {
        engine.step(&mut events);
        let now = start.elapsed();
        for event in events.drain(..) {
            let of = |id: RequestId| ids.iter().position(|&known| known == id);
            match event {
                Event::Tokens { request, text, tokens } => {
                    let Some(i) = of(request) else { continue };
                    let answer = &mut answers[i];
                    if answer.tokens.is_empty() {
                        answer.prompt_time = now;
                    }
                    answer.decode_time = now - answer.prompt_time;
                    answer.stats.n_predicted += tokens.len();
                    answer.text.push_str(&text);
                    let go_on = watch(i, &text, &tokens);
                    answer.tokens.extend(tokens);
                    match go_on {
                        Ok(true) => {}
                        Ok(false) => {
                            engine.cancel(request);
                        }
                        Err(error) => {
                            cancel_all(engine, &ids);
                            return Err(error);
                        }
                    }
                }
                Event::Done { request, text, finish, stats } => {
                    let Some(i) = of(request) else { continue };
                    watch(i, &text, &[])?;
                    answers[i].text.push_str(&text);
                    answers[i].finish = Some(finish);
                    answers[i].stats = stats;
                }
                Event::Failed { error, .. } => {
                    cancel_all(engine, &ids);
                    bail!("the request failed: {error}");
                }
                Event::Started { .. } | Event::Prefill { .. } => {}
            }
        }
    }
    Ok(answers)
}

fn cancel_all(engine: &mut Engine, ids: &[RequestId]) {
    for &id in ids {
        engine.cancel(id);
    }
}
