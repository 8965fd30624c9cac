//! The vector kernels, once for all instruction sets.
//!
//! An instruction set brings a vector of floats ([`Simd`]); the bodies here are generic over it
//! and are inlined into functions that enable its features ([`kernel_table!`]). Sums run over lane
//! accumulators in one fixed order; a tail shorter than a vector is padded with zeros and takes
//! the same path, so no length has an order of its own.

// Tiles index several arrays of registers at once.
#![allow(clippy::needless_range_loop)]

use crate::act::softcap;
use crate::attention::{BLOCK, BlockCall, Cells, Q_GROUP, SUMS};
use crate::delta::{DeltaRun, DeltaToken};
use crate::kv::KEY_GROUP;
use crate::matmul::WeightRows;
use half::{bf16, f16};

/// A vector of f32.
///
/// # Safety contract of all methods
/// The CPU has the features of the instruction set. `load`, `load_f16` and `store` take a pointer
/// to `LANES` elements, readable or writable, of any alignment.
pub(crate) trait Simd: Copy {
    /// Floats in a vector.
    const LANES: usize;
    /// Columns of a matrix product that fit in registers beside `ROWS` weight rows.
    const COLUMNS: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn mul(self, other: Self) -> Self;
    /// `self · factor + term`, rounded once.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The sum of the lanes, in one fixed order.
    unsafe fn sum(self) -> f32;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    /// Lanes of `self` where they are greater than `other`'s, which is not so for NaN; else those of `other`.
    unsafe fn greater(self, other: Self) -> Self;
    /// Lane 0.
    unsafe fn first(self) -> f32;
    /// The greatest lane; any one if some are NaN.
    unsafe fn greatest(self) -> f32;
    /// `self`, and zero in the lanes where `x < limit`.
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self;
    /// `self · 2^n`, where `shifted = n + 1.5·2^23` and the result is neither tiny nor huge.
    unsafe fn scale_by_power(self, shifted: Self) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// Lane `i` of result `j` is lane `j` of vector `i`, of the first `LANES` vectors.
    unsafe fn transpose(vectors: [Self; MAX_LANES]) -> [Self; MAX_LANES];
    /// Fetches the cache line at `from` before it is read. Any address will do.
    fn prefetch(from: *const u8);
}

/// The most lanes of any [`Simd`].
pub(crate) const MAX_LANES: usize = 16;
/// Weight rows that a block of the matrix product holds in registers.
const ROWS: usize = 4;
/// Weight rows that are widened together when many columns share them: the columns are then read
/// from a farther cache once for 16 rows, not once for 4.
const GROUP: usize = 16;

/// An element type that vectors can be loaded from.
pub(crate) trait Element: Copy + Default {
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
}

/// Loads the `n < LANES` elements at `from`; the other lanes are zero.
///
/// # Safety
/// The CPU has the features of `S`; `from` points to `n` readable elements.
#[inline(always)]
unsafe fn load_tail<S: Simd, E: Element>(from: *const E, n: usize) -> S {
    let mut lanes = [E::default(); MAX_LANES];
    debug_assert!(n < S::LANES && S::LANES <= MAX_LANES);
    // SAFETY: `n` elements are readable by the caller's promise, and fit.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
        E::load(lanes.as_ptr())
    }
}

