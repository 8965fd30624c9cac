//! The two plans against the goldens, run as the drafter would never run them: the fused context itself, positions
//! that were shifted, and norms or scales applied once too often.

use std::sync::OnceLock;

use paceline_backend::{KvType, States, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_models::Model;
use paceline_sampling::{Sampler, SamplingParams};
use paceline_testkit::{Golden, goldens_dir, max_difference};

use super::*;
use crate::Token;

/// The goldens' tolerance.
const TOLERANCE: f32 = 5e-4;
/// What a mistake moves at least: forty times that.
const RED: f32 = 2e-2;

struct Bench {
    backend: Arc<dyn paceline_backend::Backend>,
    /// Kept for the weights that the network shares.
    _target: Box<dyn Model>,
    weights: Weights,
    contract: Contract,
    network: Network,
    /// The same, its embedding scaled twice over.
    scaled: Network,
    /// The same with a scale of 1, and without the target's cap.
    unscaled: Network,
    uncapped: Network,
    golden: Golden,
}

fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| Bench::new("qwen35", "dflash"))
}

/// A drafter of the same with a scale, a factor and a cap of its own, in whose candidates the latter show.
fn gemma_bench2() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| Bench::new("gemma4", "dflash2-gemma4"))
}

/// A target that scales its embedding and caps its logits.
fn gemma_bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| Bench::new("gemma4", "dflash-gemma4"))
}

impl Bench {
    fn new(target: &str, drafter: &str) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, target_dir| {
            let out = dir.path().join(format!("{name}.gguf"));
            convert(
                &ConvertOptions { target_dir, ..ConvertOptions::new(goldens_dir().join(name), &out) },
                |_| {},
            )
            .unwrap();
            Arc::new(Gguf::from_bytes(name, std::fs::read(&out).unwrap()).unwrap())
        };
        let backend: Arc<dyn paceline_backend::Backend> = Arc::new(CpuBackend::new(1).unwrap());
        let w = Weights::new(file(drafter, Some(goldens_dir().join(target))), backend.clone(), "dflash");
        let target = paceline_models::load(&file(target, None), &backend).unwrap();
        let facts = TargetFacts::of(target.hparams(), &target.shared());
        let contract = Contract::read(&w, "dflash", &facts).unwrap();
        let network = |ends| Network { ends, ..Network::load(&w, &contract, target.shared()).unwrap() };
        let ends = contract.ends;
        // Where there is no scale, another one is as wrong as it gets.
        let twice = if ends.embd_scale == 1.0 { 2.0 } else { ends.embd_scale * ends.embd_scale };
        Bench {
            network: network(ends),
            scaled: network(Ends { embd_scale: twice, ..ends }),
            unscaled: network(Ends { embd_scale: 1.0, ..ends }),
            uncapped: network(Ends { logit_cap: None, ..ends }),
            backend,
            _target: target,
            weights: w,
            contract,
            golden: Golden::open(drafter),
        }
    }
}

/// What is done otherwise than the drafter does it.
#[derive(Clone, Copy, Default)]
struct Change {
    shift_context: u32,
    shift_block: u32,
    input_norm_on_context: bool,
    ends: Altered,
}

/// What the block is embedded and its logits are made with.
#[derive(Clone, Copy, Default)]
enum Altered {
    #[default]
    Right,
    ScaledTwice,
    Unscaled,
    Uncapped,
}

impl Bench {
    fn n_features(&self) -> usize {
        self.contract.taps.len() * self.contract.n_embd_target
    }

    fn states(&self) -> Arc<dyn States> {
        let (n_head, head_dim) = (self.contract.hparams.n_head_kv, self.contract.hparams.head_dim);
        let decls: Vec<_> = self
            .contract
            .layers
            .iter()
            .map(|layer| StateDecl::Kv { n_head, head_dim, window: layer.window })
            .collect();
        let config = StateConfig { page_len: 16, kv: KvType::F32.into(), n_tentative_max: 16 };
        self.backend.alloc_states(&decls, config).unwrap()
    }

    fn record_absorb(&self, change: Change) -> Plan {
        if !change.input_norm_on_context {
            return self.network.record_absorb(self.n_features());
        }
        let mut p = PlanBuilder::new(&[]);
        let features = p.input(self.n_features());
        let ctx = p.matmul(features, &self.network.fc);
        let ctx = p.rms_norm(ctx, &self.network.hidden_norm, self.network.eps);
        for layer in &self.network.layers {
            let ctx = p.rms_norm(ctx, &layer.attn_norm, self.network.eps);
            layer.attention.append_only(&mut p, ctx);
        }
        p.finish(None)
    }

