//! Whole replies: what they say is what the model says alone, in the fields that clients read.

use std::sync::atomic::AtomicUsize;

use paceline_testkit::{Accept, HashKind, HashModel, Lie, liar, oracle};
use serde_json::{Value, json};

use crate::world::{Setup, World, encode};

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

const CHAT_HI: &str = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("no object: {value}")).keys().map(String::as_str).collect()
}

fn with_oracle(accept: Accept) -> World {
    World::start(Setup {
        drafter: Some(Box::new(move |model| Box::new(oracle(model.clone(), 5, accept, 3)))),
        ..Setup::default()
    })
}

#[test]
fn a_chat() {
    let world = World::new();
    let reply =
        world.ok("/v1/chat/completions", json!({"messages": user("hi"), "seed": 5, "max_tokens": 40}));
    let alone = world.alone(CHAT_HI, |r| (r.sampling.seed, r.n_predict) = (5, Some(40)));
    assert_eq!(reply["choices"][0]["message"]["content"], alone.text);
    assert_eq!(
        keys(&reply),
        [
            "choices",
            "created",
            "model",
            "system_fingerprint",
            "object",
            "id",
            "usage",
            "timings",
            "speculative"
        ]
    );
    let id = reply["id"].as_str().unwrap().strip_prefix("chatcmpl-").unwrap();
    assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_alphanumeric()), "{id}");
    assert_eq!((&reply["object"], &reply["model"]), (&json!("chat.completion"), &json!("tiny")));
    let n_prompt = encode(CHAT_HI).len();
    let usage = &reply["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"]),
        (&json!(n_prompt), &json!(alone.tokens.len()))
    );
    assert_eq!(usage["total_tokens"], json!(n_prompt + alone.tokens.len()));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let timings = &reply["timings"];
    assert_eq!(
        keys(timings),
        [
            "cache_n",
            "prompt_n",
            "prompt_ms",
            "prompt_per_token_ms",
            "prompt_per_second",
            "predicted_n",
            "predicted_ms",
            "predicted_per_token_ms",
            "predicted_per_second"
        ],
        "no draft keys where nothing was drafted"
    );
    assert_eq!(
        (&timings["prompt_n"], &timings["predicted_n"]),
        (&json!(n_prompt), &json!(alone.tokens.len()))
    );
    assert_eq!(reply["speculative"]["state"], "no_drafter");
}

#[test]
fn a_native_completion() {
    let world = World::new();
    let body = json!({"prompt": "the sea", "seed": 9, "n_predict": 30, "return_tokens": true});
    let reply = world.ok("/completion", body);
    let alone = world.alone("the sea", |r| (r.sampling.seed, r.n_predict) = (9, Some(30)));
    assert_eq!(reply["content"], alone.text);
    assert_eq!(reply["tokens"], json!(alone.tokens));
    assert_eq!(
        keys(&reply),
        [
            "index",
            "content",
            "tokens",
            "id_slot",
            "stop",
            "model",
            "tokens_predicted",
            "tokens_evaluated",
            "generation_settings",
            "prompt",
            "has_new_line",
            "truncated",
            "stop_type",
            "stopping_word",
            "tokens_cached",
            "timings",
            "speculative"
        ]
    );
    assert_eq!((&reply["prompt"], &reply["stop"]), (&json!("the sea"), &json!(true)));
    assert_eq!(reply["generation_settings"]["seed"], 9);
}

