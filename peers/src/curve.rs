//! Speed of whole models: what n rows cost, a prompt, a long context.
//!
//! All engines are loaded at once and take turns inside every metric, so that a machine that slows down slows all of
//! them. A turn is a pause, one forward that is not counted, and some that are; who begins changes from round to round.
//! The pause is there because worker threads of both sides spin for a while after a forward: after it, all are parked.

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{
    engine::{Engine, Keep, Outputs, Settings, Token, fill, some_tokens},
    llama::{Layout, Llama, Model},
    ours::Target,
    report::{Report, Samples, columns, cpu_time},
};

/// Time in which worker threads stop spinning: OpenMP's do after a few milliseconds, ours much earlier.
const SETTLE: Duration = Duration::from_millis(25);

/// How often things are repeated.
#[derive(Clone, Copy, Debug)]
pub struct Repeat {
    /// Turns of each engine in each metric.
    pub n_round: usize,
    /// Counted forwards in a turn.
    pub n_step: usize,
}

/// A turn: waits until nobody spins, works once without counting, then counts. Returns milliseconds.
pub fn turn(n_step: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    sleep(SETTLE);
    work()?;
    (0..n_step)
        .map(|_| {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        })
        .collect()
}

/// The engines of a run, and how ours calls itself.
pub struct Engines {
    /// In the order of columns.
    pub all: Vec<Box<dyn Engine>>,
    /// Bytes of a token's K and V.
    pub cell_bytes: usize,
}

impl Engines {
    /// Loads `file` into every engine that is `wanted`.
    pub fn load(file: &Path, settings: &Settings, wanted: &[String], report: &mut Report) -> Result<Engines> {
        let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
        report.fact("file", file.display().to_string());
        report.fact("file bytes", std::fs::metadata(file)?.len());
        report.fact("threads", settings.n_threads);
        let mut all: Vec<Box<dyn Engine>> = Vec::new();
        let target = Target::load(file, settings.n_threads)?;
        report.fact("paceline backend", target.describe());
        if is_wanted("paceline") {
            all.push(Box::new(target.engine(settings, &[])?));
        }
        for (layout, name) in [(Layout::Repacked, "llama.cpp"), (Layout::Plain, "llama.cpp-nr")] {
            if is_wanted(name) {
                all.push(Box::new(Llama::new(&Model::load(file, layout)?, settings)?));
            }
        }
        ensure!(!all.is_empty(), "--engines: expected some of paceline, llama.cpp, llama.cpp-nr");
        Ok(Engines { all, cell_bytes: target.cell_bytes() })
    }

    fn names(&self) -> Vec<String> {
        self.all.iter().map(|engine| engine.name().to_string()).collect()
    }

    /// Turns of all engines at the same work.
    fn measure(
        &mut self,
        repeat: Repeat,
        mut work: impl FnMut(&mut dyn Engine) -> Result<()>,
    ) -> Result<Vec<Samples>> {
        let mut samples = vec![Samples::default(); self.all.len()];
        for round in 0..repeat.n_round {
            for i in 0..self.all.len() {
                let i = (i + round) % self.all.len();
                let engine = &mut *self.all[i];
                samples[i].extend(turn(repeat.n_step, || work(engine))?);
            }
        }
        Ok(samples)
    }

    /// Cores that this process keeps busy while every engine waits for its turn; it should be none.
    fn note_idleness(&mut self, report: &mut Report) -> Result<()> {
        let tokens = some_tokens(1, self.all[0].n_vocab());
        let mut busy = 0.0f64;
        for engine in &mut self.all {
            engine.forward(&[&tokens], Outputs::All, Keep::Nothing)?;
            sleep(SETTLE);
            let (cpu, start) = (cpu_time(), Instant::now());
            sleep(Duration::from_millis(100));
            busy = busy.max((cpu_time() - cpu).as_secs_f64() / start.elapsed().as_secs_f64());
        }
        report.fact("cores busy between turns", busy);
        if busy > 0.05 {
            eprintln!("warning: {busy:.2} cores are busy while engines wait: they disturb each other");
        }
        Ok(())
    }
}

/// The cells that a table of times shows for each engine, and the comparison of ours with the best llama.cpp.
struct Compared {
    names: Vec<String>,
}

impl Compared {
    fn columns(&self, first: &[&str]) -> Vec<String> {
        let mut all = columns(first);
        for name in &self.names {
            all.extend([format!("{name} ms"), format!("{name} min"), format!("{name} /n1")]);
        }
        if self.has_both() {
            all.push("llama.cpp best / paceline".into());
        }
        all
    }

    fn has_both(&self) -> bool {
        self.names.iter().any(|n| n == "paceline") && self.names.len() > 1
    }

    /// `base`: medians of one row, if they are known.
    fn cells(&self, samples: &[Samples], base: Option<&[f64]>) -> Vec<Value> {
        let mut cells = Vec::new();
        for (i, s) in samples.iter().enumerate() {
            cells.extend([json!(s.median()), json!(s.min()), json!(base.map(|base| s.median() / base[i]))]);
        }
        if self.has_both() {
            cells.push(json!(self.best_llama(samples, f64::min) / self.ours(samples)));
        }
        cells
    }

