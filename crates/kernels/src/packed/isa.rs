//! What the vector twins have in common: the multiplication of one tile, generic over instruction set and format.
//!
//! Everything is `#[inline(always)]` and ends up inside a function of `avx2` or `avx512` that has the features
//! enabled: that is what "has the instructions of `V`" in the contracts below means.

// Columns and vectors index several arrays of registers at once.
#![allow(clippy::needless_range_loop)]

use super::Grain;
use super::float::{FloatFormat, strip_bytes};
use super::format::{IntFormat, Layout, ROWS, STRIP, SUB};
use super::product::TileCall;
use super::rows::{ActBlock, MINUS_8, MINUS_32, MINUS_128, SCALES, SUMS};

/// Vectors of `LANES` 32-bit lanes: a half or the whole of a strip.
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

/// Multiplies a tile of integer codes with `NC` columns, `NV` vectors of rows at a time.
///
/// # Safety
/// This CPU has the instructions of `V`; and the contract of [`TileFn`](super::product::TileFn).
#[inline(always)]
pub unsafe fn tile<V: Isa, F: IntFormat, const NC: usize, const NV: usize>(call: &TileCall) {
    for first in (0..ROWS / V::LANES).step_by(NV) {
        // SAFETY: by contract; each vector of rows has its part of the sums.
        unsafe {
            if F::GRAIN == Grain::Per32 {
                tile_per_32::<V, F, NC, NV>(call, first);
            } else {
                tile_per_256::<V, F, NC, NV>(call, first);
            }
        }
    }
}

/// Where vector `v` of the rows begins: the strip it is in, and which part of it.
#[inline(always)]
const fn place_of<V: Isa>(v: usize) -> (usize, usize) {
    let per_strip = STRIP / V::LANES;
    (v / per_strip, v % per_strip)
}

