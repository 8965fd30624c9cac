//! A small model of the same vocabulary drafts by running ahead ("Fast Inference from Transformers via Speculative
//! Decoding", Leviathan et al., 2023). Any architecture that can be a target can be one, hybrids too.
//!
//! ```text
//! commit   tokens are noted; a prompt's are computed as they come, the few of a verify wait for the next draft
//! draft    own sequence   … pending tokens, anchor → d1          all certain: they are text
//!          its fork       d1 → d2 → d3 …                         guesses, freed with the fork
//! ```
//!
//! The model's own memory holds text and nothing else, at most one token more than was committed: the anchor, which
//! is text before its row is. Guesses live in a fork, so that a recurrent state never has one to take back.

use std::collections::HashMap;

use paceline_backend::{Exec, Lane, PlanBuilder, StateConfig, Step, StepOut};
use paceline_memory::{Memory, SeqId};

use crate::{
    Draft, DraftRequest, Drafter, DrafterKind, Kept, LoadDrafter, LoadError, Origin, Token,
    drafter::known,
    drafter::{token_bytes, tokens_of},
};

/// The registry entry.
pub const KIND: DrafterKind = DrafterKind {
    name: "draft",
    aliases: &["draft-simple"],
    origin: Origin::Model,
    load: |request| Ok(Box::new(Small::load(request)?)),
};

/// Tokens of a draft unless told otherwise.
const N_DRAFT: usize = 8;
/// As many as can be asked for.
const N_DRAFT_MAX: usize = 64;
/// Tokens that are computed at once rather than with the next draft.
const N_CHUNK: usize = 64;

struct Small {
    contract: String,
    n_draft_max: usize,
    exec: Box<dyn Exec>,
    memory: Memory,
    sequences: HashMap<SeqId, Known>,
    out: StepOut,
}

/// What is known of a sequence.
struct Known {
    own: SeqId,
    /// Committed tokens; our memory has the first of them, or all and the anchor.
    tokens: Vec<Token>,
}

/// A row or some of a sequence of ours.
struct Run<'a> {
    own: SeqId,
    tokens: &'a [Token],
    /// Of the last row, if logits are wanted.
    wants_logits: bool,
}

impl Small {
    fn load(request: &LoadDrafter<'_>) -> Result<Small, LoadError> {
        let model = paceline_models::load(&request.file, request.backend)?;
        let (ours, theirs) = (model.hparams().n_vocab, request.target.hparams().n_vocab);
        if ours != theirs {
            return Err(LoadError::Mismatch {
                file: request.file.name().to_string(),
                what: "vocabulary of a small model that drafts".to_string(),
                expected: format!("{theirs} tokens, the target's"),
                found: ours.to_string(),
                hint: "; use a small model of the target's family".to_string(),
            });
        }
        let mut p = PlanBuilder::new(&[]);
        let logits = model.record(&mut p);
        let config = StateConfig { n_tentative_max: 1, ..request.states };
        let states = request.backend.alloc_states(model.states(), config)?;
        let exec = request.backend.compile(p.finish(Some(logits)).into(), &states)?;
        let arch = request.file.metadata().require_str("general.architecture")?;
        let hp = model.hparams();
        Ok(Small {
            contract: format!(
                "{}: a {arch} of {} layers, width {}, {} tokens",
                KIND.name, hp.n_layer, hp.n_embd, hp.n_vocab
            ),
            n_draft_max: request.n_draft_max.unwrap_or(N_DRAFT).clamp(1, N_DRAFT_MAX),
            exec,
            memory: Memory::new(states, request.n_cell_max),
            sequences: HashMap::new(),
            out: StepOut::default(),
        })
    }

