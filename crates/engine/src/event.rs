//! What the engine tells its caller, step by step.

use paceline_sampling::TokenLogprobs;

use crate::{RequestId, Token};

/// Something that happened to a request. Every request that was submitted ends with exactly one
/// [`Done`](Event::Done) or [`Failed`](Event::Failed), unless it was cancelled.
#[derive(Clone, Debug)]
pub enum Event {
    /// The request took a slot.
    Started {
        /// The request.
        request: RequestId,
        /// Its slot.
        slot: usize,
        /// Prompt tokens that need no computing.
        n_cached: usize,
    },
    /// Part of the prompt has been computed.
    Prefill {
        /// The request.
        request: RequestId,
        /// Prompt tokens computed so far, cached ones included.
        n_computed: usize,
        /// Prompt tokens in all.
        n_prompt: usize,
    },
    /// Tokens were generated.
    Tokens {
        /// The request.
        request: RequestId,
        /// Text that is certain to be part of the answer; may lag behind the tokens while a character or a
        /// possible stop string is incomplete.
        text: String,
        /// The tokens of this step.
        tokens: Vec<TokenOut>,
    },
    /// The answer is complete.
    Done {
        /// The request.
        request: RequestId,
        /// Text that was held back until now.
        text: String,
        /// Why it ended.
        finish: Finish,
        /// Its figures.
        stats: Stats,
    },
    /// The request failed; others are not affected.
    Failed {
        /// The request.
        request: RequestId,
        /// Why.
        error: RequestError,
        /// Its figures up to there.
        stats: Stats,
    },
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub id: Token,
    /// Its log probabilities, where asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// True if the drafter had guessed it.
    pub drafted: bool,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so, with this token.
    Eog(Token),
    /// A stop string appeared.
    Stop(String),
    /// As many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
}

/// Why a request failed after it had started.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The target's output can't be sampled from.
    #[error("the model's output at position {position} can't be sampled: {reason}")]
    Logits {
        /// Position of the row.
        position: usize,
        /// What the sampler said.
        reason: String,
    },
    /// No memory is left for the next step.
    #[error("{0}")]
    NoRoom(paceline_memory::NoRoom),
}

/// What speculation did for a request, in words where figures don't say it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum SpeculationNote {
    /// No drafter is loaded.
    #[default]
    NoDrafter,
    /// The request asked for none.
    OffByRequest,
    /// The drafter works.
    Active,
    /// The drafter, or the last of several, gave unusable output and was dropped for this request.
    Faulted(String),
    /// Many drafts, not one token accepted: loaded, but useless here.
    Useless,
    /// The drafters work, and drafting costs more at present than it gains.
    Resting,
}

/// Figures of a request.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Stats {
    /// Prompt tokens.
    pub n_prompt: usize,
    /// Prompt tokens that were not computed because a cache had them.
    pub n_cached: usize,
    /// Tokens generated.
    pub n_predicted: usize,
    /// Target forwards that generated them.
    pub n_verify: usize,
    /// Tokens drafted and verified.
    pub n_draft: usize,
    /// Drafted tokens that the target agreed with.
    pub n_accepted: usize,
    /// `(drafted, accepted)` by position in the draft.
    pub by_position: Vec<(usize, usize)>,
    /// What there is to say about speculation.
    pub speculation: SpeculationNote,
    /// Name of the drafter that drafted last.
    pub drafter: Option<&'static str>,
    /// Drafters that were dropped for this request, and why.
    pub dropped: Vec<(&'static str, String)>,
}

impl Stats {
    /// Tokens gained per verify, the papers' acceptance length.
    pub fn accept_len(&self) -> f64 {
        if self.n_verify == 0 { 0.0 } else { self.n_predicted as f64 / self.n_verify as f64 }
    }
}
