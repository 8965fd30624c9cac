//! The kernels in plain Rust. They define what the vector kernels compute and are written to be
//! read; a sum is taken front to back, a product and its addition round separately.

use crate::attention::{BLOCK, BlockCall, Cells};
use crate::delta::DeltaToken;
use crate::matmul::WeightRows;
use crate::table::KernelTable;
use half::f16;

/// The table of the scalar kernels, which every machine can run.
pub const TABLE: KernelTable = KernelTable {
    isa: "scalar",
    rows: crate::row_ops::PLAIN,
    dot,
    dot_f16,
    axpy,
    axpy_f16,
    scale,
    matmul_tile,
    delta_step,
    delta_advance,
    attend_block,
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

fn attend_block(call: &mut BlockCall<'_>) {
    call.check();
    let width = call.width;
    let cell = |cells: &Cells<'_>, at: usize| match cells {
        Cells::F32(data) => data[at],
        Cells::F16(data) => data[at].to_f32(),
        Cells::Bf16(data) => data[at].to_f32(),
    };
    for (i, visible) in call.visible.iter().enumerate() {
        for c in visible.clone() {
            let product = |sum, d| sum + call.q[i * width + d] * cell(&call.k, c * width + d);
            call.weights[i * BLOCK + c] = (0..width).fold(0.0, product);
        }
        call.weigh(i);
        for d in 0..width {
            let sum = call.sums.value[i * width + d] * call.factors[i];
            let add = |sum, c| sum + call.weights[i * BLOCK + c] * cell(&call.v, c * width + d);
            call.sums.value[i * width + d] = visible.clone().fold(sum, add);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vectors(n: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
        prop::collection::vec((-4.0f32..4.0, -4.0f32..4.0), n).prop_map(|pairs| pairs.into_iter().unzip())
    }

    /// The bound for a sum of these products, whatever its order.
    fn bound(a: &[f32], b: &[f32]) -> f32 {
        let size: f32 = a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum();
        f32::EPSILON * (a.len() as f32 + 2.0) * size
    }

    fn dot_f64(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn dots_match_f64((a, b) in vectors(0..300)) {
            let halves: Vec<f16> = b.iter().map(|b| f16::from_f32(*b)).collect();
            let widened: Vec<f32> = halves.iter().map(|b| b.to_f32()).collect();
            for table in KernelTable::available() {
                let got = (table.dot)(&a, &b);
                prop_assert!((got - dot_f64(&a, &b)).abs() <= bound(&a, &b), "{}: {got}", table.isa);
                // Widening is exact, so the half-precision form is the same kernel.
                let (got, want) = ((table.dot_f16)(&a, &halves), (table.dot)(&a, &widened));
                prop_assert_eq!(got.to_bits(), want.to_bits(), "{}", table.isa);
            }
        }

        #[test]
        fn axpy_and_scale_match_the_twin((acc, x) in vectors(0..100), factor in -2.0f32..2.0) {
            let halves: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
            let widened: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            for table in KernelTable::available() {
                let mut got = acc.clone();
                (table.axpy)(&mut got, factor, &x);
                for (i, got) in got.iter().enumerate() {
                    let size = acc[i].abs() + (factor * x[i]).abs();
                    let want = acc[i] + factor * x[i];
                    prop_assert!((got - want).abs() <= f32::EPSILON * size, "{} at {i}", table.isa);
                }
                let (mut half, mut wide) = (acc.clone(), acc.clone());
                (table.axpy_f16)(&mut half, factor, &halves);
                (table.axpy)(&mut wide, factor, &widened);
                prop_assert_eq!(half, wide, "{}", table.isa);

                let mut scaled = acc.clone();
                (table.scale)(&mut scaled, factor);
                prop_assert!(scaled.iter().zip(&acc).all(|(s, a)| *s == a * factor), "{}", table.isa);
            }
        }

        #[test]
        fn an_element_of_axpy_does_not_depend_on_where_it_lies((acc, x) in vectors(1..60), a in -2.0f32..2.0) {
            for table in KernelTable::available() {
                let mut whole = acc.clone();
                (table.axpy)(&mut whole, a, &x);
                for i in 0..acc.len() {
                    let mut one = [acc[i]];
                    (table.axpy)(&mut one, a, &x[i..=i]);
                    prop_assert_eq!(one[0].to_bits(), whole[i].to_bits(), "{} at {}", table.isa, i);
                }
            }
        }
    }
}
