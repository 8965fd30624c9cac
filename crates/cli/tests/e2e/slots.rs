//! Several requests at once: each gets the answer, the probabilities and the acceptance that it gets alone.

use std::{thread, time::Duration};

use serde_json::{Value, json};

use crate::{
    ask::{ASKED, Answer, Drafts, chat, chat_prompt, chat_stream, long_prompt, native, together, user},
    server::Server,
};

type Ask<'a> = Box<dyn FnOnce() -> (Answer, Drafts) + Send + 'a>;

/// Chats, as many as there are slots, greedy and seeded, half of them streamed.
fn chats(server: &Server, n: usize, temperature: f64) -> Vec<Ask<'_>> {
    let chat = |i: usize| -> Ask<'_> {
        let more = json!({"temperature": temperature, "seed": 7 + i});
        let asked = user(ASKED[i % ASKED.len()]);
        match i % 2 {
            0 => Box::new(move || chat(server, asked, &more)),
            _ => Box::new(move || chat_stream(server, asked, &more)),
        }
    };
    (0..n).map(chat).collect()
}

/// Small batches on purpose: with 64 rows, `-ub` is less than slots × block from `-np` 5 on, with 512 at `-np` 16 nearly.
#[test]
fn as_many_chats_as_slots() {
    check_slots(
        "--draft-max 15",
        &[(2, ""), (5, "-ub 64"), (8, ""), (8, "-b 256 -ub 64 -cd 256 -kvu"), (16, ""), (16, "-ub 64")],
    );
    check_slots("", &[(16, "")]);
}

/// Servers with so many slots and these flags answer as many chats at once as one with a single slot does in turn.
fn check_slots(drafts: &str, cases: &[(usize, &str)]) {
    let alone = Server::start(&format!("-np 1 {drafts}"));
    let want = [0.0, 0.8].map(|temperature| {
        let want: Vec<_> = chats(&alone, 16, temperature).into_iter().map(|ask| ask()).collect();
        assert!(want.iter().all(|(_, drafted)| drafted.is_some()));
        (temperature, want)
    });
    for (n, flags) in cases {
        let flags = format!("-np {n} {drafts} {flags}");
        let server = Server::start(&flags);
        for (temperature, want) in &want {
            let got = together(chats(&server, *n, *temperature));
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert_eq!(got, want, "`{flags}`, temperature {temperature}, chat {i}");
            }
        }
        let busy = server.metric("llamacpp:n_busy_slots_per_decode");
        assert!(busy > 1.2, "the requests did not meet: {busy} slots per decode with `{flags}`");
        server.wait_until_idle();
        server.assert_clean();
    }
}

/// More requests than slots: the others wait their turn.
#[test]
fn more_requests_than_slots() {
    let server = Server::start("-np 2");
    let want: Vec<_> = chats(&server, 8, 0.8).into_iter().map(|ask| ask()).collect();
    assert_eq!(together(chats(&server, 8, 0.8)), want);
    server.wait_until_idle();
    server.assert_clean();
}

#[test]
fn prompts_drafts_and_plain_decoding_share_batches() {
    let server = Server::start("-np 8 -ub 64");
    let (long, longer) = (long_prompt(&server, 300), long_prompt(&server, 500));
    let asks = || -> Vec<(Duration, Value, Value)> {
        let plain = json!({"speculative.n_max": 0});
        let at = Duration::from_millis;
        vec![
            (at(0), json!(chat_prompt(ASKED[0])), json!({})),
            (at(0), json!(chat_prompt(ASKED[2])), plain.clone()),
            (at(5), json!(long), json!({"temperature": 0.8})),
            (at(10), json!(chat_prompt(ASKED[1])), json!({"speculative.n_max": 4})),
            (at(20), json!(longer), plain),
            (at(40), json!(chat_prompt(ASKED[4])), json!({"temperature": 1.0, "seed": 3})),
            (at(60), json!(long), json!({"n_predict": 1})),
            (at(80), json!(chat_prompt(ASKED[5])), json!({"stop": ["\""]})),
        ]
    };
    let want: Vec<_> = asks().into_iter().map(|(_, prompt, more)| native(&server, prompt, &more)).collect();
    for _ in 0..3 {
        let late = |(delay, prompt, more): (Duration, Value, Value)| -> Ask<'_> {
            let server = &server;
            Box::new(move || {
                thread::sleep(delay);
                native(server, prompt, &more)
            })
        };
        assert_eq!(together(asks().into_iter().map(late).collect()), want);
    }
    assert!(server.metric("llamacpp:n_busy_slots_per_decode") > 1.2);
    server.wait_until_idle();
    server.assert_clean();
}

#[test]
fn which_slot_serves_changes_nothing() {
    let server = Server::shared("-np 8");
    let want = native(&server, chat_prompt(ASKED[0]), &json!({"temperature": 0.8}));
    for slot in (0..8).rev() {
        let got = native(&server, chat_prompt(ASKED[0]), &json!({"temperature": 0.8, "id_slot": slot}));
        assert_eq!(got, want, "slot {slot}");
    }
    // The same requests in the slots in another order.
    let in_slots = |shift: usize| {
        let ask = |i: usize| -> Ask<'_> {
            let server = &server;
            let more = json!({"id_slot": (i + shift) % 8, "temperature": 0.8});
            Box::new(move || native(server, chat_prompt(ASKED[i]), &more))
        };
        together((0..8).map(ask).collect())
    };
    assert_eq!(in_slots(0), in_slots(3));
}
