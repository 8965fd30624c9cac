//! Attention of the query rows of one sequence over its cells.
//!
//! ```text
//! s_c = scale · q·k_c          out = Σ_c exp(s_c − m) v_c / Σ_c exp(s_c − m)        m = max s_c
//! ```
//!
//! All queries that look at one KV head, of every row of a verified draft and every query head of the group, share
//! one read of its cells: a [`QueryTile`]. It goes through the cells in *blocks* of [`BLOCK`], computes the scores of a
//! block for all queries, turns them into weights under a running maximum ("Online normalizer calculation for softmax",
//! Milakov & Gimelshein), and adds the weighted values.
//!
//! Invariant: the result of a query is a function of the keys and values that it sees, at their places in the sequence, and of
//! nothing else. Blocks, and the [`SPAN`]s whose sums are merged at the end, lie at fixed cell indices, so a cell has
//! the same neighbours in every run; inside a block values are added cell by cell. How cells are cut into pages, which
//! rows share the read, how many threads share the spans: none of it changes a bit. Cells that a query does not see
//! (behind a window, drafts that were rejected, later rows) are not multiplied by zero but left out, for they may hold anything.

use crate::act::{exp, softcap};
use crate::kv::{KEY_GROUP, KvType, KvTypes, typed};
use crate::table::KernelTable;
use half::{bf16, f16};
use std::ops::Range;

/// Cells whose scores are computed before their values are read.
pub const BLOCK: usize = 32;
/// Cells whose sums begin afresh, to be merged with those before: what threads may share.
pub const SPAN: usize = 1024;
/// Partial sums of a query's weights.
pub const SUMS: usize = 16;
/// Queries up to which a block is widened on the way, each time it is looked at, rather than once before.
const DIRECT: usize = 16;
/// Queries that lie together, dimension by dimension: as many as share the keys in registers.
pub const Q_GROUP: usize = 8;
/// Heads are padded to vectors of any instruction set.
const PAD: usize = 16;

const _: () = assert!(SPAN.is_multiple_of(BLOCK) && BLOCK == 2 * SUMS && BLOCK.is_multiple_of(KEY_GROUP));

/// The keys of the cells of a block, `[BLOCK / KEY_GROUP, dim, KEY_GROUP]`, or their values, `[BLOCK, width]`.
#[derive(Clone, Copy, Debug)]
pub enum Cells<'a> {
    /// Full precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// The upper halves of floats.
    Bf16(&'a [bf16]),
}

impl Cells<'_> {
    fn len(&self) -> usize {
        match self {
            Cells::F32(data) => data.len(),
            Cells::F16(data) => data.len(),
            Cells::Bf16(data) => data.len(),
        }
    }
}

/// A block of cells and `n` queries that look at it: what [`attend_block`](KernelTable::attend_block) takes.
#[derive(Debug)]
pub struct BlockCall<'a> {
    /// Width of a head.
    pub dim: usize,
    /// Width of a head, padded with zeros to a multiple of 16.
    pub width: usize,
    /// Bound on the scores.
    pub softcap: Option<f32>,
    /// Scaled queries, `[n / Q_GROUP, dim, Q_GROUP]`, whole groups.
    pub q: &'a [f32],
    /// Cells of the block that each query sees, a run for each.
    pub visible: &'a [Range<usize>],
    /// Keys. Those of cells that nobody sees may be anything.
    pub k: Cells<'a>,
    /// Values, likewise.
    pub v: Cells<'a>,
    /// What will be read next, to be fetched meanwhile; empty for nothing.
    pub next: [&'a [u8]; 2],
    /// Scores and then weights, `[n, BLOCK]`.
    pub weights: &'a mut [f32],
    /// Factors that a new maximum puts on the sums, `[n]`.
    pub factors: &'a mut [f32],
    /// The sums so far.
    pub sums: Sums<'a>,
}

/// Of each of `n` queries: the greatest score, the weights' sum in [`SUMS`] parts, the sum of weighted values.
#[derive(Debug)]
pub struct Sums<'a> {
    /// `[n]`
    pub max: &'a mut [f32],
    /// `[n, SUMS]`
    pub weight: &'a mut [f32],
    /// `[n, width]`
    pub value: &'a mut [f32],
}

