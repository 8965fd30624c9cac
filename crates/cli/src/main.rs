//! The `paceline` command.
//!
//! One file per subcommand; [`load`] turns the files that flags name into an engine. Data goes to standard output, words
//! to standard error, an error ends with a `hint:` line where there is a way out.
#![forbid(unsafe_code)]

mod answer;
mod bench;
mod chat;
mod convert;
mod flags;
mod hub;
mod imatrix;
mod inspect;
mod later_flags;
mod load;
mod need;
mod output;
mod perplexity;
mod progress;
mod quantize;
mod rope_flags;
mod run;
mod serve;
mod sources;
mod synth;

use std::{fs::File, path::PathBuf, process::ExitCode, sync::Mutex};

use anyhow::{Context, Result};
use clap::{ArgAction, Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// An inference server for GGUF models, built around speculative decoding
#[derive(Parser, Debug)]
#[command(name = "paceline", version = env!("PACELINE_BUILD"), args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogFlags,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Log")]
struct LogFlags {
    /// Says more; twice for all there is. RUST_LOG chooses finely
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
    /// Writes the log to this file, not to standard error
    #[arg(long, value_name = "FILE", env = "LLAMA_LOG_FILE", hide_env = true, global = true)]
    log_file: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
enum Command {
    #[command(args_override_self = true)]
    Serve(Box<serve::ServeArgs>),
    #[command(args_override_self = true)]
    Run(Box<run::RunArgs>),
    #[command(args_override_self = true)]
    Bench(Box<bench::BenchArgs>),
    Inspect(inspect::InspectArgs),
    Convert(convert::ConvertArgs),
    Synth(synth::SynthArgs),
    Quantize(quantize::QuantizeArgs),
    #[command(args_override_self = true)]
    Imatrix(Box<imatrix::ImatrixArgs>),
    #[command(args_override_self = true)]
    Perplexity(Box<perplexity::PerplexityArgs>),
}

impl Command {
    /// What the log shows unless it is asked for more: a server says what it does, a tool only what is wrong.
    fn log_level(&self) -> &'static str {
        match self {
            Command::Serve(_) => "info",
            Command::Run(_) | Command::Bench(_) | Command::Perplexity(_) | Command::Imatrix(_) => "warn",
            Command::Inspect(_) | Command::Convert(_) | Command::Synth(_) | Command::Quantize(_) => "warn",
        }
    }

    fn run(self) -> Result<ExitCode> {
        match self {
            Command::Serve(args) => serve::run(*args).map(|()| ExitCode::SUCCESS),
            Command::Run(args) => run::run(*args),
            Command::Bench(args) => bench::run(*args),
            Command::Inspect(args) => inspect::run(args),
            Command::Convert(args) => convert::run(args).map(|()| ExitCode::SUCCESS),
            Command::Synth(args) => synth::run(args).map(|()| ExitCode::SUCCESS),
            Command::Imatrix(args) => imatrix::run(*args).map(|()| ExitCode::SUCCESS),
            Command::Perplexity(args) => perplexity::run(*args).map(|()| ExitCode::SUCCESS),
            Command::Quantize(args) => quantize::run(args).map(|()| ExitCode::SUCCESS),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(flags::one_dash(std::env::args_os()));
    let result = start_log(&cli.log, cli.command.log_level()).and_then(|()| cli.command.run());
    match result {
        Ok(code) => code,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", output::in_full(&error));
            ExitCode::FAILURE
        }
    }
}

fn start_log(flags: &LogFlags, level: &str) -> Result<()> {
    let level = match flags.verbose {
        0 => level,
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match &flags.log_file {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("{}: can't write", path.display()))?;
            builder.with_writer(Mutex::new(file)).with_ansi(false).init();
        }
        None => builder.without_time().with_writer(std::io::stderr).with_ansi(output::error_colours()).init(),
    }
    Ok(())
}
