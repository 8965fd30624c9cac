//! What is refused, with which status, type and words.

use serde_json::{Value, json};

use crate::{
    client::Connection,
    world::{Setup, World},
};

const INVALID: &str = "invalid_request_error";

fn check(world: &World, path: &str, body: Value, status: u16, kind: &str, words: &str) {
    let reply = world.post(path, body.clone());
    let error = &reply.json()["error"];
    let message = error["message"].as_str().unwrap_or_default();
    assert_eq!((reply.status, &error["code"]), (status, &json!(status)), "{body}: {message}");
    assert_eq!(error["type"], kind, "{body}: {message}");
    assert!(message.contains(words), "{body}: {message:?} does not say {words:?}");
}

#[test]
fn fields_of_every_surface() {
    let world = World::new();
    let native = [
        (json!({}), "`prompt`: expected a string, a list of token ids"),
        (json!({"prompt": 5}), "found 5"),
        (json!({"prompt": ""}), "the prompt is empty"),
        (json!({"prompt": [1, 99999]}), "`prompt[1]`: expected a token id from 0 to 265, found 99999"),
        (
            json!({"prompt": "a", "temperature": "hot"}),
            "`temperature`: expected a number, found the string \"hot\"",
        ),
        (json!({"prompt": "a", "temperature": 1e300}), "`temperature`: expected a finite number, found inf"),
        (json!({"prompt": "a", "top_k": 1.5}), "`top_k`: expected an integer, found 1.5"),
        (
            json!({"prompt": "a", "n_predict": -2}),
            "`n_predict`: expected an integer of at least -1, found -2",
        ),
        (json!({"prompt": "a", "repeat_penalty": 0}), "`repeat_penalty`: expected a number above 0"),
        (json!({"prompt": "a", "repeat_last_n": -2}), "`repeat_last_n`"),
        (json!({"prompt": "a", "dry_multiplier": -1}), "`dry_multiplier`"),
        (json!({"prompt": "a", "mirostat": 2}), "`mirostat`: version 2 is not supported"),
        (json!({"prompt": "a", "samplers": ["nope"]}), "unknown sampler \"nope\""),
        (json!({"prompt": "a", "logit_bias": [[9999, 1]]}), "`logit_bias`: expected a token id"),
        (json!({"prompt": "a", "logit_bias": 3}), "`logit_bias`: expected a list of pairs or an object"),
        (json!({"prompt": "a", "seed": "x"}), "`seed`: expected an integer"),
        (json!({"prompt": "a", "stop": 7}), "`stop`: expected a string or a list of strings, found 7"),
        (json!({"prompt": "a", "stop": vec!["x"; 65]}), "`stop`: expected at most 64 strings, found 65"),
        (json!({"prompt": "a", "stream": "yes"}), "`stream`: expected true or false"),
        (
            json!({"prompt": "a", "n": 3}),
            "`n`: expected an integer from 1 to 2 (the number of slots), found 3",
        ),
        (json!({"prompt": "a", "id_slot": 7}), "slot 7 does not exist: there are 2"),
        (json!({"prompt": "a", "n_probs": 1000}), "`n_probs`"),
        (json!({"prompt": "a", "grammar": "root ::= x"}), "`grammar`: grammars: not supported yet"),
        (json!({"prompt": "a", "json_schema": {"type": "object"}}), "`json_schema`"),
        (json!({"prompt": "a", "lora": [{"id": 0, "scale": 1}]}), "`lora`"),
        (json!({"prompt": "a", "speculative": {"n_max": "x"}}), "`speculative.n_max`: expected an integer"),
        (json!({"prompt": "a", "stream_options": 1}), "`stream_options`: expected an object"),
        (json!([]), "the body: expected a JSON object"),
        (json!({"prompt": vec!["a"; 11]}), "at most 10 can run and wait"),
    ];
    for (body, words) in native {
        check(&world, "/completion", body, 400, INVALID, words);
    }
    let user = json!([{"role": "user", "content": "hi"}]);
    let chat = [
        (json!({}), "`messages`: expected a list of messages, found nothing"),
        (json!({"messages": []}), "`messages`: expected at least one message"),
        (json!({"messages": "hi"}), "`messages`: expected a list"),
        (json!({"messages": ["hi"]}), "`messages[0]`: expected an object"),
        (json!({"messages": [{"content": "hi"}]}), "`messages[0].role`"),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "message 0: expected `content` to be a string",
        ),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "no vision"),
        (
            json!({"messages": user, "response_format": {"type": "json_object"}}),
            "`response_format.type`: `json_object`",
        ),
        (json!({"messages": user, "tools": [{}], "tool_choice": "required"}), "`tool_choice`"),
        (json!({"messages": user, "top_logprobs": 5}), "`top_logprobs`: 5 needs `logprobs`"),
        (json!({"messages": user, "logprobs": true, "top_logprobs": 21}), "`top_logprobs`: expected"),
        (json!({"messages": user, "reasoning_format": "x"}), "`reasoning_format`: expected none, deepseek"),
        (json!({"messages": user, "max_tokens": "many"}), "`max_tokens`: expected an integer"),
    ];
    for (body, words) in chat {
        check(&world, "/v1/chat/completions", body, 400, INVALID, words);
    }
    check(&world, "/v1/completions", json!({"prompt": "a", "echo": true}), 400, INVALID, "`echo`");
    check(&world, "/v1/completions", json!({"prompt": "a", "best_of": 2}), 400, INVALID, "`best_of`");
    check(&world, "/detokenize", json!({"tokens": [-1]}), 400, INVALID, "`tokens[0]`");
    check(&world, "/tokenize", json!({"content": 3}), 400, INVALID, "`content`");
    check(
        &world,
        "/completion",
        json!({"prompt": "a", "model": "gpt-5"}),
        404,
        "not_found_error",
        "known: tiny, hash",
    );
    check(&world, "/props", json!({}), 501, "not_supported_error", "not supported");
    check(&world, "/slots/0?action=save", json!({}), 501, "not_supported_error", "not supported");
    check(&world, "/nowhere", json!({}), 404, "not_found_error", "File Not Found");
    check(&world, "/health", json!({}), 405, INVALID, "method");
    // And after all that, an answer.
    world.ok("/completion", json!({"prompt": "a", "n_predict": 2}));
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    let world = World::new();
    let body = json!({
        "prompt": "a", "n_predict": 2, "grammar": "", "json_schema": null, "lora": [], "mirostat": 0, "t_max_predict_ms": 0,
        "temperature": null, "top_k": 40.0, "top_p": 7, "temperature_": "x", "unknown": {"a": 1}, "speculative.p_min": 0.5,
        "cache_prompt": false, "id_slot": -1, "n_keep": -1, "model": "tiny-hash.gguf", "stop": [""], "echo": false,
        "reasoning_budget_tokens": -1, "response_format": {"type": "text"}, "best_of": 1, "seed": -1,
    });
    let reply = world.ok("/completion", body);
    assert_eq!(reply["generation_settings"]["top_p"], 1.0, "clamped as by llama-server");
}

