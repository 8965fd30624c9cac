//! F32, F16 and BF16, packed: the sixteen weights of an input in a strip one behind the other, multiplied in `f32`.
//!
//! Two chains of fused multiply-adds for each output, even inputs and odd ones: one alone would wait for its own latency.
//! (The instruction that multiplies pairs of BF16 has twice the rate of this on Zen 4, 117 against 58 GMAC/s, but takes activations rounded to
//! BF16. Not used yet.)

use half::f16;
use paceline_gguf::GgmlType;

use super::format::{PackedFormat, ROWS, STRIP};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::product::TileCall;

pub const F32: PackedFormat = PackedFormat::of_float::<Single>();
pub const F16: PackedFormat = PackedFormat::of_float::<Half>();
pub const BF16: PackedFormat = PackedFormat::of_float::<Brain>();

/// A format of plain floats.
pub trait FloatFormat: 'static {
    const TY: GgmlType;
    /// Bytes of a weight.
    const BYTES: usize;

    /// A weight of so many bytes.
    fn value(bytes: &[u8]) -> f32;

    /// The weights of several rows.
    ///
    /// # Safety
    /// This CPU has the instructions of `V`, and there are `V::LANES` weights.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load<V: Isa>(from: *const u8) -> V::Float;
}

struct Single;

impl FloatFormat for Single {
    const TY: GgmlType = GgmlType::F32;
    const BYTES: usize = 4;

    fn value(bytes: &[u8]) -> f32 {
        f32::from_le_bytes(*bytes.first_chunk().expect("four bytes"))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load<V: Isa>(from: *const u8) -> V::Float {
        // SAFETY: by contract.
        unsafe { V::load_f32(from) }
    }
}

struct Half;

impl FloatFormat for Half {
    const TY: GgmlType = GgmlType::F16;
    const BYTES: usize = 2;

    fn value(bytes: &[u8]) -> f32 {
        f16::from_le_bytes(*bytes.first_chunk().expect("two bytes")).to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load<V: Isa>(from: *const u8) -> V::Float {
        // SAFETY: by contract.
        unsafe { V::load_f16(from) }
    }
}

struct Brain;

impl FloatFormat for Brain {
    const TY: GgmlType = GgmlType::BF16;
    const BYTES: usize = 2;

    fn value(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(*bytes.first_chunk().expect("two bytes"))) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load<V: Isa>(from: *const u8) -> V::Float {
        // SAFETY: by contract.
        unsafe { V::load_bf16(from) }
    }
}

/// Bytes of a strip with so many inputs.
pub const fn strip_bytes<F: FloatFormat>(n_inputs: usize) -> usize {
    (n_inputs * STRIP * F::BYTES).next_multiple_of(64)
}

/// Adds one row to a tile.
pub fn pack_row<F: FloatFormat>(source: &[u8], n_inputs: usize, row: usize, tile: &mut [u8]) {
    let (strip, row) = (&mut tile[row / STRIP * strip_bytes::<F>(n_inputs)..], row % STRIP);
    let weights = source.chunks_exact(F::BYTES).take(n_inputs);
    for (weight, line) in weights.zip(strip.chunks_exact_mut(STRIP * F::BYTES)) {
        line[row * F::BYTES..(row + 1) * F::BYTES].copy_from_slice(weight);
    }
}

/// The scalar twin: multiplies a tile with one column.
///
/// # Safety
/// See [`TileFn`](super::product::TileFn).
pub unsafe fn tile<F: FloatFormat>(call: &TileCall) {
    let strip_bytes = strip_bytes::<F>(call.n_inputs);
    // SAFETY: the tile has its strips, there is one column, and its sums are ours, by contract.
    let (tile, act, sums) = unsafe {
        let tile = std::slice::from_raw_parts(call.tile, ROWS / STRIP * strip_bytes);
        (tile, &*call.acts, &mut *call.sums)
    };
    for (s, strip) in tile.chunks_exact(strip_bytes).enumerate() {
        for (i, line) in strip.chunks_exact(STRIP * F::BYTES).take(call.n_inputs).enumerate() {
            let acc = &mut sums[i % 2][s * STRIP..(s + 1) * STRIP];
            for (acc, w) in acc.iter_mut().zip(line.chunks_exact(F::BYTES)) {
                *acc = F::value(w).mul_add(act.float(i), *acc);
            }
        }
    }
}
