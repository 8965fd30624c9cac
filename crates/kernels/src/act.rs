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

/// The tanh form of GELU: `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
pub fn gelu(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)).tanh())
}

/// `cap · tanh(x / cap)`: nearly `x` where it is small, never beyond `±cap`.
pub fn softcap(x: f32, cap: f32) -> f32 {
    cap * (x / cap).tanh()
}

/// `out[i] = silu(gate[i]) · up[i]`, the gate of a SwiGLU feed-forward.
#[inline(always)]
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated(gate, up, out, silu);
}

/// `out[i] = gelu(gate[i]) · up[i]`, the gate of a GeGLU feed-forward.
pub fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated(gate, up, out, gelu);
}

/// `out[i] = sigmoid(gate[i]) · x[i]`, an attention's output gate.
#[inline(always)]
pub fn sigmoid_mul(gate: &[f32], x: &[f32], out: &mut [f32]) {
    gated(gate, x, out, sigmoid);
}

/// `out = a + b`.
#[inline(always)]
pub fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert_eq!((a.len(), b.len()), (out.len(), out.len()), "terms and their sum");
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        *out = a + b;
    }
}

/// [`softcap`] of a whole row, in place.
pub fn softcap_row(row: &mut [f32], cap: f32) {
    row.iter_mut().for_each(|x| *x = softcap(*x, cap));
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
        softcap_row(&mut out, 2.0);
        assert_eq!(out, [softcap(2.5, 2.0), softcap(sigmoid(2.0) * 3.0, 2.0)]);
    }
}
