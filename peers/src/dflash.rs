//! One cycle of DFlash: a block is drafted, the target verifies anchor and draft, some tokens are kept, and the drafter
//! takes over the target's states of them.
//!
//! Weights of synthetic files accept nothing, so the number of kept tokens is set, the same on both sides. Both absorb as
//! they do in their servers: llama.cpp every row of the verify forward, we the kept ones. Both choose greedily.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use crate::{
    curve::{Repeat, turn},
    engine::{Engine, Keep, Outputs, Settings, Token, some_tokens},
    llama::{Layout, Llama, LlamaDflash, Model, argmax},
    ours::{OursDflash, Target},
    report::{Report, Samples, columns},
};

/// Milliseconds of the parts of one cycle.
#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    draft: f64,
    verify: f64,
    absorb: f64,
}

/// A target with a drafter.
trait Speculative {
    fn name(&self) -> String;
    fn n_block(&self) -> usize;
    /// Puts a prompt into both.
    fn prompt(&mut self, tokens: &[Token]) -> Result<()>;
    /// One cycle behind `len` tokens, of which `n_keep` rows stay.
    fn cycle(&mut self, len: usize, anchor: Token, n_keep: usize) -> Result<Parts>;
    /// One token without speculation, taken back.
    fn plain(&mut self, anchor: Token) -> Result<()>;
}

fn ms(start: &mut Instant) -> f64 {
    let elapsed = start.elapsed().as_secs_f64() * 1e3;
    *start = Instant::now();
    elapsed
}

struct OurSide {
    with_taps: OursDflash,
    plain: crate::ours::Ours,
}

impl Speculative for OurSide {
    fn name(&self) -> String {
        "paceline".into()
    }

    fn n_block(&self) -> usize {
        self.with_taps.n_block()
    }

    fn prompt(&mut self, tokens: &[Token]) -> Result<()> {
        self.with_taps.verify(tokens, Outputs::None)?;
        self.with_taps.keep(tokens);
        self.plain.forward(&[tokens], Outputs::None, Keep::Rows)
    }

    fn cycle(&mut self, len: usize, anchor: Token, n_keep: usize) -> Result<Parts> {
        let mut start = Instant::now();
        let mut rows = vec![anchor];
        rows.extend(self.with_taps.draft(anchor, len)?);
        let draft = ms(&mut start);
        self.with_taps.verify(&rows, Outputs::All)?;
        std::hint::black_box((0..rows.len()).map(|i| self.with_taps.choice(i)).sum::<Token>());
        let verify = ms(&mut start);
        self.with_taps.keep(&rows[..n_keep]);
        Ok(Parts { draft, verify, absorb: ms(&mut start) })
    }

    fn plain(&mut self, anchor: Token) -> Result<()> {
        self.plain.forward(&[&[anchor]], Outputs::All, Keep::Nothing)
    }
}

struct LlamaSide {
    with_taps: LlamaDflash,
    plain: Llama,
}

impl Speculative for LlamaSide {
    fn name(&self) -> String {
        self.plain.name().into()
    }

    fn n_block(&self) -> usize {
        self.with_taps.n_block()
    }

    fn prompt(&mut self, tokens: &[Token]) -> Result<()> {
        self.with_taps.target.forward(&[tokens], Outputs::None, Keep::Rows)?;
        self.with_taps.absorb(0, tokens.len())?;
        self.plain.forward(&[tokens], Outputs::None, Keep::Rows)
    }

    fn cycle(&mut self, len: usize, anchor: Token, n_keep: usize) -> Result<Parts> {
        let mut start = Instant::now();
        let mut rows = vec![anchor];
        rows.extend(self.with_taps.draft(anchor, len)?);
        let draft = ms(&mut start);
        self.with_taps.target.forward(&[&rows], Outputs::All, Keep::Rows)?;
        std::hint::black_box((0..rows.len()).map(|i| argmax(self.with_taps.target.logits(i))).sum::<Token>());
        let verify = ms(&mut start);
        self.with_taps.absorb(len, rows.len())?;
        self.with_taps.keep(len + n_keep)?;
        Ok(Parts { draft, verify, absorb: ms(&mut start) })
    }

    fn plain(&mut self, anchor: Token) -> Result<()> {
        self.plain.forward(&[&[anchor]], Outputs::All, Keep::Nothing)
    }
}

/// Measures cycles behind `depth` tokens, of which `n_keep` rows stay each time.
pub fn dflash(
    (file, drafter): (&Path, &Path),
    settings: &Settings,
    (depth, n_keep): (usize, usize),
    repeat: Repeat,
    report: &mut Report,
) -> Result<()> {
    let target = Target::load(file, settings.n_threads)?;
    let mut sides: Vec<Box<dyn Speculative>> = vec![Box::new(OurSide {
        with_taps: OursDflash::new(&target, drafter, settings)?,
        plain: target.engine(settings, &[])?,
    })];
    for layout in [Layout::Repacked, Layout::Plain] {
        let model = Model::load(file, layout)?;
        sides.push(Box::new(LlamaSide {
            with_taps: LlamaDflash::new(Llama::new(&model, settings)?, drafter, settings)?,
            plain: Llama::new(&model, settings)?,
        }));
    }
    report.fact("file", file.display().to_string());
    report.fact("drafter", drafter.display().to_string());
    report.fact("threads", settings.n_threads);
    report.fact("depth", depth);
    report.fact("rows kept a cycle (set, not measured)", n_keep);
    let n_block = sides[0].n_block();
    ensure!(sides.iter().all(|side| side.n_block() == n_block), "engines read different block sizes");
    ensure!((1..=n_block).contains(&n_keep), "--keep: expected 1 to {n_block}, found {n_keep}");

    let prompt = some_tokens(depth + 1, target.n_vocab());
    let (prompt, anchor) = (&prompt[..depth], prompt[depth]);
    for side in &mut sides {
        side.prompt(prompt)?;
    }
    let mut lens = vec![depth; sides.len()];
    let mut parts = vec![Vec::new(); sides.len()];
    let mut plain = vec![Samples::default(); sides.len()];
    for round in 0..repeat.n_round {
        for i in 0..sides.len() {
            let i = (i + round) % sides.len();
            let side = &mut *sides[i];
            plain[i].extend(turn(repeat.n_step, || side.plain(anchor))?);
            let mut of_turn = Vec::new();
            turn(repeat.n_step, || {
                of_turn.push(side.cycle(lens[i], anchor, n_keep)?);
                lens[i] += n_keep;
                Ok(())
            })?;
            parts[i].extend_from_slice(&of_turn[1..]);
        }
    }
    let rows = (sides.iter().enumerate())
        .map(|(i, side)| {
            let part = |of: fn(&Parts) -> f64| {
                let mut samples = Samples::default();
                samples.extend(parts[i].iter().map(of).collect());
                samples.median()
            };
            let cycle = part(|p| p.draft + p.verify + p.absorb);
            vec![
                json!(side.name()),
                json!(plain[i].median()),
                json!(part(|p| p.draft)),
                json!(part(|p| p.verify)),
                json!(part(|p| p.absorb)),
                json!(cycle),
                json!(cycle / plain[i].median()),
            ]
        })
        .collect();
    let names = ["engine", "plain ms", "draft ms", "verify ms", "absorb ms", "cycle ms", "cycle / plain"];
    report.table(&format!("a DFlash cycle of {n_block}"), columns(&names), rows);
    Ok(())
}
