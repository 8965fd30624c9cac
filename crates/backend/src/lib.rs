//! The recorded plan of a forward, the interface that a device implements, and the CPU backend.
//!
//! A model is written once, against [`PlanBuilder`]: its code reads like eager maths and records [`Op`]s.
//! A [`Backend`] uploads weights, allocates the state that sequences leave behind ([`States`]) and compiles
//! the [`Plan`] into an [`Exec`], which replays it step after step. Whatever changes from step to step is
//! data in [`Step`]: tokens, positions, which rows belong to which sequence, page tables, output rows.
//!
//! ```text
//!  model code ── PlanBuilder ──▶ Plan (ops, buffers, waves) ── Backend::compile ──▶ Exec
//!                                                                                    │ run(Step)
//!  memory ── pages, slots, commit ──▶ States ◀── reads and writes tentative rows ────┘
//! ```
//!
//! Rows of a step are *tentative* until `memory` commits them: a recurrent state is never advanced past a
//! row that is not [certain](Lane::n_certain), and a KV cell behind the committed length is never read.

mod builder;
mod classes;
pub mod conformance;
pub mod cpu;
mod display;
mod op;
mod plan;
mod schedule;
mod step;
mod work;

pub use builder::{
    ExpertInput, Experts, LocalKernels, Matrix, PlanBuilder, ProductInput, Routes, Tap, Vector,
};
pub use classes::{PageClasses, first_cell};
pub use op::{AttentionOp, BlockMask, BufRange, Factor, HeadMap, Op, RopeSpec, RouterScore, RouterSpec};
pub use plan::{Buf, BufDecl, Plan, Rows, StateDecl, StateId, WeightId};
pub use step::{Lane, LaneCells, PageId, PageTable, RowSummary, SavedId, SlotId, Step, StepOut};
pub use work::{Macs, PlanWork};

use std::{any::Any, sync::Arc};

use paceline_gguf::GgmlType;
pub use paceline_kernels::{
    kv::{KvType, KvTypes},
    rope::{Pairing, RopeScaling, Yarn},
};

/// Counts the times that the same weights and settings came to give other bits on the same kernels. To be raised whenever a
/// change of kernels or plans does that, so that no file of states of an older build is taken up. A test of the engine knows
/// what bits go with the number, and fails if it was forgotten.
pub const NUMERICS: u32 = 2;

/// A token id. The same type as in `text` and `sampling`, which do not depend on this crate.
pub type Token = u32;

/// Why a device could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A weight's type has no kernel here.
    #[error(
        "{file}: tensor `{tensor}` has type {ty}, which this backend cannot compute with; supported: {supported}"
    )]
    UnsupportedType {
        /// File that the tensor comes from.
        file: String,
        /// Name of the tensor.
        tensor: String,
        /// Its type.
        ty: GgmlType,
        /// The types that would work.
        supported: String,
    },
    /// The states given to `compile` were allocated by another backend.
    #[error("states of another backend were given to the {0} backend")]
    ForeignStates(&'static str),
    /// A setting of the environment or of a flag that names no kernel set.
    #[error("{0}")]
    Kernels(String),
    /// Heads are not whole blocks of the type that was asked for.
    #[error(
        "KV cells of type {ty} hold blocks of 32 values, and this model's KV heads have {head_dim} (head_dim); types that \
         work with it: {supported}"
    )]
    KvType {
        /// The type.
        ty: KvType,
        /// Width of a head.
        head_dim: usize,
        /// The types that would work.
        supported: String,
    },
    /// The device ran out of memory.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// How much was asked for.
        bytes: usize,
    },
}

/// A tensor on its way to a device: its bytes stay in the mapped file until the backend repacks them.
#[derive(Clone)]
pub struct WeightSource {
    /// The mapped file.
    pub file: Arc<paceline_gguf::Gguf>,
    /// Index into its tensor directory.
    pub tensor: usize,
}

/// How sequences' states are stored.
#[derive(Clone, Copy, Debug)]
pub struct StateConfig {
    /// KV cells in one page.
    pub page_len: usize,
    /// Storage types of K and V.
    pub kv: KvTypes,
    /// The most rows of one lane that may be tentative beyond the certain ones.
    pub n_tentative_max: usize,
}

