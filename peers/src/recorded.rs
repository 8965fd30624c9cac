//! Logits that another program wrote down, behind [`Engine`]: `reference.py` runs a checkpoint in PyTorch, unquantised.
//!
//! A file that both we and llama.cpp read quantises the weights, and either then rounds activations in its own way. Beside the
//! checkpoint itself one sees how far each is from what was meant, and not only how far they are from each other.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use paceline_gguf::safetensors::SafeTensors;

use crate::engine::{Engine, Keep, Outputs, Token};

/// The recorded rows of one sequence.
pub struct Recorded {
    tokens: Vec<Token>,
    /// `[tokens, n_vocab]`
    logits: Vec<f32>,
    n_vocab: usize,
    /// Rows behind the sequence.
    len: usize,
    /// First row of the last forward.
    first: usize,
}

impl Recorded {
    /// Reads `tokens` I32 `[n]` and `logits` F32 `[n, n_vocab]`.
    pub fn open(path: &Path) -> Result<Recorded> {
        let file = SafeTensors::open_file(path)?;
        let tokens = file.require_tensor("tokens")?;
        let tokens: Vec<Token> = (tokens.data.chunks_exact(4))
            .map(|b| Token::from_le_bytes(b.try_into().expect("four bytes")))
            .collect();
        let logits = file.to_f32("logits")?;
        ensure!(tokens.len() > 1, "{}: expected two tokens at least", path.display());
        ensure!(logits.len().is_multiple_of(tokens.len()), "{}: a row of logits per token", path.display());
        let n_vocab = logits.len() / tokens.len();
        Ok(Recorded { tokens, logits, n_vocab, len: 0, first: 0 })
    }

    /// The tokens that were run.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }
}

impl Engine for Recorded {
    fn name(&self) -> &str {
        "recorded"
    }

    fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    fn forward(&mut self, tokens: &[&[Token]], _: Outputs, keep: Keep) -> Result<()> {
        let [tokens] = tokens else { anyhow::bail!("one sequence is recorded, not {}", tokens.len()) };
        let recorded =
            self.tokens.get(self.len..self.len + tokens.len()).context("so many rows are not recorded")?;
        ensure!(recorded == *tokens, "other tokens were recorded");
        self.first = self.len;
        if keep == Keep::Rows {
            self.len += tokens.len();
        }
        Ok(())
    }

    fn logits(&self, i: usize) -> &[f32] {
        &self.logits[(self.first + i) * self.n_vocab..][..self.n_vocab]
    }

    fn reset(&mut self) -> Result<()> {
        self.len = 0;
        Ok(())
    }
}
