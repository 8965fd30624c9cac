//! What holds for every format: golden blocks, error bounds, and behaviour at the edges.

use paceline_gguf::GgmlType::{self, *};

use std::cell::Cell;

use super::*;

thread_local! {
    /// Whether this thread's conversions do without the vectors that not every CPU has.
    pub static BASELINE_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// Rows of Gaussian values (Box and Muller) from a seed.
fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect()
}

fn dequantize(ty: GgmlType, data: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; data.len() / ty.block_bytes() * ty.block_len()];
    (format(ty).unwrap().dequantize)(data, &mut out);
    out
}

fn round_trip(ty: GgmlType, values: &[f32]) -> Vec<f32> {
    dequantize(ty, &quantize_rows(ty, values.len(), values))
}

fn relative_rms(want: &[f32], got: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = want.iter().zip(got).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = want.iter().map(|a| square(f64::from(*a))).sum();
    (error / norm).sqrt()
}

/// Bytes `(73·i + 41) & 255` with the scale (and offset) overwritten, and what they mean: the sum of all values, and those
/// at 0, 1, 15, 16, half of the block, and the end.
#[rustfmt::skip]
const GOLDEN: &[Golden] = &[
    (Q4_0, &[(0, D)], -3.299194, [0.299927, -0.399902, -0.599854, 0.299927, 0.299927, -0.799805]),
    (Q4_1, &[(0, D), (2, M)], 24.494507, [1.362183, 0.662354, 0.462402, 0.462402, 0.462402, 0.962280]),
    (Q5_0, &[(0, D)], -4.498901, [1.499634, 0.799805, -0.999756, 1.299683, 1.299683, 0.199951]),
    (Q5_1, &[(0, D), (2, M)], 52.087769, [1.762085, 1.062256, 2.461914, 2.361938, 2.361938, 1.162231]),
    (Q8_0, &[(0, D)], -4.798828, [-6.898315, 0.399902, 0.199951, 7.498169, 7.498169, -10.997314]),
    (IQ4_NL, &[(0, D)], -48.088257, [3.799072, -4.898804, -8.297974, 3.799072, 3.799072, -12.696899]),
    (MXFP4, &[(0, 0x727d)], 3.125, [0.25, -0.375, -0.125, 1.5, 1.5, -0.375]),
    (NVFP4, &[(0, 0x3830), (2, 0x4107)], 29.654297, [-1.5, 2.0, 1.0, 3.0, -0.041016, 2.25]),
    (Q2_K, &[(80, D), (82, M)], 184.030396, [0.774780, 1.674561, -0.125, -0.237549, -0.337524, -0.4375]),
    (Q3_K, &[(108, D)], 23.394287, [-0.699829, 1.399658, 2.799316, 0.199951, 2.399414, -2.399414]),
    (Q4_K, &[(0, D), (2, M)], 5247.012695, [8.634644, -0.463135, -3.0625, 8.634644, 17.332886, -1.4375]),
    (Q5_K, &[(0, D), (2, M)], 10917.627930, [29.429565, -0.463135, -3.0625, 29.429565, 50.924683, -1.4375]),
    (Q6_K, &[(208, D)], -1484.037598, [16.096069, -4.598877, 73.582031, -34.991455, -34.291626, 28.792969]),
    (IQ4_XS, &[(0, D)], -644.842529, [-301.526367, 72.482300, 2.899292, -28.992920, 176.756836, -74.981689]),
];
type Golden = (GgmlType, &'static [(usize, u16)], f64, [f64; 6]);
const D: u16 = 0x2e66; // 0.0999756
const M: u16 = 0x2c00; // 0.0625

#[test]
fn golden_blocks() {
    for (ty, overwrite, sum, elements) in GOLDEN {
        let name = ty.name();
        let mut block: Vec<u8> = (0..ty.block_bytes()).map(|i| (73 * i + 41) as u8).collect();
        for (at, value) in *overwrite {
            block[*at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        let got = dequantize(*ty, &block);
        let close = |got: f64, want: f64| (got - want).abs() <= 1e-4 * want.abs();
        let n = got.len();
        for (at, want) in [0, 1, 15, 16, n / 2, n - 1].into_iter().zip(elements) {
            assert!(close(f64::from(got[at]), *want), "{name} value {at}: {} != {want}", got[at]);
        }
        let got: f64 = got.iter().map(|x| f64::from(*x)).sum();
        assert!(close(got, *sum), "{name} sum: {got} != {sum}");
    }
}

/// Relative RMS error of Gaussian rows, and what quantising a second time may add. The bounds leave little above what
/// the searches reach: a few percent of the first; the second is 0 where a block has no scale of scales.
const BOUNDS: &[(GgmlType, f64, f64)] = &[
    (F32, 0.0, 0.0),
    (F16, 0.00022, 0.0),
    (BF16, 0.0018, 0.0),
    (Q8_0, 0.0055, 0.0),
    (Q6_K, 0.0175, 0.002),
    (Q5_K, 0.0355, 0.004),
    (Q5_1, 0.0345, 0.0),
    (Q5_0, 0.0415, 0.0),
    (Q4_K, 0.072, 0.002),
    (Q4_1, 0.0715, 0.0),
    (Q4_0, 0.0835, 0.0),
    (IQ4_NL, 0.076, 0.0),
    (IQ4_XS, 0.0765, 0.0005),
    (MXFP4, 0.113, 0.0),
    (NVFP4, 0.084, 0.0),
    (Q3_K, 0.149, 0.001),
    (Q2_K, 0.276, 0.005),
];

#[test]
fn errors_stay_within_their_bounds() {
    assert_eq!(BOUNDS.len(), FORMATS.len());
    for (ty, first, second) in BOUNDS {
        for (seed, scale) in [(1, 0.25), (2, 1.0), (3, 100.0)] {
            let x: Vec<f32> = gaussian(256 * 60, seed).iter().map(|x| x * scale).collect();
            let once = round_trip(*ty, &x);
            let twice = round_trip(*ty, &once);
            let (error, again) = (relative_rms(&x, &once), relative_rms(&once, &twice));
            assert!(error <= *first, "{ty}: {error} > {first}");
            assert!(again <= *second, "{ty}, second time: {again} > {second}");
        }
    }
}

/// Relative RMS errors of llama.cpp's reference quantisers (version of `llama-cpp-sys-2` 0.1.161, compiled by itself) on
/// the values of the test below: plain; and weighted, when it is told the weights. Q4_1 and the other offset formats of 32
/// it fits only with weights.
const LLAMA: &[(GgmlType, f64, f64)] = &[
    (Q8_0, 0.00538, 0.00536),
    (Q6_K, 0.01777, 0.01498),
    (Q5_K, 0.03621, 0.02992),
    (Q5_1, 0.03797, 0.02740),
    (Q5_0, 0.04281, 0.03598),
    (Q4_K, 0.07154, 0.05757),
    (Q4_1, 0.07843, 0.05645),
    (Q4_0, 0.08621, 0.07263),
    (IQ4_NL, 0.07638, 0.06467),
    (IQ4_XS, 0.07699, 0.06554),
    (MXFP4, 0.11495, 0.11537),
    (NVFP4, 0.09505, 0.09558),
    (Q3_K, 0.15104, 0.12345),
    (Q2_K, 0.29721, 0.20493),
];

/// Columns whose importance differs by a factor of some thousand, as real ones do: log-normal.
fn importances(n: usize) -> Vec<f32> {
    gaussian(n, 9).iter().map(|x| (1.5 * x).exp()).collect()
}

fn weighted_rms(want: &[f32], got: &[f32], w: &[f32]) -> f64 {
    let scale =
        |x: &[f32]| -> Vec<f32> { x.iter().zip(w.iter().cycle()).map(|(x, w)| x * w.sqrt()).collect() };
    relative_rms(&scale(want), &scale(got))
}

#[test]
fn importance_lowers_the_weighted_error() {
    let (x, w) = (gaussian(256 * 128, 2), importances(1024));
    for format in FORMATS.iter().filter(|format| format.ty.is_quantized()) {
        let ty = format.ty;
        let plain = round_trip(ty, &x);
        let told = dequantize(ty, &quantize_rows_weighted(ty, &w, &x));
        let (before, after) = (weighted_rms(&x, &plain, &w), weighted_rms(&x, &told, &w));
        // Q8_0 takes no advice, MXFP4 chooses among three powers of two.
        let gain = match ty {
            Q8_0 => 1.0,
            MXFP4 => 0.99,
            NVFP4 => 0.95,
            _ => 0.85,
        };
        assert!(after <= before * gain, "{ty}: {after} with importances, {before} without");
        assert!(relative_rms(&x, &told) <= 1.25 * relative_rms(&x, &plain), "{ty}: the rest suffers");
    }
}

#[test]
fn no_format_is_worse_than_llama_cpps() {
    let (x, w) = (gaussian(256 * 1024, 2), importances(1024));
    for (ty, plain, weighted) in LLAMA {
        let ours = relative_rms(&x, &round_trip(*ty, &x));
        assert!(ours <= plain * 1.01, "{ty}: {ours}, llama.cpp {plain}");
        let told = dequantize(*ty, &quantize_rows_weighted(*ty, &w, &x));
        let ours = weighted_rms(&x, &told, &w);
        assert!(ours <= weighted * 1.005, "{ty} with importances: {ours}, llama.cpp {weighted}");
    }
}

/// Equal importances say nothing, whatever their size; zeros in all of a block neither.
#[test]
fn importances_without_a_message() {
    let x = gaussian(512, 7);
    for format in FORMATS {
        let ty = format.ty;
        let with = |w: f32| quantize_rows_weighted(ty, &[w; 512], &x);
        assert!(with(1.0) == with(1024.0), "{ty}: the size of importances counts");
        assert!(with(0.0) == quantize_rows(ty, 512, &x), "{ty}: zeros count");
        let mut one = vec![0.0; 512];
        one[3] = 1e30;
        let got = dequantize(ty, &quantize_rows_weighted(ty, &one, &x));
        assert!(got.iter().all(|y| y.is_finite()), "{ty}");
    }
}

/// Values on the grid of a type, every group with both of its ends and the widest scale there is, are kept exactly.
#[test]
fn representable_values_are_kept() {
    let check = |ty: GgmlType, levels: &[f32], scale: f32, offset: f32| {
        let n = levels.len();
        // Both ends at the start of every sixteen, then a walk through all levels.
        let level = |i: usize| match i % 16 {
            0 => levels[0],
            1 => levels[n - 1],
            _ => levels[i * 7 % n],
        };
        let x: Vec<f32> = (0..512).map(|i| level(i) * scale + offset).collect();
        assert_eq!(round_trip(ty, &x), x, "{ty}");
    };
    let integers = |lo: i32, hi: i32| (lo..=hi).map(|q| q as f32).collect::<Vec<_>>();
    let unit = 1.0 / 256.0;
    check(F32, &integers(-9, 9), 0.3, 0.1);
    check(F16, &integers(-1024, 1024), unit, 0.0);
    check(BF16, &integers(-128, 128), unit, 0.0);
    check(Q8_0, &integers(-127, 127), unit, 0.0);
    check(Q6_K, &integers(-32, 31), 128.0 * unit, 0.0);
    check(Q5_K, &integers(0, 31), 63.0 * unit, -63.0 * 8.0 * unit);
    check(Q5_1, &integers(0, 31), unit, -5.0 * unit);
    check(Q5_0, &integers(-16, 15), unit, 0.0);
    check(Q4_K, &integers(0, 15), 63.0 * unit, -63.0 * 4.0 * unit);
    check(Q4_1, &integers(0, 15), unit, 3.0 * unit);
    check(Q4_0, &integers(-8, 7), -unit, 0.0);
    check(IQ4_NL, &iq4_nl::LEVELS, unit, 0.0);
    check(IQ4_XS, &iq4_nl::LEVELS, 32.0 * unit, 0.0);
    check(
        MXFP4,
        &[-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
        unit,
        0.0,
    );
    check(
        NVFP4,
        &[-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
        unit,
        0.0,
    );
    check(Q3_K, &integers(-4, 3), 32.0 * unit, 0.0);
    check(Q2_K, &integers(0, 3), 15.0 * unit, -15.0 * 2.0 * unit);
}

#[test]
fn zeros_stay_zeros() {
    for format in FORMATS {
        assert_eq!(round_trip(format.ty, &[0.0; 512]), [0.0; 512], "{}", format.ty);
    }
}

#[test]
fn equal_values_stay_equal() {
    for format in FORMATS {
        let bound = match format.ty {
            MXFP4 => 0.08, // a power of two times a number of two bits
            NVFP4 => 0.04, // steps of an eighth
            _ => 0.005,
        };
        for x in [0.7, -0.7, 3.1, -100.0] {
            let got = round_trip(format.ty, &[x; 256]);
            assert!(got.iter().all(|y| y == &got[0]), "{} {x}", format.ty);
            assert!((got[0] - x).abs() <= bound * x.abs(), "{}: {x} became {}", format.ty, got[0]);
        }
    }
}

#[test]
fn one_sided_values_are_no_worse() {
    for (ty, bound, _) in BOUNDS {
        let positive: Vec<f32> = gaussian(256 * 20, 4).iter().map(|x| x.abs()).collect();
        let negative: Vec<f32> = positive.iter().map(|x| -x).collect();
        for x in [positive, negative] {
            let error = relative_rms(&x, &round_trip(*ty, &x));
            assert!(error <= bound * 1.03, "{ty}: {error} > {bound}");
        }
    }
}

/// Whatever comes in, what comes out is finite, has no sign that did not come in, and is not larger by much.
#[test]
fn extreme_values_stay_finite() {
    let gauss = gaussian(256, 5);
    let scaled = |scale: f32| gauss.iter().map(|x| x * scale).collect::<Vec<_>>();
    let with = |at: &[(usize, f32)]| {
        let mut x = gauss.clone();
        at.iter().for_each(|(i, value)| x[*i] = *value);
        x
    };
    let rows = [
        scaled(1e-40),
        scaled(1e-20),
        scaled(1e-7),
        scaled(1e6),
        scaled(1e20),
        vec![f32::MAX; 256],
        vec![f32::MIN; 256],
        vec![f32::MIN_POSITIVE; 256],
        with(&[(3, 1e30), (200, -1e30)]),
        with(&[(0, f32::NAN), (100, f32::NAN)]),
        with(&[(7, f32::INFINITY), (77, f32::NEG_INFINITY)]),
        vec![f32::NAN; 256],
    ];
    for format in FORMATS.iter().filter(|format| format.ty.is_quantized()) {
        for (row, x) in rows.iter().enumerate() {
            let got = round_trip(format.ty, x);
            let largest = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            for (x, y) in x.iter().zip(&got) {
                assert!(y.is_finite() && y.abs() <= largest * 1.5, "{} row {row}: {x} became {y}", format.ty);
            }
        }
        // Small, but well inside the range of the scales of all types.
        let small = scaled(0.01);
        let bound = if format.ty == NVFP4 {
            0.3
        } else {
            0.3f64.min(0.02 + 2.5 / f64::from(1u32 << bits(format.ty)))
        };
        let error = relative_rms(&small, &round_trip(format.ty, &small));
        assert!(error < bound, "{}: {error} > {bound}", format.ty);
    }
}

#[test]
fn nan_is_stored_as_zero_and_infinity_as_the_largest() {
    let row = |value: f32| {
        let mut x = gaussian(256, 8);
        x[5] = value;
        x[100] = -value;
        x
    };
    for ty in FORMATS.iter().map(|format| format.ty).filter(|ty| ty.is_quantized()) {
        assert_eq!(round_trip(ty, &row(f32::NAN)), round_trip(ty, &row(0.0)), "{ty}");
        let saturated = round_trip(ty, &row(f32::INFINITY));
        assert_eq!(saturated, round_trip(ty, &row(f32::MAX)), "{ty}");
        assert!(saturated[5] > 1000.0 && saturated[100] < -1000.0, "{ty}");
    }
}

/// Whole bits of a code.
fn bits(ty: GgmlType) -> u32 {
    ty.bits_per_weight() as u32
}

#[test]
fn wider_vectors_change_no_bit() {
    for format in FORMATS {
        let x = gaussian(256 * 4, 6);
        let (data, values) = (quantize_rows(format.ty, 256, &x), round_trip(format.ty, &x));
        let weighted = quantize_rows_weighted(format.ty, &importances(256), &x);
        BASELINE_ONLY.set(true);
        assert!(quantize_rows(format.ty, 256, &x) == data, "{}: other blocks", format.ty);
        assert_eq!(round_trip(format.ty, &x), values, "{}", format.ty);
        assert!(quantize_rows_weighted(format.ty, &importances(256), &x) == weighted, "{}", format.ty);
        BASELINE_ONLY.set(false);
    }
}

#[test]
#[should_panic(expected = "not whole q4_k blocks of 256")]
fn a_row_is_whole_blocks() {
    quantize_rows(Q4_K, 128, &[0.0; 256]);
}

#[test]
#[should_panic(expected = "1 blocks of 34 and a rest of 1")]
fn lengths_must_agree() {
    (format(Q8_0).unwrap().dequantize)(&[0; 35], &mut [0.0; 32]);
}
