//! The one thread that owns the engine and calls [`Engine::step`].
//!
//! ```text
//!  handlers ── Command ──▶ bounded inbox ──▶ drain · look for hang-ups · step · dispatch ──▶ one channel per
//!                                              ▲                                  │          HTTP request
//!                                              └────────── while there is work ───┘
//! ```
//!
//! Between steps the inbox is drained; with nothing to do the thread sleeps in it. An HTTP request that is given up
//! drops its receiver, which the next step boundary sees as a closed channel and cancels: there is no message that
//! could get lost. Clocks live here, so that the engine needs none.
//!
//! Here are the messages and the handle that the rest of the server holds; the loop is in `engine_thread`.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use paceline_engine::{
    CacheUsage, CheckedSnapshot, Counters, Engine, EngineConfig, Erased, Finish, Phase, Request,
    RequestError, RequestId, Restored, Saved, SlotStatus, Stats, SubmitError, TokenOut,
};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{engine_thread::EngineThread, error::ApiError, timings::Timings};

/// Makes an engine: at the start, and again after a failure.
pub type EngineFactory = Box<dyn FnMut() -> Result<Engine, Box<dyn std::error::Error + Send + Sync>> + Send>;

/// How the engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// It is being made.
    Loading,
    /// It serves.
    Ok,
    /// It is being made again.
    Restarting(String),
    /// It could not be made again; the next request tries once more.
    Down(String),
    /// The server was asked to stop.
    ShuttingDown,
}

/// Why a request was not taken.
#[derive(Clone, Debug)]
pub(crate) enum Refusal {
    Engine(SubmitError),
    QueueFull,
    ShuttingDown,
    Down(String),
}

/// Why a request that had been taken has no answer.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    Engine(RequestError),
    Panicked(String),
    ShuttingDown,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ending {
    Finished(Finish),
    /// The server stopped; the answer is what there was until then.
    ShutDown,
}

/// What happened to a request.
#[derive(Clone, Debug)]
pub(crate) enum Progress {
    Queued,
    Refused(Refusal),
    Started { slot: usize },
    Prefill { n_computed: usize, n_prompt: usize, n_cached: usize, ms: f64 },
    Tokens { text: String, tokens: Vec<TokenOut>, timings: Timings },
    Done { text: String, ending: Ending, stats: Stats, timings: Timings },
    Failed(Failure),
}

/// Where the progress of the requests of one HTTP request goes, each under its index.
pub(crate) type Events = mpsc::UnboundedSender<(usize, Progress)>;

/// A request on its way to the engine.
pub(crate) struct Submission {
    pub request: Request,
    pub index: usize,
    pub events: Events,
    /// The settings as `/slots` shows them.
    pub settings: Arc<Value>,
}

/// What is done with what a slot had last.
pub(crate) enum SlotAction {
    /// Asks for the contents of a file.
    Save,
    /// Takes up the contents of a file.
    Restore(CheckedSnapshot),
    Erase,
}

/// What came of it.
pub(crate) enum SlotOutcome {
    Saved(Saved),
    Restored(Restored),
    Erased(Erased),
}

pub(crate) enum Command {
    Slot(usize, SlotAction, oneshot::Sender<Result<SlotOutcome, ApiError>>),
    Submit(Box<Submission>),
    Status(oneshot::Sender<Box<EngineStatus>>),
    /// Refuse what waits and what comes.
    Drain,
    /// End what runs.
    Finish,
    /// Write what is to outlive the process, and answer.
    Close(oneshot::Sender<()>),
}

/// Totals that the engine does not know, having no clock.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub prompt_tokens: u64,
    pub prompt_seconds: f64,
    pub predicted_tokens: u64,
    pub predicted_seconds: f64,
    pub n_done: u64,
    pub n_failed: u64,
    pub n_cancelled: u64,
    pub n_refused: u64,
    pub n_restart: u64,
}

/// The drafters as status pages show them.
#[derive(Clone, Debug)]
pub(crate) struct DrafterStatus {
    /// Their names, separated by commas.
    pub name: String,
    pub state_bytes: usize,
}

/// A slot as status pages show it.
#[derive(Clone, Debug)]
pub(crate) struct SlotLook {
    pub status: SlotStatus,
    /// Prompt tokens that a cache had.
    pub n_cached: usize,
    /// Tokens of its last request that the next one may begin with; 0 while it is busy.
    pub n_kept: usize,
    /// The settings of its request.
    pub settings: Option<Arc<Value>>,
}

