//! What a format says of its tiles, and what follows from that.

use paceline_gguf::GgmlType;

use super::Grain;
use super::float::FloatFormat;
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::product::TileFn;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Rows of a tile: two strips.
pub const ROWS: usize = 32;
/// Rows whose codes share a line.
pub const STRIP: usize = 16;
/// Inputs of a sub-block.
pub const SUB: usize = 32;

/// One packed form, with everything that is compiled for it.
pub struct PackedFormat {
    pub ty: GgmlType,
    /// The activations it multiplies. A tile has as many inputs as a block of them, the last of a row maybe fewer.
    pub grain: Grain,
    /// Bytes of a tile with this many inputs: a multiple of 64.
    pub tile_bytes: fn(usize) -> usize,
    /// Adds one row to a zeroed tile: `(source, n_inputs, row, tile)`.
    pub pack_row: fn(&[u8], usize, usize, &mut [u8]),
    /// The kernels of each instruction set: entry `i` multiplies `i + 1` columns.
    pub kernels: Kernels,
}

/// See [`PackedFormat::kernels`].
pub struct Kernels {
    pub scalar: &'static [TileFn],
    #[cfg(target_arch = "x86_64")]
    pub avx2: &'static [TileFn],
    #[cfg(target_arch = "x86_64")]
    pub avx_vnni: &'static [TileFn],
    #[cfg(target_arch = "x86_64")]
    pub avx512: &'static [TileFn],
}

impl PackedFormat {
    pub const fn of<F: IntFormat>() -> Self {
        assert!(F::STEP == 16 || F::STEP == 32);
        assert!(matches!(F::GRAIN, Grain::Per256) || matches!(F::GRAIN, Grain::Per32) && !F::MINS);
        Self {
            ty: F::TY,
            grain: F::GRAIN,
            tile_bytes: |n| ROWS / STRIP * Layout::of::<F>(n / SUB).bytes,
            pack_row: pack_row::<F>,
            kernels: Kernels {
                scalar: &[scalar::tile::<F>],
                #[cfg(target_arch = "x86_64")]
                avx2: avx2::Plain::tiles::<F>(),
                #[cfg(target_arch = "x86_64")]
                avx_vnni: avx2::Vnni::tiles::<F>(),
                #[cfg(target_arch = "x86_64")]
                avx512: avx512::tiles::<F>(),
            },
        }
    }

    pub const fn of_float<F: FloatFormat>() -> Self {
        Self {
            ty: F::TY,
            grain: Grain::F32,
            tile_bytes: |n| ROWS / STRIP * super::float::strip_bytes::<F>(n),
            pack_row: super::float::pack_row::<F>,
            kernels: Kernels {
                scalar: &[super::float::tile::<F>],
                #[cfg(target_arch = "x86_64")]
                avx2: avx2::Plain::float_tiles::<F>(),
                #[cfg(target_arch = "x86_64")]
                avx_vnni: avx2::Plain::float_tiles::<F>(),
                #[cfg(target_arch = "x86_64")]
                avx512: avx512::float_tiles::<F>(),
            },
        }
    }
}

/// A format of integer codes.
///
/// The operand that kernels multiply is an unsigned byte; the code it stands for is `operand - OFFSET`.
pub trait IntFormat: 'static {
    const TY: GgmlType;
    const GRAIN: Grain;
    /// Weights under one integer scale (Per256) or one half-precision scale (Per32).
    const STEP: usize;
    /// The largest operand.
    const MAX: u8;
    const OFFSET: i32;
    /// Bytes of the codes of a sub-block.
    const SUB_BYTES: usize;
    /// Whether sub-blocks have offsets, subtracted under a scale of their own.
    const MINS: bool;

    /// One row's share of a tile, from its quant blocks.
    fn read(source: &[u8], row: &mut RowBlocks);

    /// Adds a row's stored codes to a sub-block.
    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]);

    /// The code `n` of a row of a sub-block.
    fn code(lines: &[u8], row: usize, n: usize) -> i32;

    /// Operand `i` of a sub-block.
    ///
    /// # Safety
    /// This CPU has the instructions of `V`, and `SUB_BYTES` from `lines` on are readable, except the part of each line
    /// that `V` is too narrow for.
    #[cfg(target_arch = "x86_64")]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int;
}

/// One row's share of a tile, unpacked.
pub struct RowBlocks {
    /// Codes as they are stored.
    pub codes: [[u8; SUB]; 8],
    /// Integer scales, one for `STEP` weights (Per256).
    pub scales: [i8; 16],
    /// Offsets of the sub-blocks, if `MINS`.
    pub mins: [u8; 8],
    /// Half-precision scales: one for each sub-block (Per32), or only the first (Per256).
    pub d: [[u8; 2]; 8],
    /// The scale of `mins`.
    pub d_min: [u8; 2],
}

/// Where things are in a strip: codes, then
///
/// ```text
/// Per32    d[n_subs][16], f16
/// Per256   scales[256/STEP][16], i8 | mins[4][16][2], u8, by pairs of sub-blocks | d[16], f16 | dmin[16], f16
/// ```
#[derive(Clone, Copy)]
pub struct Layout {
    pub scales: usize,
    pub mins: usize,
    pub d: usize,
    pub d_min: usize,
    pub bytes: usize,
}

impl Layout {
    pub const fn of<F: IntFormat>(n_subs: usize) -> Self {
        let scales = n_subs * F::SUB_BYTES;
        let (mins, d, end) = match F::GRAIN {
            Grain::Per256 => {
                let mins = scales + 8 * SUB / F::STEP * STRIP;
                let d = if F::MINS { mins + 8 * STRIP } else { mins };
                (mins, d, d + if F::MINS { 4 * STRIP } else { 2 * STRIP })
            }
            _ => (scales, scales, scales + n_subs * 2 * STRIP),
        };
        Self { scales, mins, d, d_min: d + 2 * STRIP, bytes: end.next_multiple_of(64) }
    }
}

fn pack_row<F: IntFormat>(source: &[u8], n_inputs: usize, row: usize, tile: &mut [u8]) {
    let n_subs = n_inputs / SUB;
    let at = Layout::of::<F>(n_subs);
    let (tile, row) = (&mut tile[row / STRIP * at.bytes..][..at.bytes], row % STRIP);
    let mut blocks =
        RowBlocks { codes: [[0; SUB]; 8], scales: [0; 16], mins: [0; 8], d: [[0; 2]; 8], d_min: [0; 2] };
    F::read(source, &mut blocks);
    for (s, codes) in blocks.codes[..n_subs].iter().enumerate() {
        F::put(codes, row, &mut tile[s * F::SUB_BYTES..(s + 1) * F::SUB_BYTES]);
    }
    let mut half = |at: usize, value: [u8; 2]| tile[at + 2 * row..at + 2 * row + 2].copy_from_slice(&value);
    match F::GRAIN {
        Grain::Per256 => {
            half(at.d, blocks.d[0]);
            if F::MINS {
                half(at.d_min, blocks.d_min);
                for (s, min) in blocks.mins.iter().enumerate() {
                    tile[at.mins + s / 2 * 2 * STRIP + 2 * row + s % 2] = *min;
                }
            }
            for (i, scale) in blocks.scales[..8 * SUB / F::STEP].iter().enumerate() {
                tile[at.scales + i * STRIP + row] = *scale as u8;
            }
        }
        _ => (0..n_subs).for_each(|s| half(at.d + s * 2 * STRIP, blocks.d[s])),
    }
}
