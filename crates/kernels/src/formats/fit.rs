//! Choosing the scales of a block: weighted least squares over candidate code assignments.
//!
//! A block format approximates values `x` by `d·q` (or `d·q + b`) with small integer codes `q`. Given the codes, the best
//! `d` and `b` are a linear least-squares problem; given those, the best codes are the nearest ones. Neither is known,
//! and alternating from one start stops in the first local minimum. So the search tries many starts: it maps the
//! extreme value to levels around the last of the grid (a little inside, exactly on, a little beyond, where the extreme is
//! clipped to serve the others), takes one alternating step from each, and keeps the one whose *final* error is least:
//! with the scale rounded as it will be stored and every code chosen anew. Values that the format can represent thus
//! have a candidate with error zero, and survive being quantised again.
//!
//! The error is `Σ w·(x - x̂)²` with `w = 1 + x²/mean(x²)`: large weights contribute most to a product, but the small ones
//! are many, and must not be sacrificed entirely. Where it is known how large the inputs are that meet each value, that
//! is its weight ([`importance`]).
//!
//! Formats of 256 values have two levels: groups with small integer scales under one F16. There the groups are
//! fitted freely first, then their scales are rounded, then each group may move its integers by one and the F16 is fitted
//! again to all 256 values, as long as the error falls.

use std::array;

use super::float::{f16_to_f32, f32_to_f16};

/// The values of a block, fit to compute with: no NaN, and nothing whose square overflows.
///
/// 2^28 is beyond what any format with an F16 scale can represent (Q6_K: 65504·128·32), so clamping there loses nothing.
#[inline(always)]
pub fn finite<const N: usize>(values: &[f32; N]) -> [f32; N] {
    const LIMIT: f32 = (1u32 << 28) as f32;
    values.map(|x| if x.is_nan() { 0.0 } else { x.clamp(-LIMIT, LIMIT) })
}

/// How much each value's error counts: as given, or from the values alone.
///
/// What is given is the mean square of the input that each value is multiplied with (an importance matrix). A product
/// `Σ x·a` then errs by `Σ (x - x̂)²·mean(a²)` in the mean square, if the inputs `a` are uncorrelated: these are the weights.
#[inline(always)]
pub fn importance<const N: usize>(x: &[f32; N], given: Option<&[f32; N]>) -> [f32; N] {
    if let Some(given) = given {
        let mean = given.iter().sum::<f32>() / N as f32;
        // What never mattered in the sample must still not be chosen at random. Nothing but such is as if nothing were given.
        if mean >= f32::MIN_POSITIVE {
            return given.map(|w| w / mean + NEVER_SEEN);
        }
    }
    let mean = x.iter().map(|x| x * x).sum::<f32>() / N as f32;
    // Where the squares vanish so does every scale that could follow from them.
    if mean < f32::MIN_POSITIVE { [1.0; N] } else { x.map(|x| 1.0 + x * x / mean) }
}

/// Weight of a value whose input was always zero, where the mean is 1.
const NEVER_SEEN: f32 = 1e-5;

/// `1/d`, or 0 where a scale of zero leaves only zero to say.
#[inline(always)]
pub fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The scale as it will be read back.
pub fn rounded_to_f16(d: f32) -> f32 {
    f16_to_f32(f32_to_f16(d))
}

/// The integer in `lo..=hi` nearest to `x`.
///
/// Adding 1.5·2^23 leaves no bit for a fraction: unlike `f32::round` this vectorises on every CPU.
#[inline(always)]
pub fn nearest_integer(x: f32, lo: f32, hi: f32) -> f32 {
    const NO_FRACTION: f32 = (3u32 << 22) as f32;
    (x.clamp(lo, hi) + NO_FRACTION) - NO_FRACTION
}

/// Sums of `K` terms over all values, in eight lanes: a single running sum could not be vectorised, for the order of
/// additions is part of the result.
#[inline(always)]
fn sums<const N: usize, const K: usize>(
    x: &[f32; N],
    w: &[f32; N],
    terms: impl Fn(f32, f32) -> [f32; K],
) -> [f32; K] {
    const { assert!(N.is_multiple_of(8)) };
    let mut lanes = [[0.0; 8]; K];
    for (x, w) in x.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
        for lane in 0..8 {
            let terms = terms(x[lane], w[lane]);
            for k in 0..K {
                lanes[k][lane] += terms[k];
            }
        }
    }
    lanes.map(|lanes| lanes.iter().sum())
}

/// The levels of a signed format.
#[derive(Clone, Copy)]
pub struct Levels<F> {
    /// The lowest level and the highest.
    pub range: (f32, f32),
    /// The distance between starts of the search, in levels.
    pub step: f32,
    /// The level nearest to a value given in units of the scale.
    pub nearest: F,
}

