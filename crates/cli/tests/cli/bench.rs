//! `paceline bench`: the figures, and that drafts change nothing.

use crate::command::paceline;

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
    assert!(out.contains("prompt 1 +2") && out.contains("the same tokens"), "{out}");
    let out =
        paceline(&["bench", "--runs", "1", "-n", "8", "--n-prompt", "0", "-p", "hi", "--no-draft"]).ok();
    assert!(out.contains("no drafter") && !out.contains("accepted by position"), "{out}");
}
