//! `paceline perplexity`: how well a model predicts a text, and how far its predictions are from those of another one, which
//! is what types of weights and of KV cells cost.
//!
//! As `llama-perplexity` does it: the text is cut into windows of the context's length, each is computed for itself, and of
//! each the second half is scored, so that a scored token has at least half a context before it. The first token of a window is
//! replaced by BOS where the model wants one. The perplexity is `exp` of the mean of `-ln p(token)`.
//!
//! With `--kl-divergence-base FILE` the logits of all scored rows are kept ([`reference`]), with `--kl-divergence FILE` a run is
//! held against them ([`divergence`]).

mod divergence;
mod reference;
pub mod window;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    flags::{ModelFlags, SizeFlags, TemplateFlags},
    later_flags::LaterFlags,
    load::Loaded,
    output::say,
    progress,
};
use divergence::Divergence;
use reference::{Reference, ReferenceWriter, Shape};
use window::{LogProbs, N_CTX_DEFAULT, Windows, row_by_row, windows_of};

/// Measures how well a model predicts a text, and how far it is from another one
#[derive(Args, Debug)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelFlags,
    /// Text to predict
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Most windows of the text; -1 is all
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    chunks: i64,
    /// Reads the texts of control tokens, such as turn markers, as these tokens
    #[arg(long)]
    parse_special: bool,
    /// Keeps the logits of all scored tokens in this file, 4 bytes for each token of the vocabulary
    #[arg(long, visible_alias = "save-all-logits", value_name = "FILE")]
    kl_divergence_base: Option<PathBuf>,
    /// Compares with the logits in this file, or in that of --kl-divergence-base. The text is in it, too
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    kl_divergence: Option<Option<PathBuf>>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sizes: SizeFlags,
    #[command(flatten)]
    later: LaterFlags,
}

/// Runs it.
pub fn run(mut args: PerplexityArgs) -> Result<()> {
    for words in args.later.check()? {
        eprintln!("{words}");
    }
    let (base, out) = match (args.kl_divergence.take(), args.kl_divergence_base.take()) {
        (None, out) => (None, out),
        (Some(Some(base)), out) => (Some(base), out),
        // As llama-perplexity has it: the file is read if the second flag is there.
        (Some(None), Some(base)) => (Some(base), None),
        (Some(None), None) => {
            bail!("--kl-divergence: expected a file\nhint: --kl-divergence-base FILE makes one")
        }
    };
    ensure!(
        base.is_none() || base != out,
        "--kl-divergence-base: expected another file than the one that is read"
    );
    let mut reference = base.as_deref().map(Reference::open).transpose()?;

    if let (Some(n), Some(reference)) = (args.sizes.ctx_size, &reference) {
        let n_ctx = reference.shape().n_ctx;
        ensure!(n as usize == n_ctx, "-c {n}: expected {n_ctx}, as in {}", reference.name());
    }
    let n_ctx =
        reference.as_ref().map_or(args.sizes.ctx_size.unwrap_or(N_CTX_DEFAULT), |r| r.shape().n_ctx as u32);
    ensure!(n_ctx >= 4, "-c {n_ctx}: expected at least 4 tokens in a window");
    args.sizes.ctx_size = Some(n_ctx);
    args.sizes.parallel = Some(1);
    // Nobody drafts and nobody chats.
    let model = ModelFlags { no_draft: true, model_draft: None, hf_repo_draft: None, ..args.model.clone() };
    let plain = TemplateFlags { chat_template: Some("chatml".into()), ..TemplateFlags::default() };
    let loaded = Loaded::load(&model, &args.sizes, &plain, true)?;

    let tokens = tokens(&args, &loaded, reference.as_ref(), n_ctx as usize)?;
    let vocab = loaded.tokenizer.vocab();
    let shape = Shape {
        n_vocab: vocab.len(),
        vocab: vocab.digest(),
        n_ctx: n_ctx as usize,
        n_chunk: tokens.len() / n_ctx as usize,
    };
    if let Some(reference) = &reference {
        reference.check(&shape, &tokens)?;
    }
    let mut writer = out.as_deref().map(|path| ReferenceWriter::create(path, &shape, &tokens)).transpose()?;

    let mut windows = Windows::new(&loaded, shape.n_ctx)?;
    let (mut score, mut divergence) = (Score::default(), Divergence::default());
    let bar = progress::windows(shape.n_chunk);
    for (i, window) in tokens.chunks_exact(shape.n_ctx).enumerate() {
        windows.run(window, shape.first_scored(), |at, rows| {
            let targets = &window[at + 1..][..rows.len() / shape.n_vocab];
            let ours = row_by_row(rows, shape.n_vocab, |r, row| LogProbs::of(row).of_token(row, targets[r]));
            ensure!(ours.iter().all(|ln_p| !ln_p.is_nan()), "window {i}: logits that are not finite");
            score.extend(&ours);
            if let Some(writer) = &mut writer {
                writer.put(rows)?;
            }
            if let Some(reference) = &mut reference {
                divergence.add(reference.next(rows.len())?, rows, targets);
            }
            Ok(())
        })?;
        bar.set_position(i as u64 + 1);
        bar.set_message(format!("perplexity {:.4}", score.perplexity().0));
    }
    bar.finish_and_clear();
    if let Some(writer) = writer {
        writer.finish()?;
    }
    let divergence = reference.is_some().then_some(divergence);
    match args.json {
        true => say(format_args!(
            "{}",
            serde_json::to_string_pretty(&to_json(&loaded, &shape, &score, divergence.as_ref()))?
        )),
        false => print(&loaded, &shape, &score, divergence.as_ref()),
    }
}

