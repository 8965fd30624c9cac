//! F32, F16 and BF16: one value per block, no scale.
//!
//! F16 is IEEE half precision, BF16 the upper half of an `f32`. Narrowing rounds to nearest, ties to even; NaN stays
//! NaN, and a value beyond the range of F16 becomes infinite as IEEE says (a weight that large has no business in F16).
//!
//! [`f16_to_f32`] and [`f32_to_f16`] also serve the scales of every quantised format.

use half::{bf16, f16};
use paceline_gguf::GgmlType;

use super::{BlockFormat, Format};

pub const F32: Format = Format::of::<Single, 4, 1>();

struct Single;

impl BlockFormat<4, 1> for Single {
    const TY: GgmlType = GgmlType::F32;

    #[inline(always)]
    fn dequantize(block: &[u8; 4], [x]: &mut [f32; 1]) {
        *x = f32::from_le_bytes(*block);
    }

    #[inline(always)]
    fn quantize([x]: &[f32; 1], _given: Option<&[f32; 1]>, block: &mut [u8; 4]) {
        *block = x.to_le_bytes();
    }
}

pub const F16: Format = Format::of::<Half, 2, 1>();

struct Half;

impl BlockFormat<2, 1> for Half {
    const TY: GgmlType = GgmlType::F16;

    #[inline(always)]
    fn dequantize(block: &[u8; 2], [x]: &mut [f32; 1]) {
        *x = f16_to_f32(*block);
    }

    #[inline(always)]
    fn quantize([x]: &[f32; 1], _given: Option<&[f32; 1]>, block: &mut [u8; 2]) {
        *block = f16::from_f32(*x).to_le_bytes();
    }
}

pub const BF16: Format = Format::of::<Brain, 2, 1>();

struct Brain;

impl BlockFormat<2, 1> for Brain {
    const TY: GgmlType = GgmlType::BF16;

    #[inline(always)]
    fn dequantize(block: &[u8; 2], [x]: &mut [f32; 1]) {
        *x = f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16);
    }

    #[inline(always)]
    fn quantize([x]: &[f32; 1], _given: Option<&[f32; 1]>, block: &mut [u8; 2]) {
        *block = bf16::from_f32(*x).to_le_bytes();
    }
}

/// Widens an F16, exactly.
///
/// Only integer operations, one subtraction and selects, so that a loop over it vectorises on any CPU. The exponent moves
/// from bias 15 to bias 127. A subnormal has no leading one: under exponent 113 (2^-14) the mantissa gets one, and
/// subtracting 2^-14 takes it away again, exactly.
#[inline(always)]
pub fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    const EXPONENT: u32 = 0x1f << 23;
    const REBIAS: u32 = (127 - 15) << 23;
    let h = u32::from(u16::from_le_bytes(bytes));
    let sign = (h & 0x8000) << 16;
    let magnitude = (h & 0x7fff) << 13;
    let exponent = magnitude & EXPONENT;
    let normal = magnitude + REBIAS;
    let infinite_or_nan = normal + REBIAS;
    let subnormal = (f32::from_bits(normal + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23))).to_bits();
    let wide = if exponent == 0 { subnormal } else { normal };
    let wide = if exponent == EXPONENT { infinite_or_nan } else { wide };
    f32::from_bits(sign | wide)
}

/// Narrows a scale to F16: beyond the range it saturates, for an infinite scale would turn codes of zero into NaN.
pub fn f32_to_f16(scale: f32) -> [u8; 2] {
    f16::from_f32(scale.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_as_ieee_says() {
        for bits in 0..=u16::MAX {
            let want = f16::from_bits(bits).to_f32();
            let got = f16_to_f32(bits.to_le_bytes());
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                "{bits:#06x}: {got} != {want}"
            );
        }
    }

    #[test]
    fn narrowing_rounds_to_even_and_keeps_nan() {
        let narrow = |format: &Format, x: f32| {
            let mut bytes = [0; 2];
            (format.quantize)(&[x], &mut bytes);
            u16::from_le_bytes(bytes)
        };
        assert_eq!(narrow(&BF16, f32::from_bits(0x3f80_8000)), 0x3f80); // a tie, down to even
        assert_eq!(narrow(&BF16, f32::from_bits(0x3f81_8000)), 0x3f82); // a tie, up to even
        assert_eq!(narrow(&BF16, f32::from_bits(0x3f80_8001)), 0x3f81);
        assert!(bf16::from_bits(narrow(&BF16, f32::NAN)).is_nan());
        assert_eq!(narrow(&F16, 1.0 + 1.0 / 2048.0), 0x3c00);
        assert_eq!(narrow(&F16, 1.0 + 3.0 / 2048.0), 0x3c02);
        assert_eq!(narrow(&F16, 1e6), 0x7c00);
        assert!(f16::from_bits(narrow(&F16, f32::NAN)).is_nan());
    }

    #[test]
    fn a_scale_saturates() {
        assert_eq!(f16_to_f32(f32_to_f16(1e9)), 65504.0);
        assert_eq!(f16_to_f32(f32_to_f16(-1e9)), -65504.0);
    }
}
