//! The scalar twin: what a tile of integer codes means. For reading; it is never made faster.

use super::Grain;
use super::format::{IntFormat, Layout, ROWS, STRIP, SUB};
use super::product::TileCall;
use super::rows::{ActBlock, SCALES};
use crate::formats::float::f16_to_f32;

/// Multiplies a tile with one column.
///
/// # Safety
/// See [`TileCall`].
pub unsafe fn tile<F: IntFormat>(call: &TileCall) {
    let n_subs = call.n_inputs / SUB;
    let at = Layout::of::<F>(n_subs);
    let bytes = ROWS / STRIP * at.bytes;
    // SAFETY: the tile has as many bytes as its layout says, there is one column, and its sums are ours, by contract.
    let (tile, act, sums) =
        unsafe { (std::slice::from_raw_parts(call.tile, bytes), &*call.acts, &mut *call.sums) };
    for (strip, acc) in tile.chunks_exact(at.bytes).zip(sums[0].chunks_exact_mut(STRIP)) {
        for (row, acc) in acc.iter_mut().enumerate() {
            let code = |k: usize| F::code(&strip[k / SUB * F::SUB_BYTES..][..F::SUB_BYTES], row, k % SUB);
            let dot = |from: usize| (from..from + F::STEP).map(|k| code(k) * act.code(k)).sum::<i32>();
            *acc = add_row::<F>(strip, at, n_subs, row, act, dot, *acc);
        }
    }
}

/// The sum of a row of the strip, continued.
fn add_row<F: IntFormat>(
    strip: &[u8],
    at: Layout,
    n_subs: usize,
    row: usize,
    act: &ActBlock,
    dot: impl Fn(usize) -> i32,
    mut acc: f32,
) -> f32 {
    let half = |at: usize| f16_to_f32([strip[at + 2 * row], strip[at + 2 * row + 1]]);
    if F::GRAIN == Grain::Per32 {
        for s in 0..n_subs {
            let d = half(at.d + s * 2 * STRIP) * act.float(SCALES + s);
            acc = d.mul_add(dot(s * SUB) as f32, acc);
        }
        return acc;
    }
    let mut part = 0.0f32;
    for i in 0..256 / F::STEP {
        let scale = f32::from(strip[at.scales + i * STRIP + row] as i8);
        part = (dot(i * F::STEP) as f32).mul_add(scale, part);
    }
    part *= half(at.d);
    if F::MINS {
        let min = |s: usize| i32::from(strip[at.mins + s / 2 * 2 * STRIP + 2 * row + s % 2]);
        let sum = |s: usize| (s * SUB..(s + 1) * SUB).map(|k| act.code(k)).sum::<i32>();
        let mins: i32 = (0..8).map(|s| min(s) * sum(s)).sum();
        part = (-half(at.d_min)).mul_add(mins as f32, part);
    }
    act.float(SCALES).mul_add(part, acc)
}