#[test]
fn the_drafter_changes_figures_and_nothing_else() {
    let plain = World::new();
    for (seed, accept) in
        [Accept::All, Accept::Exactly(0), Accept::Exactly(2), Accept::Varying].into_iter().enumerate()
    {
        let drafting = with_oracle(accept);
        let body = json!({
            "prompt": "once upon", "seed": seed, "n_predict": 60, "n_probs": 3, "ignore_eos": true, "return_tokens": true
        });
        let (want, got) = (plain.ok("/completion", body.clone()), drafting.ok("/completion", body.clone()));
        for key in ["content", "tokens", "completion_probabilities", "stop_type", "tokens_predicted"] {
            assert_eq!(got[key], want[key], "{key} with {accept:?}");
        }
        let (n, accepted) = (&got["timings"]["draft_n"], &got["timings"]["draft_n_accepted"]);
        let accepted = accepted.as_u64().unwrap();
        assert!(n.as_u64().unwrap() >= accepted && (accepted > 0) == (accept != Accept::Exactly(0)), "{got}");
        let speculative = &got["speculative"];
        if accept == Accept::All {
            assert_eq!(speculative["state"], "active");
            assert!(speculative["accept_len"].as_f64().unwrap() > 4.0, "{speculative}");
            assert_eq!(
                speculative["by_position"][0]["draft_n"],
                speculative["by_position"][0]["draft_n_accepted"]
            );
        }
        for off in [
            json!({"speculative.n_max": 0}),
            json!({"speculative": false}),
            json!({"speculative": {"n_max": 0}}),
        ] {
            let mut body = body.clone();
            body.as_object_mut().unwrap().extend(off.as_object().unwrap().clone());
            let reply = drafting.ok("/completion", body);
            assert_eq!(
                (&reply["content"], &reply["speculative"]["state"]),
                (&want["content"], &json!("off_by_request"))
            );
            assert!(reply["timings"].get("draft_n").is_none());
        }
    }
}

#[test]
fn a_drafter_that_fails_is_named() {
    let world = World::start(Setup {
        drafter: Some(Box::new(|model| Box::new(liar(model.clone(), 5, &[Lie::OutOfRange], 3)))),
        ..Setup::default()
    });
    let reply = world.ok("/completion", json!({"prompt": "a", "n_predict": 9, "ignore_eos": true}));
    assert_eq!(reply["speculative"]["state"], "faulted");
    assert!(reply["speculative"]["reason"].as_str().unwrap().contains("vocabulary"), "{reply}");
    assert!(world.metric("paceline:unusable_drafts_total") >= 1.0);
}

#[test]
fn seeds_repeat_and_choices_differ() {
    let world = World::new();
    let body = |seed: Value, n: u32| json!({"prompt": "abc", "seed": seed, "max_tokens": 25, "n": n});
    let text = |reply: &Value, i: usize| reply["choices"][i]["text"].as_str().unwrap().to_owned();
    let first = world.ok("/v1/completions", body(json!(5), 1));
    assert_eq!(text(&first, 0), text(&world.ok("/v1/completions", body(json!(5), 1)), 0));
    let two = world.ok("/v1/completions", body(json!(5), 2));
    assert_eq!(text(&two, 0), text(&first, 0));
    assert_eq!(text(&two, 1), text(&world.ok("/v1/completions", body(json!(6), 1)), 0), "the seed after");
    assert_eq!(two["usage"]["prompt_tokens"], first["usage"]["prompt_tokens"], "one prompt, counted once");
    // A random seed is reported, and gives the same again.
    let any = world.ok("/completion", json!({"prompt": "abc", "n_predict": 25}));
    let seed = any["generation_settings"]["seed"].clone();
    let again = world.ok("/completion", json!({"prompt": "abc", "n_predict": 25, "seed": seed}));
    assert_eq!(any["content"], again["content"]);
    let other = world.ok("/completion", json!({"prompt": "abc", "n_predict": 1, "seed": -1}));
    assert_ne!(other["generation_settings"]["seed"], any["generation_settings"]["seed"]);
}

