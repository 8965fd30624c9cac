//! Rotary position embedding ("RoFormer", Su et al.): turns each pair of a head's dimensions by an
//! angle that grows with the position.
//!
//! ```text
//! angle(pos, i) = pos · base^(-2i / n_rot) / factor[i]          i < n_rot / 2
//! (x, y) → (x cos − y sin, x sin + y cos)
//! ```
//!
//! Only the first `n_rot` dimensions turn, the rest pass through. Angles are computed in f64 from
//! the position itself: f32 is off by 0.016 rad at position 256 K, and an angle taken as the last
//! one plus a step would depend on where the computation began.
//!
//! Positions beyond those of the training are brought back by [`RopeScaling`]; Llama 3's way of doing so comes as
//! per-pair factors in the file.

/// Which dimensions turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(i, i + n_rot/2)`: the NEOX order, nearly every model's.
    HalfSplit,
    /// `(2i, 2i + 1)`: the order of GGUF files of the `llama` architecture.
    Adjacent,
}

/// How frequencies are changed for a context longer than that of the training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All are divided by this ("Extending Context Window of Large Language Models via Positional Interpolation", Chen et al.).
    Linear(f32),
    /// The slow ones are divided, the fast ones not.
    Yarn(Yarn),
}

/// YaRN ("Efficient Context Window Extension of Large Language Models", Peng et al., 2023).
///
/// A pair that turns more than `beta_fast` times over the trained context keeps its frequency, one that turns less than
/// `beta_slow` times has it divided by `factor`, and those between are blended, evenly by their number. What turns is also
/// stretched, which makes attention sharper: by `attn_factor · (1 + 0.1 ln factor)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Times that the context is longer than the trained one.
    pub factor: f32,
    /// The trained context.
    pub n_ctx_orig: u32,
    /// Turns from which on nothing changes.
    pub beta_fast: f32,
    /// Turns up to which all is divided.
    pub beta_slow: f32,
    /// How much of the frequencies that may stay does stay; 0 leaves linear scaling.
    pub ext_factor: f32,
    /// A further stretch.
    pub attn_factor: f32,
}

impl Yarn {
    /// With the paper's numbers for Llama models, which others took over.
    pub fn new(factor: f32, n_ctx_orig: u32) -> Yarn {
        Yarn { factor, n_ctx_orig, beta_fast: 32.0, beta_slow: 1.0, ext_factor: 1.0, attn_factor: 1.0 }
    }

    /// The number of the pair, not always a whole one, that turns `turns` times over the trained context.
    fn pair_of(&self, turns: f32, n_rot: usize, base: f64) -> f64 {
        let turns = f64::from(turns) * std::f64::consts::TAU;
        n_rot as f64 * (f64::from(self.n_ctx_orig) / turns).ln() / (2.0 * base.ln())
    }

    /// The frequency of pair `i` in place of `frequency`.
    fn scale(&self, i: usize, frequency: f64, n_rot: usize, base: f64) -> f64 {
        let low = self.pair_of(self.beta_fast, n_rot, base).floor().max(0.0);
        let high = self.pair_of(self.beta_slow, n_rot, base).ceil().min(n_rot as f64 - 1.0);
        let slow = ((i as f64 - low) / (high - low).max(1e-3)).clamp(0.0, 1.0);
        let stays = (1.0 - slow) * f64::from(self.ext_factor);
        frequency * (stays + (1.0 - stays) / f64::from(self.factor))
    }

    fn magnitude(&self) -> f64 {
        let grown =
            if self.ext_factor == 0.0 { 1.0 } else { 1.0 + 0.1 * f64::from(self.factor).ln().max(0.0) };
        f64::from(self.attn_factor) * grown
    }
}

/// Cosine and sine of one pair's angle, times the magnitude.
pub type Turn = [f32; 2];

/// The frequencies of one rotary embedding; positions are turned by it one at a time.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Angle per position, for each pair.
    frequencies: Vec<f64>,
    magnitude: f64,
}

impl RopeTable {
    /// Frequencies for `n_rot` dimensions, each divided by its pair's factor, if there are any.
    ///
    /// # Panics
    /// If `n_rot` is odd, or the factors are not `n_rot / 2`.
    pub fn new(n_rot: usize, base: f64, factors: Option<&[f32]>) -> Self {
        assert!(n_rot.is_multiple_of(2), "n_rot {n_rot} is not made of pairs");
        let n_pairs = n_rot / 2;
        if let Some(factors) = factors {
            assert_eq!(factors.len(), n_pairs, "one factor for each of {n_pairs} pairs");
        }
        let frequencies = (0..n_pairs)
            .map(|i| {
                let factor = factors.map_or(1.0, |factors| f64::from(factors[i]));
                base.powf(-2.0 * i as f64 / n_rot as f64) / factor
            })
            .collect();
        Self { frequencies, magnitude: 1.0 }
    }

