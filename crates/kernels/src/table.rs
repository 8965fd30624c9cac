//! The kernel table: which instruction set computes, chosen once at run time.
//!
//! [`scalar`](crate::scalar) defines every kernel; the other instruction sets are its twins and
//! differ from it by rounding only. Results of two of them must not be mixed in one run, so the
//! table is chosen once and handed down. The environment variable `PACELINE_ISA` forces one:
//! tests run on each, and a bug report can say whether `scalar` agrees.

use crate::attention::BlockCall;
use crate::delta::{DeltaRun, DeltaToken};
use crate::row_ops::RowOps;
use half::f16;
use std::sync::OnceLock;

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "PACELINE_ISA";

/// The instruction sets this project has kernels for, slowest first. Each gives its table where
/// the CPU has it.
const KNOWN: &[fn() -> Option<KernelTable>] = &[
    || Some(crate::scalar::TABLE),
    #[cfg(target_arch = "x86_64")]
    crate::avx2::table,
    #[cfg(target_arch = "x86_64")]
    crate::avx512::table,
];

/// The kernels of one instruction set: safe to call, equal to `scalar` up to rounding.
///
/// Each kernel's order of floating-point operations depends on the lengths of one row alone, never
/// on how many rows, columns or threads take part.
#[derive(Clone, Copy, Debug)]
pub struct KernelTable {
    /// The name that `PACELINE_ISA` takes.
    pub isa: &'static str,
    /// What is plain Rust, compiled for this instruction set; the same bits in every table.
    pub rows: RowOps,
    /// The product of some weight rows with all rows of `x`: see [`matmul_tile`](crate::matmul).
    pub matmul_tile: MatmulTile,
    /// One token of the gated delta rule, with its output: see [`delta`](crate::delta).
    pub delta_step: fn(state: &mut [f32], token: &DeltaToken<'_>, q: &[f32], out: &mut [f32]),
    /// The state after the same token, bit for bit, without the output.
    pub delta_advance: fn(state: &mut [f32], token: &DeltaToken<'_>),
    /// Several tokens, bit for bit one after the other; `q` and `out` may both be empty.
    pub delta_run: fn(state: &mut [f32], run: &DeltaRun<'_>, q: &[f32], out: &mut [f32]),
    /// A block of KV cells for the queries that share it: see [`attention`](crate::attention).
    pub attend_block: fn(call: &mut BlockCall<'_>),
    /// Keys of [`KEY_GROUP`](crate::kv::KEY_GROUP) cells, row by row, as a group of them, dimension by dimension.
    pub interleave: fn(rows: &[f32], out: &mut [f32]),
    /// Halves as floats, exactly; equal lengths.
    pub widen_f16: fn(from: &[f16], to: &mut [f32]),
}

/// `x [n, n_in]` times weight rows `[m, n_in]` gives `out [n, m]`: see [`matmul`](crate::matmul).
pub type MatmulTile =
    fn(w: &crate::matmul::WeightRows<'_>, x: &[f32], scratch: &mut Vec<f32>, out: &mut [f32]);

/// `PACELINE_ISA` names something that this machine cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PACELINE_ISA={asked}: this machine has kernels for {available}; set one of these, or none")]
pub struct IsaError {
    /// The variable's value.
    pub asked: String,
    /// What it could be.
    pub available: String,
}

impl KernelTable {
    /// The fastest table of this machine, or the one that `PACELINE_ISA` names; the answer of the
    /// first call holds for the life of the process.
    pub fn best() -> Result<&'static Self, IsaError> {
        static BEST: OnceLock<Result<&'static KernelTable, IsaError>> = OnceLock::new();
        BEST.get_or_init(|| {
            let asked = std::env::var_os(ISA_VARIABLE).map(|v| v.to_string_lossy().into_owned());
            Self::choose(asked.as_deref())
        })
        .clone()
    }

    /// All tables that this machine can run, slowest first; `scalar` is always there.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<KernelTable>> = OnceLock::new();
        AVAILABLE.get_or_init(|| KNOWN.iter().filter_map(|table| table()).collect())
    }

    /// The table called `asked`, or the fastest if nothing is asked for.
    pub fn choose(asked: Option<&str>) -> Result<&'static Self, IsaError> {
        let available = Self::available();
        let Some(asked) = asked.filter(|name| !name.is_empty()) else {
            return Ok(available.last().expect("scalar is always there"));
        };
        available.iter().find(|table| table.isa == asked).ok_or_else(|| IsaError {
            asked: asked.to_owned(),
            available: available.iter().map(|t| t.isa).collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_variable() {
        for table in KernelTable::available() {
            assert_eq!(KernelTable::choose(Some(table.isa)).unwrap().isa, table.isa);
        }
    }

    #[test]
    fn the_last_table_is_the_default_and_an_empty_value_is_none() {
        let best = KernelTable::available().last().unwrap().isa;
        assert_eq!(KernelTable::choose(None).unwrap().isa, best);
        assert_eq!(KernelTable::choose(Some("")).unwrap().isa, best);
    }

    #[test]
    fn an_unknown_name_lists_what_there_is() {
        let message = KernelTable::choose(Some("mmx")).unwrap_err().to_string();
        assert!(message.starts_with("PACELINE_ISA=mmx: this machine has kernels for scalar"), "{message}");
    }
}
