//! Tensor formats: how a run of values becomes bytes and back.
//!
//! A *quant block* is the unit of a format: `block_len` consecutive values of a row in `block_bytes` bytes, a few
//! small integers and the scale (sometimes also the offset) that turns them back into values. Everything here is
//! scalar Rust and is the definition of its format; faster kernels are twins that must agree with it. The same source is
//! compiled once per instruction set (`BlockFormat`), which changes its speed and not one bit.
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

use std::marker::PhantomData;
use std::sync::atomic::{Ordering, compiler_fence};

use paceline_gguf::GgmlType;

mod fit;
pub(crate) mod float;
pub(crate) mod iq4_nl;
mod iq4_xs;
pub mod mix;
mod mxfp4;
mod nvfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
pub(crate) mod q4_k;
pub(crate) mod q5_0;
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
    /// As `quantize`, each value with its importance beside it, which is finite and not below 0: what a squared error of
    /// that value counts, relative to the others of its block.
    pub quantize_weighted: fn(&[[f32; 2]], &mut [u8]),
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
    let (format, mut data) = rows(ty, n_per_row, values.len());
    (format.quantize)(values, &mut data);
    data
}

/// As [`quantize_rows`], with the importance of each column, `[n_per_row]`: see [`Format::quantize_weighted`].
///
/// # Panics
/// As there, and if there is not one importance for each column.
pub fn quantize_rows_weighted(ty: GgmlType, importance: &[f32], values: &[f32]) -> Vec<u8> {
    let (format, mut data) = rows(ty, importance.len(), values.len());
    let pairs: Vec<[f32; 2]> = values.iter().zip(importance.iter().cycle()).map(|(&x, &w)| [x, w]).collect();
    (format.quantize_weighted)(&pairs, &mut data);
    data
}

/// The format of `ty`, and bytes for `n` values in rows of `n_per_row`.
fn rows(ty: GgmlType, n_per_row: usize, n: usize) -> (&'static Format, Vec<u8>) {
    let name = ty.name();
    let format = format(ty).unwrap_or_else(|| panic!("type {name} cannot be quantised: it has no format"));
    let (block_len, block_bytes) = (ty.block_len(), ty.block_bytes());
    assert!(
        n_per_row > 0 && n_per_row.is_multiple_of(block_len),
        "a row of {n_per_row} values is not whole {name} blocks of {block_len}"
    );
    assert!(n.is_multiple_of(n_per_row), "{n} values are not whole rows of {n_per_row}");
    (format, vec![0; n / block_len * block_bytes])
}

/// A format as its file defines it: what one block of `BYTES` bytes and `LEN` values means.
///
/// Its functions must be `#[inline(always)]`, with all they call: [`each_block`] compiles them once per instruction set.
trait BlockFormat<const BYTES: usize, const LEN: usize> {
    const TY: GgmlType;

    fn dequantize(block: &[u8; BYTES], out: &mut [f32; LEN]);

    /// `given` are importances of the values, if they are known.
    fn quantize(values: &[f32; LEN], given: Option<&[f32; LEN]>, block: &mut [u8; BYTES]);
}

impl Format {
    const fn of<F: BlockFormat<BYTES, LEN>, const BYTES: usize, const LEN: usize>() -> Format {
        assert!(F::TY.block_bytes() == BYTES && F::TY.block_len() == LEN, "the file format says otherwise");
        Format {
            ty: F::TY,
            dequantize: each_block::<Dequantize<F>, u8, f32, BYTES, LEN>,
            quantize: each_block::<Quantize<F>, f32, u8, LEN, BYTES>,
            quantize_weighted: each_block::<QuantizeWeighted<F>, [f32; 2], u8, LEN, BYTES>,
        }
    }
}

/// Ends an iteration over blocks or groups: vectors belong inside one.
///
/// Left alone the compiler may unroll the body, and then vectorise across iterations with gathers and scatters, eight
/// times slower. This emits no instruction.
#[inline(always)]
fn vectors_end_here() {
    compiler_fence(Ordering::SeqCst);
}

