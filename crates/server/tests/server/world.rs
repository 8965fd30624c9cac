//! A server on port 0 over a [`HashModel`], and what can be asked of it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use paceline_backend::{Exec, StateConfig, Step, StepOut};
use paceline_engine::{Engine, EngineConfig, Request, RequestId};
use paceline_sampling::SamplingParams;
use paceline_server::{Server, ServerConfig, ServerModel};
use paceline_spec::Drafter;
use paceline_testkit::{Answer, HashKind, HashModel, Token, alone, tiny_metadata, tiny_vocab};
use paceline_text::{ChatTemplate, Encode, Tokenizer};
use serde_json::Value;
use tokio::{net::TcpListener, sync::oneshot};

use crate::client::{Connection, Reply};

/// A prompt with this text makes the model panic.
pub const POISON: &str = "\u{1}\u{1}\u{1}";

type MakeDrafter = Box<dyn Fn(&HashModel) -> Box<dyn Drafter> + Send>;

/// What a world is made of.
pub struct Setup {
    pub model: HashModel,
    pub drafter: Option<MakeDrafter>,
    pub engine: EngineConfig,
    pub server: ServerConfig,
    /// The model writes this text and ends, wherever a prompt has the length in `.0`.
    pub parrot: Option<(Arc<AtomicUsize>, &'static str)>,
    pub template: Option<&'static str>,
    /// No engine can be made while this is true.
    pub broken: Arc<AtomicBool>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            model: HashModel::new(7, HashKind::Hybrid),
            drafter: None,
            engine: EngineConfig {
                n_slot: 2,
                n_ctx: 256,
                n_ubatch: 32,
                n_draft_max: 5,
                n_queue_max: 8,
                check_memory: true,
                ..EngineConfig::default()
            },
            server: ServerConfig::default(),
            parrot: None,
            template: None,
            broken: Arc::default(),
        }
    }
}

/// A running server. Dropping it shuts it down and waits.
pub struct World {
    pub addr: SocketAddr,
    pub model: HashModel,
    pub engine: EngineConfig,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl World {
    pub fn new() -> World {
        World::start(Setup::default())
    }

    pub fn start(setup: Setup) -> World {
        let (shutdown, asked) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let (model, engine) = (setup.model.clone(), setup.engine);
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async move {
                let server = server(setup);
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                server.serve(listener, async { drop(asked.await) }).await.unwrap();
            });
        });
        let addr = told.recv().expect("the server starts");
        World { addr, model, engine, shutdown: Some(shutdown), thread: Some(thread) }
    }

    pub fn open(&self, path: &str, body: &Value) -> Connection {
        Connection::open(self.addr, "POST", path, &[], body.to_string().as_bytes())
    }

    pub fn post(&self, path: &str, body: Value) -> Reply {
        self.open(path, &body).reply()
    }

    /// The JSON of a request that must succeed.
    pub fn ok(&self, path: &str, body: Value) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    }

    pub fn get(&self, path: &str) -> Reply {
        Connection::open(self.addr, "GET", path, &[], b"").reply()
    }

    /// A figure of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// Waits until a figure of `/metrics` has this value.
    pub fn wait_for(&self, name: &str, value: f64) {
        let patience = Instant::now() + Duration::from_secs(5);
        while self.metric(name) != value {
            assert!(Instant::now() < patience, "{name} is {}, not {value}", self.metric(name));
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn shut_down(&mut self) {
        if let Some(shutdown) = self.shutdown.take() {
            let _ = shutdown.send(());
        }
    }

    /// Waits until the server is gone.
    pub fn join(mut self) {
        self.shut_down();
        self.thread.take().unwrap().join().expect("the server ends well");
    }

    /// What the model answers to `text` with nobody around and no server.
    pub fn alone(&self, text: &str, edit: impl FnOnce(&mut Request)) -> Answer {
        let mut request = Request::new(RequestId(0), encode(text));
        edit(&mut request);
        alone(&self.model, &tiny_vocab(), &request, self.engine.n_ctx)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shut_down();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the server panicked");
        }
    }
}

pub fn encode(text: &str) -> Vec<Token> {
    let tokenizer = Tokenizer::from_metadata(&tiny_metadata()).unwrap();
    tokenizer.encode(text, Encode { add_bos: true, parse_special: true })
}

fn server(setup: Setup) -> Server {
    let metadata = tiny_metadata();
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    let chat_template = match setup.template {
        Some(source) => ChatTemplate::new(source, "", "").unwrap(),
        None => ChatTemplate::from_metadata(&metadata, tokenizer.vocab()).unwrap(),
    };
    let vocab = tokenizer.vocab().clone();
    let model = ServerModel {
        id: "tiny".into(),
        aliases: vec!["hash".into()],
        path: "models/tiny-hash.gguf".into(),
        tokenizer: Arc::new(tokenizer),
        chat_template,
        sampling: SamplingParams::default(),
        seed: None,
        n_ctx_train: 4096,
        n_embd: 4,
        n_params: 1000,
        size: 2000,
        ftype: "Q8_0".into(),
        vocab_type: "gpt2".into(),
    };
    let Setup { model: hash, drafter, engine, server, parrot, broken, .. } = setup;
    let make = move || {
        if broken.load(Ordering::Relaxed) {
            return Err("not today".into());
        }
        let (mut target, _) =
            hash.target(StateConfig { page_len: 16, ..StateConfig::default() }, engine.n_slot * engine.n_ctx);
        target.exec = match &parrot {
            Some((n_prompt, text)) => {
                Box::new(Parrot { n_prompt: n_prompt.clone(), text, n_vocab: hash.n_vocab })
            }
            None => Box::new(Fragile(target.exec)),
        };
        Ok(Engine::new(target, drafter.as_ref().map(|make| make(&hash)), vocab.clone(), engine))
    };
    Server::new(server, model, Box::new(make)).unwrap()
}

/// Panics where a row has the poison.
struct Fragile(Box<dyn Exec>);

impl Exec for Fragile {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        assert!(!step.tokens.windows(3).any(|rows| rows == [1; 3]), "the poison was found");
        self.0.run(step, out);
    }
}

/// Writes a given text after prompts of a given length, then ends.
struct Parrot {
    n_prompt: Arc<AtomicUsize>,
    text: &'static str,
    n_vocab: usize,
}

impl Exec for Parrot {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        out.output_width = self.n_vocab;
        out.output.clear();
        for &row in step.outputs {
            let position = step.positions[row as usize] as usize;
            let at = position + 1 - self.n_prompt.load(Ordering::Relaxed).min(position + 1);
            let next =
                self.text.as_bytes().get(at).map_or(paceline_testkit::IM_END as usize, |&b| usize::from(b));
            out.output.extend((0..self.n_vocab).map(|t| if t == next { 50.0 } else { 0.0 }));
        }
    }
}
