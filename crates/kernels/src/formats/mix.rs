//! Mixes: which type each tensor of a model gets.
