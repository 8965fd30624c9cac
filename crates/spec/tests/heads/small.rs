//! A model that drafts for itself is right every time: its drafts are its own greedy continuation, whatever was drafted,
//! accepted and forgotten before, in a hybrid too.

use std::sync::Arc;

use paceline_backend::{Backend, PlanBuilder, Step, StepOut, cpu::CpuBackend};
use paceline_memory::Memory;
use paceline_spec::{Drafter, Kept, LoadDrafter, SeqId, load};
use paceline_testkit::{Rng, Seeded};

use crate::rig::{Parts, STATES, Target, draft, seq_ids};

const N_DRAFT: usize = 6;

fn target(name: &str) -> Target {
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
    let file = Parts::golden(name).file();
    Target { model: paceline_models::load(&file, &backend).unwrap(), backend, file }
}

fn small(target: &Target, n_cell_max: usize) -> Box<dyn Drafter> {
    let (file, backend, target_states) = (target.file.clone(), &target.backend, &target.states());
    let (target, n_draft_max) = (&*target.model, Some(N_DRAFT));
    load(&LoadDrafter { file, backend, target, target_states, states: STATES, n_cell_max, n_draft_max })
        .unwrap()
}

/// `n` greedy tokens behind `tokens`.
fn continuation(target: &Target, tokens: &[u32], n: usize) -> Vec<u32> {
    let mut p = PlanBuilder::new(&[]);
    let logits = target.model.record(&mut p);
    let states = target.backend.alloc_states(target.model.states(), STATES).unwrap();
    let mut exec = target.backend.compile(Arc::new(p.finish(Some(logits))), &states).unwrap();
    let mut memory = Memory::new(states, 4096);
    let seq = memory.create();
    let (mut rows, mut out, mut got) = (tokens.to_vec(), StepOut::default(), Vec::new());
    for _ in 0..n {
        let first = memory.len(seq) as u32;
        memory.prepare(seq, rows.len(), rows.len()).unwrap();
        let positions: Vec<u32> = (first..).take(rows.len()).collect();
        let lanes = [memory.lane(seq, 0)];
        let outputs = [rows.len() as u32 - 1];
        exec.run(
            &Step { tokens: &rows, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs },
            &mut out,
        );
        memory.commit(seq, rows.len());
        let row = out.output_row(0);
        let best = (0..row.len()).reduce(|a, b| if row[b] > row[a] { b } else { a }).unwrap();
        got.push(best as u32);
        rows = vec![best as u32];
    }
    got
}

type Slot = (SeqId, Vec<u32>, usize);

/// One goes on where another is, at times by way of bytes, if that `works`.
fn fork(drafter: &mut dyn Drafter, ids: &mut Memory, rng: &mut Rng, slots: &mut [Slot], works: bool) {
    let (from, tokens, n) = slots[rng.range(0..slots.len())].clone();
    if n == 0 || rng.chance(0.3) {
        return;
    }
    let mut to = ids.create();
    assert_eq!(drafter.fork(from, to, n), works);
    if !works {
        return;
    }
    if rng.chance(0.5) {
        let bytes = drafter.export(to).unwrap();
        drafter.forget(to);
        to = ids.create();
        let before = drafter.state_bytes();
        for cut in [0, 3, bytes.len() - 1] {
            assert!(drafter.import(to, n, &bytes[..cut]).is_err(), "{cut}");
        }
        assert_eq!(drafter.state_bytes(), before);
        drafter.import(to, n, &bytes).unwrap();
    }
    assert!(drafter.resting_bytes() > 0);
    let slot = rng.range(0..slots.len());
    drafter.forget(slots[slot].0);
    slots[slot] = (to, tokens, n);
}

