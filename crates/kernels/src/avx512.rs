//! Kernels for AVX-512F: sixteen floats in a vector.

use crate::attention::BlockCall;
use crate::delta::DeltaToken;
use crate::matmul::WeightRows;
use crate::simd::{self, MAX_LANES, Simd, kernel_table};
use crate::table::KernelTable;
use half::{bf16, f16};
use std::arch::x86_64::*;

kernel_table!(
    F32x16,
    "avx512",
    "avx512f,avx2,fma,f16c",
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
);

#[derive(Clone, Copy)]
struct F32x16(__m512);

impl Simd for F32x16 {
    const LANES: usize = 16;
    const COLUMNS: usize = 4; // 4 x 4 sums, 4 weights and a column fit 32 registers

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: AVX-512F by contract.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: AVX-512F and sixteen readable floats by contract.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: AVX-512F and sixteen readable halves, which are 32 bytes, by contract.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: AVX-512F and sixteen writable floats by contract.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX-512F by contract.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: AVX-512F by contract.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: AVX-512F by contract.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // Spelled out because the order of `_mm512_reduce_add_ps` is nobody's promise.
        // SAFETY: AVX-512F by contract. Lane i and i + 8, then i + 4, then i + 2, then i + 1.
        unsafe {
            let eight = _mm512_add_ps(self.0, _mm512_shuffle_f32x4::<0b01_00_11_10>(self.0, self.0));
            let four = _mm512_add_ps(eight, _mm512_shuffle_f32x4::<0b10_11_00_01>(eight, eight));
            let four = _mm512_castps512_ps128(four);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: AVX-512F and sixteen readable halves, which are 32 bytes, by contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn sums(vectors: &[Self; MAX_LANES]) -> Self {
        // Each step adds two halves of every vector and puts two vectors into one. Lanes i and i + 8 of a vector come
        // together first, then i + 4, i + 2 and i + 1, as in `sum`.
        // Macros, for closures cannot be inlined always and would miss the features.
        // SAFETY: AVX-512F by contract.
        unsafe {
            macro_rules! halves {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    // 128-bit parts a0 a1 b0 b1 + a2 a3 b2 b3
                    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a.0, b.0);
                    _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a.0, b.0))
                }};
            }
            macro_rules! quarters {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    // a b c d, of two 128-bit parts each: the even ones + the odd ones
                    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                    _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
                }};
            }
            macro_rules! pairs {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
                    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
                    _mm512_add_ps(low, high)
                }};
            }
            macro_rules! ones {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    // a0 a2 b0 b2 + a1 a3 b1 b3 of each 128-bit part
                    let even = _mm512_shuffle_ps::<0b10_00_10_00>(a, b);
                    _mm512_add_ps(even, _mm512_shuffle_ps::<0b11_01_11_01>(a, b))
                }};
            }
            // Part p of the result holds vectors 4p .. 4p + 4, so vectors 0, 4, 8, 12 go together first.
            macro_rules! four {
                ($i:expr) => {
                    quarters!(
                        halves!(vectors[$i], vectors[$i + 4]),
                        halves!(vectors[$i + 8], vectors[$i + 12])
                    )
                };
            }
            let (a, b, c, d) = (four!(0), four!(1), four!(2), four!(3));
            Self(ones!(pairs!(a, b), pairs!(c, d)))
        }
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        // SAFETY: a prefetch of any address is no access.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
}
