//! Prompts and contexts of all sizes.

use serde_json::{Value, json};

use crate::{
    ask::{ASKED, chat, chat_prompt, long_prompt, native, native_stream, tokenize, user},
    server::Server,
};

/// Prompts around the size of a batch, where features of the first chunks used to get lost.
#[test]
fn prompts_around_the_batch_size() {
    let small = Server::start("-np 2 -ub 64");
    let large = Server::shared("-np 2");
    for n in [511, 512, 513, 1025] {
        let prompt = long_prompt(&large, n);
        let more = json!({"n_predict": 32});
        let streamed = native_stream(&large, prompt.clone(), &more);
        assert!(streamed.1.is_some_and(|(_, accepted)| accepted > 0), "{n}: {:?}", streamed.1);
        assert_eq!(streamed.0.n_prompt, n as u64);
        let plain = native(&large, prompt.clone(), &json!({"n_predict": 32, "speculative.n_max": 0}));
        assert_eq!(plain, (streamed.0.clone(), None), "{n}");
        assert_eq!(native(&small, prompt, &more), streamed, "{n}: in chunks of 64");
    }
    small.wait_until_idle();
    small.assert_clean();
}

/// Ten batches long, and longer than the drafter has ever seen in training.
#[test]
fn a_prompt_of_5000_tokens() {
    let server = Server::start("-np 1 -c 5120");
    let prompt = long_prompt(&server, 5000);
    let (answer, drafted) = native_stream(&server, prompt.clone(), &json!({}));
    assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{drafted:?}");
    assert_eq!(answer.n_prompt, 5000);
    let without = Server::start("-np 1 -c 5120 -ub 600 --spec-type none");
    assert_eq!(native(&without, prompt, &json!({})), (answer, None));
    server.assert_clean();
}

/// Chunks that divide neither the prompt nor each other.
#[test]
fn a_prompt_in_chunks_of_any_size() {
    let server = Server::shared("-np 2");
    let prompt = long_prompt(&server, 150);
    let want = native(&server, prompt.clone(), &json!({}));
    for flags in ["-ub 7", "-ub 149", "-ub 151", "-ub 1"] {
        let server = Server::start(flags);
        assert_eq!(native(&server, prompt.clone(), &json!({})), want, "{flags}");
    }
}

/// A chat whose last message is edited, each time shorter or longer than what the slot had before.
#[test]
fn edited_messages() {
    let server = Server::start("-np 1");
    let long = server.ok("/detokenize", &json!({"tokens": long_prompt(&server, 400)[20..380].to_vec()}));
    let long = long["content"].as_str().unwrap_or_default();
    let chat_of = |last: &str| {
        json!([
            {"role": "system", "content": "You tell stories."},
            {"role": "user", "content": ASKED[1]},
            {"role": "assistant", "content": "{\"name\": \"Luna\"}"},
            {"role": "user", "content": last},
        ])
    };
    let edits =
        [chat_of(long), chat_of(ASKED[0]), user(ASKED[0]), chat_of(long), user("Hi"), chat_of(ASKED[0])];
    // Cold: on a server that has never seen a prompt.
    let cold: Vec<_> =
        (edits.iter().map(|messages| chat(&Server::start("-np 1"), messages.clone(), &json!({})))).collect();
    for _ in 0..2 {
        for (messages, cold) in edits.iter().zip(&cold) {
            assert_eq!(chat(&server, messages.clone(), &json!({})), *cold, "{messages}");
        }
    }
    server.assert_clean();
}

/// A context is a limit, not a reservation.
#[test]
#[cfg(target_os = "linux")]
fn a_context_of_256k_costs_what_is_used() {
    for (flags, n_slot) in [("-c 262144 -np 1", 1), ("-c 262144 -np 8", 8), ("-c 262144 -np 8 -kvu", 8)] {
        let server = Server::start(flags);
        assert_eq!(server.get("/props")["total_slots"], n_slot);
        let n_ctx = server.get("/props")["default_generation_settings"]["n_ctx"].as_u64();
        let each = if flags.ends_with("-kvu") { 262_144 } else { 262_144 / n_slot };
        assert_eq!(n_ctx, Some(each), "{flags}");
        let (answer, drafted) = native(&server, chat_prompt(ASKED[0]), &json!({}));
        assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{drafted:?}");
        assert_eq!(native(&server, chat_prompt(ASKED[0]), &json!({"speculative.n_max": 0})), (answer, None));
        native(&server, long_prompt(&server, 1500), &json!({"n_predict": 8}));
        let resident = server.resident_bytes();
        assert!(resident < 400 << 20, "`{flags}`: {} MiB are in use", resident >> 20);
        server.assert_clean();
    }
}

