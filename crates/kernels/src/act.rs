//! Activation functions and the gates made of them, element by element, in f32.
//!
//! A row of a feed-forward layer has thousands of exponentials, and a verified draft has many rows, so [`exp`] is our
//! own: no branch and no table, so that a loop over it runs in vectors, and plain multiplications and additions, so that
//! every instruction set gives the same bits. One value for one input, whatever the position in a row.

/// `e^x` to 2 units in the last place. It stays at `e^-87` below that, which no gate can tell from zero, and is infinite
/// from 88.4 on, a little early; NaN stays NaN.
///
/// `x = n ln 2 + r` with |r| ≤ ln 2 / 2; `e^r` by its series, `2^n` by its exponent bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 · 2^23 rounds to an integer, and leaves it in the low bits on the way.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first short enough that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons rather than `clamp`: they let NaN through.
    let x = if x < -87.0 { -87.0 } else { x };
    // The exponent bits of 2^128 are those of infinity.
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let series = 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = series * r * r + r + 1.0;
    // The low bits of `shifted` are n; moved up they are what n adds to an exponent.
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    series * power
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x · sigmoid(x)`, also called swish.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `ln(1 + exp(x))`; above 20 it is `x` in f32, and `exp` would overflow at last.
pub fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// The tanh form of GELU: `0.5 x (1 + tanh(u))` with `u = √(2/π) (x + 0.044715 x³)`.
///
/// `0.5 (1 + tanh(u))` is `sigmoid(2 u)`, which loses nothing where tanh comes near -1.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    /// `2 √(2/π)`, and 0.044715 times that.
    const LINEAR: f32 = 1.595_769;
    const CUBIC: f32 = 0.071_354_81;
    x / (1.0 + exp(-(x * (CUBIC * (x * x) + LINEAR))))
}

/// The hyperbolic tangent to 2 units in the last place; it runs in vectors, as [`exp`] does. NaN stays NaN.
///
/// Near 0 a polynomial (the coefficients of `tanhf` in the Cephes library), elsewhere `1 - 2 / (e^2|x| + 1)`.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let (size, square) = (x.abs(), x * x);
    let series = -5.704_988_7e-3 * square + 2.063_909e-2;
    let series = series * square - 5.373_971_6e-2;
    let series = series * square + 1.333_144_2e-1;
    let series = series * square - 3.333_328e-1;
    let near = series * square * x + x;
    let far = (1.0 - 2.0 / (exp(size + size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
}

/// `cap · tanh(x / cap)`: nearly `x` where it is small, never beyond `±cap`.
#[inline(always)]
pub fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// `out[i] = silu(gate[i]) · up[i]`, the gate of a SwiGLU feed-forward.
#[inline(always)]
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated(gate, up, out, silu);
}

/// `out[i] = gelu(gate[i]) · up[i]`, the gate of a GeGLU feed-forward.
#[inline(always)]
pub fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated(gate, up, out, gelu);
}

/// `out[i] = sigmoid(gate[i]) · x[i]`, an attention's output gate.
#[inline(always)]
pub fn sigmoid_mul(gate: &[f32], x: &[f32], out: &mut [f32]) {
    gated(gate, x, out, sigmoid);
}

/// `out[i] = softcap(x[i])`.
#[inline(always)]
pub fn softcap_row(x: &[f32], cap: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a row and its result");
    out.iter_mut().zip(x).for_each(|(out, x)| *out = softcap(*x, cap));
}

/// `out = factor · x`.
#[inline(always)]
pub fn scale(x: &[f32], factor: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a row and its result");
    out.iter_mut().zip(x).for_each(|(out, x)| *out = factor * x);
}

/// `out = a + b`.
#[inline(always)]
pub fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert_eq!((a.len(), b.len()), (out.len(), out.len()), "terms and their sum");
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        *out = a + b;
    }
}

#[inline(always)]
fn gated(gate: &[f32], x: &[f32], out: &mut [f32], act: impl Fn(f32) -> f32) {
    assert_eq!(gate.len(), x.len(), "a gate and what it gates");
    assert_eq!(gate.len(), out.len(), "a gate and its output");
    for ((gate, x), out) in gate.iter().zip(x).zip(out) {
        *out = act(*gate) * x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        // Every 1000th float of the range, both signs.
        for bits in (0..88.0f32.to_bits()).step_by(1000) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let want = f64::from(x.max(-87.0)).exp();
                let error = (f64::from(exp(x)) / want - 1.0).abs();
                assert!(error < 2.4e-7, "exp({x}) is off by {error:e}");
            }
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e30), exp(-87.0));
        assert_eq!([exp(89.0), exp(f32::INFINITY)], [f32::INFINITY; 2]);
        assert!(exp(f32::NAN).is_nan() && silu(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
    }

    /// Units in the last place between `got` and the exact value, where that is no smaller than 1e-30.
    fn ulps(got: f32, want: f64) -> f64 {
        let unit = f64::from(f32::EPSILON) * 2f64.powi(want.abs().log2().floor() as i32);
        (f64::from(got) - want).abs() / unit
    }

    #[test]
    fn tanh_and_gelu_are_close_everywhere() {
        let (mut worst_tanh, mut worst_gelu) = (0f64, 0f64);
        for bits in (1e-20f32.to_bits()..90f32.to_bits()).step_by(300) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                worst_tanh = worst_tanh.max(ulps(tanh(x), f64::from(x).tanh()));
                let wide = f64::from(x);
                let u = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
                let want = wide / (1.0 + (-2.0 * u).exp());
                if x > -3.0 {
                    // What a rounding of the exponent moves grows with it.
                    worst_gelu = worst_gelu.max(ulps(gelu(x), want) / (1.0 + u.min(0.0).abs()));
                } else {
                    assert!((f64::from(gelu(x)) - want).abs() < 1e-8, "gelu({x})");
                }
            }
        }
        assert!(worst_tanh < 2.5, "tanh is off by {worst_tanh} ulp");
        assert!(worst_gelu < 5.0, "gelu is off by {worst_gelu} ulp");
        assert_eq!([tanh(1e30), tanh(-1e30), tanh(0.0)], [1.0, -1.0, 0.0]);
        assert!(tanh(f32::NAN).is_nan() && gelu(f32::NAN).is_nan() && softcap(f32::NAN, 3.0).is_nan());
    }

    /// `f` against its f64 reference at `xs`, to a few roundings of the result.
    fn check(f: impl Fn(f32) -> f32, reference: impl Fn(f64) -> f64, xs: &[f32]) {
        for &x in xs {
            let (got, want) = (f64::from(f(x)), reference(f64::from(x)));
            assert!((got - want).abs() <= 2e-6 * want.abs().max(0.1), "f({x}): {got} != {want}");
        }
    }

    const XS: &[f32] = &[-30.0, -5.0, -1.0, -0.1, 0.0, 1e-3, 0.5, 1.0, 3.0, 19.9, 20.1, 80.0];

    #[test]
    fn values() {
        check(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), XS);
        check(silu, |x| x / (1.0 + (-x).exp()), XS);
        check(softplus, |x| x.exp().ln_1p(), XS);
        check(
            gelu,
            |x| {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            },
            XS,
        );
        check(|x| softcap(x, 30.0), |x| 30.0 * (x / 30.0).tanh(), XS);
    }

    #[test]
    fn far_ends_are_finite() {
        for x in [-1e30f32, -1e4, 1e4, 1e30] {
            let top = x.max(0.0);
            assert_eq!([silu(x), softplus(x), gelu(x)], [top, top, top].map(|v| v + 0.0), "x = {x}");
            assert_eq!(softcap(x, 50.0).abs(), 50.0);
        }
        assert_eq!(softplus(f32::MAX), f32::MAX);
    }

    #[test]
    fn gates() {
        let mut out = [0.0; 2];
        silu_mul(&[0.0, 2.0], &[5.0, 3.0], &mut out);
        assert_eq!(out, [0.0, silu(2.0) * 3.0]);
        gelu_mul(&[0.0, 2.0], &[5.0, 3.0], &mut out);
        assert_eq!(out, [0.0, gelu(2.0) * 3.0]);
        sigmoid_mul(&[0.0, 2.0], &[5.0, 3.0], &mut out);
        assert_eq!(out, [2.5, sigmoid(2.0) * 3.0]);
        let x = out;
        softcap_row(&x, 2.0, &mut out);
        assert_eq!(out, x.map(|x| softcap(x, 2.0)));
        scale(&x, 0.5, &mut out);
        assert_eq!(out, [1.25, sigmoid(2.0) * 1.5]);
    }
}
