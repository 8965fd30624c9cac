//! MXFP4: 32 values as four-bit floats under a power of two (OCP Microscaling Formats, version 1.0). 4.25 bits a value.
//!
//! Layout: `e(1) qs(16)`, codes in the order of Q4_0. A code is E2M1: a sign, two bits of exponent, one of mantissa. [`LEVELS`]
//! holds twice its values, so that they are integers; the value is `LEVELS[q]·2^(e-128)`, half the scale that `e` names.

use paceline_gguf::GgmlType;

use super::{BlockFormat, Format, field, fit};

pub const FORMAT: Format = Format::of::<Blocks, 17, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<17, 32> for Blocks {
    const TY: GgmlType = GgmlType::MXFP4;

    #[inline(always)]
    fn dequantize(block: &[u8; 17], out: &mut [f32; 32]) {
        let d = scale(block[0]);
        let qs: &[u8; 16] = field(block, 1);
        for n in 0..16 {
            out[n] = d * f32::from(level(qs[n] & 15));
        }
        for n in 0..16 {
            out[16 + n] = d * f32::from(level(qs[n] >> 4));
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], given: Option<&[f32; 32]>, block: &mut [u8; 17]) {
        // The last value that does not become infinite when it is rounded up to a level.
        let limit = 12.0 * scale(252);
        let values = values.map(|x| if x.is_nan() { 0.0 } else { x.clamp(-limit, limit) });
        let max = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        // The largest level, 12, lies in [2^3, 2^4): this exponent puts the largest value there too.
        let exponent = (max.to_bits() >> 23) as i32 - 127;
        let e = exponent - 3 + 128;
        if e < 3 {
            block.fill(0); // below 2^-121 there is nothing worth keeping
            return;
        }
        // One step up avoids clipping, one down is finer and clips; compare both in the units of the middle one.
        let x = values.map(|x| x / scale(e as u8));
        let w = fit::importance(&x, given);
        let (_, shift) = [0, 1, -1]
            .map(|shift: i32| {
                let unit = (shift as f32).exp2();
                (error(&x, &w, 1.0 / unit) * unit * unit, shift)
            })
            .into_iter()
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("three candidates");
        let inv = (-shift as f32).exp2();
        let q = x.map(|x| nearest_code(x * inv));
        block[0] = (e + shift) as u8;
        for n in 0..16 {
            block[1 + n] = q[n] | q[16 + n] << 4;
        }
    }
}

/// Twice the value of each code. NVFP4 has the same ones.
pub const LEVELS: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// `LEVELS[code]` without a lookup, so that it vectorises: the magnitudes 0 1 2 3 4 6 8 12 bend upwards, hence are the
/// maximum of three straight lines.
#[inline(always)]
pub fn level(code: u8) -> i8 {
    let q = (code & 7) as i8;
    let magnitude = q.max(2 * q - 4).max(4 * q - 16);
    if code & 8 != 0 { -magnitude } else { magnitude }
}

/// The code whose level is nearest to `x`.
#[inline(always)]
pub fn nearest_code(x: f32) -> u8 {
    const BETWEEN: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];
    let magnitude = BETWEEN.iter().map(|limit| u8::from(x.abs() > *limit)).sum::<u8>();
    // The table has two zeros; the plain one is written.
    if x < 0.0 && magnitude > 0 { magnitude | 8 } else { magnitude }
}

/// Weighted squared error of the levels nearest to `x·inv`, in units where `inv` is 1.
#[inline(always)]
pub fn error(x: &[f32], w: &[f32], inv: f32) -> f32 {
    let term = |(x, w): (&f32, &f32)| w * (x * inv - LEVELS[usize::from(nearest_code(x * inv))]).powi(2);
    x.iter().zip(w).map(term).sum()
}

/// `2^(e-128)`; below `e = 2` it is a subnormal.
#[inline(always)]
fn scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_three_lines() {
        for code in 0..16 {
            assert_eq!(f32::from(level(code)), LEVELS[usize::from(code)]);
        }
    }

    #[test]
    fn scales_are_powers_of_two() {
        for e in 0..255u8 {
            assert_eq!(f64::from(scale(e)), (f64::from(e) - 128.0).exp2());
        }
    }
}
