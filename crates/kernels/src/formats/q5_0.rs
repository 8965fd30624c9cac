//! Q5_0: 32 values as signed five-bit codes under one scale. 5.5 bits a value.
//!
//! Layout: `d(2, f16) qh(4, u32) qs(16)`. The low four bits of code `n` lie as in Q4_0, its fifth is bit `n` of `qh`;
//! the value is `d·(q - 16)`.

use paceline_gguf::GgmlType;

use super::float::f32_to_f16;
use super::{BlockFormat, Format, field, fit, half_at};

pub const FORMAT: Format = Format::of::<Blocks, 22, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<22, 32> for Blocks {
    const TY: GgmlType = GgmlType::Q5_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 22], out: &mut [f32; 32]) {
        let d = half_at(block, 0);
        let q = unpack(field(block, 2), field(block, 6));
        for n in 0..32 {
            out[n] = d * f32::from(q[n] as i8 - 16);
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], given: Option<&[f32; 32]>, block: &mut [u8; 22]) {
        let levels = fit::integers(16.0);
        let x = fit::finite(values);
        let d = levels.fit(&x, &fit::importance(&x, given), fit::rounded_to_f16);
        let inv = fit::inverse(d);
        let q = x.map(|x| ((levels.nearest)(x * inv) + 16.0) as u8);
        block[..2].copy_from_slice(&f32_to_f16(d));
        block[2..].copy_from_slice(&pack(&q));
    }
}

/// The 32 five-bit codes of the fields `qh` and `qs`; Q5_1 has the same ones.
#[inline(always)]
pub fn unpack(qh: &[u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let qh = u32::from_le_bytes(*qh);
    let mut q = [0; 32];
    for n in 0..16 {
        q[n] = qs[n] & 15;
    }
    for n in 0..16 {
        q[16 + n] = qs[n] >> 4;
    }
    for (n, q) in q.iter_mut().enumerate() {
        // A mask that is constant for each n: a shift by n has no vector form before AVX2.
        *q |= if qh & (1 << n) != 0 { 16 } else { 0 };
    }
    q
}

/// The fields `qh` and `qs` of 32 five-bit codes.
pub fn pack(q: &[u8; 32]) -> [u8; 20] {
    let mut fields = [0; 20];
    let qh = q.iter().enumerate().fold(0u32, |qh, (n, q)| qh | u32::from(q >> 4) << n);
    fields[..4].copy_from_slice(&qh.to_le_bytes());
    for n in 0..16 {
        fields[4 + n] = (q[n] & 15) | (q[16 + n] & 15) << 4;
    }
    fields
}
