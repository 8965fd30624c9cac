//! Forwards to be timed: a target, its memory, and sequences of a known length in it.
//!
//! A timed forward runs on a fork of a prepared sequence, which is dropped afterwards: whatever it did to the memory, the next one
//! finds the same. Forks, and the copies of pages that they need, are made before the clock starts.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use anyhow::{Result, ensure};
use paceline_backend::{Exec, Lane, PlanWork, States, Step, StepOut, Tap};
use paceline_memory::{Memory, SeqId};
use paceline_spec::{Drafter, Kept};

use crate::load::Loaded;

/// A compiled target with memory of its own.
pub struct Rig {
    exec: Box<dyn Exec>,
    memory: Memory,
    out: StepOut,
    n_vocab: usize,
    /// Rows of a prefill step.
    n_ubatch: usize,
    /// What the products come to.
    pub work: PlanWork,
    /// By the number of rows: bytes of the weights that [`verify`](Self::verify) read the last time.
    read_bytes: BTreeMap<usize, u64>,
}

impl Rig {
    /// A rig for `n_cell` tokens of context in `states`, with these hidden states tapped.
    pub fn new(loaded: &Loaded, states: Arc<dyn States>, taps: &[Tap], n_cell: usize) -> Result<Rig> {
        let (plan, exec) = loaded.target(taps, &states)?;
        Ok(Rig {
            exec,
            memory: Memory::new(states, n_cell),
            out: StepOut::default(),
            n_vocab: loaded.model.hparams().n_vocab,
            n_ubatch: loaded.sizes.n_ubatch,
            work: loaded.backend.work(&plan),
            read_bytes: BTreeMap::new(),
        })
    }

    /// A sequence of `len` tokens, prefilled for real; `drafter` reads along. Returns the seconds that the target took.
    pub fn sequence(&mut self, len: usize, mut drafter: Option<&mut dyn Drafter>) -> Result<(SeqId, f64)> {
        let seq = self.memory.create();
        let mut seconds = 0.0;
        while self.memory.len(seq) < len {
            let n_past = self.memory.len(seq);
            let n = self.n_ubatch.min(len - n_past);
            self.memory.prepare(seq, n, n)?;
            let (tokens, positions) = (self.tokens(n_past, n), positions(n_past, n));
            let lanes = [self.memory.lane(seq, 0)];
            let last = [n as u32 - 1];
            let outputs = if n_past + n == len { &last[..] } else { &[] };
            let step = Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs };
            let begin = Instant::now();
            self.exec.run(&step, &mut self.out);
            seconds += begin.elapsed().as_secs_f64();
            if let Some(drafter) = drafter.as_deref_mut() {
                let taps = self.out.taps_rows(0..n);
                drafter.commit(&[Kept { seq, first_position: n_past, tokens: &tokens, taps }]);
            }
            self.memory.commit(seq, n);
        }
        Ok((seq, seconds))
    }

    /// What a sequence has committed, for a drafter to look at.
    pub fn past(&self, seq: SeqId) -> Lane<'_> {
        self.memory.past(seq)
    }

    /// Forgets a sequence.
    pub fn free(&mut self, seq: SeqId) {
        self.memory.free(seq);
    }

    /// Seconds of a forward of `n` rows behind each of these sequences, the first of them certain and the others drafted, with
    /// logits of all.
    pub fn verify(&mut self, sequences: &[SeqId], n: usize) -> Result<f64> {
        let forks: Vec<SeqId> = sequences.iter().map(|&seq| self.memory.fork(seq)).collect();
        let (mut tokens, mut at) = (Vec::new(), Vec::new());
        for &fork in &forks {
            let n_past = self.memory.len(fork);
            self.memory.prepare(fork, n, 1)?;
            tokens.extend(self.tokens(n_past + 7 * at.len(), n));
            at.extend(positions(n_past, n));
        }
        let lanes: Vec<_> =
            forks.iter().enumerate().map(|(i, &fork)| self.memory.lane(fork, i * n)).collect();
        let outputs: Vec<u32> = (0..tokens.len() as u32).collect();
        let step = Step { tokens: &tokens, inputs: &[], positions: &at, lanes: &lanes, outputs: &outputs };
        let begin = Instant::now();
        self.exec.run(&step, &mut self.out);
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(
            self.out.output.iter().all(|x| x.is_finite()),
            "logits that are not finite: nothing to measure"
        );
        self.read_bytes.insert(tokens.len(), self.work.read_bytes(self.out.n_experts_read));
        for fork in forks {
            self.memory.commit(fork, 1);
            self.memory.free(fork);
        }
        Ok(seconds)
    }

    /// Bytes of the weights that a forward of `n` rows reads: with experts, the more the more rows there are.
    pub fn read_bytes(&self, n: usize) -> u64 {
        self.read_bytes.get(&n).copied().unwrap_or(self.work.weight_bytes)
    }

    /// Seconds that `drafter` takes to read along with `n` rows that became final.
    pub fn absorb(&mut self, drafter: &mut dyn Drafter, n: usize) -> f64 {
        let seq = self.memory.create();
        let tokens = self.tokens(0, n);
        let taps: Vec<f32> = self.out.taps.iter().copied().cycle().take(n * self.out.taps_width).collect();
        let begin = Instant::now();
        drafter.commit(&[Kept { seq, first_position: 0, tokens: &tokens, taps: &taps }]);
        let seconds = begin.elapsed().as_secs_f64();
        drafter.forget(seq);
        self.memory.free(seq);
        seconds
    }

    /// Tokens without a pattern, the same each time.
    fn tokens(&self, first: usize, n: usize) -> Vec<u32> {
        (first..first + n).map(|i| (((i as u64 * 2_654_435_761) >> 7) % self.n_vocab as u64) as u32).collect()
    }
}

fn positions(first: usize, n: usize) -> Vec<u32> {
    (first as u32..).take(n).collect()
}
