//! What a request cost and what speculation gained: llama-server's `timings`, and our `speculative` object.
//!
//! `predicted_ms` begins with the first token, whose own cost is the prompt's, so `predicted_per_second` of a very
//! short answer flatters; the definition is llama-server's and kept for comparison.

use paceline_engine::{SpeculationNote, Stats};
use serde_json::{Map, Value, json};

/// Measured by the thread that steps the engine, at step boundaries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Timings {
    /// Prompt tokens that a cache had.
    pub cache_n: usize,
    /// Prompt tokens computed, and the time from getting a slot to the first token.
    pub prompt_n: usize,
    pub prompt_ms: f64,
    /// Tokens generated, and the time from the first one to the last.
    pub predicted_n: usize,
    pub predicted_ms: f64,
    pub draft_n: usize,
    pub draft_n_accepted: usize,
}

impl Timings {
    /// llama-server's object. Clients read the presence of `draft_n` as "speculation is in use", so both draft keys
    /// are absent when nothing was drafted.
    pub(crate) fn to_json(self) -> Value {
        let mut object = Map::new();
        object.insert("cache_n".into(), self.cache_n.into());
        for (name, n, ms) in
            [("prompt", self.prompt_n, self.prompt_ms), ("predicted", self.predicted_n, self.predicted_ms)]
        {
            object.insert(format!("{name}_n"), n.into());
            object.insert(format!("{name}_ms"), ms.into());
            object.insert(format!("{name}_per_token_ms"), ratio(ms, n as f64).into());
            object.insert(format!("{name}_per_second"), ratio(n as f64 * 1e3, ms).into());
        }
        if self.draft_n > 0 {
            object.insert("draft_n".into(), self.draft_n.into());
            object.insert("draft_n_accepted".into(), self.draft_n_accepted.into());
        }
        Value::Object(object)
    }

    /// Of several answers to one request: tokens add up, times overlap.
    pub(crate) fn merge(self, other: Timings) -> Timings {
        Timings {
            cache_n: self.cache_n + other.cache_n,
            prompt_n: self.prompt_n + other.prompt_n,
            prompt_ms: self.prompt_ms.max(other.prompt_ms),
            predicted_n: self.predicted_n + other.predicted_n,
            predicted_ms: self.predicted_ms.max(other.predicted_ms),
            draft_n: self.draft_n + other.draft_n,
            draft_n_accepted: self.draft_n_accepted + other.draft_n_accepted,
        }
    }
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// The state of speculation in words and figures, present whether or not anything was drafted.
pub(crate) fn speculative(stats: &Stats) -> Value {
    let (state, reason) = match &stats.speculation {
        SpeculationNote::NoDrafter => ("no_drafter", None),
        SpeculationNote::OffByRequest => ("off_by_request", None),
        SpeculationNote::Active => ("active", None),
        SpeculationNote::Faulted(reason) => ("faulted", Some(reason.clone())),
        SpeculationNote::Useless => {
            ("useless", Some(format!("{} tokens drafted, none accepted", stats.n_draft)))
        }
        SpeculationNote::Resting => {
            ("resting", Some("drafting costs more than it gains at present".to_string()))
        }
    };
    let mut object = Map::new();
    object.insert("state".into(), state.into());
    if let Some(reason) = reason {
        object.insert("reason".into(), reason.into());
    }
    if let Some(drafter) = stats.drafter {
        object.insert("drafter".into(), drafter.into());
    }
    if !stats.dropped.is_empty() {
        let dropped = stats.dropped.iter().map(|(name, why)| json!({"drafter": name, "reason": why}));
        object.insert("dropped".into(), dropped.collect());
    }
    object.insert("n_verify".into(), stats.n_verify.into());
    object.insert("accept_len".into(), stats.accept_len().into());
    let by_position = stats.by_position.iter().enumerate().map(
        |(i, (drafted, accepted))| json!({"position": i, "draft_n": drafted, "draft_n_accepted": accepted}),
    );
    object.insert("by_position".into(), by_position.collect());
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draft_keys_only_where_something_was_drafted() {
        let plain = Timings { prompt_n: 4, prompt_ms: 2.0, predicted_n: 1, ..Timings::default() };
        let json = plain.to_json();
        assert_eq!((&json["prompt_per_token_ms"], &json["prompt_per_second"]), (&json!(0.5), &json!(2000.0)));
        assert_eq!(json["predicted_per_second"], json!(0.0), "no division by zero");
        assert!(json.get("draft_n").is_none() && json.get("draft_n_accepted").is_none());
        let json = Timings { draft_n: 3, ..plain }.to_json();
        assert_eq!((&json["draft_n"], &json["draft_n_accepted"]), (&json!(3), &json!(0)));
    }

    #[test]
    fn the_state_is_always_said() {
        let mut stats = Stats { n_draft: 64, by_position: vec![(4, 0)], ..Stats::default() };
        assert_eq!(speculative(&stats)["state"], "no_drafter");
        stats.speculation = SpeculationNote::Useless;
        let json = speculative(&stats);
        assert_eq!((&json["state"], &json["by_position"][0]["draft_n"]), (&json!("useless"), &json!(4)));
        assert_eq!(json["reason"], "64 tokens drafted, none accepted");
    }
}
