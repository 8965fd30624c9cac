//! Activations as packed matrices multiply them: quantised once, for all matrices that read them.
//!
//! A product with a packed matrix reads [`QuantRows`] of its grain, not floats. Where those are made is worked out
//! here, once for a plan:
//!
//! * an op that computes whole rows quantises each row right behind it, while the row is in the nearest cache;
//! * what several tiles compute together (attention, a delta rule, a product) gets an op of its own in the wave before its
//!   first reader, or in a wave made for it where that one computes it still.
//!
//! Rows are kept in *stores*. Two buffers share a store if it fits both and no wave needs both, so a model of many
//! layers has as many stores as one layer.
//!
//! [`QuantRows`]: paceline_kernels::packed::QuantRows

use paceline_kernels::packed::Grain;

use crate::{Buf, Op, Plan, Rows};

use super::ops::computes_whole_rows;

/// What a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Store {
    pub grain: Grain,
    pub width: usize,
    /// How many of them each row of the step has: one, or one for each slot of a mixture of experts.
    pub parts: usize,
    pub rows: Rows,
}

/// A piece of a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub work: Work,
    /// Stores that it fills.
    pub fills: Vec<usize>,
}

/// What an [`Item`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// The op of the plan with this number, and the filling of stores with its result.
    Op(usize),
    /// Only the filling of stores with this buffer.
    Quantize(Buf),
}

/// The waves of a plan with the quantising in them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    pub waves: Vec<Vec<Item>>,
    pub stores: Vec<Store>,
    /// For each op of the plan, the store that it reads.
    pub reads: Vec<Option<usize>>,
}

/// A buffer that products want in a grain. Times are numbers of waves, doubled: odd ones are the plan's, even ones lie
/// between.
struct Need {
    buf: Buf,
    grain: Grain,
    /// Width of what is multiplied: the buffer's, or a part of it.
    width: usize,
    made: usize,
    last: usize,
    readers: Vec<usize>,
}

/// Schedules a plan whose product `i` multiplies activations of `grain(i)`, or floats from its buffer if that is none.
pub(super) fn schedule(plan: &Plan, grain: impl Fn(usize) -> Option<Grain>) -> Schedule {
    let mut writers: Vec<Option<(usize, usize)>> = vec![None; plan.bufs.len()];
    let mut times: Vec<Vec<Item>> = vec![Vec::new(); 2 * plan.waves.len() + 1];
    for (iw, wave) in plan.waves.iter().enumerate() {
        for i in wave.clone() {
            times[2 * iw + 1].push(Item { work: Work::Op(i), fills: Vec::new() });
            for written in plan.ops[i].writes(|buf| plan.width(buf)) {
                writers[written.buf.0 as usize] = Some((iw, i));
            }
        }
    }

    let mut needs: Vec<Need> = Vec::new();
    for (iw, wave) in plan.waves.iter().enumerate() {
        for i in wave.clone() {
            let Some(grain) = grain(i) else { continue };
            let (src, width) = match plan.ops[i] {
                Op::MatMul { src, .. } => (src, plan.width(src)),
                Op::ExpertMatMul { src, n_in, .. } => (src, n_in),
                ref op => panic!("{op:?} multiplies nothing"),
            };
            match needs.iter_mut().find(|need| (need.buf, need.grain, need.width) == (src, grain, width)) {
                Some(need) => {
                    need.last = 2 * iw + 1;
                    need.readers.push(i);
                }
                None => {
                    let made = made_at(plan, writers[src.0 as usize], iw);
                    needs.push(Need { buf: src, grain, width, made, last: 2 * iw + 1, readers: vec![i] });
                }
            }
        }
    }

    needs.sort_by_key(|need| need.made);
    let mut reads = vec![None; plan.ops.len()];
    // Each store with the time of its last reader.
    let mut stores: Vec<(Store, usize)> = Vec::new();
    for need in &needs {
        let &Need { grain, width, .. } = need;
        let store = Store { grain, width, parts: plan.width(need.buf) / width, rows: plan.rows(need.buf) };
        let free = stores.iter().position(|(other, last)| *other == store && *last < need.made);
        let at = free.unwrap_or_else(|| {
            stores.push((store, 0));
            stores.len() - 1
        });
        stores[at].1 = need.last;
        need.readers.iter().for_each(|&i| reads[i] = Some(at));
        let makes = |item: &Item| match item.work {
            Work::Op(i) => {
                computes_whole_rows(&plan.ops[i])
                    && plan.ops[i].writes(|buf| plan.width(buf)).iter().any(|w| w.buf == need.buf)
            }
            Work::Quantize(buf) => buf == need.buf,
        };
        let items = &mut times[need.made];
        match items.iter_mut().find(|item| makes(item)) {
            Some(item) => item.fills.push(at),
            None => items.push(Item { work: Work::Quantize(need.buf), fills: vec![at] }),
        }
    }
    times.retain(|items| !items.is_empty());
    Schedule { waves: times, stores: stores.into_iter().map(|(store, _)| store).collect(), reads }
}

