//! Kernel against kernel: our packed product and candle's quantised one, on the same weights.
//!
//! Copies of a [9728, 2560] matrix, together larger than any cache, are multiplied one after the other on one thread, by both
//! sides in turn. Activations come in as floats and are quantised inside the measured time, once per product, on both
//! sides. candle packs weights at the first product, which is not counted, and makes a tensor for each result, which is
//! (that is its interface); we write into a buffer that is already there.

use std::{
    hint::black_box,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use candle_core::{
    Device, Module, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor, ggml_file::qtensor_from_ggml},
};
use paceline_gguf::GgmlType;
use paceline_kernels::{
    KernelTable, Team,
    packed::{PackedMatrix, PackedTable, QuantRows, pack},
};
use serde_json::{Value, json};

use crate::report::{Report, Samples, columns};

/// The version, pinned in the manifest.
pub const CRATE: &str = "candle-core 0.11.1";

const N_IN: usize = 2560;
const N_OUT: usize = 9728;
/// Bytes of weights in all copies, before anybody packs them.
const BYTES: usize = 400 << 20;

/// A format that both have a packed form of.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    name: &'static str,
    ours: GgmlType,
    candle: GgmlDType,
}

/// All of them.
pub const FORMATS: [Format; 3] = [
    Format { name: "Q4_K", ours: GgmlType::Q4_K, candle: GgmlDType::Q4K },
    Format { name: "Q6_K", ours: GgmlType::Q6_K, candle: GgmlDType::Q6K },
    Format { name: "Q8_0", ours: GgmlType::Q8_0, candle: GgmlDType::Q8_0 },
];

/// candle reads its number of threads from the environment: runs this program again with one, unless it is so already.
pub fn on_one_thread() -> Result<Option<ExitCode>> {
    const VARIABLES: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];
    if VARIABLES.iter().all(|name| std::env::var_os(name).is_some_and(|value| value == "1")) {
        return Ok(None);
    }
    let mut again = Command::new(std::env::current_exe()?);
    again.args(std::env::args_os().skip(1)).envs(VARIABLES.map(|name| (name, "1")));
    let status = again.status()?;
    Ok(Some(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// Compares the products of `n` columns each.
pub fn kernels(types: &[String], n: &[usize], n_round: usize, report: &mut Report) -> Result<()> {
    let table = PackedTable::of(KernelTable::best().map_err(anyhow::Error::msg)?);
    report.fact("paceline kernels", table.isa);
    report.fact("threads", 1);
    for name in types {
        ensure!(FORMATS.iter().any(|f| f.name == name), "--types: expected Q4_K, Q6_K, Q8_0, found {name}");
    }
    for format in FORMATS.iter().filter(|f| types.is_empty() || types.iter().any(|name| name == f.name)) {
        let rows = kernel(format, table, n, n_round)?;
        let names = [
            "n",
            "paceline GMAC/s",
            "candle GMAC/s",
            "paceline /n1",
            "candle /n1",
            "candle ms / paceline ms",
            "results differ by",
        ];
        report.table(&format!("{} [{N_OUT}, {N_IN}]", format.name), columns(&names), rows);
    }
    Ok(())
}

fn kernel(format: &Format, table: &PackedTable, n: &[usize], n_round: usize) -> Result<Vec<Vec<Value>>> {
    let (cpu, team) = (Device::Cpu, Team::new(1));
    // Values that a model could have, quantised by candle; both sides get these bytes.
    let weights: Vec<f32> = (0..N_OUT * N_IN).map(|i| noise(i) / 50.0).collect();
    let weights = QTensor::quantize(&Tensor::from_vec(weights, (N_OUT, N_IN), &cpu)?, format.candle)?;
    let bytes = weights.data()?;
    let n_copy = BYTES.div_ceil(bytes.len());
    let ours: Vec<PackedMatrix> = (0..n_copy)
        .map(|_| pack(format.ours, &bytes, N_IN, N_OUT, &team, &|_| ())?.context("no packed form"))
        .collect::<Result<_>>()?;
    let candles: Vec<QMatMul> = (0..n_copy)
        .map(|_| {
            let tensor = qtensor_from_ggml(format.candle, &bytes, vec![N_OUT, N_IN], &cpu)?;
            Ok(QMatMul::from_qtensor(tensor)?)
        })
        .collect::<Result<_>>()?;

    let n_max = n.iter().copied().max().unwrap_or(1);
    let x: Vec<f32> = (0..n_max * N_IN).map(|i| noise(i + 77)).collect();
    let mut quantised = QuantRows::new();
    let mut out = vec![0.0; n_max * N_OUT];
    let mut rows = Vec::new();
    let mut base: Option<(f64, f64)> = None;
    for &n in n {
        let (x, out) = (&x[..n * N_IN], &mut out[..n * N_OUT]);
        let tensor = Tensor::from_slice(x, (n, N_IN), &cpu)?;
        let (mut our_ms, mut candle_ms) = (Samples::default(), Samples::default());
        let mut theirs = tensor.clone();
        // The first round packs and touches everything.
        for round in 0..=n_round {
            let start = Instant::now();
            for w in &ours {
                quantised.quantize_rows(table, w.grain(), x, n, N_IN);
                table.product(w, 0..w.n_groups(), &quantised, out);
                black_box(&*out);
            }
            let our_time = start.elapsed().as_secs_f64();
            let start = Instant::now();
            for w in &candles {
                theirs = black_box(w.forward(&tensor)?);
            }
            if round > 0 {
                our_ms.extend(vec![our_time * 1e3 / n_copy as f64]);
                candle_ms.extend(vec![start.elapsed().as_secs_f64() * 1e3 / n_copy as f64]);
            }
        }
        let (ours, candle) = (our_ms.median(), candle_ms.median());
        if n == 1 {
            base = Some((ours, candle));
        }
        let gmac = (n * N_IN * N_OUT) as f64 / 1e6;
        rows.push(vec![
            json!(n),
            json!(gmac / ours),
            json!(gmac / candle),
            json!(base.map(|(base, _)| ours / base)),
            json!(base.map(|(_, base)| candle / base)),
            json!(candle / ours),
            json!(difference(out, &theirs.flatten_all()?.to_vec1()?)),
        ]);
    }
    Ok(rows)
}

/// Root mean square of the differences, relative to that of the values.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let differences: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (differences / a.iter().map(|&a| square(a)).sum::<f64>()).sqrt()
}

/// Spread over -1 to 1, the same in every run.
fn noise(i: usize) -> f32 {
    let mixed = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
}
