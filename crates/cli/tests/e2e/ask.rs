//! Requests, and the parts of their answers that must be equal.

use std::thread;

use serde_json::{Map, Value, json};

use crate::server::Server;

/// Requests of different kinds, from ones that the bundled drafter guesses well to ones that it guesses badly.
pub const ASKED: [&str; 8] = [
    "Count from 3 in steps of 4, 12 numbers.",
    "Write JSON for a cat named Luna.",
    "Write a story about a lost kite.",
    "Write a Python function add.",
    "Count from 5 in steps of 2, 9 numbers.",
    "Write JSON for a dog named Rex.",
    "Write a story about a brave mouse.",
    "What is 12 plus 7?",
];

/// An answer, as far as it must not depend on speculation, neighbours or history.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub text: String,
    pub tokens: Value,
    /// Log-probabilities of each token and of the alternatives to it.
    pub probabilities: Value,
    /// `stop_type` and `stopping_word`, or `finish_reason`.
    pub ending: (String, String),
    pub n_prompt: u64,
    pub n_predicted: u64,
}

/// What speculation did: tokens drafted and accepted. None where nothing was drafted.
pub type Drafts = Option<(u64, u64)>;

/// `base` with the fields of `more`.
pub fn with(mut base: Value, more: &Value) -> Value {
    if let (Some(base), Some(more)) = (base.as_object_mut(), more.as_object()) {
        base.extend(more.clone());
    }
    base
}

/// The chat with one message, as the model gets it.
pub fn chat_prompt(message: &str) -> String {
    format!("<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")
}

/// The body of a native request that shows all it can.
pub fn native_body(prompt: impl Into<Value>, more: &Value) -> Value {
    let prompt: Value = prompt.into();
    let base = json!({
        "prompt": prompt, "n_predict": 48, "temperature": 0, "return_tokens": true, "n_probs": 3, "seed": 42,
    });
    with(base, more)
}

/// The answer to a native request.
pub fn native(server: &Server, prompt: impl Into<Value>, more: &Value) -> (Answer, Drafts) {
    of_native(&server.ok("/completion", &native_body(prompt, more)))
}

/// The parts of a native answer.
pub fn of_native(reply: &Value) -> (Answer, Drafts) {
    let answer = Answer {
        text: text(&reply["content"]),
        tokens: reply["tokens"].clone(),
        probabilities: reply["completion_probabilities"].clone(),
        ending: (text(&reply["stop_type"]), text(&reply["stopping_word"])),
        n_prompt: number(&reply["tokens_evaluated"]),
        n_predicted: number(&reply["tokens_predicted"]),
    };
    let n_token = answer.tokens.as_array().map_or(0, Vec::len) as u64;
    assert_eq!(n_token, answer.n_predicted, "a token is missing in {reply}");
    assert_eq!(
        answer.probabilities.as_array().map_or(0, Vec::len) as u64,
        n_token,
        "a token without probability"
    );
    (answer, drafts(reply))
}

/// The answer to a native request that is streamed: the chunks' parts put together.
pub fn native_stream(server: &Server, prompt: impl Into<Value>, more: &Value) -> (Answer, Drafts) {
    let chunks = server.chunks("/completion", &with(native_body(prompt, more), &json!({"stream": true})));
    let (mut content, mut tokens, mut probabilities) = (String::new(), Vec::new(), Vec::new());
    for chunk in &chunks {
        content += &text(&chunk["content"]);
        tokens.extend(chunk["tokens"].as_array().cloned().unwrap_or_default());
        probabilities.extend(chunk["completion_probabilities"].as_array().cloned().unwrap_or_default());
    }
    let last = chunks.last().cloned().unwrap_or_default();
    assert_eq!(last["stop"], true, "{last}");
    let whole = json!({"content": content, "tokens": tokens, "completion_probabilities": probabilities});
    of_native(&with(last, &whole))
}

/// The body of a chat request that shows all it can.
pub fn chat_body(messages: Value, more: &Value) -> Value {
    let base = json!({
        "messages": messages, "max_tokens": 48, "temperature": 0, "seed": 42, "logprobs": true, "top_logprobs": 3,
    });
    with(base, more)
}

/// One message of a user.
pub fn user(message: &str) -> Value {
    json!([{"role": "user", "content": message}])
}

/// The answer to a chat.
pub fn chat(server: &Server, messages: Value, more: &Value) -> (Answer, Drafts) {
    of_chat(&server.ok("/v1/chat/completions", &chat_body(messages, more)))
}

