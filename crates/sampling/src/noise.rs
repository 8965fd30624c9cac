//! Counter-based Gumbel noise: a pure function of (seed, position, token).
//!
//! There is no generator to advance, copy or roll back. The three counters go through a 64-bit mixer (the
//! finaliser of SplitMix64: Steele, Lea and Flood, 2014) twice, the second time under a second key, and the top
//! 52 bits become a uniform `u = (n + 1/2) / 2^52`, which is never 0 and never 1; so `G = -ln(-ln u)` is always
//! finite, within -3.6 and 36.8. Mean γ ≈ 0.5772, variance π²/6.
//!
//! Streams at and above 2^32 are no token's, so what needs other randomness at a position (XTC's coin) takes one
//! of those and stays independent of the noise. One stream used twice would bias the text.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The stream of XTC's coin: above every token id.
pub(crate) const XTC_STREAM: u64 = 1 << 32;

/// SplitMix64's finaliser: a bijection in which every input bit moves every output bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Standard Gumbel noise of one token at one position under one seed.
pub fn gumbel(seed: u64, position: u64, token: u32) -> f32 {
    PositionNoise::new(seed, position).gumbel(token)
}

/// The noise of one position, its part of the mixing done once for all tokens.
#[derive(Debug, Clone, Copy)]
pub struct PositionNoise {
    start: u64,
    key: u64,
}

impl PositionNoise {
    /// The noise of `position` in a request with `seed`.
    pub fn new(seed: u64, position: u64) -> Self {
        let start = mix(mix(seed.wrapping_add(GOLDEN)).wrapping_add(position.wrapping_mul(GOLDEN)));
        Self { start, key: mix(start ^ 0x5bd1_e995_7b93_c6a1) }
    }

    /// Standard Gumbel noise of `token`: equal to [`gumbel`].
    pub fn gumbel(&self, token: u32) -> f32 {
        gumbel_of(self.bits(u64::from(token)))
    }

    /// Uniform in (0, 1), open at both ends.
    pub(crate) fn uniform(&self, stream: u64) -> f64 {
        uniform_of(self.bits(stream))
    }

    pub(crate) fn bits(&self, stream: u64) -> u64 {
        mix(mix(self.start.wrapping_add(stream.wrapping_mul(GOLDEN))) ^ self.key)
    }
}

fn uniform_of(bits: u64) -> f64 {
    ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64
}

/// The noise that these bits stand for.
pub(crate) fn gumbel_of(bits: u64) -> f32 {
    // In f64: with f32's u, noise above 16.6 could never happen and the far tail would be lost.
    (-(-uniform_of(bits).ln()).ln()) as f32
}

/// At least [`gumbel_of`], for the price of a bit count: `-ln u ≥ 1-u`, and `1-u ≥ 2^-(zeros+1)`.
pub(crate) fn gumbel_bound(bits: u64) -> f64 {
    let zeros = (!bits).leading_zeros().min(52);
    f64::from(zeros + 1) * std::f64::consts::LN_2 + 1e-4 // the last for gumbel_of's rounding
}

#[cfg(test)]
mod tests {
    use super::*;

    const EULER_GAMMA: f64 = 0.577_215_664_901_532_9;
    const VARIANCE: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;

