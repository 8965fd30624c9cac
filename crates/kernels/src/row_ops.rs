//! Ops on whole rows that are plain Rust, compiled once for each instruction set.
//!
//! Their loops run in vectors as wide as the compiler may assume, and it may assume little of "any x86-64". Rust never
//! contracts or reorders floating-point operations, so all of these tables give the same bits; only the speed differs.

use crate::rope::{self, Pairing, Turn};
use crate::summary::{self, Summary};
use crate::{act, conv, norm};

/// A norm of rows: input, weight, what is added to the mean square, output.
pub type RmsNorm = fn(x: &[f32], w: Option<&[f32]>, eps: f32, out: &mut [f32]);
/// A norm of rows behind a gate: input, weight, gate, what is added to the mean square, output.
pub type GatedRmsNorm = fn(x: &[f32], w: &[f32], z: &[f32], eps: f32, out: &mut [f32]);

/// Row ops of one instruction set; the modules that define them say what they compute and when they panic.
#[derive(Clone, Copy, Debug)]
pub struct RowOps {
    /// [`norm::rms_norm`].
    pub rms_norm: RmsNorm,
    /// [`norm::gated_rms_norm`].
    pub gated_rms_norm: GatedRmsNorm,
    /// [`norm::l2_norm`].
    pub l2_norm: fn(x: &[f32], eps: f32, out: &mut [f32]),
    /// [`act::silu_mul`].
    pub silu_mul: fn(gate: &[f32], up: &[f32], out: &mut [f32]),
    /// [`act::gelu_mul`].
    pub gelu_mul: fn(gate: &[f32], up: &[f32], out: &mut [f32]),
    /// [`act::softcap_row`].
    pub softcap: fn(x: &[f32], cap: f32, out: &mut [f32]),
    /// [`act::scale`].
    pub scale: fn(x: &[f32], factor: f32, out: &mut [f32]),
    /// [`act::sigmoid_mul`].
    pub sigmoid_mul: fn(gate: &[f32], x: &[f32], out: &mut [f32]),
    /// [`act::add`].
    pub add: fn(a: &[f32], b: &[f32], out: &mut [f32]),
    /// [`rope::rotate`].
    pub rotate: fn(head: &mut [f32], turns: &[Turn], pairing: Pairing),
    /// [`summary::summarize`].
    pub summarize: fn(logits: &[f32], out: &mut Summary),
    /// [`conv::short_conv_silu`].
    pub short_conv_silu: fn(taps: &[&[f32]], weights: &[f32], out: &mut [f32]),
}

/// For any CPU.
pub const PLAIN: RowOps = RowOps {
    rms_norm: norm::rms_norm,
    gated_rms_norm: norm::gated_rms_norm,
    l2_norm: norm::l2_norm,
    silu_mul: act::silu_mul,
    gelu_mul: act::gelu_mul,
    softcap: act::softcap_row,
    scale: act::scale,
    sigmoid_mul: act::sigmoid_mul,
    add: act::add,
    rotate: rope::rotate,
    summarize: summary::summarize,
    short_conv_silu: conv::short_conv_silu,
};