#[test]
fn probabilities_sum_to_one() {
    let world = with_oracle(Accept::Varying);
    let body = json!({"prompt": "x", "seed": 1, "n_predict": 12, "n_probs": 266, "ignore_eos": true});
    let reply = world.ok("/completion", body);
    let entries = reply["completion_probabilities"].as_array().unwrap();
    assert_eq!(entries.len(), 12);
    for entry in entries {
        assert_eq!(keys(entry), ["id", "token", "bytes", "logprob", "top_logprobs"]);
        let top = entry["top_logprobs"].as_array().unwrap();
        let sum: f64 = top.iter().map(|t| t["logprob"].as_f64().unwrap().exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
        let own = top.iter().find(|t| t["id"] == entry["id"]).unwrap();
        assert_eq!(own["logprob"], entry["logprob"]);
    }
    let body = json!({"prompt": "x", "seed": 1, "n_predict": 5, "n_probs": 266, "post_sampling_probs": true, "ignore_eos": true});
    for entry in world.ok("/completion", body)["completion_probabilities"].as_array().unwrap() {
        assert_eq!(keys(entry), ["id", "token", "bytes", "prob", "top_probs"]);
        let sum: f64 =
            entry["top_probs"].as_array().unwrap().iter().map(|t| t["prob"].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
    }
}

#[test]
fn logprobs_in_openais_forms() {
    let world = World::new();
    let body = json!({"messages": user("hi"), "seed": 5, "max_tokens": 6, "logprobs": true, "top_logprobs": 2, "ignore_eos": true});
    let reply = world.ok("/v1/chat/completions", body);
    let content = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 6);
    assert!(content.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 2 && t["logprob"].as_f64().unwrap() < 0.0));
    let body =
        json!({"messages": user("hi"), "seed": 5, "max_tokens": 6, "logprobs": true, "ignore_eos": true});
    let bare = world.ok("/v1/chat/completions", body);
    let bare = &bare["choices"][0]["logprobs"]["content"][0];
    assert_eq!((&bare["logprob"], &bare["top_logprobs"]), (&content[0]["logprob"], &json!([])));
    let body = json!({"prompt": "hi", "seed": 5, "max_tokens": 6, "logprobs": 2, "ignore_eos": true});
    let legacy = &world.ok("/v1/completions", body)["choices"][0]["logprobs"];
    assert_eq!(keys(legacy), ["tokens", "token_logprobs", "top_logprobs", "text_offset"]);
    assert_eq!((legacy["tokens"].as_array().unwrap().len(), &legacy["text_offset"][0]), (6, &json!(0)));
}

#[test]
fn answers_end_for_a_reason() {
    let world = World::new();
    let free = world.alone("story", |r| (r.sampling.seed, r.n_predict, r.ignore_eos) = (2, Some(40), true));
    let word: String = free.text.chars().skip(8).take(3).collect();
    let want = free.text.split(&word).next().unwrap();
    let body = json!({"prompt": "story", "seed": 2, "n_predict": 40, "ignore_eos": true, "stop": ["never this", word]});
    let reply = world.ok("/completion", body.clone());
    assert_eq!(
        (&reply["content"], &reply["stop_type"], &reply["stopping_word"]),
        (&json!(want), &json!("word"), &json!(word))
    );
    let chat = world.ok("/v1/completions", body);
    assert_eq!(
        (&chat["choices"][0]["text"], &chat["choices"][0]["finish_reason"]),
        (&json!(want), &json!("stop"))
    );

    let reply = world.ok("/completion", json!({"prompt": "story", "n_predict": 3, "ignore_eos": true}));
    assert_eq!((&reply["stop_type"], &reply["tokens_predicted"]), (&json!("limit"), &json!(3)));
    let reply = world.ok("/completion", json!({"prompt": "z".repeat(250), "ignore_eos": true}));
    assert_eq!(
        (&reply["stop_type"], &reply["truncated"]),
        (&json!("limit"), &json!(true)),
        "the context is full"
    );
    let end = json!({"prompt": "story", "logit_bias": [["<|im_end|>", 100]]});
    assert_eq!(world.ok("/completion", end.clone())["stop_type"], "eos");
    assert_eq!(world.ok("/v1/completions", end)["choices"][0]["finish_reason"], "stop");
    let reply = world.ok("/completion", json!({"prompt": "story", "n_predict": 0, "return_tokens": true}));
    assert_eq!(
        (&reply["content"], &reply["tokens"], &reply["tokens_predicted"]),
        (&json!(""), &json!([]), &json!(0))
    );
}

