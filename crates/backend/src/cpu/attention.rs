//! Attention and what it reads: tiles of query rows and the KV head that they share, over pages.
//!
//! A tile is some rows of one lane with all query heads of one KV head, so that the head's cells are read once for all of
//! them. Where there are fewer such tiles than threads could use, each is cut further into the [`SPAN`]s of its
//! cells; whoever finishes the last span of a tile merges them, in order. The sums of spans are merged in that order in any case, so
//! this changes no bit.

use std::{
    cell::RefCell,
    ops::Range,
    sync::{
        RwLock,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use paceline_kernels::attention::{KvHead, Part, QueryTile, SPAN, SUMS, padded};

use crate::{AttentionOp, BlockMask, Buf, Lane, first_cell};

use super::exec::{Cx, Nanos};

/// Queries of a tile: so many that reading cells costs little beside computing with them, and so few that they and their
/// sums stay in the second-level cache.
const QUERIES: usize = 128;
/// Tiles for a thread, below which they are cut into spans.
const TILES_PER_THREAD: usize = 3;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    tile: QueryTile,
    /// A [`Part`] read back.
    part: Vec<f32>,
}

/// Where a KV state lies in a page.
#[derive(Clone, Copy)]
pub(super) struct KvPlace {
    /// Which of a sequence's page tables.
    pub class: usize,
    /// First bytes of keys and of values.
    pub offsets: [usize; 2],
    pub n_head: usize,
    pub head_dim: usize,
}

impl KvPlace {
    /// Writes the keys and the values of head `head` of a lane's rows to their cells.
    pub fn append(self, cx: &Cx<'_>, lane: &Lane<'_>, head: usize, k: Buf, v: Buf) {
        let columns = head * self.head_dim..(head + 1) * self.head_dim;
        let value_bytes = cx.kv.v.row_bytes(self.head_dim);
        let [keys, values] = self.head_bytes(cx, head);
        let table = &lane.tables[self.class];
        for (i, row) in lane.rows.clone().enumerate() {
            let cell = lane.n_past + i;
            let (id, in_page) = (table.page(cell / cx.page_len).0, cell % cx.page_len);
            // SAFETY: pages that a lane writes are its own (`memory` copies shared ones first), the tile of a lane and a head alone
            // writes the head's cells, and no other op of this wave touches pages (`StateAccess::conflicts`).
            unsafe {
                cx.kv.k.write_key(&cx.row(k, row)[columns.clone()], in_page, cx.page_mut(id, keys.clone()));
                let at = values.start + in_page * value_bytes;
                cx.kv.v.write(&cx.row(v, row)[columns.clone()], cx.page_mut(id, at..at + value_bytes));
            }
        }
    }

    /// Where a page has the keys and the values of a head.
    fn head_bytes(self, cx: &Cx<'_>, head: usize) -> [Range<usize>; 2] {
        let bytes = cx.kv.head_bytes(self.head_dim, cx.page_len);
        [0, 1].map(|part| {
            let at = self.offsets[part] + head * bytes[part];
            at..at + bytes[part]
        })
    }
}

/// What tiles that share a read of one KV head leave for each other: the sums of each query over each span, and how many spans
/// are done. In use while its op runs, so ops of different waves have one between them: over a long context these are megabytes. Atomics, for it is written by whoever has the span and read by whoever comes last.
#[derive(Default)]
pub(super) struct SpanParts(RwLock<Parts>);

#[derive(Default)]
struct Parts {
    /// `[unit, span, query, PART]`, bits of floats.
    values: Vec<AtomicU32>,
    /// Spans that are done, by unit.
    done: Vec<AtomicUsize>,
}

/// One attention op.
pub(super) struct Attention<'a> {
    pub op: &'a AttentionOp,
    pub place: KvPlace,
    pub sinks: Option<&'a [f32]>,
    pub parts: &'a SpanParts,
}

/// Rows of a lane that share their reads.
struct Rows<'a> {
    lane: &'a Lane<'a>,
    rows: Range<usize>,
}