/// When a buffer with this last writer is quantised for a first reader in wave `first`.
fn made_at(plan: &Plan, writer: Option<(usize, usize)>, first: usize) -> usize {
    let Some((wave, op)) = writer else { panic!("a product reads what nobody writes") };
    assert!(wave < first, "a product in wave {first} reads what wave {wave} writes");
    if computes_whole_rows(&plan.ops[op]) {
        2 * wave + 1
    } else if wave + 1 < first {
        2 * first - 1
    } else {
        2 * first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Matrix, PlanBuilder, WeightId};

    fn matrix(ty: u32) -> Matrix {
        Matrix { id: WeightId(ty), n_in: 8, n_out: 8 }
    }

    /// A plan over matrices 0 (unpacked), 1 (Per32) and 2 (Per256), and its schedule as text, a wave a line.
    fn check(record: impl Fn(&mut PlanBuilder<'_>) -> Buf, expected: &str) {
        let mut p = PlanBuilder::new(&[]);
        let out = record(&mut p);
        let plan = p.finish(Some(out));
        let schedule = schedule(&plan, |i| match plan.ops[i] {
            Op::MatMul { weight: WeightId(1), .. } => Some(Grain::Per32),
            Op::MatMul { weight: WeightId(2), .. } => Some(Grain::Per256),
            _ => None,
        });
        let mut text = String::new();
        for wave in &schedule.waves {
            let line = wave.iter().map(|item| {
                let mut words = match item.work {
                    Work::Op(i) => format!("{:?}", plan.ops[i]).split([' ', '(']).next().unwrap().to_string(),
                    Work::Quantize(_) => "Quantize".into(),
                };
                if let Work::Op(i) = item.work
                    && let Some(store) = schedule.reads[i]
                {
                    words += &format!("<{store}");
                }
                item.fills.iter().for_each(|store| words += &format!(">{store}"));
                words
            });
            text += &line.collect::<Vec<_>>().join(" ");
            text.push('\n');
        }
        let expected: String = expected.lines().map(|l| format!("{}\n", l.trim())).collect();
        assert_eq!(text.trim(), expected.trim());
    }

    #[test]
    fn rows_are_quantised_by_the_op_that_computes_them_once_per_grain() {
        check(
            |p| {
                let x = p.input(8);
                let [a, b, c, d] = p.matmuls(x, [&matrix(1), &matrix(1), &matrix(2), &matrix(0)]);
                let (x, y) = (p.add(a, b), p.add(c, d));
                p.add(x, y)
            },
            "Input>0>1
             MatMul<0 MatMul<0 MatMul<1 MatMul
             Add Add
             Add",
        );
    }

    #[test]
    fn what_tiles_compute_together_is_quantised_between_writer_and_reader() {
        check(
            |p| {
                let x = p.input(8);
                let x = p.matmul(x, &matrix(1));
                p.matmul(x, &matrix(2))
            },
            "Input>0
             MatMul<0
             Quantize>1
             MatMul<1",
        );
        // A wave lies between already.
        check(
            |p| {
                let x = p.input(8);
                let x = p.matmul(x, &matrix(0));
                let y = p.add(x, x);
                let y = p.silu_mul(y, y);
                let [a, b] = [p.matmul(y, &matrix(0)), p.matmul(x, &matrix(1))];
                let c = p.matmul(b, &matrix(0));
                let d = p.add(a, c);
                p.add(d, y)
            },
            "Input
             MatMul
             Quantize>0
             Add MatMul<0
             SiluMul MatMul
             MatMul
             Add
             Add",
        );
    }

    #[test]
    fn stores_are_used_again_when_their_last_reader_is_done() {
        check(
            |p| {
                let x = p.input(8);
                let y = p.matmul(x, &matrix(1));
                let y = p.add(y, x);
                let z = p.matmul(y, &matrix(1));
                let z = p.add(z, y);
                // `x` again: its rows had to stay.
                let w = p.matmul(z, &matrix(1));
                let w = p.add(w, z);
                let v = p.matmul(w, &matrix(1));
                p.add(v, w)
            },
            "Input>0
             MatMul<0
             Add>0
             MatMul<0
             Add>0
             MatMul<0
             Add>0
             MatMul<0
             Add",
        );
        // Made while the other is still read.
        check(
            |p| {
                let x = p.input(8);
                let a = p.matmul(x, &matrix(1));
                let y = p.silu_mul(x, x);
                let b = p.matmul(y, &matrix(1));
                p.add(a, b)
            },
            "Input>0
             MatMul<0 SiluMul>1
             MatMul<1
             Add",
        );
    }
}