/// Defines `ROW_OPS`, compiled with these features; only for modules that hand it out after detecting them.
#[cfg(target_arch = "x86_64")]
macro_rules! row_ops {
    ($features:literal) => {
        const ROW_OPS: crate::row_ops::RowOps = {
            use crate::row_ops::row_ops;
            use crate::rope::{self, Pairing, Turn};
            use crate::summary::{self, Summary};
            use crate::{act, conv, norm};
            row_ops!(@op $features, summary::summarize, summarize(logits: &[f32], out: &mut Summary));
            row_ops!(@op $features, norm::rms_norm, rms_norm(x: &[f32], w: Option<&[f32]>, eps: f32, out: &mut [f32]));
            row_ops!(@op $features, norm::gated_rms_norm,
                gated_rms_norm(x: &[f32], w: &[f32], z: &[f32], eps: f32, out: &mut [f32]));
            row_ops!(@op $features, norm::l2_norm, l2_norm(x: &[f32], eps: f32, out: &mut [f32]));
            row_ops!(@op $features, act::silu_mul, silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]));
            row_ops!(@op $features, act::gelu_mul, gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]));
            row_ops!(@op $features, act::softcap_row, softcap(x: &[f32], cap: f32, out: &mut [f32]));
            row_ops!(@op $features, act::scale, scale(x: &[f32], factor: f32, out: &mut [f32]));
            row_ops!(@op $features, act::sigmoid_mul, sigmoid_mul(gate: &[f32], x: &[f32], out: &mut [f32]));
            row_ops!(@op $features, act::add, add(a: &[f32], b: &[f32], out: &mut [f32]));
            row_ops!(@op $features, rope::rotate, rotate(head: &mut [f32], turns: &[Turn], pairing: Pairing));
            row_ops!(@op $features, conv::short_conv_silu,
                short_conv_silu(taps: &[&[f32]], weights: &[f32], out: &mut [f32]));
            crate::row_ops::RowOps {
                rms_norm,
                gated_rms_norm,
                l2_norm,
                silu_mul,
                gelu_mul,
                softcap,
                scale,
                sigmoid_mul,
                add,
                rotate,
                summarize,
                short_conv_silu,
            }
        };
    };
    (@op $features:literal, $plain:path, $name:ident($($arg:ident: $ty:ty),*)) => {
        fn $name($($arg: $ty),*) {
            #[target_feature(enable = $features)]
            fn with_features($($arg: $ty),*) {
                $plain($($arg),*)
            }
            // SAFETY: private, and only in a table that is handed out after detecting the features.
            unsafe { with_features($($arg),*) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use row_ops;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KernelTable;

    /// Every op of a table on rows of `n`, all results one behind the other.
    fn results(ops: &RowOps, n: usize) -> Vec<u32> {
        let row =
            |seed: f32| -> Vec<f32> { (0..n).map(|i| 9.0 * (seed + i as f32 * 12.9898).sin()).collect() };
        let (x, w, z) = (row(1.0), row(2.0), row(3.0));
        let mut all = Vec::new();
        let mut run = |op: &dyn Fn(&mut [f32])| {
            let mut out = vec![f32::NAN; n];
            op(&mut out);
            all.extend(out.into_iter().map(f32::to_bits));
        };
        run(&|out| (ops.rms_norm)(&x, Some(&w), 1e-6, out));
        run(&|out| (ops.rms_norm)(&x, None, 1e-6, out));
        run(&|out| (ops.gated_rms_norm)(&x, &w, &z, 1e-6, out));
        run(&|out| (ops.l2_norm)(&x, 1e-6, out));
        run(&|out| (ops.silu_mul)(&x, &w, out));
        run(&|out| (ops.gelu_mul)(&x, &w, out));
        run(&|out| (ops.softcap)(&x, 3.0, out));
        run(&|out| (ops.scale)(&x, 0.7, out));
        run(&|out| (ops.sigmoid_mul)(&x, &w, out));
        run(&|out| (ops.add)(&x, &w, out));
        for pairing in [Pairing::HalfSplit, Pairing::Adjacent] {
            run(&|out| {
                out.copy_from_slice(&x);
                let turns: Vec<Turn> = (0..n / 2).map(|i| [w[i].cos(), w[i].sin()]).collect();
                (ops.rotate)(out, &turns, pairing);
            });
        }
        for width in [3, 4] {
            let weights: Vec<f32> = (0..n * width).map(|i| (i as f32 * 0.7).sin()).collect();
            let taps = [&x[..], &w, &z, &x];
            run(&|out| (ops.short_conv_silu)(&taps[..width], &weights, out));
        }
        all
    }

    #[test]
    fn all_tables_give_the_same_bits() {
        for n in [1, 2, 7, 16, 31, 64, 257] {
            let plain = results(&PLAIN, n);
            for table in KernelTable::available() {
                assert_eq!(results(&table.rows, n), plain, "{} with {n} values", table.isa);
            }
        }
    }
}
