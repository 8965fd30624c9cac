//! IQ4_XS: 256 values in the levels of IQ4_NL, eight groups of 32 with six-bit scales. 4.25 bits a value.
//!
//! Layout: `d(2, f16) scales_h(2, u16) scales_l(4) qs(128)`. The scale of group `g` is `s - 32`, the low four bits of `s`
//! in nibble `g` of `scales_l`, its high two in bit pair `g` of `scales_h`. The codes of a group are 16 bytes in the order
//! of Q4_0; the value is `d·(s - 32)·LEVELS[q]`.

use paceline_gguf::GgmlType;

use super::iq4_nl::{dequantize_codes, levels, nearest_code};
use super::{BlockFormat, Format, field, fit, half_at};

pub const FORMAT: Format = Format::of::<Blocks, 136, 256>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<136, 256> for Blocks {
    const TY: GgmlType = GgmlType::IQ4_XS;

    #[inline(always)]
    fn dequantize(block: &[u8; 136], out: &mut [f32; 256]) {
        let d = half_at(block, 0);
        let scales_h = u16::from_le_bytes(*field(block, 2));
        let scales_l = u32::from_le_bytes(*field(block, 4));
        let qs: &[u8; 128] = field(block, 8);
        for (g, (qs, out)) in qs.as_chunks().0.iter().zip(out.as_chunks_mut().0).enumerate() {
            let low = (scales_l >> (4 * g)) & 15;
            let high = u32::from(scales_h >> (2 * g)) & 3;
            let scale = (low | high << 4) as i32 - 32;
            dequantize_codes(d * scale as f32, qs, out);
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 256], given: Option<&[f32; 256]>, block: &mut [u8; 136]) {
        let fitted = fit::signed_block::<8, 32>(values, given, levels(), 32);
        let (mut scales_h, mut scales_l) = (0u16, 0u32);
        for (g, scale) in fitted.scales.iter().enumerate() {
            let s = (scale + 32) as u8;
            scales_l |= u32::from(s & 15) << (4 * g);
            scales_h |= u16::from(s >> 4) << (2 * g);
        }
        block[..2].copy_from_slice(&fitted.d);
        block[2..4].copy_from_slice(&scales_h.to_le_bytes());
        block[4..8].copy_from_slice(&scales_l.to_le_bytes());
        for (qs, levels) in block[8..].chunks_exact_mut(16).zip(fitted.levels.chunks_exact(32)) {
            for n in 0..16 {
                qs[n] = nearest_code(levels[n]) | nearest_code(levels[16 + n]) << 4;
            }
        }
    }
}
