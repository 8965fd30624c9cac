//! When ops run and where their results lie: waves by dependency, an arena by liveness.
//!
//! Two ops *conflict* if one reads or writes what the other writes, in a buffer's columns or in a state. The
//! level of an op is one more than the highest level of the earlier ops that it conflicts with; ops of one level
//! form a wave. Ops that conflict thus keep the order in which they were recorded, and independent ones meet in
//! a wave however far apart the model's code recorded them (keys and queries, the layers of a drafter's context).

use std::ops::Range;

use crate::{
    op::{BufRange, Op, StateAccess},
    plan::{Buf, BufDecl},
};

/// What an op touches.
struct Access {
    reads: Vec<Buf>,
    writes: Vec<BufRange>,
    state: Option<StateAccess>,
}

impl Access {
    fn of(op: &Op, bufs: &[BufDecl]) -> Access {
        let writes = op.writes(|b| bufs[b.0 as usize].width);
        Access { reads: op.reads(), writes, state: op.state() }
    }

    fn conflicts(&self, other: &Access) -> bool {
        let reads_of = |a: &Access, b: &Access| b.writes.iter().any(|w| a.reads.contains(&w.buf));
        reads_of(self, other)
            || reads_of(other, self)
            || self.writes.iter().any(|w| other.writes.iter().any(|o| o.overlaps(w)))
            || self.state.is_some_and(|s| other.state.is_some_and(|o| s.conflicts(o)))
    }
}

/// Sorts the ops by level, keeping the recorded order inside one, and says where each level lies.
pub(crate) fn waves(ops: Vec<Op>, bufs: &[BufDecl]) -> (Vec<Op>, Vec<Range<usize>>) {
    let accesses: Vec<Access> = ops.iter().map(|op| Access::of(op, bufs)).collect();
    let mut levels: Vec<usize> = Vec::with_capacity(ops.len());
    for (i, access) in accesses.iter().enumerate() {
        let after = accesses[..i].iter().zip(&levels).filter(|(earlier, _)| access.conflicts(earlier));
        levels.push(after.map(|(_, level)| level + 1).max().unwrap_or(0));
    }
    let mut sorted: Vec<(usize, Op)> = levels.into_iter().zip(ops).collect();
    sorted.sort_by_key(|(level, _)| *level);
    let mut waves: Vec<Range<usize>> = Vec::new();
    for (i, (level, _)) in sorted.iter().enumerate() {
        match waves.get_mut(*level) {
            Some(wave) => wave.end = i + 1,
            None => waves.push(i..i + 1),
        }
    }
    (sorted.into_iter().map(|(_, op)| op).collect(), waves)
}

