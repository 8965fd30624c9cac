//! Q4_1: 32 values as four-bit codes with a scale and an offset. 5 bits a value.
//!
//! Layout: `d(2, f16) m(2, f16) qs(16)`; value `n` is `d·q + m`, codes in the order of Q4_0.

use paceline_gguf::GgmlType;

use super::fit::{self, Codes, Line};
use super::float::f32_to_f16;
use super::{BlockFormat, Format, field, half_at};

pub const FORMAT: Format = Format::of::<Blocks, 20, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<20, 32> for Blocks {
    const TY: GgmlType = GgmlType::Q4_1;

    #[inline(always)]
    fn dequantize(block: &[u8; 20], out: &mut [f32; 32]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let qs: &[u8; 16] = field(block, 4);
        for n in 0..16 {
            out[n] = d * f32::from(qs[n] & 15) + m;
        }
        for n in 0..16 {
            out[16 + n] = d * f32::from(qs[n] >> 4) + m;
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], given: Option<&[f32; 32]>, block: &mut [u8; 20]) {
        let (line, q) = codes(values, given, 15.0);
        block[..2].copy_from_slice(&f32_to_f16(line.d));
        block[2..4].copy_from_slice(&f32_to_f16(line.b));
        for n in 0..16 {
            block[4 + n] = q[n] | q[16 + n] << 4;
        }
    }
}

/// Scale, offset (both as F16 reads them back) and codes `0..=q_max` of a block; Q5_1 shares this.
#[inline(always)]
pub fn codes(values: &[f32; 32], given: Option<&[f32; 32]>, q_max: f32) -> (Line, [u8; 32]) {
    let codes = Codes { q_max, offset_below_zero: false };
    let x = fit::finite(values);
    let line = codes.fit(&x, &fit::importance(&x, given), |line| Line {
        d: fit::rounded_to_f16(line.d),
        b: fit::rounded_to_f16(line.b),
    });
    (line, x.map(|x| codes.nearest(x, line, fit::inverse(line.d)) as u8))
}
