//! Speculated = plain: the drafter may change how fast an answer comes, and nothing else.

use serde_json::{Value, json};

use crate::{
    ask::{
        ASKED, chat, chat_prompt, chat_stream, drafts, native, native_body, native_stream, of_native, user,
    },
    server::Server,
};

/// Fields that turn speculation off for a request.
fn plain(mut more: Value) -> Value {
    more["speculative.n_max"] = 0.into();
    more
}

#[test]
fn the_first_request_after_a_start() {
    for flags in ["-np 1", "-np 2", "-np 8 --no-warmup"] {
        let server = Server::start(flags);
        // The empty run before the first request leaves nothing behind either.
        server.assert_clean();
        let (first, drafted) = native(&server, chat_prompt(ASKED[0]), &json!({}));
        assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{flags}: {drafted:?}");
        assert_eq!(native(&server, chat_prompt(ASKED[0]), &plain(json!({}))), (first, None), "{flags}");
        server.assert_clean();
    }
}

#[test]
fn an_answer_is_the_same_with_and_without_a_drafter() {
    let server = Server::shared("-np 2");
    let without = Server::start("-np 2 --spec-type none");
    let mut n = (0, 0);
    for asked in ASKED {
        for more in [
            json!({}),
            json!({"temperature": 0.8}),
            json!({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "n_probs": 8}),
            json!({"temperature": 0.8, "repeat_penalty": 1.2, "presence_penalty": 0.3, "dry_multiplier": 0.8}),
        ] {
            let (answer, drafted) = native(&server, chat_prompt(asked), &more);
            assert!(drafted.is_some(), "{asked} {more}");
            n = drafted.map_or(n, |(drafted, accepted)| (n.0 + drafted, n.1 + accepted));
            assert_eq!(native(&without, chat_prompt(asked), &more), (answer.clone(), None), "{asked} {more}");
            assert_eq!(native(&server, chat_prompt(asked), &plain(more)), (answer, None), "{asked}");
        }
    }
    assert!(n.1 * 10 > n.0, "the bundled drafter is right more often than {} of {} times", n.1, n.0);
}

#[test]
fn chats_and_streams_are_the_same_too() {
    let server = Server::shared("-np 2");
    for (asked, more) in [(ASKED[0], json!({})), (ASKED[2], json!({"temperature": 0.8}))] {
        let whole = chat(&server, user(asked), &more);
        assert!(whole.1.is_some());
        assert_eq!(chat_stream(&server, user(asked), &more), whole, "{asked}");
        assert_eq!(chat(&server, user(asked), &plain(more.clone())), (whole.0.clone(), None), "{asked}");
        assert_eq!(chat_stream(&server, user(asked), &plain(more.clone())), (whole.0, None), "{asked}");
        let whole = native(&server, chat_prompt(asked), &more);
        assert_eq!(native_stream(&server, chat_prompt(asked), &more), whole, "{asked}");
    }
}

#[test]
fn chat_and_completion_speculate_alike() {
    let server = Server::shared("-np 2");
    for asked in &ASKED[..4] {
        let prompt = server.ok("/apply-template", &json!({"messages": user(asked)}))["prompt"].clone();
        for more in [json!({}), json!({"temperature": 0.8})] {
            let (chat, chat_drafts) = chat(&server, user(asked), &more);
            let (native, native_drafts) = native(&server, prompt.clone(), &more);
            assert!(chat_drafts.is_some());
            assert_eq!(chat_drafts, native_drafts, "{asked}");
            assert_eq!((chat.n_prompt, chat.n_predicted), (native.n_prompt, native.n_predicted), "{asked}");
            // A chat does not show the token that ended it.
            let shown: Vec<&Value> = native.tokens.as_array().into_iter().flatten().collect();
            let chat_shown: Vec<&Value> = chat.tokens.as_array().into_iter().flatten().collect();
            assert_eq!(chat_shown, shown[..chat_shown.len()], "{asked}");
            assert!(shown.len() - chat_shown.len() <= 1, "{asked}");
        }
    }
}

#[test]
fn five_identical_prompts_in_a_row() {
    for flags in ["-np 1", "-np 2", "-np 4", "-np 8"] {
        let server = Server::start(flags);
        let first = native(&server, chat_prompt(ASKED[0]), &json!({}));
        assert!(first.1.is_some_and(|(_, accepted)| accepted > 0), "{flags}: {:?}", first.1);
        for _ in 0..4 {
            assert_eq!(native(&server, chat_prompt(ASKED[0]), &json!({})), first, "{flags}");
        }
        let uncached = native(&server, chat_prompt(ASKED[0]), &json!({"cache_prompt": false}));
        assert_eq!(uncached, first, "{flags}");
    }
}