    /// The same for a longer context; `base` as in [`new`](Self::new).
    pub fn scaled(mut self, scaling: RopeScaling, base: f64) -> Self {
        let n_rot = self.n_rot();
        let all = self.frequencies.iter_mut();
        match scaling {
            RopeScaling::None => {}
            RopeScaling::Linear(factor) => all.for_each(|f| *f /= f64::from(factor)),
            RopeScaling::Yarn(yarn) => {
                all.enumerate().for_each(|(i, f)| *f = yarn.scale(i, *f, n_rot, base));
                self.magnitude = yarn.magnitude();
            }
        }
        self
    }

    /// Number of dimensions that turn.
    pub fn n_rot(&self) -> usize {
        self.frequencies.len() * 2
    }

    /// The turn of each pair at `position`, into `turns [n_rot / 2]`. All heads of a row share it.
    pub fn turns(&self, position: u32, turns: &mut [Turn]) {
        assert_eq!(turns.len(), self.frequencies.len(), "one turn for each pair");
        for (turn, frequency) in turns.iter_mut().zip(&self.frequencies) {
            *turn = self.turn(position, *frequency);
        }
    }

    fn turn(&self, position: u32, frequency: f64) -> Turn {
        let (sin, cos) = (f64::from(position) * frequency).sin_cos();
        [(cos * self.magnitude) as f32, (sin * self.magnitude) as f32]
    }
}

/// Turns the first `2 · turns.len()` dimensions of a head.
#[inline(always)]
pub fn rotate(head: &mut [f32], turns: &[Turn], pairing: Pairing) {
    match pairing {
        Pairing::HalfSplit => {
            let (first, rest) = head.split_at_mut(turns.len());
            for ((x, y), turn) in first.iter_mut().zip(&mut rest[..turns.len()]).zip(turns) {
                [*x, *y] = turned([*x, *y], *turn);
            }
        }
        Pairing::Adjacent => {
            let (pairs, _) = head[..2 * turns.len()].as_chunks_mut::<2>();
            for (pair, turn) in pairs.iter_mut().zip(turns) {
                *pair = turned(*pair, *turn);
            }
        }
    }
}