/// [`matmul`](crate::matmul).
///
/// # Safety
/// The CPU has the features of `S`; `WeightRows::checked_columns` has passed and gave `n`.
#[inline(always)]
pub(crate) unsafe fn matmul_tile<S: Simd>(
    w: &WeightRows<'_>,
    x: &[f32],
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    let n = x.len() / w.n_in;
    let group = if n > S::COLUMNS { GROUP } else { ROWS };
    // A padded row keeps the rows of a group off each other's cache sets.
    let stride = w.n_in.next_multiple_of(MAX_LANES) + MAX_LANES;
    if scratch.len() < group * stride + MAX_LANES {
        scratch.resize(group * stride + MAX_LANES, 0.0);
    }
    // Aligned to a cache line, if the allocator left it to us.
    let aligned = scratch.as_ptr().align_offset(64).min(MAX_LANES);
    let rows = &mut scratch[aligned..];

    for first in (0..w.n_rows).step_by(group) {
        let n_group = group.min(w.n_rows - first);
        for r in 0..n_group {
            w.dequantize_row(first + r, &mut rows[r * stride..r * stride + w.n_in]);
        }
        let mut c = 0;
        while c < n {
            let n_columns = S::COLUMNS.min(n - c);
            let mut r = 0;
            while r < n_group {
                let n_rows = if n_group - r >= ROWS { ROWS } else { 1 };
                let block = Block {
                    w: &rows[r * stride..(r + n_rows - 1) * stride + w.n_in],
                    w_stride: stride,
                    x: &x[c * w.n_in..(c + n_columns) * w.n_in],
                    n_in: w.n_in,
                    out: &mut out[c * w.n_rows + first + r..],
                    out_stride: w.n_rows,
                };
                // SAFETY: the slices above hold `n_rows` rows and `n_columns` columns.
                unsafe {
                    match (n_rows, n_columns) {
                        (ROWS, 1) => block.product::<S, ROWS, 1>(),
                        (ROWS, 2) => block.product::<S, ROWS, 2>(),
                        (ROWS, 3) => block.product::<S, ROWS, 3>(),
                        (ROWS, _) => block.product::<S, ROWS, 4>(),
                        (_, 1) => block.product::<S, 1, 1>(),
                        (_, 2) => block.product::<S, 1, 2>(),
                        (_, 3) => block.product::<S, 1, 3>(),
                        (_, _) => block.product::<S, 1, 4>(),
                    }
                }
                r += n_rows;
            }
            c += n_columns;
        }
    }
}

/// A few weight rows and a few columns, whose products are accumulated in registers.
struct Block<'a> {
    w: &'a [f32],
    w_stride: usize,
    x: &'a [f32],
    n_in: usize,
    out: &'a mut [f32],
    out_stride: usize,
}

impl Block<'_> {
    /// # Safety
    /// The CPU has the features of `S`; `w` holds `R` rows and `x` `C` rows of `n_in` floats.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // c and r index sums, weights and pointers alike
    unsafe fn product<S: Simd, const R: usize, const C: usize>(self) {
        debug_assert_eq!(self.w.len(), (R - 1) * self.w_stride + self.n_in);
        debug_assert_eq!(self.x.len(), C * self.n_in);
        let (w, x) = (self.w.as_ptr(), self.x.as_ptr());
        // SAFETY: row `r` starts at `r * w_stride`, column `c` at `c * n_in`; all loads are at `i`
        // with `i + LANES <= n_in` from there, or of the `n_in - i` elements that remain.
        let sums = unsafe {
            let mut sums = [[S::splat(0.0); R]; C];
            let mut i = 0;
            while i + S::LANES <= self.n_in {
                let mut weights = [S::splat(0.0); R];
                for r in 0..R {
                    weights[r] = S::load(w.add(r * self.w_stride + i));
                }
                for c in 0..C {
                    let x = S::load(x.add(c * self.n_in + i));
                    for r in 0..R {
                        sums[c][r] = weights[r].mul_add(x, sums[c][r]);
                    }
                }
                i += S::LANES;
            }
            if i < self.n_in {
                let n = self.n_in - i;
                for c in 0..C {
                    let x = load_tail::<S, _>(x.add(c * self.n_in + i), n);
                    for r in 0..R {
                        let w = load_tail::<S, _>(w.add(r * self.w_stride + i), n);
                        sums[c][r] = w.mul_add(x, sums[c][r]);
                    }
                }
            }
            sums
        };
        for c in 0..C {
            for r in 0..R {
                // SAFETY: the CPU has the features.
                self.out[c * self.out_stride + r] = unsafe { sums[c][r].sum() };
            }
        }
    }
}