    fn run(&self, plan: Plan, states: &Arc<dyn States>, step: &Step<'_>) -> StepOut {
        let mut out = StepOut::default();
        self.backend.compile(Arc::new(plan), states).unwrap().run(step, &mut out);
        out
    }

    /// Logits of rows 1.. of the block behind `n` rows of context, and what a selector needs beside them.
    fn block(&self, n: usize, anchor: Token, change: Change) -> StepOut {
        let states = self.states();
        let mut memory = Memory::new(states.clone(), 4096);
        let seq = memory.create();
        let features = self.golden.f32("features");
        memory.prepare(seq, n, n).unwrap();
        let positions: Vec<u32> = (change.shift_context..).take(n).collect();
        let lanes = [memory.lane(seq, 0)];
        let inputs = &features[..n * self.n_features()];
        let step = Step { tokens: &[], inputs, positions: &positions, lanes: &lanes, outputs: &[] };
        self.run(self.record_absorb(change), &states, &step);
        memory.commit(seq, n);

        let n_block = self.contract.n_block;
        memory.prepare(seq, n_block, 0).unwrap();
        let mut tokens = vec![self.contract.mask; n_block];
        tokens[0] = anchor;
        let positions: Vec<u32> = (n as u32 + change.shift_block..).take(n_block).collect();
        let outputs: Vec<u32> = (1..n_block as u32).collect();
        let lanes = [memory.lane(seq, 0)];
        let step =
            Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        let network = match change.ends {
            Altered::Right => &self.network,
            Altered::ScaledTwice => &self.scaled,
            Altered::Unscaled => &self.unscaled,
            Altered::Uncapped => &self.uncapped,
        };
        self.run(network.record_fill(), &states, &step)
    }

    /// The largest difference from the reference at each point with a whole block.
    fn differences(&self, change: Change) -> Vec<f32> {
        let n_block = self.contract.n_block;
        let points = self.golden.i32("points");
        let whole = points.chunks(3).enumerate().filter(|(_, p)| p[2] as usize == n_block);
        whole
            .map(|(p, point)| {
                let got = self.block(point[0] as usize, point[1] as Token, change).output;
                let want = self.golden.f32(&format!("point.{p}.logits"));
                let row = want.len() / n_block;
                max_difference(&got, &want[row..], row).abs()
            })
            .collect()
    }
}

#[test]
fn fused_context_is_the_references() {
    let bench = bench();
    let (want, width) = (bench.golden.f32("ctx"), bench.golden.shape("ctx")[1]);
    let n = want.len() / width;
    let fused = |norm: fn(&mut PlanBuilder<'_>, &Network, Buf) -> Buf| {
        let mut p = PlanBuilder::new(&[]);
        let features = p.input(bench.n_features());
        let ctx = p.matmul(features, &bench.network.fc);
        let ctx = norm(&mut p, &bench.network, ctx);
        let ctx = p.select_outputs(ctx);
        let plan = p.finish(Some(ctx));
        let states = bench.states();
        let mut memory = Memory::new(states.clone(), 4096);
        let seq = memory.create();
        memory.prepare(seq, n, n).unwrap();
        let rows: Vec<u32> = (0..n as u32).collect();
        let inputs = bench.golden.f32("features");
        let lanes = [memory.lane(seq, 0)];
        let step = Step { tokens: &[], inputs: &inputs, positions: &rows, lanes: &lanes, outputs: &rows };
        max_difference(&bench.run(plan, &states, &step).output, &want, width).abs()
    };
    let once = fused(|p, net, ctx| p.rms_norm(ctx, &net.hidden_norm, net.eps));
    let never = fused(|_, _, ctx| ctx);
    let twice = fused(|p, net, ctx| {
        let ctx = p.rms_norm(ctx, &net.hidden_norm, net.eps);
        p.rms_norm(ctx, &net.hidden_norm, net.eps)
    });
    assert!(once < 1e-4, "{once}");
    assert!(never > RED && twice > RED, "{never} {twice}");
}

/// Largest differences from the reference, the least and the greatest over the points.
fn check(change: Change, is_right: impl Fn(f32, f32) -> bool) {
    check_with(bench(), change, is_right);
}

fn check_with(bench: &Bench, change: Change, is_right: impl Fn(f32, f32) -> bool) {
    let all = bench.differences(change);
    let (least, greatest) = all.iter().fold((f32::MAX, 0f32), |(a, b), &x| (a.min(x), b.max(x)));
    assert!(all.len() >= 5 && is_right(least, greatest), "{all:?}");
}