#[test]
fn a_prompt_too_long_says_how_much() {
    let world = World::new();
    let reply = world.post("/completion", json!({"prompt": "z".repeat(300)}));
    let error = &reply.json()["error"];
    assert_eq!((reply.status, &error["type"]), (400, &json!("exceed_context_size_error")));
    assert_eq!((&error["n_prompt_tokens"], &error["n_ctx"]), (&json!(300), &json!(256)));
}

#[test]
fn broken_json_is_the_clients_fault() {
    let world = World::new();
    let reply = Connection::open(world.addr, "POST", "/completion", &[], b"{\"prompt\": }").reply();
    let message = reply.json()["error"]["message"].clone();
    assert_eq!(reply.status, 400);
    assert!(
        message.as_str().unwrap().contains("not valid JSON: expected value at line 1 column 12"),
        "{message}"
    );
    let deep = format!("{{\"prompt\": {}", "[".repeat(100_000));
    assert_eq!(Connection::open(world.addr, "POST", "/completion", &[], deep.as_bytes()).reply().status, 400);
}

#[test]
fn a_body_too_large_is_refused() {
    let mut setup = Setup::default();
    setup.server.body_limit = 100;
    let world = World::start(setup);
    check(&world, "/completion", json!({"prompt": "z".repeat(200)}), 413, INVALID, "larger than 100 bytes");
    world.ok("/completion", json!({"prompt": "z", "n_predict": 1}));
}

#[test]
fn keys_are_asked_for() {
    let mut setup = Setup::default();
    setup.server.api_keys = vec!["one".into(), "two".into()];
    let world = World::start(setup);
    let status = |method: &str, path: &str, headers: &[(&str, &str)]| {
        Connection::open(world.addr, method, path, headers, b"{\"content\": \"a\"}").reply().status
    };
    assert_eq!(status("POST", "/tokenize", &[]), 401);
    assert_eq!(status("POST", "/tokenize", &[("Authorization", "Bearer three")]), 401);
    assert_eq!(status("POST", "/tokenize", &[("Authorization", "Bearer two")]), 200);
    assert_eq!(status("POST", "/tokenize", &[("X-Api-Key", "one")]), 200);
    assert_eq!(status("GET", "/slots", &[]), 401);
    assert_eq!(status("GET", "/health", &[]), 200);
    assert_eq!(status("GET", "/v1/models", &[]), 200);
    assert_eq!(status("OPTIONS", "/tokenize", &[("Origin", "http://x")]), 204);
    check(&world, "/completion", json!({}), 401, "authentication_error", "Invalid API Key");
}
