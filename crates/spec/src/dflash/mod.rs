//! DFlash: a small model that fills a block of masks in one pass, reading the target's hidden states
//! ("DFlash: Block Diffusion for Flash Speculative Decoding", Chen, Liang and Liu, 2026, arXiv 2602.06036).
//!
//! ```text
//! context   ctx = rms_norm(fc · [taps of a committed token])              once per token
//!           per layer: K = rope(norm(Wk ctx)), V = Wv ctx  → its own KV pages   (`commit`)
//! block     rows  = embed [anchor, mask, mask, …]       at positions n, n+1, …
//!           per layer: attention over context and block, feed-forward            (`draft`)
//!           row i ≥ 1 → token at position n + i         its own position, not the next
//! ```
//!
//! The context's K/V are all that is kept of a sequence; raw features do not survive a step. The block's K/V are
//! written behind the committed cells and never committed, so a draft leaves nothing behind. Row 0 carries
//! untrained logits and is never sampled.
//!
//! Version 2 ("DFlash2") puts a convolution along the rows of the block around each attention and each feed-forward layer,
//! with kernels that a row brings itself, and lets a [`selector`] choose among the likeliest tokens of each row:
//!
//! ```text
//! delta = proj · u          u: the normed input of the sublayer f
//! x += conv(f(conv(u; delta, side 0)); delta, side 1)        rows before the block's first are zeros
//! ```
//!
//! The history of a convolution begins anew with each block and the context is not convolved, so neither adds to what is
//! kept of a sequence: forks, exports and cuts are those of version 1.
//!
//! Blocks always have their native size, whatever the number of tokens wanted: rows that see all masks see what
//! they were trained with, and only the rows that are asked for go through the head.

mod dialect;
mod selector;

use std::{collections::HashMap, sync::Arc};

use paceline_backend::{
    Buf, Exec, Lane, LocalKernels, Matrix, Plan, PlanBuilder, StateConfig, StateDecl, StateId, Step, StepOut,
    Tap, Vector,
};
use paceline_memory::{Memory, SeqId};
use paceline_models::{
    Weights,
    blocks::{Attention, AttentionShape, Mlp},
};

use crate::{
    Draft, DraftRequest, Drafter, DrafterKind, Kept, LoadDrafter, LoadError, Origin, drafter::import_of,
    drafter::known,
};
use dialect::{ARCHS, Contract, Ends, TargetFacts};
use selector::Selector;

/// The registry entry.
pub const KIND: DrafterKind = DrafterKind {
    name: "dflash",
    aliases: &["draft-dflash", "dflash2", "draft-dflash2"],
    origin: Origin::File(|arch| ARCHS.contains(&arch)),
    load: |request| Ok(Box::new(Dflash::load(request)?)),
};

struct Dflash {
    contract: Contract,
    taps: Vec<Tap>,
    /// Features of committed rows to the K/V of every layer.
    absorb: Box<dyn Exec>,
    /// Blocks to logits.
    fill: Box<dyn Exec>,
    selector: Option<Selector>,
    memory: Memory,
    /// Our sequence of each of the target's.
    sequences: HashMap<SeqId, SeqId>,
    /// The target's, which drafts are made of.
    n_vocab: usize,
    out: StepOut,
}

/// The drafter's weights, until they are recorded into its two plans.
struct Network {
    fc: Matrix,
    hidden_norm: Vector,
    layers: Vec<Layer>,
    output_norm: Vector,
    tok_embd: Matrix,
    output: Matrix,
    ends: Ends,
    /// Normed states to what a selector weighs pairs of tokens with.
    selector_hidden: Option<Matrix>,
    eps: f32,
}

struct Layer {
    attn_norm: Vector,
    attention: Attention,
    attn_conv: Option<Conv>,
    ffn_norm: Vector,
    ffn: Mlp,
    ffn_conv: Option<Conv>,
}

/// The convolutions in front of a sublayer and behind it.
struct Conv {
    base: LocalKernels,
    /// The sublayer's input to what the kernels of a row differ in.
    proj: Matrix,
}

impl Conv {
    fn load(w: &Weights, contract: &Contract, sublayer: &str) -> Result<Option<Conv>, LoadError> {
        let Some(v2) = &contract.version2 else { return Ok(None) };
        let n_embd = contract.hparams.n_embd;
        let (base, proj) =
            (format!("{sublayer}{}", v2.names.conv_base), format!("{sublayer}{}", v2.names.conv_proj));
        let n_delta = 2 * v2.n_tap * n_embd / v2.group;
        Ok(Some(Conv {
            base: w.local_kernels(&base, [n_embd, v2.n_tap, 2], "n_embd, conv_kernel_size, sides")?,
            proj: w.matrix(&proj, [n_embd, n_delta], "n_embd, sides·conv_kernel_size·groups")?,
        }))
    }
}

