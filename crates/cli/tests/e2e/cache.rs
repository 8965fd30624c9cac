//! The prompt cache of a real server, with its drafter: who finds his prompt computed gets what he would have got anyway,
//! drafts included.

use serde_json::{Value, json};

use crate::{
    ask::{
        ASKED, chat, chat_body, chat_prompt, drafts, long_prompt, native, native_body, of_chat, of_native,
        together,
    },
    server::Server,
};

/// Prompt tokens that were cached, as `timings` and `usage` say.
fn cached(reply: &Value) -> u64 {
    let n = reply["timings"]["cache_n"].as_u64().unwrap_or_default();
    let prompt = reply["timings"]["prompt_n"].as_u64().unwrap_or_default();
    if let Some(usage) = reply["usage"].as_object() {
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], n);
        assert_eq!(usage["prompt_tokens"], n + prompt, "cached and computed are all");
    } else {
        assert_eq!(reply["tokens_evaluated"], n + prompt, "cached and computed are all");
    }
    n
}

/// Chats with several turns: each turn and each edit of its last message is asked for, and compared with a server that
/// caches nothing.
#[test]
fn chats_of_several_turns() {
    let cold = Server::start("-np 1 --no-cache-prompt --cache-ram 0");
    for flags in ["-np 1", "-np 2 -ub 64", "-np 4 --checkpoint-min-step 64", "-np 8 --no-cache-idle-slots"] {
        let server = Server::start(flags);
        let mut messages = vec![json!({"role": "system", "content": "You tell stories. ".repeat(12)})];
        let mut n_hit = 0;
        for (turn, asked) in ASKED[..4].iter().enumerate() {
            for edit in [asked, ASKED[7], &asked[..asked.len() / 2]] {
                let mut edited = messages.clone();
                edited.push(json!({"role": "user", "content": edit}));
                let body = chat_body(json!(edited), &json!({"temperature": 0.7}));
                let reply = server.ok("/v1/chat/completions", &body);
                let want = cold.ok("/v1/chat/completions", &body);
                assert_eq!(of_chat(&reply), of_chat(&want), "{flags}, turn {turn}: {edit}");
                assert!(drafts(&reply).is_some());
                n_hit += u64::from(cached(&reply) > 0);
                assert_eq!(cached(&want), 0);
                // All but the last message and what opens the answer was there, once the turn was seen.
                let n_prompt = reply["usage"]["prompt_tokens"].as_u64().unwrap_or_default();
                assert!(edit == *asked || n_prompt - cached(&reply) < 60, "{flags}, turn {turn}: {reply}");
            }
            let answer = server.ok(
                "/v1/chat/completions",
                &chat_body(json!([{"role": "user", "content": asked}]), &json!({})),
            );
            messages.push(json!({"role": "user", "content": asked}));
            messages
                .push(json!({"role": "assistant", "content": answer["choices"][0]["message"]["content"]}));
        }
        assert!(n_hit >= 11, "{flags}: {n_hit} of 12 prompts were cached in part");
        server.wait_until_idle();
        server.assert_clean();
        assert!(server.metric("paceline:cache_hits_total") >= n_hit as f64);
        assert!(
            server.metric("paceline:cache_bytes") > 0.0 && server.metric("paceline:cache_snapshots") > 0.0
        );
    }
    assert_eq!(
        cold.metric("paceline:cache_bytes") + cold.metric("paceline:cache_snapshots_taken_total"),
        0.0
    );
}

/// Switches of requests and of the server.
#[test]
fn what_is_switched_off_is_off() {
    let n_cached = |server: &Server, more: Value| {
        cached(&server.ok("/completion", &native_body(chat_prompt(ASKED[0]), &more)))
    };
    let server = Server::start("-np 1");
    assert_eq!(n_cached(&server, json!({})), 0);
    assert!(n_cached(&server, json!({})) > 0);
    assert_eq!(n_cached(&server, json!({"cache_prompt": false})), 0);
    let mut refused = server.post("/completion", &native_body("x", &json!({"n_cache_reuse": 256})));
    assert_eq!(refused.status, 400);
    let message = refused.json().expect("a JSON body")["error"]["message"].to_string();
    assert!(message.contains("n_cache_reuse") && message.contains("other tokens before it"), "{message}");

    let asked_for = Server::start("-np 1 --no-cache-prompt");
    assert_eq!(n_cached(&asked_for, json!({})), 0);
    assert_eq!(n_cached(&asked_for, json!({})), 0);
    n_cached(&asked_for, json!({"cache_prompt": true}));
    assert!(n_cached(&asked_for, json!({"cache_prompt": true})) > 0);

    // With or without what was answered: the next prompt repeats it token by token.
    for (flags, keeps) in [("-np 1", true), ("-np 1 --no-cache-idle-slots", false)] {
        let server = Server::start(flags);
        let first = server.ok("/completion", &native_body(chat_prompt(ASKED[2]), &json!({})));
        let n_prompt = first["tokens_evaluated"].as_u64().unwrap_or_default();
        let prompt = server.ok("/tokenize", &json!({"content": chat_prompt(ASKED[2])}))["tokens"].clone();
        let list = |tokens: &Value| tokens.as_array().cloned().unwrap_or_default();
        let whole = [list(&prompt), list(&first["tokens"]), list(&prompt)].concat();
        let next = server.ok("/completion", &native_body(whole, &json!({})));
        assert_eq!(cached(&next) > n_prompt, keeps, "`{flags}`: {} behind {n_prompt}", cached(&next));
        assert!(cached(&next) > 0);
    }
}

