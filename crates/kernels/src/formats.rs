//! Tensor formats: how a run of values becomes bytes and back.
//!
//! A *quant block* is the unit of a format: `block_len` consecutive values of a row in `block_bytes` bytes, a few
//! small integers and the scale (sometimes also the offset) that turns them back into values. Everything here is
//! scalar Rust and is the definition of its format; faster kernels are twins that must agree with it.
//!
//! A format is one file that defines a [`Format`] and one line in [`FORMATS`]. Layouts are those of the GGUF container; a
//! file states its own as `field(bytes) …` in order, with `lo`/`hi` for the halves of a byte and `n` for the index of a
//! value in its block. Arithmetic is `f32` throughout, scales are stored as IEEE half (`f16`), little-endian.
//!
//! Two properties hold for every format:
//! * Dequantising is branch-free over fixed-size blocks, so that the compiler can vectorise it.
//! * Quantising finite values never produces a scale that is infinite or NaN: a block too large for its scale
//!   saturates, one too small for it becomes zeros. NaN is stored as zero and infinities as the largest finite value
//!   (the plain float formats keep both as they are).

use paceline_gguf::GgmlType;

mod fit;
mod float;
mod iq4_nl;
mod iq4_xs;
pub mod mix;
mod mxfp4;
mod nvfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

/// How to read and write the blocks of one tensor type.
pub struct Format {
    /// The type of tensors in this format.
    pub ty: GgmlType,
    /// Whole blocks to values. The bytes and the values must describe the same number of whole blocks (asserted).
    pub dequantize: fn(&[u8], &mut [f32]),
    /// Values to whole blocks, as exactly as the format allows. Lengths as for `dequantize`.
    pub quantize: fn(&[f32], &mut [u8]),
}

/// Every format this crate can compute with.
pub const FORMATS: &[Format] = &[
    float::F32,
    float::F16,
    float::BF16,
    q8_0::FORMAT,
    q6_k::FORMAT,
    q5_k::FORMAT,
    q5_1::FORMAT,
    q5_0::FORMAT,
    q4_k::FORMAT,
    q4_1::FORMAT,
    q4_0::FORMAT,
    iq4_nl::FORMAT,
    iq4_xs::FORMAT,
    mxfp4::FORMAT,
    nvfp4::FORMAT,
    q3_k::FORMAT,
    q2_k::FORMAT,
];

/// The format of tensors of type `ty`, or `None` if this crate cannot compute with them.
pub fn format(ty: GgmlType) -> Option<&'static Format> {
    FORMATS.iter().find(|format| format.ty == ty)
}

/// Quantises a matrix `[n_rows, n_per_row]` of values to the rows of a tensor of type `ty`.
///
/// # Panics
/// If `ty` has no [`Format`], if a row is not a whole number of blocks, or if the last row is cut short.
pub fn quantize_rows(ty: GgmlType, n_per_row: usize, values: &[f32]) -> Vec<u8> {
    let name = ty.name();
    let format = format(ty).unwrap_or_else(|| panic!("type {name} cannot be quantised: it has no format"));
    let (block_len, block_bytes) = (ty.block_len() as usize, ty.block_bytes() as usize);
    assert!(
        n_per_row > 0 && n_per_row.is_multiple_of(block_len),
        "a row of {n_per_row} values is not whole {name} blocks of {block_len}"
    );
    assert!(
        values.len().is_multiple_of(n_per_row),
        "{} values are not whole rows of {n_per_row}",
        values.len()
    );
    let mut data = vec![0; values.len() / block_len * block_bytes];
    (format.quantize)(values, &mut data);
    data
}

/// Pairs each block of `BYTES` bytes with the `LEN` values that it holds, for reading.
#[inline(always)]
fn blocks<'a, const BYTES: usize, const LEN: usize>(
    data: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; BYTES], &'a mut [f32; LEN])> {
    let (blocks, cut) = data.as_chunks::<BYTES>();
    let (values, cut_values) = out.as_chunks_mut::<LEN>();
    assert!(
        cut.is_empty() && cut_values.is_empty() && blocks.len() == values.len(),
        "{} blocks and {} bytes of {BYTES}-byte blocks for {} blocks and {} values of {LEN}-value blocks",
        blocks.len(),
        cut.len(),
        values.len(),
        cut_values.len(),
    );
    blocks.iter().zip(values)
}

/// Pairs each `LEN` values with the block of `BYTES` bytes that will hold them, for writing.
fn blocks_mut<'a, const BYTES: usize, const LEN: usize>(
    values: &'a [f32],
    data: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; LEN], &'a mut [u8; BYTES])> {
    let (values, cut_values) = values.as_chunks::<LEN>();
    let (blocks, cut) = data.as_chunks_mut::<BYTES>();
    assert!(
        cut.is_empty() && cut_values.is_empty() && blocks.len() == values.len(),
        "{} blocks and {} bytes of {BYTES}-byte blocks for {} blocks and {} values of {LEN}-value blocks",
        blocks.len(),
        cut.len(),
        values.len(),
        cut_values.len(),
    );
    values.iter().zip(blocks)
}

/// The field of `LEN` bytes that starts at byte `at` of a block.
#[inline(always)]
fn field<const LEN: usize>(block: &[u8], at: usize) -> &[u8; LEN] {
    block[at..].first_chunk().expect("fields lie inside their block")
}

/// The F16 scale at byte `at` of a block.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    float::f16_to_f32(*field(block, at))
}

#[cfg(test)]
mod tests;
