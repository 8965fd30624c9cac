//! `paceline serve`: start, one answer, stop. The server crate tests the rest.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::command::{command, paceline};

/// A server under test; dropping it ends it.
struct Serving {
    child: Child,
    address: String,
    log: BufReader<std::process::ChildStderr>,
    said: String,
}

impl Serving {
    fn start(args: &[&str]) -> Serving {
        let mut all = vec!["serve", "--port", "0"];
        all.extend(args);
        let mut child = command(&all).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let mut address = None;
        while address.is_none() {
            let mut line = String::new();
            if log.read_line(&mut line).unwrap() == 0 {
                let status = child.wait().unwrap();
                panic!("the server ended, {status}: {said}");
            }
            address = line.trim().strip_prefix("listening on http://").map(str::to_string);
            said.push_str(&line);
        }
        let address = address.unwrap_or_default();
        Serving { child, address, log, said }
    }

    fn post(&self, path: &str, key: Option<&str>, body: &Value) -> (u16, Value) {
        let body = body.to_string();
        let key = key.map_or(String::new(), |key| format!("authorization: Bearer {key}\r\n"));
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n{key}content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("{reply}")))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

fn chat(prompt: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": prompt }], "max_tokens": 24, "temperature": 0 })
}

#[test]
fn a_huge_context_starts_and_answers() {
    let serving = Serving::start(&["-c", "262144", "-np", "2", "--alias", "toy,other"]);
    assert!(serving.said.contains("131072 tokens (-c 262144 over -np 2)"), "{}", serving.said);
    assert!(serving.said.contains("trained for a context of 4096"), "{}", serving.said);
    assert!(serving.said.contains("dflash: arch dflash"), "the contract line: {}", serving.said);
    let (status, reply) = serving.post("/v1/chat/completions", None, &chat("Write JSON for a cat."));
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["model"], "toy");
    assert!(reply["timings"]["draft_n"].as_u64() > Some(0), "{reply}");
    let fingerprint = reply["system_fingerprint"].as_str().unwrap();
    assert!(fingerprint.starts_with(concat!("paceline-", env!("CARGO_PKG_VERSION"))), "{fingerprint}");
}

#[cfg(unix)]
#[test]
fn it_stops_when_asked_to_and_no_pipe_kills_it() {
    let mut serving = Serving::start(&["-np", "1"]);
    for _ in 0..3 {
        signal(&serving.child, "PIPE");
    }
    let (status, reply) = serving.post("/v1/chat/completions", None, &chat("Count to ten."));
    assert_eq!(status, 200, "{reply}");
    signal(&serving.child, "TERM");
    let asked = Instant::now();
    let status = serving.child.wait().unwrap();
    let mut rest = String::new();
    serving.log.read_to_string(&mut rest).unwrap();
    assert!(status.success(), "{status} {rest}");
    assert!(asked.elapsed() < Duration::from_secs(8), "{rest}");
}

#[test]
fn keys_and_ports() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "second\n\nthird\n").unwrap();
    let keys = keys.to_str().unwrap();
    let serving =
        Serving::start(&["--api-key", "first", "--api-key-file", keys, "--no-warmup", "--no-draft"]);
    let ask = |key| serving.post("/v1/chat/completions", key, &chat("hi"));
    assert_eq!(ask(None).0, 401);
    assert_eq!(ask(Some("fourth")).0, 401);
    for key in ["first", "third"] {
        let (status, reply) = ask(Some(key));
        assert_eq!(status, 200, "{reply}");
        assert!(reply["timings"].get("draft_n").is_none(), "{reply}");
    }
    let port = serving.address.rsplit(':').next().unwrap();
    paceline(&["serve", "--port", port]).fails_with(&["can't listen", "--port"]);
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "\n").unwrap();
    paceline(&["serve", "--port", "0", "--api-key-file", empty.to_str().unwrap()])
        .fails_with(&["found none"]);
}