/// One token of the delta rule; a `query` is given exactly if an output is wanted, and makes no
/// difference to the state.
///
/// # Safety
/// The CPU has the features of `S`; `DeltaToken::check_state` and `check_output` have passed.
#[inline(always)]
pub(crate) unsafe fn delta<S: Simd, const OUTPUT: bool>(
    state: &mut [f32],
    token: &DeltaToken<'_>,
    q: &[f32],
    out: &mut [f32],
) {
    let dim_k = token.k.len();
    let n_vectors = dim_k / S::LANES * S::LANES;
    let tail = dim_k - n_vectors;
    let (k, q) = (token.k.as_ptr(), q.as_ptr());
    for (j, row) in state.chunks_exact_mut(dim_k).enumerate() {
        let row = row.as_mut_ptr();
        // SAFETY: `row` and `k`, and `q` if there is an output, hold `dim_k` floats. Loads and
        // stores are at `i` with `i + LANES <= dim_k`, or of the `tail` that remains.
        unsafe {
            let decay = S::splat(token.decay);
            let mut recalled = S::splat(0.0);
            for i in (0..n_vectors).step_by(S::LANES) {
                recalled = S::load(row.add(i)).mul(decay).mul_add(S::load(k.add(i)), recalled);
            }
            let mut last = S::splat(0.0);
            if tail > 0 {
                last = load_tail::<S, _>(row.add(n_vectors), tail).mul(decay);
                recalled = last.mul_add(load_tail::<S, _>(k.add(n_vectors), tail), recalled);
            }
            let d = S::splat(token.beta * (token.v[j] - recalled.sum()));

            let mut read = S::splat(0.0);
            for i in (0..n_vectors).step_by(S::LANES) {
                let updated = d.mul_add(S::load(k.add(i)), S::load(row.add(i)).mul(decay));
                updated.store(row.add(i));
                if OUTPUT {
                    read = updated.mul_add(S::load(q.add(i)), read);
                }
            }
            if tail > 0 {
                let updated = d.mul_add(load_tail::<S, _>(k.add(n_vectors), tail), last);
                let mut lanes = [0.0f32; MAX_LANES];
                updated.store(lanes.as_mut_ptr());
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), row.add(n_vectors), tail);
                if OUTPUT {
                    read = updated.mul_add(load_tail::<S, _>(q.add(n_vectors), tail), read);
                }
            }
            if OUTPUT {
                out[j] = read.sum();
            }
        }
    }
}

/// Rows of a delta state that go through a run's tokens together, to hide the latency of each other's sums.
const DELTA_ROWS: usize = 2;

/// Several tokens of the delta rule, bit for bit [`delta`] for each; with outputs where there are queries.
///
/// # Safety
/// The CPU has the features of `S`; `DeltaRun::check` has passed.
#[inline(always)]
pub(crate) unsafe fn delta_run<S: Simd>(state: &mut [f32], run: &DeltaRun<'_>, q: &[f32], out: &mut [f32]) {
    // SAFETY: the caller's promise; a row that is so many vectors wide fits in registers.
    unsafe {
        match (run.dim_k == 8 * S::LANES, run.dim_k == 4 * S::LANES, q.is_empty()) {
            (true, _, false) if S::LANES == 16 => return delta_rows::<S, 8, true>(state, run, q, out),
            (true, _, true) if S::LANES == 16 => return delta_rows::<S, 8, false>(state, run, q, out),
            (_, true, false) => return delta_rows::<S, 4, true>(state, run, q, out),
            (_, true, true) => return delta_rows::<S, 4, false>(state, run, q, out),
            _ => {}
        }
        let (dim_k, dim_v) = (run.dim_k, run.dim_v());
        for t in 0..run.n() {
            if q.is_empty() {
                delta::<S, false>(state, &run.token(t), &[], &mut []);
            } else {
                let (q, out) = (&q[t * dim_k..(t + 1) * dim_k], &mut out[t * dim_v..(t + 1) * dim_v]);
                delta::<S, true>(state, &run.token(t), q, out);
            }
        }
    }
}

