//! A forward as data: ops over row buffers, and the waves in which they may run side by side.
//!
//! Every buffer has one row per row of the step (or per output row) and a fixed width, so one plan serves
//! every number of rows. `waves` cuts the op list into runs between which a backend needs a barrier: inside a
//! wave no op reads or writes what another one writes. `offsets` places the buffers in an arena whose total
//! width is fixed here, by liveness over waves, so that running a plan allocates nothing of its own.

use std::ops::Range;

use crate::{
    Error, KvType, KvTypes,
    op::{BlockMask, Op},
    schedule,
    step::LaneCells,
};

/// A row buffer of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buf(pub(crate) u32);

/// A weight that a backend holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(pub u32);

/// A state that every sequence has: an index into the model's declarations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateId(pub u32);

/// Which rows a buffer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One per row of the step.
    Batch,
    /// One per output row of the step.
    Output,
}

/// Shape of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct BufDecl {
    /// Values in a row.
    pub width: usize,
    /// Which rows it has.
    pub rows: Rows,
}

/// What one layer remembers of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateDecl {
    /// Keys and values of every position, in pages.
    Kv {
        /// KV heads.
        n_head: usize,
        /// Width of a key or value head.
        head_dim: usize,
        /// How many cells, its own included, a row looks back at most; none if it sees all. Cells behind that may be gone.
        window: Option<usize>,
    },
    /// The last `width - 1` inputs of a short convolution.
    ConvTail {
        /// Channels.
        channels: usize,
        /// Taps of the convolution, the current row included.
        width: usize,
    },
    /// One matrix per value head of a gated delta rule.
    Delta {
        /// Key heads.
        n_head_k: usize,
        /// Value heads, a multiple of the key heads.
        n_head_v: usize,
        /// Width of a key head.
        dim_k: usize,
        /// Width of a value head.
        dim_v: usize,
    },
}

impl StateDecl {
    /// Values of K and V together in one KV cell, 0 for states that are not paged.
    pub fn cell_width(&self) -> usize {
        match self {
            StateDecl::Kv { n_head, head_dim, .. } => 2 * n_head * head_dim,
            _ => 0,
        }
    }

    /// Bytes of a KV cell, 0 for states that are not paged.
    pub fn cell_bytes(&self, types: KvTypes) -> usize {
        match self {
            StateDecl::Kv { n_head, head_dim, .. } => n_head * types.cell_bytes(*head_dim),
            _ => 0,
        }
    }

    /// Whether heads are whole blocks of these types.
    pub fn check_kv(&self, types: KvTypes) -> Result<(), Error> {
        match *self {
            StateDecl::Kv { head_dim, .. } => {
                match [types.k, types.v].into_iter().find(|ty| !ty.fits(head_dim)) {
                    Some(ty) => {
                        let supported = KvType::names(KvType::ALL.into_iter().filter(|ty| ty.fits(head_dim)));
                        Err(Error::KvType { ty, head_dim, supported })
                    }
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Values of the committed per-sequence state, 0 for KV.
    pub fn slot_width(&self) -> usize {
        match self {
            StateDecl::Kv { .. } => 0,
            StateDecl::ConvTail { channels, width } => channels * (width - 1),
            StateDecl::Delta { n_head_v, dim_k, dim_v, .. } => n_head_v * dim_k * dim_v,
        }
    }

    /// Values that one tentative row leaves behind for a commit, 0 for KV.
    pub fn window_width(&self) -> usize {
        match self {
            StateDecl::Kv { .. } => 0,
            StateDecl::ConvTail { channels, .. } => *channels,
            // Normalised key, value, decay and beta of every value head.
            StateDecl::Delta { n_head_v, dim_k, dim_v, .. } => n_head_v * (dim_k + dim_v + 2),
        }
    }
}

/// A recorded forward.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The operations, in an order in which they may run one after the other.
    pub ops: Vec<Op>,
    /// Shapes of the buffers.
    pub bufs: Vec<BufDecl>,
    /// Runs of `ops` whose members do not depend on each other.
    pub waves: Vec<Range<usize>>,
    /// First column of each buffer in its arena (one arena per kind of [`Rows`]).
    pub offsets: Vec<usize>,
    /// Total widths of the arenas of batch and of output rows.
    pub arena_width: [usize; 2],
    /// What [`StepOut::output`](crate::StepOut::output) holds, if anything.
    pub output: Option<Buf>,
    /// What [`StepOut::taps`](crate::StepOut::taps) holds, if anything.
    pub taps: Option<Buf>,
}

impl Plan {
    pub(crate) fn new(ops: Vec<Op>, bufs: Vec<BufDecl>, output: Option<Buf>, taps: Option<Buf>) -> Plan {
        let (ops, waves) = schedule::waves(ops, &bufs);
        assert!(output.is_none() || output != taps, "one buffer can't be both output and taps");
        let kept: Vec<Buf> = output.into_iter().chain(taps).collect();
        let (offsets, arena_width) = schedule::place(&ops, &bufs, &waves, &kept);
        Plan { ops, bufs, waves, offsets, arena_width, output, taps }
    }

    /// Width of a buffer.
    pub fn width(&self, buf: Buf) -> usize {
        self.bufs[buf.0 as usize].width
    }

    /// Which rows a buffer has.
    pub fn rows(&self, buf: Buf) -> Rows {
        self.bufs[buf.0 as usize].rows
    }

    /// The first op whose result nobody reads: no later op, no state, neither the output nor the taps.
    pub fn unread(&self) -> Option<&Op> {
        let mut read: Vec<bool> = vec![false; self.bufs.len()];
        for buf in self.ops.iter().flat_map(Op::reads).chain(self.output).chain(self.taps) {
            read[buf.0 as usize] = true;
        }
        self.ops.iter().find(|op| {
            let writes = op.writes(|b| self.width(b));
            op.state().is_none() && !writes.iter().any(|w| read[w.buf.0 as usize])
        })
    }

    /// Which cells the lanes of a step must have pages for.
    pub fn lane_cells(&self) -> LaneCells {
        let is_own = |op: &Op| match op {
            Op::KvAppend { .. } => true,
            Op::Attention(op) => op.mask != BlockMask::Past,
            _ => false,
        };
        match self.ops.iter().any(is_own) {
            false if self.ops.iter().any(|op| matches!(op, Op::Attention(_))) => LaneCells::Past,
            _ => LaneCells::Own,
        }
    }

    /// How many cells, its own included, the rows of this plan look back in a KV state: the widest window of the ops that
    /// read it, or none if one of them looks at all. Cells further back than that are dead.
    pub fn window(&self, state: StateId) -> Option<usize> {
        let reads = self.ops.iter().filter_map(|op| match op {
            Op::Attention(op) if op.state == state => Some(op.window),
            _ => None,
        });
        reads.reduce(|a, b| Some(a?.max(b?))).flatten()
    }

    /// Panics unless every KV state of `decls` keeps the cells that this plan looks at.
    pub(crate) fn check_windows(&self, decls: &[StateDecl]) {
        for op in &self.ops {
            if let Op::Attention(op) = op
                && let StateDecl::Kv { window: Some(kept), .. } = decls[op.state.0 as usize]
            {
                let fits = op.window.is_some_and(|window| window <= kept);
                assert!(fits, "{:?} keeps {kept} cells, and its reader looks back {:?}", op.state, op.window);
            }
        }
    }

    /// Columns of the arena that `buf` occupies.
    pub fn columns(&self, buf: Buf) -> Range<usize> {
        let start = self.offsets[buf.0 as usize];
        start..start + self.width(buf)
    }
}
