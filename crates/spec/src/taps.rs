//! One forward of the target serves several drafters: it is recorded with the taps of all, and each gets its own.

use paceline_backend::Tap;

use crate::Drafter;

/// The taps of several drafters, each once.
#[derive(Clone, Debug, Default)]
pub struct TapUnion {
    taps: Vec<Tap>,
    /// Where each drafter's taps are in the union.
    places: Vec<Vec<usize>>,
}

impl TapUnion {
    /// Of `drafters`, in the order in which they first want them.
    pub fn of(drafters: &[Box<dyn Drafter>]) -> TapUnion {
        let mut union = TapUnion::default();
        for drafter in drafters {
            let place = |tap: &Tap| match union.taps.iter().position(|t| t == tap) {
                Some(at) => at,
                None => {
                    union.taps.push(*tap);
                    union.taps.len() - 1
                }
            };
            let places = drafter.taps().iter().map(place).collect();
            union.places.push(places);
        }
        union
    }

    /// What the target's plan shall be recorded with.
    pub fn taps(&self) -> &[Tap] {
        &self.taps
    }

    /// True if drafter `i` wants exactly what the union holds, in its order.
    pub fn is_all_of(&self, i: usize) -> bool {
        self.places[i].iter().copied().eq(0..self.taps.len())
    }

    /// Appends drafter `i`'s part of `rows` `[n, width]` to `out`.
    pub fn gather(&self, i: usize, rows: &[f32], width: usize, out: &mut Vec<f32>) {
        if self.places[i].is_empty() {
            return;
        }
        let w = width / self.taps.len();
        for row in rows.chunks_exact(width) {
            for &place in &self.places[i] {
                out.extend_from_slice(&row[place * w..(place + 1) * w]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Draft, DraftRequest, Kept, SeqId};

    struct Taps(Vec<Tap>);

    impl Drafter for Taps {
        fn name(&self) -> &'static str {
            "taps"
        }
        fn contract(&self) -> String {
            String::new()
        }
        fn taps(&self) -> &[Tap] {
            &self.0
        }
        fn n_draft_max(&self) -> usize {
            1
        }
        fn draft(&mut self, _: &mut [DraftRequest<'_>]) -> Vec<Draft> {
            Vec::new()
        }
        fn commit(&mut self, _: &[Kept<'_>]) {}
        fn fork(&mut self, _: SeqId, _: SeqId, _: usize) -> bool {
            false
        }
        fn forget(&mut self, _: SeqId) {}
    }

    /// Wanted taps of each drafter -> the union and what each gets of two rows whose values are 10·row + place.
    fn check(wanted: &[&[Tap]], union: &[Tap], got: &[&[f32]]) {
        let drafters: Vec<Box<dyn Drafter>> =
            wanted.iter().map(|taps| Box::new(Taps(taps.to_vec())) as Box<dyn Drafter>).collect();
        let taps = TapUnion::of(&drafters);
        assert_eq!(taps.taps(), union);
        let width = 2 * union.len();
        let rows: Vec<f32> = (0..2).flat_map(|r| (0..width).map(move |c| (10 * r + c / 2) as f32)).collect();
        for (i, want) in got.iter().enumerate() {
            let mut out = Vec::new();
            taps.gather(i, &rows, width, &mut out);
            assert_eq!(out.iter().copied().step_by(2).collect::<Vec<_>>(), *want, "drafter {i}");
            assert_eq!(taps.is_all_of(i), out == rows);
        }
    }

    #[test]
    fn each_drafter_gets_its_own() {
        let (a, b, norm) = (Tap::Layer(1), Tap::Layer(4), Tap::FinalNorm);
        check(&[&[a, b]], &[a, b], &[&[0.0, 1.0, 10.0, 11.0]]);
        check(
            &[&[a, b], &[norm], &[], &[b, a]],
            &[a, b, norm],
            &[&[0.0, 1.0, 10.0, 11.0], &[2.0, 12.0], &[], &[1.0, 0.0, 11.0, 10.0]],
        );
    }
}
