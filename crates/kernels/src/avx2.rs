//! Kernels for AVX2 with FMA and F16C: eight floats in a vector.

use crate::attention::BlockCall;
use crate::delta::DeltaToken;
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

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: AVX2 and eight readable halves, which are 16 bytes, by contract.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn sums(vectors: &[Self; MAX_LANES]) -> Self {
        // Each step adds two halves of every vector and puts two vectors into one.
        // SAFETY: AVX by contract. Lane i and i + 4, then i and i + 2, then the two, as in `sum`.
        unsafe {
            macro_rules! halves {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    let low = _mm256_permute2f128_ps::<0x20>(a.0, b.0);
                    _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a.0, b.0))
                }};
            }
            macro_rules! pairs {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
                    let high = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
                    _mm256_add_ps(low, high)
                }};
            }
            macro_rules! ones {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    let even = _mm256_shuffle_ps::<0b10_00_10_00>(a, b);
                    _mm256_add_ps(even, _mm256_shuffle_ps::<0b11_01_11_01>(a, b))
                }};
            }
            // Vectors i and i + 4 lie in the two halves of the result.
            macro_rules! two {
                ($i:expr) => {
                    halves!(vectors[$i], vectors[$i + 4])
                };
            }
            Self(ones!(pairs!(two!(0), two!(1)), pairs!(two!(2), two!(3))))
        }
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        // SAFETY: a prefetch of any address is no access.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
}
