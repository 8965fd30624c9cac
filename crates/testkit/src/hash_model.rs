//! A model whose next-token logits hash all that came before, as a pure function of tokens.
//!
//! ```text
//!  row p   h_p = mix(seed, token_p, position_p, A_p, W_p, S_p, T_p)
//!  A_p     fold, in order, over cells 0..p of (token, position, h)     what attention reads
//!  W_p     the same over the last cells before p, for each window     what attention reads through it
//!  S_p     rolling hash of rows 0..=p                                  what a gated delta rule keeps
//!  T_p     the tokens of the last three rows before p                  what a short convolution keeps
//!  logits  sharpness · u(h_p, v) + bias_v,  u uniform in [-1, 1)
//!  taps    u(h_p, column)
//! ```
//!
//! [`Reading`] computes this from tokens alone; [`HashExec`](crate::HashExec) computes it from what pages and
//! slots hold. Cells carry `h`, so an error at one row reaches every later one.

use std::{sync::Arc, time::Duration};

use paceline_backend::{StateConfig, StateDecl, first_cell};
use paceline_engine::Target;
use paceline_memory::Memory;

use crate::{
    HashExec, HashStates, Token,
    rng::{mix, signed_unit},
    tiny_bias,
};

/// Which kinds of layers the model seems to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashKind {
    /// KV pages only.
    Attention,
    /// Recurrent slots only.
    Recurrent,
    /// Both.
    Hybrid,
    /// KV pages of two classes: layers that see everything, and layers that see a few cells.
    Sliding,
    /// KV pages of two classes, both of layers that see a few cells.
    Windows,
}

impl HashKind {
    /// Every kind.
    pub const ALL: [HashKind; 5] =
        [HashKind::Attention, HashKind::Recurrent, HashKind::Hybrid, HashKind::Sliding, HashKind::Windows];

    /// The windows of its KV states, in the order of their declarations; none sees all.
    pub fn windows(self) -> &'static [Option<usize>] {
        match self {
            HashKind::Attention | HashKind::Hybrid => &[None],
            HashKind::Recurrent => &[],
            HashKind::Sliding => &[Some(6), None],
            HashKind::Windows => &[Some(4), Some(11)],
        }
    }

    pub(crate) fn has_pages(self) -> bool {
        !self.windows().is_empty()
    }

    /// Whether it has recurrent states.
    pub fn has_slots(self) -> bool {
        matches!(self, HashKind::Recurrent | HashKind::Hybrid)
    }
}

/// The model.
#[derive(Clone, Debug)]
pub struct HashModel {
    /// Two models with different seeds have nothing in common.
    pub seed: u64,
    /// Its kinds of layers.
    pub kind: HashKind,
    /// Width of a row of logits.
    pub n_vocab: usize,
    /// How far logits lie from their bias at most. 0 makes the distribution the same everywhere.
    pub sharpness: f32,
    /// Added to the logits; empty for none.
    pub bias: Arc<[f32]>,
    /// Width of a row of taps, 0 for none.
    pub n_tap: usize,
    /// A row with this token has NaN logits.
    pub nan_token: Option<Token>,
    /// How long each forward seems to take; for tests that need an answer to last.
    pub delay: Duration,
}

impl HashModel {
    /// A model over [`tiny_vocab`](crate::tiny_vocab) that likes letters, ends its answers now and then, and has
    /// four taps.
    pub fn new(seed: u64, kind: HashKind) -> HashModel {
        let bias = tiny_bias();
        HashModel {
            seed,
            kind,
            n_vocab: bias.len(),
            sharpness: 6.0,
            bias: bias.into(),
            n_tap: 4,
            nan_token: None,
            delay: Duration::ZERO,
        }
    }

    /// A model with these logits at every position.
    pub fn constant(logits: &[f32]) -> HashModel {
        HashModel {
            sharpness: 0.0,
            n_vocab: logits.len(),
            bias: logits.into(),
            ..HashModel::new(0, HashKind::Hybrid)
        }
    }

    /// The states that it declares.
    pub fn decls(&self) -> Vec<StateDecl> {
        let kv = |&window| StateDecl::Kv { n_head: 1, head_dim: 4, window };
        let mut decls: Vec<StateDecl> = self.kind.windows().iter().map(kv).collect();
        if self.kind.has_slots() {
            decls.push(StateDecl::ConvTail { channels: 1, width: 4 });
            decls.push(StateDecl::Delta { n_head_k: 1, n_head_v: 1, dim_k: 1, dim_v: 1 });
        }
        decls
    }

    /// Stores for its states.
    pub fn states(&self, config: StateConfig) -> Arc<HashStates> {
        Arc::new(HashStates::new(self.decls(), config))
    }

