//! `paceline synth`: a model of a known size with random weights; and the same for as long as a measurement takes.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use paceline_convert::synth::{SynthOptions, known_shapes, synthesize};

use crate::{load, output::say, progress};

/// Writes a model of a published size with random weights, for measuring
#[derive(Args, Debug)]
#[command(after_long_help = shapes_help())]
pub struct SynthArgs {
    /// Size, such as qwen3-0.6b; `:N` keeps N layers, `dflash:` in front asks for a drafter of that target
    shape: String,
    /// File to write
    out: PathBuf,
    /// Mix of types: q4_k_m, q8_0, bf16 …
    #[arg(long = "type", alias = "outtype", value_name = "MIX", default_value = "q4_k_m")]
    ty: String,
    /// What the weights follow from
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// The names that `--help` lists.
pub fn shapes_help() -> String {
    format!("Shapes: {}", known_shapes())
}

/// Runs it.
pub fn run(args: SynthArgs) -> Result<()> {
    let options = SynthOptions { shape: args.shape, ty: args.ty, out: args.out, seed: args.seed };
    let report = write(&options)?;
    let types: Vec<String> = report.types.iter().map(|(ty, n)| format!("{n} × {ty}")).collect();
    say(format_args!(
        "{}: {}, {} random weights in {}, tensors {}",
        options.out.display(),
        report.arch,
        load::short(report.n_params as f64),
        load::bytes(report.file_bytes),
        types.join(", ")
    ))
}

fn write(options: &SynthOptions) -> Result<paceline_convert::Report> {
    let bar = progress::bytes(0);
    let report = synthesize(options, |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        bar.set_message(progress.tensor.to_string());
    })?;
    bar.finish_and_clear();
    Ok(report)
}
/// A synthetic file that goes away with this, unless it was to be kept.
#[derive(Debug)]
pub struct SynthFile {
    path: PathBuf,
    keep: bool,
}

impl SynthFile {
    /// Writes it: to `keep`, or where the system keeps what is temporary.
    pub fn write(shape: &str, ty: &str, keep: Option<&Path>) -> Result<SynthFile> {
        let path = match keep {
            Some(path) => path.to_owned(),
            None => {
                let name = format!("paceline-{}-{shape}-{ty}.gguf", std::process::id());
                std::env::temp_dir().join(name.replace([':', '/', '\\'], "-"))
            }
        };
        write(&SynthOptions::new(shape, ty, &path))?;
        Ok(SynthFile { path, keep: keep.is_some() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To be called once the file is open: where the system lets go of names of open files, nothing is left behind whatever
    /// ends the process.
    pub fn forget_name(&self) {
        if !self.keep && cfg!(unix) {
            let _ = std::fs::remove_file(&self.path); // if not now, then in the end
        }
    }
}

impl Drop for SynthFile {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_file(&self.path); // it may be gone already
        }
    }
}
