//! The assistant of Gemma 4: a few layers in a file of their own, which have queries and no keys. They look at what the
//! target keeps, so nothing is computed for a sequence but its drafts.
//!
//! ```text
//! step     x  = pre_projection · [√B · target's embedding of a token ; h]          B wide each
//!          x  = layers of Gemma 4, q = rope(norm(Wq x)) at position n over the target's cells 0..n
//!               sliding: cells of its last layer with a window;  full: of its last one without
//!          hn = norm(x) → logits;  h' = post_projection · hn
//! draft    (anchor, h of token n-1) → d1, h';  (d1, h') → d2, h'';  …              one row a sequence and step
//! ```
//!
//! n, the number of committed tokens, is the position of all steps of a draft, as in training. The first h is the target's
//! state behind its final norm, of the last committed token: that is all that is kept of a sequence. Cells are read through
//! the target's own page tables, between its steps, and never written: the plan has no op that could.
//!
//! Of a sliding layer a draft sees what the target's next row will see, which is one cell less than the window. The
//! original code shows up to two more, where they are kept; what the assistants were trained with is not known, and the
//! target lets go of what lies further back.
//!
//! The assistants of E2B and E4B come with groups of tokens: the head multiplies only the tokens of the groups whose
//! centroids score best, and no other token has a chance.
//!
//! Sources: `gemma4_assistant` of Hugging Face transformers; the GGUF names are those of llama.cpp (`gemma4-assistant`)
//! and of the forks before it (`gemma4_assistant`).

use std::{collections::HashMap, sync::Arc};

use paceline_backend::{
    Backend, BlockMask, Exec, Experts, Lane, LaneCells, Matrix, Op, Plan, PlanBuilder, RopeSpec, RouterScore,
    RouterSpec, StateDecl, StateId, Step, StepOut, Tap, Vector,
};
use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use paceline_memory::SeqId;
use paceline_models::{
    Hparams, SharedWeights, Weights,
    blocks::{Attention, AttentionShape, Sandwich, SandwichShape, Values},
};

use crate::{
    Draft, DraftRequest, Drafter, DrafterKind, Kept, LoadDrafter, LoadError, Origin, drafter::known,
};

/// The registry entry.
pub const KIND: DrafterKind = DrafterKind {
    name: "gemma4-assistant",
    // With its file, what users of other servers say for it.
    aliases: &["gemma4_assistant", "draft-mtp"],
    origin: Origin::File(|arch| ARCHS.contains(&arch)),
    load: |request| Ok(Box::new(Assistant::load(request)?)),
};

/// Upstream's name, and the first one.
const ARCHS: [&str; 2] = ["gemma4-assistant", "gemma4_assistant"];
/// The target's.
const TARGET_ARCH: &str = "gemma4";
/// Tokens of a draft unless told otherwise.
const N_DRAFT: usize = 3;
/// As many as can be asked for.
const N_DRAFT_MAX: usize = 16;
/// Groups whose tokens are multiplied, where the file has groups and no number.
const N_GROUP_USED: usize = 32;

struct Assistant {
    contract: String,
    /// Width of the target's states.
    n_embd_target: usize,
    n_vocab: usize,
    n_draft_max: usize,
    /// One row of each sequence to logits, or candidates, and the next state.
    step: Box<dyn Exec>,
    groups: Option<Groups>,
    sequences: HashMap<SeqId, Known>,
    out: StepOut,
    /// Logits of one row, of all tokens.
    logits: Vec<f32>,
}

/// What is known of a sequence.
struct Known {
    n_committed: usize,
    /// `[n_embd_target]`: the target's state of the last committed token.
    state: Vec<f32>,
    /// A fork that was given no rows since.
    rests: bool,
}

/// The tokens in groups of one size, `[n_group, group_len]`.
struct Groups {
    tokens: Vec<u32>,
    group_len: usize,
    /// How many are multiplied.
    n_used: usize,
}

/// A draft in the making.
struct Chain {
    /// Index of its request.
    at: usize,
    token: u32,
    state: Vec<f32>,
}

/// Where the target keeps keys and values, and how it turned the keys.
struct Source {
    /// The layer that wrote them.
    il: usize,
    state: StateId,
    n_head_kv: usize,
    head_dim: usize,
    window: Option<usize>,
    rope: RopeSpec,
}

