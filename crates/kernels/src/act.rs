//! Activation functions and the gates made of them, element by element, in f32.
//!
//! `exp`, `tanh` and `ln_1p` are the standard library's: one value for one input, whatever the
//! position in a row.

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `x · sigmoid(x)`, also called swish.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
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
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated(gate, up, out, silu);
}

/// `out[i] = gelu(gate[i]) · up[i]`, the gate of a GeGLU feed-forward.
pub fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated(gate, up, out, gelu);
}

/// `out[i] = sigmoid(gate[i]) · x[i]`, an attention's output gate.
pub fn sigmoid_mul(gate: &[f32], x: &[f32], out: &mut [f32]) {
    gated(gate, x, out, sigmoid);
}

/// [`softcap`] of a whole row, in place.
pub fn softcap_row(row: &mut [f32], cap: f32) {
    row.iter_mut().for_each(|x| *x = softcap(*x, cap));
}

#[inline]
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