#[inline(always)]
fn turned([x, y]: [f32; 2], [cos, sin]: Turn) -> [f32; 2] {
    [x * cos - y * sin, x * sin + y * cos]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotate_at(table: &RopeTable, head: &mut [f32], position: u32, pairing: Pairing) {
        let mut turns = vec![[0.0; 2]; table.n_rot() / 2];
        table.turns(position, &mut turns);
        rotate(head, &turns, pairing);
    }

    fn check(table: &RopeTable, position: u32, pairing: Pairing, head: &[f32], expected: &[f32]) {
        let mut got = head.to_vec();
        rotate_at(table, &mut got, position, pairing);
        for (i, (got, want)) in got.iter().zip(expected).enumerate() {
            assert!((got - want).abs() < 2e-6, "dim {i} at {position}: {got} != {want}");
        }
    }

    #[test]
    fn pairs_turn_and_the_rest_passes() {
        let table = RopeTable::new(4, 10_000.0, None); // frequencies 1 and 0.01
        let (c, s) = (3f32.cos(), 3f32.sin());
        let (c2, s2) = (0.03f32.cos(), 0.03f32.sin());
        let head = [1.0, 0.0, 0.0, 2.0, 7.0];
        check(&table, 3, Pairing::HalfSplit, &head, &[c, -2.0 * s2, s, 2.0 * c2, 7.0]);
        check(&table, 3, Pairing::Adjacent, &head, &[c, s, -2.0 * s2, 2.0 * c2, 7.0]);
        check(&table, 0, Pairing::Adjacent, &head, &head);
    }

    #[test]
    fn factors_slow_a_pair() {
        let table = RopeTable::new(2, 500.0, Some(&[8.0]));
        let angle = 100.0f64 / 8.0;
        check(&table, 100, Pairing::HalfSplit, &[1.0, 0.0], &[angle.cos() as f32, angle.sin() as f32]);
        let table = RopeTable::new(2, 500.0, None).scaled(RopeScaling::Linear(8.0), 500.0);
        check(&table, 100, Pairing::HalfSplit, &[1.0, 0.0], &[angle.cos() as f32, angle.sin() as f32]);
    }

    /// The fast pairs stay, the slow ones are divided, and there are some between; what turns is stretched.
    #[test]
    fn yarn_divides_what_turns_slowly() {
        // Pairs 0 to 63 turn 32768 · 1e6^(-i/64) / 2π times: more than 32 times up to 23.6, less than once from 39.6 on.
        let (plain, yarn) = (RopeTable::new(128, 1e6, None), Yarn::new(4.0, 32_768));
        let scaled = plain.clone().scaled(RopeScaling::Yarn(yarn), 1e6);
        let ratio: Vec<f64> = plain.frequencies.iter().zip(&scaled.frequencies).map(|(a, b)| a / b).collect();
        assert!(ratio[..=23].iter().all(|r| *r == 1.0), "{ratio:?}");
        assert!(ratio[40..].iter().all(|r| (r - 4.0).abs() < 1e-12), "{ratio:?}");
        assert!(ratio[23..=40].windows(2).all(|r| r[0] < r[1]), "{ratio:?}");
        // Halfway between 23 and 40 half of each: 1/2 + 1/8.
        assert!((1.0 / ratio[31] - (9.0 + 8.0 / 4.0) / 17.0).abs() < 1e-12, "{ratio:?}");
        assert!((scaled.magnitude - (1.0 + 0.1 * 4f64.ln())).abs() < 1e-9);
        let linear = plain.clone().scaled(RopeScaling::Yarn(Yarn { ext_factor: 0.0, ..yarn }), 1e6);
        assert_eq!((linear.frequencies[0], linear.magnitude), (plain.frequencies[0] / 4.0, 1.0));
    }

    /// Turns as they are stored, against angles of twice the precision: an error in the angle of half the last bit of a
    /// cosine at every position up to a million and more, where f32 angles are off by hundredths.
    #[test]
    fn angles_lose_nothing_far_out() {
        let table = RopeTable::new(128, 5e6, None).scaled(RopeScaling::Yarn(Yarn::new(4.0, 262_144)), 5e6);
        let mut turns = vec![[0.0; 2]; 64];
        let mut worst_f32: f64 = 0.0;
        for position in (0..1_100_000u32).step_by(9_973).chain([262_143, 262_144, 300_000, 1_048_575]) {
            table.turns(position, &mut turns);
            for (turn, &frequency) in turns.iter().zip(&table.frequencies) {
                // The product in two parts, the second of which is what rounding took from the first.
                let (x, y) = (f64::from(position), frequency);
                let product = x * y;
                let rest = x.mul_add(y, -product);
                let (sin, cos) = (product % std::f64::consts::TAU).sin_cos();
                let (sin, cos) = (sin + rest * cos, cos - rest * sin);
                for (got, want) in turn.iter().zip([cos, sin]) {
                    let error = (f64::from(*got) / table.magnitude - want).abs();
                    assert!(error < 1.2e-7, "position {position}, frequency {frequency}: off by {error:e}");
                }
                worst_f32 = worst_f32.max((f64::from(position as f32 * frequency as f32) - product).abs());
            }
        }
        assert!(worst_f32 > 0.01, "an angle in f32 would be off by {worst_f32}");
    }

    #[test]
    fn far_positions_are_exact() {
        // Pair 1 of 3 turns by pos · 10000^(-1/3): 40 digits of the angle, then cosine and sine.
        let table = RopeTable::new(6, 10_000.0, None);
        let head = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        for (position, cos, sin) in
            [(262_143, -0.977_639_7, -0.210_287_22), (1_000_000, -0.414_756_94, 0.909_932_24)]
        {
            check(&table, position, Pairing::HalfSplit, &head, &[0.0, cos, 0.0, 0.0, sin, 0.0]);
        }
    }

    #[test]
    fn what_is_not_turned_passes() {
        let table = RopeTable::new(64, 1e6, None);
        let head: Vec<f32> = (0..80).map(|i| (i as f32).sin()).collect();
        for pairing in [Pairing::HalfSplit, Pairing::Adjacent] {
            let mut turned = head.clone();
            rotate_at(&table, &mut turned, 77, pairing);
            assert_ne!(turned[..64], head[..64]);
            assert_eq!(turned[64..], head[64..]);
        }
    }
}
