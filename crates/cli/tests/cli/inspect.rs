//! `paceline inspect`.

use std::fs;

use paceline_gguf::{GgmlType, Metadata, to_bytes};
use serde_json::json;

use crate::command::{edited, paceline, repo_str};

const TARGET: &str = "models/bundled/target.gguf";
const DRAFTER: &str = "models/bundled/drafter.gguf";

#[test]
fn a_target() {
    let shown = paceline(&["inspect", &repo_str(TARGET), "--json", "--tensors", "--ctx", "1000"]).json();
    assert_eq!(shown["metadata"]["general.architecture"], "qwen35");
    assert_eq!(shown["metadata"]["tokenizer.ggml.tokens"]["len"], 4096);
    assert_eq!(shown["n_tensors"].as_u64(), Some(shown["tensors"].as_array().unwrap().len() as u64));
    // Two attention layers of 2 KV heads of 64, keys and values of 2 bytes.
    assert_eq!(shown["memory"]["kv_bytes"]["f16"], 2 * 2 * 2 * 64 * 2 * 1000);
    assert!(shown["memory"]["slot_bytes"].as_u64() > Some(0));
    assert!(shown["contract"].is_null());
    let out = paceline(&["inspect", &repo_str(TARGET)]).ok();
    for part in
        ["qwen35.block_count", "q8_0", "KV cells, f16", "memory at a context of 4096", "… 4096 in all"]
    {
        assert!(out.contains(part), "{part} in {out}");
    }
    assert!(out.lines().all(|line| line.chars().count() < 400), "long values are cut");
}

#[test]
fn a_mixture_of_experts() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("experts.gguf").display().to_string();
    paceline(&["convert", &repo_str("goldens/qwen3moe"), &file, "--type", "f32"]).ok();
    let shown = paceline(&["inspect", &file, "--json", "--tensors"]).json();
    // Gate, up and down of 7 experts in 4 layers, in F32.
    let bytes = 4 * 4 * 7 * 3 * 48 * 28;
    assert_eq!((&shown["experts"]["count"], &shown["experts"]["used"]), (&7.into(), &3.into()));
    assert_eq!(shown["experts"]["bytes"], bytes);
    let all: u64 = shown["tensors"].as_array().unwrap().iter().filter_map(|t| t["bytes"].as_u64()).sum();
    assert_eq!(shown["experts"]["token_bytes"], all - bytes + bytes * 3 / 7);
    let out = paceline(&["inspect", &file]).ok();
    assert!(out.contains("3 of 7 for a token, which reads"), "{out}");
    assert!(paceline(&["inspect", &repo_str(TARGET), "--json"]).json()["experts"].is_null());
}

#[test]
fn a_drafter_with_and_without_its_target() {
    let alone = paceline(&["inspect", &repo_str(DRAFTER)]).ok();
    let checked = paceline(&["inspect", &repo_str(DRAFTER), "--target", &repo_str(TARGET)]).ok();
    assert!(checked.contains("taps [1, 2, 4, 5, 6] (from 0), block 16, mask token 4095"), "{checked}");
    // Alone it says the same, but for the masks of the layers, which are worked out when it is loaded.
    let line = checked.lines().find_map(|line| line.trim().strip_prefix("dflash: ")).expect("a contract");
    let (before, after) = line.split_once(", layers [full full full], ").expect("masks of three layers");
    for part in [before, after, "layers 3", "not checked: give its target with --target"] {
        assert!(alone.contains(part), "{part} in {alone}");
    }
    paceline(&["inspect", &repo_str(TARGET), "--target", &repo_str(TARGET)])
        .fails_with(&["expected a drafter", "qwen35"]);
}

/// What each writer of drafter files means by its numbers, and the files that leave it open.
#[test]
fn taps_are_counted_from_zero_where_the_file_says_how() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, key: &str, taps: &[u32], expected: &str| {
        let path = edited(DRAFTER, dir.path(), name, &|metadata| {
            metadata.remove("dflash.target_layers");
            metadata.insert(key, taps.to_vec());
            metadata.insert("dflash.attention.sliding_window", 2048u32);
            metadata.insert("dflash.attention.sliding_window_pattern", vec![true, false, true]);
        });
        let out = paceline(&["inspect", &path]).ok();
        for part in [expected, "window 2048, window pattern [true, false, true]"] {
            assert!(out.contains(part), "{part} in {out}");
        }
    };
    check("one.gguf", "dflash.target_layers", &[1, 4, 8], "taps [0, 3, 7] (from 0)");
    check("zero.gguf", "dflash.target_layers", &[0, 4], "taps as written [0, 4], which should begin at 1");
    check(
        "open.gguf",
        "dflash.target_layer_ids",
        &[1, 4],
        "taps [1, 4] (from 0 or from 1, depending on the writer)",
    );
}