#[test]
fn shifting_all_positions_changes_nothing() {
    check(Change::default(), |_, greatest| greatest < TOLERANCE);
    for shift in [1, 100, 5000] {
        // An angle in f32 is the less exact the larger it is: the tolerance grows with the shift.
        let tolerance = TOLERANCE + shift as f32 * 1e-6;
        let change = Change { shift_context: shift, shift_block: shift, ..Change::default() };
        check(change, |_, greatest| greatest < tolerance);
    }
}

#[test]
fn shifting_the_block_alone_is_seen() {
    check(Change { shift_block: 1, ..Change::default() }, |least, _| least > RED);
    check(Change { shift_context: 1, ..Change::default() }, |least, _| least > RED);
}

#[test]
fn context_that_passes_the_layers_own_norm_is_seen() {
    check(Change { input_norm_on_context: true, ..Change::default() }, |least, _| least > RED);
}

#[test]
fn an_embedding_scaled_twice_is_seen() {
    check(Change { ends: Altered::ScaledTwice, ..Change::default() }, |least, _| least > RED);
}

#[test]
fn nothing_of_a_gemma_stays_for_the_next_target() {
    check_with(gemma_bench(), Change::default(), |_, greatest| greatest < TOLERANCE);
    let after = Bench::new("qwen35", "dflash");
    assert_eq!((after.network.ends.embd_scale, after.network.ends.logit_cap), (1.0, None));
    check_with(&after, Change::default(), |_, greatest| greatest < TOLERANCE);
}

#[test]
fn a_gemma_target_lends_its_scale_and_cap_once() {
    let check = |ends, is_right: fn(f32, f32) -> bool| {
        check_with(gemma_bench(), Change { ends, ..Change::default() }, is_right);
    };
    check(Altered::Right, |_, greatest| greatest < TOLERANCE);
    check(Altered::ScaledTwice, |least, _| least > RED);
    check(Altered::Unscaled, |least, _| least > RED);
    check(Altered::Uncapped, |least, _| least > RED);
}

#[test]
fn scales_and_cap_of_its_own_replace_the_targets() {
    let bench = gemma_bench2();
    let (ends, theirs) = (bench.contract.ends, gemma_bench().contract.ends);
    assert_eq!(ends, Ends { embd_scale: 5.0, logit_scale: 0.7, logit_cap: Some(2.5) });
    assert!(theirs.embd_scale != 5.0 && theirs.logit_cap != Some(2.5) && theirs.logit_scale == 1.0);
    let check = |ends, is_right: fn(f32, f32) -> bool| {
        check_with(bench, Change { ends, ..Change::default() }, is_right);
    };
    check(Altered::Right, |_, greatest| greatest < TOLERANCE);
    check(Altered::ScaledTwice, |least, _| least > RED);
    check(Altered::Unscaled, |least, _| least > RED);
    check(Altered::Uncapped, |least, _| least > RED);
}

/// The walk sees scaled and capped logits: without the cap, or with it in another place, others are chosen or chosen more
/// surely.
#[test]
fn a_selector_walks_through_capped_logits() {
    let bench = gemma_bench2();
    let v2 = bench.contract.version2.as_ref().unwrap();
    let (n_vocab, n_block) = (bench.golden.shape("point.0.logits")[1], bench.contract.n_block);
    let points = bench.golden.i32("points");
    let walk = |ends: Altered, at: usize| -> Vec<(Token, f32)> {
        let (n, anchor) = (points[3 * at] as usize, points[3 * at + 1] as Token);
        let out = bench.block(n, anchor, Change { ends, ..Change::default() });
        let mut selector = Selector::load(&bench.weights, v2, n_vocab).unwrap();
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, n_vocab, Arc::default()).unwrap();
        let mut before = anchor;
        let rows = 0..n_block - 1;
        let one = |row: usize| {
            let (logits, state) = (out.output_row(row), out.taps_rows(row..row + 1));
            let place = ((n + 1 + row) as u64, before);
            let proposal = selector.propose(&mut sampler, place, logits, state).unwrap();
            before = proposal.token;
            (proposal.token, proposal.q.ln())
        };
        rows.map(one).collect()
    };
    for at in (0..points.len() / 3).filter(|at| points[3 * at + 2] as usize == n_block) {
        let tokens = bench.golden.i32(&format!("point.{at}.path"));
        let log_q = bench.golden.f32(&format!("point.{at}.path_log_q"));
        let right = |got: &[(Token, f32)]| {
            got.iter()
                .zip(tokens.iter().zip(&log_q))
                .all(|(got, want)| got.0 == *want.0 as Token && (got.1 - want.1).abs() < TOLERANCE)
        };
        assert!(right(&walk(Altered::Right, at)), "point {at}");
        assert!(!right(&walk(Altered::Uncapped, at)), "point {at}, uncapped");
    }
}