/// The same for rows of `V` vectors, which stay in registers from token to token.
///
/// # Safety
/// As for [`delta_run`]; `dim_k` is `V` vectors; with `OUTPUT` there are queries.
#[inline(always)]
unsafe fn delta_rows<S: Simd, const V: usize, const OUTPUT: bool>(
    state: &mut [f32],
    run: &DeltaRun<'_>,
    q: &[f32],
    out: &mut [f32],
) {
    let dim_v = run.dim_v();
    let mut j = 0;
    // SAFETY: by contract; there are as many rows left as are taken.
    unsafe {
        while j + DELTA_ROWS <= dim_v {
            delta_row_block::<S, V, DELTA_ROWS, OUTPUT>(state, run, q, out, j);
            j += DELTA_ROWS;
        }
        while j < dim_v {
            delta_row_block::<S, V, 1, OUTPUT>(state, run, q, out, j);
            j += 1;
        }
    }
}

/// Rows `j..j + R`.
///
/// # Safety
/// As for [`delta_rows`]; the state has these rows.
#[inline(always)]
unsafe fn delta_row_block<S: Simd, const V: usize, const R: usize, const OUTPUT: bool>(
    state: &mut [f32],
    run: &DeltaRun<'_>,
    q: &[f32],
    out: &mut [f32],
    j: usize,
) {
    let (n, dim_k, dim_v) = (run.n(), V * S::LANES, run.dim_v());
    let (k, v, q, out) = (run.k.as_ptr(), run.v.as_ptr(), q.as_ptr(), out.as_mut_ptr());
    // SAFETY: row `j + r` has `dim_k` floats, and so have the key and the query of each of `n` tokens; values and outputs `dim_v`.
    unsafe {
        let base = state.as_mut_ptr().add(j * dim_k);
        let mut rows = [[S::splat(0.0); V]; R];
        for r in 0..R {
            for i in 0..V {
                rows[r][i] = S::load(base.add(r * dim_k + i * S::LANES));
            }
        }
        for t in 0..n {
            let decay = S::splat(run.decay[t]);
            let mut recalled = [S::splat(0.0); R];
            for i in 0..V {
                let k = S::load(k.add(t * dim_k + i * S::LANES));
                for r in 0..R {
                    rows[r][i] = rows[r][i].mul(decay);
                    recalled[r] = rows[r][i].mul_add(k, recalled[r]);
                }
            }
            let mut d = [S::splat(0.0); R];
            for r in 0..R {
                d[r] = S::splat(run.beta[t] * (*v.add(t * dim_v + j + r) - recalled[r].sum()));
            }
            let mut read = [S::splat(0.0); R];
            for i in 0..V {
                let k = S::load(k.add(t * dim_k + i * S::LANES));
                for r in 0..R {
                    rows[r][i] = d[r].mul_add(k, rows[r][i]);
                }
                if OUTPUT {
                    let q = S::load(q.add(t * dim_k + i * S::LANES));
                    for r in 0..R {
                        read[r] = rows[r][i].mul_add(q, read[r]);
                    }
                }
            }
            if OUTPUT {
                for r in 0..R {
                    *out.add(t * dim_v + j + r) = read[r].sum();
                }
            }
        }
        for r in 0..R {
            for i in 0..V {
                rows[r][i].store(base.add(r * dim_k + i * S::LANES));
            }
        }
    }
}

