//! `--roofline`: what this machine can do at best, and how measured figures are held against it.

use anyhow::Result;
use paceline_backend::Macs;
use paceline_kernels::{
    KernelTable,
    roofline::{Point, Rate, Roofline, measure},
};
use serde_json::{Value, json};

use super::{BenchArgs, machine};
use crate::{output::say, progress};

/// Repeats of a probe for each round that was asked for.
const PER_ROUND: usize = 3;

/// Measures for 1 thread, powers of two, and all.
pub fn run(args: &BenchArgs) -> Result<()> {
    let roofline = take(args, true)?;
    if args.json {
        let object = json!({
            "build": env!("PACELINE_BUILD"),
            "machine": machine(),
            "roofline": to_json(&roofline),
        });
        return say(format_args!("{}", serde_json::to_string_pretty(&object)?));
    }
    say(format_args!("{}", machine()))?;
    print(&roofline)
}

/// The measurement; only for one thread and for all, unless `every` step between is wanted.
pub fn take(args: &BenchArgs, every: bool) -> Result<Roofline> {
    let n = args.n_threads();
    let mut counts: Vec<usize> = (0..usize::BITS).map(|i| 1 << i).take_while(|&count| count < n).collect();
    if !every {
        counts.truncate(1);
    }
    counts.push(n);
    let line = progress::words("measuring the machine");
    let roofline = measure(KernelTable::best()?, &counts, PER_ROUND * args.curve.rounds, 1.0);
    line.finish_and_clear();
    Ok(roofline)
}

/// As a table.
pub fn print(roofline: &Roofline) -> Result<()> {
    type Of = fn(&Point) -> Rate;
    say(format_args!(
        "{:<44} {:>8} {:>10} {:>10}",
        format!("roofline of {} kernels", roofline.isa),
        "threads",
        "best",
        "median"
    ))?;
    let lines: [(String, &str, Of); 3] = [
        (format!("memory read, sweep over {} MiB", roofline.n_bytes >> 20), "GB/s", |point| point.read),
        (format!("8-bit integers, {}", roofline.dot), "GMAC/s", |point| point.dot),
        (format!("floats, {}", roofline.fma), "GMAC/s", |point| point.fma),
    ];
    for (what, unit, rate) in lines {
        for point in &roofline.points {
            let Rate { best, median } = rate(point);
            let what = format!("{what}, {unit}");
            say(format_args!(
                "{what:<44} {:>8} {:>10.1} {:>10.1}",
                point.n_threads,
                best / 1e9,
                median / 1e9
            ))?;
        }
    }
    Ok(())
}

/// For records.
pub fn to_json(roofline: &Roofline) -> Value {
    let rate = |rate: Rate| json!({ "best": rate.best / 1e9, "median": rate.median / 1e9 });
    json!({
        "isa": roofline.isa,
        "dot": roofline.dot,
        "fma": roofline.fma,
        "sweep_bytes": roofline.n_bytes,
        "points": roofline.points.iter().map(|point| json!({
            "n_threads": point.n_threads,
            "read_gb_s": rate(point.read),
            "dot_gmac_s": rate(point.dot),
            "fma_gmac_s": rate(point.fma),
        })).collect::<Vec<_>>(),
    })
}

/// The least time that so many bytes need.
pub fn read_seconds(point: &Point, n_bytes: u64) -> f64 {
    n_bytes as f64 / point.read.best
}

/// The least time that so many products need.
pub fn product_seconds(point: &Point, macs: Macs) -> f64 {
    macs.int as f64 / point.dot.best + macs.float as f64 / point.fma.best
}