/// The parts of a chat's answer.
pub fn of_chat(reply: &Value) -> (Answer, Drafts) {
    let choice = &reply["choices"][0];
    let probabilities = choice["logprobs"]["content"].clone();
    let ids = probabilities.as_array().into_iter().flatten().map(|token| token["id"].clone());
    let answer = Answer {
        text: text(&choice["message"]["reasoning_content"]) + "|" + &text(&choice["message"]["content"]),
        tokens: ids.collect(),
        probabilities,
        ending: (text(&choice["finish_reason"]), String::new()),
        n_prompt: number(&reply["usage"]["prompt_tokens"]),
        n_predicted: number(&reply["usage"]["completion_tokens"]),
    };
    (answer, drafts(reply))
}

/// The answer to a chat that is streamed.
pub fn chat_stream(server: &Server, messages: Value, more: &Value) -> (Answer, Drafts) {
    let streamed = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.chunks("/v1/chat/completions", &with(chat_body(messages, more), &streamed));
    let (mut content, mut reasoning, mut probabilities) = (String::new(), String::new(), Vec::new());
    let mut finish_reason = Value::Null;
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        content += &text(&choice["delta"]["content"]);
        reasoning += &text(&choice["delta"]["reasoning_content"]);
        probabilities.extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
        assert!(finish_reason.is_null(), "nothing comes after the chunk that ends a choice");
        finish_reason = choice["finish_reason"].clone();
    }
    let mut whole = chunks.last().cloned().unwrap_or_default();
    assert_eq!(whole["choices"], json!([]), "the chunk with the usage has no choice");
    whole["choices"] = json!([{
        "message": {"content": content, "reasoning_content": reasoning},
        "logprobs": {"content": probabilities},
        "finish_reason": finish_reason,
    }]);
    of_chat(&whole)
}

/// Runs all of these at once, each on a thread of its own.
pub fn together<T: Send>(asks: Vec<Box<dyn FnOnce() -> T + Send + '_>>) -> Vec<T> {
    thread::scope(|scope| {
        let running: Vec<_> = asks.into_iter().map(|ask| scope.spawn(ask)).collect();
        running.into_iter().map(|thread| thread.join().expect("a request failed, see above")).collect()
    })
}

/// The drafts in `timings`, whose two keys come both or not at all.
pub fn drafts(reply: &Value) -> Drafts {
    let timings = reply["timings"].as_object().cloned().unwrap_or_else(Map::new);
    match (timings.get("draft_n"), timings.get("draft_n_accepted")) {
        (None, None) => None,
        (Some(n), Some(accepted)) => {
            let (n, accepted) = (number(n), number(accepted));
            assert!(n > 0 && accepted <= n, "{timings:?}");
            let sum = |name: &str| -> u64 {
                let by_position = reply["speculative"]["by_position"].as_array();
                by_position.into_iter().flatten().map(|position| number(&position[name])).sum()
            };
            assert_eq!((sum("draft_n"), sum("draft_n_accepted")), (n, accepted), "{}", reply["speculative"]);
            Some((n, accepted))
        }
        _ => panic!("one of the draft keys without the other: {timings:?}"),
    }
}

/// The ids of a text's tokens.
pub fn tokenize(server: &Server, text: &str) -> Vec<u64> {
    let tokens = server.ok("/tokenize", &json!({"content": text}))["tokens"].clone();
    tokens.as_array().into_iter().flatten().map(number).collect()
}

/// A chat's prompt of exactly `n` tokens, most of it a long story to tell again.
pub fn long_prompt(server: &Server, n: usize) -> Vec<u64> {
    let head = tokenize(server, "<|im_start|>user\nTell this story again:\n");
    let tail = tokenize(server, "<|im_end|>\n<|im_start|>assistant\n");
    let story = tokenize(
        server,
        "Once upon a time, there was a little girl named Lily. She had a red kite and a small dog. One day the \
         wind took the kite over the hill, and Lily and the dog ran after it all morning. They asked the old man at \
         the mill, the baker and the boy with the goat. At last they saw it in a tall tree. The boy climbed up and \
         brought it down, and they all had bread and honey. ",
    );
    let n_story = n - head.len() - tail.len();
    let prompt: Vec<u64> =
        head.into_iter().chain(story.into_iter().cycle().take(n_story)).chain(tail).collect();
    assert_eq!(prompt.len(), n);
    prompt
}

/// A string, or nothing where there is none.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("expected a count, found {value}"))
}