/// Rows `[KEY_GROUP, dim]` as a group `[dim, KEY_GROUP]`.
///
/// # Safety
/// The CPU has the features of `S`; both have that length.
#[inline(always)]
pub(crate) unsafe fn interleave<S: Simd>(rows: &[f32], out: &mut [f32]) {
    let dim = rows.len() / KEY_GROUP;
    let n = dim / S::LANES * S::LANES;
    // SAFETY: rows `c..c + LANES` and dimensions `d..d + LANES` are inside.
    unsafe {
        for c in (0..KEY_GROUP).step_by(S::LANES) {
            for d in (0..n).step_by(S::LANES) {
                let mut tile = [S::splat(0.0); MAX_LANES];
                for i in 0..S::LANES {
                    tile[i] = S::load(rows.as_ptr().add((c + i) * dim + d));
                }
                let tile = S::transpose(tile);
                for j in 0..S::LANES {
                    tile[j].store(out.as_mut_ptr().add((d + j) * KEY_GROUP + c));
                }
            }
        }
    }
    for d in n..dim {
        for c in 0..KEY_GROUP {
            out[d * KEY_GROUP + c] = rows[c * dim + d];
        }
    }
}

/// Halves as floats, of any length.
///
/// # Safety
/// The CPU has the features of `S`; the lengths are equal.
#[inline(always)]
pub(crate) unsafe fn widen_f16<S: Simd>(from: &[f16], to: &mut [f32]) {
    let n = to.len() / S::LANES * S::LANES;
    // SAFETY: vectors end before `n`, which is at most the length.
    unsafe {
        for i in (0..n).step_by(S::LANES) {
            S::load_f16(from.as_ptr().add(i)).store(to.as_mut_ptr().add(i));
        }
    }
    from[n..].iter().zip(&mut to[n..]).for_each(|(from, to)| *to = from.to_f32());
}

/// Scores, weights and weighted values of a block.
///
/// # Safety
/// The CPU has the features of `S`; `BlockCall::check` has passed.
#[inline(always)]
pub(crate) unsafe fn attend_block<S: Simd>(call: &mut BlockCall<'_>) {
    // SAFETY: the caller's promise; `check` says how long each slice is.
    unsafe {
        match call.k {
            Cells::F32(k) => scores::<S, f32>(call, k.as_ptr()),
            Cells::F16(k) => scores::<S, f16>(call, k.as_ptr()),
            Cells::Bf16(k) => scores::<S, bf16>(call, k.as_ptr()),
        }
        // A loop: what a closure calls may miss the features.
        for i in 0..call.visible.len() {
            weigh::<S>(call, i);
        }
        match call.v {
            Cells::F32(v) => values::<S, f32>(call, v.as_ptr()),
            Cells::F16(v) => values::<S, f16>(call, v.as_ptr()),
            Cells::Bf16(v) => values::<S, bf16>(call, v.as_ptr()),
        }
    }
}

/// The products of all queries with the keys of the block, a lane for each cell, dimension by dimension.
///
/// # Safety
/// As for [`attend_block`]; `k` are the call's keys.
#[inline(always)]
unsafe fn scores<S: Simd, E: Element>(call: &mut BlockCall<'_>, k: *const E) {
    let n = call.visible.len();
    let mut i = 0;
    while i < n {
        // As many sums as fit in registers beside the keys.
        // SAFETY: there are as many queries left as the tile takes.
        unsafe {
            i += match (n.min((i / Q_GROUP + 1) * Q_GROUP) - i, S::LANES) {
                (8.., 16) => score_tile::<S, E, 8, 2>(call, i, k),
                (4.., 16) => score_tile::<S, E, 4, 2>(call, i, k),
                (2.., 16) => score_tile::<S, E, 2, 2>(call, i, k),
                (_, 16) => score_tile::<S, E, 1, 2>(call, i, k),
                (4.., _) => score_tile::<S, E, 4, 2>(call, i, k),
                (2.., _) => score_tile::<S, E, 2, 4>(call, i, k),
                _ => score_tile::<S, E, 1, 4>(call, i, k),
            };
        }
    }
}

