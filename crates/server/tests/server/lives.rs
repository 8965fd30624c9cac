//! Clients that leave, queues that fill, engines that break, servers that stop.

use std::{
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::world::{POISON, Setup, World};

/// A model that takes its time, so that there is a middle to leave in.
fn slow(n_slot: usize, n_queue_max: usize) -> Setup {
    let mut setup = Setup::default();
    setup.model.delay = Duration::from_millis(4);
    (setup.engine.n_slot, setup.engine.n_queue_max) = (n_slot, n_queue_max);
    setup
}

fn endless(stream: bool) -> Value {
    json!({"prompt": "on and on", "stream": stream, "ignore_eos": true})
}

#[test]
fn hanging_up_frees_the_slot() {
    let world = World::start(slow(1, 8));
    for _ in 0..20 {
        let mut connection = world.open("/completion", &endless(true));
        connection.wait_for("data: ");
    }
    // Not streaming, and waiting for a slot.
    let running = world.open("/completion", &endless(false));
    let waiting = world.open("/v1/completions", &endless(false));
    world.wait_for("llamacpp:requests_deferred", 1.0);
    drop(waiting);
    world.wait_for("llamacpp:requests_deferred", 0.0);
    drop(running);
    world.wait_for("llamacpp:requests_processing", 0.0);
    assert_eq!(world.metric("paceline:requests_cancelled_total"), 22.0);
    assert_eq!((world.metric("paceline:memory_bytes"), world.metric("paceline:kv_pages")), (0.0, 0.0));
    let alone = world.alone("after all", |r| (r.sampling.seed, r.n_predict) = (1, Some(8)));
    assert_eq!(
        world.ok("/completion", json!({"prompt": "after all", "seed": 1, "n_predict": 8}))["content"],
        alone.text
    );
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let world = World::start(slow(1, 1));
    let running = world.open("/completion", &endless(false));
    world.wait_for("llamacpp:requests_processing", 1.0);
    let waiting = world.open("/completion", &endless(false));
    world.wait_for("llamacpp:requests_deferred", 1.0);
    let reply = world.post("/completion", endless(true));
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    assert_eq!(reply.json()["error"]["type"], "unavailable_error");
    assert_eq!(world.get("/slots?fail_on_no_slot=1").status, 503);
    drop((running, waiting));
    world.wait_for("llamacpp:requests_processing", 0.0);
    world.ok("/completion", json!({"prompt": "a", "n_predict": 1}));
}

#[test]
fn as_many_chats_as_slots_and_more() {
    let world = World::start(Setup {
        engine: paceline_engine::EngineConfig { n_slot: 8, n_queue_max: 64, ..Setup::default().engine },
        ..Setup::default()
    });
    let want: Vec<String> = (0..24)
        .map(|i| {
            world.alone(&format!("prompt {}", i % 5), |r| (r.sampling.seed, r.n_predict) = (i, Some(30))).text
        })
        .collect();
    thread::scope(|scope| {
        for (i, want) in want.iter().enumerate() {
            let world = &world;
            scope.spawn(move || {
                let body = json!({"prompt": format!("prompt {}", i % 5), "seed": i, "n_predict": 30});
                assert_eq!(world.ok("/completion", body)["content"], *want, "{i}");
            });
        }
    });
    assert_eq!(world.metric("paceline:requests_done_total"), 24.0);
    assert_eq!(world.metric("paceline:memory_bytes"), 0.0);
}

#[test]
fn a_panic_stays_in_its_step() {
    let world = World::start(slow(2, 8));
    let running = world.open("/completion", &endless(false));
    let mut streaming = world.open("/v1/completions", &endless(true));
    streaming.wait_for("data: ");
    // Next in line is the poison, then three that will still be waiting when it is swallowed.
    let poisoned = world.open("/completion", &json!({ "prompt": format!("{POISON}!") }));
    world.wait_for("llamacpp:requests_deferred", 1.0);
    let patient = |i| world.open("/completion", &json!({"prompt": "patient", "seed": i, "n_predict": 5}));
    let waiting: Vec<_> = (0..3).map(patient).collect();
    world.wait_for("llamacpp:requests_deferred", 4.0);
    drop(streaming);
    let reply = poisoned.reply();
    let error = &reply.json()["error"];
    assert_eq!((reply.status, &error["type"]), (500, &json!("server_error")));
    assert!(error["message"].as_str().unwrap().contains("the poison was found"), "{error}");
    assert_eq!(running.reply().status, 500, "it shared the step");
    for (i, connection) in waiting.into_iter().enumerate() {
        let alone = world.alone("patient", |r| (r.sampling.seed, r.n_predict) = (i as u64, Some(5)));
        let reply = connection.reply();
        assert_eq!(
            (reply.status, &reply.json()["content"]),
            (200, &json!(alone.text)),
            "who waited is not affected"
        );
    }
    assert_eq!(world.metric("paceline:engine_restarts_total"), 1.0);
    assert_eq!(world.get("/health").json(), json!({"status": "ok"}));
    assert_eq!(world.metric("paceline:memory_bytes"), 0.0);
}

#[test]
fn an_engine_that_is_gone_is_said_to_be_gone() {
    let setup = Setup::default();
    let broken = setup.broken.clone();
    let world = World::start(setup);
    broken.store(true, Ordering::Relaxed);
    assert_eq!(world.post("/completion", json!({ "prompt": format!("{POISON}!") })).status, 500);
    assert_eq!(world.metric("paceline:engine_up"), 0.0);
    for reply in [world.get("/health"), world.post("/completion", json!({"prompt": "a", "n_predict": 1}))] {
        let error = reply.json()["error"].clone();
        assert_eq!((reply.status, &error["type"]), (503, &json!("unavailable_error")));
        assert!(error["message"].as_str().unwrap().contains("not today"), "{error}");
    }
    broken.store(false, Ordering::Relaxed);
    let patience = Instant::now() + Duration::from_secs(5);
    while world.post("/completion", json!({"prompt": "a", "n_predict": 1})).status != 200 {
        assert!(Instant::now() < patience, "it does not come back");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(world.get("/health").status, 200);
}

#[test]
fn stopping_lets_answers_finish_within_the_grace() {
    let mut world = World::start(slow(1, 8));
    let mut running = world.open(
        "/v1/completions",
        &json!({"prompt": "x", "max_tokens": 40, "stream": true, "ignore_eos": true}),
    );
    running.wait_for("data: ");
    let waiting = world.open("/completion", &endless(false));
    world.wait_for("llamacpp:requests_deferred", 1.0);
    world.shut_down();
    assert_eq!(waiting.reply().status, 503);
    let rest = running.rest();
    assert!(
        rest.contains("\"finish_reason\":\"length\"")
            && rest.contains("\"predicted_n\":40")
            && rest.contains("[DONE]")
    );
    world.join();
}

#[test]
fn stopping_ends_answers_after_the_grace() {
    let mut setup = slow(1, 8);
    setup.server.shutdown_grace = Duration::from_millis(100);
    setup.engine.n_ctx = 100_000;
    let mut world = World::start(setup);
    let mut running = world.open(
        "/v1/chat/completions",
        &json!({"messages": [{"role": "user", "content": "x"}], "stream": true, "ignore_eos": true}),
    );
    running.wait_for("\"content\"");
    let before = Instant::now();
    world.shut_down();
    let rest = running.rest();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"), "{rest}");
    world.join();
    assert!(before.elapsed() < Duration::from_millis(1900), "{:?}", before.elapsed());
}
