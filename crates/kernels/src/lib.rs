//! CPU maths: tensor formats, matrix products, attention and recurrences, the thread team.
//!
//! Everything here computes one op for a few rows, knows nothing of models, and holds one promise
//! that the rest of the project stands on:
//!
//! > The value of a row is the same bits whatever the number of rows in the call, the tile it falls
//! > into, and the thread that computes it.
//!
//! Each sum therefore has one order, fixed by the length of a row alone. Speculation relies on it:
//! verifying eight tokens at once has to give the bits that eight single steps would have given.
//!
//! Reading order: [`table`] picks the instruction set and [`scalar`] defines its kernels;
//! [`formats`] are what [`matmul`] reads its weights from; [`attention`] over the cells of [`kv`],
//! [`conv`] and [`delta`] mix tokens; [`norm`], [`act`] and [`rope`] are what lies between, and
//! [`row_ops`] compiles them for each instruction set; [`team`] and [`shared`] spread all of it over
//! threads. [`roofline`] says what a machine can do at best.

pub mod act;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod conv;
pub mod delta;
pub mod formats;
pub mod kv;
mod mapped;
pub mod matmul;
pub mod norm;
pub mod packed;
pub mod roofline;
pub mod rope;
pub mod row_ops;
pub mod scalar;
pub mod shared;
#[cfg(target_arch = "x86_64")]
mod simd;
pub mod summary;
pub mod table;
pub mod team;

pub use half::f16;
pub use matmul::WeightRows;
pub use shared::SharedMut;
pub use table::KernelTable;
pub use team::Team;