#[test]
fn bytes_that_are_no_text_fail_nothing() {
    let world = World::new();
    let body = json!({"prompt": "a", "n_predict": 3, "logit_bias": {"195": 100}});
    assert_eq!(world.ok("/completion", body.clone())["content"], "\u{fffd}\u{fffd}\u{fffd}");
    let chat = json!({"messages": user("a"), "max_tokens": 3, "logit_bias": {"195": 100}});
    assert_eq!(
        world.ok("/v1/chat/completions", chat)["choices"][0]["message"]["content"],
        "\u{fffd}\u{fffd}\u{fffd}"
    );
}

#[test]
fn several_prompts() {
    let world = World::new();
    let alone = |text| world.alone(text, |r| (r.sampling.seed, r.n_predict) = (4, Some(10))).text;
    let body = json!({"prompt": ["one", "two", [116, 119, 111]], "seed": 4, "n_predict": 10});
    let replies = world.ok("/completion", body.clone());
    let contents: Vec<&Value> = replies.as_array().unwrap().iter().map(|r| &r["content"]).collect();
    assert_eq!(contents, [&json!(alone("one")), &json!(alone("two")), &json!(alone("two"))]);
    let choices = world.ok("/v1/completions", body);
    assert_eq!(choices["choices"][2]["text"], replies[2]["content"]);
}

#[test]
fn fields_may_be_chosen() {
    let world = World::new();
    let body = json!({"prompt": "a", "n_predict": 1, "response_fields": ["content", "generation_settings/n_predict", "nope"]});
    assert_eq!(keys(&world.ok("/completion", body)), ["content", "generation_settings/n_predict"]);
}

#[test]
fn thoughts_are_told_apart() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}\
                    <think></think>{% endif %}{% endif %}";
    let n_prompt = std::sync::Arc::new(AtomicUsize::new(0));
    let world = World::start(Setup {
        model: HashModel::new(7, HashKind::Attention),
        parrot: Some((n_prompt.clone(), "<think>so it is</think>\n\nYes.")),
        template: Some(template),
        ..Setup::default()
    });
    let ask = |more: Value| {
        let mut body = json!({"messages": user("zz")});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let prompt = world.ok("/apply-template", body.clone())["prompt"].as_str().unwrap().to_owned();
        n_prompt.store(encode(&prompt).len(), std::sync::atomic::Ordering::Relaxed);
        (prompt, world.ok("/v1/chat/completions", body)["choices"][0]["message"].clone())
    };
    let (_, message) = ask(json!({}));
    assert_eq!(message, json!({"role": "assistant", "content": "Yes.", "reasoning_content": "so it is"}));
    let (_, message) = ask(json!({"reasoning_format": "none"}));
    assert_eq!(message["content"], "<think>so it is</think>\n\nYes.");
    let (prompt, _) = ask(json!({"chat_template_kwargs": {"enable_thinking": false}}));
    assert!(prompt.ends_with("<assistant><think></think>"), "{prompt}");
    let prefilled = json!([{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "Well, "}]);
    let (prompt, _) = ask(json!({ "messages": prefilled }));
    assert_eq!(prompt, "<system>d\n<user>u\n<assistant><think></think>Well, ");
}

#[test]
fn text_tools() {
    let world = World::new();
    let tokens = world.ok("/tokenize", json!({"content": "the é<|im_end|>"}));
    assert_eq!(tokens, json!({"tokens": encode("the é<|im_end|>")}));
    assert_eq!(world.ok("/detokenize", tokens)["content"], "the é<|im_end|>");
    let pieces = world.ok("/tokenize", json!({"content": "z€", "with_pieces": true}));
    assert_eq!(pieces["tokens"][0], json!({"id": 122, "piece": "z"}));
    assert_eq!(pieces["tokens"][2], json!({"id": 172, "piece": [172]}), "half a character is bytes");
    assert_eq!(world.ok("/apply-template", json!({"messages": user("hi")}))["prompt"], CHAT_HI);
}
