//! `--cache-disk` of a real server: what was computed outlives the memory's budget and the process, and is exact or not used.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    ask::{ASKED, chat_body, long_prompt, native, native_body, of_chat, of_native, together},
    server::Server,
};

fn n_cached(reply: &Value) -> u64 {
    reply["timings"]["cache_n"].as_u64().unwrap_or_default()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

/// Stops a server as an operator does, and waits for its end.
fn stop(server: &Server) {
    server.signal("TERM");
    assert!(server.wait(Duration::from_secs(40)).success());
}

/// A chat of three turns; each is asked as it was and with its last message edited.
fn turns() -> Vec<Value> {
    let mut messages = vec![json!({"role": "system", "content": "You tell stories. ".repeat(12)})];
    let mut bodies = Vec::new();
    for asked in &ASKED[..3] {
        for edit in [asked, &asked[..asked.len() / 2]] {
            let mut edited = messages.clone();
            edited.push(json!({"role": "user", "content": edit}));
            bodies.push(chat_body(json!(edited), &json!({"temperature": 0.7, "max_tokens": 24})));
        }
        messages.push(json!({"role": "user", "content": asked}));
        messages.push(json!({"role": "assistant", "content": "Once there was a kite."}));
    }
    bodies
}

#[test]
fn a_restart_forgets_nothing() {
    let bodies = turns();
    let cold = Server::start("-np 1 --cache-ram 0");
    let want: Vec<_> = bodies.iter().map(|body| of_chat(&cold.ok("/v1/chat/completions", body))).collect();
    for n_slot in [1, 2, 4, 8] {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join("cache");
        let flags = format!("-np {n_slot} --cache-disk {}", folder.display());
        let ask = |server: &Server| -> Vec<u64> {
            let replies = bodies.iter().map(|body| server.ok("/v1/chat/completions", body));
            let check = |(at, reply): (usize, Value)| {
                assert_eq!(of_chat(&reply), want[at], "`{flags}`, request {at}");
                n_cached(&reply)
            };
            replies.enumerate().map(check).collect()
        };
        let first = Server::start(&flags);
        let in_memory = ask(&first);
        assert_eq!((in_memory[0], files(&folder).len()), (0, 0), "nothing had to go yet");
        stop(&first);
        let n_file = files(&folder).len();
        assert!(n_file > 0, "`{flags}`: nothing was written");
        // A stranger, one that is cut, and one that is damaged behind its head.
        fs::write(folder.join("notes.txt"), "mine").expect("a file");
        let second = Server::start(&flags);
        assert_eq!(second.metric("paceline:cache_disk_files"), n_file as f64);
        let after = ask(&second);
        assert!(after[0] > 0, "`{flags}`: the first prompt after the restart was computed");
        assert!(second.metric("paceline:cache_disk_reads_total") > 0.0);
        second.wait_until_idle();
        second.assert_clean();
        stop(&second);

        let ours: Vec<PathBuf> =
            files(&folder).into_iter().filter(|path| !path.ends_with("notes.txt")).collect();
        for (i, path) in ours.iter().enumerate() {
            let mut bytes = fs::read(path).expect("a file");
            match i % 2 {
                0 => bytes.truncate(bytes.len() / 2),
                _ => *bytes.last_mut().expect("no empty file") ^= 1,
            }
            fs::write(path, bytes).expect("a file");
        }
        let third = Server::start(&flags);
        ask(&third);
        assert_eq!(third.metric("paceline:cache_disk_reads_total"), 0.0, "`{flags}`");
        third.wait_until_idle();
        third.assert_clean();
        stop(&third);
        assert_eq!(fs::read(folder.join("notes.txt")).expect("still there"), b"mine");

        // Another pair of models finds nothing here, and takes nothing away.
        let n_file = files(&folder).len();
        let other = Server::start(&format!("{flags} --spec-type none"));
        assert_eq!(other.metric("paceline:cache_disk_files"), 0.0);
        assert!(other.metric("paceline:cache_disk_bytes") > 0.0, "but it is counted");
        assert_eq!(n_cached(&other.ok("/v1/chat/completions", &bodies[0])), 0);
        stop(&other);
        assert!(files(&folder).len() >= n_file);
    }
}

/// A budget in memory for one prompt or two: the others come back from the disk, within its own budget.
#[test]
fn what_has_no_room_in_memory_comes_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let server = Server::start(&format!(
        "-np 4 -c 8192 --cache-ram 4 --cache-disk {} --cache-disk-size 64",
        dir.path().display()
    ));
    let prompts: Vec<Value> = (0..6).map(|i| json!(long_prompt(&server, 400 + 131 * i))).collect();
    let cold = |prompt: &Value| native(&server, prompt.clone(), &json!({"cache_prompt": false}));
    let want: Vec<_> = prompts.iter().map(cold).collect();
    for round in 0..4 {
        let ask = |prompt: &Value| {
            let (server, prompt) = (&server, prompt.clone());
            move || native(server, prompt, &json!({}))
        };
        let asks = prompts.iter().map(|p| Box::new(ask(p)) as Box<dyn FnOnce() -> _ + Send + '_>).collect();
        assert_eq!(together(asks), want, "round {round}");
        server.wait_until_idle();
        assert!(server.metric("paceline:cache_bytes") <= 4.0 * 1024.0 * 1024.0);
        assert!(server.metric("paceline:cache_disk_bytes") <= 64.0 * 1024.0 * 1024.0);
    }
    let begin = Instant::now();
    while server.metric("paceline:cache_disk_leaving") > 0.0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "what leaves does not arrive");
        std::thread::sleep(Duration::from_millis(10));
    }
    let n_byte: u64 =
        files(dir.path()).iter().map(|path| fs::metadata(path).map_or(0, |meta| meta.len())).sum();
    assert_eq!(n_byte as f64, server.metric("paceline:cache_disk_bytes"), "what is reckoned is there");
    assert!(server.metric("paceline:cache_disk_writes_total") > 0.0);
    assert!(server.metric("paceline:cache_disk_reads_total") > 0.0, "nothing was read back");
    server.assert_clean();
}

