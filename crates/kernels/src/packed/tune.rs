//! How far ahead of a product to ask for its weights: measured at load, on the matrices themselves.
//!
//! Machines differ, and by much. On one, asking eight kilobytes ahead doubles the speed of two columns, while for one column
//! the hardware's own fetching ahead is best left alone: asking slows it by a quarter. On another one the hardware needs
//! help at every number of columns. No value depends on it, so the machine is asked.

use std::time::{Duration, Instant};

use super::matrix::PackedMatrix;
use super::rows::QuantRows;
use super::table::PackedTable;
use crate::team::Team;

/// How many bytes ahead of a sweep to ask for weights, by the number of columns; 0 leaves it to the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead([usize; CLASSES.len()]);

/// The least number of columns of each class.
const CLASSES: [usize; 4] = [1, 2, 4, 8];
/// What is tried.
const CANDIDATES: [usize; 4] = [0, 4 << 10, 8 << 10, 12 << 10];
/// Fewer bytes than this may stay in a cache, where there is nothing to fetch ahead.
const LEAST_BYTES: usize = 64 << 20;
/// Bytes of one measurement, and of a piece of it for one thread.
const RUN_BYTES: usize = 6 << 20;
const PIECE_BYTES: usize = 256 << 10;
const ROUNDS: usize = 3;

impl Ahead {
    /// What served well where it was measured.
    pub const DEFAULT: Ahead = Ahead([0, 8 << 10, 8 << 10, 12 << 10]);

    /// Bytes ahead for a sweep over `n` columns.
    pub(super) fn bytes(&self, n: usize) -> usize {
        let class = CLASSES.iter().rposition(|&least| n >= least);
        class.map_or(0, |class| self.0[class])
    }
}

/// Finds the best distances for each type among `matrices`, where there is enough of it, and lets its matrices use them. Takes
/// some hundredths of a second for each type.
pub fn tune(table: &PackedTable, matrices: &mut [PackedMatrix], team: &Team) {
    let mut types: Vec<_> = matrices.iter().map(PackedMatrix::ty).collect();
    types.sort_by_key(|ty| ty.name());
    types.dedup();
    for ty in types {
        if let Some(ahead) = best(table, matrices, ty, team) {
            matrices.iter_mut().filter(|w| w.ty() == ty).for_each(|w| w.set_ahead(ahead));
        }
    }
}

