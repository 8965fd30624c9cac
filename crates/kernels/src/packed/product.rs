//! The sweep over tiles: every tile is read from memory once and multiplies all columns while it is near.
//!
//! Up to 32 columns share one sweep. They do so in passes of at most twelve, as many as have room in registers, inside each tile:
//! the tile is then in the first-level cache, and the pass that comes first asks for what lies some kilobytes
//! ahead, one line between two multiplications at a time. (All lines at once would fill the buffers of outstanding lines,
//! and computation would wait for memory rather than overlap with it.) How far ahead is the machine's business: see
//! [`tune`](super::tune).
//!
//! More columns than that are taken 32 at a time over as many rows of tiles as stay in the second-level cache.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::format::ROWS;
use super::matrix::PackedMatrix;
use super::rows::{ActBlock, QuantRows};
use crate::shared::SharedMut;

/// Columns in one sweep.
const SWEEP: usize = 32;
/// Bytes of tiles that stay in the second-level cache together with the activations of a sweep.
const NEAR_BYTES: usize = 256 << 10;
/// The running sums of a column: 32 rows, in two chains where a format says so. They are added in the end.
pub type Sums = [[f32; ROWS]; 2];

/// The work of one pass: a tile times some successive columns.
pub struct TileCall {
    /// The tile, on a 64-byte boundary.
    pub tile: *const u8,
    /// Its inputs: what a block of activations holds, or less at the end of a row.
    pub n_inputs: usize,
    /// The columns' blocks for these inputs, one behind the other.
    pub acts: *const ActBlock,
    /// The columns' sums, one behind the other, on 64-byte boundaries; the tile's products are added to them.
    pub sums: *mut Sums,
    /// Where to prefetch from; any address will do, and null asks for nothing.
    pub ahead: *const u8,
}

/// Multiplies a tile with as many columns as its place in a list of kernels says, plus one.
///
/// # Safety
/// The tile is a whole tile of this format with `n_inputs`; `acts` and `sums` are blocks of its grain and sums for
/// that number of columns, the sums nobody else's; and this CPU has the instructions.
pub type TileFn = unsafe fn(&TileCall);

/// Where an output goes: `(c, row)` to `offset + c · stride + row`.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub out: &'a SharedMut<'a, f32>,
    pub offset: usize,
    pub stride: usize,
}

/// Room for the sums of a sweep.
#[repr(align(64))]
#[expect(dead_code, reason = "a size and an alignment")]
struct SweepSums([Sums; SWEEP]);

/// Computes the rows of these groups of 32 for all columns, row `groups.start · 32` being row 0 of `place`. Inlined into
/// functions that enable an instruction set.
///
/// # Safety
/// `kernels` are those of the matrix's format, for instructions that this CPU has. Nobody else reads or writes these
/// outputs meanwhile.
#[inline(always)]
pub unsafe fn product(
    kernels: &[TileFn],
    w: &PackedMatrix,
    groups: Range<usize>,
    x: &QuantRows,
    place: Place<'_>,
) {
    let n = x.n();
    assert_eq!((x.n_in(), x.grain()), (w.n_in(), w.grain()), "inputs of a packed {} matrix", w.ty().name());
    assert!(
        groups.start <= groups.end && groups.end <= w.n_groups(),
        "groups {groups:?} of {}",
        w.n_groups()
    );
    // Only what is used becomes zero: all of it costs one column as much as its products.
    let mut sums = MaybeUninit::<SweepSums>::uninit();
    let sums = sums.as_mut_ptr().cast::<Sums>();
    let near = if n <= SWEEP { groups.len().max(1) } else { (NEAR_BYTES / w.group_bytes()).max(1) };
    for first in groups.clone().step_by(near) {
        for from in (0..n).step_by(SWEEP) {
            let columns = from..n.min(from + SWEEP);
            for group in first..groups.end.min(first + near) {
                // SAFETY: there is room for the columns of a sweep, and any bytes are floats once they are written.
                let sums = unsafe {
                    (0..columns.len()).for_each(|c| sums.add(c).write([[0.0; ROWS]; 2]));
                    std::slice::from_raw_parts_mut(sums, columns.len())
                };
                // SAFETY: by contract.
                unsafe { sweep(kernels, w, group, x, columns.clone(), sums) };
                let row = group * ROWS;
                let n_rows = ROWS.min(w.n_out() - row);
                for (c, [even, odd]) in columns.clone().zip(&*sums) {
                    let at = place.offset + c * place.stride + (group - groups.start) * ROWS;
                    // SAFETY: these outputs are ours by contract.
                    let out = unsafe { place.out.range(at..at + n_rows) };
                    for ((out, even), odd) in out.iter_mut().zip(even).zip(odd) {
                        *out = even + odd;
                    }
                }
            }
        }
    }
}

/// Adds the products of one group of rows with some columns to `sums`.
///
/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn sweep(
    kernels: &[TileFn],
    w: &PackedMatrix,
    group: usize,
    x: &QuantRows,
    columns: Range<usize>,
    sums: &mut [Sums],
) {
    let (n, n_columns) = (x.n(), columns.len());
    let n_passes = n_columns.div_ceil(kernels.len());
    let tile_len = w.grain().block_len();
    let bytes = w.tiles(group..group + 1);
    for (b, k) in (0..w.n_in()).step_by(tile_len).enumerate() {
        let at = b * w.tile_bytes();
        let mut call = TileCall {
            tile: bytes[at..].as_ptr(),
            n_inputs: tile_len.min(w.n_in() - k),
            acts: x.blocks()[b * n + columns.start..b * n + columns.end].as_ptr(),
            sums: sums.as_mut_ptr(),
            ahead: match w.ahead().bytes(n_columns) {
                0 => std::ptr::null(),
                ahead => bytes.as_ptr().wrapping_add(at + ahead),
            },
        };
        let mut left = n_columns;
        for pass in 0..n_passes {
            let columns = left.div_ceil(n_passes - pass);
            left -= columns;
            // SAFETY: `tile` is tile `b` of the group (its slice was not empty, and `PackedMatrix` holds whole tiles); the
            // passes share out `n_columns` blocks and sums.
            unsafe {
                kernels[columns - 1](&call);
                call.acts = call.acts.add(columns);
                call.sums = call.sums.add(columns);
            }
        }
    }
}
