//! The interface of a source of drafts.

use paceline_backend::{Lane, StepOut, Tap};
use paceline_memory::{Memory, SeqId};
use paceline_sampling::{Known, Sampler};

use crate::Token;

/// What a sequence asks of a drafter in one step.
pub struct DraftRequest<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// Its last token, sampled and not yet computed by the target.
    pub anchor: Token,
    /// Position of the anchor, which is the number of committed tokens.
    pub position: usize,
    /// Most tokens wanted, at least 1.
    pub n_max: usize,
    /// The target's cells of the committed tokens ([`Memory::past`]), for drafters that look at them; they can't change as
    /// long as this lives.
    pub past: Lane<'a>,
    /// The request's sampler: [`Sampler::propose`] couples the drafter's choice to the target's by common noise.
    pub sampler: &'a mut Sampler,
}

/// A guess at the tokens that follow an anchor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draft {
    /// The tokens at `position + 1 ..`; empty is a fine answer.
    pub tokens: Vec<Token>,
    /// The drafter's own probability of each token.
    pub q: Vec<f32>,
    /// Set if the drafter found its own output unusable (not finite): the reason, for the log and the reply.
    pub fault: Option<String>,
}

/// Rows of a sequence that became final in a step.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// Position of the first row.
    pub first_position: usize,
    /// The rows' tokens.
    pub tokens: &'a [Token],
    /// `[tokens.len(), width]`: the tapped states of the rows, side by side in the order of
    /// [`Drafter::taps`].
    pub taps: &'a [f32],
}

/// Proposes tokens and never decides: a bad draft costs time, never correctness.
pub trait Drafter: Send {
    /// The registered name, e.g. `dflash`.
    fn name(&self) -> &'static str;
    /// One line with what was understood of the file: the line that settles "low acceptance" reports.
    fn contract(&self) -> String;
    /// Hidden states of the target that [`commit`](Self::commit) wants to see.
    fn taps(&self) -> &[Tap] {
        &[]
    }
    /// The most tokens that one draft can have.
    fn n_draft_max(&self) -> usize;
    /// One draft per request, at most `n_max` tokens each, in one forward for all of them. Tentative: what a
    /// drafter remembers is the same before and after.
    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft>;
    /// These rows, prompt or accepted, are final. Called once per step, for all sequences that moved.
    fn commit(&mut self, kept: &[Kept<'_>]);
    /// Lets `to`, of which nothing is known, begin with the first `len` committed tokens of `from`, so that it drafts
    /// exactly as if it had been given their rows. False, and nothing changed, if that can't be done for this `len`: a
    /// cached prefix of this length is then not offered. May be asked between [`draft`](Self::draft) and
    /// [`commit`](Self::commit).
    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool;
    /// True if a fork of a sequence of `len` committed tokens may have any number of them. If not, it must have all, and prompts
    /// of that length are cut where others will go on, as for a target with a recurrent state. True for `len` is true for less.
    fn forks_anywhere(&self, _len: usize) -> bool {
        true
    }
    /// What is remembered of `seq`, a fork that was given no rows since, as bytes for [`import`](Self::import). None if
    /// there is nothing, or no such form of it.
    fn export(&self, _seq: SeqId) -> Option<Vec<u8>> {
        None
    }
    /// Makes `seq`, of which nothing is known, what an export of the same drafter with the same settings was of, which had
    /// `len` tokens. On error, which says what is wrong, nothing has changed.
    fn import(&mut self, _seq: SeqId, _len: usize, _bytes: &[u8]) -> Result<(), String> {
        Err(format!("the {} drafter can't take it", self.name()))
    }
    /// The sequence is gone.
    fn forget(&mut self, seq: SeqId);
    /// Bytes held for sequences at present.
    fn state_bytes(&self) -> usize {
        0
    }
    /// How many of them are held only for forks that were given no rows since: what forgetting these returns.
    fn resting_bytes(&self) -> usize {
        0
    }
}

/// A resting sequence of `n_row` rows of what an export gave. On error nothing has changed.
pub(crate) fn import_of(memory: &mut Memory, n_row: usize, bytes: &[u8]) -> Result<SeqId, String> {
    let own = memory.import(bytes)?;
    let found = memory.len(own);
    if found != n_row {
        memory.free(own);
        return Err(format!("expected {n_row} rows, found {found}"));
    }
    Ok(own)
}

/// Tokens as bytes.
pub(crate) fn token_bytes(tokens: &[Token]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

/// And back.
pub(crate) fn tokens_of(bytes: &[u8]) -> Vec<Token> {
    bytes.as_chunks().0.iter().map(|token| Token::from_le_bytes(*token)).collect()
}

/// What a step knows of output row `i`, in the sampler's words.
pub fn known(out: &StepOut, i: usize) -> Option<Known> {
    out.summary(i).map(|row| Known { token: row.at, log_sum: row.log_sum })
}
