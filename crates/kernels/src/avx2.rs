//! Kernels for AVX2 with FMA and F16C: eight floats in a vector.

use crate::delta::DeltaToken;
use crate::matmul::WeightRows;
use crate::simd::{self, Simd, kernel_table};
use crate::table::KernelTable;
use half::f16;
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
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
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
}
