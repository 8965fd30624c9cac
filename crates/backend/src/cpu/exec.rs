//! Replaying a plan: waves of tiles over a thread team.

use std::{ops::Range, sync::Arc};

use paceline_kernels::{
    KernelTable, SharedMut, Team,
    kv::KvBytes,
    packed::{PackedTable, QuantRows, RowWriter},
    summary::{CHUNK, Summary},
};

use crate::{Buf, Exec, KvTypes, Lane, LaneCells, Op, Plan, RowSummary, Rows, Step, StepOut, WeightId};

use super::{
    moe::Groups,
    ops::{CpuOp, row_chunk},
    quant::{Store, Work, schedule},
    ropes::Ropes,
    states::CpuStates,
    weights::Weight,
};

/// Waves of less estimated work than this run on the calling thread: sharing one costs about a microsecond, more
/// if a thread sleeps.
pub(super) const SHARE_FROM: Nanos = 4_000;

/// Estimated time of one thread. Only the choice between sharing a wave and not depends on it, never a value.
pub(super) type Nanos = usize;

/// The kernels of one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub table: &'static KernelTable,
    pub packed: &'static PackedTable,
}

/// A plan on the CPU. One serves every number of rows.
pub(super) struct CpuExec {
    plan: Arc<Plan>,
    /// What lanes must have pages for.
    cells: LaneCells,
    tasks: Vec<Task>,
    waves: Vec<Wave>,
    states: CpuStates,
    team: Arc<Team>,
    kernels: Kernels,
    /// Arenas of batch and of output rows: buffer `b` lies at `offset(b) · n` and has `width(b) · n` values.
    arenas: [Vec<f32>; 2],
    /// What the stores hold, and the stores.
    shapes: Vec<Store>,
    stores: Vec<QuantRows>,
    /// What each router of the plan chose.
    groups: Vec<Groups>,
    share_from: Nanos,
    ropes: Ropes,
    /// For each task of a wave, the number of tiles up to its end.
    ends: Vec<usize>,
    /// Memory for the writers of a wave; empty between waves.
    writers: Vec<RowWriter<'static>>,
    /// Summaries of the chunks of the output rows.
    chunks: Vec<Summary>,
}

/// Tasks between two barriers.
struct Wave {
    tasks: Range<usize>,
    /// Stores that they fill, all different, in the order of the tasks.
    fills: Vec<usize>,
    /// Choices of routers to group before they start.
    groups: Vec<usize>,
}

/// A piece of a wave that falls into tiles.
struct Task {
    kind: Kind,
    /// The writers of the stores that it fills, among those of the wave.
    fills: Range<usize>,
}

#[allow(clippy::large_enum_variant)] // nearly all are ops
enum Kind {
    Op(CpuOp),
    /// Fills stores with what is in a buffer.
    Quantize(Buf),
}

impl Task {
    fn n_tiles(&self, cx: &Cx<'_>, n_threads: usize) -> usize {
        match &self.kind {
            Kind::Op(op) => op.n_tiles(cx, n_threads),
            Kind::Quantize(buf) => cx.n_rows(*buf).div_ceil(row_chunk(cx.plan.width(*buf))),
        }
    }

    fn prepare(&self, cx: &Cx<'_>, n_threads: usize) {
        if let Kind::Op(op) = &self.kind {
            op.prepare(cx, n_threads);
        }
    }

    fn work(&self, cx: &Cx<'_>) -> Nanos {
        match &self.kind {
            Kind::Op(op) => op.work(cx),
            Kind::Quantize(buf) => cx.n_rows(*buf) * cx.plan.width(*buf) / 4,
        }
    }

    fn run(&self, cx: &Cx<'_>, writers: &[RowWriter<'_>], n_threads: usize, tile: usize) {
        let writers = &writers[self.fills.clone()];
        match &self.kind {
            Kind::Op(op) => op.run(cx, writers, n_threads, tile),
            Kind::Quantize(buf) => {
                let chunk = row_chunk(cx.plan.width(*buf));
                for row in tile * chunk..((tile + 1) * chunk).min(cx.n_rows(*buf)) {
                    // SAFETY: rows are dealt out once each, and no other task of the wave has these writers.
                    unsafe { cx.quantize(writers, *buf, row) };
                }
            }
        }
    }
}

