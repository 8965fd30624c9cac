//! `paceline bench`: the figures, and that drafts change nothing.

use crate::command::{Ran, paceline, repo_str, rewritten};

const DRAFTER: &str = "models/bundled/drafter.gguf";

#[test]
fn drafts_pay_and_change_nothing() {
    let report = paceline(&[
        "bench",
        "--json",
        "--runs",
        "1",
        "-n",
        "64",
        "--n-prompt",
        "128",
        "--spec-draft-n-max",
        "15",
    ])
    .json();
    let total = &report["total"];
    assert_eq!(total["same_tokens"], true, "{report}");
    assert_eq!(total["n_not_finite"], 0);
    // 4.8 when this was written; a wrong tap, mask or position brings it to about 1.
    let accept_len = total["acceptance"]["accept_len"].as_f64().unwrap();
    assert!(accept_len > 3.0, "tokens per forward fell to {accept_len}");
    assert_eq!(report["prompts"].as_array().unwrap().len(), 6);
    for row in report["prompts"].as_array().unwrap() {
        let positive = |key: &str| assert!(row[key]["mean"].as_f64() > Some(0.0), "{key}: {row}");
        positive("plain_tok_s");
        positive("speculative_tok_s");
        assert!(row["n_predicted"].as_u64() > Some(0) && row["n_word"].as_u64() > Some(0), "{row}");
        let share = row["unique_word_share"].as_f64().unwrap();
        assert!(share > 0.0 && share <= 1.0, "{row}");
        // The toy's counting does go round in circles; its stories do not.
        assert!(row["name"] != "story" || row["is_repetitive"] == false, "{row}");
    }
    for stage in ["draft", "verify", "commit"] {
        assert!(total["stage_s"][stage].as_f64() > Some(0.0), "{stage}: {total}");
    }
    assert!(report["prefill"]["plain_tok_s"]["mean"].as_f64() > Some(0.0), "{report}");
    assert!(report["drafter"].as_str().unwrap().starts_with("dflash: arch dflash"), "{report}");
}

#[test]
fn slots_side_by_side_and_a_table() {
    let out = paceline(&[
        "bench",
        "--runs",
        "1",
        "-n",
        "24",
        "--n-prompt",
        "0",
        "-np",
        "3",
        "-p",
        "Write JSON for a dog.",
        "-p",
        "Count to ten.",
    ])
    .ok();
    for part in ["prompt 1 +2", "the same tokens", "words", "unique", "repeats", "% drafting"] {
        assert!(out.contains(part), "{part} in {out}");
    }
    let out =
        paceline(&["bench", "--runs", "1", "-n", "8", "--n-prompt", "0", "-p", "hi", "--no-draft"]).ok();
    assert!(out.contains("no drafter") && !out.contains("accepted by position"), "{out}");
}

/// The drafter's last norm turned round: finite, and always for the token that the target wants least.
#[test]
fn a_useless_drafter_fails_the_bench() {
    let dir = tempfile::tempdir().unwrap();
    let drafter = rewritten(DRAFTER, dir.path(), "useless.gguf", &|_| {}, &mut |tensor, data| {
        let mut data = data.to_vec();
        if tensor.name == "output_norm.weight" {
            data.iter_mut().skip(3).step_by(4).for_each(|byte| *byte ^= 0x80);
        }
        (tensor.ty, data)
    });
    let ran = bench_with(&drafter);
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let total = &report["total"];
    assert_eq!((total["same_tokens"].as_bool(), total["n_not_finite"].as_u64()), (Some(true), Some(0)));
    assert_eq!(total["acceptance"]["draft_n_accepted"], 0, "{total}");
    ran.fails_with(&["error: none of", "drafted tokens was accepted", "the target's drafter?"]);
}

/// So do outputs that are not numbers, and that is said: its last norm is finite, as the loader demands, but so large that
/// the logits are not.
#[test]
fn a_drafter_that_overflows_fails_the_bench() {
    let dir = tempfile::tempdir().unwrap();
    let drafter = rewritten(DRAFTER, dir.path(), "huge.gguf", &|_| {}, &mut |tensor, data| match tensor
        .name
        .as_str()
    {
        "output_norm.weight" => (tensor.ty, f32::MAX.to_le_bytes().repeat(data.len() / 4)),
        _ => (tensor.ty, data.to_vec()),
    });
    bench_with(&drafter).fails_with(&["error:", "outputs were not finite"]);
}

