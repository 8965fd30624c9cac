//! How far two arrays of numbers are apart, and where.

use std::fmt;

/// The largest difference of two arrays seen as rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Row and column.
    pub at: (usize, usize),
    /// What was computed there.
    pub got: f32,
    /// What it should be.
    pub want: f32,
}

impl Difference {
    /// `|got - want|`; infinite where only one is a number.
    pub fn abs(&self) -> f32 {
        match (self.got == self.want, (self.got - self.want).abs()) {
            (true, _) => 0.0,
            (false, d) if d.is_nan() => f32::INFINITY,
            (false, d) => d,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((row, column), abs) = (self.at, self.abs());
        write!(f, "|{} - {}| = {abs:e} at row {row}, column {column}", self.got, self.want)
    }
}

/// The largest difference between rows of `width` values. Panics if the lengths differ.
#[track_caller]
pub fn max_difference(got: &[f32], want: &[f32], width: usize) -> Difference {
    assert_eq!(got.len(), want.len(), "{} values against {}", got.len(), want.len());
    let mut worst = Difference { at: (0, 0), got: 0.0, want: 0.0 };
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let here = Difference { at: (i / width, i % width), got, want };
        if here.abs() > worst.abs() {
            worst = here;
        }
    }
    worst
}

/// Panics, naming `what` and the worst place, unless all values are within `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], width: usize, tolerance: f32) {
    assert!(got.len() == want.len(), "{what}: {} values, {} expected", got.len(), want.len());
    let worst = max_difference(got, want, width);
    let n_off = got
        .iter()
        .zip(want)
        .filter(|(g, w)| Difference { at: (0, 0), got: **g, want: **w }.abs() > tolerance);
    assert!(
        worst.abs() <= tolerance,
        "{what}: {worst}; {} of {} values are off by more than {tolerance:e}",
        n_off.count(),
        got.len()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(got: &[f32], want: &[f32], at: (usize, usize), abs: f32) {
        let worst = max_difference(got, want, 2);
        assert_eq!((worst.at, worst.abs()), (at, abs));
    }

    #[test]
    fn finds_the_worst_place() {
        check(&[1.0, 2.0, 3.0, 4.0], &[1.0, 2.5, 3.0, 3.0], (1, 1), 1.0);
        check(&[1.0, f32::NAN, 9.0], &[1.0, 2.0, 3.0], (0, 1), f32::INFINITY);
        check(&[f32::NEG_INFINITY; 2], &[f32::NEG_INFINITY; 2], (0, 0), 0.0);
    }

    #[test]
    #[should_panic(expected = "logits: |2 - 2.5| = 5e-1 at row 0, column 1; 1 of 2 values are off")]
    fn says_where() {
        assert_close("logits", &[1.0, 2.0], &[1.0, 2.5], 2, 0.1);
    }
}
