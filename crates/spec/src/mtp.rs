//! The prediction head in the target's own file ("multi-token prediction", Qwen's NextN): one layer that is run once
//! per drafted token, each time on its own last state.
//!
//! ```text
//! commit   row (tok_i, h_{i-1}) of every committed token → the head's K/V         h: the target's normed states
//! draft    (anchor, h_{n-1}) → d1, hn;  (d1, hn) → d2, hn;  …                     one row a sequence and step
//! ```
//!
//! The state that a row needs is that of the position before it, so the last one of each commit waits for the next:
//! that is the sequence's *pending* state. The very first token has none before it and gets no row, as in training.
//! The rows of a draft are written behind the committed ones, which later rows of the draft must see, and cut off
//! again at its end.

use std::{collections::HashMap, sync::Arc};

use paceline_backend::{Exec, Lane, PlanBuilder, StateConfig, Step, StepOut, Tap};
use paceline_memory::{Memory, SeqId};
use paceline_models::Weights;

use crate::{
    Draft, DraftRequest, Drafter, DrafterKind, Kept, LoadDrafter, LoadError, Origin, drafter::import_of,
    drafter::known,
};

/// The registry entry.
pub const KIND: DrafterKind = DrafterKind {
    name: "draft-mtp",
    aliases: &["mtp", "nextn"],
    origin: Origin::Target,
    load: |request| Ok(Box::new(Mtp::load(request)?)),
};

/// Tokens of a draft unless told otherwise: one layer, trained for the first, guesses worse with each.
const N_DRAFT: usize = 3;
/// As many as can be asked for.
const N_DRAFT_MAX: usize = 16;

struct Mtp {
    contract: String,
    n_embd: usize,
    n_draft_max: usize,
    /// Committed rows to K/V.
    absorb: Box<dyn Exec>,
    /// One row of each sequence to logits and normed state.
    step: Box<dyn Exec>,
    memory: Memory,
    sequences: HashMap<SeqId, Known>,
    out: StepOut,
}

/// What is known of a sequence.
struct Known {
    /// Our sequence, of one row less than tokens are committed.
    own: SeqId,
    n_committed: usize,
    /// `[n_embd]`: the target's state of the last committed token.
    pending: Vec<f32>,
}

/// A draft in the making.
struct Chain {
    /// Index of its request.
    at: usize,
    own: SeqId,
    token: u32,
    hidden: Vec<f32>,
}

impl Mtp {
    fn load(request: &LoadDrafter<'_>) -> Result<Mtp, LoadError> {
        let file = &request.file;
        let arch = file.metadata().require_str("general.architecture")?;
        let w = Weights::new(file.clone(), request.backend.clone(), arch);
        let Some(head) = request.target.prediction_head(&w)? else {
            return Err(LoadError::Mismatch {
                file: file.name().to_string(),
                what: format!("`{arch}.nextn_predict_layers`"),
                expected: "1, a prediction head in the target's file".to_string(),
                found: "none".to_string(),
                hint: "; use a conversion that kept the head (paceline convert does), or another drafter; Gemma 4 \
                       has it in a file of its own, given with -md"
                    .to_string(),
            });
        };
        let config = StateConfig { n_tentative_max: 1, ..request.states };
        let states = request.backend.alloc_states(std::slice::from_ref(head.state()), config)?;
        let mut absorb = PlanBuilder::new(&[]);
        head.record_absorb(&mut absorb);
        let mut step = PlanBuilder::new(&[Tap::FinalNorm]);
        let logits = head.record(&mut step);
        let compile = |plan| request.backend.compile(Arc::new(plan), &states);
        let n_layer = request.target.hparams().n_layer;
        Ok(Mtp {
            contract: format!(
                "{}: blk.{n_layer} of the target, state behind its final norm, embedding {}, head {}, norm {}",
                KIND.name,
                whose(file.tensor(&format!("blk.{n_layer}.nextn.embed_tokens.weight")).is_some()),
                whose(file.tensor(&format!("blk.{n_layer}.nextn.shared_head_head.weight")).is_some()),
                whose(file.tensor(&format!("blk.{n_layer}.nextn.shared_head_norm.weight")).is_some()),
            ),
            n_embd: head.n_embd(),
            n_draft_max: request.n_draft_max.unwrap_or(N_DRAFT).clamp(1, N_DRAFT_MAX),
            absorb: compile(absorb.finish(None))?,
            step: compile(step.finish(Some(logits)))?,
            memory: Memory::new(states.clone(), request.n_cell_max),
            sequences: HashMap::new(),
            out: StepOut::default(),
        })
    }

