//! What every OpenAI-shaped reply and chunk carries around its choices.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::{app::App, random::random_id};

/// Same for all chunks of a stream.
pub(crate) struct Envelope {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    object: &'static str,
}

impl Envelope {
    pub fn new(app: &App, object: &'static str) -> Envelope {
        Envelope {
            id: format!("chatcmpl-{}", random_id(32)),
            created: unix_seconds(SystemTime::now()),
            model: app.model.id.clone(),
            fingerprint: app.config.build_info.clone(),
            object,
        }
    }

    pub fn wrap(&self, choices: Vec<Value>) -> Value {
        json!({
            "choices": choices,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "object": self.object,
            "id": self.id,
        })
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