    /// Runs prepared rows of several sequences, all certain, and commits them. Logits come in the order of `runs`.
    fn run(&mut self, runs: &[Run<'_>]) {
        let (mut tokens, mut positions, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
        let mut lanes: Vec<Lane<'_>> = Vec::with_capacity(runs.len());
        for run in runs {
            lanes.push(self.memory.lane(run.own, tokens.len()));
            tokens.extend_from_slice(run.tokens);
            positions.extend((self.memory.len(run.own) as u32..).take(run.tokens.len()));
            if run.wants_logits {
                outputs.push(tokens.len() as u32 - 1);
            }
        }
        let step =
            Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        self.exec.run(&step, &mut self.out);
        for run in runs {
            self.memory.commit(run.own, run.tokens.len());
        }
    }

    /// Bytes of the tokens of some sequences.
    fn token_bytes(&self, is_counted: impl Fn(&Known) -> bool) -> usize {
        let counted = self.sequences.values().filter(|known| is_counted(known));
        counted.map(|known| known.tokens.len() * size_of::<Token>()).sum()
    }

    /// Computes what is pending of `seqs`, as far as it fills whole chunks or `all` of it. Those without room keep
    /// it pending.
    fn catch_up(&mut self, seqs: &[SeqId], n_left_max: usize) {
        loop {
            let mut ready: Vec<(SeqId, Vec<Token>)> = Vec::new();
            for seq in seqs {
                let Some(known) = self.sequences.get(seq) else { continue };
                let pending = known.tokens.get(self.memory.len(known.own)..).unwrap_or(&[]);
                if pending.len() > n_left_max {
                    let chunk = &pending[..pending.len().min(8 * N_CHUNK)];
                    if self.memory.prepare(known.own, chunk.len(), chunk.len()).is_ok() {
                        ready.push((known.own, chunk.to_vec()));
                    }
                }
            }
            if ready.is_empty() {
                return;
            }
            let runs: Vec<Run<'_>> =
                ready.iter().map(|(own, tokens)| Run { own: *own, tokens, wants_logits: false }).collect();
            self.run(&runs);
        }
    }

    /// Takes row `output` of the last run into a draft. None ends the draft.
    fn pick(&self, output: usize, request: &mut DraftRequest<'_>, draft: &mut Draft) -> Option<Token> {
        let position = (request.position + 1 + draft.tokens.len()) as u64;
        match request.sampler.propose_known(position, self.out.output_row(output), known(&self.out, output)) {
            Ok(proposal) => {
                draft.tokens.push(proposal.token);
                draft.q.push(proposal.q);
                Some(proposal.token)
            }
            Err(error) => {
                draft.fault = Some(format!("token {position} can't be sampled: {error}"));
                None
            }
        }
    }

    /// Computes pending tokens and anchor of each request, and drafts its first token: (request, own, token).
    fn first(
        &mut self,
        requests: &mut [DraftRequest<'_>],
        drafts: &mut [Draft],
    ) -> Vec<(usize, SeqId, Token)> {
        let seqs: Vec<SeqId> = requests.iter().map(|request| request.seq).collect();
        self.catch_up(&seqs, N_CHUNK);
        let mut ready: Vec<(usize, SeqId, Vec<Token>)> = Vec::new();
        for (at, request) in requests.iter().enumerate() {
            let known = self.sequences.get(&request.seq).filter(|k| k.tokens.len() == request.position);
            let Some(known) = known else {
                drafts[at].fault = Some("its memory is not of this text".to_string());
                continue;
            };
            assert!(self.memory.len(known.own) <= request.position, "{:?} drafts twice", request.seq);
            let mut rows = known.tokens[self.memory.len(known.own)..].to_vec();
            rows.push(request.anchor);
            // Without room for all that is pending there is no draft, and no fault either.
            if rows.len() <= N_CHUNK + 1 && self.memory.prepare(known.own, rows.len(), rows.len()).is_ok() {
                ready.push((at, known.own, rows));
            }
        }
        if ready.is_empty() {
            return Vec::new();
        }
        let runs: Vec<Run<'_>> =
            ready.iter().map(|(_, own, tokens)| Run { own: *own, tokens, wants_logits: true }).collect();
        self.run(&runs);
        let mut drafting = Vec::with_capacity(ready.len());
        for (output, (at, own, _)) in ready.into_iter().enumerate() {
            if let Some(token) = self.pick(output, &mut requests[at], &mut drafts[at]) {
                drafting.push((at, own, token));
            }
        }
        drafting
    }
}

impl Drafter for Small {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn contract(&self) -> String {
        self.contract.clone()
    }

    fn n_draft_max(&self) -> usize {
        self.n_draft_max
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        let mut drafts = vec![Draft::default(); requests.len()];
        let drafting = self.first(requests, &mut drafts);
        // (request, fork, its next token)
        let mut chains: Vec<(usize, SeqId, Token)> = Vec::with_capacity(drafting.len());
        for (at, own, token) in drafting {
            if requests[at].n_max > 1 {
                chains.push((at, self.memory.fork(own), token));
            }
        }
        let forks: Vec<SeqId> = chains.iter().map(|&(_, fork, _)| fork).collect();
        while !chains.is_empty() {
            chains.retain(|&(at, fork, _)| {
                drafts[at].tokens.len() < requests[at].n_max && self.memory.prepare(fork, 1, 1).is_ok()
            });
            if chains.is_empty() {
                break;
            }
            let runs: Vec<Run<'_>> = chains
                .iter()
                .map(|(_, fork, token)| Run {
                    own: *fork,
                    tokens: std::slice::from_ref(token),
                    wants_logits: true,
                })
                .collect();
            self.run(&runs);
            let mut output = 0;
            chains.retain_mut(|(at, _, token)| {
                let next = self.pick(output, &mut requests[*at], &mut drafts[*at]);
                output += 1;
                next.map(|next| *token = next).is_some()
            });
        }
        for fork in forks {
            self.memory.free(fork);
        }
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        let (mut seqs, mut woken) = (Vec::with_capacity(kept.len()), Vec::new());
        for rows in kept {
            if rows.first_position == 0 {
                let own = self.memory.create();
                self.sequences.insert(rows.seq, Known { own, tokens: Vec::new() });
            }
            let Some(known) = self.sequences.get_mut(&rows.seq) else { continue };
            assert_eq!(known.tokens.len(), rows.first_position, "rows of {:?} out of order", rows.seq);
            known.tokens.extend_from_slice(rows.tokens);
            // A fork wakes with its first rows.
            match self.memory.rests(known.own) {
                true => woken.push(rows.seq),
                false => seqs.push(rows.seq),
            }
        }
        self.catch_up(&woken, 0);
        self.catch_up(&seqs, N_CHUNK);
    }

    /// Our memory may have the anchor too, or not all tokens yet: the fork has what it can of the first `len` and catches up.
    /// With the anchor, a recurrent state or a window may have gone too far.
    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        let Some(known) = self.sequences.get(&from) else { return false };
        let Some(tokens) = known.tokens.get(..len).map(<[Token]>::to_vec) else { return false };
        let n_row = len.min(self.memory.len(known.own));
        let Some(own) = self.memory.fork_prefix(known.own, n_row) else { return false };
        let old = self.sequences.insert(to, Known { own, tokens });
        assert!(old.is_none(), "{to:?} is known already");
        true
    }

    fn forks_anywhere(&self, len: usize) -> bool {
        self.memory.forks_anywhere(len)
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        let known = self.sequences.get(&seq)?;
        let mut out = token_bytes(&known.tokens);
        self.memory.export(known.own, &mut out);
        Some(out)
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        let n_byte = len.checked_mul(size_of::<Token>());
        let (tokens, memory) =
            n_byte.and_then(|n| bytes.split_at_checked(n)).ok_or("it has fewer tokens than there are")?;
        let own = self.memory.import(memory)?;
        let n_row = self.memory.len(own);
        if n_row > len {
            self.memory.free(own);
            return Err(format!("expected {len} rows at most, found {n_row}"));
        }
        let old = self.sequences.insert(seq, Known { own, tokens: tokens_of(tokens) });
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
        usage.bytes + usage.bytes_resting + self.token_bytes(|_| true)
    }

    fn resting_bytes(&self) -> usize {
        self.memory.usage().bytes_resting + self.token_bytes(|known| self.memory.rests(known.own))
    }
}