impl BlockCall<'_> {
    /// Panics unless all lengths fit.
    pub(crate) fn check(&self) {
        let (n, width) = (self.visible.len(), self.width);
        assert_eq!(width, padded(self.dim), "width of heads of {}", self.dim);
        assert!(width > 0 && width.is_multiple_of(PAD), "heads of {width} values are not padded");
        assert_eq!([self.k.len(), self.v.len()], [BLOCK * self.dim, BLOCK * width], "cells of a block");
        let n_q = n.next_multiple_of(Q_GROUP) * self.dim;
        assert_eq!([self.q.len(), self.sums.value.len()], [n_q, n * width], "queries and their sums");
        assert_eq!([self.factors.len(), self.sums.max.len()], [n; 2], "queries");
        assert_eq!([self.weights.len(), self.sums.weight.len()], [n * BLOCK, n * SUMS], "weights");
        assert!(self.visible.iter().all(|cells| cells.end <= BLOCK), "{:?} in a block", self.visible);
    }

    /// Turns the scores of query `i` into weights and moves its maximum.
    #[allow(clippy::needless_range_loop)] // l and c index several arrays
    pub(crate) fn weigh(&mut self, i: usize) {
        let visible = self.visible[i].clone();
        let scores = &mut self.weights[i * BLOCK..(i + 1) * BLOCK];
        let scores: &mut [f32; BLOCK] = scores.try_into().expect("the length of a block");
        let sums = &mut self.sums.weight[i * SUMS..(i + 1) * SUMS];
        let sums: &mut [f32; SUMS] = sums.try_into().expect("the number of sums");
        if let Some(cap) = self.softcap {
            for score in scores.iter_mut() {
                *score = softcap(*score, cap);
            }
        }
        let (start, end) = (visible.start as u32, visible.end as u32);
        for c in 0..BLOCK as u32 {
            let score = scores[c as usize];
            scores[c as usize] = if c >= start && c < end { score } else { f32::NEG_INFINITY };
        }
        // A NaN is greater than nothing; it goes into the sum and comes out at the end.
        let mut top = [f32::NEG_INFINITY; SUMS];
        for l in 0..SUMS {
            top[l] = greater(scores[SUMS + l], greater(scores[l], top[l]));
        }
        for n in [8, 4, 2, 1] {
            for l in 0..n {
                top[l] = greater(top[l + n], top[l]);
            }
        }
        let max = &mut self.sums.max[i];
        let old = *max;
        *max = greater(top[0], old);
        let base = base(*max);
        let factor = weight(old - base);
        for c in 0..BLOCK {
            scores[c] = weight(scores[c] - base);
        }
        for l in 0..SUMS {
            sums[l] = sums[l] * factor + (scores[l] + scores[SUMS + l]);
        }
        self.factors[i] = factor;
    }
}

/// The greater one, and `b` where `a` is NaN.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// What scores are taken relative to: −∞ less −∞ would be NaN.
#[inline(always)]
fn base(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// `e^x` for `x ≤ 0`, and nothing where that is nearly nothing. NaN stays.
#[inline(always)]
fn weight(x: f32) -> f32 {
    let weight = exp(x);
    if x < -87.0 { 0.0 } else { weight }
}

fn union(ranges: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    let full = ranges.filter(|range| !range.is_empty());
    full.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}

/// One KV head of one sequence.
#[derive(Clone, Copy)]
pub struct KvHead<'a> {
    /// Storage of keys and values.
    pub types: KvTypes,
    /// Width of a key and of a value.
    pub head_dim: usize,
    /// Cells of a page.
    pub page_len: usize,
    /// The head's keys and values in page `i` of the sequence: [`KvTypes::head_bytes`].
    pub page: &'a dyn Fn(usize) -> [&'a [u8]; 2],
}

/// Queries that share the read of a KV head. Keeps its memory from use to use.
#[derive(Default)]
pub struct QueryTile {
    head_dim: usize,
    width: usize,
    softcap: Option<f32>,
    /// Cells of the sequence that each query sees.
    visible: Vec<Range<usize>>,
    q: Vec<f32>,
    /// Sums over all spans so far, and over the present one.
    whole: Buffers,
    span: Buffers,
    in_block: Vec<Range<usize>>,
    weights: Vec<f32>,
    factors: Vec<f32>,
    /// A widened block, and a row of it.
    k: Vec<f32>,
    v: Vec<f32>,
    row: Vec<f32>,
}