/// What every tile of a step sees.
pub(super) struct Cx<'a> {
    pub plan: &'a Plan,
    pub step: &'a Step<'a>,
    pub table: &'static KernelTable,
    pub packed: &'static PackedTable,
    pub page_len: usize,
    pub kv: KvTypes,
    pub pages: SharedMut<'a, Option<KvBytes>>,
    pub slots: SharedMut<'a, f32>,
    pub windows: SharedMut<'a, f32>,
    pub ropes: &'a Ropes,
    arenas: [SharedMut<'a, f32>; 2],
    /// What the step hands out, output and taps: computed where the caller keeps it.
    results: [SharedMut<'a, f32>; 2],
    stores: SharedMut<'a, QuantRows>,
    groups: SharedMut<'a, Groups>,
}

impl Cx<'_> {
    /// Rows that `buf` has in this step.
    pub fn n_rows(&self, buf: Buf) -> usize {
        match self.plan.rows(buf) {
            Rows::Batch => self.step.n_rows(),
            Rows::Output => self.step.outputs.len(),
        }
    }

    /// The lane that has row `row`.
    pub fn lane_of(&self, row: usize) -> &Lane<'_> {
        &self.step.lanes[self.step.lanes.partition_point(|lane| lane.rows.end <= row)]
    }

    /// Row `row` of `buf`, to read.
    pub fn row(&self, buf: Buf, row: usize) -> &[f32] {
        let width = self.plan.width(buf);
        &self.all(buf)[row * width..(row + 1) * width]
    }

    /// All rows of `buf`, to read.
    pub fn all(&self, buf: Buf) -> &[f32] {
        let (memory, start) = self.place(buf);
        // SAFETY: the plan's waves put no writer of a buffer beside a reader, and its placement gives buffers of
        // one wave disjoint columns.
        unsafe { memory.get(start..start + self.n_rows(buf) * self.plan.width(buf)) }
    }

    /// Values `columns` of row `row` of `buf`, to write.
    ///
    /// # Safety
    /// Nothing else may read or write these values while the slice lives: the caller is the one tile of the op
    /// that writes them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut(&self, buf: Buf, row: usize, columns: Range<usize>) -> &mut [f32] {
        let (n, width) = (self.n_rows(buf), self.plan.width(buf));
        assert!(row < n && columns.end <= width, "row {row} of {n}, columns {columns:?} of {width}");
        let (memory, first) = self.place(buf);
        let start = first + row * width;
        // SAFETY: handed on to the caller.
        unsafe { memory.range(start + columns.start..start + columns.end) }
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

    /// The memory that `buf` lies in, with the place of its first value: row `r` is `r` widths behind.
    pub fn place(&self, buf: Buf) -> (&SharedMut<'_, f32>, usize) {
        if let Some(result) = [self.plan.output, self.plan.taps].iter().position(|kept| *kept == Some(buf)) {
            return (&self.results[result], 0);
        }
        let arena = self.plan.rows(buf) as usize;
        (&self.arenas[arena], self.plan.columns(buf).start * self.n_rows(buf))
    }

    fn page_data(&self, id: u32) -> &KvBytes {
        // SAFETY: pages come and go between steps only; nothing takes the list itself to write.
        match unsafe { &self.pages.get(id as usize..id as usize + 1)[0] } {
            Some(page) => page,
            None => panic!("KV page {id} has no storage"),
        }
    }

    /// Bytes of a page, to read.
    ///
    /// # Safety
    /// No op of this wave writes pages.
    pub unsafe fn page(&self, id: u32, bytes: Range<usize>) -> &[u8] {
        &self.page_data(id).bytes()[bytes]
    }

    /// Bytes of a page, to write.
    ///
    /// # Safety
    /// No op of this wave reads pages, and the caller is the one tile that writes these bytes.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn page_mut(&self, id: u32, bytes: Range<usize>) -> &mut [u8] {
        // SAFETY: handed on to the caller.
        unsafe { self.page_data(id).part_mut(bytes) }
    }

    /// What a store holds.
    pub fn quantized(&self, store: usize) -> &QuantRows {
        // SAFETY: a store has no reader in the wave that fills it (asserted in `CpuExec::new`), and writers are gone when
        // their wave is over.
        unsafe { &self.stores.get(store..store + 1)[0] }
    }

    /// What a router chose.
    pub fn groups(&self, router: usize) -> &Groups {
        // SAFETY: written between waves, when nobody reads (`CpuExec::run`).
        unsafe { &self.groups.get(router..router + 1)[0] }
    }

    /// Row `row` of `buf` into stores, in parts where a store's rows are narrower.
    ///
    /// # Safety
    /// Nothing else may write this row of these stores, or `buf`'s, at the same time.
    pub unsafe fn quantize(&self, writers: &[RowWriter<'_>], buf: Buf, row: usize) {
        for writer in writers {
            let parts = self.row(buf, row).chunks_exact(writer.n_in());
            let first = row * parts.len();
            for (part, x) in parts.enumerate() {
                // SAFETY: handed on to the caller.
                unsafe { writer.quantize(self.packed, first + part, x) };
            }
        }
    }
}