/// The scores of `Q` queries from query `i` on, `V` vectors of cells at a time. Returns `Q`.
///
/// # Safety
/// As for [`scores`]; the call has these queries, which are of one group; `V` vectors are a part of a block.
#[inline(always)]
unsafe fn score_tile<S: Simd, E: Element, const Q: usize, const V: usize>(
    call: &mut BlockCall<'_>,
    i: usize,
    k: *const E,
) -> usize {
    const { assert!(KEY_GROUP.is_multiple_of(S::LANES)) };
    debug_assert!((BLOCK / S::LANES).is_multiple_of(V));
    let dim = call.dim;
    let per_dim = call.next[0].len() / dim;
    // SAFETY: dimension `d` of the cells of lane vector `v` lies in the group that the vector is part of.
    unsafe {
        let q = call.q.as_ptr().add(i / Q_GROUP * Q_GROUP * dim + i % Q_GROUP);
        for first in (0..BLOCK).step_by(V * S::LANES) {
            let mut sums = [[S::splat(0.0); V]; Q];
            for d in 0..dim {
                if i == 0 && first == 0 {
                    prefetch_part::<S>(call.next[0], d, per_dim);
                }
                let mut keys = [S::splat(0.0); V];
                for v in 0..V {
                    let cell = first + v * S::LANES;
                    keys[v] =
                        E::load::<S>(k.add((cell / KEY_GROUP * dim + d) * KEY_GROUP + cell % KEY_GROUP));
                }
                for j in 0..Q {
                    let q = S::splat(*q.add(d * Q_GROUP + j));
                    for v in 0..V {
                        sums[j][v] = keys[v].mul_add(q, sums[j][v]);
                    }
                }
            }
            for j in 0..Q {
                for v in 0..V {
                    sums[j][v].store(call.weights.as_mut_ptr().add((i + j) * BLOCK + first + v * S::LANES));
                }
            }
        }
    }
    Q
}

/// Asks for the lines that begin in part `i` of these bytes, in parts of `n`.
#[inline(always)]
fn prefetch_part<S: Simd>(bytes: &[u8], i: usize, n: usize) {
    let mut at = (i * n).next_multiple_of(64);
    while at < (i + 1) * n {
        S::prefetch(bytes.as_ptr().wrapping_add(at));
        at += 64;
    }
}

/// [`BlockCall::weigh`], with vectors and fused operations.
///
/// # Safety
/// As for [`attend_block`]; the call has this query.
#[inline(always)]
unsafe fn weigh<S: Simd>(call: &mut BlockCall<'_>, i: usize) {
    let n_vectors = const { BLOCK / S::LANES };
    let visible = &call.visible[i];
    let scores = &mut call.weights[i * BLOCK..(i + 1) * BLOCK];
    if let Some(cap) = call.softcap {
        for score in scores.iter_mut() {
            *score = softcap(*score, cap);
        }
    }
    if *visible != (0..BLOCK) {
        scores[..visible.start].fill(f32::NEG_INFINITY);
        scores[visible.end..].fill(f32::NEG_INFINITY);
    }
    let sums = &mut call.sums.weight[i * SUMS..(i + 1) * SUMS];
    let old = call.sums.max[i];
    // SAFETY: there are a block of scores and `SUMS` sums, which are whole vectors.
    unsafe {
        let scores = scores.as_mut_ptr();
        let mut x = [S::splat(0.0); MAX_VECTORS];
        let mut top = S::splat(f32::NEG_INFINITY);
        for v in 0..n_vectors {
            x[v] = S::load(scores.add(v * S::LANES));
            top = x[v].greater(top);
        }
        let max = S::splat(top.greatest()).greater(S::splat(old)).first();
        call.sums.max[i] = max;
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        // What the maximum was before stays what it is: the usual case, and its factor is exactly that of `weight`.
        let factor = if max == old && max != f32::NEG_INFINITY {
            1.0
        } else {
            weight::<S>(S::splat(old - base)).first()
        };
        call.factors[i] = factor;
        for v in 0..n_vectors {
            x[v] = weight::<S>(x[v].sub(S::splat(base)));
            x[v].store(scores.add(v * S::LANES));
        }
        let n_sums = const { SUMS / S::LANES };
        let sums = sums.as_mut_ptr();
        for v in 0..n_sums {
            let at = sums.add(v * S::LANES);
            S::load(at).mul_add(S::splat(factor), x[v].add(x[v + n_sums])).store(at);
        }
    }
}

