//! Q2_K: 256 values as two-bit codes, sixteen groups of 16 with four-bit scales and offsets. 2.625 bits a value.
//!
//! Layout: `scales(16) qs(64) d(2, f16) dmin(2, f16)`. The block is two halves of 128 values; in a half, run `k` of 32
//! has its codes in bit pair `k` of 32 bytes of `qs`. The value is `d·lo(s)·q - dmin·hi(s)` with `s = scales[n/16]`.

use paceline_gguf::GgmlType;

use super::{BlockFormat, Format, field, fit, half_at, vectors_end_here};

pub const FORMAT: Format = Format::of::<Blocks, 84, 256>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<84, 256> for Blocks {
    const TY: GgmlType = GgmlType::Q2_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 84], out: &mut [f32; 256]) {
        let scales: &[u8; 16] = field(block, 0);
        let (d, d_min) = (half_at(block, 80), half_at(block, 82));
        for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (half, k, part) = (group / 8, group / 2 % 4, group % 2);
            let qs: &[u8; 16] = field(block, 16 + 32 * half + 16 * part);
            let scale = d * f32::from(scales[group] & 15);
            let min = d_min * f32::from(scales[group] >> 4);
            for l in 0..16 {
                out[l] = scale * f32::from(qs[l] >> (2 * k) & 3) - min;
            }
            vectors_end_here();
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 256], given: Option<&[f32; 256]>, block: &mut [u8; 84]) {
        let fitted = fit::offset_block::<16, 16>(values, given, 3.0, 15.0);
        for (byte, (scale, min)) in block.iter_mut().zip(fitted.scales.iter().zip(fitted.mins)) {
            *byte = scale | min << 4;
        }
        block[16..80].copy_from_slice(&pack_pairs(&fitted.codes));
        block[80..82].copy_from_slice(&fitted.d);
        block[82..].copy_from_slice(&fitted.d_min);
    }
}

/// The field `qs` of 256 two-bit codes; the low bits of Q3_K lie the same way.
pub fn pack_pairs(codes: &[u8; 256]) -> [u8; 64] {
    let mut qs = [0; 64];
    for (n, q) in codes.iter().enumerate() {
        let (half, k, l) = (n / 128, n / 32 % 4, n % 32);
        qs[32 * half + l] |= (q & 3) << (2 * k);
    }
    qs
}
