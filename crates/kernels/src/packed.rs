//! Matrix products at the speed of memory: weights in tiles of sixteen rows, activations as small integers.
//!
//! ```text
//! out[c][r] = Σ_i w[r][i] · x[c][i]        w [n_out, n_in]   x [n, n_in]   out [n, n_out]
//! ```
//!
//! A *tile* is 32 weight rows by 256 inputs of one matrix, repacked once at load ([`PackedMatrix`]): two *strips* in which a
//! 64-byte line holds four successive codes of all sixteen rows. One load and one unpack then serve as many columns of `x`
//! as there are: each multiplies the same register with four of its own activations, broadcast, and no sum ever
//! crosses lanes. That keeps the price of verifying n tokens flat until arithmetic, not memory, is the limit.
//! Kernels with registers for a whole line take one strip after the other, so that memory is read from end to end; those with
//! half of one take both halves together.
//!
//! Columns arrive quantised ([`QuantRows`]): 8-bit integers under a scale, once per input row whatever number of matrices
//! multiply it. Which scales a format wants is its [`Grain`]. Formats of plain floats multiply `f32` instead, in the
//! same tiles and the same blocks.
//!
//! **One result.** Integer sums inside a sub-block of 32 (or 16) are exact in any order. What is rounded is rounded in one
//! order that only `n_in` decides, with fused multiply-adds, per output and in sequence over the tiles of its row:
//!
//! ```text
//! Per32    acc = fma(d_w·d_x, Σ q·a, acc)                      for each sub-block
//! Per256   part = fma(Σ q·a, scale, part)                      for each sub-block, from zero; then
//!          part = d_w·part,  part = fma(-dmin_w, Σ min·(Σ a), part),  acc = fma(d_x, part, acc)
//! F32      acc[i % 2] = fma(w, x, acc[i % 2])                  and acc[0] + acc[1] at the end
//! ```
//!
//! So every instruction set, number of columns, range of rows and number of threads gives the same bits; the
//! scalar twin of this module (`scalar`) is the definition. A NaN or an infinity in a column makes the scale of its block
//! NaN or infinite, and so that column's outputs NaN: nothing is hidden, and no other column sees it.
//!
//! A format is one file here and one line in `FORMATS`. What n columns cost: `examples/packed_curve.rs`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod fill512;
mod float;
mod format;
mod iq4_nl;
mod iq4_xs;
#[cfg(target_arch = "x86_64")]
mod isa;
mod matrix;
mod planes;
mod product;
mod q4_0;
mod q4_k;
mod q5_k;
mod q6_k;
mod q8_0;
mod rows;
mod scalar;
mod table;
#[cfg(test)]
mod tests;
mod tune;

pub use matrix::{PackError, PackedMatrix, TileMemory, pack, pack_into, pack_slabs, packed_bytes};
pub use rows::{ActBlock, Grain, QuantRows, RowWriter};
pub use table::PackedTable;
pub use tune::{Ahead, tune};

use format::PackedFormat;
use paceline_gguf::GgmlType;

/// The formats that have a packed form.
const FORMATS: &[PackedFormat] = &[
    q8_0::FORMAT,
    q4_0::FORMAT,
    iq4_nl::FORMAT,
    q4_k::FORMAT,
    q5_k::FORMAT,
    q6_k::FORMAT,
    iq4_xs::FORMAT,
    float::F32,
    float::F16,
    float::BF16,
];

/// The packed form of a type, if it has one.
fn format(ty: GgmlType) -> Option<&'static PackedFormat> {
    FORMATS.iter().find(|format| format.ty == ty)
}

/// The activations that a packed matrix of this type multiplies, or `None` where the type has no packed form.
pub fn grain(ty: GgmlType) -> Option<Grain> {
    format(ty).map(|format| format.grain)
}