impl Source {
    /// What the last sliding layer of the target, or the last full one, reads: perhaps what another layer wrote.
    fn find(target: &Plan, states: &[StateDecl], slides: bool) -> Option<Source> {
        let reads = || {
            target.ops.iter().filter_map(|op| match op {
                Op::Attention(op) => Some(op),
                _ => None,
            })
        };
        let last = reads().rfind(|op| op.window.is_some() == slides)?;
        let StateDecl::Kv { n_head, head_dim } = states[last.state.0 as usize] else { return None };
        let keys = target.ops.iter().find_map(|op| match op {
            Op::KvAppend { state, k, .. } if *state == last.state => Some(*k),
            _ => None,
        })?;
        let rope = target.ops.iter().find_map(|op| match op {
            Op::Rope { dst, rope, .. } if *dst == keys => Some(rope.clone()),
            _ => None,
        })?;
        Some(Source {
            // Each layer attends once.
            il: reads().position(|op| op.state == last.state)?,
            state: last.state,
            n_head_kv: n_head,
            head_dim,
            window: last.window,
            rope,
        })
    }
}

/// The weights, until they are recorded.
struct Network {
    shared: SharedWeights,
    pre: Matrix,
    layers: Vec<Sandwich>,
    output_norm: Vector,
    post: Matrix,
    head: Head,
    hparams: Hparams,
    n_embd_target: usize,
}

enum Head {
    /// All tokens.
    Dense(Matrix),
    /// Those of the best groups: the rows of the table, in the order of the groups.
    Grouped { centroids: Matrix, rows: Experts, groups: Groups },
}

/// Loading, with what every complaint needs.
struct Loader<'a> {
    w: Weights,
    backend: &'a Arc<dyn Backend>,
}

