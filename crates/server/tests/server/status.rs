//! What the server says about itself.

use paceline_testkit::{Accept, oracle};
use serde_json::json;

use crate::{
    client::Connection,
    world::{Setup, World},
};

#[test]
fn health_models_props() {
    let world = World::new();
    for path in ["/health", "/v1/health"] {
        assert_eq!(world.get(path).json(), json!({"status": "ok"}));
    }
    let models = world.get("/v1/models").json();
    assert_eq!(models, world.get("/models").json());
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    assert_eq!(
        models["data"][0]["meta"],
        json!({
            "vocab_type": "gpt2", "n_vocab": 266, "n_ctx": 256, "n_ctx_train": 4096, "n_embd": 4, "n_params": 1000,
            "size": 2000, "ftype": "Q8_0"
        })
    );
    let props = world.get("/props").json();
    assert_eq!((&props["total_slots"], &props["eos_token"]), (&json!(2), &json!("<|im_end|>")));
    assert_eq!(props["default_generation_settings"]["n_ctx"], 256);
    assert_eq!(props["default_generation_settings"]["params"]["top_k"], 40);
    assert!(props["chat_template"].as_str().unwrap().contains("im_start"));
    assert_eq!(props["speculative"]["type"], "none");
}

#[test]
fn slots_and_metrics_with_a_drafter() {
    let world = World::start(Setup {
        drafter: Some(Box::new(|model| Box::new(oracle(model.clone(), 5, Accept::All, 3)))),
        ..Setup::default()
    });
    let slots = world.get("/slots").json();
    assert_eq!(slots.as_array().unwrap().len(), 2);
    assert_eq!(
        slots[0],
        json!({"id": 0, "n_ctx": 256, "speculative": true, "is_processing": false, "n_tokens_kept": 0})
    );
    let reply = world.ok("/completion", json!({"prompt": "abcdef", "n_predict": 31, "ignore_eos": true}));
    assert_eq!(world.metric("llamacpp:prompt_tokens_total"), reply["tokens_evaluated"].as_f64().unwrap());
    assert_eq!(world.metric("llamacpp:tokens_predicted_total"), 31.0);
    let drafted = world.metric("llamacpp:spec_decode_num_draft_tokens_total");
    assert_eq!(reply["timings"]["draft_n"].as_f64(), Some(drafted));
    assert_eq!(world.metric("llamacpp:spec_decode_num_accepted_tokens_total"), drafted);
    assert!(world.metric("llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position=\"0\"}") >= 5.0);
    assert_eq!(world.metric("paceline:drafter_active{type=\"oracle\"}"), 1.0);
    let page = world.get("/metrics");
    assert_eq!(page.header("content-type"), Some("text/plain; version=0.0.4"));
    assert!(page.header("process-start-time-unix").is_some());
    let props = world.get("/props").json();
    assert_eq!(props["speculative"], json!({"type": "oracle", "n_max": 5, "contract": "oracle: a script"}));
}

#[test]
fn pages_can_be_switched_off() {
    let mut setup = Setup::default();
    (setup.server.slots, setup.server.metrics) = (false, false);
    let world = World::start(setup);
    for path in ["/slots", "/metrics"] {
        let reply = world.get(path);
        assert_eq!((reply.status, &reply.json()["error"]["type"]), (501, &json!("not_supported_error")));
    }
}

#[test]
fn browsers_are_let_in() {
    let world = World::new();
    let reply =
        Connection::open(world.addr, "OPTIONS", "/v1/chat/completions", &[("Origin", "http://page")], b"")
            .reply();
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (204, Some("http://page")));
    assert_eq!(world.get("/health").header("access-control-allow-origin"), Some("*"));
}
