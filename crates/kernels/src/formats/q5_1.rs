//! Q5_1: 32 values as five-bit codes with a scale and an offset. 6 bits a value.
//!
//! Layout: `d(2, f16) m(2, f16) qh(4, u32) qs(16)`; value `n` is `d·q + m`, codes packed as in Q5_0.

use paceline_gguf::GgmlType;

use super::float::f32_to_f16;
use super::{Format, blocks, blocks_mut, field, half_at, q4_1, q5_0};

pub const FORMAT: Format = Format { ty: GgmlType::Q5_1, dequantize, quantize };

fn dequantize(data: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<24, 32>(data, out) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let q = q5_0::unpack(field(block, 4), field(block, 8));
        for n in 0..32 {
            out[n] = d * f32::from(q[n]) + m;
        }
    }
}

fn quantize(values: &[f32], data: &mut [u8]) {
    for (values, block) in blocks_mut::<24, 32>(values, data) {
        let (line, q) = q4_1::codes(values, 31.0);
        block[..2].copy_from_slice(&f32_to_f16(line.d));
        block[2..4].copy_from_slice(&f32_to_f16(line.b));
        block[4..].copy_from_slice(&q5_0::pack(&q));
    }
}
