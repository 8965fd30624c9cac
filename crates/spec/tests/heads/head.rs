//! The head against a reading of its formulas in f64: every step of greedy drafts, from a reference's hidden states and
//! from the target's own; then each mistake that would only cost acceptance, which must be seen.

use std::sync::Arc;

use paceline_backend::{Backend, PlanBuilder, StateConfig, Step, StepOut, Tap, cpu::CpuBackend};
use paceline_memory::Memory;
use paceline_spec::{Draft, Drafter, Kept, LoadDrafter, LoadError, SeqId, kind};
use paceline_testkit::{Golden, Rng, Seeded};

use crate::rig::{Parts, STATES, Target, agrees, draft, seq_ids};

const N_DRAFT: usize = 4;

fn target(parts: &Parts) -> Target {
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
    let file = parts.file();
    Target { model: paceline_models::load(&file, &backend).unwrap(), backend, file }
}

fn load(target: &Target, n_cell_max: usize) -> Result<Box<dyn Drafter>, LoadError> {
    (kind("mtp").unwrap().load)(&LoadDrafter {
        file: target.file.clone(),
        backend: &target.backend,
        target: &*target.model,
        target_states: &target.states(),
        states: STATES,
        n_cell_max,
        n_draft_max: Some(N_DRAFT),
    })
}

struct Rig {
    drafter: Box<dyn Drafter>,
    golden: Golden,
    tokens: Vec<u32>,
    /// `[tokens.len(), n_embd]`.
    states: Vec<f32>,
    n_embd: usize,
    n_vocab: usize,
    ids: Memory,
}

impl Rig {
    fn of(parts: &Parts) -> Rig {
        Rig::at("qwen35-mtp", parts)
    }

    /// `parts` against this golden.
    fn at(golden: &str, parts: &Parts) -> Rig {
        let golden = Golden::open(golden);
        let shape = golden.shape("final_norm");
        Rig {
            drafter: load(&target(parts), 4096).unwrap_or_else(|error| panic!("{error}")),
            tokens: golden.tokens(),
            states: golden.f32("final_norm"),
            n_embd: shape[1],
            n_vocab: golden.shape("logits")[1],
            golden,
            ids: seq_ids(),
        }
    }

    fn commit(&mut self, seq: SeqId, first: usize, end: usize) {
        let taps = &self.states[first * self.n_embd..end * self.n_embd];
        self.drafter.commit(&[Kept { seq, first_position: first, tokens: &self.tokens[first..end], taps }]);
    }

    fn sequence(&mut self, n: usize, chunk: usize) -> SeqId {
        let seq = self.ids.create();
        (0..n).step_by(chunk).for_each(|first| self.commit(seq, first, n.min(first + chunk)));
        seq
    }

    fn draft_at(&mut self, n: usize, anchor: u32, chunk: usize) -> Draft {
        let seq = self.sequence(n, chunk);
        let draft = draft(&mut *self.drafter, &[(seq, n, anchor)], N_DRAFT, self.n_vocab).remove(0);
        assert_eq!(draft.fault, None);
        self.drafter.forget(seq);
        draft
    }

    /// (committed tokens, anchor, logits of each step).
    fn points(&self) -> Vec<(usize, u32, Vec<Vec<f32>>)> {
        let points = self.golden.i32("head_points");
        let logits = |i: usize| -> Vec<Vec<f32>> {
            let all = self.golden.f32(&format!("head.{i}.logits"));
            all.chunks_exact(self.n_vocab).map(<[f32]>::to_vec).collect()
        };
        points.chunks(2).enumerate().map(|(i, p)| (p[0] as usize, p[1] as u32, logits(i))).collect()
    }

    /// The sizes of context at whose points the draft is not the reference's, with the first `n_gone` tokens cut off.
    fn red(&mut self, n_gone: usize) -> Vec<usize> {
        self.tokens.drain(..n_gone);
        self.states.drain(..n_gone * self.n_embd);
        let points = self.points();
        let long_enough = points.into_iter().filter(|(n, ..)| *n > n_gone);
        let mut red = Vec::new();
        for (n, anchor, logits) in long_enough {
            if !agrees(&self.draft_at(n - n_gone, anchor, 75), &logits) {
                red.push(n);
            }
        }
        red
    }
}

fn golden() -> Parts {
    Parts::golden("qwen35-mtp")
}

/// The same with experts in target and head.
const MOE: &str = "qwen35moe-mtp";

const GREEN: [usize; 0] = [];
const ALL: [usize; 7] = [1, 2, 3, 16, 17, 40, 75];