/// The sums of vector `v` of the rows in a column.
///
/// # Safety
/// `c` is one of the call's columns.
#[inline(always)]
unsafe fn sums_of<V: Isa>(call: &TileCall, c: usize, v: usize) -> *mut f32 {
    // SAFETY: inside the first chain of sums `c`.
    unsafe { call.sums.add(c).cast::<f32>().add(v * V::LANES) }
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

/// The sums of these columns and vectors, so far.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn load_sums<V: Isa, const NC: usize, const NV: usize>(
    call: &TileCall,
    first: usize,
) -> [[V::Float; NV]; NC] {
    // SAFETY: by contract.
    unsafe {
        let mut acc = [[V::splat(0.0); NV]; NC];
        for c in 0..NC {
            for v in 0..NV {
                acc[c][v] = V::load_f32(sums_of::<V>(call, c, first + v).cast());
            }
        }
        acc
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn tile_per_32<V: Isa, F: IntFormat, const NC: usize, const NV: usize>(call: &TileCall, first: usize) {
    let n_subs = call.n_inputs / SUB;
    let at = Layout::of::<F>(n_subs);
    // SAFETY: each vector of rows has its part of the sums.
    let mut acc = unsafe { load_sums::<V, NC, NV>(call, first) };
    for s in 0..n_subs {
        // SAFETY: inside the strips of `n_subs` sub-blocks; the words are those of the layout of blocks.
        unsafe {
            let mut sum = [[V::zero(); NV]; NC];
            let mut narrow = sum;
            for c in 0..NC {
                sum[c] = [first_sum::<V, F>(call, c, s); NV];
            }
            eight_times!(I, {
                prefetch_lines::<V, F, NV>(call, first, s, I);
                let mut w = [V::zero(); NV];
                for v in 0..NV {
                    let (strip, part) = place_of::<V>(first + v);
                    let lines = call.tile.add(strip * at.bytes + s * F::SUB_BYTES + 4 * V::LANES * part);
                    w[v] = F::operand::<V>(lines, I);
                }
                for c in 0..NC {
                    let a = V::splat_32(word(call, c, 8 * s + I));
                    for v in 0..NV {
                        V::dot::<F>(&mut sum[c][v], &mut narrow[c][v], w[v], a);
                        V::settle::<F>(&mut sum[c][v], &mut narrow[c][v], I, 8);
                    }
                }
            });
            for v in 0..NV {
                let (strip, part) = place_of::<V>(first + v);
                let d = call.tile.add(strip * at.bytes + at.d + 2 * STRIP * s + 2 * V::LANES * part);
                let d = V::load_f16(d);
                for c in 0..NC {
                    let d_act = V::splat(*word(call, c, SCALES + s).cast::<f32>());
                    acc[c][v] = V::mul_add(V::mul(d, d_act), V::to_float(sum[c][v]), acc[c][v]);
                }
            }
        }
    }
    for c in 0..NC {
        for v in 0..NV {
            // SAFETY: as above.
            unsafe { V::store(acc[c][v], sums_of::<V>(call, c, first + v)) };
        }
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn tile_per_256<V: Isa, F: IntFormat, const NC: usize, const NV: usize>(
    call: &TileCall,
    first: usize,
) {
    let at = const { Layout::of::<F>(8) };
    // SAFETY: inside the strips of a whole tile of the format; the words are those of the layout of blocks.
    unsafe {
        let mut part_sum = [[V::splat(0.0); NV]; NC];
        for s in 0..8 {
            let mut sum = [[V::zero(); NV]; NC];
            let mut narrow = sum;
            eight_times!(I, {
                let n_operands = F::STEP / 4;
                let step = s * (SUB / F::STEP) + I / n_operands;
                let i = I % n_operands;
                if i == 0 {
                    for c in 0..NC {
                        sum[c] = [first_sum::<V, F>(call, c, step); NV];
                    }
                }
                prefetch_lines::<V, F, NV>(call, first, s, I);
                let mut w = [V::zero(); NV];
                for v in 0..NV {
                    let (strip, part) = place_of::<V>(first + v);
                    let lines = call.tile.add(strip * at.bytes + s * F::SUB_BYTES + 4 * V::LANES * part);
                    w[v] = F::operand::<V>(lines, I);
                }
                for c in 0..NC {
                    let a = V::splat_32(word(call, c, 8 * s + I));
                    for v in 0..NV {
                        V::dot::<F>(&mut sum[c][v], &mut narrow[c][v], w[v], a);
                        V::settle::<F>(&mut sum[c][v], &mut narrow[c][v], i, n_operands);
                    }
                }
                if i + 1 == n_operands {
                    for v in 0..NV {
                        let (strip, part) = place_of::<V>(first + v);
                        let scale = strip * at.bytes + at.scales + STRIP * step + V::LANES * part;
                        let scale = V::load_i8(call.tile.add(scale));
                        for c in 0..NC {
                            part_sum[c][v] = V::mul_add(V::to_float(sum[c][v]), scale, part_sum[c][v]);
                        }
                    }
                }
            });
        }
        for v in 0..NV {
            let (strip, part) = place_of::<V>(first + v);
            let strip = call.tile.add(strip * at.bytes);
            let d = V::load_f16(strip.add(at.d + 2 * V::LANES * part));
            let mut mins = [V::zero(); NC];
            let mut d_min = d;
            if F::MINS {
                for pair in 0..4 {
                    let w = strip.add(at.mins + 2 * STRIP * pair + 2 * V::LANES * part);
                    for c in 0..NC {
                        mins[c] = V::dot_mins(mins[c], w, V::splat_32(word(call, c, SUMS + pair)));
                    }
                }
                d_min = V::load_f16(strip.add(at.d_min + 2 * V::LANES * part));
            }
            for c in 0..NC {
                let mut part = V::mul(d, part_sum[c][v]);
                if F::MINS {
                    part = V::neg_mul_add(d_min, V::to_float(mins[c]), part);
                }
                let d_act = V::splat(*word(call, c, SCALES).cast::<f32>());
                let acc = sums_of::<V>(call, c, first + v);
                V::store(V::mul_add(d_act, part, V::load_f32(acc.cast())), acc);
            }
        }
    }
}

/// Prefetches the lines whose turn it is with operand `i` of sub-block `s`: about as many lines as a tile has by the end of it,
/// an equal share with each of its vectors.
#[inline(always)]
fn prefetch_lines<V: Isa, F: IntFormat, const NV: usize>(call: &TileCall, first: usize, s: usize, i: usize) {
    let per_sub = const {
        let n_turns = 8 * ROWS / V::LANES / NV;
        (ROWS / STRIP * Layout::of::<F>(8).bytes / 64).div_ceil(n_turns)
    };
    if call.ahead.is_null() {
        return;
    }
    for line in i * per_sub / 8..(i + 1) * per_sub / 8 {
        let at = 64 * ((8 * (first / NV) + s) * per_sub + line);
        V::prefetch(call.ahead.wrapping_add(at));
    }
}

/// Multiplies a tile of floats with `NC` columns, in two chains of sums: even inputs and odd ones.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub unsafe fn float_tile<V: Isa, F: FloatFormat, const NC: usize, const NV: usize>(call: &TileCall) {
    let row_bytes = STRIP * F::BYTES;
    let strip_bytes = strip_bytes::<F>(call.n_inputs);
    let lines = const { (2 * NV * V::LANES * F::BYTES).div_ceil(64) };
    for first in (0..ROWS / V::LANES).step_by(NV) {
        // SAFETY: by contract: a strip has `n_inputs` times sixteen weights, and a block as many values or more.
        unsafe {
            let mut even = [[V::splat(0.0); NV]; NC];
            let mut odd = even;
            let mut weights = [call.tile; NV];
            for v in 0..NV {
                let (strip, part) = place_of::<V>(first + v);
                weights[v] = call.tile.add(strip * strip_bytes + F::BYTES * V::LANES * part);
                for c in 0..NC {
                    let sums = sums_of::<V>(call, c, first + v);
                    even[c][v] = V::load_f32(sums.cast());
                    odd[c][v] = V::load_f32(sums.add(ROWS).cast());
                }
            }
            for pair in 0..call.n_inputs / 2 {
                // Each vector asks for as many bytes as it reads.
                for line in 0..if call.ahead.is_null() { 0 } else { lines } {
                    let lines_before = (first / NV * call.n_inputs / 2 + pair) * lines;
                    V::prefetch(call.ahead.wrapping_add(64 * (lines_before + line)));
                }
                let mut w = [[V::splat(0.0); 2]; NV];
                for v in 0..NV {
                    let from = weights[v].add(2 * pair * row_bytes);
                    w[v] = [F::load::<V>(from), F::load::<V>(from.add(row_bytes))];
                }
                for c in 0..NC {
                    let x = word(call, c, 2 * pair).cast::<f32>();
                    let (x_even, x_odd) = (V::splat(*x), V::splat(*x.add(1)));
                    for v in 0..NV {
                        even[c][v] = V::mul_add(w[v][0], x_even, even[c][v]);
                        odd[c][v] = V::mul_add(w[v][1], x_odd, odd[c][v]);
                    }
                }
            }
            for v in 0..NV {
                if !call.n_inputs.is_multiple_of(2) {
                    let last = call.n_inputs - 1;
                    let w = F::load::<V>(weights[v].add(last * row_bytes));
                    for c in 0..NC {
                        let x = V::splat(*word(call, c, last).cast::<f32>());
                        even[c][v] = V::mul_add(w, x, even[c][v]);
                    }
                }
                for c in 0..NC {
                    let sums = sums_of::<V>(call, c, first + v);
                    V::store(even[c][v], sums);
                    V::store(odd[c][v], sums.add(ROWS));
                }
            }
        }
    }
}

const _: () = assert!(size_of::<ActBlock>() == 4 * 96);