/// First-fit placement: two buffers share columns only if no wave needs both.
pub(crate) fn place(
    ops: &[Op],
    bufs: &[BufDecl],
    waves: &[Range<usize>],
    kept: &[Buf],
) -> (Vec<usize>, [usize; 2]) {
    let width = |b: Buf| bufs[b.0 as usize].width;
    let mut live: Vec<Option<Range<usize>>> = vec![None; bufs.len()];
    for (iw, wave) in waves.iter().enumerate() {
        for op in &ops[wave.clone()] {
            for buf in op.reads().into_iter().chain(op.writes(width).into_iter().map(|w| w.buf)) {
                let range = live[buf.0 as usize].get_or_insert(iw..iw + 1);
                range.end = iw + 1;
            }
        }
    }
    for buf in kept {
        if let Some(range) = &mut live[buf.0 as usize] {
            range.end = waves.len() + 1;
        }
    }
    let mut offsets = vec![0; bufs.len()];
    let mut totals = [0; 2];
    let mut placed: Vec<usize> = Vec::new();
    let mut order: Vec<usize> = (0..bufs.len()).filter(|&i| live[i].is_some()).collect();
    order.sort_by_key(|&i| (live[i].as_ref().map(|r| r.start), i));
    for i in order {
        let Some(mine) = live[i].clone() else { continue };
        let mut taken: Vec<Range<usize>> = placed
            .iter()
            .filter(|&&j| bufs[j].rows == bufs[i].rows)
            .filter(|&&j| live[j].as_ref().is_some_and(|r| r.start < mine.end && mine.start < r.end))
            .map(|&j| offsets[j]..offsets[j] + bufs[j].width)
            .collect();
        taken.sort_by_key(|r| r.start);
        let mut at = 0;
        for r in taken {
            if at + bufs[i].width <= r.start {
                break;
            }
            at = at.max(r.end);
        }
        offsets[i] = at;
        let total = &mut totals[bufs[i].rows as usize];
        *total = (*total).max(at + bufs[i].width);
        placed.push(i);
    }
    (offsets, totals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        conformance::random::Random,
        op::{AttentionOp, BlockMask, HeadMap},
        plan::{Plan, Rows, StateId},
    };

    fn decl(width: usize) -> BufDecl {
        BufDecl { width, rows: Rows::Batch }
    }

    fn add(a: u32, b: u32, dst: u32) -> Op {
        Op::Add { a: Buf(a), b: Buf(b), dst: Buf(dst) }
    }

    fn place(src: u32, dst: u32, column: usize) -> Op {
        Op::Place { src: Buf(src), dst: Buf(dst), column }
    }

    fn append(state: u32, k: u32) -> Op {
        Op::KvAppend { state: StateId(state), k: Buf(k), v: Buf(k) }
    }

    fn attend(state: u32, q: u32, dst: u32) -> Op {
        Op::Attention(AttentionOp {
            state: StateId(state),
            q: Buf(q),
            dst: Buf(dst),
            n_head: 1,
            scale: 1.0,
            mask: BlockMask::Causal,
            window: None,
            sinks: None,
        })
    }

    fn recur(state: u32, src: u32, dst: u32) -> Op {
        let [qkv, decay, beta, dst] = [src, src, src, dst].map(Buf);
        Op::DeltaRule { state: StateId(state), qkv, decay, beta, dst, heads: HeadMap::Tiled, eps: 0.0 }
    }

    /// Ops over buffers of 4 values (from number 8 on, of 8) and the wave that each should fall into.
    fn check(ops_and_waves: &[(Op, usize)]) {
        let bufs: Vec<BufDecl> = (0..12).map(|i| decl(if i < 8 { 4 } else { 8 })).collect();
        let ops: Vec<Op> = ops_and_waves.iter().map(|(op, _)| op.clone()).collect();
        let (sorted, waves) = waves(ops, &bufs);
        let got: Vec<Vec<String>> =
            waves.into_iter().map(|w| sorted[w].iter().map(|op| format!("{op:?}")).collect()).collect();
        let mut want = vec![Vec::new(); got.len()];
        ops_and_waves.iter().for_each(|(op, wave)| want[*wave].push(format!("{op:?}")));
        assert_eq!(got, want);
    }

    #[test]
    fn a_read_waits_for_the_write() {
        check(&[(add(0, 0, 1), 0), (add(1, 1, 2), 1), (add(2, 0, 3), 2)]);
    }

    #[test]
    fn independent_ops_meet_however_far_apart() {
        check(&[
            (add(0, 0, 1), 0),
            (add(1, 1, 2), 1),
            (add(0, 0, 3), 0),
            (add(2, 3, 4), 2),
            (add(3, 3, 5), 1),
        ]);
    }

    #[test]
    fn a_write_waits_for_reads_and_writes() {
        check(&[(add(0, 0, 1), 0), (add(2, 2, 0), 1)]);
        check(&[(add(0, 0, 1), 0), (add(2, 2, 1), 1), (add(1, 1, 3), 2)]);
    }

    #[test]
    fn columns_that_do_not_overlap_are_written_together_and_read_after_all() {
        check(&[(place(0, 8, 0), 0), (place(1, 8, 4), 0), (add(8, 8, 9), 1), (place(2, 8, 0), 2)]);
        check(&[(place(0, 8, 0), 0), (place(1, 8, 3), 1), (place(2, 8, 4), 2)]);
    }

    #[test]
    fn pages_are_read_together_and_written_alone() {
        check(&[
            (append(0, 0), 0),
            (attend(0, 1, 2), 1),
            (attend(1, 1, 3), 1),
            (append(1, 4), 2),
            (attend(1, 1, 5), 3),
        ]);
    }

    #[test]
    fn recurrent_states_are_independent_of_each_other_and_of_pages() {
        check(&[
            (recur(0, 0, 1), 0),
            (recur(1, 0, 2), 0),
            (append(2, 0), 0),
            (recur(0, 0, 3), 1),
            (attend(2, 0, 4), 1),
        ]);
    }

    /// Whatever was recorded, ops that conflict keep their order and ops of one wave do not conflict.
    #[test]
    fn every_conflict_keeps_its_order() {
        let mut random = Random::new(8);
        for _ in 0..200 {
            let bufs: Vec<BufDecl> = (0..6).map(|i| decl(if i < 4 { 4 } else { 8 })).collect();
            let mut buf = |n: usize| random.below(n) as u32;
            let ops: Vec<Op> = (0..25)
                .map(|_| match buf(7) {
                    0 => append(buf(2), buf(4)),
                    1 => attend(buf(2), buf(4), buf(4)),
                    2 => recur(buf(2), buf(4), buf(4)),
                    3 => place(buf(4), 4 + buf(2), buf(5) as usize),
                    4 => add(4 + buf(2), 4, 5),
                    _ => add(buf(4), buf(4), buf(4)),
                })
                .collect();
            let recorded: Vec<Access> = ops.iter().map(|op| Access::of(op, &bufs)).collect();
            // Where an op went: equal ops keep their order, as the sort is stable.
            let names: Vec<String> = ops.iter().map(|op| format!("{op:?}")).collect();
            let (sorted, waves) = waves(ops, &bufs);
            let mut at: Vec<Option<usize>> = vec![None; names.len()];
            for (wave, range) in waves.iter().enumerate() {
                for op in &sorted[range.clone()] {
                    let name = format!("{op:?}");
                    let i = (0..names.len()).find(|&i| at[i].is_none() && names[i] == name).unwrap();
                    at[i] = Some(wave);
                }
            }
            for i in 0..recorded.len() {
                for j in 0..i {
                    let (a, b) = (&recorded[j], &recorded[i]);
                    assert_eq!(a.conflicts(b), b.conflicts(a));
                    assert!(!a.conflicts(b) || at[j] < at[i], "{} and {} in {waves:?}", names[j], names[i]);
                }
            }
        }
    }

    #[test]
    fn buffers_of_one_wave_never_overlap_and_dead_ones_are_reused() {
        // A chain of ten buffers needs room for two at a time only.
        let ops: Vec<Op> = (0..9).map(|i| add(i, i, i + 1)).collect();
        let plan = Plan::new(ops, vec![decl(4); 10], Some(Buf(9)), None);
        assert_eq!(plan.arena_width[0], 8);
        for wave in &plan.waves {
            for op in &plan.ops[wave.clone()] {
                for w in op.writes(|b| plan.width(b)) {
                    for r in op.reads() {
                        let (a, b) = (plan.columns(w.buf), plan.columns(r));
                        assert!(a.end <= b.start || b.end <= a.start, "{op:?} overlaps in the arena");
                    }
                }
            }
        }
    }

    #[test]
    fn taps_and_outputs_outlive_every_wave() {
        let mut ops = vec![place(0, 1, 0)];
        ops.extend((2..9).map(|i| add(if i == 2 { 0 } else { i - 1 }, 0, i)));
        let mut bufs = vec![decl(4); 9];
        bufs[1] = decl(8);
        let plan = Plan::new(ops, bufs, Some(Buf(8)), Some(Buf(1)));
        let taps = plan.columns(Buf(1));
        for buf in (0..9).filter(|&b| b != 1).map(Buf) {
            let other = plan.columns(buf);
            assert!(taps.end <= other.start || other.end <= taps.start, "{buf} lies over the taps");
        }
    }
}