#[derive(Default)]
struct Buffers {
    max: Vec<f32>,
    weight: Vec<f32>,
    value: Vec<f32>,
}

impl Buffers {
    fn reset(&mut self, n: usize, width: usize) {
        refill(&mut self.max, n, f32::NEG_INFINITY);
        refill(&mut self.weight, n * SUMS, 0.0);
        refill(&mut self.value, n * width, 0.0);
    }

    fn of(&self, i: usize, width: usize) -> Part<'_> {
        Part {
            max: self.max[i],
            weight: &self.weight[i * SUMS..(i + 1) * SUMS],
            value: &self.value[i * width..(i + 1) * width],
        }
    }

    /// Adds a part to the sums of query `i`.
    fn merge(&mut self, i: usize, part: Part<'_>) {
        let old = self.max[i];
        let max = if part.max > old { part.max } else { old };
        let base = base(max);
        let (ours, theirs) = (weight(old - base), weight(part.max - base));
        self.max[i] = max;
        let add = |sums: &mut [f32], parts: &[f32]| {
            sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum = *sum * ours + *part * theirs);
        };
        add(&mut self.weight[i * SUMS..(i + 1) * SUMS], part.weight);
        let width = part.value.len();
        add(&mut self.value[i * width..(i + 1) * width], part.value);
    }
}

fn refill(values: &mut Vec<f32>, n: usize, value: f32) {
    values.clear();
    values.resize(n, value);
}

/// The sums of one query over one span.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The greatest score.
    pub max: f32,
    /// The weights' sum, in [`SUMS`] parts.
    pub weight: &'a [f32],
    /// The sum of weighted values, [`QueryTile::width`] values.
    pub value: &'a [f32],
}

impl QueryTile {
    /// Begins anew, with no queries.
    pub fn start(&mut self, head_dim: usize, softcap: Option<f32>) {
        (self.head_dim, self.width, self.softcap) = (head_dim, padded(head_dim), softcap);
        self.visible.clear();
        self.q.clear();
    }

    /// Adds a query `[head_dim]`, the factor on its scores (usually `1 / √head_dim`), and the cells that it sees.
    pub fn push(&mut self, q: &[f32], scale: f32, visible: Range<usize>) {
        assert_eq!(q.len(), self.head_dim, "a query of a tile of heads of {}", self.head_dim);
        let i = self.visible.len();
        let first = i / Q_GROUP * Q_GROUP * self.head_dim;
        if i.is_multiple_of(Q_GROUP) {
            self.q.resize(first + Q_GROUP * self.head_dim, 0.0);
        }
        let places = self.q[first + i % Q_GROUP..].iter_mut().step_by(Q_GROUP);
        places.zip(q).for_each(|(place, q)| *place = q * scale);
        self.visible.push(visible);
    }

    /// Spans that any query sees a cell of.
    pub fn spans(&self) -> Range<usize> {
        let cells = union(self.visible.iter().cloned());
        cells.start / SPAN..cells.end.div_ceil(SPAN)
    }

    /// Whether query `i` sees a cell of the span.
    pub fn sees(&self, i: usize, span: usize) -> bool {
        let cells = &self.visible[i];
        !cells.is_empty() && cells.start < (span + 1) * SPAN && cells.end > span * SPAN
    }

    /// All spans, merged.
    pub fn attend(&mut self, table: &KernelTable, kv: KvHead<'_>) {
        self.reset();
        for span in self.spans() {
            self.attend_span(table, kv, span);
            for i in 0..self.visible.len() {
                if self.sees(i, span) {
                    self.whole.merge(i, self.span.of(i, self.width));
                }
            }
        }
    }

    /// Forgets all sums: for [`merge`](Self::merge).
    pub fn reset(&mut self) {
        self.whole.reset(self.visible.len(), self.width);
    }

    /// Adds what another tile of the same queries got over a span that query `i` sees. In the order of the spans this makes
    /// the same bits as [`attend`](Self::attend).
    pub fn merge(&mut self, i: usize, part: Part<'_>) {
        self.whole.merge(i, part);
    }

