#![forbid(unsafe_code)]
//! Test support, for `dev-dependencies` only.
//!
//! The centre is [`HashModel`]: a model whose logits hash everything that the memory shows it, so that one wrong
//! cell, one stale page or one recurrent step too many changes every token that follows. [`HashStates`] and
//! [`HashExec`] store and compute it behind the same traits as a real device; [`Reading`] computes it from the
//! tokens alone. The two agree exactly as long as memory and engine keep their promises, and [`alone`] turns that
//! into what a request must answer, whoever shares its steps and whatever a drafter claims.
//!
//! Drafters to go with it: [`Scripted`] ones that are right ([`oracle`]) or anything but ([`liar`]), and
//! [`Recorder`], which lets no breach of the drafter's contract pass.
//!
//! Everything follows a seed ([`Rng`]); there is no clock.

mod alone;
mod closeness;
mod golden;
mod hash_exec;
mod hash_model;
mod recorder;
mod rng;
mod scripted;
mod tiny_drafter;
mod tiny_vocab;

pub use alone::{Answer, End, alone};
pub use closeness::{Difference, assert_close, max_difference};
pub use golden::{Golden, goldens_dir};
pub use hash_exec::{HashExec, HashStates, Traffic};
pub use hash_model::{HashKind, HashModel, Reading};
pub use recorder::{Log, Recorder};
pub use rng::{Rng, Seeded, mix};
pub use scripted::{Accept, Forks, Lie, Scripted, liar, oracle};
pub use tiny_drafter::DrafterSizes;
pub use tiny_vocab::{
    IM_END, IM_START, PADDING, TEXT_END, letters_vocab, tiny_bias, tiny_metadata, tiny_vocab,
};

/// A token id.
pub type Token = u32;