#[test]
fn drafts_are_the_references() {
    let mut rig = Rig::of(&golden());
    assert_eq!(rig.red(0), GREEN);
    assert_eq!(Rig::at(MOE, &Parts::golden(MOE)).red(0), GREEN, "a head with experts");
    assert_eq!(
        rig.drafter.contract(),
        "draft-mtp: blk.4 of the target, state behind its final norm, embedding target's, head target's, norm own"
    );
}

/// Not the reference's states but those that the target computes here, in pieces.
#[test]
fn drafts_from_the_targets_own_states_are_the_references() {
    from_its_own_states("qwen35-mtp");
    from_its_own_states(MOE);
}

fn from_its_own_states(name: &str) {
    let parts = Parts::golden(name);
    let target = target(&parts);
    let mut p = PlanBuilder::new(&[Tap::FinalNorm]);
    let logits = target.model.record(&mut p);
    let config = StateConfig { n_tentative_max: 1, ..STATES };
    let states = target.backend.alloc_states(target.model.states(), config).unwrap();
    let mut exec = target.backend.compile(Arc::new(p.finish(Some(logits))), &states).unwrap();
    let mut memory = Memory::new(states, 4096);
    let mut rig = Rig::at(name, &parts);
    let seq = memory.create();
    let mut out = StepOut::default();
    rig.states.clear();
    for (at, tokens) in rig.tokens.chunks(20).enumerate() {
        memory.prepare(seq, tokens.len(), tokens.len()).unwrap();
        let positions: Vec<u32> = (20 * at as u32..).take(tokens.len()).collect();
        let lanes = [memory.lane(seq, 0)];
        exec.run(&Step { tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &[] }, &mut out);
        memory.commit(seq, tokens.len());
        rig.states.extend_from_slice(out.taps_rows(0..tokens.len()));
    }
    assert_eq!(rig.red(0), GREEN);
}

#[test]
fn each_mistake_is_seen() {
    let swapped = golden().edit("blk.4.nextn.eh_proj.weight", |values| {
        for row in values.chunks_exact_mut(80) {
            row.rotate_left(40);
        }
    });
    assert_eq!(Rig::of(&swapped).red(0), ALL, "halves of the projection swapped");
    let norms = golden()
        .rename("nextn.enorm", "nextn.other")
        .rename("nextn.hnorm", "nextn.enorm")
        .rename("nextn.other", "nextn.hnorm");
    assert_eq!(Rig::of(&norms).red(0), ALL, "norms of the two halves swapped");
    let head_norm = golden().without("blk.4.nextn.shared_head_norm.weight");
    assert_eq!(Rig::of(&head_norm).red(0), ALL, "the target's last norm in place of its own");

    let mut before_norm = Rig::of(&golden());
    before_norm.states = before_norm.golden.f32("hidden.3");
    assert_eq!(before_norm.red(0), ALL, "states before the final norm");
    let mut late = Rig::of(&golden());
    late.states.rotate_right(late.n_embd);
    assert_eq!(late.red(0), ALL, "states of one position before");
    let mut early = Rig::of(&golden());
    early.states.rotate_left(early.n_embd);
    assert_eq!(early.red(0), ALL, "states of the row's own position");
    // All positions move by one, which changes nothing, but the first row is missing.
    let red = Rig::of(&golden()).red(1);
    assert!(red.len() >= 4 && red.starts_with(&[2, 3]), "a row of the mirror missing: {red:?}");
}

#[test]
fn each_mistake_in_the_experts_of_a_head_is_seen() {
    let right = || Parts::golden(MOE);
    let red = |parts: Parts| Rig::at(MOE, &parts).red(0);
    let block = |part: &str| format!("blk.4.{part}.weight");
    // Per expert 20 rows of 44.
    let shifted = right().edit(&block("ffn_up_exps"), |values| values.rotate_left(20 * 44));
    assert_eq!(red(shifted), ALL, "the next expert's");
    let swapped =
        right().rename("blk.4.ffn_gate_exps", "x").rename("blk.4.ffn_up_exps", "blk.4.ffn_gate_exps");
    assert_eq!(red(swapped.rename("x.weight", &block("ffn_up_exps"))), ALL, "gate and up swapped");
    assert_eq!(red(right().set("qwen35moe.expert_used_count", 3u32)).len(), 7, "an expert less");
    let closed = right().edit(&block("ffn_down_shexp"), |values| values.fill(0.0));
    assert_eq!(red(closed), ALL, "without the shared expert");
    let open = right().edit(&block("ffn_gate_inp_shexp"), |values| values.fill(0.0));
    assert_eq!(red(open), ALL, "without the shared expert's gate");
}

