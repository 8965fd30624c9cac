//! A `paceline serve` of one's own, gone when its last holder is.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read},
    net::TcpStream,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::http::{self, Event, Events, Reply};

/// Loading takes a moment; on a machine that does a hundred other things, several.
const START: Duration = Duration::from_secs(60);

/// Long enough for every answer that these tests ask for.
const IDLE: Duration = Duration::from_secs(20);

/// A running server.
pub struct Server {
    child: Mutex<Child>,
    address: String,
    log: Arc<Mutex<String>>,
    flags: String,
}

impl Server {
    /// Starts a server on a free port with the bundled model and waits until it is well. Its drafts have full length
    /// whatever they cost here, so that what is accepted is the same from run to run.
    pub fn start(flags: &str) -> Server {
        Server::launch(&format!("{flags} --draft-fixed"))
    }

    /// Starts one that drafts as far as that pays here.
    pub fn planning(flags: &str) -> Server {
        Server::launch(flags)
    }

    fn launch(flags: &str) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
        command.args(["serve", "--host", "127.0.0.1", "--port", "0"]).args(flags.split_whitespace());
        // Settings of whoever runs the tests are not the tests' business.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("LLAMA_") || name.starts_with("PACELINE_") || name.starts_with("HF_") {
                command.env_remove(&*name);
            }
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary under test starts");
        let log = Arc::new(Mutex::new(String::new()));
        let (found, address) = mpsc::channel();
        if let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) {
            follow(out, log.clone(), found.clone());
            follow(err, log.clone(), found);
        }
        let address = address.recv_timeout(START);
        let server = Server {
            child: Mutex::new(child),
            address: address.as_ref().cloned().unwrap_or_default(),
            log,
            flags: flags.to_owned(),
        };
        assert!(address.is_ok(), "no address was printed by `serve {flags}`");
        let deadline = Instant::now() + START;
        while !matches!(server.try_get("/health"), Ok(reply) if reply.status == 200) {
            assert!(Instant::now() < deadline, "/health is not 200");
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// A server with these flags that tests share which happen to run at the same time. Such tests must not depend
    /// on being alone.
    pub fn shared(flags: &'static str) -> Arc<Server> {
        static SHARED: Mutex<Option<HashMap<&'static str, Weak<Server>>>> = Mutex::new(None);
        let mut shared = lock(&SHARED);
        let shared = shared.get_or_insert_default();
        if let Some(server) = shared.get(flags).and_then(Weak::upgrade) {
            return server;
        }
        let server = Arc::new(Server::start(flags));
        shared.insert(flags, Arc::downgrade(&server));
        server
    }

    /// Sends a request and leaves the reply in the socket.
    pub fn send(&self, path: &str, body: &Value) -> TcpStream {
        http::send(&self.address, "POST", path, &[], &body.to_string()).expect("the server takes connections")
    }

    /// The reply to any request.
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let stream =
            http::send(&self.address, method, path, headers, body).expect("the server takes connections");
        Reply::read(stream).expect("a reply")
    }

    fn try_get(&self, path: &str) -> std::io::Result<Reply> {
        Reply::read(http::send(&self.address, "GET", path, &[], "")?)
    }

    /// The reply to a POST.
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &[], &body.to_string())
    }

    /// The body of a 200 that is no stream.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let mut reply = self.post(path, body);
        let json = reply.json().expect("a JSON body");
        assert_eq!(reply.status, 200, "{path}: {json}");
        json
    }

    /// The events of a 200 that is a stream.
    pub fn stream(&self, path: &str, body: &Value) -> Events {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200);
        reply.events()
    }

    /// The JSON objects of a stream, which has to end as streams of this path do.
    pub fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let events: Vec<Event> =
            self.stream(path, body).collect::<Result<_, _>>().expect("a stream that ends cleanly");
        let n_done = events.iter().filter(|&event| *event == Event::Done).count();
        let is_openai = path.starts_with("/v1/");
        assert_eq!(
            n_done,
            usize::from(is_openai),
            "[DONE] ends the streams of OpenAI's surface and no other"
        );
        assert!(!is_openai || events.last() == Some(&Event::Done));
        let objects = events.into_iter().filter_map(|event| match event {
            Event::Data(value) => Some(value),
            Event::Done => None,
        });
        objects.collect()
    }

    /// The body of a GET.
    pub fn get(&self, path: &str) -> Value {
        let mut reply = self.request("GET", path, &[], "");
        assert_eq!(reply.status, 200, "{path}");
        reply.json().expect("a JSON body")
    }

    /// A metric's value; without labels in its name.
    pub fn metric(&self, name: &str) -> f64 {
        let mut reply = self.request("GET", "/metrics", &[], "");
        assert_eq!(reply.status, 200);
        let text = reply.text().expect("a body");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("no metric {name} in:\n{text}"))
    }

    /// Waits until no slot is busy and nothing waits, and says how long that took.
    pub fn wait_until_idle(&self) -> Duration {
        let begin = Instant::now();
        loop {
            let slots = self.get("/slots");
            let busy =
                slots.as_array().is_none_or(|slots| slots.iter().any(|slot| slot["is_processing"] != false));
            if !busy && self.metric("llamacpp:requests_deferred") == 0.0 {
                return begin.elapsed();
            }
            assert!(begin.elapsed() < IDLE, "slots stay busy: {slots}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Nothing of past requests may be left: no busy slot, no page, no state of the drafter, and nowhere a value
    /// that was not a number.
    pub fn assert_clean(&self) {
        for name in [
            "llamacpp:requests_processing",
            "llamacpp:requests_deferred",
            "paceline:kv_pages",
            "paceline:drafter_memory_bytes",
            "paceline:unusable_logits_total",
            "paceline:unusable_drafts_total",
            "paceline:requests_failed_total",
            "paceline:engine_restarts_total",
        ] {
            assert_eq!(self.metric(name), 0.0, "{name}");
        }
    }

    /// Sends the process a signal, by its name.
    pub fn signal(&self, name: &str) {
        let pid = lock(&self.child).id().to_string();
        let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &pid]).status();
        assert!(sent.is_ok_and(|status| status.success()), "signal {name} could not be sent");
    }

    /// Waits until the process has ended.
    pub fn wait(&self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = lock(&self.child).try_wait().expect("a child of ours") {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Bytes of memory that the process has in use.
    #[cfg(target_os = "linux")]
    pub fn resident_bytes(&self) -> u64 {
        let pid = lock(&self.child).id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.expect("a resident size") << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        let _ = child.kill();
        let _ = child.wait();
        if thread::panicking() {
            eprintln!("--- log of `paceline serve {}`:\n{}---", self.flags, lock(&self.log));
        }
    }
}

/// Collects what the server says, and looks for its address in it.
fn follow(output: impl Read + Send + 'static, log: Arc<Mutex<String>>, found: mpsc::Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(address) = address_in(&line) {
                let _ = found.send(address);
            }
            let mut log = lock(&log);
            log.push_str(&line);
            log.push('\n');
        }
    });
}

/// `127.0.0.1:port` in `… http://127.0.0.1:port …`.
fn address_in(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("http://")?;
    let address: String = rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
    let port = address.split_once(':')?.1;
    port.parse::<u16>().ok().filter(|&port| port != 0)?;
    Some(address)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
