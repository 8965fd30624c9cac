#![forbid(unsafe_code)]
//! Drafters: where guesses come from, and the rule that decides which of them become text.
//!
//! A [`Drafter`] proposes and never decides. [`verify`] walks the target's own choices along a draft; a drafted
//! token is kept exactly if it is the token that the target would have chosen anyway, so the text does not
//! depend on the drafter ("sample, then compare"; with the common noise of `sampling` this is
//! drafter-invariant speculative decoding, Daliri, Musco and Suresh, 2024).
//!
//! What a drafter remembers of a sequence belongs to that sequence: it is keyed by [`SeqId`], made from rows of
//! committed tokens only ([`Drafter::commit`]), and forgotten with it.

mod dflash;
mod drafter;
mod mtp;
mod ngram;
mod registry;
mod small;
mod taps;
mod verify;

pub use drafter::{Draft, DraftRequest, Drafter, Kept, known};
pub use ngram::Ngram;
pub use registry::{DRAFTERS, DrafterKind, KindError, LoadDrafter, LoadError, Origin, kind, kind_of, load};
pub use taps::TapUnion;
pub use verify::{Verdict, verify};

pub use paceline_memory::SeqId;

/// A token id.
pub type Token = u32;
