//! HTTP: the llama-server and OpenAI surface, and the one thread that steps the engine.
//!
//! ```text
//!  connection ─▶ auth ─▶ surface ── params, prompt ──▶ Group ──▶ runner ──▶ Engine::step
//!                          ▲                             │                      │
//!                          └── whole reply or chunks ◀───┴── progress ◀─────────┘
//! ```
//!
//! One file per surface (`openai_chat`, `openai_completions`, `native`, `text_tools`, `status`); what they share is
//! below them: `params` reads the fields that say how to generate, `answer` follows the requests behind a reply,
//! `sse` frames streams, `error` is the one place that knows statuses. Handlers never see the engine, only the
//! channels of [`runner`](EngineFactory).
//!
//! Promises: a request that is refused names the field, what was expected and what was found; an error before the
//! first byte of a stream has a status of its own, one after it is a `data:` line; a client that goes away frees its
//! slot at the next step boundary; what the model writes never fails a request, not even when it is no UTF-8.

#![forbid(unsafe_code)]

mod answer;
mod app;
mod auth;
mod config;
mod disk_cache;
mod engine_thread;
mod envelope;
mod error;
mod fields;
mod native;
mod openai_chat;
mod openai_completions;
mod params;
mod prompt;
mod random;
mod runner;
mod slot_files;
mod sse;
mod status;
mod text_tools;
mod timings;

pub use app::Server;
pub use config::{Reasoning, ServerConfig, ServerModel};
pub use disk_cache::DiskCache;
pub use runner::EngineFactory;