/// Everything that status pages show.
#[derive(Clone, Debug, Default)]
pub(crate) struct EngineStatus {
    pub slots: Vec<SlotLook>,
    pub n_waiting: usize,
    pub counters: Counters,
    pub totals: Totals,
    pub memory_bytes: usize,
    pub n_page: usize,
    pub n_page_max: usize,
    pub drafter: Option<DrafterStatus>,
    pub cache: CacheUsage,
}

/// What the rest of the server holds of the thread. Dropping the last one ends it.
pub(crate) struct Runner {
    inbox: mpsc::Sender<Command>,
    health: Arc<watch::Sender<Health>>,
    next_id: AtomicU64,
    pub config: EngineConfig,
    /// The drafters' names and contract lines, if there are any.
    pub drafter: Option<(String, String)>,
}

/// Commands that may wait for a step to end. Requests beyond the engine's own queue are refused by the engine, so
/// this bounds only what arrives during one step.
const INBOX_LEN: usize = 1024;

impl Runner {
    /// Starts the thread and waits until it has an engine.
    pub fn start(mut factory: EngineFactory) -> Result<Runner, Box<dyn std::error::Error + Send + Sync>> {
        let (inbox, commands) = mpsc::channel(INBOX_LEN);
        let health = Arc::new(watch::Sender::new(Health::Loading));
        let (ready, made) = std::sync::mpsc::channel();
        let thread_health = health.clone();
        thread::Builder::new().name("engine".into()).spawn(move || match guarded(&mut factory) {
            Ok(engine) => {
                let drafters = engine.drafters();
                let names: Vec<&str> = drafters.iter().map(|d| d.name()).collect();
                let contracts: Vec<String> = drafters.iter().map(|d| d.contract()).collect();
                let drafter = (!names.is_empty()).then(|| (names.join(","), contracts.join("\n")));
                let started = ready.send(Ok((*engine.config(), drafter))).is_ok();
                thread_health.send_replace(Health::Ok);
                if started {
                    EngineThread::new(engine, factory, commands, thread_health).run();
                }
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        })?;
        let (config, drafter) = made.recv()??;
        Ok(Runner { inbox, health, next_id: AtomicU64::new(0), config, drafter })
    }

    /// A name for a new request.
    pub fn request_id(&self) -> RequestId {
        RequestId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends a request on its way; what becomes of it arrives in its channel.
    pub fn submit(&self, submission: Submission) -> Result<(), Refusal> {
        if *self.health.borrow() == Health::ShuttingDown {
            return Err(Refusal::ShuttingDown);
        }
        match self.inbox.try_send(Command::Submit(Box::new(submission))) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Refusal::QueueFull),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Refusal::Down("its thread has ended".into())),
        }
    }

    /// A look at the engine, at the next step boundary.
    pub async fn status(&self) -> Option<Box<EngineStatus>> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Command::Status(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Saves, restores or erases a slot, at the next step boundary.
    pub async fn slot(&self, slot: usize, action: SlotAction) -> Result<SlotOutcome, ApiError> {
        let (reply, answer) = oneshot::channel();
        let gone = || Refusal::Down("its thread has ended".into());
        self.inbox.send(Command::Slot(slot, action, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    /// No request is taken any more; those without a slot are refused.
    pub async fn drain(&self) {
        self.health.send_replace(Health::ShuttingDown);
        let _ = self.inbox.send(Command::Drain).await;
    }

    /// What is cached is put where it outlives the process. The last thing that is asked.
    pub async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.inbox.send(Command::Close(reply)).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// Running answers end with what they have.
    pub async fn finish(&self) {
        let _ = self.inbox.send(Command::Finish).await;
    }
}

pub(crate) fn guarded(
    factory: &mut EngineFactory,
) -> Result<Engine, Box<dyn std::error::Error + Send + Sync>> {
    catch_unwind(AssertUnwindSafe(factory)).unwrap_or_else(|panic| Err(panic_text(&*panic).into()))
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".into())
}

impl EngineStatus {
    /// Slots that serve a request.
    pub fn n_busy(&self) -> usize {
        self.slots.iter().filter(|slot| slot.status.phase != Phase::Idle).count()
    }
}