/// Vectors of a block.
const MAX_VECTORS: usize = 8;

/// `e^x` for `x ≤ 0`, and nothing where that is nearly nothing, as [`act::exp`](crate::act::exp) computes it. NaN stays.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn weight<S: Simd>(x: S) -> S {
    const ROUND: f32 = 12_582_912.0;
    // SAFETY: the caller's promise. The power is from -126 to 0.
    unsafe {
        let limit = S::splat(-87.0);
        let bounded = limit.greater(x);
        let shifted = bounded.mul_add(S::splat(std::f32::consts::LOG2_E), S::splat(ROUND));
        let n = shifted.sub(S::splat(ROUND));
        let r = n.mul_add(S::splat(-0.693_359_4), bounded);
        let r = n.mul_add(S::splat(2.121_944_4e-4), r);
        let mut series = S::splat(1.0 / 720.0);
        for factor in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            series = series.mul_add(r, S::splat(factor));
        }
        series.scale_by_power(shifted).zero_where_less(x, limit)
    }
}

/// Adds the weighted values of the cells that each query sees.
///
/// # Safety
/// As for [`attend_block`]; `v` are the call's values.
#[inline(always)]
unsafe fn values<S: Simd, E: Element>(call: &mut BlockCall<'_>, v: *const E) {
    let mut i = 0;
    while i < call.visible.len() {
        let same = call.visible[i..].iter().take_while(|cells| **cells == call.visible[i]).count();
        // Queries that see the same cells go through them together.
        // SAFETY: there are that many queries, and they see the same.
        unsafe {
            i += match same {
                _ if call.visible[i].is_empty() => same,
                4.. => value_tile::<S, E, 4>(call, i, v),
                2.. => value_tile::<S, E, 2>(call, i, v),
                _ => value_tile::<S, E, 1>(call, i, v),
            };
        }
    }
}

/// # Safety
/// As for [`values`]; the call has queries `i..i + Q`, which see the same cells.
#[inline(always)]
unsafe fn value_tile<S: Simd, E: Element, const Q: usize>(
    call: &mut BlockCall<'_>,
    i: usize,
    v: *const E,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut d = 0;
        // As many sums as lanes: few enough for the registers, and enough to hide the latency of one.
        if Q * 8 <= S::LANES {
            d = value_run::<S, E, Q, 8>(call, i, v, d);
        }
        if Q * 4 <= S::LANES {
            d = value_run::<S, E, Q, 4>(call, i, v, d);
        }
        d = value_run::<S, E, Q, 2>(call, i, v, d);
        value_run::<S, E, Q, 1>(call, i, v, d);
    }
    Q
}

