//! Q5_1: 32 values as five-bit codes with a scale and an offset. 6 bits a value.
//!
//! Layout: `d(2, f16) m(2, f16) qh(4, u32) qs(16)`; value `n` is `d·q + m`, codes packed as in Q5_0.

use paceline_gguf::GgmlType;

use super::float::f32_to_f16;
use super::{BlockFormat, Format, field, half_at, q4_1, q5_0};

pub const FORMAT: Format = Format::of::<Blocks, 24, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<24, 32> for Blocks {
    const TY: GgmlType = GgmlType::Q5_1;

    #[inline(always)]
    fn dequantize(block: &[u8; 24], out: &mut [f32; 32]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let q = q5_0::unpack(field(block, 4), field(block, 8));
        for n in 0..32 {
            out[n] = d * f32::from(q[n]) + m;
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], given: Option<&[f32; 32]>, block: &mut [u8; 24]) {
        let (line, q) = q4_1::codes(values, given, 31.0);
        block[..2].copy_from_slice(&f32_to_f16(line.d));
        block[2..4].copy_from_slice(&f32_to_f16(line.b));
        block[4..].copy_from_slice(&q5_0::pack(&q));
    }
}
