//! Quantising activations with AVX-512; bit for bit what [`ActBlock::fill`] does.

use std::arch::x86_64::*;

use super::rows::{ActBlock, Grain, MINUS_8, MINUS_32, MINUS_128, SCALES, SUMS, scale_of};

/// Fills a block of integers with 256 values.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn fill(block: &mut ActBlock, grain: Grain, x: &[f32; 256]) {
    // SAFETY: loads are of the 256 values; stores end within the 96 words, of which 64 are codes.
    unsafe {
        let words = block.0.as_mut_ptr();
        // Which vectors share a scale: all sixteen, or two.
        let (d, inverse) = match grain {
            Grain::Per256 => {
                let mut max = magnitudes(x, 0);
                for v in 1..16 {
                    max = _mm512_max_epu32(max, magnitudes(x, v));
                }
                let (d, inverse) = scale_of(_mm512_reduce_max_epu32(max));
                ([d; 8], [inverse; 8])
            }
            _ => {
                let (mut d, mut inverse) = ([0.0; 8], [0.0; 8]);
                for s in 0..8 {
                    let max = _mm512_max_epu32(magnitudes(x, 2 * s), magnitudes(x, 2 * s + 1));
                    (d[s], inverse[s]) = scale_of(_mm512_reduce_max_epu32(max));
                }
                (d, inverse)
            }
        };
        // Sums of eight codes each, with 128 added to every code: lane `l` of vector `q` is of codes `64 q + 8 l` on.
        let mut sums = [_mm512_setzero_si512(); 4];
        for (q, sum) in sums.iter_mut().enumerate() {
            let at = words.add(16 * q);
            for i in 0..4 {
                let v = 4 * q + i;
                let scaled =
                    _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(16 * v)), _mm512_set1_ps(inverse[v / 2]));
                // The integer is in the low bits then, as in the plain code.
                let rounded = _mm512_castps_si512(_mm512_add_ps(scaled, _mm512_set1_ps(12_582_912.0)));
                _mm_store_si128(at.add(4 * i).cast(), _mm512_cvtepi32_epi8(rounded));
            }
            let shifted = _mm512_xor_si512(_mm512_load_si512(at.cast()), _mm512_set1_epi8(-128));
            *sum = _mm512_sad_epu8(shifted, _mm512_setzero_si512());
        }
        let (even, odd) =
            (_mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15));
        let of_16 = |a: __m512i, b: __m512i| {
            let pairs =
                _mm512_add_epi64(_mm512_permutex2var_epi64(a, even, b), _mm512_permutex2var_epi64(a, odd, b));
            _mm512_cvtepi64_epi32(pairs)
        };
        let low = _mm512_castsi256_si512(of_16(sums[0], sums[1]));
        let of_16 = _mm512_inserti64x4::<1>(low, of_16(sums[2], sums[3]));
        let of_16 = _mm512_sub_epi32(of_16, _mm512_set1_epi32(16 * 128));
        let of_32 = _mm512_add_epi32(of_16, _mm512_srli_epi64::<32>(of_16));
        let of_32 = _mm512_cvtepi64_epi32(of_32);
        let minus_128 = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32::<7>(of_32));
        _mm256_storeu_si256(words.add(MINUS_128).cast(), minus_128);
        if grain == Grain::Per256 {
            let first = _mm_setr_epi32(d[0].to_bits() as i32, 0, 0, 0);
            _mm_storeu_si128(words.add(SCALES).cast(), first);
            _mm_storeu_si128(words.add(SUMS).cast(), _mm256_cvtepi32_epi16(of_32));
            let minus_32 = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<5>(of_16));
            _mm512_storeu_si512(words.add(MINUS_32).cast(), minus_32);
        } else {
            _mm256_storeu_ps(words.add(SCALES).cast(), _mm256_loadu_ps(d.as_ptr()));
            let minus_8 = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32::<3>(of_32));
            _mm512_storeu_si512(words.add(MINUS_8).cast(), _mm512_zextsi256_si512(minus_8));
        }
    }
}

/// Bits of the magnitudes of vector `v`: they order as the magnitudes do.
///
/// # Safety
/// As for [`fill`].
#[target_feature(enable = "avx512f")]
unsafe fn magnitudes(x: &[f32; 256], v: usize) -> __m512i {
    // SAFETY: there are sixteen vectors.
    let bits = unsafe { _mm512_loadu_si512(x.as_ptr().add(16 * v).cast()) };
    _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff))
}
