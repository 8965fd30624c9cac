//! DFlash2's candidate selector: a walk from the anchor through the likeliest tokens of each row of a block.
//!
//! ```text
//! candidates of row i     the n_top likeliest tokens c by its logits z_i, scaled and capped
//! score_i(c | p)          z_i[c] + Σ_d A[p, d] · (P h_i)[d] · B[c, d]          h_i: the row's normed state
//! p                       the anchor, then what was chosen in the row before
//! ```
//!
//! So rows that were guessed at once agree with each other. What is chosen is the sampler's affair, greedy or not: it gets
//! the candidates with their scores and bans all else.
//!
//! `A` and `B` have a row for each token, some hundred megabytes together of which a block reads a few rows: they are left in
//! the mapped file. Nothing is kept from block to block.

use std::sync::Arc;

use paceline_gguf::Gguf;
use paceline_kernels::formats::{FORMATS, Format, format};
use paceline_models::Weights;
use paceline_sampling::{Proposal, SampleError, Sampler};

use super::dialect::Version2;
use crate::{LoadError, Token};

/// Logits that are looked at together: one comparison in vectors says whether any of them matters.
const CHUNK: usize = 64;

/// The tables, and room for one row's candidates.
pub(super) struct Selector {
    file: Arc<Gguf>,
    predecessors: Table,
    successors: Table,
    n_top: usize,
    top: Vec<(f32, Token)>,
    tokens: Vec<Token>,
    scores: Vec<f32>,
    gate: Vec<f32>,
    row: Vec<f32>,
}

/// A matrix of the file, a row for each token.
struct Table {
    tensor: usize,
    format: &'static Format,
    row_bytes: usize,
}

impl Table {
    fn load(w: &Weights, name: &str, dims: [usize; 2]) -> Result<Table, LoadError> {
        let tensor = w.table(name, dims, "selector_rank, n_vocab")?;
        let Some(format) = format(tensor.ty) else {
            return Err(LoadError::Backend(paceline_backend::Error::UnsupportedType {
                file: w.file().name().to_string(),
                tensor: name.to_string(),
                ty: tensor.ty,
                supported: FORMATS.iter().map(|f| f.ty.name()).collect::<Vec<_>>().join(", "),
            }));
        };
        let at = w.file().tensors().iter().position(|t| t.name == name).expect("it was just looked up");
        Ok(Table { tensor: at, format, row_bytes: tensor.ty.row_bytes(dims[0]) })
    }

    fn read(&self, file: &Gguf, token: Token, row: &mut [f32]) {
        let data = file.data(&file.tensors()[self.tensor]);
        (self.format.dequantize)(&data[token as usize * self.row_bytes..][..self.row_bytes], row);
    }
}

impl Selector {
    pub fn load(w: &Weights, v2: &Version2, n_vocab: usize) -> Result<Selector, LoadError> {
        let &Version2 { n_rank, n_top, .. } = v2;
        let table = |name| Table::load(w, name, [n_rank, n_vocab]);
        Ok(Selector {
            predecessors: table(v2.names.predecessor)?,
            successors: table(v2.names.successor)?,
            file: w.file().clone(),
            n_top,
            top: Vec::with_capacity(n_top),
            tokens: Vec::with_capacity(n_top),
            scores: Vec::with_capacity(n_top),
            gate: vec![0.0; n_rank],
            row: vec![0.0; n_rank],
        })
    }

    /// The token at `position`, behind `before`: `logits` `[n_vocab]` and `state` `[n_rank]`, which is `P h`, are its row's.
    pub fn propose(
        &mut self,
        sampler: &mut Sampler,
        (position, before): (u64, Token),
        logits: &[f32],
        state: &[f32],
    ) -> Result<Proposal, SampleError> {
        if let Err(token) = likeliest(logits, self.n_top, &mut self.top) {
            return Err(SampleError::NonFinite { position, token, value: logits[token as usize] });
        }
        self.predecessors.read(&self.file, before, &mut self.gate);
        self.gate.iter_mut().zip(state).for_each(|(a, h)| *a *= h);
        self.tokens.clear();
        self.scores.clear();
        for &(logit, token) in &self.top {
            self.successors.read(&self.file, token, &mut self.row);
            let pair = self.gate.iter().zip(&self.row).fold(0.0, |sum, (a, b)| sum + a * b);
            self.tokens.push(token);
            self.scores.push(logit + pair);
        }
        sampler.propose_among(position, &self.tokens, &self.scores)
    }
}

/// The `n` largest logits with their tokens, the largest first and the lower token of equals; bans never. On error, the token
/// of one that is no number.
fn likeliest(logits: &[f32], n: usize, top: &mut Vec<(f32, Token)>) -> Result<(), Token> {
    top.clear();
    for (at, chunk) in logits.chunks(CHUNK).enumerate() {
        let least = |top: &[(f32, Token)]| if top.len() < n { f32::NEG_INFINITY } else { top[n - 1].0 };
        let floor = least(top);
        if !chunk.iter().fold(false, |any, &x| any | (x > floor) | x.is_nan()) {
            continue;
        }
        for (i, &logit) in chunk.iter().enumerate() {
            let token = (at * CHUNK + i) as Token;
            if logit.is_nan() || logit == f32::INFINITY {
                return Err(token);
            }
            if logit > least(top) {
                top.truncate(n - 1);
                let place = top.partition_point(|(other, _)| *other >= logit);
                top.insert(place, (logit, token));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use paceline_testkit::Rng;

    use super::*;

    #[test]
    fn the_likeliest_are_those_of_a_sort() {
        let mut rng = Rng::new(5);
        for n_vocab in [1, 7, 63, 64, 65, 200, 1000] {
            // Few values, so that many are equal, and bans.
            let value = |rng: &mut Rng| match rng.range(0..9) {
                0 => f32::NEG_INFINITY,
                _ => rng.range(0..20) as f32 - 9.0,
            };
            let logits: Vec<f32> = (0..n_vocab).map(|_| value(&mut rng)).collect();
            let mut sorted: Vec<(f32, Token)> = logits.iter().copied().zip(0..).collect();
            sorted.retain(|(logit, _)| *logit > f32::NEG_INFINITY);
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for n in [1, 2, 16, 300] {
                let mut top = vec![(f32::NAN, 3)];
                assert_eq!(likeliest(&logits, n, &mut top), Ok(()));
                assert_eq!(top, sorted[..n.min(sorted.len())], "{n} of {n_vocab}");
            }
        }
    }

    #[test]
    fn what_is_no_number_is_named() {
        for (at, value) in [(0, f32::NAN), (70, f32::NAN), (199, f32::INFINITY)] {
            let mut logits: Vec<f32> = (0..200).map(|i| -(i as f32)).collect();
            logits[at] = value;
            assert_eq!(likeliest(&logits, 3, &mut Vec::new()), Err(at as Token));
        }
    }
}
