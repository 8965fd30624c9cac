//! Paceline behind [`Engine`], at the level of a forward: model, plan, CPU backend and memory, driven as the engine crate
//! drives them.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result};
use paceline_backend::{
    Backend, Exec, PlanBuilder, StateConfig, StateDecl, Step, StepOut, Tap, cpu::CpuBackend,
};
use paceline_gguf::Gguf;
use paceline_memory::{Memory, SeqId};
use paceline_models::Model;
use paceline_sampling::{DryBreakers, Sampler, SamplingParams};
use paceline_spec::{DraftRequest, Drafter, Kept, LoadDrafter};

use crate::engine::{Engine, Keep, Outputs, Settings, Token};

/// A loaded target, from which engines are made.
pub struct Target {
    backend: Arc<dyn Backend>,
    model: Box<dyn Model>,
}

impl Target {
    /// Loads `path` for a team of `n_threads`.
    pub fn load(path: &Path, n_threads: usize) -> Result<Target> {
        let file = Arc::new(Gguf::open(path)?);
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(n_threads)?);
        let model = paceline_models::load(&file, &backend)?;
        Ok(Target { backend, model })
    }

    /// Device, instruction set, threads.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// Logits in a row.
    pub fn n_vocab(&self) -> usize {
        self.model.hparams().n_vocab
    }

    /// Bytes of K and V of one token over all layers.
    pub fn cell_bytes(&self) -> usize {
        self.model.states().iter().map(StateDecl::cell_width).sum::<usize>() * size_of::<u16>() // f16 is the default
    }

    /// An engine whose forwards also leave the states that a drafter with these `taps` reads.
    pub fn engine(&self, settings: &Settings, taps: &[Tap]) -> Result<Ours> {
        let mut plan = PlanBuilder::new(taps);
        let logits = self.model.record(&mut plan);
        let plan = Arc::new(plan.finish(Some(logits)));
        let config = StateConfig { n_tentative_max: settings.n_tentative, ..StateConfig::default() };
        let states = self.backend.alloc_states(self.model.states(), config)?;
        let exec = self.backend.compile(plan, &states)?;
        let n_cell = settings.n_ctx.next_multiple_of(config.page_len) + config.page_len;
        let mut memory = Memory::new(states, n_cell * settings.n_seq);
        let seqs = (0..settings.n_seq).map(|_| memory.create()).collect();
        let n_vocab = self.n_vocab();
        Ok(Ours { exec, memory, seqs, n_vocab, out: StepOut::default(), rows: Rows::default() })
    }
}

/// A compiled target and its sequences.
pub struct Ours {
    exec: Box<dyn Exec>,
    memory: Memory,
    seqs: Vec<SeqId>,
    n_vocab: usize,
    out: StepOut,
    rows: Rows,
}

/// The rows of a step, kept so that a step allocates nothing but its few lanes.
#[derive(Default)]
struct Rows {
    tokens: Vec<Token>,
    positions: Vec<u32>,
    outputs: Vec<u32>,
}

impl Ours {
    /// Runs the next rows of each sequence, and leaves the commit to the caller.
    fn run(&mut self, tokens: &[&[Token]], outputs: Outputs, keep: Keep) -> Result<()> {
        let Rows { tokens: all, positions, outputs: wanted } = &mut self.rows;
        all.clear();
        positions.clear();
        wanted.clear();
        for (&seq, tokens) in self.seqs.iter().zip(tokens) {
            let n_certain = if keep == Keep::Rows { tokens.len() } else { 0 };
            let n_past = self.memory.len(seq) as u32;
            self.memory.prepare(seq, tokens.len(), n_certain)?;
            let first = all.len() as u32;
            all.extend_from_slice(tokens);
            positions.extend((n_past..).take(tokens.len()));
            let end = all.len() as u32;
            match outputs {
                Outputs::None => {}
                Outputs::Last => wanted.push(end - 1),
                Outputs::All => wanted.extend(first..end),
            }
        }
        let mut first_row = 0;
        let lanes: Vec<_> = (self.seqs.iter().zip(tokens))
            .map(|(&seq, tokens)| {
                let lane = self.memory.lane(seq, first_row);
                first_row += tokens.len();
                lane
            })
            .collect();
        let step = Step { tokens: all, inputs: &[], positions, lanes: &lanes, outputs: wanted };
        self.exec.run(&step, &mut self.out);
        Ok(())
    }
}

impl Engine for Ours {
    fn name(&self) -> &str {
        "paceline"
    }

    fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    fn forward(&mut self, tokens: &[&[Token]], outputs: Outputs, keep: Keep) -> Result<()> {
        self.run(tokens, outputs, keep)?;
        for (&seq, tokens) in self.seqs.iter().zip(tokens) {
            self.memory.commit(seq, if keep == Keep::Rows { tokens.len() } else { 0 });
        }
        Ok(())
    }

    fn logits(&self, i: usize) -> &[f32] {
        self.out.output_row(i)
    }

    fn reset(&mut self) -> Result<()> {
        for seq in &mut self.seqs {
            self.memory.free(*seq);
            *seq = self.memory.create();
        }
        Ok(())
    }
}

/// A target and its drafter.
pub struct OursDflash {
    target: Ours,
    drafter: Box<dyn Drafter>,
    sampler: Sampler,
}

impl OursDflash {
    /// Loads the drafter in `path` for `target`.
    pub fn new(target: &Target, path: &Path, settings: &Settings) -> Result<OursDflash> {
        let drafter = paceline_spec::load(&LoadDrafter {
            file: Arc::new(Gguf::open(path)?),
            backend: &target.backend,
            target: &*target.model,
            states: StateConfig::default(),
            n_draft_max: None,
            n_cell_max: settings.n_ctx + 2 * StateConfig::default().page_len,
        })?;
        let engine = target.engine(settings, drafter.taps())?;
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let sampler = Sampler::new(params, engine.n_vocab, Arc::new(DryBreakers::default()))?;
        Ok(OursDflash { target: engine, drafter, sampler })
    }

    /// Rows of a block.
    pub fn n_block(&self) -> usize {
        self.drafter.n_draft_max() + 1
    }

    /// Runs `tokens` through the target; [`keep`](Self::keep) must follow.
    pub fn verify(&mut self, tokens: &[Token], outputs: Outputs) -> Result<()> {
        self.target.run(&[tokens], outputs, Keep::Nothing)
    }

    /// What a greedy sampler takes from output row `i` of the last forward: our steps say it themselves.
    pub fn choice(&self, i: usize) -> Token {
        let summary = self.target.out.summary(i);
        summary.expect("logits are numbers").at
    }

    /// Ends the step: the first `tokens.len()` rows are final, and the drafter takes their states.
    pub fn keep(&mut self, tokens: &[Token]) {
        let seq = self.target.seqs[0];
        let first_position = self.target.memory.len(seq);
        self.target.memory.commit(seq, tokens.len());
        let taps = self.target.out.taps_rows(0..tokens.len());
        self.drafter.commit(&[Kept { seq, first_position, tokens, taps }]);
    }

    /// Fills one block behind `anchor`.
    pub fn draft(&mut self, anchor: Token, position: usize) -> Result<Vec<Token>> {
        let seq = self.target.seqs[0];
        let n_max = self.drafter.n_draft_max();
        let request = DraftRequest { seq, anchor, position, n_max, sampler: &mut self.sampler };
        let draft = self.drafter.draft(&mut [request]).pop().context("one draft per request")?;
        anyhow::ensure!(draft.fault.is_none() && draft.tokens.len() == n_max, "a draft: {:?}", draft.fault);
        Ok(draft.tokens)
    }
}