/// Runs of `D` vectors from value `d` on, as far as they go; returns where the rest begins.
///
/// # Safety
/// As for [`value_tile`].
#[inline(always)]
unsafe fn value_run<S: Simd, E: Element, const Q: usize, const D: usize>(
    call: &mut BlockCall<'_>,
    i: usize,
    v: *const E,
    mut d: usize,
) -> usize {
    let width = call.width;
    let cells = call.visible[i].clone();
    let weights = call.weights.as_ptr();
    let out = call.sums.value.as_mut_ptr();
    // SAFETY: values `d..d + D · LANES` are inside the width, the cells inside the block.
    unsafe {
        while d + D * S::LANES <= width {
            let mut sums = [[S::splat(0.0); D]; Q];
            for j in 0..Q {
                let factor = S::splat(call.factors[i + j]);
                for l in 0..D {
                    sums[j][l] = S::load(out.add((i + j) * width + d + l * S::LANES)).mul(factor);
                }
            }
            for c in cells.clone() {
                if i == 0 && d == 0 {
                    prefetch_part::<S>(call.next[1], c, call.next[1].len() / BLOCK);
                }
                let mut values = [S::splat(0.0); D];
                for l in 0..D {
                    values[l] = E::load::<S>(v.add(c * width + d + l * S::LANES));
                }
                for j in 0..Q {
                    let weight = S::splat(*weights.add((i + j) * BLOCK + c));
                    for l in 0..D {
                        sums[j][l] = values[l].mul_add(weight, sums[j][l]);
                    }
                }
            }
            for j in 0..Q {
                for l in 0..D {
                    sums[j][l].store(out.add((i + j) * width + d + l * S::LANES));
                }
            }
            d += D * S::LANES;
        }
    }
    d
}

/// Writes an instruction set's `table()`: for each kernel a safe function that checks the shapes,
/// and behind it the generic body with the features enabled. `table` must be the only way in,
/// and must have detected all of `$features`.
macro_rules! kernel_table {
    ($vector:ty, $isa:literal, $features:literal, $detected:expr) => {
        /// This instruction set's kernels: none unless this CPU has all it needs.
        pub fn table() -> Option<KernelTable> {
            $detected.then_some(KernelTable {
                isa: $isa,
                rows: ROW_OPS,
                matmul_tile,
                delta_step,
                delta_advance,
                delta_run,
                attend_block,
                interleave,
                widen_f16,
            })
        }

        crate::row_ops::row_ops!($features);

        kernel_table!(@kernel $features,
            matmul_tile(w: &WeightRows<'_>, x: &[f32], scratch: &mut Vec<f32>, out: &mut [f32]) -> (),
            { w.checked_columns(x, out); }, simd::matmul_tile::<$vector>(w, x, scratch, out));
        kernel_table!(@kernel $features,
            delta_step(state: &mut [f32], token: &DeltaToken<'_>, q: &[f32], out: &mut [f32]) -> (),
            { token.check_state(state); token.check_output(q, out); },
            simd::delta::<$vector, true>(state, token, q, out));
        kernel_table!(@kernel $features,
            delta_advance(state: &mut [f32], token: &DeltaToken<'_>) -> (),
            token.check_state(state), simd::delta::<$vector, false>(state, token, &[], &mut []));
        kernel_table!(@kernel $features,
            delta_run(state: &mut [f32], run: &DeltaRun<'_>, q: &[f32], out: &mut [f32]) -> (),
            run.check(state, q, out), simd::delta_run::<$vector>(state, run, q, out));
        kernel_table!(@kernel $features, attend_block(call: &mut BlockCall<'_>) -> (),
            call.check(), simd::attend_block::<$vector>(call));
        kernel_table!(@kernel $features, interleave(rows: &[f32], out: &mut [f32]) -> (),
            crate::kv::check_group(rows, out), simd::interleave::<$vector>(rows, out));
        kernel_table!(@kernel $features, widen_f16(from: &[f16], to: &mut [f32]) -> (),
            assert_eq!(from.len(), to.len()), simd::widen_f16::<$vector>(from, to));
    };
    (@kernel $features:literal, $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty, $check:expr, $body:expr) => {
        fn $name($($arg: $ty),*) -> $ret {
            #[target_feature(enable = $features)]
            fn with_features($($arg: $ty),*) -> $ret {
                // SAFETY: the features are enabled here, and the caller has checked the shapes.
                unsafe { $body }
            }
            $check;
            // SAFETY: private, and `table` hands it out only after detecting the features.
            unsafe { with_features($($arg),*) }
        }
    };
}
pub(crate) use kernel_table;
