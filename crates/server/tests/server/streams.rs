//! Streams: the framing, chunk by chunk, and that they say what the whole reply says.

use std::time::Duration;

use paceline_testkit::{Accept, oracle};
use serde_json::{Value, json};

use crate::world::{Setup, World};

fn chat(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "seed": 5, "max_tokens": 30, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn drafting() -> World {
    World::start(Setup {
        drafter: Some(Box::new(|model| Box::new(oracle(model.clone(), 5, Accept::Varying, 3)))),
        ..Setup::default()
    })
}

/// Replaces what differs from run to run.
fn mask(mut event: Value) -> Value {
    if let Some(map) = event.as_object_mut() {
        for (key, mask) in
            [("id", "ID"), ("created", "CREATED"), ("timings", "TIMINGS"), ("speculative", "SPECULATIVE")]
        {
            if map.contains_key(key) {
                map[key] = mask.into();
            }
        }
    }
    event
}

#[test]
fn a_chat_stream_is_framed_as_llama_server_frames_it() {
    let world = World::new();
    let body = chat(
        json!({"stream": true, "max_tokens": 2, "logit_bias": {"120": 100}, "stream_options": {"include_usage": true}}),
    );
    let events: Vec<Value> =
        world.post("/v1/chat/completions", body).events().into_iter().map(mask).collect();
    let chunk = |choices: Value| {
        json!({
            "choices": choices, "created": "CREATED", "model": "tiny",
            "system_fingerprint": concat!("paceline-", env!("CARGO_PKG_VERSION")),
            "object": "chat.completion.chunk", "id": "ID",
        })
    };
    let delta = |delta: Value| chunk(json!([{"finish_reason": null, "index": 0, "delta": delta}]));
    let mut last = chunk(json!([]));
    last["usage"] = json!({
        "completion_tokens": 2, "prompt_tokens": 21, "total_tokens": 23, "prompt_tokens_details": {"cached_tokens": 0}
    });
    (last["timings"], last["speculative"]) = ("TIMINGS".into(), "SPECULATIVE".into());
    let want = [
        delta(json!({"role": "assistant", "content": null})),
        delta(json!({"content": "x"})),
        delta(json!({"content": "x"})),
        chunk(json!([{"finish_reason": "length", "index": 0, "delta": {}}])),
        last,
        json!("[DONE]"),
    ];
    assert_eq!(events, want);
    // Without usage the figures are on the chunk that ends the answer.
    let events = world.post("/v1/chat/completions", chat(json!({"stream": true}))).events();
    let last = &events[events.len() - 2];
    assert!(
        last["timings"]["predicted_n"] == 30 && last["choices"][0]["finish_reason"] == "length",
        "{last}"
    );
    assert_eq!(events.iter().filter(|event| event.get("timings").is_some()).count(), 1);
}

#[test]
fn streams_say_what_whole_replies_say() {
    for world in [World::new(), drafting()] {
        let whole =
            world.ok("/v1/chat/completions", chat(json!({"logprobs": true, "top_logprobs": 1, "n": 2})));
        let events = world
            .post(
                "/v1/chat/completions",
                chat(json!({"logprobs": true, "top_logprobs": 1, "n": 2, "stream": true})),
            )
            .events();
        for index in 0..2 {
            let choices =
                || events.iter().filter_map(|e| e.get("choices")?.get(0)).filter(|c| c["index"] == index);
            let text: String = choices().filter_map(|c| c["delta"]["content"].as_str()).collect();
            assert_eq!(text, whole["choices"][index]["message"]["content"]);
            let logprobs: Vec<&Value> =
                choices().filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
            let want: Vec<&Value> =
                whole["choices"][index]["logprobs"]["content"].as_array().unwrap().iter().collect();
            assert_eq!(logprobs, want);
        }

        let body = |stream: bool| json!({"prompt": "sea", "seed": 3, "n_predict": 30, "logprobs": 2, "ignore_eos": true, "stream": stream});
        let whole = world.ok("/v1/completions", body(false));
        let events = world.post("/v1/completions", body(true)).events();
        assert_eq!(events.last(), Some(&json!("[DONE]")));
        let choices = || events.iter().filter_map(|e| e.get("choices")?.get(0));
        let text: String = choices().filter_map(|c| c["text"].as_str()).collect();
        assert_eq!(text, whole["choices"][0]["text"]);
        for list in ["tokens", "token_logprobs", "text_offset"] {
            let streamed: Vec<&Value> =
                choices().filter_map(|c| c["logprobs"][list].as_array()).flatten().collect();
            assert_eq!(json!(streamed), whole["choices"][0]["logprobs"][list], "{list}");
        }
    }
}

#[test]
fn a_native_stream_ends_with_its_last_object() {
    let world = drafting();
    let body = |stream: bool| json!({"prompt": "sea", "seed": 3, "n_predict": 30, "ignore_eos": true, "return_tokens": true, "n_probs": 2, "stream": stream});
    let whole = world.ok("/completion", body(false));
    let events = world.post("/completion", body(true)).events();
    let (last, parts) = events.split_last().unwrap();
    assert!(parts.iter().all(|part| part["stop"] == false));
    let text: String = parts.iter().filter_map(|part| part["content"].as_str()).collect();
    assert_eq!(text, whole["content"]);
    for list in ["tokens", "completion_probabilities"] {
        let streamed: Vec<&Value> = parts.iter().filter_map(|part| part[list].as_array()).flatten().collect();
        assert_eq!(json!(streamed), whole[list], "{list}");
    }
    assert_eq!((&last["stop"], &last["content"], &last["tokens"]), (&json!(true), &json!(""), &json!([])));
    for key in
        ["tokens_predicted", "tokens_evaluated", "stop_type", "has_new_line", "prompt", "tokens_cached"]
    {
        assert_eq!(last[key], whole[key], "{key}");
    }
    assert!(last["timings"]["draft_n"].as_u64().unwrap() > 0);
}

#[test]
fn progress_of_a_long_prompt_is_reported() {
    let world = World::new();
    let body = json!({"prompt": "z".repeat(100), "n_predict": 1, "stream": true, "return_progress": true, "timings_per_token": true});
    let events = world.post("/completion", body.clone()).events();
    let progress: Vec<(u64, u64)> = (events.iter().filter_map(|e| e.get("prompt_progress")))
        .map(|p| (p["processed"].as_u64().unwrap(), p["total"].as_u64().unwrap()))
        .collect();
    // The last token is a step of its own: a snapshot is taken before it.
    assert_eq!(progress, [(32, 100), (64, 100), (96, 100), (99, 100)]);
    let again = world.post("/completion", body).events();
    assert_eq!(again.iter().filter(|e| e.get("prompt_progress").is_some()).count(), 0, "it is cached");
    assert_eq!(again.last().unwrap()["timings"]["cache_n"], 99);
}

#[test]
fn what_fails_before_the_first_byte_has_a_status() {
    let mut setup = Setup::default();
    setup.model.nan_token = Some(u32::from(b'q'));
    setup.model.delay = Duration::from_millis(10);
    let world = World::start(setup);
    for stream in [false, true] {
        let reply = world.post("/completion", json!({"prompt": "q", "stream": stream}));
        let error = &reply.json()["error"];
        assert_eq!((reply.status, &error["type"]), (500, &json!("server_error")), "{}", reply.body);
        assert!(error["message"].as_str().unwrap().contains("position 0 can't be sampled"), "{error}");
    }
    // And what fails after it is a line of the stream.
    let reply = world.post("/v1/chat/completions", chat(json!({"stream": true, "logit_bias": {"113": 100}})));
    let events = reply.events();
    assert_eq!(reply.status, 200);
    assert_eq!(events[1]["choices"][0]["delta"]["content"], "q");
    assert_eq!((events.len(), &events[2]["error"]["code"]), (3, &json!(500)), "{events:?}");
    assert_eq!(world.metric("paceline:unusable_logits_total"), 3.0);
    world.ok("/completion", json!({"prompt": "a", "n_predict": 1, "logit_bias": {"113": false}}));
}

#[test]
fn silence_is_broken_by_comments() {
    let mut setup = Setup::default();
    setup.model.delay = Duration::from_millis(150);
    setup.server.ping_interval = Some(Duration::from_millis(40));
    let world = World::start(setup);
    let reply = world.post("/v1/chat/completions", chat(json!({"stream": true, "max_tokens": 2})));
    assert!(reply.body.starts_with(":\n\n") && reply.body.matches(":\n\n").count() >= 3, "{}", reply.body);
    assert_eq!(reply.events().last(), Some(&json!("[DONE]")));
    let quiet = world.post(
        "/v1/chat/completions",
        chat(json!({"stream": true, "max_tokens": 2, "sse_ping_interval": -1})),
    );
    assert!(!quiet.body.contains(":\n\n"));
}