/// What [`each_block`] does with a block, `N` elements in and `M` out. A type, not a closure: those cannot be
/// `#[inline(always)]`.
trait Convert<In, Out, const N: usize, const M: usize> {
    fn convert(input: &[In; N], output: &mut [Out; M]);
}

struct Dequantize<F>(PhantomData<F>);

impl<F: BlockFormat<BYTES, LEN>, const BYTES: usize, const LEN: usize> Convert<u8, f32, BYTES, LEN>
    for Dequantize<F>
{
    #[inline(always)]
    fn convert(block: &[u8; BYTES], out: &mut [f32; LEN]) {
        F::dequantize(block, out);
    }
}

struct Quantize<F>(PhantomData<F>);

impl<F: BlockFormat<BYTES, LEN>, const BYTES: usize, const LEN: usize> Convert<f32, u8, LEN, BYTES>
    for Quantize<F>
{
    #[inline(always)]
    fn convert(values: &[f32; LEN], block: &mut [u8; BYTES]) {
        F::quantize(values, None, block);
    }
}

struct QuantizeWeighted<F>(PhantomData<F>);

impl<F: BlockFormat<BYTES, LEN>, const BYTES: usize, const LEN: usize> Convert<[f32; 2], u8, LEN, BYTES>
    for QuantizeWeighted<F>
{
    #[inline(always)]
    fn convert(pairs: &[[f32; 2]; LEN], block: &mut [u8; BYTES]) {
        let given = std::array::from_fn(|n| pairs[n][1]);
        F::quantize(&std::array::from_fn(|n| pairs[n][0]), Some(&given), block);
    }
}

/// Converts block by block, as compiled for the widest vectors of this CPU.
///
/// It is the same scalar source each time: Rust never reorders a sum nor fuses multiply and add by itself, so wider vectors
/// change no bit.
fn each_block<C: Convert<In, Out, N, M>, In, Out, const N: usize, const M: usize>(
    input: &[In],
    output: &mut [Out],
) {
    let (blocks_in, cut_in) = input.as_chunks::<N>();
    let (blocks_out, cut_out) = output.as_chunks_mut::<M>();
    assert!(
        cut_in.is_empty() && cut_out.is_empty() && blocks_in.len() == blocks_out.len(),
        "{} blocks of {N} and a rest of {} cannot become {} blocks of {M} and a rest of {}",
        blocks_in.len(),
        cut_in.len(),
        blocks_out.len(),
        cut_out.len(),
    );

    #[inline(always)]
    fn body<C: Convert<In, Out, N, M>, In, Out, const N: usize, const M: usize>(
        input: &[[In; N]],
        output: &mut [[Out; M]],
    ) {
        for (input, output) in input.iter().zip(output) {
            C::convert(input, output);
            if N > 1 && M > 1 {
                vectors_end_here();
            }
        }
    }

    #[cfg(test)]
    if tests::BASELINE_ONLY.get() {
        return body::<C, In, Out, N, M>(blocks_in, blocks_out);
    }

    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<C: Convert<In, Out, N, M>, In, Out, const N: usize, const M: usize>(
            input: &[[In; N]],
            output: &mut [[Out; M]],
        ) {
            body::<C, In, Out, N, M>(input, output);
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<C: Convert<In, Out, N, M>, In, Out, const N: usize, const M: usize>(
            input: &[[In; N]],
            output: &mut [[Out; M]],
        ) {
            body::<C, In, Out, N, M>(input, output);
        }

        if is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the CPU has just been found to have these features; they include AVX512F.
            return unsafe { avx512::<C, In, Out, N, M>(blocks_in, blocks_out) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has just been found to have AVX2.
            return unsafe { avx2::<C, In, Out, N, M>(blocks_in, blocks_out) };
        }
    }
    body::<C, In, Out, N, M>(blocks_in, blocks_out);
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
