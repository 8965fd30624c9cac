//! The kernels in plain Rust. They define what the vector kernels compute and are written to be
//! read; a sum is taken front to back, a product and its addition round separately.

use crate::delta::DeltaToken;
use crate::matmul::WeightRows;
use crate::table::KernelTable;
use half::f16;

/// The table of the scalar kernels, which every machine can run.
pub const TABLE: KernelTable = KernelTable {
    isa: "scalar",
    dot,
    dot_f16,
    axpy,
    axpy_f16,
    scale,
    matmul_tile,
    delta_step,
    delta_advance,
};

fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}

fn dot_f16(a: &[f32], b: &[f16]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b.to_f32())
}

fn axpy(acc: &mut [f32], a: f32, x: &[f32]) {
    assert_eq!(acc.len(), x.len());
    acc.iter_mut().zip(x).for_each(|(acc, x)| *acc += a * x);
}

fn axpy_f16(acc: &mut [f32], a: f32, x: &[f16]) {
    assert_eq!(acc.len(), x.len());
    acc.iter_mut().zip(x).for_each(|(acc, x)| *acc += a * x.to_f32());
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