fn bench_with(drafter: &str) -> Ran {
    let target = repo_str("models/bundled/target.gguf");
    let mut args = vec!["bench", "-m", &target, "--runs", "1", "-n", "24", "--n-prompt", "0", "--json"];
    args.extend(["-p", "Write JSON for a dog.", "-md", drafter]);
    paceline(&args)
}

/// A model that can only say "the": its logits are all 0, so that the first token wins, and that is the word.
#[test]
fn a_text_that_repeats_itself_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let target = rewritten(
        "models/bundled/target.gguf",
        dir.path(),
        "the.gguf",
        &|metadata| {
            let tokens = metadata.require_bytes_array("tokenizer.ggml.tokens").unwrap();
            let mut texts: Vec<Vec<u8>> = tokens.iter().map(<[u8]>::to_vec).collect();
            let the = texts.iter().position(|text| *text == "Ġthe".as_bytes()).unwrap();
            texts.swap(0, the);
            metadata.insert("tokenizer.ggml.tokens", texts);
        },
        &mut |tensor, data| match tensor.name.as_str() {
            "output_norm.weight" => (tensor.ty, vec![0; data.len()]),
            _ => (tensor.ty, data.to_vec()),
        },
    );
    let mut args = vec!["bench", "-m", &target, "--no-draft", "--runs", "1", "-n", "20", "--n-prompt", "0"];
    args.extend(["-p", "hi"]);
    let table = paceline(&args);
    assert!(table.err.contains("warning: prompt 1: the answer repeats itself"), "{}", table.err);
    table.ok();
    args.push("--json");
    let row = paceline(&args).json()["prompts"][0].clone();
    assert_eq!((&row["n_word"], &row["n_repeat"]), (&20.into(), &19.into()), "{row}");
    assert_eq!((&row["unique_word_share"], &row["is_repetitive"]), (&0.05.into(), &true.into()), "{row}");
}

const N: [u64; 10] = [1, 2, 3, 4, 5, 8, 12, 16, 24, 32];

/// Every figure is there and is a possible one; how fast this machine is today is nobody's test.
fn check_curve(report: &serde_json::Value, n_slots: &[u64]) {
    let positive = |value: &serde_json::Value, what: &str| {
        assert!(value.as_f64().is_some_and(|x| x > 0.0 && x.is_finite()), "{what} in {report:#}");
    };
    for (kind, want) in [("rows", &N[..]), ("slots", n_slots)] {
        let found = report[kind].as_array().unwrap();
        let n: Vec<u64> = found.iter().map(|row| row["n"].as_u64().unwrap()).collect();
        assert_eq!(n, want, "{kind}");
        let mut ideal = 0.0;
        for row in found {
            for key in ["ratio", "ideal_ms", "weight_gb_s", "read_share", "gmac_s", "peak_share"] {
                positive(&row[key], key);
            }
            let (median, min) = (row["ms"]["median"].as_f64().unwrap(), row["ms"]["min"].as_f64().unwrap());
            assert!(min > 0.0 && min <= median, "{row}");
            assert!(row["ideal_ms"].as_f64() >= Some(ideal), "more rows never need less: {report:#}");
            ideal = row["ideal_ms"].as_f64().unwrap();
        }
    }
    assert_eq!(report["rows"][0]["ratio"], 1.0);
    for key in ["weight_bytes", "macs_per_row", "macs_per_output"] {
        positive(&report["step"][key], key);
    }
    for key in ["tok_s", "gmac_s_per_thread"] {
        positive(&report["prefill"][key], key);
    }
    check_roofline(&report["roofline"]);
    assert!(report["machine"].as_str().is_some_and(|machine| machine.contains("cores")), "{report:#}");
}

fn check_roofline(roofline: &serde_json::Value) {
    let points = roofline["points"].as_array().unwrap();
    assert!(!points.is_empty() && points[0]["n_threads"] == 1, "{roofline}");
    for point in points {
        for key in ["read_gb_s", "dot_gmac_s", "fma_gmac_s"] {
            let (best, median) =
                (point[key]["best"].as_f64().unwrap(), point[key]["median"].as_f64().unwrap());
            assert!(median > 0.0 && best >= median && best.is_finite(), "{key}: {point}");
        }
    }
}

