//! The DFlash drafter: against its reference, in every dialect of its files, and against files that lie.

mod dialects;
mod goldens;
mod quantised;
mod refusals;
mod rig;
mod sensitivity;
mod sequences;
