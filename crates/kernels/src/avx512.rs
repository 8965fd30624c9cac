//! Kernels for AVX-512F: sixteen floats in a vector.

use crate::attention::BlockCall;
use crate::delta::{DeltaRun, DeltaToken};
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
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX-512F by contract.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: AVX-512F by contract.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn greater(self, other: Self) -> Self {
        // SAFETY: AVX-512F by contract. The instruction's rule for NaN is the contract's.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn first(self) -> f32 {
        // SAFETY: AVX-512F by contract.
        unsafe { _mm512_cvtss_f32(self.0) }
    }

    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        // SAFETY: AVX-512F by contract.
        unsafe {
            let eight = _mm512_max_ps(self.0, _mm512_shuffle_f32x4::<0b01_00_11_10>(self.0, self.0));
            let four = _mm512_max_ps(eight, _mm512_shuffle_f32x4::<0b10_11_00_01>(eight, eight));
            let four = _mm512_castps512_ps128(four);
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        // SAFETY: AVX-512F by contract.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0);
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }

    #[inline(always)]
    unsafe fn scale_by_power(self, shifted: Self) -> Self {
        // SAFETY: AVX-512F by contract. The low bits of `shifted` are n; moved up, with the bias, they are the bits of 2^n.
        unsafe {
            let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted.0));
            let power = _mm512_add_epi32(power, _mm512_set1_epi32(127 << 23));
            Self(_mm512_mul_ps(self.0, _mm512_castsi512_ps(power)))
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
    unsafe fn transpose(v: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        // Floats of pairs of vectors, then pairs of fours, then the 128-bit parts across.
        // SAFETY: AVX-512F by contract.
        unsafe {
            let mut a = v;
            for i in (0..16).step_by(2) {
                a[i] = Self(_mm512_unpacklo_ps(v[i].0, v[i + 1].0));
                a[i + 1] = Self(_mm512_unpackhi_ps(v[i].0, v[i + 1].0));
            }
            // b[4 q + j], part p: lane 4 p + j of vectors 4 q .. 4 q + 4.
            let mut b = a;
            for q in (0..16).step_by(4) {
                let of = |i: usize| _mm512_castps_pd(a[q + i].0);
                b[q] = Self(_mm512_castpd_ps(_mm512_unpacklo_pd(of(0), of(2))));
                b[q + 1] = Self(_mm512_castpd_ps(_mm512_unpackhi_pd(of(0), of(2))));
                b[q + 2] = Self(_mm512_castpd_ps(_mm512_unpacklo_pd(of(1), of(3))));
                b[q + 3] = Self(_mm512_castpd_ps(_mm512_unpackhi_pd(of(1), of(3))));
            }
            let mut out = b;
            for j in 0..4 {
                let (x, y, z, w) = (b[j].0, b[4 + j].0, b[8 + j].0, b[12 + j].0);
                let even = (
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(x, y),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(z, w),
                );
                let odd = (
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(x, y),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(z, w),
                );
                out[j] = Self(_mm512_shuffle_f32x4::<0b10_00_10_00>(even.0, even.1));
                out[8 + j] = Self(_mm512_shuffle_f32x4::<0b11_01_11_01>(even.0, even.1));
                out[4 + j] = Self(_mm512_shuffle_f32x4::<0b10_00_10_00>(odd.0, odd.1));
                out[12 + j] = Self(_mm512_shuffle_f32x4::<0b11_01_11_01>(odd.0, odd.1));
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
