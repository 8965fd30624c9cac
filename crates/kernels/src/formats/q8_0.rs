//! Q8_0: 32 values as signed bytes under one scale. 8.5 bits a value.
//!
//! Layout: `d(2, f16) qs(32 × i8)`; value `n` is `d·qs[n]`. Quantising takes `d = max|x| / 127` and rounds to nearest:
//! at eight bits the rounding of the scale to F16 matters as much as any cleverer choice of it.

use paceline_gguf::GgmlType;

use super::float::{f16_to_f32, f32_to_f16};
use super::{BlockFormat, Format};

pub const FORMAT: Format = Format::of::<Blocks, 34, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<34, 32> for Blocks {
    const TY: GgmlType = GgmlType::Q8_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 34], out: &mut [f32; 32]) {
        let [d0, d1, qs @ ..] = block;
        let d = f16_to_f32([*d0, *d1]);
        for (x, q) in out.iter_mut().zip(qs) {
            *x = d * f32::from(*q as i8);
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], _given: Option<&[f32; 32]>, block: &mut [u8; 34]) {
        let max = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let d_bytes = f32_to_f16(max / 127.0);
        let d = f16_to_f32(d_bytes);
        block[..2].copy_from_slice(&d_bytes);
        for (q, x) in block[2..].iter_mut().zip(values) {
            // With d = 0 this is 0/0 or x/0: the cast makes NaN zero, and any other code times zero is zero.
            *q = (x / d).round().clamp(-127.0, 127.0) as i8 as u8;
        }
    }
}
