//! `paceline bench`: what a model costs here, and what its drafter gains.
//!
//! | asked for | measured |
//! |---|---|
//! | nothing else | [`answers`]: prompts answered with and without the drafter |
//! | `--curve` | [`curve`]: a forward of 1 to 32 rows, and of as many slots, against what the machine can do |
//! | `--roofline` | [`roofline`]: what the machine can do |
//!
//! The model may be a file, or one of a known size with random weights (`--shape`), which costs the same.

mod answers;
mod curve;
mod forward;
mod plot;
mod roofline;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::Args;
use paceline_engine::CacheConfig;

use crate::{
    flags::{ModelFlags, SamplingFlags, SizeFlags, TemplateFlags},
    later_flags::LaterFlags,
    load::Loaded,
    synth::{SynthFile, shapes_help},
};

/// Measures prefill, plain and speculative decoding; with --curve, what rows of a forward cost
#[derive(Args, Debug)]
#[command(after_long_help = shapes_help())]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    shape: ShapeFlags,
    #[command(flatten)]
    curve: CurveFlags,
    /// Prompt in place of the built-in ones; may be given several times
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// File with prompts, one a line
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Prompts are plain text to continue, no chat
    #[arg(long, visible_alias = "raw")]
    no_chat: bool,
    /// Tokens of each answer, at most
    #[arg(short = 'n', long = "n-predict", alias = "predict", value_name = "N", default_value_t = 128)]
    n_predict: usize,
    /// Prompt tokens of the prefill measurement; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 512)]
    n_prompt: usize,
    /// Pairs of runs per prompt
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Prints one JSON object in place of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sizes: SizeFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    template: TemplateFlags,
    #[command(flatten)]
    later: LaterFlags,
}

/// Models that are made up for the measurement.
#[derive(Args, Debug)]
#[command(next_help_heading = "Synthetic models")]
struct ShapeFlags {
    /// Target of this size with random weights: qwen3-0.6b, qwen3.6-27b:8 (8 of its layers) …
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["model", "hf_repo"])]
    shape: Option<String>,
    /// Drafter of this size with random weights: dflash:qwen3-0.6b …
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["model_draft", "hf_repo_draft"])]
    drafter_shape: Option<String>,
    /// Mix of types of both: q4_k_m, q8_0, bf16 …
    #[arg(long = "type", value_name = "MIX", default_value = "q4_k_m")]
    ty: String,
    /// Keeps the target's file here; else it is gone in the end
    #[arg(long, value_name = "FILE", requires = "shape")]
    keep_model: Option<PathBuf>,
}

/// What rows cost.
#[derive(Args, Debug)]
#[command(next_help_heading = "Costs")]
struct CurveFlags {
    /// Measures forwards of 1 to 32 rows and of 1 to 32 slots, against what this machine can do
    #[arg(long, conflicts_with = "roofline")]
    curve: bool,
    /// Measures only what this machine can do: reading memory, and multiplying
    #[arg(long)]
    roofline: bool,
    /// Tokens of context in front of the rows
    #[arg(long, value_name = "N", default_value_t = 32, requires = "curve")]
    depth: usize,
    /// Times that each forward is measured
    #[arg(long, value_name = "N", default_value_t = 9)]
    rounds: usize,
    /// Draws the curve to this SVG file
    #[arg(long, value_name = "FILE", requires = "curve")]
    plot: Option<PathBuf>,
}

/// Runs it.
pub fn run(mut args: BenchArgs) -> Result<ExitCode> {
    for words in args.later.check()? {
        eprintln!("{words}");
    }
    ensure!(args.curve.rounds > 0, "--rounds: expected at least 1");
    if args.curve.roofline {
        return roofline::run(&args).map(|()| ExitCode::SUCCESS);
    }
    let shape = &args.shape;
    let target =
        shape.shape.as_ref().map(|name| SynthFile::write(name, &shape.ty, shape.keep_model.as_deref()));
    let drafter = shape.drafter_shape.as_ref().map(|name| SynthFile::write(name, &shape.ty, None));
    let (target, drafter) = (target.transpose()?, drafter.transpose()?);
    if let Some(file) = &target {
        args.model.model = Some(file.path().to_owned());
    }
    if let Some(file) = &drafter {
        args.model.model_draft = Some(file.path().to_owned());
    }
    let mut loaded = Loaded::load(&args.model, &args.sizes, &args.template, true)?;
    // What is measured is computed, each time.
    loaded.sizes.cache = CacheConfig::OFF;
    target.iter().chain(&drafter).for_each(SynthFile::forget_name);
    if let Some(name) = &args.shape.shape {
        loaded.name = format!("{name} {}, random weights", args.shape.ty);
    }
    match args.curve.curve {
        true => curve::run(&args, &loaded).map(|()| ExitCode::SUCCESS),
        false => answers::run(&args, &loaded),
    }
}

impl BenchArgs {
    /// Threads that compute.
    fn n_threads(&self) -> usize {
        match self.sizes.n_threads() {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        }
    }
}

/// The processor, for records.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let model = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_string());
    // Virtual machines hide the name, but not the generation.
    let generation = match (field("cpu family"), field("model")) {
        (Some(family), Some(number)) => format!(" (family {family} model {number})"),
        _ => String::new(),
    };
    let n = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{model}{generation}, {n} cores, {}", std::env::consts::OS)
}
