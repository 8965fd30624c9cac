//! The server as its clients see it: a real socket, a model that hashes its memory.

mod answers;
mod client;
mod lives;
mod refusals;
mod status;
mod streams;
mod world;
