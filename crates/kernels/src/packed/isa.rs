//! What the vector twins have in common: the multiplication of one tile, generic over instruction set and format.
//!
//! Everything is `#[inline(always)]` and ends up inside a function of `avx2` or `avx512` that has the features
//! enabled: that is what "has the instructions of `V`" in the contracts below means.

use super::Grain;
use super::float::FloatFormat;
use super::format::{IntFormat, Layout, ROWS, SUB};
use super::product::TileCall;
use super::rows::{ActBlock, MINUS_8, MINUS_32, MINUS_128, SCALES, SUMS};

/// Vectors of `LANES` 32-bit lanes: a half or the whole of sixteen rows.
///
/// # Safety
/// Of all functions: this CPU has the instructions, and pointers have as much behind them as the function says.
pub trait Isa: Copy + 'static {
    type Int: Copy;
    type Float: Copy;
    const LANES: usize;
    /// Whether [`dot`](Self::dot) takes operands above 127 as they are; if not it subtracts 128 from them.
    const DOT_TAKES_ALL: bool;

    unsafe fn zero() -> Self::Int;
    /// A vector of bytes, `4 · LANES` of them.
    unsafe fn load(from: *const u8) -> Self::Int;
    unsafe fn splat_8(byte: u8) -> Self::Int;
    /// One readable word to all lanes.
    unsafe fn splat_32(from: *const u32) -> Self::Int;
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Shifts 16-bit lanes left, or right if negative.
    unsafe fn shift(a: Self::Int, left: i32) -> Self::Int;
    /// Bytes below 16 to what the table says.
    unsafe fn look_up(table: &[u8; 16], a: Self::Int) -> Self::Int;
    /// Adds four products of unsigned and signed bytes to each lane; `narrow` is for sums on their way.
    unsafe fn dot<F: IntFormat>(sum: &mut Self::Int, narrow: &mut Self::Int, w: Self::Int, a: Self::Int);
    /// Called after operand `i` of a step's `n`: moves what is in `narrow` to `sum`, at the latest after the last.
    unsafe fn settle<F: IntFormat>(sum: &mut Self::Int, narrow: &mut Self::Int, i: usize, n: usize);
    /// Adds two products of 16-bit integers to each lane; `w` points to `2 · LANES` unsigned bytes.
    unsafe fn dot_mins(sum: Self::Int, w: *const u8, a: Self::Int) -> Self::Int;

    unsafe fn splat(x: f32) -> Self::Float;
    unsafe fn to_float(a: Self::Int) -> Self::Float;
    /// `LANES` signed bytes.
    unsafe fn load_i8(from: *const u8) -> Self::Float;
    /// `LANES` half-precision floats.
    unsafe fn load_f16(from: *const u8) -> Self::Float;
    /// `LANES` upper halves of floats.
    unsafe fn load_bf16(from: *const u8) -> Self::Float;
    unsafe fn load_f32(from: *const u8) -> Self::Float;
    unsafe fn store(a: Self::Float, to: *mut f32);
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a · b + c`, rounded once.
    unsafe fn mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// `c - a · b`, rounded once.
    unsafe fn neg_mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Any address will do.
    fn prefetch(at: *const u8);
}

/// Expands the body eight times, with the index a constant: what it selects must be known while compiling.
macro_rules! eight_times {
    ($i:ident, $body:block) => {
        eight_times!(@ $i, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $i:ident, $body:block, $($value:literal)*) => {
        $({ const $i: usize = $value; $body })*
    };
}

/// Multiplies a tile of integer codes with `NC` columns.
///
/// # Safety
/// This CPU has the instructions of `V`; and the contract of [`TileFn`](super::product::TileFn).
#[inline(always)]
pub unsafe fn tile<V: Isa, F: IntFormat, const NC: usize>(call: &TileCall) {
    for half in 0..ROWS / V::LANES {
        // SAFETY: by contract; each half of the rows has its part of the sums.
        unsafe {
            let mut acc = [V::splat(0.0); NC];
            for c in 0..NC {
                acc[c] = V::load_f32(sums_of::<V>(call, c, half).cast());
            }
            if F::GRAIN == Grain::Per32 {
                tile_per_32::<V, F, NC>(call, half, &mut acc);
            } else {
                tile_per_256::<V, F, NC>(call, half, &mut acc);
            }
            for c in 0..NC {
                V::store(acc[c], sums_of::<V>(call, c, half));
            }
        }
    }
}

/// The sums of one half of the rows in a column.
///
/// # Safety
/// `c` is one of the call's columns.
#[inline(always)]
unsafe fn sums_of<V: Isa>(call: &TileCall, c: usize, half: usize) -> *mut f32 {
    // SAFETY: inside the first chain of sums `c`.
    unsafe { call.sums.add(c).cast::<f32>().add(half * V::LANES) }
}

/// Word `i` of the block of column `c`.
///
/// # Safety
/// `c` is one of the call's columns, and a block has that word.
#[inline(always)]
unsafe fn word(call: &TileCall, c: usize, i: usize) -> *const u32 {
    debug_assert!(i < 96);
    // SAFETY: by contract.
    unsafe { call.acts.add(c).cast::<u32>().add(i) }
}

/// What the integer sum of step `i` starts from, so that it ends as the sum over codes, not operands.
///
/// # Safety
/// As for [`word`]; and this CPU has the instructions of `V`.
#[inline(always)]
unsafe fn first_sum<V: Isa, F: IntFormat>(call: &TileCall, c: usize, i: usize) -> V::Int {
    let words = match F::OFFSET {
        0 => None,
        8 => Some(MINUS_8),
        32 => Some(MINUS_32),
        _ => V::DOT_TAKES_ALL.then_some(MINUS_128),
    };
    // SAFETY: by contract; each of these has a word for every step of its formats.
    unsafe { words.map_or(V::zero(), |words| V::splat_32(word(call, c, words + i))) }
}

/// Lines of a full tile to prefetch in each of its sub-blocks.
const fn lines_per_sub<F: IntFormat>() -> usize {
    let lines = Layout::of::<F>(8).bytes / 64;
    let per_sub = lines.div_ceil(8);
    if per_sub > 8 { 8 } else { per_sub }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn tile_per_32<V: Isa, F: IntFormat, const NC: usize>(
    call: &TileCall,
    half: usize,
    acc: &mut [V::Float; NC],
) {
    let n_subs = call.n_inputs / SUB;
    let at = Layout::of::<F>(n_subs);
    for s in 0..n_subs {
        // SAFETY: inside the tile of `n_subs` sub-blocks; the words are those of the layout of blocks.
        unsafe {
            let lines = call.tile.add(s * F::SUB_BYTES + 4 * V::LANES * half);
            let mut sum = [V::zero(); NC];
            let mut narrow = [V::zero(); NC];
            for c in 0..NC {
                sum[c] = first_sum::<V, F>(call, c, s);
            }
            eight_times!(I, {
                prefetch_line::<V, F>(call, half, s, I);
                let w = F::operand::<V>(lines, I);
                for c in 0..NC {
                    V::dot::<F>(&mut sum[c], &mut narrow[c], w, V::splat_32(word(call, c, 8 * s + I)));
                    V::settle::<F>(&mut sum[c], &mut narrow[c], I, 8);
                }
            });
            let d = V::load_f16(call.tile.add(at.d + 2 * ROWS * s + 2 * V::LANES * half));
            for c in 0..NC {
                let d_act = V::splat(*word(call, c, SCALES + s).cast::<f32>());
                acc[c] = V::mul_add(V::mul(d, d_act), V::to_float(sum[c]), acc[c]);
            }
        }
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn tile_per_256<V: Isa, F: IntFormat, const NC: usize>(
    call: &TileCall,
    half: usize,
    acc: &mut [V::Float; NC],
) {
    let at = const { Layout::of::<F>(8) };
    // SAFETY: inside a whole tile of the format; the words are those of the layout of blocks.
    unsafe {
        let mut part = [V::splat(0.0); NC];
        for s in 0..8 {
            let lines = call.tile.add(s * F::SUB_BYTES + 4 * V::LANES * half);
            let mut sum = [V::zero(); NC];
            let mut narrow = [V::zero(); NC];
            eight_times!(I, {
                let n_operands = F::STEP / 4;
                let step = s * (SUB / F::STEP) + I / n_operands;
                let i = I % n_operands;
                if i == 0 {
                    for c in 0..NC {
                        sum[c] = first_sum::<V, F>(call, c, step);
                    }
                }
                prefetch_line::<V, F>(call, half, s, I);
                let w = F::operand::<V>(lines, I);
                for c in 0..NC {
                    V::dot::<F>(&mut sum[c], &mut narrow[c], w, V::splat_32(word(call, c, 8 * s + I)));
                    V::settle::<F>(&mut sum[c], &mut narrow[c], i, n_operands);
                }
                if i + 1 == n_operands {
                    let scale = V::load_i8(call.tile.add(at.scales + ROWS * step + V::LANES * half));
                    for c in 0..NC {
                        part[c] = V::mul_add(V::to_float(sum[c]), scale, part[c]);
                    }
                }
            });
        }
        let d = V::load_f16(call.tile.add(at.d + 2 * V::LANES * half));
        for c in 0..NC {
            let d_act = V::splat(*word(call, c, SCALES).cast::<f32>());
            acc[c] = V::mul_add(V::mul(d, d_act), part[c], acc[c]);
        }
        if F::MINS {
            let mut mins = [V::zero(); NC];
            for pair in 0..4 {
                let w = call.tile.add(at.mins + 2 * ROWS * pair + 2 * V::LANES * half);
                for c in 0..NC {
                    mins[c] = V::dot_mins(mins[c], w, V::splat_32(word(call, c, SUMS + pair)));
                }
            }
            let d_min = V::load_f16(call.tile.add(at.d_min + 2 * V::LANES * half));
            for c in 0..NC {
                let d_act = V::splat(*word(call, c, SCALES).cast::<f32>());
                acc[c] = V::neg_mul_add(V::mul(d_min, d_act), V::to_float(mins[c]), acc[c]);
            }
        }
    }
}

/// Prefetches one of the lines that belong to operand `i` of sub-block `s`.
#[inline(always)]
fn prefetch_line<V: Isa, F: IntFormat>(call: &TileCall, half: usize, s: usize, i: usize) {
    let per_sub = const { lines_per_sub::<F>() };
    if half == 0 && i < per_sub {
        V::prefetch(call.ahead.wrapping_add(64 * (s * per_sub + i)));
    }
}

/// Multiplies a tile of floats with `NC` columns, in two chains of sums: even inputs and odd ones.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub unsafe fn float_tile<V: Isa, F: FloatFormat, const NC: usize>(call: &TileCall) {
    let row_bytes = ROWS * F::BYTES;
    for half in 0..ROWS / V::LANES {
        // SAFETY: by contract: the tile has `n_inputs` groups of sixteen weights, and a block as many values or more.
        unsafe {
            let mut even = [V::splat(0.0); NC];
            let mut odd = even;
            for c in 0..NC {
                let sums = sums_of::<V>(call, c, half);
                even[c] = V::load_f32(sums.cast());
                odd[c] = V::load_f32(sums.add(ROWS).cast());
            }
            let weights = call.tile.add(F::BYTES * V::LANES * half);
            for pair in 0..call.n_inputs / 2 {
                let w = weights.add(2 * pair * row_bytes);
                if half == 0 {
                    let ahead = call.ahead.wrapping_add(2 * pair * row_bytes);
                    V::prefetch(ahead);
                    if F::BYTES == 4 {
                        V::prefetch(ahead.wrapping_add(64));
                    }
                }
                let (w_even, w_odd) = (F::load::<V>(w), F::load::<V>(w.add(row_bytes)));
                for c in 0..NC {
                    let x = word(call, c, 2 * pair).cast::<f32>();
                    even[c] = V::mul_add(w_even, V::splat(*x), even[c]);
                    odd[c] = V::mul_add(w_odd, V::splat(*x.add(1)), odd[c]);
                }
            }
            if !call.n_inputs.is_multiple_of(2) {
                let last = call.n_inputs - 1;
                let w = F::load::<V>(weights.add(last * row_bytes));
                for c in 0..NC {
                    even[c] = V::mul_add(w, V::splat(*word(call, c, last).cast::<f32>()), even[c]);
                }
            }
            for c in 0..NC {
                let sums = sums_of::<V>(call, c, half);
                V::store(even[c], sums);
                V::store(odd[c], sums.add(ROWS));
            }
        }
    }
}

const _: () = assert!(size_of::<ActBlock>() == 4 * 96);
