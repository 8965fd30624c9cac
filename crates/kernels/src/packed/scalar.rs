//! The scalar twin: what a tile of integer codes means. For reading; it is never made faster.

use super::Grain;
use super::format::{IntFormat, Layout, ROWS, SUB};
use super::product::{Sums, TileCall};
use super::rows::{ActBlock, SCALES};
use crate::formats::float::f16_to_f32;

/// Multiplies a tile with one column.
///
/// # Safety
/// See [`TileCall`].
pub unsafe fn tile<F: IntFormat>(call: &TileCall) {
    let n_subs = call.n_inputs / SUB;
    let at = Layout::of::<F>(n_subs);
    // SAFETY: the tile has as many bytes as its layout says, there is one column, and its sums are ours, by contract.
    let (tile, act, sums) =
        unsafe { (std::slice::from_raw_parts(call.tile, at.bytes), &*call.acts, &mut *call.sums) };
    for row in 0..ROWS {
        let code = |k: usize| F::code(&tile[k / SUB * F::SUB_BYTES..][..F::SUB_BYTES], row, k % SUB);
        let dot = |from: usize| (from..from + F::STEP).map(|k| code(k) * act.code(k)).sum::<i32>();
        add_row::<F>(tile, at, n_subs, row, act, dot, sums);
    }
}

fn add_row<F: IntFormat>(
    tile: &[u8],
    at: Layout,
    n_subs: usize,
    row: usize,
    act: &ActBlock,
    dot: impl Fn(usize) -> i32,
    sums: &mut Sums,
) {
    let half = |at: usize| f16_to_f32([tile[at + 2 * row], tile[at + 2 * row + 1]]);
    let acc = &mut sums[0][row];
    if F::GRAIN == Grain::Per32 {
        for s in 0..n_subs {
            let d = half(at.d + s * 2 * ROWS) * act.float(SCALES + s);
            *acc = d.mul_add(dot(s * SUB) as f32, *acc);
        }
        return;
    }
    let mut part = 0.0f32;
    for i in 0..256 / F::STEP {
        let scale = f32::from(tile[at.scales + i * ROWS + row] as i8);
        part = (dot(i * F::STEP) as f32).mul_add(scale, part);
    }
    let d_act = act.float(SCALES);
    *acc = (half(at.d) * d_act).mul_add(part, *acc);
    if F::MINS {
        let min = |s: usize| i32::from(tile[at.mins + s / 2 * 2 * ROWS + 2 * row + s % 2]);
        let sum = |s: usize| (s * SUB..(s + 1) * SUB).map(|k| act.code(k)).sum::<i32>();
        let mins: i32 = (0..8).map(|s| min(s) * sum(s)).sum();
        *acc = (-(half(at.d_min) * d_act)).mul_add(mins as f32, *acc);
    }
}