/// The windows, one behind the other: from the text, or from what is compared with.
fn tokens(
    args: &PerplexityArgs,
    loaded: &Loaded,
    reference: Option<&Reference>,
    n_ctx: usize,
) -> Result<Vec<u32>> {
    let Some(path) = &args.file else {
        let n_max = usize::try_from(args.chunks).unwrap_or(usize::MAX);
        let reference = reference.context("-f: expected a file with text to predict")?;
        ensure!(
            n_max >= reference.shape().n_chunk,
            "--chunks: {} has {}",
            reference.name(),
            reference.shape().n_chunk
        );
        return Ok(reference.tokens().to_vec());
    };
    windows_of(path, &loaded.tokenizer, n_ctx, args.chunks, args.parse_special)
}

/// Sums over the scored tokens.
#[derive(Debug, Default)]
struct Score {
    n: usize,
    sum: f64,
    squares: f64,
}

impl Score {
    /// Adds logarithms of probabilities.
    fn extend(&mut self, ln_p: &[f64]) {
        for x in ln_p {
            self.n += 1;
            self.sum -= x;
            self.squares += x * x;
        }
    }

    /// Perplexity and its standard error.
    fn perplexity(&self) -> (f64, f64) {
        let n = self.n as f64;
        let mean = self.sum / n;
        let variance = (self.squares / n - mean * mean).max(0.0);
        (mean.exp(), mean.exp() * (variance / (n - 1.0).max(1.0)).sqrt())
    }
}

fn kv_types(loaded: &Loaded) -> String {
    let kv = loaded.sizes.kv;
    if kv.k == kv.v { kv.k.name().to_string() } else { format!("{}/{}", kv.k.name(), kv.v.name()) }
}

fn print(loaded: &Loaded, shape: &Shape, score: &Score, divergence: Option<&Divergence>) -> Result<()> {
    let (perplexity, error) = score.perplexity();
    say(format_args!(
        "{}, KV cells {}: perplexity {perplexity:.4} ± {error:.4} ({} tokens scored in {} windows of {})",
        loaded.name,
        kv_types(loaded),
        score.n,
        shape.n_chunk,
        shape.n_ctx
    ))?;
    for (name, text) in divergence.iter().flat_map(|divergence| divergence.lines()) {
        say(format_args!("{name:<34} {text}"))?;
    }
    Ok(())
}

fn to_json(loaded: &Loaded, shape: &Shape, score: &Score, divergence: Option<&Divergence>) -> Value {
    let (perplexity, error) = score.perplexity();
    json!({
        "build": env!("PACELINE_BUILD"),
        "model": loaded.name,
        "backend": loaded.backend.describe(),
        "cache_type_k": loaded.sizes.kv.k.name(),
        "cache_type_v": loaded.sizes.kv.v.name(),
        "n_ctx": shape.n_ctx,
        "n_chunk": shape.n_chunk,
        "n_scored": score.n,
        "perplexity": perplexity,
        "perplexity_error": error,
        "mean_nll": score.sum / score.n as f64,
        "kl_divergence": divergence.map(Divergence::to_json),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexity_of_known_probabilities() {
        let mut score = Score::default();
        score.extend(&[0.5f64.ln(), 0.125f64.ln()]);
        let (perplexity, error) = score.perplexity();
        // The geometric mean of 2 and 8; ln 2 and ln 8 deviate by ln 2 from their mean.
        assert!(
            (perplexity - 4.0).abs() < 1e-12 && (error - 4.0 * 2f64.ln()).abs() < 1e-12,
            "{perplexity} {error}"
        );
        let mut sure = Score::default();
        sure.extend(&[0.0; 3]);
        assert_eq!(sure.perplexity(), (1.0, 0.0));
    }
}
