//! `paceline quantize`, and that what it writes runs.

use paceline_gguf::{GgmlType, Gguf};

use crate::command::{paceline, repo_str};

fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_string()
}

/// Target with a prediction head, and a drafter of its own: both are quantised, and go on drafting.
#[test]
fn targets_heads_and_drafters() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, small) = (path(&dir, "whole.gguf"), path(&dir, "small.gguf"));
    paceline(&["convert", &repo_str("goldens/qwen35-mtp"), &whole, "--type", "f32"]).ok();
    // Its rows are no whole blocks of anything.
    let ran = paceline(&["quantize", &whole, &small, "Q8_0"]);
    assert!(ran.err.contains("not whole q8_0 blocks, so it is f16"), "{}", ran.err);
    assert!(ran.ok().contains("bits a weight"));
    let run = |more: &[&str]| {
        let args = ["run", "-m", &small, "-p", "hello", "--raw", "-n", "24", "--temp", "0", "--json"];
        paceline(&[&args[..], more].concat()).json()
    };
    let (plain, drafted) = (run(&[]), run(&["--spec-type", "draft-mtp", "--draft-fixed"]));
    assert_eq!(plain["tokens"], drafted["tokens"]);
    assert!(drafted["timings"]["draft_n"].as_u64() > Some(0), "{drafted}");
    let (before, after) = (Gguf::open(&whole).unwrap(), Gguf::open(&small).unwrap());
    for (before, after) in before.tensors().iter().zip(after.tensors()) {
        let stays = before.name.contains("norm") || before.name.contains("conv1d") || before.shape.len() < 2;
        assert_eq!(stays, after.ty == GgmlType::F32, "{} is {}", after.name, after.ty);
    }

    let (target, drafter) = (repo_str("models/bundled/target.gguf"), path(&dir, "drafter.gguf"));
    let bundled = repo_str("models/bundled/drafter.gguf");
    paceline(&["quantize", &bundled, &drafter, "Q4_K_M"])
        .fails_with(&["quantised already", "--allow-requantize"]);
    paceline(&["quantize", &bundled, &drafter, "Q4_K_M", "--allow-requantize"]).ok();
    let shown = paceline(&["inspect", &drafter, "--target", &target]).ok();
    assert!(shown.contains("q4_k"), "{shown}");
    let args = [
        "run",
        "-md",
        &drafter,
        "-p",
        "Count from 3 in steps of 4, 12 numbers.",
        "-n",
        "48",
        "--temp",
        "0",
        "--json",
    ];
    let drafted = paceline(&[&args[..], &["--draft-fixed"]].concat()).json();
    assert_eq!(drafted["tokens"], paceline(&[&args[..], &["--no-draft"]].concat()).json()["tokens"]);
    assert!(drafted["speculation"]["accept_len"].as_f64() > Some(2.0), "{drafted}");
}

#[test]
fn a_dry_run_tells_types_and_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let (odd, even, small) = (path(&dir, "odd.gguf"), path(&dir, "even.gguf"), path(&dir, "small.gguf"));
    paceline(&["convert", &repo_str("goldens/qwen3"), &odd, "--type", "bf16"]).ok();
    paceline(&["synth", "toy-hybrid", &even, "--type", "bf16"]).ok();
    let wishes = ["--tensor-type", r"blk\.(0|2)\.ffn_up=q8_0", "--output-tensor-type", "f16", "--pure"];
    for whole in [odd, even] {
        let _ = std::fs::remove_file(&small);
        let dry = paceline(&[&["quantize", &whole, &small, "Q4_K_M", "--dry-run"][..], &wishes].concat());
        assert!(!std::path::Path::new(&small).exists());
        assert_eq!(dry.err.contains("not whole q4_k blocks"), whole.ends_with("odd.gguf"), "{}", dry.err);
        let said = dry.ok();
        paceline(&[&["quantize", &whole, &small, "Q4_K_M", "1"][..], &wishes].concat()).ok();
        let file = Gguf::open(&small).unwrap();
        assert_eq!(said.lines().count(), file.tensors().len() + 1);
        for tensor in file.tensors() {
            let line = said.lines().find(|line| line.starts_with(&format!("{} ", tensor.name))).unwrap();
            let is_told =
                line.contains(&format!("→ {}", tensor.ty)) || line.contains(&format!("{} stays", tensor.ty));
            assert!(is_told, "{}: {line}", tensor.ty);
        }
        if whole.ends_with("even.gguf") {
            let ty = |name: &str| file.require_tensor(name).unwrap().ty;
            assert_eq!(
                [0, 1, 2].map(|il| ty(&format!("blk.{il}.ffn_up.weight"))),
                [GgmlType::Q8_0, GgmlType::Q4_K, GgmlType::Q8_0]
            );
            assert_eq!(
                (ty("blk.0.ffn_down.weight"), ty("output_norm.weight")),
                (GgmlType::Q4_K, GgmlType::F32)
            );
        }
    }
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let (target, out) = (repo_str("models/bundled/target.gguf"), path(&dir, "x.gguf"));
    paceline(&["quantize", &target, &out, "q9_z"]).fails_with(&["q9_z", "q4_k_m"]);
    paceline(&["quantize", "nowhere.gguf", &out, "q8_0"]).fails_with(&["nowhere.gguf"]);
    paceline(&["quantize", &target, &out, "q8_0", "--tensor-type", "attn"]).fails_with(&["PATTERN=TYPE"]);
    paceline(&["quantize", &target, &out, "q8_0", "--imatrix", &target]).fails_with(&["importance matrix"]);
    std::fs::copy(&target, &out).unwrap();
    paceline(&["quantize", &out, &out, "q8_0"]).fails_with(&["would replace"]);
}