/// The integers `-n..n`.
pub fn integers(n: f32) -> Levels<impl Fn(f32) -> f32 + Copy> {
    Levels { range: (-n, n - 1.0), step: 0.25, nearest: move |x| nearest_integer(x, -n, n - 1.0) }
}

/// Starts inside and beyond the end of the grid, in steps.
const STARTS_INSIDE: i32 = 6;
const STARTS_BEYOND: i32 = 10;

impl<F: Fn(f32) -> f32 + Copy> Levels<F> {
    /// Weighted squared error of `d·nearest(x/d)`.
    #[inline(always)]
    fn error<const N: usize>(self, x: &[f32; N], w: &[f32; N], d: f32) -> f32 {
        let inv = inverse(d);
        let [error] = sums(x, w, |x, w| {
            let miss = x - d * (self.nearest)(x * inv);
            [w * miss * miss]
        });
        error
    }

    /// The least-squares scale for the codes that the scale `1/inv` gives.
    #[inline(always)]
    fn refit<const N: usize>(self, x: &[f32; N], w: &[f32; N], inv: f32) -> f32 {
        let [xq, qq] = sums(x, w, |x, w| {
            let q = (self.nearest)(x * inv);
            [w * x * q, w * q * q]
        });
        if qq > 0.0 { xq / qq } else { 0.0 }
    }

    /// The scale `d` for which `d·nearest(x/d)` is closest to `x`; `stored` is how a scale reads back once stored.
    #[inline(always)]
    pub fn fit<const N: usize>(self, x: &[f32; N], w: &[f32; N], stored: impl Fn(f32) -> f32) -> f32 {
        let extreme = x.iter().fold(0.0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
        if extreme == 0.0 {
            return 0.0;
        }
        let mut best = (f32::INFINITY, 0.0);
        let mut consider = |d: f32| {
            let d = stored(d);
            let error = self.error(x, w, d);
            if error < best.0 {
                best = (error, d);
            }
            best.1
        };
        for end in [self.range.0, self.range.1] {
            for k in -STARTS_INSIDE..=STARTS_BEYOND {
                let level = end + end.signum() * self.step * k as f32;
                consider(self.refit(x, w, level / extreme));
            }
        }
        let mut d = consider(0.0);
        for _ in 0..2 {
            d = consider(self.refit(x, w, inverse(d)));
        }
        d
    }
}

/// A 256-value block of a signed format: value = `d · scales[group] · level`.
pub struct SignedBlock<const GROUPS: usize> {
    pub d: [u8; 2],
    pub scales: [i8; GROUPS],
    /// One level per value.
    pub levels: [f32; 256],
}

/// Fits `GROUPS` groups of `LEN` values under one F16 scale, group scales being integers in `-n_scales..n_scales`.
#[inline(always)]
pub fn signed_block<const GROUPS: usize, const LEN: usize>(
    values: &[f32; 256],
    given: Option<&[f32; 256]>,
    levels: Levels<impl Fn(f32) -> f32 + Copy>,
    n_scales: i32,
) -> SignedBlock<GROUPS> {
    const { assert!(GROUPS * LEN == 256) };
    let values = finite(values);
    let weights = importance(&values, given);
    let (x, _) = values.as_chunks::<LEN>();
    let (w, _) = weights.as_chunks::<LEN>();

    let free: [f32; GROUPS] = array::from_fn(|g| levels.fit(&x[g], &w[g], |d| d));
    let widest = free.iter().fold(0.0f32, |max, &d| if d.abs() > max.abs() { d } else { max });
    let mut best = (f32::INFINITY, 0.0, [0; GROUPS]);
    // The widest scale takes the end of the integer range, which has one more step on the negative side, or a place just
    // before it: a block that was quantised before may lie on that grid.
    let starts = (0..4).map(|i| Some(widest / (i - n_scales) as f32));
    let mut refit = 0.0;
    for start in starts.chain([None, None]) {
        let d = rounded_to_f16(start.unwrap_or(refit));
        let mut scales = [0; GROUPS];
        let (mut error, mut xq, mut qq) = (0.0, 0.0, 0.0);
        for g in 0..GROUPS {
            let (x, w) = (&x[g], &w[g]);
            let middle =
                nearest_integer(free[g] * inverse(d), -n_scales as f32, (n_scales - 1) as f32) as i32;
            let (least, scale) = (middle - 1..=middle + 1)
                .filter(|s| (-n_scales..n_scales).contains(s))
                .map(|s| (levels.error(x, w, d * s as f32), s))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .expect("the middle is in range");
            scales[g] = scale;
            error += least;
            let inv = inverse(d * scale as f32);
            let scale = scale as f32;
            let group = sums(x, w, |x, w| {
                let q = scale * (levels.nearest)(x * inv);
                [w * x * q, w * q * q]
            });
            xq += group[0];
            qq += group[1];
        }
        if error < best.0 {
            best = (error, d, scales);
            refit = if qq > 0.0 { xq / qq } else { 0.0 };
        }
    }

    let (_, d, scales) = best;
    SignedBlock {
        d: f32_to_f16(d),
        scales: scales.map(|s| s as i8),
        levels: array::from_fn(|n| (levels.nearest)(values[n] * inverse(d * scales[n / LEN] as f32))),
    }
}

/// A straight line through codes: value = `d·q + b`.
#[derive(Clone, Copy, Default)]
pub struct Line {
    pub d: f32,
    pub b: f32,
}

/// The codes `0..=q_max` of a format with an offset.
#[derive(Clone, Copy)]
pub struct Codes {
    pub q_max: f32,
    /// Whether offsets above zero cannot be stored.
    pub offset_below_zero: bool,
}

impl Codes {
    /// The code nearest to `x` on the line.
    #[inline(always)]
    pub fn nearest(self, x: f32, line: Line, inv: f32) -> f32 {
        nearest_integer((x - line.b) * inv, 0.0, self.q_max)
    }

