//! The short convolution in front of a recurrence: depthwise, causal, a few tokens wide.
//!
//! ```text
//! out[ch] = silu( Σ_j w[ch][j] · u_(t - width + 1 + j)[ch] )       tap width-1 is the current token
//! ```
//!
//! The inputs come as one slice for each tap, oldest first, so that committed rows, tentative rows
//! and (in a tree) the row's own ancestors mix freely; before the start of a sequence they are
//! zeros. Weights are `[channels, width]`, tap fastest, as GGUF stores them. The sum runs from the
//! oldest tap to the current one.

use crate::act::silu;

/// One row's output for the channels that the slices cover: `taps` is `width` rows of
/// `[channels]`, `weights` is `[channels, width]`, `out` is `[channels]`.
#[inline(always)]
pub fn short_conv_silu(taps: &[&[f32]], weights: &[f32], out: &mut [f32]) {
    let width = taps.len();
    assert_eq!(weights.len(), out.len() * width, "conv weights [{}, {width}]", out.len());
    for (j, tap) in taps.iter().enumerate() {
        assert_eq!(tap.len(), out.len(), "channels of tap {j}");
    }
    match taps {
        // The width of every model so far, with the loop over taps unrolled.
        [a, b, c, d] => {
            let (weights, _) = weights.as_chunks::<4>();
            // Slices of one length, so that no index is checked in the loop and it runs in vectors.
            let n = out.len();
            let (a, b, c, d, weights) = (&a[..n], &b[..n], &c[..n], &d[..n], &weights[..n]);
            for ch in 0..n {
                let w = weights[ch];
                out[ch] = silu(w[0] * a[ch] + w[1] * b[ch] + w[2] * c[ch] + w[3] * d[ch]);
            }
        }
        _ => {
            for (ch, (out, w)) in out.iter_mut().zip(weights.chunks_exact(width)).enumerate() {
                let products = w.iter().zip(taps).map(|(w, tap)| w * tap[ch]);
                *out = silu(products.reduce(|sum, product| sum + product).unwrap_or(0.0));
            }
        }
    }
}

/// A convolution in the block of a drafter ("DFlash2"): one row's output `[channels]` from its own input and those of the
/// rows before it, newest first, of which there are at most `n_tap`; those that are missing are zeros.
///
/// ```text
/// out[ch] = Σ_t (base[t][ch] + delta[t][ch / group]) · u_(i - t)[ch]         from t = 0 on
/// ```
///
/// `base` is `[n_tap, channels]`; `delta`, the row's own, is `[n_tap, n_group]`, each group as many channels side by side.
pub fn local_conv<'a>(
    past: impl Iterator<Item = &'a [f32]>,
    base: &[f32],
    delta: &[f32],
    n_tap: usize,
    out: &mut [f32],
) {
    let n_group = delta.len() / n_tap;
    assert_eq!(base.len(), n_tap * out.len(), "base kernels [{n_tap}, {}]", out.len());
    assert!(n_group > 0 && out.len().is_multiple_of(n_group), "{} channels in {n_group} groups", out.len());
    let group = out.len() / n_group;
    out.fill(0.0);
    let taps = base.chunks_exact(out.len()).zip(delta.chunks_exact(n_group));
    for ((base, delta), u) in taps.zip(past) {
        let groups = base.chunks_exact(group).zip(u.chunks_exact(group)).zip(delta);
        for (out, ((base, u), delta)) in out.chunks_exact_mut(group).zip(groups) {
            for ((out, base), u) in out.iter_mut().zip(base).zip(u) {
                *out += (base + delta) * u;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(taps: &[&[f32]], weights: &[f32], expected: &[f32]) {
        let mut out = vec![f32::NAN; expected.len()];
        short_conv_silu(taps, weights, &mut out);
        assert_eq!(out, expected);
    }

    #[test]
    fn each_channel_has_its_own_taps_oldest_first() {
        check(&[&[1.0, 2.0], &[3.0, 4.0]], &[10.0, 1.0, 0.0, -1.0], &[silu(13.0), silu(-4.0)]);
    }

    #[test]
    fn width_four() {
        let taps: [&[f32]; 4] = [&[1.0, 0.5], &[2.0, 0.5], &[4.0, 0.5], &[8.0, 0.5]];
        let weights = [1.0, -1.0, 0.5, 0.25, 2.0, 2.0, 2.0, 2.0];
        check(&taps, &weights, &[silu(3.0), silu(4.0)]);
    }

    #[test]
    fn local_kernels_are_common_ones_and_a_groups_own() {
        let rows: [&[f32]; 3] = [&[1.0, 2.0, 3.0, 4.0], &[10.0, 20.0, 30.0, 40.0], &[f32::NAN; 4]];
        let base = [1.0, 2.0, 3.0, 4.0, 0.5, 0.25, -1.0, 0.0];
        let delta = [0.0, -1.0, 1.0, 2.0];
        let check = |n: usize, expected: [f32; 4]| {
            let mut out = [f32::NAN; 4];
            local_conv(rows.into_iter().take(n), &base, &delta, 2, &mut out);
            assert_eq!(out, expected);
        };
        let own = [1.0, 4.0, 3.0 * (3.0 - 1.0), 4.0 * (4.0 - 1.0)];
        check(1, own);
        // What lies further back than there are taps is not looked at.
        for n in [2, 3] {
            check(n, [own[0] + 1.5 * 10.0, own[1] + 1.25 * 20.0, own[2] + 30.0, own[3] + 2.0 * 40.0]);
        }
    }

    #[test]
    fn nothing_before_the_start() {
        check(&[&[0.0], &[0.0], &[0.0], &[3.0]], &[9.0, 9.0, 9.0, 0.5], &[silu(1.5)]);
    }

    #[test]
    fn width_four_sums_like_any_other() {
        let row = |seed: f32| (0..37).map(|i| (seed + i as f32 * 1.7).sin()).collect::<Vec<_>>();
        let rows: Vec<_> = [0.1, 0.2, 0.3, 0.4, 0.5].into_iter().map(row).collect();
        let four: Vec<&[f32]> = rows[1..].iter().map(Vec::as_slice).collect();
        let five: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let w4: Vec<f32> = (0..37 * 4).map(|i| (i as f32).cos()).collect();
        // The same weights behind an oldest tap of zero; 0·x + y is y.
        let w5: Vec<f32> = w4.chunks(4).flat_map(|w| std::iter::once(&0.0).chain(w)).copied().collect();
        let (mut out4, mut out5) = (vec![0.0; 37], vec![0.0; 37]);
        short_conv_silu(&four, &w4, &mut out4);
        short_conv_silu(&five, &w5, &mut out5);
        assert_eq!(out4, out5);
    }
}
