//! `--curve`: what the rows of a forward cost, and what that is of what the machine can do.
//!
//! Speculation pays if verifying a draft costs less than the tokens that it saves. So the cost of a forward is measured for 1 to 32 rows
//! of one sequence with logits for all (a verify), and for as many slots of one row each (a server's step), behind the same
//! context. All sizes take turns, so that what else the machine does hits all alike; the median counts and the least is
//! shown.
//!
//! Three shares say how good a figure is: of the read rate (the weights of a step, once, per second), of the arithmetic peak
//! (products per second), and, in the plot, the larger of the two times that the machine would need at best.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use paceline_backend::{StateConfig, States};
use paceline_kernels::roofline::{Point, Roofline};
use paceline_memory::SeqId;
use paceline_sampling::{DryBreakers, Sampler, SamplingParams};
use paceline_spec::{DraftRequest, Drafter, LoadDrafter};
use serde_json::{Value, json};

use super::{
    BenchArgs,
    forward::Rig,
    machine,
    plot::{Plot, Series},
    roofline,
};
use crate::{
    load::{self, Loaded},
    need::MemoryNeed,
    output::say,
    progress,
};

/// Rows, and slots, of the forwards.
const N: [usize; 10] = [1, 2, 3, 4, 5, 8, 12, 16, 24, 32];
/// Context of the sequence that a deep one is compared with.
const SHALLOW: usize = 32;
/// Most tokens that are prefilled for slots: beyond, fewer slots are measured.
const SLOT_TOKENS_MAX: usize = 16 << 10;

/// Measures, prints, draws.
pub fn run(args: &BenchArgs, loaded: &Loaded) -> Result<()> {
    ensure!(args.curve.depth > 0, "--depth: expected at least 1");
    let roofline = roofline::take(args, false)?;
    let report = Curve::measure(args, loaded, roofline)?;
    if let Some(path) = &args.curve.plot {
        std::fs::write(path, report.plot().to_svg())
            .with_context(|| format!("{}: can't write", path.display()))?;
    }
    match args.json {
        true => say(format_args!("{}", serde_json::to_string_pretty(&report.to_json())?)),
        false => report.print(),
    }
}

/// Seconds of one kind of forward.
#[derive(Clone, Debug, Default)]
struct Times(Vec<f64>);

impl Times {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// What a drafter costs.
struct DraftCost {
    contract: String,
    n_block: usize,
    /// Filling a block.
    draft: Times,
    /// Verifying it.
    verify: Times,
    /// Reading along with as many rows.
    absorb: Times,
}

impl DraftCost {
    /// A whole cycle in plain tokens: what it has to bring in to pay.
    fn cycle(&self, plain: f64) -> f64 {
        (self.draft.median() + self.verify.median() + self.absorb.median()) / plain
    }
}

struct Curve<'a> {
    args: &'a BenchArgs,
    loaded: &'a Loaded,
    roofline: Roofline,
    rig: Rig,
    rows: Vec<(usize, Times)>,
    slots: Vec<(usize, Times)>,
    /// One row behind a short context, where the measured one is long.
    shallow: Option<Times>,
    prefill: Times,
    drafter: Option<DraftCost>,
    /// What cells take.
    need: MemoryNeed,
}

/// Rows of the prefill that is timed.
const N_PREFILL: usize = 512;

impl<'a> Curve<'a> {
    fn measure(args: &'a BenchArgs, loaded: &'a Loaded, roofline: Roofline) -> Result<Curve<'a>> {
        let depth = args.curve.depth;
        let n_slot_max = (SLOT_TOKENS_MAX / depth).clamp(1, N[N.len() - 1]);
        let page_len = StateConfig::default().page_len;
        let per_sequence = (depth + N[N.len() - 1] + 2 * page_len).next_multiple_of(page_len);
        let n_cell = 2 * (n_slot_max + 1) * per_sequence + N_PREFILL + SHALLOW;
        let states = loaded.target_states(N[N.len() - 1].max(64))?;
        let mut drafter = drafter(loaded, &states, depth)?;
        let taps = drafter.as_ref().map_or(Vec::new(), |drafter| drafter.taps().to_vec());