    /// The requests that can be drafted for; the others get their fault.
    fn prepare(&self, requests: &[DraftRequest<'_>], drafts: &mut [Draft]) -> Vec<Chain> {
        let mut chains = Vec::with_capacity(requests.len());
        for (at, request) in requests.iter().enumerate() {
            match self.sequences.get(&request.seq) {
                Some(known) if known.n_committed == request.position => chains.push(Chain {
                    at,
                    own: known.own,
                    token: request.anchor,
                    hidden: known.pending.clone(),
                }),
                known => {
                    let (n, position) = (known.map_or(0, |k| k.n_committed), request.position);
                    drafts[at].fault = Some(format!("its memory has {n} of {position} committed tokens"));
                }
            }
        }
        chains
    }

    /// Bytes of the pending states of some sequences.
    fn pending_bytes(&self, is_counted: impl Fn(&Known) -> bool) -> usize {
        let counted = self.sequences.values().filter(|known| is_counted(known));
        counted.map(|known| known.pending.len() * size_of::<f32>()).sum()
    }

    /// Runs one row of every chain.
    fn run(&mut self, chains: &[Chain], n_drafted: usize, requests: &[DraftRequest<'_>]) {
        let tokens: Vec<u32> = chains.iter().map(|chain| chain.token).collect();
        let inputs: Vec<f32> = chains.iter().flat_map(|chain| chain.hidden.iter().copied()).collect();
        let positions: Vec<u32> =
            chains.iter().map(|chain| (requests[chain.at].position + n_drafted) as u32).collect();
        let lanes: Vec<Lane<'_>> =
            chains.iter().enumerate().map(|(row, chain)| self.memory.lane(chain.own, row)).collect();
        let outputs: Vec<u32> = (0..chains.len() as u32).collect();
        let step = Step {
            tokens: &tokens,
            inputs: &inputs,
            positions: &positions,
            lanes: &lanes,
            outputs: &outputs,
        };
        self.step.run(&step, &mut self.out);
        for chain in chains {
            self.memory.commit(chain.own, 1);
        }
    }
}

fn whose(own: bool) -> &'static str {
    if own { "own" } else { "target's" }
}

impl Drafter for Mtp {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn contract(&self) -> String {
        self.contract.clone()
    }

    fn taps(&self) -> &[Tap] {
        &[Tap::FinalNorm]
    }