#[test]
fn drafts_of_every_length() {
    let server = Server::start("-np 1 --draft-max 16");
    let want = native(&server, chat_prompt(ASKED[0]), &json!({"speculative.n_max": 0})).0;
    for n_max in 1..=16 {
        let reply = server.ok(
            "/completion",
            &native_body(chat_prompt(ASKED[0]), &json!({"speculative": {"n_max": n_max}})),
        );
        let (answer, drafted) = of_native(&reply);
        assert_eq!(answer, want, "{n_max}");
        assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{n_max}: {drafted:?}");
        let longest = reply["speculative"]["by_position"].as_array().map_or(0, Vec::len);
        assert_eq!(longest, n_max.min(15), "a block of 16 drafts up to 15 tokens");
    }
}

#[test]
fn no_more_tokens_than_asked_for() {
    let server = Server::shared("-np 2");
    let (long, _) = native(&server, chat_prompt(ASKED[0]), &json!({}));
    for n in [1, 2, 3, 7, 16, 17] {
        let (answer, _) = native(&server, chat_prompt(ASKED[0]), &json!({"n_predict": n}));
        assert_eq!((answer.n_predicted, answer.ending.0.as_str()), (n, "limit"));
        let long: Vec<Value> =
            long.tokens.as_array().into_iter().flatten().take(n as usize).cloned().collect();
        assert_eq!(answer.tokens, Value::from(long), "{n}");
        let (answer, _) = chat(&server, user(ASKED[0]), &json!({"max_tokens": n}));
        assert_eq!((answer.n_predicted, answer.ending.0.as_str()), (n, "length"));
    }
}

#[test]
fn stop_strings_inside_accepted_runs() {
    let server = Server::shared("-np 2");
    let (whole, drafted) = native(&server, chat_prompt(ASKED[0]), &json!({}));
    // Runs this long leave no cut outside of one.
    assert!(drafted.is_some_and(|(_, accepted)| accepted * 2 > whole.n_predicted), "{drafted:?}");
    let places: Vec<usize> = whole.text.char_indices().map(|(at, _)| at).collect();
    let mut n_cut = 0;
    for begin in places.iter().step_by(5) {
        let stop: String = whole.text[*begin..].chars().take(3).collect();
        let Some(at) = whole.text.find(&stop) else { continue };
        let more = json!({"stop": ["unlikely", stop]});
        let (want, _) = native(&server, chat_prompt(ASKED[0]), &plain(more.clone()));
        assert_eq!(
            (want.text.as_str(), &want.ending),
            (&whole.text[..at], &("word".to_owned(), stop)),
            "{more}"
        );
        // Not a token more than without drafts, although the accepted run went on.
        assert_eq!(native(&server, chat_prompt(ASKED[0]), &more).0, want, "{more}");
        assert_eq!(native_stream(&server, chat_prompt(ASKED[0]), &more).0, want, "{more}");
        n_cut += 1;
    }
    assert!(n_cut > 5, "the text is too short to be cut: {:?}", whole.text);
}

/// Long, random and without a known end: where states that drifted apart would have turned to gibberish.
#[test]
fn a_thousand_tokens_at_temperature_one() {
    let server = Server::shared("-np 2");
    let more = json!({"temperature": 1.0, "top_k": 64, "top_p": 0.95, "n_predict": 1024, "ignore_eos": true});
    let (answer, drafted) = native(&server, chat_prompt(ASKED[2]), &more);
    assert_eq!(answer.n_predicted, 1024);
    assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{drafted:?}");
    assert_eq!(native(&server, chat_prompt(ASKED[2]), &plain(more)), (answer, None));
}

/// The same, greedy.
#[test]
fn five_hundred_tokens_greedy() {
    let server = Server::shared("-np 2");
    let more = json!({"n_predict": 512, "ignore_eos": true});
    let reply = server.ok("/completion", &native_body(chat_prompt(ASKED[2]), &more));
    let timings = reply["timings"].as_object().cloned().unwrap_or_default();
    for name in ["prompt_ms", "prompt_per_second", "predicted_ms", "predicted_per_second"] {
        assert!(timings.get(name).and_then(Value::as_f64) > Some(0.0), "{name} in {timings:?}");
    }
    let (answer, drafted) = of_native(&reply);
    assert_eq!((answer.n_predicted, answer.ending.0.as_str()), (512, "limit"));
    assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{drafted:?}");
    assert_eq!(native(&server, chat_prompt(ASKED[2]), &plain(more)), (answer, None));
}