/// The best distances for a type, measured on those of its matrices that have the commonest width.
fn best(
    table: &PackedTable,
    matrices: &mut [PackedMatrix],
    ty: paceline_gguf::GgmlType,
    team: &Team,
) -> Option<Ahead> {
    let of_type = || matrices.iter().filter(|w| w.ty() == ty);
    let bytes_of =
        |n_in: usize| of_type().filter(|w| w.n_in() == n_in).map(PackedMatrix::bytes).sum::<usize>();
    let n_in = of_type().map(PackedMatrix::n_in).max_by_key(|&n_in| bytes_of(n_in))?;
    if bytes_of(n_in) < LEAST_BYTES {
        return None;
    }
    let grain = of_type().next()?.grain();
    let x: Vec<f32> = (0..CLASSES[3] * n_in).map(|i| (i as f32 * 12.9898).sin()).collect();
    let columns = CLASSES.map(|n| {
        let mut rows = QuantRows::new();
        rows.quantize_rows(table, grain, &x[..n * n_in], n, n_in);
        rows
    });
    // Pieces of all these matrices, in order; every measurement takes the next ones, so that none finds its own in a cache.
    let mut pieces = Vec::new();
    for (i, w) in matrices.iter().enumerate().filter(|(_, w)| w.ty() == ty && w.n_in() == n_in) {
        let step = (PIECE_BYTES * w.n_groups() / w.bytes()).max(1);
        pieces.extend((0..w.n_groups()).step_by(step).map(|g| (i, g..w.n_groups().min(g + step))));
    }
    let n_pieces = (RUN_BYTES / PIECE_BYTES).min(pieces.len());
    let mut next = 0;
    let mut least = [[Duration::MAX; CANDIDATES.len()]; CLASSES.len()];
    for _ in 0..ROUNDS {
        for (x, least) in columns.iter().zip(&mut least) {
            for (&ahead, least) in CANDIDATES.iter().zip(least) {
                for w in matrices.iter_mut().filter(|w| w.ty() == ty) {
                    w.set_ahead(Ahead([ahead; CLASSES.len()]));
                }
                if next + n_pieces > pieces.len() {
                    next = 0;
                }
                let run = &pieces[next..next + n_pieces];
                next += n_pieces;
                let start = Instant::now();
                team.for_each(n_pieces, &|piece| {
                    let (w, groups) = (&matrices[run[piece].0], run[piece].1.clone());
                    let mut out = vec![0.0; x.n() * w.rows(groups.clone()).len()];
                    table.product(w, groups, x, &mut out);
                    std::hint::black_box(&out);
                });
                *least = (*least).min(start.elapsed());
            }
        }
    }
    let mut ahead = Ahead::DEFAULT;
    for ((ahead, least), n) in ahead.0.iter_mut().zip(least).zip(CLASSES) {
        let best = (0..CANDIDATES.len()).min_by_key(|&i| least[i]).unwrap_or(0);
        let usual = CANDIDATES.iter().position(|&c| c == Ahead::DEFAULT.bytes(n)).unwrap_or(best);
        // Noise alone shall change nothing.
        if least[best].mul_f64(1.04) < least[usual] {
            *ahead = CANDIDATES[best];
        }
    }
    Some(ahead)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KernelTable;
    use crate::packed::pack;
    use paceline_gguf::GgmlType;

    #[test]
    fn a_class_reaches_to_the_next_one() {
        let ahead = Ahead([1, 2, 3, 4]);
        let got: Vec<usize> = (0..10).map(|n| ahead.bytes(n)).collect();
        assert_eq!(got, [0, 1, 2, 2, 3, 3, 3, 3, 4, 4]);
        assert_eq!(ahead.bytes(500), 4);
    }

    #[test]
    fn tuning_changes_no_bit_and_leaves_a_candidate() {
        let (n_in, n_out) = (2048, 65_536); // 71 MiB
        let bytes: Vec<u8> = (0..n_out * n_in / 32 * 34)
            .map(|i| if i % 34 == 1 { 0x21 } else { ((i * 73) >> 2) as u8 })
            .collect();
        let team = Team::new(2);
        let mut matrices = [pack(GgmlType::Q8_0, &bytes, n_in, n_out, &team, &|_| ()).unwrap().unwrap()];
        let table = PackedTable::of(KernelTable::best().unwrap());
        let x: Vec<f32> = (0..2 * n_in).map(|i| (i as f32).sin()).collect();
        let mut rows = QuantRows::new();
        rows.quantize_rows(table, matrices[0].grain(), &x, 2, n_in);
        let product = |w: &PackedMatrix| {
            let mut out = vec![0.0; 2 * 64];
            table.product(w, 5..7, &rows, &mut out);
            out
        };
        let before = product(&matrices[0]);
        // Never the last state of a measurement.
        tune(table, &mut matrices, &team);
        assert_eq!(product(&matrices[0]), before);
        for n in CLASSES {
            assert!(CANDIDATES.contains(&matrices[0].ahead().bytes(n)));
        }
    }

    #[test]
    fn too_little_to_measure_keeps_the_default() {
        let mut matrices =
            [pack(GgmlType::Q8_0, &[0; 34 * 32], 32, 32, &Team::new(1), &|_| ()).unwrap().unwrap()];
        tune(PackedTable::of(KernelTable::best().unwrap()), &mut matrices, &Team::new(1));
        assert_eq!(*matrices[0].ahead(), Ahead::DEFAULT);
    }
}