    fn n_draft_max(&self) -> usize {
        self.n_draft_max
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        let mut drafts = vec![Draft::default(); requests.len()];
        let mut chains = self.prepare(requests, &mut drafts);
        let began: Vec<(SeqId, usize)> = chains.iter().map(|c| (c.own, self.memory.len(c.own))).collect();
        for n_drafted in 0.. {
            // No room for a row is no fault: the draft is what it has become.
            chains.retain(|chain| {
                n_drafted < requests[chain.at].n_max && self.memory.prepare(chain.own, 1, 1).is_ok()
            });
            if chains.is_empty() {
                break;
            }
            self.run(&chains, n_drafted, requests);
            let mut row = 0;
            chains.retain_mut(|chain| {
                let (request, draft) = (&mut requests[chain.at], &mut drafts[chain.at]);
                let position = (request.position + n_drafted + 1) as u64;
                let known = known(&self.out, row);
                let proposed = request.sampler.propose_known(position, self.out.output_row(row), known);
                chain.hidden.clear();
                chain.hidden.extend_from_slice(self.out.taps_rows(row..row + 1));
                row += 1;
                match proposed {
                    Ok(proposal) => {
                        chain.token = proposal.token;
                        draft.tokens.push(proposal.token);
                        draft.q.push(proposal.q);
                        true
                    }
                    Err(error) => {
                        draft.fault = Some(format!("row {n_drafted} of its draft can't be sampled: {error}"));
                        false
                    }
                }
            });
        }
        for (own, len) in began {
            self.memory.truncate(own, len);
        }
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        let n_embd = self.n_embd;
        let (mut tokens, mut inputs, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let mut moved = Vec::with_capacity(kept.len());
        for rows in kept {
            assert_eq!(rows.taps.len(), rows.tokens.len() * n_embd, "states of {} rows", rows.tokens.len());
            if rows.first_position == 0 {
                let own = self.memory.create();
                let known = Known { own, n_committed: 0, pending: Vec::with_capacity(n_embd) };
                self.sequences.insert(rows.seq, known);
            }
            // Forgotten for want of room: the next draft request says so.
            let Some(known) = self.sequences.get_mut(&rows.seq) else { continue };
            assert_eq!(known.n_committed, rows.first_position, "rows of {:?} out of order", rows.seq);
            let n_skip = usize::from(rows.first_position == 0);
            let n_row = rows.tokens.len() - n_skip;
            if n_row > 0 && self.memory.prepare(known.own, n_row, n_row).is_err() {
                self.forget(rows.seq);
                continue;
            }
            let n_state = rows.taps.len() - n_embd;
            if n_row > 0 {
                moved.push((known.own, positions.len(), n_row));
                tokens.extend_from_slice(&rows.tokens[n_skip..]);
                inputs.extend_from_slice(&known.pending);
                inputs.extend_from_slice(&rows.taps[..n_state]);
                positions.extend(((rows.first_position + n_skip) as u32..).take(n_row));
            }
            known.n_committed += rows.tokens.len();
            known.pending.clear();
            known.pending.extend_from_slice(&rows.taps[n_state..]);
        }
        if moved.is_empty() {
            return;
        }
        let lanes: Vec<Lane<'_>> =
            moved.iter().map(|&(own, first_row, _)| self.memory.lane(own, first_row)).collect();
        let step =
            Step { tokens: &tokens, inputs: &inputs, positions: &positions, lanes: &lanes, outputs: &[] };
        self.absorb.run(&step, &mut self.out);
        for (own, _, n_row) in moved {
            self.memory.commit(own, n_row);
        }
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        // The state behind an earlier token is not kept.
        let Some(known) = self.sequences.get(&from).filter(|k| k.n_committed == len && len > 0) else {
            return false;
        };
        let Some(own) = self.memory.fork_prefix(known.own, len - 1) else { return false };
        let fork = Known { own, n_committed: len, pending: known.pending.clone() };
        let old = self.sequences.insert(to, fork);
        assert!(old.is_none(), "{to:?} is known already");
        true
    }

    fn forks_anywhere(&self, _len: usize) -> bool {
        false
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        let known = self.sequences.get(&seq)?;
        let mut out: Vec<u8> = known.pending.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.memory.export(known.own, &mut out);
        Some(out)
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        let n_byte = self.n_embd * size_of::<f32>();
        let (pending, memory) = bytes.split_at_checked(n_byte).ok_or("it has no state of its last token")?;
        let n_row = len.checked_sub(1).ok_or("it is of no token")?;
        let own = import_of(&mut self.memory, n_row, memory)?;
        let pending = pending.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let old = self.sequences.insert(seq, Known { own, n_committed: len, pending });
        assert!(old.is_none(), "{seq:?} is known already");
        Ok(())
    }

    fn forget(&mut self, seq: SeqId) {
        if let Some(known) = self.sequences.remove(&seq) {
            self.memory.free(known.own);
        }
    }

    fn state_bytes(&self) -> usize {
        let usage = self.memory.usage();
        usage.bytes + usage.bytes_resting + self.pending_bytes(|_| true)
    }

    fn resting_bytes(&self) -> usize {
        self.memory.usage().bytes_resting + self.pending_bytes(|known| self.memory.rests(known.own))
    }
}
