//! Clients that go away, signals, and the end.

use std::{
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    ask::{ASKED, chat, chat_body, chat_prompt, native, native_body, native_stream, together, user, with},
    http::{Event, Reply},
    server::Server,
};

/// An answer that nobody will ever see the end of.
fn endless() -> Value {
    native_body(
        chat_prompt(ASKED[2]),
        &json!({"stream": true, "n_predict": 100_000, "ignore_eos": true, "n_probs": 0}),
    )
}

/// Begins an answer and leaves after its `n`-th event.
fn leave_after(server: &Server, path: &str, body: &Value, n: usize) {
    let events: Vec<Event> = server.stream(path, body).take(n).collect::<Result<_, _>>().expect("a stream");
    assert_eq!(events.len(), n, "the stream ended too soon");
}

#[test]
fn clients_that_leave_in_the_middle() {
    let server = Server::start("-np 2 -c 262144");
    let want = native(&server, chat_prompt(ASKED[0]), &json!({}));
    let endless_chat =
        chat_body(user(ASKED[2]), &json!({"stream": true, "max_tokens": 100_000, "ignore_eos": true}));
    for i in 0..20 {
        match i % 4 {
            0 => leave_after(&server, "/v1/chat/completions", &endless_chat, 1 + i / 4),
            // Before there is anything to read.
            1 => drop(server.send("/completion", &endless())),
            // Without a stream there is nothing to see until the end.
            2 => drop(
                server.send("/v1/chat/completions", &with(endless_chat.clone(), &json!({"stream": false}))),
            ),
            _ => leave_after(&server, "/completion", &endless(), 1 + i / 4),
        }
    }
    let took = server.wait_until_idle();
    assert!(took < Duration::from_secs(1), "slots were busy for {took:?}");
    assert_eq!(server.metric("llamacpp:requests_processing"), 0.0);
    assert_eq!(native(&server, chat_prompt(ASKED[0]), &json!({})), want);
    server.assert_clean();
}

/// Others in the batch notice nothing of one that leaves.
#[test]
fn neighbours_of_clients_that_leave() {
    let server = Server::start("-np 4 -c 65536");
    let more = json!({"temperature": 0.8, "n_predict": 64});
    let want = native(&server, chat_prompt(ASKED[2]), &more);
    let got = together(
        (0..4)
            .map(|i| -> Box<dyn FnOnce() -> _ + Send> {
                let (server, more) = (&server, &more);
                match i {
                    0 | 1 => Box::new(move || Some(native_stream(server, chat_prompt(ASKED[2]), more))),
                    _ => Box::new(move || {
                        (1..6).for_each(|n| leave_after(server, "/completion", &endless(), n));
                        None
                    }),
                }
            })
            .collect(),
    );
    assert_eq!(got, [Some(want.clone()), Some(want), None, None]);
    server.wait_until_idle();
    server.assert_clean();
}

#[test]
fn a_slot_is_free_right_after_its_client_left() {
    let server = Server::start("-np 1 -c 262144");
    leave_after(&server, "/completion", &endless(), 3);
    let n_step = server.metric("llamacpp:n_decode_total");
    let begin = Instant::now();
    server.wait_until_idle();
    let took = begin.elapsed();
    let n_step = server.metric("llamacpp:n_decode_total") - n_step;
    // The steps are those that ran while this test looked; a slot that was not given up would have thousands to do.
    assert!(n_step < 50.0 && took < Duration::from_millis(500), "{n_step} steps and {took:?}");
    native(&server, chat_prompt(ASKED[0]), &json!({"n_predict": 1}));
    assert_eq!(server.metric("paceline:requests_cancelled_total"), 1.0);
    server.assert_clean();
}

#[test]
fn sigpipe_kills_nothing() {
    let server = Server::start("-np 2 -c 8192");
    let want = native(&server, chat_prompt(ASKED[0]), &json!({}));
    let mut stream = server.stream("/completion", &endless());
    for _ in 0..10 {
        server.signal("PIPE");
        assert!(matches!(stream.next(), Some(Ok(Event::Data(_)))), "the stream goes on");
    }
    drop(stream);
    for n in 1..=10 {
        leave_after(&server, "/completion", &endless(), n % 3);
        server.signal("PIPE");
    }
    assert_eq!(native(&server, chat_prompt(ASKED[0]), &json!({})), want);
    server.wait_until_idle();
    server.assert_clean();
}

/// What can be finished in time is finished, word for word; then the process ends as if nothing had been.
#[test]
fn sigterm_lets_answers_finish() {
    let server = Server::start("-np 2");
    let body =
        native_body(chat_prompt(ASKED[2]), &json!({"stream": true, "n_predict": 64, "speculative.n_max": 0}));
    let want = native(&server, chat_prompt(ASKED[2]), &json!({"n_predict": 64})).0;
    let mut stream = server.stream("/completion", &body);
    let first = stream.next().expect("an event").expect("an event");
    server.signal("TERM");
    let rest: Vec<Event> = stream.collect::<Result<_, _>>().expect("a stream that ends cleanly");
    let text: String = std::iter::once(&first).chain(&rest).fold(String::new(), |text, event| match event {
        Event::Data(chunk) => text + chunk["content"].as_str().unwrap_or_default(),
        Event::Done => text,
    });
    assert_eq!(text, want.text);
    assert!(matches!(rest.last(), Some(Event::Data(chunk)) if chunk["stop"] == true));
    assert!(server.wait(Duration::from_secs(5)).success());
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Server::start("-np 1 -c 262144");
    let running = server.stream("/completion", &endless());
    // Fill the queue, as far as it goes; what does not fit is answered at once.
    let mut waiting: Vec<TcpStream> = Vec::new();
    let refused = loop {
        assert!(waiting.len() < 2000, "the queue has no bound");
        let stream = server.send("/completion", &endless());
        let n_want = (waiting.len() + 1) as f64;
        let is_refused = loop {
            if server.metric("paceline:requests_refused_total") > 0.0 {
                break true;
            }
            if server.metric("llamacpp:requests_deferred") >= n_want {
                break false;
            }
            thread::sleep(Duration::from_millis(1));
        };
        if is_refused {
            break stream;
        }
        waiting.push(stream);
    };
    let mut reply = Reply::read(refused).expect("a reply");
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    let error = reply.json().expect("a JSON body");
    assert_eq!(error["error"]["type"], "unavailable_error");
    assert!(!waiting.is_empty());
    // Those who wait may leave as well.
    drop(waiting);
    drop(running);
    let took = server.wait_until_idle();
    assert!(took < Duration::from_secs(1), "{took:?}");
    chat(&server, user(ASKED[0]), &json!({}));
    server.assert_clean();
}