    /// The sums of query `i` over the span of the last [`attend_span`](Self::attend_span).
    pub fn part(&self, i: usize) -> Part<'_> {
        self.span.of(i, self.width)
    }

    /// The sums over one span alone.
    pub fn attend_span(&mut self, table: &KernelTable, kv: KvHead<'_>, span: usize) {
        assert_eq!(kv.head_dim, self.head_dim, "heads of queries and of cells");
        let n = self.visible.len();
        self.span.reset(n, self.width);
        self.weights.resize(n * BLOCK, 0.0);
        self.factors.resize(n, 0.0);
        let cells = union(self.visible.iter().cloned());
        let cells = cells.start.max(span * SPAN)..cells.end.min((span + 1) * SPAN);
        if cells.is_empty() {
            return;
        }
        for block in cells.start / BLOCK..cells.end.div_ceil(BLOCK) {
            let first = block * BLOCK;
            let inside = |range: &Range<usize>| {
                let start = range.start.clamp(first, first + BLOCK) - first;
                start..(range.end.clamp(first, first + BLOCK) - first).max(start)
            };
            self.in_block.clear();
            self.in_block.extend(self.visible.iter().map(inside));
            let seen = union(self.in_block.iter().cloned());
            if seen.is_empty() {
                continue;
            }
            let k = kv.keys(table, block, seen.clone(), n, &mut self.k, &mut self.row);
            let v = kv.values(table, block, seen.clone(), n, &mut self.v);
            let next = if first + BLOCK < cells.end { kv.block_bytes(block + 1) } else { [&[][..]; 2] };
            (table.attend_block)(&mut BlockCall {
                dim: self.head_dim,
                width: self.width,
                softcap: self.softcap,
                q: &self.q,
                visible: &self.in_block,
                k,
                v,
                next,
                weights: &mut self.weights,
                factors: &mut self.factors,
                sums: Sums {
                    max: &mut self.span.max,
                    weight: &mut self.span.weight,
                    value: &mut self.span.value,
                },
            });
        }
    }

    /// The result of query `i`, `[head_dim]`: zeros if it sees no cell.
    ///
    /// A `sink` is the score of a cell whose value is zero: it takes a share of the weight and adds nothing.
    pub fn finish(&self, i: usize, sink: Option<f32>, out: &mut [f32]) {
        assert_eq!(out.len(), self.head_dim, "a result of a tile of heads of {}", self.head_dim);
        let Part { max, weight, value } = self.whole.of(i, self.width);
        let mut parts = [0.0; SUMS];
        parts.copy_from_slice(weight);
        for n in [8, 4, 2, 1] {
            for l in 0..n {
                parts[l] += parts[l + n];
            }
        }
        let mut sum = parts[0];
        if sum == 0.0 {
            return out.fill(0.0);
        }
        if let Some(sink) = sink {
            // Overflows only where the cells' share is zero, as it should be: 1/∞.
            sum += (sink - max).exp();
        }
        let inverse = 1.0 / sum;
        out.iter_mut().zip(value).for_each(|(out, value)| *out = value * inverse);
    }

    /// Values of a [`Part`].
    pub fn width(&self) -> usize {
        self.width
    }
}

/// Width of a head in a tile.
pub fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(PAD)
}

impl<'a> KvHead<'a> {
    /// The bytes of a whole block if it lies in one page, else none.
    fn block_bytes(self, block: usize) -> [&'a [u8]; 2] {
        if !self.page_len.is_multiple_of(BLOCK) {
            return [&[], &[]];
        }
        let cells = block * BLOCK % self.page_len;
        let [k, v] = (self.page)(block * BLOCK / self.page_len);
        [(k, self.types.k), (v, self.types.v)].map(|(bytes, ty)| {
            let row = ty.row_bytes(self.head_dim);
            &bytes[cells * row..(cells + BLOCK) * row]
        })
    }

