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
