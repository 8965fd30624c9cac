//! Q4_K: 256 values as four-bit codes, eight groups of 32 with six-bit scales and offsets. 4.5 bits a value.
//!
//! Layout: `d(2, f16) dmin(2, f16) scales(12) qs(128)`. Value `n`, in group `g = n/32`, is `d·sc[g]·q - dmin·m[g]`. Groups
//! come in pairs that share 32 bytes of `qs`: the even one has the low halves, the odd one the high halves.
//!
//! The 12 bytes hold eight six-bit scales and eight six-bit offsets: groups 0 to 3 in the low six bits of bytes 0..4 (scales)
//! and 4..8 (offsets); groups 4 to 7 with four bits each in bytes 8..12 (scale low, offset high) and their
//! upper two bits on top of bytes 0..8. Q5_K packs them alike.

use paceline_gguf::GgmlType;

use super::{BlockFormat, Format, field, fit, half_at, vectors_end_here};

pub const FORMAT: Format = Format::of::<Blocks, 144, 256>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<144, 256> for Blocks {
    const TY: GgmlType = GgmlType::Q4_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 144], out: &mut [f32; 256]) {
        let (d, d_min) = (half_at(block, 0), half_at(block, 2));
        let (scales, mins) = unpack_scales(field(block, 4));
        let qs: &[u8; 128] = field(block, 16);
        let pairs = qs.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0);
        for (pair, (qs, out)) in pairs.enumerate() {
            let (even, odd) = (2 * pair, 2 * pair + 1);
            let (scale, min) = (d * f32::from(scales[even]), d_min * f32::from(mins[even]));
            for l in 0..32 {
                out[l] = scale * f32::from(qs[l] & 15) - min;
            }
            let (scale, min) = (d * f32::from(scales[odd]), d_min * f32::from(mins[odd]));
            for l in 0..32 {
                out[32 + l] = scale * f32::from(qs[l] >> 4) - min;
            }
            vectors_end_here();
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 256], given: Option<&[f32; 256]>, block: &mut [u8; 144]) {
        let fitted = fit::offset_block::<8, 32>(values, given, 15.0, 63.0);
        block[..2].copy_from_slice(&fitted.d);
        block[2..4].copy_from_slice(&fitted.d_min);
        block[4..16].copy_from_slice(&pack_scales(&fitted.scales, &fitted.mins));
        for (qs, codes) in block[16..].chunks_exact_mut(32).zip(fitted.codes.chunks_exact(64)) {
            for l in 0..32 {
                qs[l] = codes[l] | codes[32 + l] << 4;
            }
        }
    }
}

/// The scales and the offsets of the eight groups.
#[inline(always)]
pub fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for g in 0..4 {
        scales[g] = packed[g] & 63;
        mins[g] = packed[4 + g] & 63;
        scales[4 + g] = packed[8 + g] & 15 | packed[g] >> 6 << 4;
        mins[4 + g] = packed[8 + g] >> 4 | packed[4 + g] >> 6 << 4;
    }
    (scales, mins)
}

/// The 12 bytes of eight six-bit scales and eight six-bit offsets.
pub fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for g in 0..4 {
        packed[g] = scales[g] | scales[4 + g] >> 4 << 6;
        packed[4 + g] = mins[g] | mins[4 + g] >> 4 << 6;
        packed[8 + g] = scales[4 + g] & 15 | mins[4 + g] << 4;
    }
    packed
}
