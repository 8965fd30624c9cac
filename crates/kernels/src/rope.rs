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
//! Llama 3's scaling and YaRN come as per-pair factors, linear scaling as one factor for all,
//! YaRN's attention factor as `magnitude`.

/// Which dimensions turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(i, i + n_rot/2)`: the NEOX order, nearly every model's.
    HalfSplit,
    /// `(2i, 2i + 1)`: the order of GGUF files of the `llama` architecture.
    Adjacent,
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

    /// The same, with what turns also stretched by `magnitude`.
    pub fn with_magnitude(self, magnitude: f64) -> Self {
        Self { magnitude, ..self }
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
    fn factors_slow_a_pair_and_magnitude_stretches() {
        let table = RopeTable::new(2, 500.0, Some(&[8.0])).with_magnitude(2.0);
        let angle = 100.0f64 / 8.0;
        let expected = [2.0 * angle.cos() as f32, 2.0 * angle.sin() as f32];
        check(&table, 100, Pairing::HalfSplit, &[1.0, 0.0], &expected);
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