impl Default for StateConfig {
    fn default() -> Self {
        StateConfig { page_len: 64, kv: KvTypes { k: KvType::F16, v: KvType::F16 }, n_tentative_max: 32 }
    }
}

/// A device that can run plans.
pub trait Backend: Send + Sync {
    /// Short name, e.g. `cpu`.
    fn name(&self) -> &'static str;
    /// One line for logs: device, instruction set, threads.
    fn describe(&self) -> String;
    /// Makes a tensor usable by plans; may repack it into the backend's own layout.
    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error>;
    /// Makes the stores for the states of `decls`; nothing is reserved per sequence until it is used.
    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error>;
    /// Prepares `plan` for running over `states`.
    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error>;
    /// What the matrix products of `plan` come to here, once it has been compiled.
    fn work(&self, plan: &Plan) -> PlanWork;
}

/// A compiled plan.
pub trait Exec: Send {
    /// Runs every row of `step`, writing states as [`Lane`] says, and leaves the results in `out`.
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut);
}

/// The states that sequences leave on a device: pages of KV cells, slots of recurrent state, and saved states, which
/// are copies of what a slot had committed, for sequences that rest.
///
/// It stores and copies; which sequence owns which page, and when a row becomes final, is decided by the
/// `memory` crate alone. Calls come from the thread that runs the engine, never while an [`Exec`] runs.
///
/// Pages and saved states can be taken out as bytes and put back, with the same declarations and settings, by a build with
/// the same [`NUMERICS`]; nobody else can read them.
pub trait States: Send + Sync {
    /// The declarations that this was made from.
    fn decls(&self) -> &[StateDecl];
    /// The storage settings.
    fn config(&self) -> StateConfig;
    /// Bytes of one page over the KV states of a [class](PageClasses).
    fn page_bytes(&self, class: usize) -> usize;
    /// Bytes of one slot over all recurrent states, its tentative window included.
    fn slot_bytes(&self) -> usize;
    /// Gives `page` storage for cells of a class. Contents are unspecified until written.
    fn page_alloc(&self, page: PageId, class: usize);
    /// Returns the storage of `page` to the system, or keeps a little of it for the next pages of its class.
    fn page_release(&self, page: PageId);
    /// Copies all cells of page `from` into page `to`; both have storage and are of one class.
    fn page_copy(&self, from: PageId, to: PageId);
    /// Makes `slot` the state of an empty sequence.
    fn slot_reset(&self, slot: SlotId);
    /// Keeps a copy of the committed state of `slot` as `saved`, which has no storage yet.
    fn slot_save(&self, slot: SlotId, saved: SavedId);
    /// Makes `saved` the committed state of `slot`; the copy stays.
    fn slot_load(&self, saved: SavedId, slot: SlotId);
    /// Makes the first `n_rows` tentative rows (those after the certain ones) of the last step part of the
    /// state of `slot`, and drops the others.
    fn slot_commit(&self, slot: SlotId, n_rows: usize);
    /// Bytes of one saved state.
    fn saved_bytes(&self) -> usize;
    /// Returns the storage of `saved` to the system.
    fn saved_release(&self, saved: SavedId);
    /// Appends all of `page` to `out`, [`page_bytes`](Self::page_bytes) bytes.
    fn page_export(&self, page: PageId, out: &mut Vec<u8>);
    /// Fills `page`, which has storage, with what an export gave. False, and nothing changed, if the length is wrong.
    fn page_import(&self, page: PageId, bytes: &[u8]) -> bool;
    /// Appends `saved` to `out`, [`saved_bytes`](Self::saved_bytes) bytes.
    fn saved_export(&self, saved: SavedId, out: &mut Vec<u8>);
    /// Makes `saved`, which has no storage yet, of what an export gave. False, and nothing made, if the length is wrong.
    fn saved_import(&self, saved: SavedId, bytes: &[u8]) -> bool;
    /// For the backend to find its own type again.
    fn as_any(&self) -> &dyn Any;
}