#[test]
fn an_unknown_architecture_is_shown_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "brandnew");
    metadata.insert("general.name", "with a bell \u{7} in it");
    let tensors = [("some.weight", [4, 2], GgmlType::F32, [0; 32])];
    fs::write(&path, to_bytes(&metadata, &tensors).unwrap()).unwrap();
    let out = paceline(&["inspect", path.to_str().unwrap(), "--tensors"]).ok();
    for part in ["brandnew", "some.weight", "4 × 2", "memory: not known", "supported: qwen35", r"\u{7}"] {
        assert!(out.contains(part), "{part} in {out}");
    }
}

#[test]
fn damaged_files() {
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(repo_str(TARGET)).unwrap();
    let check = |name: &str, bytes: &[u8], parts: &[&str]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let err = paceline(&["inspect", path.to_str().unwrap()]).fails_with(parts);
        assert!(err.contains(name), "{err}");
        paceline(&["run", "-m", path.to_str().unwrap(), "-p", "x"]).fails_with(parts);
    };
    check("cut.gguf", &whole[..whole.len() - 1000], &["blk.7.ffn_down.weight", "truncated download"]);
    check("head.gguf", &whole[..5000], &[]);
    check("foreign.gguf", b"PK\x03\x04 an archive, not a model, of some length", &["GGUF"]);
    check("empty.gguf", b"", &["empty"]);
}

#[test]
fn a_missing_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let first = dir.path().join("m-00001-of-00003.gguf");
    fs::copy(repo_str(TARGET), &first).unwrap();
    paceline(&["inspect", first.to_str().unwrap()]).fails_with(&["m-00002-of-00003.gguf"]);
}

#[test]
fn base_models_are_told_from_instruct_ones() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, code: i32, edit: &dyn Fn(&mut Metadata)| {
        let path = edited(TARGET, dir.path(), name, edit);
        let ran = paceline(&["inspect", &path, "--check-instruct"]);
        assert_eq!(ran.code, Some(code), "{name}: {} {}", ran.out, ran.err);
    };
    check("instruct.gguf", 0, &|_| {});
    check("bare.gguf", 3, &|metadata| drop(metadata.remove("tokenizer.chat_template")));
    check("named.gguf", 3, &|metadata| metadata.insert("general.name", "Toy 7M Base"));
    check("baseline.gguf", 0, &|metadata| metadata.insert("general.name", "Baseline 7M"));
    assert_eq!(paceline(&["inspect", "/no/such.gguf", "--check-instruct"]).code, Some(1));
}

