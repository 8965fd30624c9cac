//! Prediction heads in the target's own file, and small models, against references and against themselves.

#[path = "../dflash/rig.rs"]
#[allow(dead_code, reason = "shared with the tests of another drafter")]
mod rig;

mod assistant;
mod copies;
mod head;
mod small;
