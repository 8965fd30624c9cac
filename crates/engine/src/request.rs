//! What a client asks for, already checked and tokenised.

use std::sync::Arc;

use paceline_sampling::{DryBreakers, SamplingParams};

use crate::Token;

/// Names a request for events and cancels; chosen by the caller, unique while in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A completion to compute.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// The prompt, at least one token.
    pub prompt: Vec<Token>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The tokens of `sampling.dry_sequence_breakers`; only looked at where DRY is on.
    pub dry_breakers: Arc<DryBreakers>,
    /// Most tokens to generate; none means until the context is full.
    pub n_predict: Option<usize>,
    /// Strings that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Goes on past end-of-generation tokens, which are then never chosen.
    pub ignore_eos: bool,
    /// Shows control tokens in the text.
    pub show_special: bool,
    /// Most tokens to draft per step: none means the engine's setting, 0 turns speculation off.
    pub n_draft_max: Option<usize>,
    /// The slot wanted, if it matters.
    pub slot: Option<usize>,
    /// Begins with what the prompt cache has, and leaves snapshots in it.
    pub cache_prompt: bool,
    /// Prompt tokens before which a later prompt of the same conversation may go on differently, ascending: the last
    /// user's message, the opening of the answer. Snapshots are taken there.
    pub turns: Vec<usize>,
}

impl Request {
    /// A request with default settings.
    pub fn new(id: RequestId, prompt: Vec<Token>) -> Request {
        Request {
            id,
            prompt,
            sampling: SamplingParams::default(),
            dry_breakers: Arc::default(),
            n_predict: None,
            stop: Vec::new(),
            ignore_eos: false,
            show_special: false,
            n_draft_max: None,
            slot: None,
            cache_prompt: true,
            turns: Vec::new(),
        }
    }
}
