//! Q4_0: 32 values as signed four-bit codes under one scale. 4.5 bits a value.
//!
//! Layout: `d(2, f16) qs(16)`. Value `n` is `d·(lo(qs[n]) - 8)` in the first half of the block and
//! `d·(hi(qs[n-16]) - 8)` in the second. `d` may be negative: the grid has one more level on its negative side.

use paceline_gguf::GgmlType;

use super::float::f32_to_f16;
use super::{BlockFormat, Format, field, fit, half_at};

pub const FORMAT: Format = Format::of::<Blocks, 18, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<18, 32> for Blocks {
    const TY: GgmlType = GgmlType::Q4_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 32]) {
        let d = half_at(block, 0);
        let qs: &[u8; 16] = field(block, 2);
        for n in 0..16 {
            out[n] = d * f32::from((qs[n] & 15) as i8 - 8);
        }
        for n in 0..16 {
            out[16 + n] = d * f32::from((qs[n] >> 4) as i8 - 8);
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], given: Option<&[f32; 32]>, block: &mut [u8; 18]) {
        let levels = fit::integers(8.0);
        let x = fit::finite(values);
        let d = levels.fit(&x, &fit::importance(&x, given), fit::rounded_to_f16);
        let inv = fit::inverse(d);
        let q = x.map(|x| ((levels.nearest)(x * inv) + 8.0) as u8);
        block[..2].copy_from_slice(&f32_to_f16(d));
        for n in 0..16 {
            block[2 + n] = q[n] | q[16 + n] << 4;
        }
    }
}
