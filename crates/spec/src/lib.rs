//! Drafters: the interface, verification, and one file per drafter
