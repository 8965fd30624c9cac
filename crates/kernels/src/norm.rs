//! Normalisation of one group: a row, or one head of it.
//!
//! ```text
//! rms_norm(x; w) = x / √(mean(x²) + eps) · w
//! l2_norm(x)     = x / √(Σ x² + eps)
//! gated_rms_norm = rms_norm(x; w) · silu(z)
//! ```
//!
//! All f32. The sum of squares runs over sixteen interleaved partial sums, which are then added
//! pairwise: an order that plain Rust gives on every instruction set, so these have no twins.

use crate::act::silu;

/// `out = rms_norm(x; w)`; without a weight the factor is one.
#[inline(always)]
pub fn rms_norm(x: &[f32], w: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    scale_by(x, rms_factor(x, eps), w, out);
}

/// `out = x · factor · w`, what is left of a norm once its factor is known.
#[inline(always)]
pub(crate) fn scale_by(x: &[f32], factor: f32, w: Option<&[f32]>, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a norm's input and output");
    match w {
        Some(w) => {
            assert_eq!(x.len(), w.len(), "a norm's input and weight");
            for ((x, w), out) in x.iter().zip(w).zip(out) {
                *out = x * factor * w;
            }
        }
        None => x.iter().zip(out).for_each(|(x, out)| *out = x * factor),
    }
}

/// `out = l2_norm(x)`: length one, or shorter where `eps` matters.
#[inline(always)]
pub fn l2_norm(x: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a norm's input and output");
    let factor = 1.0 / (sum_of_squares(x) + eps).sqrt();
    x.iter().zip(out).for_each(|(x, out)| *out = x * factor);
}

/// `out = rms_norm(x; w) · silu(z)`: the output norm of a gated recurrence.
#[inline(always)]
pub fn gated_rms_norm(x: &[f32], w: &[f32], z: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm(x, Some(w), eps, out);
    assert_eq!(x.len(), z.len(), "a norm's input and gate");
    out.iter_mut().zip(z).for_each(|(out, z)| *out *= silu(*z));
}

#[inline(always)]
pub(crate) fn rms_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks, tail) = x.as_chunks::<16>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(tail) {
        *sum += x * x;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn norm_f64(x: &[f32], divisor: f64, eps: f64) -> f64 {
        (x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / divisor + eps).sqrt()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn norms_match_f64(
            xwz in prop::collection::vec((-9.0f32..9.0, -2.0f32..2.0, -4.0f32..4.0), 1..300)
        ) {
            let x: Vec<f32> = xwz.iter().map(|t| t.0).collect();
            let w: Vec<f32> = xwz.iter().map(|t| t.1).collect();
            let z: Vec<f32> = xwz.iter().map(|t| t.2).collect();
            let n = x.len();
            let (mut plain, mut weighted, mut gated, mut l2) =
                (vec![0.0; n], vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            rms_norm(&x, None, 1e-6, &mut plain);
            rms_norm(&x, Some(&w), 1e-6, &mut weighted);
            gated_rms_norm(&x, &w, &z, 1e-6, &mut gated);
            l2_norm(&x, 1e-6, &mut l2);
            let rms = norm_f64(&x, n as f64, 1e-6);
            let length = norm_f64(&x, 1.0, 1e-6);
            let close = |got: f32, want: f64| (f64::from(got) - want).abs() <= 4e-6 * want.abs();
            for i in 0..n {
                let (xi, wi) = (f64::from(x[i]), f64::from(w[i]));
                prop_assert!(close(plain[i], xi / rms));
                prop_assert!(close(weighted[i], xi / rms * wi));
                prop_assert!(close(gated[i], xi / rms * wi * f64::from(silu(z[i]))));
                prop_assert!(close(l2[i], xi / length));
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut out = [1.0; 5];
        rms_norm(&[0.0; 5], None, 1e-6, &mut out);
        assert_eq!(out, [0.0; 5]);
        out = [1.0; 5];
        l2_norm(&[0.0; 5], 1e-6, &mut out);
        assert_eq!(out, [0.0; 5]);
    }
}
