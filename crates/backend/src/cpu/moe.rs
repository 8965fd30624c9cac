//! Mixtures of experts: the router, and products in which each slot of a row has its own matrix.
//!
//! What a step costs is the experts that are read, not the rows: each chosen expert is read once, and multiplies all the
//! rows of the batch that chose it, whichever lanes they are from ([`Groups`]). A product falls into tiles of one expert and some of
//! its outputs, all experts in one wave. Its columns are the rows' activations, quantised once for all experts and
//! gathered by the tile; results go back to the slots of their rows. So a slot's value depends on its row and its expert
//! alone, and a row adds its slots in its own order ([`weighted_sum`]): nothing that shares the batch shows.

use std::{cell::RefCell, ops::Range};

use paceline_kernels::{
    act,
    packed::{PackedMatrix, QuantRows},
};

use crate::{Buf, RouterScore, RouterSpec};

use super::{
    exec::{Cx, Nanos},
    ops::{TILE_BYTES, matmul_chunk},
    weights::Weight,
};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Per-thread buffers, kept from tile to tile.
#[derive(Default)]
struct Scratch {
    rows: QuantRows,
    floats: Vec<f32>,
    weights: Vec<f32>,
    out: Vec<f32>,
}

/// Ranks a row's logits and weighs the best: `ids` and `weights` of `n_used` values, the best expert first.
pub(super) fn route(logits: &[f32], spec: &RouterSpec, ids: &mut [f32], weights: &mut [f32]) {
    let n_used = spec.n_used;
    let better = |a: f32, b: f32| a > b || (a.is_nan() && !b.is_nan());
    let mut n = 0;
    for (expert, &logit) in logits.iter().enumerate() {
        // Those that are as good came earlier and stay in front.
        let at = weights[..n].partition_point(|&other| !better(logit, other));
        if at == n_used {
            continue;
        }
        n = n_used.min(n + 1);
        weights.copy_within(at..n - 1, at + 1);
        ids.copy_within(at..n - 1, at + 1);
        (weights[at], ids[at]) = (logit, expert as f32);
    }
    match spec.score {
        RouterScore::Softmax => {
            let max = weights[0];
            weights.iter_mut().for_each(|w| *w = act::exp(*w - max));
            if !spec.normalise {
                let sum: f32 = logits.iter().map(|x| act::exp(x - max)).sum();
                weights.iter_mut().for_each(|w| *w /= sum);
            }
        }
        RouterScore::Sigmoid => weights.iter_mut().for_each(|w| *w = act::sigmoid(*w)),
    }
    let sum = if spec.normalise { weights.iter().sum() } else { 1.0 };
    weights.iter_mut().for_each(|w| *w = *w / sum * spec.scale);
}

/// `out = Σ_s weights[s] · x[s]`, `x` having a part as wide as `out` for each slot; from the first slot on.
pub(super) fn weighted_sum(x: &[f32], weights: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (x, w) in x.chunks_exact(out.len()).zip(weights) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += w * x);
    }
}

/// Which slots of which rows each expert works for, in one step and at one router.
pub(super) struct Groups {
    /// The router's choice.
    pub ids: Buf,
    n_expert: usize,
    /// Experts that some row chose, ascending, and where their places lie.
    chosen: Vec<(usize, Range<usize>)>,
    /// `row · n_used + slot`, expert by expert, ascending for each.
    places: Vec<u32>,
    /// For each expert where its next place goes.
    next: Vec<usize>,
}

impl Groups {
    /// For the choices in `ids`.
    pub fn new(ids: Buf, n_expert: usize) -> Groups {
        Groups { ids, n_expert, chosen: Vec::with_capacity(n_expert), places: Vec::new(), next: Vec::new() }
    }

    /// Groups the choices of a step, `[n, n_used]`. Allocates only if no step had more rows.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn group(&mut self, ids: &[f32]) {
        self.next.clear();
        self.next.resize(self.n_expert, 0);
        ids.iter().for_each(|id| self.next[*id as usize] += 1);
        self.chosen.clear();
        let mut end = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let start = end;
            end += *next;
            *next = start;
            if start < end {
                self.chosen.push((expert, start..end));
            }
        }
        self.places.resize(ids.len(), 0);
        for (place, id) in ids.iter().enumerate() {
            let next = &mut self.next[*id as usize];
            self.places[*next] = place as u32;
            *next += 1;
        }
    }

    /// Experts that are read.
    pub fn n_chosen(&self) -> usize {
        self.chosen.len()
    }
}