    /// Model and memory as an engine takes them, and the store behind both.
    pub fn target(&self, config: StateConfig, n_cell_max: usize) -> (Target, Arc<HashStates>) {
        let states = self.states(config);
        let exec = Box::new(HashExec::new(self.clone(), states.clone()));
        let memory = Memory::new(states.clone(), n_cell_max);
        (Target { exec, memory, n_vocab: self.n_vocab }, states)
    }

    /// The model at the start of a text.
    pub fn reading(&self) -> Reading {
        Reading { model: self.clone(), cells: Vec::new(), past: Past::default(), row: 0, token: 0 }
    }

    /// The model after `tokens`.
    pub fn read(&self, tokens: &[Token]) -> Reading {
        let mut reading = self.reading();
        reading.extend(tokens);
        reading
    }

    /// Hash of the row of `token`, given what layers remember of the rows before.
    pub(crate) fn row(&self, token: Token, position: u32, past: &Past) -> u64 {
        let mut h = mix(mix(self.seed, u64::from(token)), u64::from(position));
        if self.kind.windows().contains(&None) {
            h = mix(h, past.attended);
        }
        if self.kind.windows().iter().any(Option::is_some) {
            h = mix(h, past.seen);
        }
        if self.kind.has_slots() {
            h = mix(h, past.recurrent.state);
            h = past.recurrent.tail.iter().fold(h, |h, &t| mix(h, t));
        }
        h
    }

    pub(crate) fn logits_into(&self, row: u64, token: Token, out: &mut Vec<f32>) {
        if self.nan_token == Some(token) {
            out.extend(std::iter::repeat_n(f32::NAN, self.n_vocab));
            return;
        }
        out.extend((0..self.n_vocab).map(|v| {
            let bias = self.bias.get(v).copied().unwrap_or(0.0);
            self.sharpness * signed_unit(mix(row, v as u64)) + bias
        }));
    }

    pub(crate) fn taps_into(&self, row: u64, out: &mut Vec<f32>) {
        out.extend((0..self.n_tap).map(|column| signed_unit(mix(!row, column as u64))));
    }
}

/// What the layers remember of the rows before one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Past {
    pub attended: u64,
    /// Of what the windows show.
    pub seen: u64,
    pub recurrent: Recurrent,
}

/// What one slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Recurrent {
    /// Rolling hash of all rows.
    pub state: u64,
    /// Tokens of the last three rows, counted from 1 so that none is the empty tail.
    pub tail: [u64; 3],
}

impl Recurrent {
    pub fn advance(&mut self, token: Token, position: u32) {
        self.state = mix(mix(self.state, u64::from(token)), u64::from(position));
        self.tail = [self.tail[1], self.tail[2], u64::from(token) + 1];
    }
}

/// What one KV cell holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub token: Token,
    pub position: u32,
    pub row: u64,
}

impl Cell {
    pub fn attend(&self, attended: u64) -> u64 {
        mix(mix(mix(attended, u64::from(self.token)), u64::from(self.position)), self.row)
    }
}

/// Fold over cells, in order.
pub(crate) fn attend_all<'a>(cells: impl IntoIterator<Item = &'a Cell>) -> u64 {
    cells.into_iter().fold(0, |attended, cell| cell.attend(attended))
}

/// The model somewhere in a text, computed from its tokens and nothing else.
#[derive(Clone, Debug)]
pub struct Reading {
    model: HashModel,
    cells: Vec<Cell>,
    past: Past,
    row: u64,
    token: Token,
}

impl Reading {
    /// Reads one token.
    pub fn push(&mut self, token: Token) {
        let n = self.cells.len();
        let position = n as u32;
        let windows = self.model.kind.windows().iter().filter(|window| window.is_some());
        let seen = windows.map(|&window| attend_all(&self.cells[first_cell(window, n)..]));
        self.past.seen = seen.fold(0, mix);
        self.row = self.model.row(token, position, &self.past);
        let cell = Cell { token, position, row: self.row };
        self.past.attended = cell.attend(self.past.attended);
        self.past.recurrent.advance(token, position);
        self.cells.push(cell);
        self.token = token;
    }

    /// Reads several.
    pub fn extend(&mut self, tokens: &[Token]) {
        tokens.iter().for_each(|&t| self.push(t));
    }

    /// Tokens read.
    pub fn n_tokens(&self) -> usize {
        self.cells.len()
    }

    /// Logits of the last token's row. Panics before the first token.
    pub fn logits(&self) -> Vec<f32> {
        assert!(!self.cells.is_empty(), "logits before the first token");
        let mut logits = Vec::with_capacity(self.model.n_vocab);
        self.model.logits_into(self.row, self.token, &mut logits);
        logits
    }

    /// Taps of the last token's row. Panics before the first token.
    pub fn taps(&self) -> Vec<f32> {
        assert!(!self.cells.is_empty(), "taps before the first token");
        let mut taps = Vec::with_capacity(self.model.n_tap);
        self.model.taps_into(self.row, &mut taps);
        taps
    }
}