        let line = progress::words("loading");
        let mut rig = Rig::new(loaded, states, &taps, n_cell)?;
        line.set_message("prefilling");
        let (base, _) = rig.sequence(depth, drafter.as_deref_mut().map(|drafter| drafter as _))?;
        let mut sequences = vec![base];
        while sequences.len() < n_slot_max {
            sequences.push(rig.sequence(depth, None)?.0);
        }
        let shallow = if depth >= 16 * SHALLOW { Some(rig.sequence(SHALLOW, None)?.0) } else { None };

        let empty = || N.iter().map(|&n| (n, Times::default())).collect::<Vec<_>>();
        let mut curve = Curve {
            args,
            loaded,
            roofline,
            rows: empty(),
            slots: empty().into_iter().filter(|&(n, _)| n <= n_slot_max).collect(),
            shallow: shallow.map(|_| Times::default()),
            prefill: Times::default(),
            drafter: drafter.as_ref().map(|drafter| DraftCost {
                contract: drafter.contract(),
                n_block: drafter.n_draft_max() + 1,
                draft: Times::default(),
                verify: Times::default(),
                absorb: Times::default(),
            }),
            need: MemoryNeed::new(loaded.model.states(), loaded.sizes.kv, 0),
            rig,
        };
        for round in 0..=args.curve.rounds {
            line.set_message(format!("round {round} of {}", args.curve.rounds));
            curve.round(round, &sequences, shallow, drafter.as_deref_mut())?;
        }
        line.finish_and_clear();
        Ok(curve)
    }

    /// One forward of each kind; those of round 0 only touch everything once.
    fn round(
        &mut self,
        round: usize,
        sequences: &[SeqId],
        shallow: Option<SeqId>,
        drafter: Option<&mut (dyn Drafter + 'static)>,
    ) -> Result<()> {
        let keep = |times: &mut Times, seconds: f64| {
            if round > 0 {
                times.0.push(seconds);
            }
        };
        for i in 0..N.len() {
            // Up and down in turn, so that no size always follows the same one.
            let i = if round.is_multiple_of(2) { i } else { N.len() - 1 - i };
            let (n, times) = &mut self.rows[i];
            keep(times, self.rig.verify(&sequences[..1], *n)?);
            if let Some((n, times)) = self.slots.get_mut(i) {
                keep(times, self.rig.verify(&sequences[..*n], 1)?);
            }
        }
        if let (Some(times), Some(seq)) = (&mut self.shallow, shallow) {
            keep(times, self.rig.verify(&[seq], 1)?);
        }
        if let (Some(cost), Some(drafter)) = (&mut self.drafter, drafter) {
            let n_vocab = self.loaded.tokenizer.vocab().len();
            let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
            let mut sampler = Sampler::new(params, n_vocab, DryBreakers::default().into())?;
            let (seq, position, n_max) = (sequences[0], self.args.curve.depth, drafter.n_draft_max());
            let (past, sampler) = (self.rig.past(seq), &mut sampler);
            let mut requests = [DraftRequest { seq, anchor: 1, position, n_max, past, sampler }];
            let begin = Instant::now();
            let drafts = drafter.draft(&mut requests);
            keep(&mut cost.draft, begin.elapsed().as_secs_f64());
            if let Some(fault) = &drafts[0].fault {
                anyhow::bail!("the drafter can't be measured: {fault}");
            }
            keep(&mut cost.verify, self.rig.verify(&sequences[..1], cost.n_block)?);
            keep(&mut cost.absorb, self.rig.absorb(drafter, cost.n_block));
        }
        let (seq, seconds) = self.rig.sequence(N_PREFILL, None)?;
        self.rig.free(seq);
        keep(&mut self.prefill, seconds);
        Ok(())
    }

    fn point(&self) -> &Point {
        self.roofline.at(self.args.n_threads())
    }

    /// Seconds of a plain token.
    fn plain(&self) -> f64 {
        self.rows[0].1.median()
    }

    /// Bytes per second of the weights, read once.
    fn read_rate(&self, n: usize, seconds: f64) -> f64 {
        self.rig.read_bytes(n) as f64 / seconds
    }

    fn read_share(&self, n: usize, seconds: f64) -> f64 {
        roofline::read_seconds(self.point(), self.rig.read_bytes(n)) / seconds
    }

    fn peak_share(&self, n: usize, seconds: f64) -> f64 {
        roofline::product_seconds(self.point(), self.rig.work.macs(n, n)) / seconds
    }

    /// What `n` rows would take if nothing but reading or multiplying, whichever is longer, took time.
    fn ideal(&self, n: usize) -> f64 {
        let read = roofline::read_seconds(self.point(), self.rig.read_bytes(n));
        read.max(roofline::product_seconds(self.point(), self.rig.work.macs(n, n)))
    }

    /// Products per second of prefill, on one thread.
    fn prefill_gmac(&self) -> f64 {
        let macs = self.rig.work.macs(N_PREFILL, 1).total() as f64;
        macs / self.prefill.median() / self.args.n_threads() as f64 / 1e9
    }

    /// Bytes of context, and their rate: what one row costs more behind a long context than behind a short one.
    fn kv(&self) -> Option<(u64, f64)> {
        let depth = self.args.curve.depth;
        let read = |n: usize| self.need.read_bytes(n as u64);
        let n_bytes = read(depth) - read(SHALLOW.min(depth));
        let more = self.plain() - self.shallow.as_ref()?.median();
        (more > 0.0).then_some((n_bytes, n_bytes as f64 / more))
    }

    fn print(&self) -> Result<()> {
        say(format_args!("{} on {}, {}", self.loaded.name, self.loaded.backend.describe(), machine()))?;
        roofline::print(&self.roofline)?;
        let work = &self.rig.work;
        say(format_args!(
            "\nweights read by a step of one row: {}, {} products a row; {} tokens of context; {} rounds, medians",
            load::bytes(self.rig.read_bytes(1)),
            load::short(work.macs(1, 1).total() as f64).trim(),
            self.args.curve.depth,
            self.args.curve.rounds,
        ))?;
        for (what, rows) in [("rows", &self.rows), ("slots", &self.slots)] {
            say(format_args!(
                "\n{what:>5} {:>9} {:>9} {:>6} {:>9} {:>7} {:>7} {:>9} {:>7}",
                "ms", "min ms", "ratio", "ideal ms", "GB/s", "of read", "GMAC/s", "of peak"
            ))?;
            for (n, times) in rows {
                let seconds = times.median();
                say(format_args!(
                    "{n:>5} {:>9.2} {:>9.2} {:>6.2} {:>9.2} {:>7.1} {:>6.0}% {:>9.1} {:>6.0}%",
                    1e3 * seconds,
                    1e3 * times.min(),
                    seconds / self.plain(),
                    1e3 * self.ideal(*n),
                    self.read_rate(*n, seconds) / 1e9,
                    100.0 * self.read_share(*n, seconds),
                    work.macs(*n, *n).total() as f64 / seconds / 1e9,
                    100.0 * self.peak_share(*n, seconds),
                ))?;
            }
        }
        if self.slots.len() < N.len() {
            let n = self.slots.last().map_or(0, |(n, _)| *n);
            say(format_args!("(more than {n} slots would take too long to fill at this depth)"))?;
        }
        say(format_args!(
            "\nprefill of {N_PREFILL} tokens: {:.0} tok/s, {:.1} GMAC/s a thread",
            N_PREFILL as f64 / self.prefill.median(),
            self.prefill_gmac()
        ))?;
        if let Some((n_bytes, rate)) = self.kv() {
            say(format_args!(
                "context: {} more to read than behind {SHALLOW} tokens, at {:.1} GB/s",
                load::bytes(n_bytes),
                rate / 1e9
            ))?;
        }
        if let Some(cost) = &self.drafter {
            say(format_args!(
                "drafter: block of {} in {:.2} ms, verified in {:.2} ms, read along with in {:.2} ms: \
                 one cycle = {:.2} plain tokens\n{}",
                cost.n_block,
                1e3 * cost.draft.median(),
                1e3 * cost.verify.median(),
                1e3 * cost.absorb.median(),
                cost.cycle(self.plain()),
                cost.contract
            ))?;
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        let work = &self.rig.work;
        let times = |times: &Times| json!({ "median": 1e3 * times.median(), "min": 1e3 * times.min() });
        let rows = |rows: &[(usize, Times)]| -> Value {
            rows.iter()
                .map(|(n, all)| {
                    let seconds = all.median();
                    json!({
                        "n": n,
                        "ms": times(all),
                        "ratio": seconds / self.plain(),
                        "ideal_ms": 1e3 * self.ideal(*n),
                        "weight_bytes": self.rig.read_bytes(*n),
                        "weight_gb_s": self.read_rate(*n, seconds) / 1e9,
                        "read_share": self.read_share(*n, seconds),
                        "gmac_s": work.macs(*n, *n).total() as f64 / seconds / 1e9,
                        "peak_share": self.peak_share(*n, seconds),
                    })
                })
                .collect()
        };
        json!({
            "build": env!("PACELINE_BUILD"),
            "machine": machine(),
            "model": self.loaded.name,
            "backend": self.loaded.backend.describe(),
            "n_threads": self.args.n_threads(),
            "depth": self.args.curve.depth,
            "rounds": self.args.curve.rounds,
            "roofline": roofline::to_json(&self.roofline),
            "step": {
                "weight_bytes": self.rig.read_bytes(1),
                "macs_per_row": work.row.total(),
                "macs_per_output": work.output.total(),
            },
            "rows": rows(&self.rows),
            "slots": rows(&self.slots),
            "prefill": {
                "n": N_PREFILL,
                "ms": times(&self.prefill),
                "tok_s": N_PREFILL as f64 / self.prefill.median(),
                "gmac_s_per_thread": self.prefill_gmac(),
            },
            "context": self.kv().map(|(n_bytes, rate)| json!({ "bytes": n_bytes, "gb_s": rate / 1e9 })),
            "drafter": self.drafter.as_ref().map(|cost| json!({
                "contract": cost.contract,
                "n_block": cost.n_block,
                "draft_ms": times(&cost.draft),
                "verify_ms": times(&cost.verify),
                "absorb_ms": times(&cost.absorb),
                "cycle_plain_tokens": cost.cycle(self.plain()),
            })),
        })
    }

    fn plot(&self) -> Plot {
        let points = |rows: &[(usize, Times)]| {
            rows.iter().map(|(n, times)| (*n as f64, 1e3 * times.median())).collect::<Vec<_>>()
        };
        let ideal = (1..=N[N.len() - 1]).map(|n| (n as f64, 1e3 * self.ideal(n))).collect();
        Plot {
            title: format!("Cost of a forward: {}", self.loaded.name),
            subtitle: format!(
                "{}, {} threads, {} tokens of context; median of {} rounds",
                machine(),
                self.args.n_threads(),
                self.args.curve.depth,
                self.args.curve.rounds
            ),
            x: "rows with logits in the forward".to_string(),
            y: "milliseconds".to_string(),
            series: vec![
                Series {
                    name: "rows of one sequence".to_string(),
                    points: points(&self.rows),
                    is_ideal: false,
                },
                Series { name: "slots of one row".to_string(), points: points(&self.slots), is_ideal: false },
                Series { name: "roofline".to_string(), points: ideal, is_ideal: true },
            ],
        }
    }
}

/// The first drafter, with room for a sequence of that depth and a few short ones.
fn drafter(
    loaded: &Loaded,
    target_states: &Arc<dyn States>,
    depth: usize,
) -> Result<Option<Box<dyn Drafter>>> {
    let Some((kind, file)) = loaded.drafters.first() else { return Ok(None) };
    Ok(Some((kind.load)(&LoadDrafter {
        file: file.clone(),
        backend: &loaded.backend,
        target: &*loaded.model,
        target_states,
        states: StateConfig { kv: loaded.sizes.kv_draft, ..StateConfig::default() },
        n_cell_max: depth + 1024,
        n_draft_max: loaded.sizes.n_draft_wanted,
    })?))
}