    /// Mean, variance, and correlation with a second sequence.
    fn moments(pairs: impl Iterator<Item = (f32, f32)>) -> (f64, f64, f64) {
        let (mut n, mut a, mut b, mut aa, mut bb, mut ab) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, y) in pairs.map(|(x, y)| (f64::from(x), f64::from(y))) {
            n += 1.0;
            a += x;
            b += y;
            aa += x * x;
            bb += y * y;
            ab += x * y;
        }
        let (a, b) = (a / n, b / n);
        let (va, vb) = (aa / n - a * a, bb / n - b * b);
        (a, va, (ab / n - a * b) / (va * vb).sqrt())
    }

    /// `next` is the counter that moves: the noise must look fresh at its neighbour.
    fn check(name: &str, noise: impl Fn(u64) -> f32) {
        let n = 400_000u64;
        for lag in [1, 2, 64] {
            let (mean, variance, correlation) = moments((0..n).map(|i| (noise(i), noise(i + lag))));
            // Six standard errors; the variance's own is sqrt((kurtosis - 1) / n) of it, kurtosis 5.4.
            let error = 6.0 / (n as f64).sqrt();
            assert!((mean - EULER_GAMMA).abs() < error * VARIANCE.sqrt(), "{name}: mean {mean}");
            assert!((variance / VARIANCE - 1.0).abs() < error * 2.1, "{name}: variance {variance}");
            assert!(correlation.abs() < error, "{name}, lag {lag}: correlation {correlation}");
        }
    }

    #[test]
    fn looks_independent_along_every_counter() {
        check("tokens", |i| gumbel(1, 17, i as u32));
        check("positions", |i| gumbel(1, i, 42));
        check("seeds", |i| gumbel(i, 17, 42));
        check("high seeds", |i| gumbel(i << 40, 17, 42));
        check("diagonal", |i| gumbel(3, i, i as u32));
        check("seed + position constant", |i| gumbel(1 << 30 | i, (1 << 30) - i, 5));
    }

    #[test]
    fn follows_the_gumbel_distribution() {
        // 64 bins of equal probability: exp(-exp(-g)) is uniform.
        let (n, n_bin) = (640_000u32, 64);
        let mut bins = vec![0u32; n_bin];
        for i in 0..n {
            let g = f64::from(gumbel(99, u64::from(i / 1000), i % 1000));
            bins[((-(-g).exp()).exp() * n_bin as f64) as usize] += 1;
        }
        let expected = f64::from(n) / n_bin as f64;
        let chi2: f64 = bins.iter().map(|&b| (f64::from(b) - expected).powi(2) / expected).sum();
        assert!((25.0..125.0).contains(&chi2), "chi-square with 63 degrees of freedom: {chi2}");
    }

    #[test]
    fn is_finite_and_bounded_at_the_extremes() {
        for bits in [0, 1, 1 << 12, u64::MAX, u64::MAX - (1 << 12), 1 << 63, u64::MAX >> 1] {
            let (u, g) = (uniform_of(bits), gumbel_of(bits));
            assert!(0.0 < u && u < 1.0, "{bits:#x}: u = {u}");
            assert!((-3.7..36.8).contains(&g), "{bits:#x}: {g}");
            assert!(f64::from(g) <= gumbel_bound(bits), "{bits:#x}");
        }
        let noise = PositionNoise::new(5, 5);
        for token in 0..200_000 {
            let bits = noise.bits(token);
            assert!(f64::from(gumbel_of(bits)) <= gumbel_bound(bits), "{bits:#x}");
        }
    }

    #[test]
    fn is_the_same_forever() {
        // Known answers: a changed mixer changes every seeded text, so it must not happen unnoticed.
        let found = [gumbel(0, 0, 0), gumbel(1, 2, 3), gumbel(u64::MAX, u64::MAX, u32::MAX)];
        assert_eq!(found.map(|g| (g * 1e4).round() as i32), KNOWN, "{found:?}");
    }

    const KNOWN: [i32; 3] = [8010, 7769, 10614];

    #[test]
    fn the_coin_is_fair_and_apart_from_the_noise() {
        let n = 200_000u64;
        let heads = (0..n).filter(|&i| PositionNoise::new(8, i).uniform(XTC_STREAM) < 0.3).count() as f64;
        assert!((heads / n as f64 - 0.3).abs() < 0.006, "{heads}");
        let coin = |i| PositionNoise::new(8, i).uniform(XTC_STREAM) as f32;
        for token in [0, 1, 77] {
            let (.., correlation) = moments((0..n).map(|i| (coin(i), gumbel(8, i, token))));
            assert!(correlation.abs() < 0.014, "{correlation}");
        }
    }
}