#[test]
fn a_plan_says_what_a_server_takes() {
    let plan = |more: &[&str]| {
        let target = repo_str(TARGET);
        let args = [&["inspect", &target, "--plan", "--json"], more].concat();
        paceline(&args).json()
    };
    let one = plan(&["-c", "4096", "-np", "4"]);
    assert_eq!((&one["n_slot"], &one["n_ctx"], &one["n_cell"]), (&json!(4), &json!(1024), &json!(4096)));
    let token = one["kv_token_bytes"].as_u64().unwrap();
    assert_eq!(one["kv_bytes"], 4096 * token);
    assert_eq!(one["recurrent_bytes"], 4 * one["recurrent_slot_bytes"].as_u64().unwrap());
    assert_eq!((&one["drafter_kv_bytes"], &one["cache_bytes"]), (&json!(0), &json!(8_u64 << 30)));
    let parts = ["weights_bytes", "kv_bytes", "recurrent_bytes", "drafter_kv_bytes", "cache_bytes"];
    let sum: u64 = parts.iter().map(|part| one[part].as_u64().unwrap()).sum();
    assert_eq!(one["total_bytes"], sum);

    let drafter = repo_str(DRAFTER);
    let two = plan(&["-c", "4096", "-np", "4", "-kvu", "-ctk", "f32", "-md", &drafter, "--cache-ram", "10"]);
    assert_eq!((&two["n_ctx"], &two["n_cell"]), (&json!(4096), &json!(4096)));
    assert_eq!(two["kv_token_bytes"], token / 2 * 3, "keys alone are twice as wide");
    assert!(
        two["drafter_kv_bytes"].as_u64() > Some(0)
            && two["weights_bytes"].as_u64() > one["weights_bytes"].as_u64()
    );
    assert!(
        two["recurrent_slot_bytes"].as_u64() > one["recurrent_slot_bytes"].as_u64(),
        "drafts are kept too"
    );
    assert_eq!(
        (&two["cache_bytes"], plan(&["--cache-ram", "-1"])["total_bytes"].is_null()),
        (&json!(10 << 20), true)
    );

    // A model that drafts for itself: its cells again, and two recurrent states more.
    let itself = plan(&["-c", "4096", "-np", "4", "-md", &repo_str(TARGET)]);
    let number = |plan: &serde_json::Value, name: &str| plan[name].as_u64().unwrap();
    assert_eq!(number(&itself, "drafter_kv_bytes"), number(&one, "kv_bytes"));
    assert!(number(&itself, "recurrent_slot_bytes") >= 3 * number(&one, "recurrent_slot_bytes"));
    assert_eq!(number(&itself, "recurrent_bytes"), 4 * number(&itself, "recurrent_slot_bytes"));

    let words = paceline(&["inspect", &repo_str(TARGET), "--plan"]).ok();
    assert!(words.contains("prompt cache") && words.contains("at most"), "{words}");
}

/// What published sizes need at 256K, without a file: layers with a window keep their window.
#[test]
fn published_shapes_at_256k() {
    let check = |shape: &str, n_ctx: u64, classes: &[(Option<u64>, u64)]| {
        let shown = paceline(&["inspect", "--shape", shape, "--ctx", &n_ctx.to_string(), "--json"]).json();
        let memory = &shown["memory"];
        let cells = |window: Option<u64>| window.map_or(n_ctx, |n| n + 2 * 64 + 512);
        let kv: u64 = classes.iter().map(|&(window, bytes)| cells(window) * bytes).sum();
        assert_eq!(memory["kv_bytes"]["f16"], kv, "{shape}: {memory}");
        let found: Vec<_> =
            classes.iter().map(|(window, n)| json!({"window": window, "cell_bytes_f16": n})).collect();
        assert_eq!(memory["kv_classes"], json!(found), "{shape}");
    };
    check("gemma4-31b", 262_144, &[(None, 81_920), (Some(1024), 819_200)]);
    check("gemma4-26b-a4b", 262_144, &[(None, 20_480), (Some(1024), 204_800)]);
    check("gemma4-e4b", 131_072, &[(None, 16_384), (Some(512), 40_960)]);
    check("qwen3.6-27b", 262_144, &[(None, 65_536)]);
    check("qwen3.5-35b-a3b", 262_144, &[(None, 20_480)]);
    check("qwen3-coder-next", 262_144, &[(None, 24_576)]);
    paceline(&["inspect", "--shape", "gemma5"]).fails_with(&["gemma5", "gemma4-31b"]);
    paceline(&["inspect"]).fails_with(&["--shape"]);
}

/// A prediction head has cells of its own, if it drafts.
#[test]
fn a_plan_counts_the_prediction_head() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mtp.gguf").display().to_string();
    paceline(&["convert", &repo_str("goldens/qwen35-mtp"), &file, "--type", "f32"]).ok();
    let plan = |more: &[&str]| {
        let args = [&["inspect", &file, "--plan", "--json", "-c", "400", "-np", "2"], more].concat();
        paceline(&args).json()
    };
    // Keys and values of two KV heads of 12.
    assert_eq!(plan(&["--spec-type", "draft-mtp"])["drafter_kv_bytes"], 2 * 2 * 12 * 2 * 400);
    assert_eq!(plan(&[])["drafter_kv_bytes"], 0);
    let args = ["inspect", &repo_str(TARGET), "--plan", "--spec-type", "draft-mtp"];
    paceline(&args).fails_with(&["no prediction head"]);
}
