//! What holds for every format: golden blocks, error bounds, and behaviour at the edges.

use paceline_gguf::GgmlType::{self, *};

use super::*;

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

#[test]
fn measure() {
    for format in FORMATS {
        let x: Vec<f32> = gaussian(256 * 400, 7).iter().map(|x| x * 0.03).collect();
        let t = std::time::Instant::now();
        let data = quantize_rows(format.ty, x.len(), &x);
        let tq = t.elapsed();
        let mut out = vec![0.0; x.len()];
        let t = std::time::Instant::now();
        for _ in 0..20 {
            (format.dequantize)(&data, &mut out);
        }
        let td = t.elapsed();
        let again = round_trip(format.ty, &out);
        let moved = out.iter().zip(&again).filter(|(a, b)| a != b).count();
        println!(
            "{:8} rms {:.5} quantise {:.1} ns/value dequantise {:.3} ns/value again {:.6} moved {}",
            format.ty.name(),
            relative_rms(&x, &out),
            tq.as_nanos() as f64 / x.len() as f64,
            td.as_nanos() as f64 / 20. / x.len() as f64,
            relative_rms(&out, &again),
            moved
        );
    }
}

/// Bytes `(73·i + 41) & 255` with the scale (and offset) overwritten, and what they mean: the sum of all values, and those
/// at 0, 1, 15, 16, half of the block, and the end.
const GOLDEN: &[(GgmlType, &[(usize, u16)], f64, [f32; 6])] = &[
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
            assert!(close(f64::from(got[at]), f64::from(*want)), "{name} value {at}: {} != {want}", got[at]);
        }
        let got: f64 = got.iter().map(|x| f64::from(*x)).sum();
        assert!(close(got, *sum), "{name} sum: {got} != {sum}");
    }
}
