#![forbid(unsafe_code)]
//! The engine: slots that serve requests, the plan of a step, and [`Engine::step`].
//!
//! ```text
//!  admit    waiting requests take free slots
//!  draft    who drafts and how much (`choose.rs`), then one call of each drafter for all its slots
//!  plan     rows of every slot: a prefill chunk, or the anchor and its draft (pure function, `plan.rs`)
//!  forward  one target forward over all rows of all slots
//!  verify   each slot's sampler walks its draft; what it would not have chosen never happened
//!  commit   target memory, drafter memory
//!  emit     text, stops, limits; finished slots are retired
//! ```
//!
//! No clock, thread or I/O lives here: the same calls give the same events, so a seed replays a run. A clock may be
//! lent ([`Engine::with_clock`]); counters see it, and [`Engine::with_planner`] lets it decide how much is drafted,
//! which changes no token. The engine names no architecture, drafter, tensor type or HTTP field.

mod choose;
mod engine;
mod event;
mod plan;
mod request;
mod slot;

pub use engine::{Clock, Counters, Engine, EngineConfig, StageTimes, Step, SubmitError, Target};
pub use event::{Event, Finish, RequestError, SpeculationNote, Stats, TokenOut};
pub use plan::{LanePlan, SlotView, StepPlan, plan};
pub use request::{Request, RequestId};
pub use slot::{Phase, SlotStatus};

/// A token id.
pub type Token = u32;
