//! Kernels for AVX2 with FMA and F16C: eight floats in a vector.

use crate::attention::BlockCall;
use crate::delta::{DeltaRun, DeltaToken};
use crate::matmul::WeightRows;
use crate::simd::{self, MAX_LANES, Simd, kernel_table};
use crate::table::KernelTable;
use half::{bf16, f16};
use std::arch::x86_64::*;

kernel_table!(
    F32x8,
    "avx2",
    "avx2,fma,f16c",
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
);

#[derive(Clone, Copy)]
struct F32x8(__m256);

// SAFETY of every block below: the contract of `Simd`, and nothing beyond it.
impl Simd for F32x8 {
    const LANES: usize = 8;
    const COLUMNS: usize = 2; // 4 x 2 sums, 4 weights and a column fit 16 registers

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: AVX by contract.
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: AVX and eight readable floats by contract.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: F16C and eight readable halves, which are 16 bytes, by contract.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: AVX and eight writable floats by contract.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: FMA by contract.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, term.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: AVX by contract. Lane i and i + 4, then i and i + 2, then the two.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn greater(self, other: Self) -> Self {
        // SAFETY: AVX by contract. The instruction's rule for NaN is the contract's.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn first(self) -> f32 {
        // SAFETY: AVX by contract.
        unsafe { _mm256_cvtss_f32(self.0) }
    }

    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        // SAFETY: AVX by contract.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        // SAFETY: AVX by contract.
        Self(unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit.0), self.0) })
    }

    #[inline(always)]
    unsafe fn scale_by_power(self, shifted: Self) -> Self {
        // SAFETY: AVX2 by contract. The low bits of `shifted` are n; moved up, with the bias, they are the bits of 2^n.
        unsafe {
            let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted.0));
            let power = _mm256_add_epi32(power, _mm256_set1_epi32(127 << 23));
            Self(_mm256_mul_ps(self.0, _mm256_castsi256_ps(power)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: AVX2 and eight readable halves, which are 16 bytes, by contract.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(v: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        // Floats of pairs of vectors, then pairs of fours, then the halves across.
        // SAFETY: AVX by contract.
        unsafe {
            let mut a = v;
            for i in (0..8).step_by(2) {
                a[i] = Self(_mm256_unpacklo_ps(v[i].0, v[i + 1].0));
                a[i + 1] = Self(_mm256_unpackhi_ps(v[i].0, v[i + 1].0));
            }
            let mut b = a;
            for q in (0..8).step_by(4) {
                let of = |i: usize| _mm256_castps_pd(a[q + i].0);
                b[q] = Self(_mm256_castpd_ps(_mm256_unpacklo_pd(of(0), of(2))));
                b[q + 1] = Self(_mm256_castpd_ps(_mm256_unpackhi_pd(of(0), of(2))));
                b[q + 2] = Self(_mm256_castpd_ps(_mm256_unpacklo_pd(of(1), of(3))));
                b[q + 3] = Self(_mm256_castpd_ps(_mm256_unpackhi_pd(of(1), of(3))));
            }
            let mut out = b;
            for j in 0..4 {
                out[j] = Self(_mm256_permute2f128_ps::<0x20>(b[j].0, b[4 + j].0));
                out[4 + j] = Self(_mm256_permute2f128_ps::<0x31>(b[j].0, b[4 + j].0));
            }
            out
        }
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        // SAFETY: a prefetch of any address is no access.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
}
