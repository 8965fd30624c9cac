//! Replaying a plan: waves of tiles over a thread team.

use std::sync::Arc;

use paceline_kernels::{KernelTable, SharedMut, Team};

use crate::{Buf, Exec, Plan, Rows, Step, StepOut, WeightId};

use super::{
    ops::CpuOp,
    states::{CpuStates, PageData},
    weights::Weight,
};

/// Waves of less estimated work than this run on the calling thread: sharing one costs about a microsecond, more
/// if a thread sleeps.
pub(super) const SHARE_FROM: Nanos = 4_000;

/// Estimated time of one thread. Only the choice between sharing a wave and not depends on it, never a value.
pub(super) type Nanos = usize;

/// A plan on the CPU. One serves every number of rows.
pub(super) struct CpuExec {
    plan: Arc<Plan>,
    ops: Vec<CpuOp>,
    states: CpuStates,
    team: Arc<Team>,
    table: &'static KernelTable,
    /// Arenas of batch and of output rows: buffer `b` lies at `offset(b) · n` and has `width(b) · n` values.
    arenas: [Vec<f32>; 2],
    share_from: Nanos,
    /// Lane of each row of the step.
    lane_of_row: Vec<u32>,
    /// For each op of a wave, the number of tiles up to its end.
    ends: Vec<usize>,
}

/// What every tile of a step sees.
pub(super) struct Cx<'a> {
    pub plan: &'a Plan,
    pub step: &'a Step<'a>,
    pub table: &'static KernelTable,
    pub page_len: usize,
    pub pages: SharedMut<'a, Option<PageData>>,
    pub slots: SharedMut<'a, f32>,
    pub windows: SharedMut<'a, f32>,
    pub lane_of_row: &'a [u32],
    arenas: [SharedMut<'a, f32>; 2],
}

impl Cx<'_> {
    /// Rows that `buf` has in this step.
    pub fn n_rows(&self, buf: Buf) -> usize {
        match self.plan.rows(buf) {
            Rows::Batch => self.step.n_rows(),
            Rows::Output => self.step.outputs.len(),
        }
    }

    /// Row `row` of `buf`, to read.
    pub fn row(&self, buf: Buf, row: usize) -> &[f32] {
        let width = self.plan.width(buf);
        &self.all(buf)[row * width..(row + 1) * width]
    }

    /// All rows of `buf`, to read.
    pub fn all(&self, buf: Buf) -> &[f32] {
        let (n, columns) = (self.n_rows(buf), self.plan.columns(buf));
        // SAFETY: the plan's waves put no writer of a buffer beside a reader, and its placement gives buffers of
        // one wave disjoint columns.
        unsafe { self.arenas[self.plan.rows(buf) as usize].get(columns.start * n..columns.end * n) }
    }

    /// Values `columns` of row `row` of `buf`, to write.
    ///
    /// # Safety
    /// Nothing else may read or write these values while the slice lives: the caller is the one tile of the op
    /// that writes them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut(&self, buf: Buf, row: usize, columns: std::ops::Range<usize>) -> &mut [f32] {
        let (n, width) = (self.n_rows(buf), self.plan.width(buf));
        assert!(row < n && columns.end <= width, "row {row} of {n}, columns {columns:?} of {width}");
        let start = self.plan.columns(buf).start * n + row * width;
        // SAFETY: handed on to the caller.
        unsafe { self.arenas[self.plan.rows(buf) as usize].range(start + columns.start..start + columns.end) }
    }

    /// Row `row` of `buf`, to write.
    ///
    /// # Safety
    /// As for [`part_mut`](Self::part_mut).
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_mut(&self, buf: Buf, row: usize) -> &mut [f32] {
        // SAFETY: handed on to the caller.
        unsafe { self.part_mut(buf, row, 0..self.plan.width(buf)) }
    }
}

impl CpuExec {
    pub fn new(
        plan: Arc<Plan>,
        states: CpuStates,
        team: Arc<Team>,
        table: &'static KernelTable,
        weight: impl Fn(WeightId) -> Arc<Weight>,
    ) -> CpuExec {
        let ops = plan.ops.iter().map(|op| CpuOp::new(op, &plan, &states, &weight)).collect();
        CpuExec {
            plan,
            ops,
            states,
            team,
            table,
            arenas: [Vec::new(), Vec::new()],
            share_from: SHARE_FROM,
            lane_of_row: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// Shares waves from this much estimated work on.
    pub fn share_from(self, share_from: Nanos) -> CpuExec {
        CpuExec { share_from, ..self }
    }
}

impl Exec for CpuExec {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        let config = crate::States::config(&self.states);
        step.check(config.page_len);
        let plan = &*self.plan;
        let sizes = plan.arena_width.into_iter().zip([step.n_rows(), step.outputs.len()]);
        for (arena, (width, n)) in self.arenas.iter_mut().zip(sizes) {
            if arena.len() < width * n {
                arena.resize(width * n, 0.0);
            }
            if cfg!(debug_assertions) {
                // Whoever reads what no op of this step wrote shall notice.
                arena.fill(f32::NAN);
            }
        }
        let mut inner = self.states.lock();
        let inner = &mut *inner;
        self.lane_of_row.resize(step.n_rows(), 0);
        for (i, lane) in step.lanes.iter().enumerate() {
            self.lane_of_row[lane.rows.clone()].fill(i as u32);
            if let Some(slot) = lane.slot {
                let n_tentative = lane.rows.len() - lane.n_certain;
                assert!(
                    n_tentative <= config.n_tentative_max,
                    "{n_tentative} tentative rows in a window of {}",
                    config.n_tentative_max
                );
                inner.n_tentative[slot.0 as usize] = n_tentative;
            }
        }
        let [batch, output] = &mut self.arenas;
        let cx = Cx {
            plan,
            step,
            table: self.table,
            page_len: config.page_len,
            pages: SharedMut::new(&mut inner.pages),
            slots: SharedMut::new(&mut inner.slots),
            windows: SharedMut::new(&mut inner.windows),
            lane_of_row: &self.lane_of_row,
            arenas: [SharedMut::new(batch), SharedMut::new(output)],
        };
        let n_threads = self.team.n_threads();
        for wave in &plan.waves {
            let ops = &self.ops[wave.clone()];
            if n_threads == 1 || ops.iter().map(|op| op.work(&cx)).sum::<Nanos>() < self.share_from {
                for op in ops {
                    (0..op.n_tiles(&cx, 1)).for_each(|tile| op.run(&cx, 1, tile));
                }
                continue;
            }
            // The tiles of a wave's ops, one after the other, so that a short op leaves nobody waiting.
            self.ends.clear();
            let mut n_tiles = 0;
            for op in ops {
                n_tiles += op.n_tiles(&cx, n_threads);
                self.ends.push(n_tiles);
            }
            let ends = &self.ends;
            self.team.for_each(n_tiles, &|tile| {
                let at = ends.partition_point(|&end| end <= tile);
                let first = if at == 0 { 0 } else { ends[at - 1] };
                ops[at].run(&cx, n_threads, tile - first);
            });
        }
        let copy = |buf: Option<Buf>, to: &mut Vec<f32>| {
            to.clear();
            buf.map_or(0, |buf| {
                to.extend_from_slice(cx.all(buf));
                plan.width(buf)
            })
        };
        out.output_width = copy(plan.output, &mut out.output);
        out.taps_width = copy(plan.taps, &mut out.taps);
    }
}
