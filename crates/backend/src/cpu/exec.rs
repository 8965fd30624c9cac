//! Replaying a plan: waves of tiles over a thread team.

use std::sync::Arc;

use paceline_kernels::{KernelTable, SharedMut, Team};

use crate::{Buf, Exec, Plan, Rows, Step, StepOut, WeightId};

use super::{
    ops::CpuOp,
    states::{CpuStates, PageData},
    weights::Weight,
};

/// A plan on the CPU. One serves every number of rows.
pub(super) struct CpuExec {
    plan: Arc<Plan>,
    ops: Vec<CpuOp>,
    states: CpuStates,
    team: Arc<Team>,
    table: &'static KernelTable,
    /// Arenas of batch and of output rows: buffer `b` lies at `offset(b) · n` and has `width(b) · n` values.
    arenas: [Vec<f32>; 2],
}

/// What every tile of a step sees.
pub(super) struct Cx<'a> {
    pub plan: &'a Plan,
    pub step: &'a Step<'a>,
    pub table: &'static KernelTable,
    pub page_len: usize,
    pub n_tentative_max: usize,
    pub pages: SharedMut<'a, Option<PageData>>,
    pub slot_data: Vec<SharedMut<'a, f32>>,
    pub slot_window: Vec<SharedMut<'a, f32>>,
    /// Lane of each row.
    pub lane_of_row: Vec<u32>,
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
        CpuExec { plan, ops, states, team, table, arenas: [Vec::new(), Vec::new()] }
    }
}

impl Exec for CpuExec {
    fn run(&mut self, step: &Step<'_>, out: &mut StepOut) {
        let config = crate::States::config(&self.states);
        step.check(config.page_len);
        let plan = &*self.plan;
        for (arena, (width, n)) in
            self.arenas.iter_mut().zip(plan.arena_width.into_iter().zip([step.n_rows(), step.outputs.len()]))
        {
            if arena.len() < width * n {
                arena.resize(width * n, 0.0);
            }
        }
        let mut inner = self.states.lock();
        let inner = &mut *inner;
        for lane in step.lanes {
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
        let (slot_data, slot_window) = inner
            .slots
            .iter_mut()
            .map(|store| (SharedMut::new(&mut store.data), SharedMut::new(&mut store.window)))
            .unzip();
        let mut lane_of_row = vec![0; step.n_rows()];
        for (i, lane) in step.lanes.iter().enumerate() {
            lane_of_row[lane.rows.clone()].fill(i as u32);
        }
        let [batch, output] = &mut self.arenas;
        let cx = Cx {
            plan,
            step,
            table: self.table,
            page_len: config.page_len,
            n_tentative_max: config.n_tentative_max,
            pages: SharedMut::new(&mut inner.pages),
            slot_data,
            slot_window,
            lane_of_row,
            arenas: [SharedMut::new(batch), SharedMut::new(output)],
        };
        let mut ends = Vec::new();
        for wave in &plan.waves {
            // The tiles of a wave's ops, one after the other, so that a short op leaves nobody waiting.
            ends.clear();
            let mut n_tiles = 0;
            for op in &self.ops[wave.clone()] {
                n_tiles += op.n_tiles(&cx, self.team.n_threads());
                ends.push(n_tiles);
            }
            self.team.for_each(n_tiles, &|tile| {
                let at = ends.partition_point(|&end| end <= tile);
                let first = if at == 0 { 0 } else { ends[at - 1] };
                self.ops[wave.start + at].run(&cx, self.team.n_threads(), tile - first);
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
