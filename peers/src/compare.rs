//! Are both computing the same model? Logits of the same tokens side by side.
//!
//! The reference is llama.cpp with weights as in the file. It is compared with us and, as a yardstick, with itself with
//! repacked weights: both round activations to 8 bits, so no two of these agree exactly.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    curve::Engines,
    engine::{Engine, Keep, Outputs, Token, fill},
    llama::argmax,
    report::{Report, columns},
};

/// How one row of logits differs from the reference's.
#[derive(Clone, Copy, Debug, Default)]
struct Difference {
    max_abs: f64,
    mean_abs: f64,
    /// Of the reference's distribution from the other's, in nats.
    kl: f64,
    same_top: bool,
    /// -log probability of the next token, where there is one.
    nll: f64,
    reference_nll: f64,
}

impl Difference {
    fn new(reference: &[f32], other: &[f32], next: Option<Token>) -> Difference {
        assert_eq!(reference.len(), other.len(), "rows of different vocabularies");
        let (lse_r, lse_o) = (log_sum_exp(reference), log_sum_exp(other));
        let mut difference = Difference::default();
        for (&r, &o) in reference.iter().zip(other) {
            let (r, o) = (f64::from(r), f64::from(o));
            difference.max_abs = difference.max_abs.max((r - o).abs());
            difference.mean_abs += (r - o).abs() / reference.len() as f64;
            let log_p = r - lse_r;
            difference.kl += log_p.exp() * (log_p - (o - lse_o));
        }
        difference.same_top = argmax(reference) == argmax(other);
        if let Some(next) = next {
            difference.nll = lse_o - f64::from(other[next as usize]);
            difference.reference_nll = lse_r - f64::from(reference[next as usize]);
        }
        difference
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(max) + sum.ln()
}

/// Rows whose logits are held at once.
const N_ROW: usize = 64;

/// Differences from the last engine, per other engine and row, of one run of tokens through empty sequences. `is_wanted`
/// says which rows are looked at.
fn differences(
    engines: &mut Engines,
    tokens: &[Token],
    is_wanted: impl Fn(usize) -> bool,
) -> Result<Vec<Vec<Difference>>> {
    let Some((reference, others)) = engines.all.split_last_mut() else { return Ok(Vec::new()) };
    let mut found = vec![Vec::new(); others.len()];
    reference.reset()?;
    others.iter_mut().try_for_each(|other| other.reset())?;
    for (i, rows) in tokens.chunks(N_ROW).enumerate() {
        reference.forward(&[rows], Outputs::All, Keep::Rows)?;
        for (other, found) in others.iter_mut().zip(&mut found) {
            other.forward(&[rows], Outputs::All, Keep::Rows)?;
            for row in (0..rows.len()).filter(|row| is_wanted(i * N_ROW + row)) {
                let next = tokens.get(i * N_ROW + row + 1).copied();
                found.push(Difference::new(reference.logits(row), other.logits(row), next));
            }
        }
    }
    Ok(found)
}

/// One line for many rows.
fn summary(name: &str, rows: &[Difference]) -> Vec<Value> {
    let mean = |of: fn(&Difference) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
    let max = |of: fn(&Difference) -> f64| rows.iter().map(of).fold(0.0, f64::max);
    vec![
        json!(name),
        json!(rows.len()),
        json!(max(|d| d.max_abs)),
        json!(mean(|d| d.mean_abs)),
        json!(mean(|d| d.kl)),
        json!(max(|d| d.kl)),
        json!(mean(|d| f64::from(u8::from(d.same_top)))),
        json!(mean(|d| d.nll).exp()),
        json!(mean(|d| d.reference_nll).exp()),
    ]
}

const SUMMARY: [&str; 9] =
    ["engine", "rows", "max abs", "mean abs", "mean KL", "max KL", "same top-1", "perplexity", "reference's"];

fn other_names(engines: &Engines) -> Result<Vec<String>> {
    let names = engines.all.iter().map(|engine| engine.name().to_string());
    let names: Vec<_> = names.take(engines.all.len() - 1).collect();
    ensure!(!names.is_empty(), "--engines: expected two at least");
    Ok(names)
}

/// Compares the logits of every row of `tokens`.
pub fn logits(engines: &mut Engines, tokens: &[Token], report: &mut Report) -> Result<()> {
    let names = other_names(engines)?;
    let found = differences(engines, tokens, |_| true)?;
    let last = engines.all.last().context("an engine")?;
    report.fact("reference", last.name());
    report.fact("spread of the reference's last logits", spread(&**last, (tokens.len() - 1) % N_ROW));
    for (name, rows) in names.iter().zip(&found) {
        let line = |(i, d): (usize, &Difference)| {
            let top = if d.same_top { "same" } else { "other" };
            vec![json!(i), json!(tokens[i]), json!(d.max_abs), json!(d.mean_abs), json!(d.kl), json!(top)]
        };
        let names = columns(&["position", "token", "max abs", "mean abs", "KL", "top-1"]);
        report.table(&format!("{name}, row by row"), names, rows.iter().enumerate().map(line).collect());
    }
    // The last row has no next token.
    let lines = names.iter().zip(&found).map(|(name, rows)| summary(name, &rows[..rows.len() - 1]));
    report.table("all but the last row", columns(&SUMMARY), lines.collect());
    Ok(())
}

/// Rows of the largest batch that [`invariance`] looks at.
pub const N_BATCH_MAX: usize = 16;

/// Does verifying n rows at once give what decoding them one by one gives? Also shows that rows which are taken back leave
/// no trace: the batches follow each other behind the same context.
pub fn invariance(engines: &mut Engines, tokens: &[Token], report: &mut Report) -> Result<()> {
    let (past, rows) = tokens.split_at(tokens.len() - N_BATCH_MAX.min(tokens.len() - 1));
    let mut lines = Vec::new();
    for engine in &mut engines.all {
        engine.reset()?;
        fill(&mut **engine, past, N_ROW, Outputs::None)?;
        let mut alone = Vec::new();
        for row in rows {
            engine.forward(&[&[*row]], Outputs::All, Keep::Rows)?;
            alone.push(engine.logits(0).to_vec());
        }
        engine.reset()?;
        fill(&mut **engine, past, N_ROW, Outputs::None)?;
        for n in [1, 2, 3, 4, 8, N_BATCH_MAX].into_iter().filter(|&n| n <= rows.len()) {
            engine.forward(&[&rows[..n]], Outputs::All, Keep::Nothing)?;
            let (mut max_abs, mut n_same_top) = (0.0f32, 0);
            for (i, alone) in alone[..n].iter().enumerate() {
                let row = engine.logits(i);
                max_abs = row.iter().zip(alone).map(|(a, b)| (a - b).abs()).fold(max_abs, f32::max);
                n_same_top += usize::from(argmax(row) == argmax(alone));
            }
            let verdict = if max_abs == 0.0 { "equal" } else { "differ" };
            lines.push(vec![
                json!(engine.name()),
                json!(n),
                json!(verdict),
                json!(max_abs),
                json!(format!("{n_same_top} of {n}")),
            ]);
        }
    }
    let names = ["engine", "n", "logits", "max abs", "same top-1"];
    report.table("n rows at once against one by one", columns(&names), lines);
    Ok(())
}

/// Standard deviation of a row of logits: what absolute differences are to be seen against.
fn spread(engine: &dyn Engine, row: usize) -> f64 {
    let logits = engine.logits(row);
    let n = logits.len() as f64;
    let mean = logits.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    (logits.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Compares perplexities over a text, in chunks that each begin with an empty context. The second half of a chunk
/// counts, as in llama.cpp's own tool, so that every counted row has some context.
pub fn perplexity(
    engines: &mut Engines,
    tokens: &[Token],
    bos: Option<Token>,
    (n_chunk, chunk_len): (usize, usize),
    report: &mut Report,
) -> Result<()> {
    let names = other_names(engines)?;
    ensure!(tokens.len() >= chunk_len, "the text has {} tokens, a chunk {chunk_len}", tokens.len());
    let mut all = vec![Vec::new(); names.len()];
    let chunks = tokens.chunks_exact(chunk_len).take(n_chunk);
    report.fact("chunks", chunks.len());
    report.fact("tokens of a chunk", chunk_len);
    report.fact("reference", engines.all.last().context("an engine")?.name());
    for chunk in chunks {
        let mut chunk = chunk.to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        let counts = |row: usize| (chunk_len / 2..chunk_len - 1).contains(&row);
        for (all, found) in all.iter_mut().zip(differences(engines, &chunk, counts)?) {
            all.extend(found);
        }
    }
    let lines = names.iter().zip(&all).map(|(name, rows)| summary(name, rows));
    report.table("perplexity", columns(&SUMMARY), lines.collect());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_do_not_differ() {
        let row = [0.5, -1.0, 3.0];
        let difference = Difference::new(&row, &row, Some(1));
        assert_eq!((difference.max_abs, difference.kl, difference.same_top), (0.0, 0.0, true));
        assert_eq!(difference.nll, difference.reference_nll);
    }

    #[test]
    fn two_tokens_by_hand() {
        // P = (1/2, 1/2), Q = (1/4, 3/4), whatever is added to all logits.
        let difference = Difference::new(&[7.0, 7.0], &[2.0, 2.0 + 3f32.ln()], Some(0));
        let kl = 0.5 * 2f64.ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((difference.kl - kl).abs() < 1e-6, "{difference:?}");
        assert!(
            (difference.nll - 4f64.ln()).abs() < 1e-6 && (difference.reference_nll - 2f64.ln()).abs() < 1e-6
        );
        assert!(!difference.same_top && (difference.max_abs - 5.0).abs() < 1e-6);
    }
}