    fn ours(&self, samples: &[Samples]) -> f64 {
        let at = self.names.iter().position(|n| n == "paceline");
        at.map_or(f64::NAN, |at| samples[at].median())
    }

    fn best_llama(&self, samples: &[Samples], better: fn(f64, f64) -> f64) -> f64 {
        let llamas = self.names.iter().zip(samples).filter(|(name, _)| name.as_str() != "paceline");
        llamas.map(|(_, s)| s.median()).fold(f64::NAN, better)
    }
}

/// Milliseconds of a forward of `n` rows of each of some sequences, with logits of all rows, as a verifier asks for
/// them; the rows are taken back after each forward.
pub fn curve(
    engines: &mut Engines,
    (n, slots): (&[usize], &[usize]),
    depth: usize,
    repeat: Repeat,
    report: &mut Report,
) -> Result<()> {
    let n_vocab = engines.all[0].n_vocab();
    let n_seq = slots.iter().copied().max().unwrap_or(1);
    let past = some_tokens(depth, n_vocab);
    for engine in &mut engines.all {
        engine.forward(&vec![&past[..]; n_seq], Outputs::None, Keep::Rows)?;
    }
    engines.note_idleness(report)?;
    report.fact("depth", depth);
    let tokens = some_tokens(n.iter().copied().max().unwrap_or(1), n_vocab);
    let compared = Compared { names: engines.names() };
    let (mut rows, mut base) = (Vec::new(), None);
    for &n_slot in slots {
        for &n in n {
            let lanes: Vec<&[Token]> = vec![&tokens[..n]; n_slot];
            let work = |engine: &mut dyn Engine| engine.forward(&lanes, Outputs::All, Keep::Nothing);
            let samples = engines.measure(repeat, work)?;
            if n_slot == 1 && n == 1 {
                base = Some(samples.iter().map(Samples::median).collect::<Vec<_>>());
            }
            let mut row = vec![json!(n_slot), json!(n)];
            row.extend(compared.cells(&samples, base.as_deref()));
            rows.push(row);
        }
    }
    report.table("verify: ms of n rows a slot", compared.columns(&["slots", "n"]), rows);
    Ok(())
}

/// Tokens a second of a prompt, logits of its last token only.
pub fn prefill(
    engines: &mut Engines,
    prompts: &[usize],
    n_ubatch: usize,
    repeat: Repeat,
    report: &mut Report,
) -> Result<()> {
    engines.note_idleness(report)?;
    report.fact("rows of a forward", n_ubatch);
    let compared = Compared { names: engines.names() };
    let mut rows = Vec::new();
    for &n in prompts {
        let prompt = some_tokens(n, engines.all[0].n_vocab());
        let samples = engines.measure(repeat, |engine| {
            engine.reset()?;
            fill(engine, &prompt, n_ubatch, Outputs::Last)
        })?;
        let mut row = vec![json!(n)];
        row.extend(samples.iter().map(|s| json!(n as f64 / s.median() * 1e3)));
        row.push(json!(compared.best_llama(&samples, f64::min) / compared.ours(&samples)));
        rows.push(row);
    }
    let mut names = columns(&["prompt"]);
    names.extend(compared.names.iter().map(|name| format!("{name} tokens/s")));
    names.push("paceline / llama.cpp best".into());
    report.table("prefill", names, rows);
    Ok(())
}

/// Milliseconds of one row behind a short and behind a long context. What the long one adds is reading K and V.
pub fn depth(
    engines: &mut Engines,
    depth: usize,
    n_ubatch: usize,
    repeat: Repeat,
    report: &mut Report,
) -> Result<()> {
    const SHORT: usize = 32;
    ensure!(depth > SHORT, "--depth: expected more than {SHORT}, found {depth}");
    let past = some_tokens(depth, engines.all[0].n_vocab());
    let one = [past[0]];
    let work = |engine: &mut dyn Engine| engine.forward(&[&one], Outputs::All, Keep::Nothing);
    for engine in &mut engines.all {
        fill(&mut **engine, &past[..SHORT], n_ubatch, Outputs::None)?;
    }
    let short = engines.measure(repeat, work)?;
    for engine in &mut engines.all {
        let start = Instant::now();
        fill(&mut **engine, &past[SHORT..], n_ubatch, Outputs::None)?;
        eprintln!("{}: context filled in {:.0} s", engine.name(), start.elapsed().as_secs_f64());
    }
    let long = engines.measure(repeat, work)?;
    let kv_bytes = (engines.cell_bytes * (depth - SHORT)) as f64;
    let rows = (engines.names().into_iter().zip(short.iter().zip(&long)))
        .map(|(name, (short, long))| {
            let added = long.median() - short.median();
            vec![
                json!(name),
                json!(short.median()),
                json!(long.median()),
                json!(long.min()),
                json!(added),
                json!(kv_bytes / added / 1e6),
            ]
        })
        .collect();
    report.fact("depth", depth);
    report.fact("KV bytes read in addition (f16)", kv_bytes);
    let names = ["engine", "short ms", "long ms", "long min", "added ms", "KV GB/s"];
    report.table("decode of one token at depth", columns(&names), rows);
    Ok(())
}
