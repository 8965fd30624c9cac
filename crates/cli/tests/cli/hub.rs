//! `-hf` against a stand-in for the hub.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::command::{Ran, command, finish, repo};

/// Answers like the hub, for one repository, `toy/pair`.
struct Hub {
    endpoint: String,
    /// `path range` of each request.
    asked: Arc<Mutex<Vec<String>>>,
    /// Downloads that are still to break off in the middle.
    n_break: Arc<AtomicUsize>,
}

const TARGET: &str = "pair-Q8_0.gguf";
const TOKEN: &str = "hf_secret";

impl Hub {
    fn start() -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let hub = Hub { endpoint, asked: Arc::default(), n_break: Arc::default() };
        let (asked, n_break) = (hub.asked.clone(), hub.n_break.clone());
        let file: Arc<Vec<u8>> = Arc::new(fs::read(repo("models/bundled/target.gguf")).unwrap());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (asked, n_break, file) = (asked.clone(), n_break.clone(), file.clone());
                thread::spawn(move || drop(answer(stream, &asked, &n_break, &file)));
            }
        });
        hub
    }

    fn run(&self, cache: &Path, model: &str, token: Option<&str>) -> Ran {
        let mut command = command(&["run", "-hf", model, "-p", "Count to ten.", "-n", "8", "--temp", "0"]);
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", cache);
        token.map(|token| command.env("HF_TOKEN", token));
        finish(command)
    }

    fn downloads(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|line| line.contains(TARGET) && !line.contains("bytes=0-0")).cloned().collect()
    }
}

fn answer(
    stream: TcpStream,
    asked: &Mutex<Vec<String>>,
    n_break: &AtomicUsize,
    file: &[u8],
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or("").to_string();
    let (mut range, mut key) = (String::new(), String::new());
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => range = value.to_string(),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => key = value.to_string(),
            Some(_) => {}
            None => break,
        }
    }
    asked.lock().unwrap().push(format!("{path} {range}"));
    let mut out = stream;
    let mut reply = |status: &str, headers: &str, body: &[u8], n_sent: usize| {
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n",
            body.len()
        );
        out.write_all(head.as_bytes()).and_then(|()| out.write_all(&body[..n_sent]))
    };
    if path.starts_with("/api/models/toy/gated/") && key != format!("Bearer {TOKEN}") {
        return reply("401 Unauthorized", "", b"", 0);
    }
    if path.starts_with("/api/models/toy/pair/") || path.starts_with("/api/models/toy/gated/") {
        let body = format!(
            r#"{{"sha":"c0ffee","siblings":[{{"rfilename":"README.md"}},{{"rfilename":"{TARGET}"}}]}}"#
        );
        return reply("200 OK", "content-type: application/json\r\n", body.as_bytes(), body.len());
    }
    if !path.ends_with(&format!("/resolve/main/{TARGET}")) {
        return reply("404 Not Found", "", b"", 0);
    }
    let (from, to) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap_or(0);
    let to = to.parse().map_or(file.len(), |to: usize| to + 1);
    let headers = format!(
        "etag: \"feed\"\r\nx-repo-commit: c0ffee\r\ncontent-range: bytes {from}-{}/{}\r\n",
        to - 1,
        file.len()
    );
    let body = &file[from..to];
    let breaks = body.len() > 1
        && n_break.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
    reply("206 Partial Content", &headers, body, if breaks { body.len() / 2 } else { body.len() })
}

#[test]
fn a_model_is_fetched_once() {
    let (hub, cache) = (Hub::start(), tempfile::tempdir().unwrap());
    let first = hub.run(cache.path(), "toy/pair:q8_0", None).ok();
    assert!(!first.trim().is_empty());
    assert_eq!(hub.downloads().len(), 1, "{:?}", hub.downloads());
    // The only file there is will do if no quantisation is named, and it is in the cache by now.
    assert_eq!(hub.run(cache.path(), "toy/pair", None).ok(), first);
    assert_eq!(hub.downloads().len(), 1, "{:?}", hub.downloads());
    // The cache is the standard one, and does without the hub.
    assert!(cache.path().join("hub/models--toy--pair/snapshots/c0ffee").join(TARGET).exists());
    let mut offline = command(&["run", "-hf", "toy/pair", "-p", "Count to ten.", "-n", "8", "--temp", "0"]);
    offline.env("HF_HOME", cache.path()).env("HF_ENDPOINT", "http://127.0.0.1:9");
    assert_eq!(finish(offline).ok(), first);
}

#[test]
fn a_download_that_breaks_off_goes_on() {
    let (hub, cache) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.n_break.store(2, Ordering::SeqCst);
    let ran = hub.run(cache.path(), "toy/pair", None);
    assert!(ran.err.contains("going on where it stopped"), "{}", ran.err);
    ran.ok();
    let n_file = fs::metadata(repo("models/bundled/target.gguf")).unwrap().len();
    let starts: Vec<u64> = (hub.downloads().iter())
        .map(|line| line.rsplit("bytes=").next().unwrap().trim_end_matches('-').parse().unwrap())
        .collect();
    assert_eq!(starts, [0, n_file / 2, n_file / 2 + (n_file - n_file / 2) / 2]);
    let fetched = fs::read(cache.path().join("hub/models--toy--pair/snapshots/c0ffee").join(TARGET)).unwrap();
    assert!(fetched == fs::read(repo("models/bundled/target.gguf")).unwrap(), "the pieces make the file");
}

#[test]
fn refusals_say_what_to_do() {
    let (hub, cache) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.run(cache.path(), "toy/none", None).fails_with(&["toy/none", "404", "hint:"]);
    hub.run(cache.path(), "toy/gated", None).fails_with(&["toy/gated", "401", "HF_TOKEN"]);
    hub.run(cache.path(), "toy/pair:Q2_K", None).fails_with(&["no file for `Q2_K`", TARGET]);
    hub.run(cache.path(), "toy/gated", Some(TOKEN)).ok();
    let mut nobody = command(&["run", "-hf", "toy/other", "-p", "x"]);
    nobody.env("HF_HOME", cache.path()).env("HF_ENDPOINT", "http://127.0.0.1:9");
    finish(nobody).fails_with(&["toy/other", "hint:"]);
}
