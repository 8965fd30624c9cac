//! Packed kernels for AVX2, with and without VNNI: half a strip in a vector, one or two of
//! the four halves at a time.
//!
//! Without VNNI four products become 32 bits by way of 16: `maddubs` multiplies bytes and adds pairs, *saturating*. So operands have
//! to be small: `2 · 127 · MAX` fits 16 bits for all but whole bytes, and of the smaller ones several sums fit before
//! they must move on. Whole bytes are made signed again and multiplied as magnitudes, their signs moved to the
//! activations: `2 · 128 · 127` fits. Every sum is exact, and so equal to the other twins'.

use std::arch::x86_64::*;
use std::ops::Range;

use super::float::FloatFormat;
use super::format::IntFormat;
use super::isa::{self, Isa};
use super::matrix::PackedMatrix;
use super::product::{self, Place, TileCall, TileFn};
use super::rows::{ActBlock, Grain, QuantRows};
use super::table::PackedTable;

/// The tables that this CPU has all it needs for.
pub fn tables() -> Vec<PackedTable> {
    let plain = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let vnni = plain && is_x86_feature_detected!("avxvnni");
    let mut tables = Vec::new();
    if plain {
        tables.push(PackedTable { isa: "avx2", kernels: |format| format.kernels.avx2, product, fill });
    }
    if vnni {
        tables.push(PackedTable {
            isa: "avx2-vnni",
            kernels: |format| format.kernels.avx_vnni,
            product,
            fill,
        });
    }
    tables
}

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Plain;

/// The same with AVX-VNNI.
#[derive(Clone, Copy)]
pub struct Vnni;

impl Plain {
    /// Kernels for one to four columns, or three where signs have to be moved: what sixteen registers have room for.
    pub const fn tiles<F: IntFormat>() -> &'static [TileFn] {
        if F::MAX > 127 {
            &[plain::<F, 1, 2>, plain::<F, 2, 2>, plain::<F, 3, 1>]
        } else {
            &[plain::<F, 1, 2>, plain::<F, 2, 2>, plain::<F, 3, 1>, plain::<F, 4, 1>]
        }
    }

    /// The same for formats of floats.
    pub const fn float_tiles<F: FloatFormat>() -> &'static [TileFn] {
        &[floats::<F, 1, 2>, floats::<F, 2, 2>, floats::<F, 3, 1>, floats::<F, 4, 1>]
    }
}

impl Vnni {
    /// Kernels for one to four columns.
    pub const fn tiles<F: IntFormat>() -> &'static [TileFn] {
        &[vnni::<F, 1, 2>, vnni::<F, 2, 2>, vnni::<F, 3, 1>, vnni::<F, 4, 1>]
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn plain<F: IntFormat, const NC: usize, const NV: usize>(call: &TileCall) {
    // SAFETY: the features are enabled here, the rest is the contract of `TileFn`.
    unsafe { isa::tile::<Plain, F, NC, NV>(call) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats<F: FloatFormat, const NC: usize, const NV: usize>(call: &TileCall) {
    // SAFETY: the features are enabled here, the rest is the contract of `TileFn`.
    unsafe { isa::float_tile::<Plain, F, NC, NV>(call) }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn vnni<F: IntFormat, const NC: usize, const NV: usize>(call: &TileCall) {
    // SAFETY: the features are enabled here, the rest is the contract of `TileFn`.
    unsafe { isa::tile::<Vnni, F, NC, NV>(call) }
}

/// # Safety
/// As for [`product::product`]; and this CPU has the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
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
    #[target_feature(enable = "avx2")]
    fn with_features(block: &mut ActBlock, grain: Grain, x: &[f32]) {
        block.fill(grain, x);
    }
    // SAFETY: private, and `tables` hands it out only after detecting the features.
    unsafe { with_features(block, grain, x) }
}

/// Products of pairs that fit a 16-bit sum.
const fn sums_in_16_bits<F: IntFormat>() -> usize {
    if F::MAX > 127 { 1 } else { 32767 / (2 * 127 * F::MAX as usize) }
}

impl Isa for Plain {
    type Int = __m256i;
    type Float = __m256;
    const LANES: usize = 8;
    const DOT_TAKES_ALL: bool = false;

    #[inline(always)]
    unsafe fn zero() -> __m256i {
        // SAFETY: AVX2 by contract, as in all of these.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        // SAFETY: 32 readable bytes by contract.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_8(byte: u8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi8(byte as i8) }
    }

    #[inline(always)]
    unsafe fn splat_32(from: *const u32) -> __m256i {
        // SAFETY: a readable word by contract.
        unsafe { _mm256_set1_epi32(*from as i32) }
    }

    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_and_si256(a, b) }
    }

    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    unsafe fn shift(a: __m256i, left: i32) -> __m256i {
        // SAFETY: as above. The counts are constants, and the compiler takes the immediate forms.
        unsafe {
            let count = _mm_cvtsi32_si128(left.abs());
            if left >= 0 { _mm256_sll_epi16(a, count) } else { _mm256_srl_epi16(a, count) }
        }
    }

    #[inline(always)]
    unsafe fn look_up(table: &[u8; 16], a: __m256i) -> __m256i {
        // SAFETY: as above; the table has sixteen bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, a)
        }
    }