    /// Calls `each` with the runs of these cells of a block that lie in one page: the first of them in the block, the page's keys or
    /// values, and which of the page's cells they are.
    fn runs(
        self,
        part: usize,
        block: usize,
        seen: Range<usize>,
        mut each: impl FnMut(usize, &'a [u8], Range<usize>),
    ) {
        let mut c = seen.start;
        while c < seen.end {
            let cell = block * BLOCK + c;
            let in_page = cell % self.page_len;
            let n = (self.page_len - in_page).min(seen.end - c);
            each(c, (self.page)(cell / self.page_len)[part], in_page..in_page + n);
            c += n;
        }
    }

    /// A block's keys: as they lie, or widened. Widening is exact, so both give the same bits.
    fn keys<'b>(
        self,
        table: &KernelTable,
        block: usize,
        seen: Range<usize>,
        n_queries: usize,
        widened: &'b mut Vec<f32>,
        row: &mut Vec<f32>,
    ) -> Cells<'b>
    where
        'a: 'b,
    {
        let (dim, ty) = (self.head_dim, self.types.k);
        let bytes = self.block_bytes(block)[0];
        if let Some(cells) = as_they_lie(ty, bytes, n_queries) {
            return cells;
        }
        widened.resize(BLOCK * dim, 0.0);
        if ty.groups_keys() && !bytes.is_empty() {
            read(table, ty, bytes, widened);
            return Cells::F32(widened);
        }
        if !bytes.is_empty() {
            row.resize(BLOCK * dim, 0.0);
            ty.read(bytes, row);
            for (rows, group) in
                row.chunks_exact(KEY_GROUP * dim).zip(widened.chunks_exact_mut(KEY_GROUP * dim))
            {
                (table.interleave)(rows, group);
            }
            return Cells::F32(widened);
        }
        let row_bytes = ty.row_bytes(dim);
        self.runs(0, block, seen, |first, keys, cells| {
            for (c, cell) in (first..).zip(cells) {
                let to = &mut widened[c / KEY_GROUP * KEY_GROUP * dim + c % KEY_GROUP..];
                if ty.groups_keys() {
                    ty.read_grouped(keys, dim, cell, to);
                    continue;
                }
                row.resize(dim, 0.0);
                ty.read(&keys[cell * row_bytes..(cell + 1) * row_bytes], &mut row[..dim]);
                to.iter_mut().step_by(KEY_GROUP).zip(&row[..dim]).for_each(|(to, x)| *to = *x);
            }
        });
        Cells::F32(widened)
    }

    /// A block's values, likewise.
    fn values<'b>(
        self,
        table: &KernelTable,
        block: usize,
        seen: Range<usize>,
        n_queries: usize,
        widened: &'b mut Vec<f32>,
    ) -> Cells<'b>
    where
        'a: 'b,
    {
        let (dim, width, ty) = (self.head_dim, padded(self.head_dim), self.types.v);
        let bytes = self.block_bytes(block)[1];
        if dim == width
            && let Some(cells) = as_they_lie(ty, bytes, n_queries)
        {
            return cells;
        }
        widened.resize(BLOCK * width, 0.0);
        let row = ty.row_bytes(dim);
        self.runs(1, block, seen, |first, values, cells| {
            let bytes = &values[cells.start * row..cells.end * row];
            let rows = &mut widened[first * width..(first + cells.len()) * width];
            if dim == width {
                return read(table, ty, bytes, rows);
            }
            for (bytes, out) in bytes.chunks_exact(row).zip(rows.chunks_exact_mut(width)) {
                ty.read(bytes, &mut out[..dim]);
                out[dim..].fill(0.0);
            }
        });
        Cells::F32(widened)
    }
}

/// The bytes of a block, if there are any, as what so many queries can look at without widening it first.
fn as_they_lie(ty: KvType, bytes: &[u8], n_queries: usize) -> Option<Cells<'_>> {
    match ty {
        _ if bytes.is_empty() => None,
        KvType::F32 => Some(Cells::F32(typed(bytes))),
        KvType::F16 if n_queries <= DIRECT => Some(Cells::F16(typed(bytes))),
        KvType::Bf16 if n_queries <= DIRECT => Some(Cells::Bf16(typed(bytes))),
        _ => None,
    }
}

