//! The real `paceline serve`, with its bundled model and drafter, asked over real sockets.
//!
//! What is compared is compared exactly: on the CPU a row's arithmetic never depends on what shares its batch, so
//! an answer must be the same, logits included, with and without a drafter, alone and in a crowd, and the drafter
//! must have been right equally often. Most cases are crashes or silent losses that other servers with speculation
//! had at some time.

#![cfg(unix)]
#![forbid(unsafe_code)]

mod ask;
mod http;
mod server;

mod api;
mod cache;
mod clients;
mod context;
mod disk;
mod sampling;
mod slots;
mod speculation;
