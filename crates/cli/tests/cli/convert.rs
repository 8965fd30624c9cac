//! `paceline convert`, and that what it writes runs.

use crate::command::{paceline, repo_str};

#[test]
fn a_pair_is_converted_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (target, drafter) = (path("target.gguf"), path("drafter.gguf"));
    let out = paceline(&["convert", &repo_str("goldens/qwen35"), &target, "--type", "f32"]).ok();
    assert!(out.contains("qwen35") && out.contains("f32"), "{out}");
    let target_dir = repo_str("goldens/qwen35");
    paceline(&["convert", &repo_str("goldens/dflash"), &drafter, "--type", "f32", "--target", &target_dir])
        .ok();

    let run = |more: &[&str]| {
        let mut args =
            vec!["run", "-m", &target, "-p", "hello", "--raw", "-n", "24", "--temp", "0", "--json"];
        args.extend(more);
        paceline(&args).json()
    };
    let (plain, drafted) = (run(&[]), run(&["-md", &drafter]));
    assert_eq!(plain["tokens"], drafted["tokens"]);
    assert!(drafted["timings"]["draft_n"].as_u64() > Some(0), "{drafted}");

    // A drafter of another target is refused, and says which part of the contract is broken.
    let err =
        paceline(&["run", "-md", &drafter, "-p", "x"]).fails_with(&["drafter.gguf", "vocabulary", "131"]);
    assert!(err.contains("hint:"), "{err}");
    // A drafter is no target. A target can draft, for itself too, where it is right every time.
    paceline(&["run", "-m", &drafter, "-p", "x"]).fails_with(&["-md"]);
    let itself = run(&["-md", &target, "--draft-fixed"]);
    assert_eq!((&itself["tokens"], &itself["speculation"]["drafter"]), (&plain["tokens"], &"draft".into()));
    assert_eq!(itself["timings"]["draft_n"], itself["timings"]["draft_n_accepted"], "{itself}");
}

#[test]
fn a_prediction_head_is_kept_and_drafts() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target.gguf").to_str().unwrap().to_string();
    paceline(&["convert", &repo_str("goldens/qwen35-mtp"), &target, "--type", "f32"]).ok();
    let run = |more: &[&str]| {
        let args = ["run", "-m", &target, "-p", "hello", "--raw", "-n", "24", "--temp", "0", "--json"];
        paceline(&[&args[..], more].concat()).json()
    };
    let (plain, drafted) = (run(&[]), run(&["--spec-type", "draft-mtp", "--draft-fixed"]));
    assert_eq!(plain["speculation"]["state"], "no_drafter");
    assert_eq!(plain["tokens"], drafted["tokens"]);
    assert_eq!(drafted["speculation"]["drafter"], "draft-mtp");
    assert_eq!(drafted["speculation"]["by_position"].as_array().map(Vec::len), Some(3), "its own habit");
    let several = run(&["--spec-type", "mtp,ngram,draft", "-md", &target]);
    assert_eq!(plain["tokens"], several["tokens"]);
}

#[test]
fn an_assistant_is_converted_and_drafts_by_its_targets_cells() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (target, assistant) = (path("target.gguf"), path("assistant.gguf"));
    let source = repo_str("goldens/gemma4");
    paceline(&["convert", &source, &target, "--type", "f32"]).ok();
    let from = repo_str("goldens/gemma4-assistant");
    paceline(&["convert", &from, &assistant, "--type", "f32", "--target", &source]).ok();
    let run = |more: &[&str]| {
        let args = ["run", "-m", &target, "-p", "hello", "--raw", "-n", "24", "--temp", "0", "--json"];
        paceline(&[&args[..], more].concat()).json()
    };
    let plain = run(&[]);
    // By the name that it has elsewhere, by its own, by its file alone, and by a flag of a fork.
    for more in [
        &["--spec-type", "draft-mtp", "-md", &assistant][..],
        &["--spec-type", "gemma4-assistant", "-md", &assistant],
        &["-md", &assistant],
        &["--mtp-head", &assistant],
        &["--spec-type", "mtp,ngram", "-md", &assistant],
    ] {
        let drafted = run(&[more, &["--draft-fixed"]].concat());
        assert_eq!(plain["tokens"], drafted["tokens"], "{more:?}");
        assert_eq!(drafted["speculation"]["drafter"], "gemma4-assistant", "{more:?}");
        let n_draft = drafted["speculation"]["by_position"].as_array().map(Vec::len);
        let habit = if more.contains(&"mtp,ngram") { 7 } else { 3 };
        assert_eq!(n_draft, Some(habit), "{more:?}: its own habit, or the most of who copies");
    }
    paceline(&["run", "-m", &target, "-p", "x", "--spec-type", "draft-mtp"])
        .fails_with(&["nextn_predict_layers", "-md"]);
    paceline(&["run", "-m", &target, "-p", "x", "--spec-type", "draft-mtp", "-md", &target])
        .fails_with(&["a drafter of kind draft, which --spec-type draft-mtp does not name"]);
    let contract = paceline(&["inspect", &assistant, "--target", &target]).ok();
    assert!(contract.contains("full of 4"), "{contract}");
    let alone = paceline(&["inspect", &assistant]).ok();
    assert!(alone.contains("target width 44, ") && alone.contains("embedding target's, head own"), "{alone}");
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x.gguf");
    let out = out.to_str().unwrap();
    paceline(&["convert", dir.path().to_str().unwrap(), out]).fails_with(&["config.json"]);
    paceline(&["convert", &repo_str("goldens/qwen35"), out, "--type", "q9_z"]).fails_with(&["q9_z", "q8_0"]);
    assert!(!std::path::Path::new(out).exists(), "a failed conversion leaves nothing behind");
}
