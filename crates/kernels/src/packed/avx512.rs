//! Packed kernels for AVX-512 with VNNI: a strip in a vector, four multiplications in a lane at a time.

use std::arch::x86_64::*;
use std::ops::Range;

use super::fill512;
use super::float::FloatFormat;
use super::format::IntFormat;
use super::isa::{self, Isa};
use super::matrix::PackedMatrix;
use super::product::{self, Place, TileCall, TileFn};
use super::rows::{ActBlock, Grain, QuantRows, whole};

use super::table::PackedTable;

/// This instruction set's kernels: none unless this CPU has all it needs.
pub fn table() -> Option<PackedTable> {
    let detected = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni");
    detected.then_some(PackedTable { isa: "avx512", kernels: |format| format.kernels.avx512, product, fill })
}

/// Kernels for one to twelve columns, a strip at a time: twelve integer sums and twelve of floats leave eight registers. A strip is
/// read from its first line to its last, which is what hardware that fetches ahead recognises.
pub const fn tiles<F: IntFormat>() -> &'static [TileFn] {
    &[
        tile::<F, 1>,
        tile::<F, 2>,
        tile::<F, 3>,
        tile::<F, 4>,
        tile::<F, 5>,
        tile::<F, 6>,
        tile::<F, 7>,
        tile::<F, 8>,
        tile::<F, 9>,
        tile::<F, 10>,
        tile::<F, 11>,
        tile::<F, 12>,
    ]
}

/// The same for formats of floats, which have two sums in registers for each column.
pub const fn float_tiles<F: FloatFormat>() -> &'static [TileFn] {
    &[
        float_tile::<F, 1>,
        float_tile::<F, 2>,
        float_tile::<F, 3>,
        float_tile::<F, 4>,
        float_tile::<F, 5>,
        float_tile::<F, 6>,
        float_tile::<F, 7>,
        float_tile::<F, 8>,
        float_tile::<F, 9>,
        float_tile::<F, 10>,
        float_tile::<F, 11>,
        float_tile::<F, 12>,
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn tile<F: IntFormat, const NC: usize>(call: &TileCall) {
    // SAFETY: the features are enabled here, the rest is the contract of `TileFn`.
    unsafe { isa::tile::<I32x16, F, NC, 1>(call) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn float_tile<F: FloatFormat, const NC: usize>(call: &TileCall) {
    // SAFETY: the features are enabled here, the rest is the contract of `TileFn`.
    unsafe { isa::float_tile::<I32x16, F, NC, 1>(call) }
}

/// # Safety
/// As for [`product::product`]; and this CPU has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn product(
    kernels: &[TileFn],
    w: &PackedMatrix,
    groups: Range<usize>,
    x: &QuantRows,
    place: Place<'_>,
) {
    // SAFETY: by contract.
    unsafe { product::product(kernels, w, groups, x, place) }
}

fn fill(block: &mut ActBlock, grain: Grain, x: &[f32]) {
    if grain == Grain::F32 {
        return block.fill(grain, x);
    }
    let mut padded = [0.0; 256];
    // SAFETY: private, and `table` hands it out only after detecting the features.
    unsafe { fill512::fill(block, grain, whole(x, &mut padded)) }
}

#[derive(Clone, Copy)]
struct I32x16;

impl Isa for I32x16 {
    type Int = __m512i;
    type Float = __m512;
    const LANES: usize = 16;
    const DOT_TAKES_ALL: bool = true;

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: AVX-512 by contract, as in all of these.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: 64 readable bytes by contract.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_8(byte: u8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi8(byte as i8) }
    }

    #[inline(always)]
    unsafe fn splat_32(from: *const u32) -> __m512i {
        // SAFETY: a readable word by contract.
        unsafe { _mm512_set1_epi32(*from as i32) }
    }

    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn shift(a: __m512i, left: i32) -> __m512i {
        // SAFETY: as above. The counts are constants, and the compiler takes the immediate forms.
        unsafe {
            let count = _mm_cvtsi32_si128(left.abs());
            if left >= 0 { _mm512_sll_epi16(a, count) } else { _mm512_srl_epi16(a, count) }
        }
    }

    #[inline(always)]
    unsafe fn look_up(table: &[u8; 16], a: __m512i) -> __m512i {
        // SAFETY: as above; the table has sixteen bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, a)
        }
    }

    #[inline(always)]
    unsafe fn dot<F: IntFormat>(sum: &mut __m512i, _: &mut __m512i, w: __m512i, a: __m512i) {
        // SAFETY: AVX-512 VNNI by contract.
        unsafe { *sum = _mm512_dpbusd_epi32(*sum, w, a) }
    }

    #[inline(always)]
    unsafe fn settle<F: IntFormat>(_: &mut __m512i, _: &mut __m512i, _: usize, _: usize) {}

    #[inline(always)]
    unsafe fn dot_mins(sum: __m512i, w: *const u8, a: __m512i) -> __m512i {
        // SAFETY: 32 readable bytes by contract.
        unsafe { _mm512_dpwssd_epi32(sum, _mm512_cvtepu8_epi16(_mm256_loadu_si256(w.cast())), a) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn to_float(a: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m512 {
        // SAFETY: sixteen readable bytes by contract.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> __m512 {
        // SAFETY: 64 readable bytes by contract.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(a: __m512, to: *mut f32) {
        // SAFETY: sixteen writable floats by contract.
        unsafe { _mm512_storeu_ps(to, a) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn prefetch(at: *const u8) {
        // SAFETY: a hint, without effect on memory and without faults whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}
