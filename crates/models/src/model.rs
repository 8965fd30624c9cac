//! What every architecture offers.

use paceline_backend::{Buf, Matrix, PlanBuilder, StateDecl};

use crate::{Error, Hparams, Weights, blocks::NextN};

/// An architecture: its name in GGUF files and how it is loaded.
pub struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Loads a model and proves every shape that `record` relies on.
    pub load: fn(&Weights) -> Result<Box<dyn Model>, Error>,
}

/// Weights of a target that its drafter uses too.
#[derive(Clone, Copy, Debug)]
pub struct SharedWeights {
    /// Token embedding table.
    pub tok_embd: Matrix,
    /// Factor on embedded rows.
    pub embd_scale: f32,
    /// Output head; the embedding table itself if tied.
    pub output: Matrix,
    /// Bound on the logits: `cap · tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
}

/// A loaded target. Immutable, shared by all sequences.
pub trait Model: Send + Sync {
    /// Sizes.
    fn hparams(&self) -> &Hparams;
    /// What its layers remember of a sequence; `StateId(i)` is the `i`-th.
    fn states(&self) -> &[StateDecl];
    /// Embedding and head.
    fn shared(&self) -> SharedWeights;
    /// Records tokens `[n]` -> logits `[n_out, n_vocab]`. Called once; the backend replays the result each step.
    fn record(&self, p: &mut PlanBuilder<'_>) -> Buf;
    /// The prediction head in the model's own file, whose weights are `w`, if there is one and it is wanted.
    fn prediction_head(&self, _w: &Weights) -> Result<Option<NextN>, Error> {
        Ok(None)
    }
}
