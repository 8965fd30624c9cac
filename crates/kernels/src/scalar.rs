//! The kernels in plain Rust. They define what the vector kernels compute and are written to be
//! read; a sum is taken front to back, a product and its addition round separately.

use crate::attention::{BLOCK, BlockCall, Cells, Q_GROUP};
use crate::delta::{DeltaRun, DeltaToken};
use crate::kv::{KEY_GROUP, check_group};
use crate::matmul::WeightRows;
use crate::table::KernelTable;
use half::f16;

/// The table of the scalar kernels, which every machine can run.
pub const TABLE: KernelTable = KernelTable {
    isa: "scalar",
    rows: crate::row_ops::PLAIN,
    matmul_tile,
    delta_step,
    delta_advance,
    delta_run,
    attend_block,
    interleave,
    widen_f16,
};

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}

fn axpy(acc: &mut [f32], a: f32, x: &[f32]) {
    acc.iter_mut().zip(x).for_each(|(acc, x)| *acc += a * x);
}

fn scale(x: &mut [f32], a: f32) {
    x.iter_mut().for_each(|x| *x *= a);
}

fn matmul_tile(w: &WeightRows<'_>, x: &[f32], scratch: &mut Vec<f32>, out: &mut [f32]) {
    w.checked_columns(x, out);
    scratch.resize(w.n_in, 0.0);
    for r in 0..w.n_rows {
        w.dequantize_row(r, scratch);
        for (x, out) in x.chunks_exact(w.n_in).zip(out.chunks_exact_mut(w.n_rows)) {
            out[r] = dot(scratch, x);
        }
    }
}

fn delta_step(state: &mut [f32], token: &DeltaToken<'_>, q: &[f32], out: &mut [f32]) {
    token.check_output(q, out);
    delta_advance(state, token);
    for (row, out) in state.chunks_exact(q.len()).zip(out) {
        *out = dot(row, q);
    }
}

fn delta_advance(state: &mut [f32], token: &DeltaToken<'_>) {
    token.check_state(state);
    for (row, v) in state.chunks_exact_mut(token.k.len()).zip(token.v) {
        scale(row, token.decay);
        let d = token.beta * (v - dot(row, token.k));
        axpy(row, d, token.k);
    }
}

fn delta_run(state: &mut [f32], run: &DeltaRun<'_>, q: &[f32], out: &mut [f32]) {
    run.check(state, q, out);
    for t in 0..run.n() {
        match q.get(t * run.dim_k..(t + 1) * run.dim_k) {
            Some(q) => delta_step(state, &run.token(t), q, &mut out[t * run.dim_v()..(t + 1) * run.dim_v()]),
            None => delta_advance(state, &run.token(t)),
        }
    }
}

fn interleave(rows: &[f32], out: &mut [f32]) {
    check_group(rows, out);
    let dim = rows.len() / KEY_GROUP;
    for (i, out) in out.iter_mut().enumerate() {
        *out = rows[i % KEY_GROUP * dim + i / KEY_GROUP];
    }
}

fn widen_f16(from: &[f16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    from.iter().zip(to).for_each(|(from, to)| *to = from.to_f32());
}

fn attend_block(call: &mut BlockCall<'_>) {
    call.check();
    let (dim, width) = (call.dim, call.width);
    let cell = |cells: &Cells<'_>, at: usize| match cells {
        Cells::F32(data) => data[at],
        Cells::F16(data) => data[at].to_f32(),
        Cells::Bf16(data) => data[at].to_f32(),
    };
    for (i, visible) in call.visible.iter().enumerate() {
        for c in visible.clone() {
            let key = c / KEY_GROUP * KEY_GROUP * dim + c % KEY_GROUP;
            let product = |sum, d| {
                sum + call.q[(i / Q_GROUP * dim + d) * Q_GROUP + i % Q_GROUP]
                    * cell(&call.k, key + d * KEY_GROUP)
            };
            call.weights[i * BLOCK + c] = (0..dim).fold(0.0, product);
        }
        call.weigh(i);
        for d in 0..width {
            let sum = call.sums.value[i * width + d] * call.factors[i];
            let add = |sum, c| sum + call.weights[i * BLOCK + c] * cell(&call.v, c * width + d);
            call.sums.value[i * width + d] = visible.clone().fold(sum, add);
        }
    }
}
