//! IQ4_NL: 32 values as four-bit indices into a fixed table of 16 levels under one scale. 4.5 bits a value.
//!
//! Layout: `d(2, f16) qs(16)`, value `n` is `d·LEVELS[q]`, codes in the order of Q4_0. The levels lie closer together
//! near zero, where trained weights are most frequent ("non-linear").

use paceline_gguf::GgmlType;

use super::fit::{self, Levels};
use super::float::f32_to_f16;
use super::{BlockFormat, Format, field, half_at};

pub const FORMAT: Format = Format::of::<Blocks, 18, 32>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<18, 32> for Blocks {
    const TY: GgmlType = GgmlType::IQ4_NL;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 32]) {
        dequantize_codes(half_at(block, 0), field(block, 2), out);
    }

    #[inline(always)]
    fn quantize(values: &[f32; 32], given: Option<&[f32; 32]>, block: &mut [u8; 18]) {
        let x = fit::finite(values);
        let d = levels().fit(&x, &fit::importance(&x, given), fit::rounded_to_f16);
        let inv = fit::inverse(d);
        let q = x.map(|x| nearest_code(x * inv));
        block[..2].copy_from_slice(&f32_to_f16(d));
        for n in 0..16 {
            block[2 + n] = q[n] | q[16 + n] << 4;
        }
    }
}

/// The level of each code, in ascending order. IQ4_XS has the same ones.
pub const LEVELS: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// The code of the level nearest to each integer `i`, at `i + 128`.
const NEAREST: [u8; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    let mut code = 0;
    while i < 256 {
        let x = i as f32 - 128.0;
        while code < 15 && x - LEVELS[code] > LEVELS[code + 1] - x {
            code += 1;
        }
        table[i] = code as u8;
        i += 1;
    }
    table
};

/// The code whose level is nearest to `x`, up to rounding `x` to an integer first.
#[inline(always)]
pub fn nearest_code(x: f32) -> u8 {
    NEAREST[(x.clamp(-128.0, 127.0) + 128.5) as u8 as usize]
}

/// The grid, as the search for scales wants it.
pub fn levels() -> Levels<impl Fn(f32) -> f32 + Copy> {
    let nearest = |x| LEVELS[usize::from(nearest_code(x) & 15)];
    Levels { range: (LEVELS[0], LEVELS[15]), step: 4.0, nearest }
}

/// The values of 32 codes under scale `d`.
#[inline(always)]
pub fn dequantize_codes(d: f32, qs: &[u8; 16], out: &mut [f32; 32]) {
    let values = LEVELS.map(|level| d * level);
    for n in 0..16 {
        out[n] = values[usize::from(qs[n] & 15)];
        out[16 + n] = values[usize::from(qs[n] >> 4)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_knows_the_nearest_level() {
        for i in -128..128i32 {
            let x = i as f32;
            let least = LEVELS.iter().map(|level| (x - level).abs()).fold(f32::INFINITY, f32::min);
            assert_eq!((x - LEVELS[usize::from(nearest_code(x))]).abs(), least, "{i}");
        }
    }
}
