//! `peers`: Paceline beside llama.cpp and candle, in one process, on the same files. See `README.md` for how it is kept
//! fair.

#![deny(unsafe_code)]

mod candle;
mod compare;
mod curve;
mod dflash;
mod engine;
#[allow(unsafe_code)]
mod llama;
mod ours;
mod recorded;
mod report;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use paceline_gguf::Gguf;
use paceline_text::{Encode, Tokenizer};

use crate::{
    curve::{Engines, Repeat},
    engine::{Settings, Token, some_tokens},
    report::Report,
};

/// Paceline beside llama.cpp and candle: speed and logits, on the same files, in turn
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// What n rows cost, with logits of all of them, as a verifier asks
    Curve {
        #[command(flatten)]
        common: Common,
        /// Rows of each slot
        #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
        n: Vec<usize>,
        /// Sequences in one forward
        #[arg(long, value_delimiter = ',', default_value = "1,4")]
        slots: Vec<usize>,
        /// Tokens before the rows
        #[arg(long, default_value_t = 32)]
        depth: usize,
    },
    /// Tokens a second of a prompt
    Prefill {
        #[command(flatten)]
        common: Common,
        /// Lengths of prompts
        #[arg(long, value_delimiter = ',', default_value = "512")]
        prompt: Vec<usize>,
    },
    /// What a long context adds to a token
    Depth {
        #[command(flatten)]
        common: Common,
        /// Tokens of the context
        #[arg(long, default_value_t = 16384)]
        depth: usize,
    },
    /// A DFlash cycle: draft, verify, absorb
    Dflash {
        #[command(flatten)]
        common: Common,
        /// The drafter's GGUF file
        drafter: PathBuf,
        /// Tokens before the first cycle
        #[arg(long, default_value_t = 32)]
        depth: usize,
        /// Rows that stay each cycle, the anchor included
        #[arg(long, default_value_t = 4)]
        keep: usize,
    },
    /// Differences of logits, row by row, and of batches from single rows
    Logits {
        #[command(flatten)]
        common: Common,
        /// Text to run; a short one if not given
        #[arg(long, conflicts_with = "tokens")]
        text: Option<String>,
        /// Token ids to run
        #[arg(long, value_delimiter = ',')]
        tokens: Vec<Token>,
        /// What `reference.py` computed: its tokens are run, and all engines are compared with it
        #[arg(long, conflicts_with_all = ["text", "tokens"])]
        reference: Option<PathBuf>,
    },
    /// Perplexity of a text, and differences of its logits
    Perplexity {
        #[command(flatten)]
        common: Common,
        /// The text file
        text: PathBuf,
        /// Chunks, at most
        #[arg(long, default_value_t = 8)]
        chunks: usize,
        /// Tokens of a chunk
        #[arg(long, default_value_t = 512)]
        chunk: usize,
    },
    /// Packed matrix products against candle's, one thread
    Kernel {
        /// Columns
        #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32")]
        n: Vec<usize>,
        /// Formats: Q4_K, Q6_K, Q8_0
        #[arg(long, value_delimiter = ',')]
        types: Vec<String>,
        /// Rounds
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Common {
    /// The model's GGUF file
    file: PathBuf,
    /// Threads of every engine
    #[arg(short, long, default_value_t = 1)]
    threads: usize,
    /// Turns of each engine in each metric
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Counted forwards in a turn, after one that is not
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Rows of a forward of a prompt
    #[arg(long, default_value_t = 512)]
    ubatch: usize,
    /// Some of paceline, llama.cpp (repacked weights), llama.cpp-nr (weights as in the file)
    #[arg(long, value_delimiter = ',')]
    engines: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Common {
    fn settings(&self, n_seq: usize, n_ctx: usize, n_tentative: usize) -> Settings {
        let n_ubatch = self.ubatch.max(n_seq * n_tentative);
        Settings { n_threads: self.threads, n_seq, n_ctx, n_ubatch, n_tentative }
    }

    fn repeat(&self, report: &mut Report) -> Repeat {
        report.fact("rounds", self.rounds);
        report.fact("forwards in a round", self.steps);
        Repeat { n_round: self.rounds, n_step: self.steps }
    }

    fn load(&self, settings: &Settings, report: &mut Report) -> Result<Engines> {
        Engines::load(&self.file, settings, &self.engines, report)
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(Tokenizer::from_metadata(Gguf::open(&self.file)?.metadata())?)
    }

    /// Our tokens of `text`; whether llama.cpp makes the same ones is noted.
    fn tokens(&self, text: &str, report: &mut Report) -> Result<Vec<Token>> {
        let ours = self.tokenizer()?.encode(text, Encode { add_bos: true, parse_special: false });
        let theirs = llama::Model::load(&self.file, llama::Layout::Plain)?.tokenize(text)?;
        let first = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        let same = match first {
            None if ours.len() == theirs.len() => "the same".to_string(),
            None => format!("{} and {} of them", ours.len(), theirs.len()),
            Some(at) => format!("differ at {at}: {} and {}", ours[at], theirs[at]),
        };
        report.fact("tokens of both tokenizers", same);
        Ok(ours)
    }
}

/// Room for pages that are begun and for alignment of context sizes.
const ROOM: usize = 256;

/// For `logits`, if nothing else is given.
const TEXT: &str = "The river was low that summer, and the old ferry lay in the mud beside the landing. \
    Nobody had asked for a crossing since May. In the evenings the ferryman counted his coins: 12, 7 and 3 make 22.";

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    llama::check_build(&report::isa())?;
    let max = |of: &[usize]| of.iter().copied().max().unwrap_or(1);
    let report = match &cli.command {
        Command::Curve { common, n, slots, depth } => {
            ensure!(!n.contains(&0) && !slots.contains(&0), "--n, --slots: expected 1 at least");
            let mut report = Report::new("curve", common.json);
            let settings = common.settings(max(slots), depth + max(n) + ROOM, max(n));
            let mut engines = common.load(&settings, &mut report)?;
            let repeat = common.repeat(&mut report);
            curve::curve(&mut engines, (n, slots), *depth, repeat, &mut report)?;
            report
        }
        Command::Prefill { common, prompt } => {
            let mut report = Report::new("prefill", common.json);
            let settings = common.settings(1, max(prompt) + ROOM, 1);
            let mut engines = common.load(&settings, &mut report)?;
            let repeat = common.repeat(&mut report);
            curve::prefill(&mut engines, prompt, settings.n_ubatch, repeat, &mut report)?;
            report
        }
        Command::Depth { common, depth } => {
            let mut report = Report::new("depth", common.json);
            let settings = common.settings(1, depth + ROOM, 1);
            let mut engines = common.load(&settings, &mut report)?;
            let repeat = common.repeat(&mut report);
            curve::depth(&mut engines, *depth, settings.n_ubatch, repeat, &mut report)?;
            report
        }
        Command::Dflash { common, drafter, depth, keep } => {
            let mut report = Report::new("dflash", common.json);
            let n_cycle = common.rounds * (common.steps + 1);
            let settings = common.settings(1, depth + n_cycle * keep + ROOM, 64);
            let pair = (&*common.file, &**drafter);
            let repeat = common.repeat(&mut report);
            dflash::dflash(pair, &settings, (*depth, *keep), repeat, &mut report)?;
            report
        }
        Command::Logits { common, reference: Some(reference), .. } => {
            let mut report = Report::new("logits", common.json);
            let recorded = recorded::Recorded::open(reference)?;
            let tokens = recorded.tokens().to_vec();
            let settings = common.settings(1, tokens.len() + ROOM, 1);
            let mut engines = common.load(&settings, &mut report)?;
            engines.all.push(Box::new(recorded));
            compare::logits(&mut engines, &tokens, &mut report)?;
            report
        }
        Command::Logits { common, text, tokens, reference: None } => {
            let mut report = Report::new("logits", common.json);
            let tokens = match (&tokens[..], text) {
                ([], text) => match (common.tokens(text.as_deref().unwrap_or(TEXT), &mut report), text) {
                    (Ok(tokens), _) => tokens,
                    (Err(error), Some(_)) => return Err(error),
                    (Err(error), None) => {
                        eprintln!("the tokenizer can't be used, so token ids are made up: {error}");
                        some_tokens(64, 1000)
                    }
                },
                (tokens, _) => tokens.to_vec(),
            };
            ensure!(tokens.len() > 1, "expected two tokens at least");
            let settings = common.settings(1, tokens.len() + ROOM, compare::N_BATCH_MAX);
            let mut engines = common.load(&settings, &mut report)?;
            compare::logits(&mut engines, &tokens, &mut report)?;
            compare::invariance(&mut engines, &tokens, &mut report)?;
            report
        }
        Command::Perplexity { common, text, chunks, chunk } => {
            let mut report = Report::new("perplexity", common.json);
            let words = std::fs::read_to_string(text).with_context(|| text.display().to_string())?;
            let tokens = common.tokens(&words, &mut report)?;
            let tokenizer = common.tokenizer()?;
            let bos = tokenizer.vocab().bos().filter(|_| tokenizer.vocab().add_bos());
            let settings = common.settings(1, chunk + ROOM, 1);
            let mut engines = common.load(&settings, &mut report)?;
            compare::perplexity(&mut engines, &tokens, bos, (*chunks, *chunk), &mut report)?;
            report
        }
        Command::Kernel { n, types, rounds, json } => {
            if let Some(code) = candle::on_one_thread()? {
                return Ok(code);
            }
            let mut report = Report::new("kernel", *json);
            candle::kernels(types, n, *rounds, &mut report)?;
            report
        }
    };
    report.print()?;
    Ok(ExitCode::SUCCESS)
}
