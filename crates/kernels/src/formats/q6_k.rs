//! Q6_K: 256 values as signed six-bit codes, sixteen groups of 16 with eight-bit scales. 6.56 bits a value.
//!
//! Layout: `ql(128) qh(64) scales(16 × i8) d(2, f16)`. The block is two halves of 128 values, each of four runs `k` of 32.
//! In a half, run `k` takes its low four bits from `ql[32·(k&1) + l]` (low nibble for runs 0 and 1, high for 2 and 3)
//! and its high two from bit pair `k` of `qh[l]`; the value is `d·scales[n/16]·(q - 32)`.

use paceline_gguf::GgmlType;

use super::{BlockFormat, Format, field, fit, half_at};

pub const FORMAT: Format = Format::of::<Blocks, 210, 256>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<210, 256> for Blocks {
    const TY: GgmlType = GgmlType::Q6_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 210], out: &mut [f32; 256]) {
        let d = half_at(block, 208);
        let scales: [f32; 16] = field::<16>(block, 192).map(|scale| d * f32::from(scale as i8));
        for half in 0..2 {
            let ql: &[u8; 64] = field(block, 64 * half);
            let qh: &[u8; 32] = field(block, 128 + 32 * half);
            for k in 0..4 {
                let out: &mut [f32; 32] = &mut out.as_chunks_mut().0[4 * half + k];
                let ql: &[u8; 32] = field(ql, 32 * (k & 1));
                let shift = if k >= 2 { 4 } else { 0 };
                for part in 0..2 {
                    let scale = scales[8 * half + 2 * k + part];
                    for l in 16 * part..16 * part + 16 {
                        let q = ql[l] >> shift & 15 | (qh[l] >> (2 * k) & 3) << 4;
                        out[l] = scale * f32::from(q as i8 - 32);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 256], given: Option<&[f32; 256]>, block: &mut [u8; 210]) {
        let fitted = fit::signed_block::<16, 16>(values, given, fit::integers(32.0), 128);
        let codes = fitted.levels.map(|level| (level + 32.0) as u8);
        block.fill(0);
        for (half, codes) in codes.chunks_exact(128).enumerate() {
            for (k, codes) in codes.chunks_exact(32).enumerate() {
                for (l, q) in codes.iter().enumerate() {
                    block[64 * half + 32 * (k & 1) + l] |= (q & 15) << if k >= 2 { 4 } else { 0 };
                    block[128 + 32 * half + l] |= q >> 4 << (2 * k);
                }
            }
        }
        for (byte, scale) in block[192..208].iter_mut().zip(fitted.scales) {
            *byte = scale as u8;
        }
        block[208..].copy_from_slice(&fitted.d);
    }
}