impl Loader<'_> {
    fn mismatch(
        &self,
        what: impl Into<String>,
        expected: impl ToString,
        found: impl ToString,
        hint: &str,
    ) -> LoadError {
        LoadError::Mismatch {
            file: self.w.file().name().to_string(),
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
            hint: hint.to_string(),
        }
    }

    fn size(&self, suffix: &str) -> Result<Option<usize>, LoadError> {
        Ok(self.w.metadata().u32(&self.w.key(suffix))?.map(|n| n as usize))
    }

    /// Of the names that a tensor goes by, the one in the file; the first if there is none, for the complaint.
    fn name<'n>(&self, names: &[&'n str]) -> &'n str {
        names.iter().find(|name| self.w.has(name)).unwrap_or(&names[0])
    }

    fn network(&self, request: &LoadDrafter<'_>, n_draft_max: usize) -> Result<(Network, String), LoadError> {
        let (w, target) = (&self.w, request.target);
        const OTHER: &str = "; use the assistant that was trained for this target";
        let theirs = w.metadata().str(&w.key("requires_target_arch"))?.unwrap_or(TARGET_ARCH);
        if target.hparams().arch != theirs {
            let (expected, found) = (format!("`{theirs}`"), format!("`{}`", target.hparams().arch));
            return Err(self.mismatch("architecture of the target", expected, found, OTHER));
        }
        let hp = Hparams::read(w)?;
        let (n_embd, n_embd_target) = (hp.n_embd, target.hparams().n_embd);
        let n_backbone = match self.size("embedding_length_out")? {
            Some(n) => Some(n),
            None => self.size("n_embd_backbone")?,
        };
        if let Some(n) = n_backbone.filter(|&n| n != n_embd_target) {
            return Err(self.mismatch("width of the target's states", n, n_embd_target, OTHER));
        }
        if hp.n_vocab != target.hparams().n_vocab {
            let found = format!("{} rows", hp.n_vocab);
            return Err(self.mismatch("tensor `token_embd.weight`", target.hparams().n_vocab, found, OTHER));
        }
        let (layers, line) = self.layers(request, &hp)?;
        let pre = ["nextn.pre_projection.weight", "mtp.pre_projection.weight", "mtp_pre_proj.weight"];
        let post = ["nextn.post_projection.weight", "mtp.post_projection.weight", "mtp_post_proj.weight"];
        let head = self.head(&hp)?;
        let of = match &head {
            Head::Dense(_) => format!("all {} tokens", hp.n_vocab),
            Head::Grouped { groups, rows, .. } => {
                format!(
                    "the best {} of {} groups of {} tokens",
                    groups.n_used, rows.n_expert, groups.group_len
                )
            }
        };
        let line = format!(
            "{}: layers [{line}], state behind the target's final norm ({n_embd_target}), one position a draft, head of {of}, \
             drafts of {n_draft_max}",
            KIND.name
        );
        let network = Network {
            shared: target.shared(),
            pre: w.matrix(self.name(&pre), [2 * n_embd_target, n_embd], "2·n_embd of the target, n_embd")?,
            layers,
            output_norm: w.vector("output_norm.weight", n_embd, "n_embd")?,
            post: w.matrix(self.name(&post), [n_embd, n_embd_target], "n_embd, n_embd of the target")?,
            head,
            n_embd_target,
            hparams: hp,
        };
        Ok((network, line))
    }

    /// The layers, and in words what each looks at.
    fn layers(&self, request: &LoadDrafter<'_>, hp: &Hparams) -> Result<(Vec<Sandwich>, String), LoadError> {
        let (w, target) = (&self.w, request.target);
        let mut p = PlanBuilder::new(&[]);
        let logits = target.record(&mut p);
        let plan = p.finish(Some(logits));
        let key = w.key("attention.sliding_window_pattern");
        let pattern = w.metadata().require_bool_array(&key)?;
        if pattern.len() != hp.n_layer {
            let expected = format!("one value for each of {} layers", hp.n_layer);
            return Err(self.mismatch(format!("`{key}`"), expected, pattern.len(), ""));
        }
        let (mut layers, mut words) = (Vec::with_capacity(hp.n_layer), Vec::new());
        for (il, &slides) in pattern.iter().enumerate() {
            let (kind, suffix) = if slides { ("sliding", "_swa") } else { ("full", "") };
            let Some(source) = Source::find(&plan, target.states(), slides) else {
                let expected = format!("a {kind} layer, whose keys and values layer {il} reads");
                return Err(self.mismatch("layers of the target", expected, "none", ""));
            };
            let head_dim = self.size(&format!("attention.key_length{suffix}"))?;
            if let Some(n) = head_dim.filter(|&n| n != source.head_dim) {
                let what = format!("`{}`", w.key(&format!("attention.key_length{suffix}")));
                return Err(self.mismatch(what, format!("{}, the target's", source.head_dim), n, ""));
            }
            if !hp.n_head.is_multiple_of(source.n_head_kv) {
                let expected =
                    format!("a multiple of the {} KV heads of the target's {kind} layers", source.n_head_kv);
                let what = format!("`{}`", w.key("attention.head_count"));
                return Err(self.mismatch(what, expected, hp.n_head, ""));
            }
            // The target keeps no more than its own window; who was made for a smaller one sees less.
            let own = self.size("attention.sliding_window")?.unwrap_or(usize::MAX);
            let window = source.window.map(|window| window.min(own));
            if window.is_some_and(|window| window < 2) {
                let what = format!("`{}`", w.key("attention.sliding_window"));
                return Err(self.mismatch(what, "at least 2, or nothing is seen", own.min(1), ""));
            }
            let shape = AttentionShape {
                n_embd: hp.n_embd,
                n_head: hp.n_head,
                n_head_kv: source.n_head_kv,
                head_dim: source.head_dim,
                // Queries turn as the keys did, whatever the file says.
                rope: source.rope.clone(),
                eps: hp.eps,
                gated: false,
                head_norm: true,
                mask: BlockMask::Past,
                window,
                scale: 1.0,
                values: Values::Normed,
            };
            let prefix = format!("blk.{il}.");
            let attention = Attention::load_reader(w, &prefix, shape, source.state)?;
            let sizes = SandwichShape { n_embd: hp.n_embd, n_ff: hp.n_ff, eps: hp.eps };
            layers.push(Sandwich::load(w, &prefix, sizes, attention)?);
            let window = window.map_or(String::new(), |window| format!("/{window}"));
            words.push(format!("{kind}{window} of {}", source.il));
        }
        Ok((layers, words.join(", ")))
    }

    /// The head of groups where the file has and wants one, else all tokens: then the draft is the best of more.
    fn head(&self, hp: &Hparams) -> Result<Head, LoadError> {
        let w = &self.w;
        let centroids = self.name(&[
            "masked_embd_centroids.weight",
            "mtp.centroids.weight",
            "mtp_centroids.weight",
            "mtp_centroids",
        ]);
        let order = self.name(&[
            "masked_embd_ordering",
            "masked_embd_ordering.weight",
            "mtp.token_ordering.weight",
            "mtp_token_ordering.weight",
            "mtp_token_ordering",
        ]);
        let wants = w.metadata().bool(&w.key("use_ordered_embeddings"))?.unwrap_or(true);
        let has = w.has(centroids) && w.has(order);
        let table = w.matrix("token_embd.weight", [hp.n_embd, hp.n_vocab], "n_embd, n_vocab")?;
        if !(wants && has) {
            return Ok(Head::Dense(table));
        }
        let n_group = w.file().require_tensor(centroids)?.n_rows() as usize;
        if n_group == 0 || !hp.n_vocab.is_multiple_of(n_group) {
            let expected = format!("as many rows as divide {} tokens into groups", hp.n_vocab);
            return Err(self.mismatch(format!("tensor `{centroids}`"), expected, n_group, ""));
        }
        let n_used = self.size("centroid_top_k")?.unwrap_or(N_GROUP_USED);
        if n_used == 0 || n_used > n_group {
            let what = format!("`{}`", w.key("centroid_top_k"));
            return Err(self.mismatch(what, format!("1 to {n_group} groups"), n_used, ""));
        }
        let (group_len, tokens) = (hp.n_vocab / n_group, self.order(order, hp.n_vocab)?);
        // The table once more, its rows in the order of the groups: each group's rows are one expert.
        let file = w.file();
        let source = file.require_tensor("token_embd.weight")?;
        let (row_bytes, data) = (source.ty.row_bytes(hp.n_embd), file.data(source));
        let mut rows = Vec::with_capacity(data.len());
        for &token in &tokens {
            rows.extend_from_slice(&data[token as usize * row_bytes..][..row_bytes]);
        }
        let dims = [hp.n_embd, group_len, n_group];
        let tensor = ("token_embd.weight", dims.map(|n| n as u64).to_vec(), source.ty, rows);
        let name = format!("{}, in groups", file.name());
        let grouped = Gguf::from_bytes(&name, to_bytes(&Metadata::new(), &[tensor])?)?;
        let grouped = Weights::new(Arc::new(grouped), self.backend.clone(), w.prefix());
        Ok(Head::Grouped {
            centroids: w.matrix(centroids, [hp.n_embd, n_group], "n_embd, groups")?,
            rows: grouped.experts("token_embd.weight", dims, "n_embd, tokens of a group, groups")?,
            groups: Groups { tokens, group_len, n_used },
        })
    }

    /// All tokens, group by group.
    fn order(&self, name: &str, n_vocab: usize) -> Result<Vec<u32>, LoadError> {
        let file = self.w.file();
        let tensor = file.require_tensor(name)?;
        let data = file.data(tensor);
        let tokens: Vec<i64> = match tensor.ty {
            GgmlType::I32 => data.as_chunks().0.iter().map(|x| i32::from_le_bytes(*x).into()).collect(),
            GgmlType::I64 => data.as_chunks().0.iter().map(|x| i64::from_le_bytes(*x)).collect(),
            GgmlType::F32 => data.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x) as i64).collect(),
            ty => {
                return Err(self.mismatch(format!("tensor `{name}`"), "i32", ty, ""));
            }
        };
        let mut seen = vec![false; n_vocab];
        for &token in &tokens {
            let place = usize::try_from(token).ok().and_then(|token| seen.get_mut(token));
            match place {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    let expected = format!("each of {n_vocab} tokens once");
                    let found = format!("token {token} twice or out of range");
                    return Err(self.mismatch(format!("tensor `{name}`"), expected, found, ""));
                }
            }
        }
        if tokens.len() != n_vocab {
            return Err(self.mismatch(format!("tensor `{name}`"), n_vocab, tokens.len(), ""));
        }
        Ok(tokens.into_iter().map(|token| token as u32).collect())
    }
}

