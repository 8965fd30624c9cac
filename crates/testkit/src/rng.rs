//! Randomness that follows a seed: SplitMix64 (Steele, Lea and Flood, 2014).

use std::ops::Range;

/// Two numbers into one, every bit of either moving every bit of the result.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(29) ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `bits` as a number in `[-1, 1)`.
pub(crate) fn signed_unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// A small generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Rng {
        Rng(mix(seed, 0x7061_6365))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0, 1)
    }

    /// A number of `range`, which is not empty.
    pub fn range(&mut self, range: Range<usize>) -> usize {
        assert!(!range.is_empty(), "a number of {range:?}");
        range.start + (self.bits() % range.len() as u64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        ((self.bits() >> 11) as f64) < p * (1u64 << 53) as f64
    }

    /// One of `choices`.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.range(0..choices.len())]
    }
}

/// Says which seed was running if the test panics while this is alive.
#[derive(Debug)]
pub struct Seeded {
    what: &'static str,
    seed: u64,
}

impl Seeded {
    /// `what` names the test.
    pub fn new(what: &'static str, seed: u64) -> Seeded {
        Seeded { what, seed }
    }
}

impl Drop for Seeded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: failed at seed {}", self.what, self.seed);
        }
    }
}