#[test]
fn files_without_a_head_are_refused() {
    let plain = Target::golden();
    let error = load(plain, 64).err().unwrap().to_string();
    assert!(error.contains("`qwen35.nextn_predict_layers`: expected 1, a prediction head"), "{error}");
    let two = golden().set("qwen35.nextn_predict_layers", 2u32);
    let error = load(&target(&two), 64).err().unwrap().to_string();
    assert!(error.contains("chains of heads are not supported yet"), "{error}");
    let part = golden().without("blk.4.nextn.hnorm.weight");
    let error = load(&target(&part), 64).err().unwrap().to_string();
    assert!(error.contains("blk.4.nextn.hnorm.weight"), "{error}");
}

/// Drafts of several sequences in one call, between commits in pieces of any size, forgotten and begun anew, forked: each is
/// what a fresh drafter makes of the same tokens, bit for bit. Two sequences in one step are where others crashed.
#[test]
fn any_history_drafts_as_a_fresh_drafter() {
    let mut fresh = Rig::of(&golden());
    let n_all = fresh.tokens.len();
    for n_slot in [1, 2, 5, 8] {
        let seed = n_slot as u64;
        let _seeded = Seeded::new("heads of several sequences", seed);
        let mut rng = Rng::new(seed);
        let mut rig = Rig::of(&golden());
        let mut slots: Vec<(SeqId, usize)> = (0..n_slot).map(|_| (rig.ids.create(), 0)).collect();
        let (mut n_compared, mut n_fork) = (0, 0);
        for _ in 0..30 {
            for slot in &mut slots {
                let n = rng.range(0..9).min(n_all - 1 - slot.1);
                if n > 0 {
                    rig.commit(slot.0, slot.1, slot.1 + n);
                    slot.1 += n;
                }
                if slot.1 == n_all - 1 || rng.chance(0.05) {
                    rig.drafter.forget(slot.0);
                    *slot = (rig.ids.create(), 0);
                }
            }
            let asked: Vec<(SeqId, usize, u32)> =
                slots.iter().filter(|s| s.1 > 0).map(|&(seq, n)| (seq, n, rig.tokens[n])).collect();
            if asked.is_empty() {
                continue;
            }
            let n_max = rng.range(1..N_DRAFT + 1);
            let drafts = draft(&mut *rig.drafter, &asked, n_max, rig.n_vocab);
            for (&(_, n, anchor), got) in asked.iter().zip(drafts) {
                let mut want = fresh.draft_at(n, anchor, 75);
                want.tokens.truncate(n_max);
                want.q.truncate(n_max);
                assert_eq!(got, want, "{n_slot} slots, {n} tokens");
                n_compared += 1;
            }
            // One goes on where another is, before the draft's rows are final, and at times after some time as bytes.
            let (from, n) = slots[rng.range(0..n_slot)];
            if n > 0 && rng.chance(0.5) {
                let mut to = rig.ids.create();
                assert!(!rig.drafter.fork(from, to, n - 1), "the state behind an earlier token is not kept");
                assert!(rig.drafter.fork(from, to, n));
                if rng.chance(0.5) {
                    let bytes = rig.drafter.export(to).unwrap();
                    rig.drafter.forget(to);
                    to = rig.ids.create();
                    let before = rig.drafter.state_bytes();
                    assert!(rig.drafter.import(to, n + 1, &bytes).is_err(), "of another length");
                    assert!(rig.drafter.import(to, n, &bytes[..bytes.len() - 1]).is_err(), "cut");
                    assert_eq!(rig.drafter.state_bytes(), before);
                    rig.drafter.import(to, n, &bytes).unwrap();
                }
                assert!(rig.drafter.resting_bytes() > 0);
                let slot = rng.range(0..n_slot);
                rig.drafter.forget(slots[slot].0);
                slots[slot] = (to, n);
                n_fork += 1;
            }
        }
        slots.iter().for_each(|slot| rig.drafter.forget(slot.0));
        assert_eq!(rig.drafter.state_bytes(), 0);
        assert!(n_compared >= 20 * n_slot && n_fork > 5, "{n_fork} forks");
    }
}

#[test]
fn without_room_there_is_a_shorter_draft_or_none() {
    let target = target(&golden());
    let mut rig = Rig::of(&golden());
    // One page of 16: fifteen committed rows leave one for a draft.
    rig.drafter = load(&target, 16).unwrap();
    let seq = rig.sequence(16, 4);
    let anchor = rig.tokens[16];
    let got = draft(&mut *rig.drafter, &[(seq, 16, anchor)], N_DRAFT, rig.n_vocab).remove(0);
    assert_eq!((got.tokens.len(), got.fault), (1, None));
    rig.commit(seq, 16, 17);
    rig.commit(seq, 17, 18);
    let got = draft(&mut *rig.drafter, &[(seq, 18, anchor)], N_DRAFT, rig.n_vocab).remove(0);
    assert_eq!(got.fault.as_deref(), Some("its memory has 0 of 18 committed tokens"));
    assert_eq!(rig.drafter.state_bytes(), 0);
}