    /// Weighted squared error of the values' nearest points on the line.
    #[inline(always)]
    fn error<const N: usize>(self, x: &[f32; N], w: &[f32; N], line: Line) -> f32 {
        let inv = inverse(line.d);
        let [error] = sums(x, w, |x, w| {
            let miss = x - (line.d * self.nearest(x, line, inv) + line.b);
            [w * miss * miss]
        });
        error
    }

    /// The least-squares line for the codes that `line` gives.
    #[inline(always)]
    fn refit<const N: usize>(self, x: &[f32; N], w: &[f32; N], line: Line) -> Line {
        let inv = inverse(line.d);
        // The sums of a linear regression of x on q.
        let [s_w, s_q, s_qq, s_x, s_xq] = sums(x, w, |x, w| {
            let q = self.nearest(x, line, inv);
            [w, w * q, w * q * q, w * x, w * x * q]
        });
        let determinant = s_w * s_qq - s_q * s_q;
        if determinant > 0.0 {
            let d = (s_w * s_xq - s_q * s_x) / determinant;
            let b = (s_qq * s_x - s_q * s_xq) / determinant;
            if !(self.offset_below_zero && b > 0.0) {
                return Line { d, b };
            }
        }
        // One code for all, or an offset that cannot be stored: a line through zero.
        Line { d: if s_qq > 0.0 { s_xq / s_qq } else { 0.0 }, b: 0.0 }
    }

    /// The line closest to `x`; `stored` is how a line reads back once stored.
    #[inline(always)]
    pub fn fit<const N: usize>(self, x: &[f32; N], w: &[f32; N], stored: impl Fn(Line) -> Line) -> Line {
        let (mut lo, mut hi) =
            x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &x| (lo.min(x), hi.max(x)));
        if self.offset_below_zero {
            (lo, hi) = (lo.min(0.0), hi.max(lo.min(0.0)));
        }
        let mut best = (f32::INFINITY, Line::default());
        let mut consider = |line: Line| {
            let line = stored(line);
            let error = self.error(x, w, line);
            if error < best.0 {
                best = (error, line);
            }
            best.1
        };
        if lo == hi {
            // Equal values need no slope, unless the offset cannot say them: then the last code does.
            return if self.offset_below_zero && lo > 0.0 {
                consider(Line { d: hi / self.q_max, b: 0.0 })
            } else {
                consider(Line { d: 0.0, b: lo })
            };
        }
        let step = self.q_max.min(8.0) / 32.0;
        // Whole numbers of steps inside the grid are where values that were quantised before lie.
        let inside = [self.q_max - 2.0, self.q_max - 1.0].into_iter().filter(|&span| span > 0.0);
        let beyond = (-2..=8).map(|k| self.q_max + step * k as f32);
        for span in inside.chain(beyond) {
            let d = (hi - lo) / span;
            // What does not fit is cut off above, below, or half and half.
            for cut in [0.0, 0.5, 1.0] {
                consider(self.refit(x, w, Line { d, b: lo + cut * (span - self.q_max).max(0.0) * d }));
            }
        }
        let mut line = consider(Line::default());
        for _ in 0..2 {
            line = consider(self.refit(x, w, line));
        }
        line
    }
}

