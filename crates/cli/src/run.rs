//! `paceline run`: one prompt, or a chat in the terminal.
//!
//! The answer goes to standard output as it comes, thoughts and figures to standard error.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use clap::Args;
use paceline_engine::{CacheConfig, Engine, Request, RequestId, TokenOut};
use paceline_sampling::{DryBreakers, SamplingParams};
use paceline_text::{Delta, Encode, ReasoningFormat, ReasoningParser, StreamDecoder, Tokenizer};
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;

use crate::{
    answer::{Answer, answer_all},
    chat::{Chat, Prompt},
    flags::{LengthFlags, ModelFlags, SamplingFlags, SizeFlags, TemplateFlags},
    later_flags::LaterFlags,
    load::Loaded,
    output::{self, colours, error_colours, piece, say},
};

/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

const GREEN: &str = "\x1b[32m";
const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// Answers a prompt, or chats in the terminal
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelFlags,
    /// The prompt; without one a chat begins
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the prompt, `-` for standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<std::path::PathBuf>,
    /// System prompt (-sys)
    #[arg(long, alias = "sys", value_name = "TEXT", allow_hyphen_values = true)]
    system_prompt: Option<String>,
    /// The prompt is plain text to continue, no chat
    #[arg(long, visible_alias = "raw", aliases = ["no-cnv", "no-conversation"])]
    no_chat: bool,
    #[command(flatten)]
    length: LengthFlags,
    /// Goes on past the end of the answer
    #[arg(long)]
    ignore_eos: bool,
    /// Shows accepted draft tokens in colour, and thoughts with their tags where they come
    #[arg(long)]
    show_draft: bool,
    /// Prints one JSON object at the end in place of the text
    #[arg(long)]
    json: bool,
    /// Leaves out the figures at the end
    #[arg(long)]
    no_stats: bool,
    #[command(flatten)]
    sizes: SizeFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    template: TemplateFlags,
    #[command(flatten)]
    later: LaterFlags,
}

/// Runs it.
pub fn run(args: RunArgs) -> Result<ExitCode> {
    for words in args.later.check()? {
        eprintln!("{words}");
    }
    let mut loaded = Loaded::load(&args.model, &args.sizes, &args.template, true)?;
    let mut params = args.sampling.params()?;
    params.validate(loaded.tokenizer.vocab().len())?;
    if args.sampling.fixed_seed().is_none() {
        params.seed = random_seed();
    }
    let session = Session {
        breakers: dry_breakers(&params, &loaded.tokenizer),
        params,
        tokenizer: loaded.tokenizer.clone(),
        stop: Stop::new()?,
        args,
    };
    let given = session.given_prompt()?;
    if given.is_some() {
        // Nothing comes after one question.
        loaded.sizes.cache = CacheConfig::OFF;
    }
    let mut engine = loaded.planning_engine()?;
    for drafter in engine.drafters() {
        tracing::info!("drafter: {}", drafter.contract());
    }
    let chat = Chat::new(&loaded.tokenizer, &loaded.template, &session.args.template)?;
    match given {
        Some(text) => {
            let prompt = match session.args.no_chat {
                true => chat.raw(&text)?,
                false => chat.question(session.args.system_prompt.as_deref(), &text)?,
            };
            session.one_shot(&mut engine, &text, prompt)
        }
        None if session.args.no_chat => {
            bail!("--no-chat: expected a prompt (-p TEXT or -f FILE), found none")
        }
        None => session.converse(&mut engine, &chat),
    }
}

/// Texts that end repetitions for DRY, where it is on.
pub fn dry_breakers(params: &SamplingParams, tokenizer: &Tokenizer) -> Arc<DryBreakers> {
    if params.dry_multiplier <= 0.0 {
        return Arc::default();
    }
    let vocab = tokenizer.vocab();
    Arc::new(DryBreakers::from_vocab(
        &params.dry_sequence_breakers,
        vocab.len() as u32,
        |token, bytes| bytes.extend_from_slice(vocab.bytes(token, false)),
        |text| tokenizer.encode(text, Encode::default()),
    ))
}

/// A seed from the clock and the process: good enough for variety.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() & 0xffff_ffff
}

/// Ctrl-C: ends the answer that is under way, or the program if there is none.
struct Stop {
    asked: Arc<AtomicBool>,
    idle: Arc<AtomicBool>,
}

impl Stop {
    fn new() -> Result<Stop> {
        let stop = Stop { asked: Arc::default(), idle: Arc::new(AtomicBool::new(true)) };
        signal_hook::flag::register_conditional_shutdown(SIGINT, INTERRUPTED.into(), stop.idle.clone())?;
        signal_hook::flag::register(SIGINT, stop.asked.clone())?;
        Ok(stop)
    }

    fn begin(&self) {
        self.asked.store(false, Ordering::Relaxed);
        self.idle.store(false, Ordering::Relaxed);
    }

    /// True if Ctrl-C was pressed since [`begin`](Self::begin).
    fn end(&self) -> bool {
        self.idle.store(true, Ordering::Relaxed);
        self.asked.load(Ordering::Relaxed)
    }
}

struct Session {
    args: RunArgs,
    params: SamplingParams,
    breakers: Arc<DryBreakers>,
    tokenizer: Arc<Tokenizer>,
    stop: Stop,
}