/// Five clients with one prompt at the same time: it is computed once, and each gets what it gets alone. One that hangs up
/// takes nobody along.
#[test]
fn one_prompt_for_many_is_computed_once() {
    for n_slot in [1, 2, 4, 8] {
        let server = Server::start(&format!("-np {n_slot} -c {} -ub 64", 4096 * n_slot));
        let prompt = json!(long_prompt(&server, 1500));
        let want = native(&server, prompt.clone(), &json!({"cache_prompt": false}));
        let before = server.metric("llamacpp:prompt_tokens_total");
        // The first one does not wait for its answer.
        drop(server.send("/completion", &native_body(prompt.clone(), &json!({}))));
        let ask = || {
            let (server, prompt) = (&server, prompt.clone());
            Box::new(move || server.ok("/completion", &native_body(prompt, &json!({}))))
                as Box<dyn FnOnce() -> _ + Send>
        };
        let replies: Vec<Value> = together((0..5).map(|_| ask()).collect());
        let computed = server.metric("llamacpp:prompt_tokens_total") - before;
        for reply in &replies {
            assert_eq!(of_native(reply), want, "{n_slot} slots");
        }
        assert!(computed < 1500.0 + 5.0 * 70.0, "{n_slot} slots: {computed} tokens of 1500 were computed");
        server.wait_until_idle();
        server.assert_clean();
    }
}

/// What a slot's conversation left is gone after an erase, and `/slots` says so.
#[test]
fn erased_is_forgotten() {
    let dir = tempfile::tempdir().expect("a folder");
    let server = Server::start(&format!(
        "-np 2 --checkpoint-min-step 64 --slot-save-path {0} --cache-disk {0}/cache",
        dir.path().display()
    ));
    let ask = |slot: u64, prompt: &[u64]| {
        n_cached(&server.ok("/completion", &native_body(json!(prompt), &json!({"id_slot": slot}))))
    };
    let (one, two) =
        (long_prompt(&server, 300), long_prompt(&server, 300).into_iter().rev().collect::<Vec<_>>());
    assert_eq!((ask(0, &one), ask(1, &two)), (0, 0));
    let kept = |slot: usize| server.get("/slots")[slot]["n_tokens_kept"].as_u64();
    assert!(kept(0) >= Some(300) && kept(1) >= Some(300));
    let erased = server.ok("/slots/0?action=erase", &json!({}));
    assert!(erased["n_erased"].as_u64() > Some(300) && erased["n_snapshots"].as_u64() > Some(0), "{erased}");
    assert_eq!(kept(0), Some(0));
    assert_eq!(ask(0, &one), 0, "erased, and yet there");
    assert!(ask(1, &two) > 290, "another slot's conversation");
    server.wait_until_idle();
    server.assert_clean();
}
