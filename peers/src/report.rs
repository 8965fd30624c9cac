//! What comes out: facts about the run, then tables; as text to read or as one JSON object to keep.

use std::{fs, time::Duration};

use anyhow::Result;
use serde_json::{Map, Value, json};

/// A report in the making.
pub struct Report {
    json: bool,
    facts: Map<String, Value>,
    tables: Vec<Table>,
}

/// Rows under named columns.
struct Table {
    name: String,
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

impl Report {
    /// Starts the report of `command`; the load average is taken now and when it is printed.
    pub fn new(command: &str, json: bool) -> Report {
        let mut report = Report { json, facts: Map::new(), tables: Vec::new() };
        let (version, system) = crate::llama::version();
        report.fact("command", command);
        report.fact("machine", machine());
        report.fact("isa", isa().join(" "));
        report.fact("huge pages", read_line("/sys/kernel/mm/transparent_hugepage/enabled"));
        report.fact("paceline", env!("PACELINE_COMMIT"));
        report.fact("llama.cpp", format!("{version}, {}", crate::llama::CRATE));
        report.fact("llama.cpp system info", system);
        report.fact("candle", crate::candle::CRATE);
        report.fact("load average at start", read_line("/proc/loadavg"));
        report
    }

    /// Notes a fact about the run.
    pub fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts.insert(name.to_string(), value.into());
    }

    /// Adds a table.
    pub fn table(&mut self, name: &str, columns: Vec<String>, rows: Vec<Vec<Value>>) {
        assert!(rows.iter().all(|row| row.len() == columns.len()), "{name}: rows and columns");
        self.tables.push(Table { name: name.to_string(), columns, rows });
    }

    /// Prints it all to stdout.
    pub fn print(mut self) -> Result<()> {
        self.fact("load average at end", read_line("/proc/loadavg"));
        if self.json {
            let tables: Map<String, Value> =
                self.tables.iter().map(|t| (t.name.clone(), t.to_json())).collect();
            println!("{}", serde_json::to_string_pretty(&json!({ "facts": self.facts, "tables": tables }))?);
            return Ok(());
        }
        for (name, value) in &self.facts {
            println!("# {name}: {}", words(value));
        }
        for table in &self.tables {
            println!("\n{}", table.to_text());
        }
        Ok(())
    }
}

impl Table {
    fn to_json(&self) -> Value {
        let object = |row: &Vec<Value>| -> Value {
            let pairs = self.columns.iter().cloned().zip(row.iter().cloned());
            Value::Object(pairs.collect())
        };
        self.rows.iter().map(object).collect()
    }

    /// Columns as wide as their widest cell.
    fn to_text(&self) -> String {
        let cells: Vec<Vec<String>> = self.rows.iter().map(|row| row.iter().map(words).collect()).collect();
        let widths: Vec<usize> = (self.columns.iter().enumerate())
            .map(|(i, name)| cells.iter().map(|row| row[i].len()).max().unwrap_or(0).max(name.len()))
            .collect();
        let line = |cells: &[String]| -> String {
            let padded = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}"));
            padded.collect::<Vec<_>>().join("  ")
        };
        let rows = cells.iter().map(|row| line(row));
        let lines: Vec<String> =
            [format!("## {}", self.name), line(&self.columns)].into_iter().chain(rows).collect();
        lines.join("\n")
    }
}

/// A value as a reader wants it: four digits, no quotes.
fn words(value: &Value) -> String {
    match value {
        Value::String(words) => words.clone(),
        Value::Null => "-".into(),
        Value::Number(n) if n.is_f64() => match n.as_f64().unwrap_or(f64::NAN) {
            x if x != 0.0 && x.abs() < 0.001 => format!("{x:.1e}"),
            x if x.abs() < 1.0 => format!("{x:.4}"),
            x if x.abs() < 10.0 => format!("{x:.2}"),
            x if x.abs() < 1000.0 => format!("{x:.1}"),
            x => format!("{x:.0}"),
        },
        other => other.to_string(),
    }
}

/// Names of columns.
pub fn columns(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

/// Milliseconds of repeated work.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds some.
    pub fn extend(&mut self, ms: Vec<f64>) {
        self.0.extend(ms);
    }

    /// The middle one; NaN if there are none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The least one.
    pub fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }
}

/// Processor and cores.
fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(": ").map(|(_, value)| value.to_string())
    };
    let n_core = std::thread::available_parallelism().map_or(0, |n| n.get());
    let of = |name| field(name).unwrap_or_else(|| "?".into());
    format!("{} (family {}, model {}), {n_core} cores", of("model name"), of("cpu family"), of("model\t"))
}

/// Those instruction sets of this machine that kernels of either side care about, as Linux names them.
pub fn isa() -> Vec<String> {
    const WANTED: [&str; 8] =
        ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"];
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |name: &&&str| flags.split_whitespace().any(|flag| flag == **name);
    WANTED.iter().filter(has).map(|name| name.to_string()).collect()
}

fn read_line(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "?".into(), |text| text.trim().to_string())
}

/// CPU time of all threads of this process, where Linux says so.
pub fn cpu_time() -> Duration {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Duration::ZERO };
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_least() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan() && samples.min().is_nan());
        samples.extend(vec![9.0, 1.0, 5.0]);
        assert_eq!((samples.median(), samples.min()), (5.0, 1.0));
    }

    #[test]
    fn a_table_as_text_and_as_json() {
        let rows = vec![vec![json!(1), json!(20.04)], vec![json!(16), Value::Null]];
        let table = Table { name: "t".into(), columns: columns(&["n", "some ms"]), rows };
        assert_eq!(table.to_text(), "## t\n n  some ms\n 1     20.0\n16        -");
        assert_eq!(table.to_json()[0], json!({ "n": 1, "some ms": 20.04 }));
    }
}