/// The end of the context ends the answer, in the middle of a draft too, and is no error.
#[test]
fn a_full_context_ends_the_answer() {
    let server = Server::start("-np 1 -c 256");
    let prompt = long_prompt(&server, 220);
    let endless = json!({"n_predict": -1, "ignore_eos": true});
    let (answer, drafted) = native(&server, prompt.clone(), &endless);
    assert!(drafted.is_some());
    assert_eq!((answer.n_prompt, answer.n_predicted, answer.ending.0.as_str()), (220, 36, "limit"));
    let plain = json!({"n_predict": -1, "ignore_eos": true, "speculative.n_max": 0});
    assert_eq!(native(&server, prompt, &plain), (answer, None));

    let mut reply = server.post("/completion", &json!({"prompt": long_prompt(&server, 256)}));
    let error = reply.json().expect("a JSON body");
    assert_eq!(reply.status, 400);
    let error = &error["error"];
    assert_eq!(
        (&error["type"], &error["n_prompt_tokens"], &error["n_ctx"]),
        (&json!("exceed_context_size_error"), &json!(256), &json!(256)),
        "{error}"
    );
    server.assert_clean();
}

/// Half characters at chunk borders, in and out.
#[test]
fn text_outside_of_ascii() {
    let server = Server::shared("-np 2");
    let text = "żółw 🐢 と 猫";
    let tokens = tokenize(&server, text);
    assert_eq!(server.ok("/detokenize", &json!({"tokens": tokens}))["content"], Value::from(text));
    // Only bytes that can't stand alone are allowed, so the answer is full of broken characters.
    let odd: Vec<Value> = tokens.iter().map(|token| json!([token, 100.0])).collect();
    let more = json!({"logit_bias": odd, "temperature": 1.5, "top_k": 0, "top_p": 1, "n_predict": 40});
    let streamed = native_stream(&server, text, &more);
    assert_eq!(native(&server, text, &more), streamed);
    let mut plain = more.clone();
    plain["speculative.n_max"] = 0.into();
    assert_eq!(native(&server, text, &plain).0, streamed.0);
}

/// A token of context takes a kilobyte of the bundled target and more of its drafter: 262,144 of them would be seen.
#[test]
#[cfg(target_os = "linux")]
fn a_context_is_a_limit_and_no_reservation() {
    let small = Server::start("-np 1 -c 512 --no-warmup");
    let large = Server::start("-np 8 -c 262144 --no-warmup");
    let (before, least) = (large.resident_bytes(), small.resident_bytes());
    assert!(
        before < least + (16 << 20),
        "{before} bytes before the first request, {least} with a small context"
    );
    let answer = native(&large, long_prompt(&large, 200), &json!({}));
    assert_eq!(answer, native(&small, long_prompt(&small, 200), &json!({})));
    let after = large.resident_bytes();
    assert!(after < before + (64 << 20), "{after} bytes after an answer, {before} before");
    large.assert_clean();
}

/// Twice as far as the target was trained for.
#[test]
fn positions_beyond_the_trained_context() {
    let flags = "-np 1 -c 8192 --rope-scaling yarn --rope-scale 2";
    let server = Server::start(flags);
    let prompt = long_prompt(&server, 6000);
    let (answer, drafted) = native_stream(&server, prompt.clone(), &json!({}));
    assert!(drafted.is_some(), "drafts beyond it too");
    let plain = Server::start(&format!("{flags} -ub 300 --spec-type none"));
    assert_eq!(native(&plain, prompt.clone(), &json!({})), (answer.clone(), None));
    let other = Server::start("-np 1 -c 8192 --spec-type none");
    assert_ne!(native(&other, prompt, &json!({})).0, answer, "positions are scaled");
    server.assert_clean();
}
