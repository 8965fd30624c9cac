//! `ln Σ exp(logit)` over a vocabulary: what turns a logit into a log-probability.
//!
//! Only reported numbers come from here (logprobs and a proposal's `q`), never a choice, but a greedy drafter
//! needs one per drafted row, and 10^5 library exponentials cost more than all the rest of sampling. So the
//! exponential is written out in operations that vectorise: with `y = x · log2 e = n + f`, `n` an integer and
//! `|f| <= 1/2`, `exp(x) = 2^n · 2^f`; `2^f` is its Taylor polynomial of degree 6 (relative error below 2e-7) and
//! `2^n` an addition to the exponent's bits.

/// Lanes of one vector loop, and the rows of them that f32 sums before f64 takes over.
const LANES: usize = 8;
const ROWS: usize = 32;

/// Below this under the maximum a term adds nothing, even times a vocabulary. Bans end up here too.
const NEGLIGIBLE: f32 = -40.0;

/// `ln Σ exp(logit)`, where `max` is the largest logit and finite.
pub(crate) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut sum = 0.0;
    for block in logits.chunks(LANES * ROWS) {
        let mut lanes = [0.0f32; LANES];
        let rows = block.chunks_exact(LANES);
        let tail: f32 = rows.remainder().iter().map(|&logit| exp(logit - max)).sum();
        for row in rows {
            for (lane, &logit) in lanes.iter_mut().zip(row) {
                *lane += exp(logit - max);
            }
        }
        sum += f64::from(lanes.iter().sum::<f32>() + tail);
    }
    f64::from(max) + sum.ln()
}

/// `e^x` for `x <= 0`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = if x < NEGLIGIBLE { NEGLIGIBLE } else { x };
    let y = x * std::f32::consts::LOG2_E;
    // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let rounded = y + ROUND;
    let f = y - (rounded - ROUND);
    // A loop over the coefficients would keep the caller's loop from being vectorised.
    let p = (1.540_353e-4 * f + 1.333_355_8e-3) * f + 9.618_129e-3;
    let p = ((p * f + 5.550_411e-2) * f + 0.240_226_5) * f + std::f32::consts::LN_2;
    let p = p * f + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_close() {
        for i in 0..=400_000 {
            let x = -40.0 + i as f32 * 1e-4;
            let x = x.min(0.0);
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) / exact - 1.0).abs();
            // x itself, scaled, is rounded: up to 2^-24 of |y|.
            assert!(error < 3e-7 + f64::from(x.abs()) * 1.2e-7, "exp({x}): {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-17);
    }

    fn check(logits: &[f32]) {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let exact = f64::from(max) + logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
        let found = log_sum_exp(logits, max);
        assert!((found - exact).abs() < 2e-6, "{} logits: {found} != {exact}", logits.len());
    }

    #[test]
    fn sums_of_any_length_are_close() {
        let row: Vec<f32> = (0..151_936u32).map(|t| 3.0 * crate::noise::gumbel(1, 2, t)).collect();
        for n in [1, 2, 15, 16, 17, 255, 256, 257, 1000, row.len()] {
            check(&row[..n]);
        }
        check(&vec![-7.0; 100_000]);
        check(&[f32::NEG_INFINITY, 5.0, f32::NEG_INFINITY]);
        check(&[f32::MAX, f32::MIN, 0.0]);
        check(&[f32::MIN; 3]);
    }
}
