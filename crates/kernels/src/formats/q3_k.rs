//! Q3_K: 256 values as signed three-bit codes, sixteen groups of 16 with six-bit scales. 3.44 bits a value.
//!
//! Layout: `hmask(32) qs(64) scales(12) d(2, f16)`. The low two bits of a code lie in `qs` as in Q2_K, its high bit is bit
//! `n/32` of `hmask[n%32]`; the value is `d·(s - 32)·(q - 4)`.
//!
//! The low four bits of scale `g` are the low half of byte `g` for the first eight groups, the high half of
//! byte `g - 8` for the others; its high two bits are bit pair `g/4` of byte `8 + g%4`.

use paceline_gguf::GgmlType;

use super::q2_k::pack_pairs;
use super::{BlockFormat, Format, field, fit, half_at, vectors_end_here};

pub const FORMAT: Format = Format::of::<Blocks, 110, 256>();

/// The blocks of this format.
struct Blocks;

impl BlockFormat<110, 256> for Blocks {
    const TY: GgmlType = GgmlType::Q3_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 110], out: &mut [f32; 256]) {
        let scales = unpack_scales(field(block, 96));
        let d = half_at(block, 108);
        for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (run, half, k, part) = (group / 2, group / 8, group / 2 % 4, group % 2);
            let high: &[u8; 16] = field(block, 16 * part);
            let qs: &[u8; 16] = field(block, 32 + 32 * half + 16 * part);
            let scale = d * f32::from(scales[group]);
            for l in 0..16 {
                let q = qs[l] >> (2 * k) & 3 | (high[l] >> run & 1) << 2;
                out[l] = scale * f32::from(q as i8 - 4);
            }
            vectors_end_here();
        }
    }

    #[inline(always)]
    fn quantize(values: &[f32; 256], given: Option<&[f32; 256]>, block: &mut [u8; 110]) {
        let fitted = fit::signed_block::<16, 16>(values, given, fit::integers(4.0), 32);
        let codes = fitted.levels.map(|level| (level + 4.0) as u8);
        block[..32].fill(0);
        for (n, q) in codes.iter().enumerate() {
            block[n % 32] |= q >> 2 << (n / 32);
        }
        block[32..96].copy_from_slice(&pack_pairs(&codes));
        block[96..108].copy_from_slice(&pack_scales(&fitted.scales));
        block[108..].copy_from_slice(&fitted.d);
    }
}

#[inline(always)]
fn unpack_scales(packed: &[u8; 12]) -> [i8; 16] {
    let mut scales = [0; 16];
    for g in 0..16 {
        let low = if g < 8 { packed[g] & 15 } else { packed[g - 8] >> 4 };
        let high = packed[8 + g % 4] >> (2 * (g / 4)) & 3;
        scales[g] = (low | high << 4) as i8 - 32;
    }
    scales
}

fn pack_scales(scales: &[i8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (g, scale) in scales.iter().enumerate() {
        let s = (scale + 32) as u8;
        packed[g % 8] |= (s & 15) << if g < 8 { 0 } else { 4 };
        packed[8 + g % 4] |= s >> 4 << (2 * (g / 4));
    }
    packed
}