/// A sublayer `f`, between its convolutions if it has any. The kernels of both sides follow from the input of the first.
fn convolved(
    p: &mut PlanBuilder<'_>,
    conv: Option<&Conv>,
    u: Buf,
    f: impl FnOnce(&mut PlanBuilder<'_>, Buf) -> Buf,
) -> Buf {
    let Some(Conv { base, proj }) = conv else { return f(p, u) };
    let delta = p.matmul(u, proj);
    let u = p.local_conv(u, delta, base, 0);
    let y = f(p, u);
    p.local_conv(y, delta, base, 1)
}

impl Network {
    fn load(
        w: &Weights,
        contract: &Contract,
        target: paceline_models::SharedWeights,
    ) -> Result<Network, LoadError> {
        let hp = &contract.hparams;
        let n_embd = hp.n_embd;
        let layers = contract
            .layers
            .iter()
            .enumerate()
            .map(|(il, mask)| {
                let prefix = format!("blk.{il}.");
                let shape =
                    AttentionShape { mask: mask.block, window: mask.window, ..AttentionShape::of(hp) };
                let norm = |name: &str| w.vector(&format!("{prefix}{name}.weight"), n_embd, "n_embd");
                Ok(Layer {
                    attn_norm: norm("attn_norm")?,
                    attention: Attention::load(w, &prefix, shape, StateId(il as u32))?,
                    attn_conv: Conv::load(w, contract, &format!("{prefix}attn_"))?,
                    ffn_norm: norm(contract.ffn_norm)?,
                    ffn: Mlp::load(w, &prefix, n_embd, hp.n_ff)?,
                    ffn_conv: Conv::load(w, contract, &format!("{prefix}ffn_"))?,
                })
            })
            .collect::<Result<Vec<_>, LoadError>>()?;
        let embd = |name| w.matrix_opt(name, [n_embd, hp.n_vocab], "n_embd, n_vocab");
        Ok(Network {
            fc: w.matrix(
                contract.fc,
                [contract.taps.len() * contract.n_embd_target, n_embd],
                "taps·n_embd, n_embd",
            )?,
            hidden_norm: w.vector(contract.hidden_norm, n_embd, "n_embd")?,
            layers,
            output_norm: w.vector("output_norm.weight", n_embd, "n_embd")?,
            tok_embd: w
                .matrix_opt("token_embd.weight", [n_embd, target.tok_embd.n_out], "n_embd, n_vocab")?
                .unwrap_or(target.tok_embd),
            output: embd("output.weight")?.unwrap_or(target.output),
            ends: contract.ends,
            selector_hidden: match &contract.version2 {
                Some(v2) => Some(w.matrix(v2.names.hidden, [n_embd, v2.n_rank], "n_embd, selector_rank")?),
                None => None,
            },
            eps: hp.eps,
        })
    }

    /// Features `[n, taps·n_embd]` -> every layer's K/V. The fused context passes no layer's own input norm.
    fn record_absorb(&self, n_features: usize) -> Plan {
        let mut p = PlanBuilder::new(&[]);
        let features = p.input(n_features);
        let ctx = p.matmul(features, &self.fc);
        let ctx = p.rms_norm(ctx, &self.hidden_norm, self.eps);
        for layer in &self.layers {
            layer.attention.append_only(&mut p, ctx);
        }
        p.finish(None)
    }

    /// Blocks `[n]` -> logits `[n_out, n_vocab]` of the rows that are asked for; beside them, for a selector, their states
    /// `[n_out, n_rank]`.
    fn record_fill(&self) -> Plan {
        let mut p = PlanBuilder::new(&[]);
        let mut x = p.embed(&self.tok_embd, self.ends.embd_scale);
        for layer in &self.layers {
            let h = p.rms_norm(x, &layer.attn_norm, self.eps);
            let h = convolved(&mut p, layer.attn_conv.as_ref(), h, |p, h| layer.attention.forward(p, h));
            x = p.add(x, h);
            let h = p.rms_norm(x, &layer.ffn_norm, self.eps);
            let h = convolved(&mut p, layer.ffn_conv.as_ref(), h, |p, h| layer.ffn.forward(p, h));
            x = p.add(x, h);
        }
        let x = p.select_outputs(x);
        let x = p.rms_norm(x, &self.output_norm, self.eps);
        let logits = p.matmul(x, &self.output);
        let Ends { logit_scale, logit_cap, .. } = self.ends;
        let logits = if logit_scale == 1.0 { logits } else { p.scale(logits, logit_scale) };
        let logits = logit_cap.map_or(logits, |cap| p.softcap(logits, cap));
        match &self.selector_hidden {
            Some(hidden) => {
                let states = p.matmul(x, hidden);
                p.finish_with(logits, states)
            }
            None => p.finish(Some(logits)),
        }
    }
}

impl Dflash {
    fn load(request: &LoadDrafter<'_>) -> Result<Dflash, LoadError> {
        let arch = request.file.metadata().require_str("general.architecture")?;
        let prefix = dialect::key_prefix(&request.file, arch);
        let w = Weights::new(request.file.clone(), request.backend.clone(), prefix);
        let hp = request.target.hparams();
        let facts = TargetFacts::of(hp, &request.target.shared());
        let contract = Contract::read(&w, arch, &facts)?;
        let network = Network::load(&w, &contract, request.target.shared())?;
        let selector = match &contract.version2 {
            Some(v2) => Some(Selector::load(&w, v2, facts.n_vocab)?),
            None => None,
        };
        let decls: Vec<_> = contract
            .layers
            .iter()
            .map(|layer| StateDecl::Kv {
                n_head: contract.hparams.n_head_kv,
                head_dim: contract.hparams.head_dim,
                window: layer.window,
            })
            .collect();
        let config = StateConfig { n_tentative_max: contract.n_block, ..request.states };
        let states = request.backend.alloc_states(&decls, config)?;
        let absorb = network.record_absorb(contract.taps.len() * contract.n_embd_target);
        Ok(Dflash {
            absorb: request.backend.compile(Arc::new(absorb), &states)?,
            fill: request.backend.compile(Arc::new(network.record_fill()), &states)?,
            selector,
            memory: Memory::new(states, request.n_cell_max),
            taps: contract.taps.iter().map(|&il| Tap::Layer(il)).collect(),
            contract,
            sequences: HashMap::new(),
            n_vocab: facts.n_vocab,
            out: StepOut::default(),
        })
    }

    /// The requests that a block can be filled for: index and our sequence; the others get their fault.
    fn prepare(&mut self, requests: &[DraftRequest<'_>], drafts: &mut [Draft]) -> Vec<(usize, SeqId)> {
        let mut ready = Vec::with_capacity(requests.len());
        for (i, request) in requests.iter().enumerate() {
            let Some(&own) = self.sequences.get(&request.seq) else {
                drafts[i].fault = Some("it has no memory of this sequence".to_string());
                continue;
            };
            let n_known = self.memory.len(own);
            if n_known != request.position {
                let position = request.position;
                drafts[i].fault = Some(format!("its memory has {n_known} of {position} committed tokens"));
                continue;
            }
            // No room for a block is no fault: there may be room next step.
            if self.memory.prepare(own, self.contract.n_block, 0).is_ok() {
                ready.push((i, own));
            }
        }
        ready
    }

    /// Turns the logits of one block into a draft.
    fn pick(&mut self, request: &mut DraftRequest<'_>, first_output: usize, n_draft: usize) -> Draft {
        let mut draft = Draft::default();
        let mut full = Vec::new();
        let mut before = request.anchor;
        for i in 1..=n_draft {
            let (row, position) = (first_output + i - 1, (request.position + i) as u64);
            let (mut logits, mut known) = (self.out.output_row(row), known(&self.out, row));
            if let Some(d2t) = &self.contract.d2t {
                full.clear();
                full.resize(self.n_vocab, f32::NEG_INFINITY);
                for (&token, &logit) in d2t.iter().zip(logits) {
                    full[token as usize] = logit;
                }
                logits = &full;
                known = None;
            }
            let proposed = match &mut self.selector {
                Some(selector) => {
                    let state = self.out.taps_rows(row..row + 1);
                    selector.propose(request.sampler, (position, before), logits, state)
                }
                None => request.sampler.propose_known(position, logits, known),
            };
            match proposed {
                Ok(proposal) => {
                    before = proposal.token;
                    draft.tokens.push(proposal.token);
                    draft.q.push(proposal.q);
                }
                Err(error) => {
                    draft.fault = Some(format!("row {i} of its block can't be sampled: {error}"));
                    break;
                }
            }
        }
        draft
    }
}

impl Drafter for Dflash {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn contract(&self) -> String {
        self.contract.line()
    }

    fn taps(&self) -> &[Tap] {
        &self.taps
    }

    fn n_draft_max(&self) -> usize {
        self.contract.n_block - 1
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        let mut drafts = vec![Draft::default(); requests.len()];
        let ready = self.prepare(requests, &mut drafts);
        if ready.is_empty() {
            return drafts;
        }
        let n_block = self.contract.n_block;
        let n_rows = ready.len() * n_block;
        let mut tokens = vec![self.contract.mask; n_rows];
        let (mut positions, mut outputs) = (Vec::with_capacity(n_rows), Vec::new());
        let mut lanes: Vec<Lane<'_>> = Vec::with_capacity(ready.len());
        let mut wanted = Vec::with_capacity(ready.len());
        for (lane, &(i, own)) in ready.iter().enumerate() {
            let (request, first) = (&requests[i], lane * n_block);
            let n_draft = request.n_max.min(n_block - 1);
            tokens[first] = request.anchor;
            positions.extend((request.position as u32..).take(n_block));
            wanted.push((outputs.len(), n_draft));
            outputs.extend((first + 1) as u32..(first + 1 + n_draft) as u32);
            lanes.push(self.memory.lane(own, first));
        }
        let step =
            Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        self.fill.run(&step, &mut self.out);
        for (&(i, own), (first_output, n_draft)) in ready.iter().zip(wanted) {
            // The block's rows are tentative and stay so.
            self.memory.commit(own, 0);
            drafts[i] = self.pick(&mut requests[i], first_output, n_draft);
        }
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        let width = self.contract.taps.len() * self.contract.n_embd_target;
        let mut moved = Vec::with_capacity(kept.len());
        for rows in kept {
            assert_eq!(rows.taps.len(), rows.tokens.len() * width, "taps of {} rows", rows.tokens.len());
            let own = match self.sequences.get(&rows.seq) {
                Some(&own) => own,
                None if rows.first_position == 0 => {
                    *self.sequences.entry(rows.seq).or_insert(self.memory.create())
                }
                // Forgotten for want of room: the next draft request says so.
                None => continue,
            };
            assert_eq!(self.memory.len(own), rows.first_position, "rows of {:?} out of order", rows.seq);
            match self.memory.prepare(own, rows.tokens.len(), rows.tokens.len()) {
                Ok(()) => moved.push((rows, own)),
                Err(_) => self.forget(rows.seq),
            }
        }
        if moved.is_empty() {
            return;
        }
        let (mut inputs, mut positions, mut lanes) =
            (Vec::new(), Vec::new(), Vec::with_capacity(moved.len()));
        for (rows, own) in &moved {
            lanes.push(self.memory.lane(*own, positions.len()));
            inputs.extend_from_slice(rows.taps);
            positions.extend((rows.first_position as u32..).take(rows.tokens.len()));
        }
        let step = Step { tokens: &[], inputs: &inputs, positions: &positions, lanes: &lanes, outputs: &[] };
        self.absorb.run(&step, &mut self.out);
        for (rows, own) in moved {
            self.memory.commit(own, rows.tokens.len());
        }
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        let Some(&own) = self.sequences.get(&from) else { return false };
        let Some(fork) = self.memory.fork_prefix(own, len) else { return false };
        let old = self.sequences.insert(to, fork);
        assert!(old.is_none(), "{to:?} is known already");
        true
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        self.memory.export(*self.sequences.get(&seq)?, &mut out);
        Some(out)
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        let own = import_of(&mut self.memory, len, bytes)?;
        let old = self.sequences.insert(seq, own);
        assert!(old.is_none(), "{seq:?} is known already");
        Ok(())
    }

    fn forks_anywhere(&self, len: usize) -> bool {
        self.memory.forks_anywhere(len)
    }

    fn forget(&mut self, seq: SeqId) {
        if let Some(own) = self.sequences.remove(&seq) {
            self.memory.free(own);
        }
    }

    fn state_bytes(&self) -> usize {
        let usage = self.memory.usage();
        usage.bytes + usage.bytes_resting
    }

    fn resting_bytes(&self) -> usize {
        self.memory.usage().bytes_resting
    }
}

#[cfg(test)]
mod tests;
