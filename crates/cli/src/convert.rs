//! `paceline convert`: a Hugging Face directory to a GGUF file.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use paceline_convert::{ConvertOptions, convert};

use crate::{load, output::say, progress};

/// Converts a Hugging Face directory to a GGUF file
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Directory with config.json, safetensors and tokenizer
    hf_dir: PathBuf,
    /// File to write
    out: PathBuf,
    /// Mix of types: f32, f16, bf16, q8_0, q4_k_m …
    #[arg(long = "type", alias = "outtype", value_name = "MIX", default_value = "bf16")]
    ty: String,
    /// For a drafter, the directory of its target: supplies the tokenizer, and both are checked
    #[arg(long, value_name = "HF_DIR")]
    target: Option<PathBuf>,
    /// Name of the pre-tokenizer, where the tokenizer's own pattern is not a known one
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
}

/// Runs it.
pub fn run(args: ConvertArgs) -> Result<()> {
    let options = ConvertOptions {
        hf_dir: args.hf_dir,
        out: args.out,
        ty: args.ty,
        target_dir: args.target,
        pre_tokenizer: args.pre,
    };
    let bar = progress::bytes(0);
    let report = convert(&options, |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        bar.set_message(progress.tensor.to_string());
    })?;
    bar.finish_and_clear();
    let types: Vec<String> = report.types.iter().map(|(ty, n)| format!("{n} × {ty}")).collect();
    say(format_args!(
        "{}: {}, {} weights in {}, tensors {}",
        options.out.display(),
        report.arch,
        load::short(report.n_params as f64),
        load::bytes(report.file_bytes),
        types.join(", ")
    ))?;
    for skipped in &report.skipped {
        eprintln!("left out: {} ({})", skipped.tensor, skipped.reason);
    }
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    Ok(())
}