impl CpuExec {
    pub fn new(
        plan: Arc<Plan>,
        states: CpuStates,
        team: Arc<Team>,
        kernels: Kernels,
        packs: bool,
        weight: impl Fn(WeightId) -> Arc<Weight>,
    ) -> CpuExec {
        let schedule = schedule(&plan, |i| match plan.ops[i] {
            Op::MatMul { weight: id, .. } | Op::ExpertMatMul { weight: id, .. } if packs => {
                weight(id).packed().map(|matrix| matrix.grain())
            }
            _ => None,
        });
        let (mut tasks, mut waves, mut ropes) = (Vec::new(), Vec::new(), Ropes::default());
        let mut groups: Vec<Groups> = Vec::new();
        let mut places = Vec::new();
        for items in schedule.waves {
            let first = tasks.len();
            let (mut fills, mut reads) = (Vec::new(), Vec::new());
            let n_grouped = groups.len();
            let mut n_attending = 0;
            for item in items {
                let kind = match item.work {
                    Work::Op(i) => {
                        reads.extend(schedule.reads[i]);
                        let op =
                            CpuOp::new(&plan.ops[i], schedule.reads[i], &plan, &states, &mut ropes, &weight);
                        Kind::Op(op.with_groups(&mut groups).with_parts(&mut places, &mut n_attending))
                    }
                    Work::Quantize(buf) => Kind::Quantize(buf),
                };
                let start = fills.len();
                fills.extend(item.fills);
                tasks.push(Task { kind, fills: start..fills.len() });
            }
            let alone = |i: usize| !fills[..i].contains(&fills[i]) && !reads.contains(&fills[i]);
            assert!((0..fills.len()).all(alone), "a wave fills stores {fills:?} and reads {reads:?}");
            let groups = (n_grouped..groups.len()).collect();
            waves.push(Wave { tasks: first..tasks.len(), fills, groups });
        }
        CpuExec {
            cells: plan.lane_cells(),
            plan,
            tasks,
            waves,
            states,
            team,
            kernels,
            arenas: [Vec::new(), Vec::new()],
            stores: schedule.stores.iter().map(|_| QuantRows::new()).collect(),
            shapes: schedule.stores,
            groups,
            share_from: SHARE_FROM,
            ropes,
            ends: Vec::new(),
            writers: Vec::new(),
            chunks: Vec::new(),
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
        step.check(config.page_len, self.cells);
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
        for (store, shape) in self.stores.iter_mut().zip(&self.shapes) {
            let n = [step.n_rows(), step.outputs.len()][shape.rows as usize];
            store.reset(shape.grain, n * shape.parts, shape.width);
        }
        self.ropes.turn_to(step.positions);
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
        let [batch, output] = &mut self.arenas;
        let size = |kept: Option<Buf>| {
            kept.map_or([0; 2], |buf| {
                let n = [step.n_rows(), step.outputs.len()][plan.rows(buf) as usize];
                [n, plan.width(buf)]
            })
        };
        for (kept, values, width) in [
            (plan.output, &mut out.output, &mut out.output_width),
            (plan.taps, &mut out.taps, &mut out.taps_width),
        ] {
            let [n, w] = size(kept);
            values.resize(n * w, 0.0);
            if cfg!(debug_assertions) {
                values.fill(f32::NAN);
            }
            *width = w;
        }
        let cx = Cx {
            plan,
            step,
            table: self.kernels.table,
            packed: self.kernels.packed,
            page_len: config.page_len,
            kv: config.kv,
            pages: SharedMut::new(&mut inner.pages),
            slots: SharedMut::new(&mut inner.slots),
            windows: SharedMut::new(&mut inner.windows),
            ropes: &self.ropes,
            arenas: [SharedMut::new(batch), SharedMut::new(output)],
            results: [SharedMut::new(&mut out.output), SharedMut::new(&mut out.taps)],
            stores: SharedMut::new(&mut self.stores),
            groups: SharedMut::new(&mut self.groups),
        };
        let n_threads = self.team.n_threads();
        let mut writers: Vec<RowWriter<'_>> = std::mem::take(&mut self.writers);
        for wave in &self.waves {
            let tasks = &self.tasks[wave.tasks.clone()];
            for &router in &wave.groups {
                // SAFETY: the wave before is over, and only later ones read what this router chose.
                let groups = unsafe { &mut cx.groups.range(router..router + 1)[0] };
                groups.group(cx.all(groups.ids));
            }
            writers.extend(wave.fills.iter().map(|&store| {
                // SAFETY: the stores of a wave are all different and not read in it (asserted in `new`).
                unsafe { &mut cx.stores.range(store..store + 1)[0] }.writer()
            }));
            if n_threads == 1 || tasks.iter().map(|task| task.work(&cx)).sum::<Nanos>() < self.share_from {
                for task in tasks {
                    (0..task.n_tiles(&cx, 1)).for_each(|tile| task.run(&cx, &writers, 1, tile));
                }
            } else {
                // The tiles of a wave's tasks, one after the other, so that a short one leaves nobody waiting.
                self.ends.clear();
                let mut n_tiles = 0;
                for task in tasks {
                    task.prepare(&cx, n_threads);
                    n_tiles += task.n_tiles(&cx, n_threads);
                    self.ends.push(n_tiles);
                }
                let (ends, writers) = (&self.ends, &writers);
                self.team.for_each(n_tiles, &|tile| {
                    let at = ends.partition_point(|&end| end <= tile);
                    let first = if at == 0 { 0 } else { ends[at - 1] };
                    tasks[at].run(&cx, writers, n_threads, tile - first);
                });
            }
            writers.clear();
        }
        // The same memory, for writers of another lifetime: collecting in place allocates nothing.
        self.writers = writers.into_iter().map(|_| unreachable!("cleared after each wave")).collect();
        out.n_experts_read = (0..cx.groups.len()).map(|router| cx.groups(router).n_chosen()).sum();
        summarize(&mut self.chunks, &self.team, self.kernels.table, self.share_from, out);
    }
}

/// Summarises the output rows, all threads together.
fn summarize(
    chunks: &mut Vec<Summary>,
    team: &Team,
    table: &KernelTable,
    share_from: Nanos,
    out: &mut StepOut,
) {
    let StepOut { output, output_width, summaries, .. } = out;
    summaries.clear();
    if output.is_empty() {
        return;
    }
    let per_row = output_width.div_ceil(CHUNK);
    let n_chunk = output.len() / *output_width * per_row;
    chunks.resize(n_chunk, Summary::EMPTY);
    let chunk = |i: usize| {
        let row = &output[i / per_row * *output_width..(i / per_row + 1) * *output_width];
        &row[i % per_row * CHUNK..row.len().min((i % per_row + 1) * CHUNK)]
    };
    let parts = SharedMut::new(chunks);
    // SAFETY: each chunk's place is written by the one tile that has the chunk.
    let tile = |i: usize| (table.rows.summarize)(chunk(i), &mut unsafe { parts.range(i..i + 1) }[0]);
    if output.len() / 2 < share_from {
        (0..n_chunk).for_each(tile);
    } else {
        team.for_each(n_chunk, &tile);
    }
    let rows = output.chunks_exact(*output_width).zip(chunks.chunks_exact(per_row));
    summaries.extend(rows.map(|(row, parts)| RowSummary::new(row, parts.iter().copied())));
}