#[test]
fn a_curve_of_the_bundled_pair() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("curve.svg");
    let args = ["bench", "--curve", "--rounds", "1", "--json", "--plot", plot.to_str().unwrap()];
    let report = paceline(&args).json();
    check_curve(&report, &N);
    let drafter = &report["drafter"];
    assert_eq!(drafter["n_block"], 16, "{drafter}");
    for key in ["draft_ms", "verify_ms", "absorb_ms"] {
        assert!(drafter[key]["median"].as_f64() > Some(0.0), "{key}: {drafter}");
    }
    assert!(drafter["cycle_plain_tokens"].as_f64() > Some(1.0), "{drafter}");
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("bundled"), "{svg}");
    assert_eq!(svg.matches("<circle").count(), 2 * N.len(), "a dot for each size, of rows and of slots");
}

#[test]
fn a_curve_of_a_synthetic_pair_deep_in_its_context() {
    let dir = tempfile::tempdir().unwrap();
    let keep = dir.path().join("toy.gguf");
    let report = paceline(&[
        "bench",
        "--shape",
        "toy-hybrid:4",
        "--drafter-shape",
        "dflash:toy-hybrid:4",
        "--type",
        "q8_0",
        "--keep-model",
        keep.to_str().unwrap(),
        "--curve",
        "--depth",
        "1500",
        "--rounds",
        "1",
        "--json",
    ])
    .json();
    check_curve(&report, &[1, 2, 3, 4, 5, 8]);
    assert_eq!(report["model"], "toy-hybrid:4 q8_0, random weights");
    assert_eq!(report["depth"], 1500);
    assert!(report["drafter"]["contract"].as_str().unwrap().starts_with("dflash: arch dflash"), "{report}");
    // All of the file that is a matrix is read: four layers and the head, 34 bytes for 32 weights.
    let head = 256 * 512;
    assert_eq!(report["step"]["macs_per_output"], head);
    let macs = report["step"]["macs_per_row"].as_u64().unwrap() + head;
    let bytes = report["step"]["weight_bytes"].as_u64().unwrap();
    assert!(bytes as f64 > 1.06 * macs as f64 && (bytes as f64) < 1.2 * macs as f64, "{bytes} for {macs}");
    // What was kept is a model like any other; what was not is gone.
    paceline(&["inspect", keep.to_str().unwrap()]).ok();
    let left = std::fs::read_dir(std::env::temp_dir()).unwrap().filter_map(|entry| entry.ok());
    let left = left.filter(|entry| entry.file_name().to_string_lossy().contains("dflash-toy-hybrid-4-q8_0"));
    assert_eq!(left.count(), 0, "the drafter's file is gone");
}

#[test]
fn curve_and_roofline_as_tables() {
    let out = paceline(&["bench", "--curve", "--shape", "toy", "--rounds", "1", "-t", "1"]).ok();
    for part in
        ["roofline of", "memory read", "weights read by a step", "rows", "slots", "of peak", "prefill of 512"]
    {
        assert!(out.contains(part), "{part} in {out}");
    }
    let out = paceline(&["bench", "--roofline", "--rounds", "1", "-t", "2"]).ok();
    for part in ["memory read", "8-bit integers", "floats", "GMAC/s"] {
        assert!(out.contains(part), "{part} in {out}");
    }
    let report = paceline(&["bench", "--roofline", "--rounds", "1", "-t", "1", "--json"]).json();
    check_roofline(&report["roofline"]);
}

#[test]
fn a_wrong_shape_or_type_says_what_there_is() {
    let fails = |args: &[&str], parts: &[&str]| {
        paceline(&[&["bench"], args].concat()).fails_with(parts);
    };
    fails(&["--shape", "qwen9"], &["qwen9", "qwen3-0.6b", "qwen3.6-27b"]);
    fails(&["--shape", "toy", "--drafter-shape", "dflash:qwen9"], &["dflash:qwen9", "dflash:qwen3-0.6b"]);
    fails(&["--shape", "toy:99"], &["toy:99", "1 to 8"]);
    fails(&["--shape", "toy", "--type", "q9_z"], &["q9_z", "q4_k_m"]);
    fails(&["--shape", "toy", "-m", "x.gguf"], &["--shape", "--model"]);
    fails(&["--depth", "5"], &["--curve"]);
    fails(&["--curve", "--depth", "0"], &["--depth"]);
    let help = paceline(&["bench", "--help"]).ok();
    for part in ["--shape", "--curve", "--roofline", "--plot", "qwen3.6-27b", "dflash:qwen3-0.6b"] {
        assert!(help.contains(part), "{part} in {help}");
    }
}