/// A 256-value block of a format with offsets: value = `d · scales[group] · code - d_min · mins[group]`.
pub struct OffsetBlock<const GROUPS: usize> {
    pub d: [u8; 2],
    pub d_min: [u8; 2],
    pub scales: [u8; GROUPS],
    pub mins: [u8; GROUPS],
    pub codes: [u8; 256],
}

/// Fits `GROUPS` groups of `LEN` values with codes `0..=q_max`, group scales and offsets being integers in
/// `0..=scale_max` under one F16 each.
#[inline(always)]
pub fn offset_block<const GROUPS: usize, const LEN: usize>(
    values: &[f32; 256],
    given: Option<&[f32; 256]>,
    q_max: f32,
    scale_max: f32,
) -> OffsetBlock<GROUPS> {
    const { assert!(GROUPS * LEN == 256) };
    let codes = Codes { q_max, offset_below_zero: true };
    let values = finite(values);
    let weights = importance(&values, given);
    let (x, _) = values.as_chunks::<LEN>();
    let (w, _) = weights.as_chunks::<LEN>();

    let free: [Line; GROUPS] = array::from_fn(|g| codes.fit(&x[g], &w[g], |line| line));
    let steepest = free.iter().fold(0.0f32, |max, line| max.max(line.d));
    let lowest = free.iter().fold(0.0f32, |max, line| max.max(-line.b));
    let mut best = (f32::INFINITY, 0.0, 0.0, [(0.0, 0.0); GROUPS]);
    // As with signed formats the widest takes the end of the integer range or a place just before it.
    let starts = STARTS.iter().map(|(i, j)| Some((steepest / (scale_max - i), lowest / (scale_max - j))));
    let mut refit = (0.0, 0.0);
    for start in starts.chain([None, None]) {
        let (d, d_min) = start.unwrap_or(refit);
        let (d, d_min) = (rounded_to_f16(d), rounded_to_f16(d_min));
        let mut steps = [(0.0, 0.0); GROUPS];
        let mut error = 0.0;
        // Sums of the regression of all 256 values on u = scale·code and v = -min.
        let (mut uu, mut uv, mut vv, mut xu, mut xv) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for g in 0..GROUPS {
            let (x, w) = (&x[g], &w[g]);
            let middle = (
                nearest_integer(free[g].d * inverse(d), 0.0, scale_max),
                nearest_integer(-free[g].b * inverse(d_min), 0.0, scale_max),
            );
            let mut least = f32::INFINITY;
            for (i, j) in NEIGHBOURS {
                let (scale, min) = (middle.0 + i, middle.1 + j);
                if (0.0..=scale_max).contains(&scale) && (0.0..=scale_max).contains(&min) {
                    let error = codes.error(x, w, Line { d: d * scale, b: -d_min * min });
                    if error < least {
                        (least, steps[g]) = (error, (scale, min));
                    }
                }
            }
            error += least;
            let (scale, min) = steps[g];
            let line = Line { d: d * scale, b: -d_min * min };
            let inv = inverse(line.d);
            let group = sums(x, w, |x, w| {
                let (u, v) = (scale * codes.nearest(x, line, inv), -min);
                [w * u * u, w * u * v, w * v * v, w * x * u, w * x * v]
            });
            uu += group[0];
            uv += group[1];
            vv += group[2];
            xu += group[3];
            xv += group[4];
        }
        if error < best.0 {
            best = (error, d, d_min, steps);
            let determinant = uu * vv - uv * uv;
            // Without a determinant there are no offsets or nothing but offsets, and the first fits were right.
            refit = if determinant > 0.0 {
                (((vv * xu - uv * xv) / determinant).max(0.0), ((uu * xv - uv * xu) / determinant).max(0.0))
            } else {
                (d, d_min)
            };
        }
    }

    let (_, d, d_min, steps) = best;
    OffsetBlock {
        d: f32_to_f16(d),
        d_min: f32_to_f16(d_min),
        scales: steps.map(|(scale, _)| scale as u8),
        mins: steps.map(|(_, min)| min as u8),
        codes: array::from_fn(|n| {
            let (scale, min) = steps[n / LEN];
            let line = Line { d: d * scale, b: -d_min * min };
            codes.nearest(values[n], line, inverse(line.d)) as u8
        }),
    }
}

/// How far from the end of their range the widest scale and the lowest offset start.
const STARTS: [(f32, f32); 4] = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)];

/// A pair of integers and the eight around it, itself first so that it wins ties.
const NEIGHBOURS: [(f32, f32); 9] = [
    (0.0, 0.0),
    (-1.0, 0.0),
    (1.0, 0.0),
    (0.0, -1.0),
    (0.0, 1.0),
    (-1.0, -1.0),
    (-1.0, 1.0),
    (1.0, -1.0),
    (1.0, 1.0),
];