/// A budget for a part of what is asked, several clients, and each prompt over and over.
#[test]
fn a_budget_that_is_far_too_small() {
    let server = Server::start("-np 4 --cache-ram 1");
    let prompts: Vec<Value> = (0..6).map(|i| json!(long_prompt(&server, 200 + 31 * i))).collect();
    let cold = |prompt: &Value| native(&server, prompt.clone(), &json!({"cache_prompt": false}));
    let want: Vec<_> = prompts.iter().map(cold).collect();
    for round in 0..3 {
        let ask = |prompt: &Value| {
            let (server, prompt) = (&server, prompt.clone());
            move || native(server, prompt, &json!({}))
        };
        let asks = prompts.iter().map(|p| Box::new(ask(p)) as Box<dyn FnOnce() -> _ + Send + '_>).collect();
        assert_eq!(together(asks), want, "round {round}");
        server.wait_until_idle();
        assert!(server.metric("paceline:cache_bytes") <= 1024.0 * 1024.0);
    }
    assert!(server.metric("paceline:cache_evictions_total") > 0.0);
    server.assert_clean();
}

/// A conversation that outlives the process, the drafter's memory of it included.
#[test]
fn a_slot_is_saved_and_restored_across_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let flags = format!("-np 2 --slot-save-path {}", folder.path().display());
    let system = json!({"role": "system", "content": "You tell stories. ".repeat(20)});
    let first = json!([system, {"role": "user", "content": ASKED[2]}]);
    let (answer, next);
    {
        let server = Server::start(&flags);
        (answer, _) = chat(&server, first.clone(), &json!({"id_slot": 1}));
        let saved = server.ok("/slots/1?action=save", &json!({"filename": "story"}));
        assert_eq!((&saved["id_slot"], &saved["filename"]), (&json!(1), &json!("story")));
        assert!(saved["n_saved"].as_u64() > Some(answer.n_prompt), "{saved}");
        let n_file = std::fs::metadata(folder.path().join("story")).expect("the file").len();
        assert_eq!(saved["n_written"], n_file);
        assert_eq!(
            std::fs::read_dir(folder.path()).expect("the folder").count(),
            1,
            "nothing else is left there"
        );
        let prompt = server.ok("/apply-template", &json!({"messages": first}))["prompt"].clone();
        let prompt = server.ok("/tokenize", &json!({"content": prompt}))["tokens"].clone();
        let list = |tokens: &Value| tokens.as_array().cloned().unwrap_or_default();
        let more = server.ok("/tokenize", &json!({"content": " And then the kite"}))["tokens"].clone();
        next = [list(&prompt), list(&answer.tokens), list(&more)].concat();
        // An empty slot has nothing to save.
        let mut empty = server.post("/slots/0?action=save", &json!({"filename": "nothing"}));
        assert_eq!((empty.status, empty.text().unwrap_or_default().contains("slot 0")), (400, true));
    }
    let cold = Server::start("-np 1 --cache-ram 0");
    let want = native(&cold, next.clone(), &json!({}));
    let server = Server::start(&flags);
    let restored = server.ok("/slots/0?action=restore", &json!({"filename": "story"}));
    assert!(
        restored["n_restored"].as_u64() > Some(answer.n_prompt) && restored.get("note").is_none(),
        "{restored}"
    );
    let reply = server.ok("/completion", &native_body(next, &json!({})));
    assert_eq!(of_native(&reply), want, "text, probabilities, drafted and accepted tokens");
    assert!(cached(&reply) > answer.n_prompt, "{}", reply["timings"]);

    // Damaged, foreign and missing files, and names that lead elsewhere, change nothing.
    let snapshots = server.metric("paceline:cache_snapshots");
    let mut bytes = std::fs::read(folder.path().join("story")).expect("the file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(folder.path().join("bad"), &bytes).expect("a file");
    std::fs::write(folder.path().join("other"), b"GGUF").expect("a file");
    let refused = |action: &str, name: &str, words: &str| {
        let mut reply = server.post(&format!("/slots/{action}"), &json!({"filename": name}));
        let message = reply.json().expect("a JSON body")["error"]["message"].to_string();
        assert!(reply.status == 400 && message.contains(words), "{name}: {} {message}", reply.status);
    };
    refused("0?action=restore", "bad", "damaged");
    refused("0?action=restore", "other", "no snapshot");
    refused("0?action=restore", "missing", "no such file");
    refused("0?action=restore", "../story", "without a path");
    refused("7?action=restore", "story", "slot 7 does not exist");
    refused("0?action=juggle", "story", "save, restore or erase");
    assert_eq!(server.metric("paceline:cache_snapshots"), snapshots);
    let erased = server.ok("/slots/0?action=erase", &json!({}));
    assert!(erased["n_erased"].as_u64() > Some(0), "{erased}");
    server.wait_until_idle();
    server.assert_clean();

    // Without the drafter it is another pair, and without a folder nothing is offered.
    let other = Server::start(&format!("{flags} --spec-type none"));
    let mut reply = other.post("/slots/0?action=restore", &json!({"filename": "story"}));
    assert_eq!((reply.status, reply.text().unwrap_or_default().contains("another target")), (400, true));
    assert_eq!(cold.post("/slots/0?action=save", &json!({"filename": "x"})).status, 501);
}