impl Network {
    /// Tokens `[n]` and states `[n, B]` -> logits `[n, n_vocab]`, or of each row the best groups' numbers and their tokens'
    /// logits; and the next states, tapped.
    fn record(&self) -> Plan {
        let mut p = PlanBuilder::new(&[Tap::FinalNorm]);
        let embedded = p.embed(&self.shared.tok_embd, self.shared.embd_scale);
        let state = p.input(self.n_embd_target);
        let x = p.concat(&[embedded, state]);
        let mut x = p.matmul(x, &self.pre);
        for layer in &self.layers {
            x = layer.forward(&mut p, x, |_, _, dense| dense);
            x = layer.scale(&mut p, x);
        }
        let normed = p.rms_norm(x, &self.output_norm, self.hparams.eps);
        let next = p.matmul(normed, &self.post);
        p.tap(Tap::FinalNorm, next);
        let normed = p.select_outputs(normed);
        let output = match &self.head {
            Head::Dense(table) => p.matmul(normed, table),
            Head::Grouped { centroids, rows, groups } => {
                let scores = p.matmul(normed, centroids);
                let spec = RouterSpec {
                    n_used: groups.n_used,
                    score: RouterScore::Softmax,
                    normalise: false,
                    scale: 1.0,
                    expert_scale: None,
                };
                let routes = p.router(scores, spec);
                let logits = p.expert_matmul(normed, routes, rows);
                p.concat(&[routes.ids, logits])
            }
        };
        p.finish(Some(output))
    }
}