impl Attention<'_> {
    fn per_kv(&self) -> usize {
        self.op.n_head / self.place.n_head
    }

    fn rows_at_once(&self) -> usize {
        (QUERIES / self.per_kv()).max(1)
    }

    /// Groups of rows times KV heads: tiles, before they are cut into spans.
    fn n_units(&self, cx: &Cx<'_>) -> usize {
        let groups = |lane: &Lane<'_>| lane.rows.len().div_ceil(self.rows_at_once());
        cx.step.lanes.iter().map(groups).sum::<usize>() * self.place.n_head
    }

    /// Spans that tiles are cut into: 1 if they are not.
    fn n_spans(&self, cx: &Cx<'_>, n_threads: usize) -> usize {
        if n_threads == 1 || self.n_units(cx) >= TILES_PER_THREAD * n_threads {
            return 1;
        }
        let spans = |lane: &Lane<'_>| (lane.n_past + lane.rows.len()).div_ceil(SPAN) - self.first_span(lane);
        cx.step.lanes.iter().map(spans).max().unwrap_or(1).max(1)
    }

    /// The first span that a row of the lane sees a cell of.
    fn first_span(&self, lane: &Lane<'_>) -> usize {
        first_cell(self.op.window, lane.n_past) / SPAN
    }

    pub fn n_tiles(&self, cx: &Cx<'_>, n_threads: usize) -> usize {
        self.n_units(cx) * self.n_spans(cx, n_threads)
    }

    fn part_len(&self) -> usize {
        1 + SUMS + padded(self.place.head_dim)
    }

    /// Makes room for the spans' sums. A step that is longer than all before it allocates.
    pub fn prepare(&self, cx: &Cx<'_>, n_threads: usize) {
        let (n_units, n_spans) = (self.n_units(cx), self.n_spans(cx, n_threads));
        if n_spans == 1 {
            return;
        }
        // A panic elsewhere leaves sums that nobody reads.
        let mut parts = self.parts.0.write().unwrap_or_else(|e| e.into_inner());
        let n = n_units * n_spans * self.queries_at_most(cx) * self.part_len();
        if parts.values.len() < n {
            parts.values.resize_with(n, AtomicU32::default);
        }
        if parts.done.len() < n_units {
            parts.done.resize_with(n_units, AtomicUsize::default);
        }
        parts.done.iter_mut().for_each(|done| *done.get_mut() = 0);
    }

    /// Queries of the largest tile of the step.
    fn queries_at_most(&self, cx: &Cx<'_>) -> usize {
        let n_row = cx.step.lanes.iter().map(|lane| lane.rows.len()).max().unwrap_or(0);
        n_row.min(self.rows_at_once()) * self.per_kv()
    }

    pub fn work(&self, cx: &Cx<'_>) -> Nanos {
        let (op, place) = (self.op, self.place);
        let lanes = cx.step.lanes.iter().map(|lane| {
            let cells =
                op.window.map_or(usize::MAX, |w| w + lane.rows.len()).min(lane.n_past + lane.rows.len());
            // Reading keys and values, and two products with each of them.
            let bytes = cells * place.n_head * cx.kv.cell_bytes(place.head_dim);
            bytes / 16 + lane.rows.len() * cells * op.n_head * place.head_dim / 16
        });
        lanes.sum()
    }

    pub fn run(&self, cx: &Cx<'_>, n_threads: usize, tile: usize) {
        let n_spans = self.n_spans(cx, n_threads);
        let (unit, span) = (tile / n_spans, tile % n_spans);
        let (group, head_kv) = (unit / self.place.n_head, unit % self.place.n_head);
        let rows = self.rows(cx, group);
        let first_span = self.first_span(rows.lane);
        SCRATCH.with_borrow_mut(|Scratch { tile, part }| {
            let page = |i: usize| self.page(cx, rows.lane, head_kv, i);
            let kv =
                KvHead { types: cx.kv, head_dim: self.place.head_dim, page_len: cx.page_len, page: &page };
            self.queries(cx, &rows, head_kv, tile);
            if n_spans == 1 {
                tile.attend(cx.table, kv);
                return self.finish(cx, &rows, head_kv, tile);
            }
            let parts = self.parts.0.read().unwrap_or_else(|e| e.into_inner());
            let n_queries = rows.rows.len() * self.per_kv();
            let queries_at_most = self.queries_at_most(cx);
            let place = |span: usize, i: usize| {
                let at = ((unit * n_spans + span - first_span) * queries_at_most + i) * self.part_len();
                &parts.values[at..at + self.part_len()]
            };
            let span = first_span + span;
            if tile.spans().contains(&span) {
                tile.attend_span(cx.table, kv, span);
                for i in 0..n_queries {
                    let Part { max, weight, value } = tile.part(i);
                    let values = std::iter::once(&max).chain(weight).chain(value);
                    place(span, i)
                        .iter()
                        .zip(values)
                        .for_each(|(to, x)| to.store(x.to_bits(), Ordering::Relaxed));
                }
            }
            // The last one sees what all others have stored.
            if parts.done[unit].fetch_add(1, Ordering::AcqRel) + 1 < n_spans {
                return;
            }
            tile.reset();
            for span in tile.spans() {
                for i in 0..n_queries {
                    if !tile.sees(i, span) {
                        continue;
                    }
                    part.clear();
                    part.extend(place(span, i).iter().map(|x| f32::from_bits(x.load(Ordering::Relaxed))));
                    let (weight, value) = part[1..].split_at(SUMS);
                    tile.merge(i, Part { max: part[0], weight, value });
                }
            }
            self.finish(cx, &rows, head_kv, tile);
        });
    }

    /// The rows of group `group`.
    fn rows<'s>(&self, cx: &Cx<'s>, mut group: usize) -> Rows<'s> {
        let at_once = self.rows_at_once();
        for lane in cx.step.lanes {
            let n_groups = lane.rows.len().div_ceil(at_once);
            if group < n_groups {
                let start = lane.rows.start + group * at_once;
                return Rows { lane, rows: start..lane.rows.end.min(start + at_once) };
            }
            group -= n_groups;
        }
        unreachable!("tiles are counted by the same rule")
    }

    fn queries(&self, cx: &Cx<'_>, rows: &Rows<'_>, head_kv: usize, tile: &mut QueryTile) {
        let head_dim = self.place.head_dim;
        tile.start(head_dim, None);
        for row in rows.rows.clone() {
            let visible = visible_cells(rows.lane, row - rows.lane.rows.start, self.op.mask, self.op.window);
            for head in self.heads(head_kv) {
                let q = &cx.row(self.op.q, row)[head * head_dim..(head + 1) * head_dim];
                tile.push(q, self.op.scale, visible.clone());
            }
        }
    }

    fn finish(&self, cx: &Cx<'_>, rows: &Rows<'_>, head_kv: usize, tile: &QueryTile) {
        let head_dim = self.place.head_dim;
        let mut i = 0;
        for row in rows.rows.clone() {
            for head in self.heads(head_kv) {
                // SAFETY: whoever finishes a tile alone writes the heads of this group in its rows, each once.
                let out = unsafe { cx.part_mut(self.op.dst, row, head * head_dim..(head + 1) * head_dim) };
                tile.finish(i, self.sinks.map(|sinks| sinks[head]), out);
                i += 1;
            }
        }
    }

    fn heads(&self, head_kv: usize) -> Range<usize> {
        head_kv * self.per_kv()..(head_kv + 1) * self.per_kv()
    }

    /// A head's keys and values in page `i` of a lane.
    fn page<'s>(&self, cx: &'s Cx<'_>, lane: &Lane<'_>, head: usize, i: usize) -> [&'s [u8]; 2] {
        let id = lane.tables[self.place.class].page(i).0;
        // SAFETY: no op of this wave writes pages (`StateAccess::conflicts`).
        self.place.head_bytes(cx, head).map(|bytes| unsafe { cx.page(id, bytes) })
    }
}

/// Cells that row `i` of a lane sees: always a run, because windows and masks only cut at its ends.
fn visible_cells(lane: &Lane<'_>, i: usize, mask: BlockMask, window: Option<usize>) -> Range<usize> {
    let cell = lane.n_past + i;
    let end = match mask {
        BlockMask::Causal => cell + 1,
        BlockMask::Full => lane.n_past + lane.rows.len(),
        BlockMask::Past => lane.n_past,
    };
    first_cell(window, cell).min(end)..end
}