/// A product whose slots have their own matrices.
#[derive(Clone, Copy)]
pub(super) struct ExpertMatMul<'a> {
    pub weight: &'a Weight,
    /// The packed matrix of all experts and the store of the activations, if it is packed.
    pub packed: Option<(&'a PackedMatrix, usize)>,
    pub n_expert: usize,
    pub groups: &'a Groups,
    pub src: Buf,
    pub dst: Buf,
}

impl ExpertMatMul<'_> {
    fn n_out(&self) -> usize {
        self.weight.n_rows() / self.n_expert
    }

    /// Pieces that one expert's outputs fall into (groups of 32 if they are packed), and the size of a piece.
    fn chunks(&self, n_threads: usize) -> (usize, usize) {
        let (n, at_most) = match self.packed {
            Some((w, _)) => {
                let n = w.n_groups() / self.n_expert;
                let of_bytes = |bytes: usize| (bytes * w.n_groups() / w.bytes()).max(1);
                let share = (n * self.groups.n_chosen()).div_ceil(4 * n_threads);
                (n, share.clamp(of_bytes(*TILE_BYTES.start()), of_bytes(*TILE_BYTES.end())))
            }
            None => (self.n_out(), matmul_chunk(self.n_out(), n_threads)),
        };
        let n_chunk = n.div_ceil(at_most);
        (n_chunk, n.div_ceil(n_chunk))
    }

    pub fn n_tiles(&self, n_threads: usize) -> usize {
        self.groups.n_chosen() * self.chunks(n_threads).0
    }

    pub fn work(&self) -> Nanos {
        let n_weights = self.weight.n_in() * self.n_out();
        let (n_chosen, n) = (self.groups.n_chosen(), self.groups.places.len());
        match self.packed {
            Some((w, _)) => n_chosen * w.bytes() / self.n_expert / 16 + n * n_weights / 256,
            None => n_weights * (4 * n_chosen + n) / 64,
        }
    }

    /// Some outputs of one expert, for all slots that chose it.
    pub fn run(&self, cx: &Cx<'_>, n_threads: usize, tile: usize) {
        let (n_chunk, chunk) = self.chunks(n_threads);
        let (expert, places) = &self.groups.chosen[tile / n_chunk];
        let places = &self.groups.places[places.clone()];
        let pieces = tile % n_chunk * chunk..(tile % n_chunk + 1) * chunk;
        let (n_out, n_in) = (self.n_out(), self.weight.n_in());
        let n_used = cx.plan.width(self.dst) / n_out;
        // A row has one input for all slots, or one for each.
        let n_input = cx.plan.width(self.src) / n_in;
        let input = |place: &u32| *place as usize * n_input / n_used;
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { rows, floats, weights, out } = scratch;
            let (outputs, width) = match self.packed {
                Some((w, store)) => {
                    let n_group = w.n_groups() / self.n_expert;
                    let all = cx.quantized(store);
                    // An expert that has them all has them in order.
                    let x = if places.len() == all.n() {
                        all
                    } else {
                        rows.reserve(all.grain(), all.n() / n_input, all.n_in());
                        rows.gather(all, places.iter().map(input));
                        &*rows
                    };
                    let groups = expert * n_group + pieces.start..expert * n_group + pieces.end.min(n_group);
                    // The last group of an expert may be filled up with rows that are nobody's.
                    let width = w.rows(groups.clone()).len();
                    out.resize(places.len() * width, 0.0);
                    cx.packed.product(w, groups, x, out);
                    let start = w.rows(0..pieces.start).len();
                    (start..n_out.min(start + width), width)
                }
                None => {
                    let outputs = pieces.start..pieces.end.min(n_out);
                    let all = cx.all(self.src);
                    floats.clear();
                    floats.reserve(all.len() / n_input);
                    places.iter().for_each(|p| floats.extend_from_slice(&all[input(p) * n_in..][..n_in]));
                    out.resize(places.len() * outputs.len(), 0.0);
                    let w = self.weight.rows(expert * n_out + outputs.start, outputs.len());
                    (cx.table.matmul_tile)(&w, floats, weights, out);
                    let width = outputs.len();
                    (outputs, width)
                }
            };
            for (place, values) in places.iter().zip(out.chunks_exact(width)) {
                let (row, slot) = (*place as usize / n_used, *place as usize % n_used);
                let columns = slot * n_out + outputs.start..slot * n_out + outputs.end;
                // SAFETY: a slot has one expert, and of its outputs this tile alone has these.
                unsafe { cx.part_mut(self.dst, row, columns) }.copy_from_slice(&values[..outputs.len()]);
            }
        });
    }
}
