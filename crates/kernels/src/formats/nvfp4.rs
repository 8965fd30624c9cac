//! NVFP4: 64 values as four-bit floats, four groups of 16 under scales in unsigned E4M3. 4.5 bits a value.
//!
//! Layout: `sc(4) qs(32)`. Group `g` has the eight bytes `qs[8·g..]`, low halves first; the value is
//! `E4M3(sc[g])/2·LEVELS[q]` with the doubled E2M1 levels of MXFP4. A tensor of this type comes with a separate factor that
//! the matrix product applies; here, as in the block, it is not present: scales end at 448, values at 2688.

use paceline_gguf::GgmlType;

use super::mxfp4::{error, level, nearest_code};
use super::{BlockFormat, Format, field, fit, vectors_end_here};

pub const FORMAT: Format = Format::of::<Blocks, 36, 64>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<36, 64> for Blocks {
    const TY: GgmlType = GgmlType::NVFP4;

    #[inline(always)]
    fn dequantize(block: &[u8; 36], out: &mut [f32; 64]) {
        let qs: &[u8; 32] = field(block, 4);
        for (g, (qs, out)) in qs.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0).enumerate() {
            let d = half_e4m3(block[g]);
            for n in 0..8 {
                out[n] = d * f32::from(level(qs[n] & 15));
            }
            for n in 0..8 {
                out[8 + n] = d * f32::from(level(qs[n] >> 4));
            }
            vectors_end_here();
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 64], given: Option<&[f32; 64]>, block: &mut [u8; 36]) {
        for (g, x) in values.as_chunks::<16>().0.iter().enumerate() {
            let x = fit::finite(x);
            let given = given.map(|given| &given.as_chunks::<16>().0[g]);
            let w = fit::importance(&x, given);
            let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            // The first scale that does not clip, those above as far as the largest value still has level 6, and those
            // below as far as half of it.
            let unclipped = (1..0x7e).find(|&sc| half_e4m3(sc) * 12.0 >= max).unwrap_or(0x7e);
            let candidates = unclipped.saturating_sub(8).max(1)..=(unclipped + 8).min(0x7e);
            let (_, sc) = candidates
                .map(|sc| (error(&x, &w, 1.0 / half_e4m3(sc)) * half_e4m3(sc).powi(2), sc))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .expect("not empty");
            let inv = 1.0 / half_e4m3(sc);
            let q = x.map(|x| nearest_code(x * inv));
            block[g] = sc;
            for n in 0..8 {
                block[4 + 8 * g + n] = q[n] | q[8 + n] << 4;
            }
        }
    }
}

/// Half the value of an unsigned E4M3: exponent bias 7, no infinity, NaN (0x7f) read as zero.
#[inline(always)]
fn half_e4m3(x: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(x >> 3 & 15), f32::from(x & 7));
    if x == 0 || x == 0x7f {
        0.0
    } else if exponent == 0 {
        mantissa / 1024.0
    } else {
        (8.0 + mantissa) * f32::from_bits((exponent + 127 - 7 - 3 - 1) << 23)
    }
}