impl Session {
    fn given_prompt(&self) -> Result<Option<String>> {
        match (&self.args.prompt, &self.args.file) {
            (Some(text), _) => Ok(Some(text.clone())),
            (None, Some(path)) if path.as_os_str() == "-" => Ok(Some(io::read_to_string(io::stdin())?)),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("{}: can't read", path.display()))?;
                Ok(Some(text))
            }
            (None, None) => Ok(None),
        }
    }

    fn one_shot(&self, engine: &mut Engine, text: &str, prompt: Prompt) -> Result<ExitCode> {
        let (answer, _) = self.answer(engine, RequestId(0), prompt)?;
        if self.args.json {
            let mut object = json!({ "prompt": text });
            if let (Value::Object(object), Value::Object(answer)) = (&mut object, answer.to_json()) {
                object.extend(answer);
            }
            say(format_args!("{}", serde_json::to_string_pretty(&object)?))?;
        } else {
            say(format_args!(""))?;
            self.show_stats(&answer);
        }
        Ok(if answer.finish.is_some() { ExitCode::SUCCESS } else { INTERRUPTED.into() })
    }

    /// Reads questions from standard input until it ends.
    fn converse(&self, engine: &mut Engine, chat: &Chat<'_>) -> Result<ExitCode> {
        let prompts = io::stdin().is_terminal();
        if prompts {
            eprintln!(
                "/clear begins anew, /stats shows figures, /exit or Ctrl-D ends; Ctrl-C stops an answer"
            );
        }
        let system = self.args.system_prompt.iter().map(|text| json!({ "role": "system", "content": text }));
        let beginning: Vec<Value> = system.collect();
        let mut messages = beginning.clone();
        let mut last: Option<Answer> = None;
        let mut line = String::new();
        for turn in 0.. {
            if prompts {
                eprint!("> ");
                io::stderr().flush()?;
            }
            line.clear();
            if io::stdin().lock().read_line(&mut line).context("standard input")? == 0 {
                break;
            }
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => break,
                "/clear" => {
                    messages.clone_from(&beginning);
                    continue;
                }
                "/stats" => {
                    match &last {
                        Some(answer) => eprintln!("{}", answer.summary()),
                        None => eprintln!("no answer yet"),
                    }
                    continue;
                }
                command if command.starts_with('/') && !command.contains(' ') => {
                    eprintln!("unknown command {command}: there are /clear, /stats, /exit");
                    continue;
                }
                question => messages.push(json!({ "role": "user", "content": question })),
            }
            let prompt = chat.prompt(&Value::Array(messages.clone()))?;
            match self.answer(engine, RequestId(turn), prompt) {
                Ok((answer, content)) => {
                    if self.args.json {
                        say(format_args!("{}", answer.to_json()))?;
                    } else {
                        say(format_args!(""))?;
                    }
                    messages.push(json!({ "role": "assistant", "content": content }));
                    last = Some(answer);
                }
                Err(error) if output::is_closed_pipe(&error) => return Err(error),
                Err(error) => {
                    // Too long a conversation, for one: the chat goes on without this question.
                    messages.pop();
                    eprintln!("error: {}", output::in_full(&error));
                }
            }
        }
        if let (Some(answer), false) = (&last, self.args.json) {
            self.show_stats(answer);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn show_stats(&self, answer: &Answer) {
        if !self.args.no_stats {
            eprintln!("\n{}", answer.summary());
        }
    }

    /// The answer, printed as it comes, and its content without thoughts.
    fn answer(&self, engine: &mut Engine, id: RequestId, prompt: Prompt) -> Result<(Answer, String)> {
        let mut request = Request::new(id, prompt.tokens);
        request.sampling = self.params.clone();
        request.dry_breakers = self.breakers.clone();
        request.n_predict = usize::try_from(self.args.length.n_predict).ok().map(|n| n.max(1));
        request.ignore_eos = self.args.ignore_eos;
        let format = match self.args.no_chat {
            true => ReasoningFormat::None,
            false => self.args.template.reasoning_format.unwrap_or_default(),
        };
        let mut parser = ReasoningParser::new(format, prompt.thinks);
        let mut coloured = Coloured::new(&self.tokenizer);
        let (mut content, mut thinking) = (String::new(), false);
        let mut show = |deltas: Vec<Delta>, quiet: bool| -> Result<()> {
            for delta in deltas {
                match delta {
                    Delta::Content(text) => {
                        if !quiet {
                            if std::mem::take(&mut thinking) {
                                eprintln!();
                            }
                            piece(&text)?;
                        }
                        content.push_str(&text);
                    }
                    Delta::Reasoning(text) if !quiet => {
                        thinking = true;
                        let (on, off) = if error_colours() { (DIM, RESET) } else { ("", "") };
                        eprint!("{on}{text}{off}");
                    }
                    Delta::Reasoning(_) => {}
                }
            }
            Ok(())
        };
        let quiet = self.args.json || self.args.show_draft;
        self.stop.begin();
        let answers = answer_all(engine, vec![request], |_, text, tokens| {
            show(parser.push(text), quiet)?;
            if self.args.show_draft && !self.args.json {
                piece(&coloured.push(tokens))?;
            }
            Ok(!self.stop.asked.load(Ordering::Relaxed))
        });
        self.stop.end();
        let answer = answers?.into_iter().next().context("no answer")?;
        show(parser.finish(), quiet)?;
        Ok((answer, content))
    }
}

/// Tokens as text, those that the drafter had guessed in green.
struct Coloured {
    decoder: StreamDecoder,
    colours: bool,
}

impl Coloured {
    fn new(tokenizer: &Tokenizer) -> Coloured {
        Coloured { decoder: StreamDecoder::new(tokenizer.vocab().clone(), false), colours: colours() }
    }

    fn push(&mut self, tokens: &[TokenOut]) -> String {
        let mut out = String::new();
        for token in tokens {
            let text = self.decoder.push(token.id);
            match token.drafted && self.colours && !text.is_empty() {
                true => out.extend([GREEN, &text, RESET]),
                false => out.push_str(&text),
            }
        }
        out
    }
}
