//! The surface that clients rely on, where it needs the real binary.

use std::process::Command;

use serde_json::{Value, json};

use crate::{
    ask::{ASKED, chat, chat_body, user},
    server::Server,
};

#[test]
fn keys() {
    let server = Server::start("--api-key one,two");
    let body = chat_body(user("Hi"), &json!({"max_tokens": 1})).to_string();
    let check = |headers: &[(&str, &str)], status: u16| {
        let mut reply = server.request("POST", "/v1/chat/completions", headers, &body);
        assert_eq!(reply.status, status, "{headers:?}");
        reply.json().expect("a JSON body")
    };
    check(&[("Authorization", "Bearer one")], 200);
    check(&[("X-Api-Key", "two")], 200);
    assert_eq!(check(&[], 401)["error"]["type"], "authentication_error");
    check(&[("Authorization", "Bearer three")], 401);
    assert_eq!(server.get("/health")["status"], "ok");
    assert_eq!(server.get("/v1/models")["object"], "list");
    for path in ["/slots", "/metrics", "/props"] {
        assert_eq!(server.request("GET", path, &[], "").status, 401, "{path}");
        assert_eq!(server.request("GET", path, &[("X-Api-Key", "one")], "").status, 200, "{path}");
    }
}

#[test]
fn refusals_name_the_field() {
    let server = Server::shared("-np 2");
    let check = |path: &str, body: &str, status: u16, named: &str| {
        let mut reply = server.request("POST", path, &[], body);
        let error = reply.json().expect("a JSON body")["error"].clone();
        assert_eq!(
            (reply.status, error["code"].as_u64()),
            (status, Some(u64::from(status))),
            "{body}: {error}"
        );
        let message = error["message"].as_str().unwrap_or_default();
        assert!(message.contains(named), "{body}: {message}");
    };
    let chat = "/v1/chat/completions";
    check(
        chat,
        r#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}"#,
        400,
        "`temperature`",
    );
    check(chat, r#"{"messages": "Hi"}"#, 400, "`messages`");
    check(chat, r#"{"messages": [{"role": "user", "content": "Hi"}], "model": "gpt-9"}"#, 404, "`model`");
    check(chat, "{\"messages\": [", 400, "JSON");
    check("/completion", r#"{"prompt": [1, 99999999]}"#, 400, "`prompt[1]`");
    check("/completion", r#"{"prompt": "Hi", "n_predict": -7}"#, 400, "`n_predict`");
    check("/completion", r#"{"prompt": "Hi", "id_slot": 99}"#, 400, "99");
    check("/completion", r#"{"prompt": ""}"#, 400, "empty");
    check("/v1/nothing", "{}", 404, "");
    // Absurd is not wrong: unknown fields and values beyond a range that is clamped.
    let absurd = json!({"prompt": "Hi", "n_predict": 2, "top_k": 1e12, "top_p": 9, "xyz": {}, "speculative.p_min": 0.5});
    server.ok("/completion", &absurd);
}

/// The template's switch, the server's, and what becomes of thoughts.
#[test]
fn thinking() {
    let server = Server::shared("-np 2");
    let message = |more: Value| {
        let reply = server.ok("/v1/chat/completions", &chat_body(user(ASKED[2]), &more));
        reply["choices"][0]["message"].clone()
    };
    let off = message(json!({"chat_template_kwargs": {"enable_thinking": false}}));
    assert!(off.get("reasoning_content").is_none(), "{off}");
    assert!(!off["content"].as_str().unwrap_or_default().contains("think>"), "{off}");
    // The bundled model begins with an empty thought, which is no part of the answer either.
    let on = message(json!({}));
    assert!(!on["content"].as_str().unwrap_or_default().contains("think>"), "{on}");
    let raw = message(json!({"reasoning_format": "none"}));
    assert!(raw["content"].as_str().unwrap_or_default().contains("<think>"), "{raw}");

    let never = Server::start("--reasoning off");
    let prompt =
        |server: &Server| server.ok("/apply-template", &json!({"messages": user("Hi")}))["prompt"].clone();
    assert!(prompt(&never).as_str().unwrap_or_default().contains("</think>"));
    assert!(!prompt(&server).as_str().unwrap_or_default().contains("</think>"));
    let (answer, drafted) = chat(&never, user(ASKED[0]), &json!({}));
    assert!(answer.text.starts_with('|') && drafted.is_some(), "{answer:?} {drafted:?}");
}

/// Thoughts asked for and forbidden: the prompts differ, the drafter helps with both and changes neither answer.
#[test]
fn reasoning_on_and_off_with_drafts() {
    for (flags, has_empty_thought) in [("--reasoning on", false), ("--reasoning off", true)] {
        let server = Server::start(flags);
        let prompt = server.ok("/apply-template", &json!({"messages": user("Hi")}))["prompt"].clone();
        assert_eq!(prompt.as_str().unwrap_or_default().contains("</think>"), has_empty_thought, "{flags}");
        for asked in &ASKED[..4] {
            let (answer, drafted) = chat(&server, user(asked), &json!({}));
            assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{flags}: {asked}: {drafted:?}");
            let plain = chat(&server, user(asked), &json!({"speculative.n_max": 0}));
            assert_eq!(plain, (answer, None), "{flags}: {asked}");
        }
        // A request's own word counts more than the server's.
        let body = json!({
            "messages": user("Hi"), "chat_template_kwargs": {"enable_thinking": has_empty_thought},
        });
        let other = server.ok("/apply-template", &body)["prompt"].clone();
        assert_eq!(other.as_str().unwrap_or_default().contains("</think>"), !has_empty_thought, "{flags}");
    }
}

#[test]
fn a_developer_is_a_system() {
    let server = Server::shared("-np 2");
    let prompt = |role: &str| {
        let messages = json!([{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]);
        server.ok("/apply-template", &json!({"messages": messages}))["prompt"].clone()
    };
    assert_eq!(prompt("developer"), prompt("system"));
}

#[test]
fn who_answered() {
    let server = Server::shared("-np 2");
    let reply = server.ok("/v1/chat/completions", &chat_body(user("Hi"), &json!({"max_tokens": 4})));
    assert_eq!(reply["system_fingerprint"], server.get("/props")["build_info"]);
    let build = reply["system_fingerprint"].as_str().unwrap_or_default();
    assert_eq!(build, concat!("paceline-", env!("PACELINE_BUILD")));
    // In a repository the build names a commit of it; HEAD may have moved on since.
    let git = |args: &[&str]| Command::new("git").args(args).output().is_ok_and(|ran| ran.status.success());
    if git(&["rev-parse", "HEAD"]) {
        let commit = build.strip_prefix(concat!("paceline-", env!("CARGO_PKG_VERSION"), "-"));
        assert!(
            commit.is_some_and(|commit| git(&["cat-file", "-e", &format!("{commit}^{{commit}}")])),
            "{build}"
        );
    }
    let models = server.get("/v1/models");
    assert_eq!(reply["model"], models["data"][0]["id"]);
    let timings = reply["timings"].as_object().cloned().unwrap_or_default();
    for name in ["cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms"] {
        assert!(timings.get(name).is_some_and(Value::is_number), "{name} in {timings:?}");
    }
}