impl Assistant {
    fn load(request: &LoadDrafter<'_>) -> Result<Assistant, LoadError> {
        let file = &request.file;
        let arch = file.metadata().require_str("general.architecture")?;
        // Some files have one spelling here and the other there.
        let has_keys = |prefix: &&&str| file.metadata().contains(&format!("{prefix}.block_count"));
        let prefix = ARCHS.iter().find(has_keys).copied().unwrap_or(arch);
        let w = Weights::new(file.clone(), request.backend.clone(), prefix);
        let n_draft_max = request.n_draft_max.unwrap_or(N_DRAFT).clamp(1, N_DRAFT_MAX);
        let loader = Loader { w, backend: request.backend };
        let (network, contract) = loader.network(request, n_draft_max)?;
        let plan = network.record();
        assert_eq!(plan.lane_cells(), LaneCells::Past, "the target's memory is looked at, not written");
        Ok(Assistant {
            contract,
            n_embd_target: network.n_embd_target,
            n_vocab: network.hparams.n_vocab,
            n_draft_max,
            step: request.backend.compile(Arc::new(plan), request.target_states)?,
            groups: match network.head {
                Head::Dense(_) => None,
                Head::Grouped { groups, .. } => Some(groups),
            },
            sequences: HashMap::new(),
            out: StepOut::default(),
            logits: Vec::new(),
        })
    }

