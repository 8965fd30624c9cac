//! Forwards over windows of a text, and what a row of logits says.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use paceline_backend::{Exec, Step, StepOut};
use paceline_memory::Memory;
use paceline_text::{Encode, Tokenizer};

use crate::load::Loaded;

/// Tokens of a window, if nothing is said.
pub const N_CTX_DEFAULT: u32 = 512;

/// Bytes of logits at once, as far as single rows allow.
const LOGITS_BYTES: usize = 64 << 20;

/// The windows of a text, one behind the other, at most `n_chunk` of them if that is not below 0. What does not fill a window
/// is left out.
pub fn windows_of(
    path: &Path,
    tokenizer: &Tokenizer,
    n_ctx: usize,
    n_chunk: i64,
    parse_special: bool,
) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: can't read", path.display()))?;
    let mut tokens = tokenizer.encode(&text, Encode { add_bos: true, parse_special });
    let n_chunk = (tokens.len() / n_ctx).min(usize::try_from(n_chunk).unwrap_or(usize::MAX));
    ensure!(
        n_chunk > 0,
        "{}: expected at least one window of {n_ctx} tokens, found {} tokens\nhint: a longer text, or a smaller -c",
        path.display(),
        tokens.len()
    );
    tokens.truncate(n_chunk * n_ctx);
    let vocab = tokenizer.vocab();
    if let Some(bos) = vocab.bos().filter(|_| vocab.add_bos()) {
        tokens.chunks_exact_mut(n_ctx).for_each(|window| window[0] = bos);
    }
    Ok(tokens)
}

/// A target that computes windows, each in an empty memory.
pub struct Windows {
    exec: Box<dyn Exec>,
    memory: Memory,
    out: StepOut,
    n_ubatch: usize,
    n_output_max: usize,
}

impl Windows {
    /// For windows of `n_ctx` tokens.
    pub fn new(loaded: &Loaded, n_ctx: usize) -> Result<Windows> {
        let states = loaded.target_states(1)?;
        let (_, exec) = loaded.target(&[], &states)?;
        Ok(Windows {
            exec,
            memory: Memory::new(states, n_ctx),
            out: StepOut::default(),
            n_ubatch: loaded.sizes.n_ubatch,
            n_output_max: (LOGITS_BYTES / (4 * loaded.model.hparams().n_vocab)).max(1),
        })
    }

    /// Computes a window. `rows` gets the logits `[n, n_vocab]` behind tokens `first` to the last but one, some rows at a time,
    /// with the index of the token that is the first of them.
    pub fn run(
        &mut self,
        window: &[u32],
        first: usize,
        mut rows: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let seq = self.memory.create();
        let mut at = 0;
        while at < window.len() {
            let unscored = first.saturating_sub(at);
            let n = (window.len() - at).min(self.n_ubatch).min(unscored + self.n_output_max);
            self.memory.prepare(seq, n, n)?;
            let positions: Vec<u32> = (at as u32..).take(n).collect();
            // Nothing is known about what follows the last token.
            let scored = at.max(first)..(at + n).min(window.len() - 1);
            let outputs: Vec<u32> = scored.clone().map(|i| (i - at) as u32).collect();
            let lanes = [self.memory.lane(seq, 0)];
            let tokens = &window[at..at + n];
            let step = Step { tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
            self.exec.run(&step, &mut self.out);
            self.memory.commit(seq, n);
            if !outputs.is_empty() {
                rows(scored.start, &self.out.output[..outputs.len() * self.out.output_width])?;
            }
            at += n;
        }
        self.memory.free(seq);
        Ok(())
    }
}

/// A softmax, as what turns a logit into the logarithm of a probability.
#[derive(Clone, Copy, Debug)]
pub struct LogProbs {
    max: f32,
    ln_sum: f64,
}

impl LogProbs {
    /// Of a row of logits.
    pub fn of(row: &[f32]) -> LogProbs {
        let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        LogProbs { max, ln_sum: sum.ln() }
    }

    /// `ln p` of a logit of the row.
    pub fn ln_p(self, logit: f32) -> f64 {
        f64::from(logit) - f64::from(self.max) - self.ln_sum
    }

    /// `ln p` of a token.
    pub fn of_token(self, row: &[f32], token: u32) -> f64 {
        self.ln_p(row[token as usize])
    }
}

/// Does something with each row of `width`, on all cores if there is much; the results are in order, and the same either way.
pub fn row_by_row<R: Send>(rows: &[f32], width: usize, work: impl Fn(usize, &[f32]) -> R + Sync) -> Vec<R> {
    const MUCH: usize = 1 << 18;
    let n_row = rows.len() / width;
    let n_thread =
        if rows.len() < MUCH { 1 } else { std::thread::available_parallelism().map_or(1, |n| n.get()) };
    let n_part = n_row.div_ceil(n_thread).max(1);
    let part = |(p, part): (usize, &[f32])| -> Vec<R> {
        part.chunks_exact(width).enumerate().map(|(i, row)| work(p * n_part + i, row)).collect()
    };
    let parts = rows.chunks(n_part * width).enumerate();
    std::thread::scope(|scope| {
        let part = &part;
        let running: Vec<_> = parts.map(|rows| scope.spawn(move || part(rows))).collect();
        running.into_iter().flat_map(|part| part.join().expect("rows can be read")).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities() {
        let row = [1.0f32.ln() + 100.0, 3.0f32.ln() + 100.0, 0.0];
        let probs = LogProbs::of(&row);
        assert!((probs.of_token(&row, 1).exp() - 0.75).abs() < 1e-6);
        assert!(LogProbs::of(&[0.0, f32::NAN]).of_token(&[0.0, f32::NAN], 0).is_nan());
    }

    #[test]
    fn rows_stay_in_order() {
        let rows: Vec<f32> = (0..1 << 19).map(|i| i as f32).collect();
        let got = row_by_row(&rows, 1 << 10, |i, row| (i, row[0] as usize));
        assert!(got.iter().enumerate().all(|(i, &(at, first))| (at, first) == (i, i << 10)));
        assert_eq!(got.len(), 1 << 9);
    }
}