fn check(name: &str, is_hybrid: bool) {
    let target = target(name);
    let n_vocab = target.model.hparams().n_vocab;
    for n_slot in [1, 2, 5, 8] {
        let seed = 40 + n_slot as u64;
        let _seeded = Seeded::new("small models of several sequences", seed);
        let mut rng = Rng::new(seed);
        let mut drafter = small(&target, 4096);
        let mut ids: Memory = seq_ids();
        let mut slots: Vec<Slot> = (0..n_slot).map(|_| (ids.create(), vec![], 0)).collect();
        for _ in 0..6 {
            for (seq, tokens, n_committed) in &mut slots {
                if rng.chance(0.15) {
                    drafter.forget(*seq);
                    (*seq, *tokens, *n_committed) = (ids.create(), vec![], 0);
                }
                // A prompt at first, longer than a chunk at times; later what was accepted and one more.
                let n_new = if tokens.is_empty() { rng.range(2..100) } else { rng.range(0..4) };
                tokens.extend((0..n_new).map(|_| rng.range(0..n_vocab) as u32));
                let n_final = tokens.len() - 1;
                let new = &tokens[*n_committed..n_final];
                if !new.is_empty() {
                    drafter.commit(&[Kept {
                        seq: *seq,
                        first_position: *n_committed,
                        tokens: new,
                        taps: &[],
                    }]);
                }
                *n_committed = n_final;
            }
            fork(&mut *drafter, &mut ids, &mut rng, &mut slots, true);
            let asked: Vec<(SeqId, usize, u32)> =
                slots.iter().map(|(seq, tokens, n)| (*seq, *n, tokens[*n])).collect();
            let n_max = rng.range(1..N_DRAFT + 1);
            let drafts = draft(&mut *drafter, &asked, n_max, n_vocab);
            for ((_, tokens, n), got) in slots.iter_mut().zip(&drafts) {
                assert_eq!(got.fault, None);
                let want = continuation(&target, tokens, n_max);
                assert_eq!(got.tokens, want, "{name}, {n_slot} slots, {n} tokens");
                // The anchor is final after this step, and so is a part of the draft, with a bonus behind.
                tokens.extend(&want[..rng.range(0..n_max + 1)]);
                tokens.push(rng.range(0..n_vocab) as u32);
            }
            // Here it has the anchor already, which a recurrent state can't give back.
            fork(&mut *drafter, &mut ids, &mut rng, &mut slots, !is_hybrid);
        }
        slots.iter().for_each(|(seq, ..)| drafter.forget(*seq));
        assert_eq!(drafter.state_bytes(), 0, "forks and all");
    }
}

#[test]
fn a_hybrid_drafts_its_own_continuation() {
    check("qwen35-mtp", true);
}

#[test]
fn a_decoder_drafts_its_own_continuation() {
    check("llama", false);
}

#[test]
fn without_room_there_is_no_draft_and_no_fault() {
    let target = target("llama");
    let mut drafter = small(&target, 32);
    let mut ids = seq_ids();
    let seq = ids.create();
    let tokens: Vec<u32> = (1..41).collect();
    drafter.commit(&[Kept { seq, first_position: 0, tokens: &tokens, taps: &[] }]);
    let got = draft(&mut *drafter, &[(seq, 40, 7)], N_DRAFT, 127).remove(0);
    assert_eq!((got.tokens.len(), got.fault), (0, None));
    let other = ids.create();
    drafter.commit(&[Kept { seq: other, first_position: 0, tokens: &tokens[..10], taps: &[] }]);
    let got = draft(&mut *drafter, &[(seq, 40, 7), (other, 10, 11)], N_DRAFT, 127);
    assert_eq!((got[0].tokens.len(), got[1].tokens.len()), (0, N_DRAFT), "one's want is not another's");
}

#[test]
fn another_vocabulary_is_refused() {
    let (target, other) = (target("qwen35-mtp"), target("llama"));
    let request = LoadDrafter {
        file: other.file.clone(),
        backend: &target.backend,
        target: &*target.model,
        target_states: &target.states(),
        states: STATES,
        n_cell_max: 64,
        n_draft_max: None,
    };
    let error = load(&request).err().unwrap().to_string();
    assert!(error.contains("expected 131 tokens, the target's, found 127"), "{error}");
}
