#![forbid(unsafe_code)]
//! The engine: slots that serve requests, the plan of a step, and [`Engine::step`].
//!
//! ```text
//!  admit    waiting requests take free slots, beginning with the longest prefix that the cache has
//!  draft    who drafts and how much (`choose.rs`), then one call of each drafter for all its slots
//!  plan     rows of every slot: a prefill chunk, or the anchor and its draft (pure function, `plan.rs`)
//!  forward  one target forward over all rows of all slots
//!  verify   each slot's sampler walks its draft; what it would not have chosen never happened
//!  commit   target memory, drafter memory
//!  emit     text, stops, limits; finished slots are retired
//!  keep     snapshots at the boundaries that prompts have reached, and of what has ended
//! ```
//!
//! Where running requests outgrow the memory together, the youngest is *parked*: it waits again, its tokens known and a
//! snapshot in the cache if there is room for one, and goes on where it was. No request fails half way for want of room.
//!
//! What the cache drops may lie on a [`Shelf`] until it is asked for again; files and threads are the shelf's.
//!
//! No clock, thread or I/O lives here: the same calls give the same events, so a seed replays a run. A clock may be
//! lent ([`Engine::with_clock`]); counters see it, and [`Engine::with_planner`] lets it decide how much is drafted,
//! which changes no token. The engine names no architecture, drafter, tensor type or HTTP field.

mod cache;
mod choose;
mod engine;
mod event;
mod plan;
mod radix;
mod request;
mod shelf;
mod slot;
mod snapshot_file;

pub use cache::{CacheConfig, CacheUsage};
pub use engine::{
    Clock, Counters, Engine, EngineConfig, Erased, Restored, SaveError, Saved, StageTimes, Step, SubmitError,
    Target,
};
pub use event::{Event, Finish, RequestError, SpeculationNote, Stats, TokenOut};
pub use plan::{LanePlan, SlotView, StepPlan, plan};
pub use request::{Request, RequestId};
pub use shelf::{Shelf, ShelfId, ShelfNews, ShelfUsage, Stocked};
pub use slot::{Phase, SlotStatus};
pub use snapshot_file::{CheckedSnapshot, RestoreError, SnapshotHead, digest};

/// A token id.
pub type Token = u32;
