//! What is asked of every engine, so that one loop measures all of them.

use anyhow::Result;

/// A token id.
pub type Token = u32;

/// Which rows of a forward want logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// None: filling a context.
    None,
    /// The last of each sequence: what a prompt wants.
    Last,
    /// All: what a verifier wants.
    All,
}

/// What becomes of the rows of a forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// They are behind the sequence from now on.
    Rows,
    /// They are removed again, as if every drafted token had been refused.
    Nothing,
}

/// How an engine is set up; the same for all of them.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Threads.
    pub n_threads: usize,
    /// Sequences.
    pub n_seq: usize,
    /// Context of each sequence, tentative rows included.
    pub n_ctx: usize,
    /// Most rows of a forward, over all sequences.
    pub n_ubatch: usize,
    /// Most rows of one sequence that are computed and removed again.
    pub n_tentative: usize,
}

/// A model with memory for some sequences, at the level of a forward.
pub trait Engine {
    /// What tables call it.
    fn name(&self) -> &str;
    /// Logits in a row.
    fn n_vocab(&self) -> usize;
    /// One forward over `tokens[s]`, the next rows of sequence `s`. Returns when all logits lie in memory and rows that
    /// are not kept are gone.
    fn forward(&mut self, tokens: &[&[Token]], outputs: Outputs, keep: Keep) -> Result<()>;
    /// Logits of the `i`-th row of the last forward that wanted some.
    fn logits(&self, i: usize) -> &[f32];
    /// Makes all sequences empty.
    fn reset(&mut self) -> Result<()>;
}

/// Puts `tokens` behind what sequence 0 has, `n_ubatch` rows at a time.
pub fn fill(engine: &mut dyn Engine, tokens: &[Token], n_ubatch: usize, last: Outputs) -> Result<()> {
    let n_chunk = tokens.len().div_ceil(n_ubatch);
    for (i, chunk) in tokens.chunks(n_ubatch).enumerate() {
        let outputs = if i + 1 == n_chunk { last } else { Outputs::None };
        engine.forward(&[chunk], outputs, Keep::Rows)?;
    }
    Ok(())
}

/// Token ids that no model minds: spread over the vocabulary, the same in every run, without control tokens, which
/// vocabularies keep at their ends.
pub fn some_tokens(n: usize, n_vocab: usize) -> Vec<Token> {
    let (first, n_usable) = (n_vocab / 50, n_vocab - n_vocab / 10);
    (0..n).map(|i| (first + (i.wrapping_mul(2_654_435_761) >> 7) % (n_usable - first)) as Token).collect()
}