/// What a drafter keeps is there while a request runs, and without a drafter never is; its file is not even opened.
#[test]
fn no_memory_of_a_drafter_without_one() {
    for (flags, is_there) in [("-np 1", true), ("-np 1 --spec-type none -md /no/such/drafter.gguf", false)] {
        let server = Server::start(flags);
        let more = json!({"n_predict": 2000, "ignore_eos": true, "stream": true});
        let mut events = server.stream("/completion", &native_body(chat_prompt(ASKED[2]), &more));
        assert!(events.next().is_some_and(|event| event.is_ok()));
        assert!(server.metric("paceline:kv_pages") > 0.0, "the answer is under way");
        let bytes = server.metric("paceline:drafter_memory_bytes");
        assert_eq!(bytes > 0.0, is_there, "`{flags}`: {bytes}");
        // Steps enough for a millisecond of drafting.
        assert_eq!(events.by_ref().take(100).filter(|event| event.is_ok()).count(), 100);
        drop(events);
        server.wait_until_idle();
        assert_eq!(server.metric("paceline:spec_draft_seconds_total") > 1e-3, is_there, "`{flags}`");
        server.assert_clean();
    }
}

/// Flags that people give to other servers, some of which change nothing here.
#[test]
fn the_command_lines_that_people_have() {
    let flags = "-np 2 -c 8192 -cd 256 -b 256 -ub 64 -ngl 99 -ngld 99 -fa on --jinja --spec-type draft-dflash \
                 --draft-max 4 --draft-p-min 0.75 -ot token_embd.weight=CUDA0 --no-cache-prompt --no-cache-idle-slots";
    let (server, usual) = (Server::start(flags), Server::shared("-np 2"));
    let reply = server.ok("/completion", &native_body(chat_prompt(ASKED[0]), &json!({})));
    let longest = reply["speculative"]["by_position"].as_array().map_or(0, Vec::len);
    assert_eq!(longest, 4, "{}", reply["speculative"]);
    let usual = native(&usual, chat_prompt(ASKED[0]), &json!({"speculative.n_max": 4}));
    assert_eq!(of_native(&reply), usual);
}

#[test]
fn what_speculation_did_is_said() {
    let server = Server::shared("-np 2");
    let body = |more: Value| native_body(chat_prompt(ASKED[0]), &more);
    let on = server.ok("/completion", &body(json!({})));
    assert_eq!(on["speculative"]["state"], "active");
    let accept_len = on["speculative"]["accept_len"].as_f64().unwrap_or_default();
    assert!(accept_len > 1.5, "{accept_len}");
    for off in [json!({"speculative.n_max": 0}), json!({"speculative": false})] {
        let off = server.ok("/completion", &body(off));
        assert_eq!((&off["speculative"]["state"], drafts(&off)), (&json!("off_by_request"), None));
    }
    assert_eq!(server.get("/props")["speculative"]["type"], "dflash");
    assert_eq!(server.get("/slots")[0]["speculative"], true);
    assert_eq!(server.metric("paceline:drafter_active{type=\"dflash\"}"), 1.0);
    for stage in ["draft", "verify", "commit"] {
        assert!(server.metric(&format!("paceline:spec_{stage}_seconds_total")) > 0.0, "{stage}");
    }
    let accepted = server.metric("llamacpp:spec_decode_num_accepted_tokens_total");
    assert!(accepted > 0.0 && accepted <= server.metric("llamacpp:spec_decode_num_draft_tokens_total"));

    let without = Server::start("--spec-type none");
    let reply = without.ok("/completion", &body(json!({})));
    assert_eq!((&reply["speculative"]["state"], drafts(&reply)), (&json!("no_drafter"), None));
    assert_eq!(without.get("/props")["speculative"]["type"], "none");
    assert_eq!(without.get("/slots")[0]["speculative"], false);
    assert_eq!(without.metric("paceline:drafter_active{type=\"none\"}"), 0.0);
    assert_eq!(without.metric("llamacpp:spec_decode_num_draft_tokens_total"), 0.0);
}

/// How much is drafted follows the clock; the answers do not.
#[test]
fn planning_changes_no_answer() {
    let fixed = Server::shared("-np 2");
    for flags in ["-np 2", "-np 2 --spec-type dflash,ngram-simple"] {
        let server = Server::planning(flags);
        for more in [json!({}), json!({"temperature": 0.8, "n_predict": 300, "ignore_eos": true})] {
            let reply = server.ok("/completion", &native_body(chat_prompt(ASKED[2]), &more));
            let (answer, _) = of_native(&reply);
            assert_eq!(native(&fixed, chat_prompt(ASKED[2]), &more).0, answer, "{flags} {more}");
            let state = reply["speculative"]["state"].as_str().unwrap_or_default();
            assert!(["active", "resting"].contains(&state), "{}", reply["speculative"]);
        }
        server.assert_clean();
    }
}
