//! The real binary, from the outside.

mod bench;
mod command;
mod convert;
mod flags;
mod hub;
mod imatrix;
mod inspect;
mod pair;
mod perplexity;
mod quantize;
mod readme;
mod run;
mod serve;
mod synth;
mod types;
