//! Q5_K: 256 values as five-bit codes, eight groups of 32 with six-bit scales and offsets. 5.5 bits a value.
//!
//! Layout: `d(2, f16) dmin(2, f16) scales(12) qh(32) qs(128)`: Q4_K, and the fifth bit of value `l` of group `g` is bit
//! `g` of `qh[l]`.

use paceline_gguf::GgmlType;

use super::q4_k::{pack_scales, unpack_scales};
use super::{BlockFormat, Format, field, fit, half_at, vectors_end_here};

pub const FORMAT: Format = Format::of::<Blocks, 176, 256>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<176, 256> for Blocks {
    const TY: GgmlType = GgmlType::Q5_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 176], out: &mut [f32; 256]) {
        let (d, d_min) = (half_at(block, 0), half_at(block, 2));
        let (scales, mins) = unpack_scales(field(block, 4));
        let qh: &[u8; 32] = field(block, 16);
        let qs: &[u8; 128] = field(block, 48);
        let pairs = qs.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0);
        for (pair, (qs, out)) in pairs.enumerate() {
            let (even, odd) = (2 * pair, 2 * pair + 1);
            let (scale, min) = (d * f32::from(scales[even]), d_min * f32::from(mins[even]));
            for l in 0..32 {
                out[l] = scale * f32::from(qs[l] & 15 | (qh[l] >> even & 1) << 4) - min;
            }
            let (scale, min) = (d * f32::from(scales[odd]), d_min * f32::from(mins[odd]));
            for l in 0..32 {
                out[32 + l] = scale * f32::from(qs[l] >> 4 | (qh[l] >> odd & 1) << 4) - min;
            }
            vectors_end_here();
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 256], given: Option<&[f32; 256]>, block: &mut [u8; 176]) {
        let fitted = fit::offset_block::<8, 32>(values, given, 31.0, 63.0);
        block[..2].copy_from_slice(&fitted.d);
        block[2..4].copy_from_slice(&fitted.d_min);
        block[4..16].copy_from_slice(&pack_scales(&fitted.scales, &fitted.mins));
        let (qh, qs) = block[16..].split_at_mut(32);
        qh.fill(0);
        for (pair, (qs, codes)) in qs.chunks_exact_mut(32).zip(fitted.codes.chunks_exact(64)).enumerate() {
            for l in 0..32 {
                let (even, odd) = (codes[l], codes[32 + l]);
                qs[l] = even & 15 | odd << 4;
                qh[l] |= (even >> 4 | odd >> 4 << 1) << (2 * pair);
            }
        }
    }
}