    /// The requests that can be drafted for; the others get their fault.
    fn prepare(&self, requests: &[DraftRequest<'_>], drafts: &mut [Draft]) -> Vec<Chain> {
        let mut chains = Vec::with_capacity(requests.len());
        for (at, request) in requests.iter().enumerate() {
            let position = request.position;
            match self.sequences.get(&request.seq) {
                Some(known) if known.n_committed == position && request.past.n_past == position => {
                    chains.push(Chain { at, token: request.anchor, state: known.state.clone() });
                }
                known => {
                    let n = known.map_or(0, |known| known.n_committed);
                    let n_past = request.past.n_past;
                    drafts[at].fault = Some(format!(
                        "it knows {n} of {position} committed tokens, and the target keeps {n_past}"
                    ));
                }
            }
        }
        chains
    }

    /// Runs one row of every chain, at the place where its draft begins.
    fn run(&mut self, chains: &[Chain], requests: &[DraftRequest<'_>]) {
        let tokens: Vec<u32> = chains.iter().map(|chain| chain.token).collect();
        let inputs: Vec<f32> = chains.iter().flat_map(|chain| chain.state.iter().copied()).collect();
        let positions: Vec<u32> = chains.iter().map(|chain| requests[chain.at].position as u32).collect();
        let lane =
            |(row, chain): (usize, &Chain)| Lane { rows: row..row + 1, ..requests[chain.at].past.clone() };
        let lanes: Vec<Lane<'_>> = chains.iter().enumerate().map(lane).collect();
        let outputs: Vec<u32> = (0..chains.len() as u32).collect();
        let step = Step {
            tokens: &tokens,
            inputs: &inputs,
            positions: &positions,
            lanes: &lanes,
            outputs: &outputs,
        };
        self.step.run(&step, &mut self.out);
    }

    /// Logits of all tokens in row `row`.
    fn logits(&mut self, row: usize) -> &[f32] {
        let output = self.out.output_row(row);
        let Some(Groups { tokens, group_len, n_used }) = &self.groups else { return output };
        self.logits.clear();
        self.logits.resize(self.n_vocab, f32::NEG_INFINITY);
        let (groups, candidates) = output.split_at(*n_used);
        for (group, logits) in groups.iter().zip(candidates.chunks_exact(*group_len)) {
            let tokens = &tokens[*group as usize * group_len..][..*group_len];
            for (&token, &logit) in tokens.iter().zip(logits) {
                self.logits[token as usize] = logit;
            }
        }
        &self.logits
    }

    fn state_bytes_of(&self, is_counted: impl Fn(&Known) -> bool) -> usize {
        let counted = self.sequences.values().filter(|known| is_counted(known));
        counted.map(|known| known.state.len() * size_of::<f32>()).sum()
    }
}

impl Drafter for Assistant {
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
        for n_drafted in 0.. {
            chains.retain(|chain| n_drafted < requests[chain.at].n_max.min(self.n_draft_max));
            if chains.is_empty() {
                break;
            }
            self.run(&chains, requests);
            let mut row = 0;
            chains.retain_mut(|chain| {
                let (request, draft) = (&mut requests[chain.at], &mut drafts[chain.at]);
                let position = (request.position + n_drafted + 1) as u64;
                chain.state.clear();
                chain.state.extend_from_slice(self.out.taps_rows(row..row + 1));
                // The step's own summary of a row is of all tokens, or of no use.
                let known = if self.groups.is_none() { known(&self.out, row) } else { None };
                let proposed = request.sampler.propose_known(position, self.logits(row), known);
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
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        let n_embd = self.n_embd_target;
        for rows in kept {
            assert_eq!(rows.taps.len(), rows.tokens.len() * n_embd, "states of {} rows", rows.tokens.len());
            if rows.first_position == 0 {
                let known = Known { n_committed: 0, state: Vec::with_capacity(n_embd), rests: false };
                self.sequences.insert(rows.seq, known);
            }
            // Forgotten after a fault.
            let Some(known) = self.sequences.get_mut(&rows.seq) else { continue };
            assert_eq!(known.n_committed, rows.first_position, "rows of {:?} out of order", rows.seq);
            known.n_committed += rows.tokens.len();
            known.state.clear();
            known.state.extend_from_slice(&rows.taps[rows.taps.len() - n_embd..]);
            known.rests = false;
        }
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        // The state behind an earlier token is not kept.
        let Some(known) = self.sequences.get(&from).filter(|k| k.n_committed == len && len > 0) else {
            return false;
        };
        let fork = Known { n_committed: len, state: known.state.clone(), rests: true };
        let old = self.sequences.insert(to, fork);
        assert!(old.is_none(), "{to:?} is known already");
        true
    }

    fn forks_anywhere(&self) -> bool {
        false
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        let known = self.sequences.get(&seq)?;
        let mut out = (known.n_committed as u64).to_le_bytes().to_vec();
        out.extend(known.state.iter().flat_map(|x| x.to_le_bytes()));
        Some(out)
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        let (&n, state) = bytes.split_first_chunk().ok_or("it has no length")?;
        let n = u64::from_le_bytes(n);
        if n != len as u64 || len == 0 {
            return Err(format!("expected the state of token {len}, found that of {n}"));
        }
        if state.len() != self.n_embd_target * size_of::<f32>() {
            let expected = self.n_embd_target * size_of::<f32>();
            return Err(format!("expected a state of {expected} bytes, found {}", state.len()));
        }
        let state = state.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let old = self.sequences.insert(seq, Known { n_committed: len, state, rests: true });
        assert!(old.is_none(), "{seq:?} is known already");
        Ok(())
    }

    fn forget(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
    }

    fn state_bytes(&self) -> usize {
        self.state_bytes_of(|_| true)
    }

    fn resting_bytes(&self) -> usize {
        self.state_bytes_of(|known| known.rests)
    }
}