/// [`KvType::read`], with the table's instructions where it has some.
fn read(table: &KernelTable, ty: KvType, bytes: &[u8], out: &mut [f32]) {
    match ty {
        KvType::F16 => (table.widen_f16)(typed(bytes), out),
        _ => ty.read(bytes, out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvBytes;
    use proptest::prelude::*;

    fn noise(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| 3.0 * (seed + i as f32 * 12.9898).sin()).collect()
    }

    /// One KV head's cells in pages, with `f32`s that cells hold after rounding to the type.
    struct Cache {
        types: KvTypes,
        dim: usize,
        page_len: usize,
        pages: Vec<[KvBytes; 2]>,
        stored: [Vec<f32>; 2],
    }

    impl Cache {
        /// Random cells; those from `n_cell` to the end of the last page hold NaN, or what reads as rubbish.
        fn new(types: impl Into<KvTypes>, dim: usize, page_len: usize, n_cell: usize, seed: f32) -> Cache {
            let types = types.into();
            let n_page = n_cell.div_ceil(page_len);
            let page = || types.head_bytes(dim, page_len).map(KvBytes::new);
            let mut pages: Vec<_> = (0..n_page).map(|_| page()).collect();
            pages.iter_mut().flatten().for_each(|page| page.bytes_mut().fill(0xff));
            let mut stored = [vec![0.0; n_cell * dim], vec![0.0; n_cell * dim]];
            for (part, ty) in [types.k, types.v].into_iter().enumerate() {
                let row_bytes = ty.row_bytes(dim);
                let rows = noise(n_cell * dim, seed + 10.0 * part as f32);
                for (c, row) in rows.chunks(dim).enumerate() {
                    let page = pages[c / page_len][part].bytes_mut();
                    let mut alone = KvBytes::new(row_bytes);
                    let alone = &mut alone.bytes_mut()[..row_bytes];
                    ty.write(row, alone);
                    ty.read(alone, &mut stored[part][c * dim..(c + 1) * dim]);
                    if part == 0 {
                        ty.write_key(row, c % page_len, page);
                    } else {
                        page[c % page_len * row_bytes..][..row_bytes].copy_from_slice(alone);
                    }
                }
            }
            Cache { types, dim, page_len, pages, stored }
        }

        fn head<R>(&self, f: impl FnOnce(KvHead<'_>) -> R) -> R {
            let page = |i: usize| {
                let bytes = self.types.head_bytes(self.dim, self.page_len);
                [0, 1].map(|part| &self.pages[i][part].bytes()[..bytes[part]])
            };
            f(KvHead { types: self.types, head_dim: self.dim, page_len: self.page_len, page: &page })
        }

        fn attend(
            &self,
            table: &KernelTable,
            queries: &[(Vec<f32>, Range<usize>)],
            sink: Option<f32>,
        ) -> Vec<Vec<u32>> {
            let mut tile = QueryTile::default();
            // Memory that another tile has left behind.
            tile.start(self.dim + 7, None);
            tile.push(&vec![f32::NAN; self.dim + 7], 1.0, 0..0);
            tile.reset();
            tile.start(self.dim, None);
            queries.iter().for_each(|(q, visible)| tile.push(q, 0.2, visible.clone()));
            self.head(|kv| tile.attend(table, kv));
            (0..queries.len()).map(|i| finished(&tile, i, self.dim, sink)).collect()
        }

        /// Softmax attention in f64 over the visible cells.
        fn exact(&self, q: &[f32], visible: Range<usize>, sink: Option<f32>, cap: Option<f32>) -> Vec<f64> {
            let row = |part: usize, c: usize| {
                self.stored[part][c * self.dim..(c + 1) * self.dim].iter().map(|x| f64::from(*x))
            };
            let score = |c: usize| {
                let s = row(0, c).zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>() * f64::from(0.2f32);
                cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = visible.clone().map(score).collect();
            let max = scores.iter().copied().chain(sink.map(f64::from)).fold(f64::NEG_INFINITY, f64::max);
            let total = scores.iter().map(|s| (s - max).exp()).sum::<f64>()
                + sink.map_or(0.0, |sink| (f64::from(sink) - max).exp());
            let mut out = vec![0.0; self.dim];
            for (s, c) in scores.iter().zip(visible) {
                let weight = (s - max).exp() / total;
                out.iter_mut().zip(row(1, c)).for_each(|(out, v)| *out += weight * v);
            }
            out
        }
    }

    fn finished(tile: &QueryTile, i: usize, dim: usize, sink: Option<f32>) -> Vec<u32> {
        let mut out = vec![f32::NAN; dim];
        tile.finish(i, sink, &mut out);
        out.into_iter().map(f32::to_bits).collect()
    }

    fn types() -> impl Strategy<Value = KvTypes> {
        let one = || prop::sample::select(KvType::ALL.to_vec());
        (one(), one()).prop_map(|(k, v)| KvTypes { k, v })
    }

    /// A width that the types can store.
    fn fitting(types: KvTypes, dim: usize) -> usize {
        if types.k.fits(dim) && types.v.fits(dim) { dim } else { dim.next_multiple_of(32) }
    }

    /// Rows of a lane: those of a draft, or of a block that sees all of itself, with a window perhaps.
    fn rows(
        n_cell: usize,
        n: usize,
        per_row: usize,
        window: usize,
        full: bool,
        dim: usize,
    ) -> Vec<(Vec<f32>, Range<usize>)> {
        let past = n_cell - n;
        let row = |i: usize| {
            let end = if full { n_cell } else { past + i + 1 };
            (past + i + 1).saturating_sub(window)..end
        };
        (0..n * per_row).map(|i| (noise(dim, i as f32 * 0.37), row(i / per_row))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn matches_f64(
            types in types(), dim in 1..150usize, page_len in prop::sample::select(vec![1, 5, 16, 64]),
            n_cell in 1..200usize, start in 0..200usize, seed in 0.0f32..100.0,
            sink in prop::option::of(-3.0f32..9.0), capped: bool
        ) {
            let dim = fitting(types, dim);
            let cache = Cache::new(types, dim, page_len, n_cell, seed);
            let (q, visible, cap) = (noise(dim, seed), start.min(n_cell - 1)..n_cell, capped.then_some(5.0));
            let want = cache.exact(&q, visible.clone(), sink, cap);
            for table in KernelTable::available() {
                let mut tile = QueryTile::default();
                tile.start(dim, cap);
                tile.push(&q, 0.2, visible.clone());
                cache.head(|kv| tile.attend(table, kv));
                for (got, want) in finished(&tile, 0, dim, sink).into_iter().zip(&want) {
                    let got = f32::from_bits(got);
                    prop_assert!((f64::from(got) - want).abs() < 2e-4, "{}: {got} != {want}", table.isa);
                }
            }
        }

        /// A query alone, among others, in other pages, with rubbish behind and before what it sees.
        #[test]
        fn a_query_is_the_same_bits_in_any_company(
            types in types(), dim in 1..150usize, n in 1..18usize, past in 0..100usize, per_row in 1..6usize,
            window in prop::sample::select(vec![1, 7, 40, 1000]), full: bool, seed in 0.0f32..100.0
        ) {
            let dim = fitting(types, dim);
            let n_cell = past + n;
            let queries = rows(n_cell, n, per_row, window, full, dim);
            let cache = Cache::new(types, dim, 64, n_cell, seed);
            for table in KernelTable::available() {
                let together = cache.attend(table, &queries, Some(0.5));
                prop_assert!(together.iter().flatten().all(|x| f32::from_bits(*x).is_finite()), "{}", table.isa);
                for page_len in [1, 5, 16, 32] {
                    let other = Cache::new(types, dim, page_len, n_cell, seed);
                    prop_assert_eq!(&other.attend(table, &queries, Some(0.5)), &together, "{} pages of {}", table.isa, page_len);
                }
                for (i, query) in queries.iter().enumerate() {
                    let alone = cache.attend(table, std::slice::from_ref(query), Some(0.5)).remove(0);
                    prop_assert_eq!(&alone, &together[i], "{} query {}", table.isa, i);
                    // The cells that it does not see are something else.
                    let mut spoilt = Cache::new(types, dim, 64, n_cell, seed);
                    let visible = &query.1;
                    for c in (0..n_cell).filter(|c| !visible.contains(c)) {
                        let page = &mut spoilt.pages[c / 64];
                        if types.k.groups_keys() {
                            types.k.write_key(&vec![f32::NAN; dim], c % 64, page[0].bytes_mut());
                        } else {
                            let row = types.k.row_bytes(dim);
                            page[0].bytes_mut()[c % 64 * row..][..row].fill(0xff);
                        }
                        let row = types.v.row_bytes(dim);
                        page[1].bytes_mut()[c % 64 * row..][..row].fill(0xff);
                    }
                    prop_assert_eq!(&spoilt.attend(table, &queries, Some(0.5))[i], &together[i], "{} query {} and rubbish", table.isa, i);
                }
            }
        }
    }

    /// Several spans: alone, together, and from parts that are merged afterwards, as threads do.
    #[test]
    fn spans_are_merged_in_their_order() {
        let (dim, n_cell) = (32, 3 * SPAN + 300);
        for types in [KvType::F16.into(), KvTypes { k: KvType::Q8_0, v: KvType::Q4_0 }] {
            let cache = Cache::new(types, dim, 64, n_cell, 3.0);
            let mut queries = rows(n_cell, 5, 2, 10_000, false, dim);
            queries.extend(rows(n_cell, 5, 2, SPAN + 100, false, dim));
            for table in KernelTable::available() {
                let together = cache.attend(table, &queries, None);
                for (i, query) in queries.iter().enumerate() {
                    assert_eq!(
                        cache.attend(table, std::slice::from_ref(query), None)[0],
                        together[i],
                        "{} {i}",
                        table.isa
                    );
                    for (got, want) in
                        together[i].iter().zip(cache.exact(&query.0, query.1.clone(), None, None))
                    {
                        assert!((f64::from(f32::from_bits(*got)) - want).abs() < 2e-4);
                    }
                }
                let tile = || {
                    let mut tile = QueryTile::default();
                    tile.start(dim, None);
                    queries.iter().for_each(|(q, visible)| tile.push(q, 0.2, visible.clone()));
                    tile
                };
                let mut merged = tile();
                merged.reset();
                assert_eq!(merged.spans(), 0..4);
                for span in merged.spans() {
                    let mut one = tile();
                    cache.head(|kv| one.attend_span(table, kv, span));
                    for i in (0..queries.len()).filter(|&i| one.sees(i, span)) {
                        merged.merge(i, one.part(i));
                    }
                }
                let got: Vec<_> = (0..queries.len()).map(|i| finished(&merged, i, dim, None)).collect();
                assert_eq!(got, together, "{}", table.isa);
            }
        }
    }

    fn attend(q: f32, keys: &[f32], values: &[f32], sink: Option<f32>) -> f32 {
        let results = KernelTable::available().iter().map(|table| {
            let mut cache = Cache::new(KvType::F32, 1, 64, keys.len(), 0.0);
            for (c, (k, v)) in keys.iter().zip(values).enumerate() {
                KvType::F32.write_key(&[*k], c, cache.pages[0][0].bytes_mut());
                KvType::F32.write(&[*v], &mut cache.pages[0][1].bytes_mut()[4 * c..4 * c + 4]);
            }
            let mut tile = QueryTile::default();
            tile.start(1, None);
            tile.push(&[q], 1.0, 0..keys.len());
            cache.head(|kv| tile.attend(table, kv));
            f32::from_bits(finished(&tile, 0, 1, sink)[0])
        });
        let results: Vec<f32> = results.collect();
        assert!(results.iter().all(|x| *x == results[0] || x.is_nan() && results[0].is_nan()), "{results:?}");
        results[0]
    }

    #[test]
    fn keys_are_interleaved() {
        for dim in [1, 8, 31, 32, 64, 129] {
            let rows = noise(KEY_GROUP * dim, 1.0);
            for table in KernelTable::available() {
                let mut out = vec![f32::NAN; rows.len()];
                (table.interleave)(&rows, &mut out);
                for c in 0..KEY_GROUP {
                    let key = out[c..].iter().step_by(KEY_GROUP);
                    assert!(key.eq(&rows[c * dim..(c + 1) * dim]), "{} cell {c} of {dim}", table.isa);
                }
            }
        }
    }

    #[test]
    fn corners() {
        assert_eq!(attend(1.0, &[], &[], None), 0.0, "nothing visible");
        assert_eq!(attend(1.0, &[], &[], Some(3.0)), 0.0, "nothing but a sink");
        assert_eq!(attend(1.0, &[-700.0, -700.0], &[1.0, 3.0], None), 2.0, "far below zero");
        assert_eq!(attend(1.0, &[1e30, -1e30], &[5.0, 7.0], None), 5.0, "far apart");
        assert_eq!(attend(1.0, &[f32::NEG_INFINITY, 0.0], &[5.0, 7.0], None), 7.0, "a masked first cell");
        assert_eq!(attend(1.0, &[f32::NEG_INFINITY], &[5.0], None), 0.0, "all cells masked");
        assert_eq!(attend(1.0, &[0.0], &[8.0], Some(0.0)), 4.0, "half to the sink");
        assert_eq!(attend(1.0, &[0.0], &[8.0], Some(200.0)), 0.0, "all to the sink");
        assert_eq!(attend(1.0, &[0.0], &[8.0], Some(f32::NEG_INFINITY)), 8.0, "nothing to the sink");
        assert!(attend(1.0, &[f32::NAN, 0.0], &[5.0, 7.0], None).is_nan(), "NaN is not hidden");
        assert!(attend(1.0, &[0.0, 0.0], &[5.0, f32::NAN], None).is_nan(), "NaN is not hidden");
    }
}