    #[inline(always)]
    unsafe fn dot<F: IntFormat>(_: &mut __m256i, narrow: &mut __m256i, w: __m256i, a: __m256i) {
        // SAFETY: as above.
        unsafe {
            let pairs = if F::MAX > 127 {
                let code = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(a, code))
            } else {
                _mm256_maddubs_epi16(w, a)
            };
            *narrow = _mm256_add_epi16(*narrow, pairs);
        }
    }

    #[inline(always)]
    unsafe fn settle<F: IntFormat>(sum: &mut __m256i, narrow: &mut __m256i, i: usize, n: usize) {
        if (i + 1).is_multiple_of(const { sums_in_16_bits::<F>() }) || i + 1 == n {
            // SAFETY: as above.
            unsafe {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*narrow, _mm256_set1_epi16(1)));
                *narrow = _mm256_setzero_si256();
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_mins(sum: __m256i, w: *const u8, a: __m256i) -> __m256i {
        // SAFETY: sixteen readable bytes by contract.
        unsafe {
            let w = _mm256_cvtepu8_epi16(_mm_loadu_si128(w.cast()));
            _mm256_add_epi32(sum, _mm256_madd_epi16(w, a))
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn to_float(a: __m256i) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(a) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m256 {
        // SAFETY: eight readable bytes by contract.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m256 {
        // SAFETY: sixteen readable bytes by contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> __m256 {
        // SAFETY: sixteen readable bytes by contract.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> __m256 {
        // SAFETY: 32 readable bytes by contract.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(a: __m256, to: *mut f32) {
        // SAFETY: eight writable floats by contract.
        unsafe { _mm256_storeu_ps(to, a) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: FMA by contract.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: FMA by contract.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn prefetch(at: *const u8) {
        // SAFETY: a hint, without effect on memory and without faults whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Hands a function of [`Isa`] on to [`Plain`].
macro_rules! as_plain {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the same contract.
                unsafe { Plain::$name($($arg),*) }
            }
        )*
    };
}

impl Isa for Vnni {
    type Int = __m256i;
    type Float = __m256;
    const LANES: usize = 8;
    const DOT_TAKES_ALL: bool = true;

    as_plain! {
        zero() -> __m256i;
        load(from: *const u8) -> __m256i;
        splat_8(byte: u8) -> __m256i;
        splat_32(from: *const u32) -> __m256i;
        and(a: __m256i, b: __m256i) -> __m256i;
        or(a: __m256i, b: __m256i) -> __m256i;
        shift(a: __m256i, left: i32) -> __m256i;
        look_up(table: &[u8; 16], a: __m256i) -> __m256i;
        splat(x: f32) -> __m256;
        to_float(a: __m256i) -> __m256;
        load_i8(from: *const u8) -> __m256;
        load_f16(from: *const u8) -> __m256;
        load_bf16(from: *const u8) -> __m256;
        load_f32(from: *const u8) -> __m256;
        store(a: __m256, to: *mut f32);
        mul(a: __m256, b: __m256) -> __m256;
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256;
        neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256;
    }

    #[inline(always)]
    unsafe fn dot<F: IntFormat>(sum: &mut __m256i, _: &mut __m256i, w: __m256i, a: __m256i) {
        // SAFETY: AVX-VNNI by contract.
        unsafe { *sum = _mm256_dpbusd_avx_epi32(*sum, w, a) }
    }

    #[inline(always)]
    unsafe fn settle<F: IntFormat>(_: &mut __m256i, _: &mut __m256i, _: usize, _: usize) {}

    #[inline(always)]
    unsafe fn dot_mins(sum: __m256i, w: *const u8, a: __m256i) -> __m256i {
        // SAFETY: sixteen readable bytes by contract.
        unsafe { _mm256_dpwssd_avx_epi32(sum, _mm256_cvtepu8_epi16(_mm_loadu_si128(w.cast())), a) }
    }

    #[inline(always)]
    fn prefetch(at: *const u8) {
        Plain::prefetch(at);
    }
}
