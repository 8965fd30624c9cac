//! `paceline synth`, and that what it writes runs.

use crate::command::paceline;

fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_string()
}

/// A model whose logits are not finite fails; one whose logits are all alike says one token for ever.
#[test]
fn every_type_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (shape, ty) in [
        ("toy", "f32"),
        ("toy", "f16"),
        ("toy", "bf16"),
        ("toy", "q8_0"),
        ("toy", "q6_k"),
        ("toy", "q5_k_m"),
        ("toy", "q4_k_m"),
        ("toy", "q4_0"),
        ("toy", "iq4_xs"),
        ("toy-hybrid", "q4_k_m"),
        ("toy-hybrid:4", "q8_0"),
    ] {
        let file = path(&dir, "model.gguf");
        let said = paceline(&["synth", shape, &file, "--type", ty]).ok();
        assert!(said.contains("random weights"), "{said}");
        let args =
            ["run", "-m", &file, "-p", "the of and", "-n", "32", "--temp", "1", "--seed", "1", "--json"];
        let answer = paceline(&args).json();
        let tokens = answer["tokens"].as_array().unwrap();
        let mut unique: Vec<u64> = tokens.iter().filter_map(|token| token.as_u64()).collect();
        unique.sort_unstable();
        unique.dedup();
        assert!(unique.len() > tokens.len() / 2 || tokens.len() < 8, "{shape} {ty}: {tokens:?}");
    }
}

#[test]
fn a_pair_runs_and_drafts_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (target, drafter) = (path(&dir, "target.gguf"), path(&dir, "drafter.gguf"));
    paceline(&["synth", "toy-hybrid", &target]).ok();
    paceline(&["synth", "dflash:toy-hybrid", &drafter]).ok();
    let run = |more: &[&str]| {
        let mut args =
            vec!["run", "-m", &target, "-p", "the of", "--raw", "-n", "24", "--temp", "0", "--json"];
        args.extend(more);
        paceline(&args).json()
    };
    let (plain, drafted) = (run(&[]), run(&["-md", &drafter]));
    assert_eq!(plain["tokens"], drafted["tokens"]);
    assert!(drafted["timings"]["draft_n"].as_u64() > Some(0), "{drafted}");
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let out = path(&dir, "x.gguf");
    paceline(&["synth", "qwen9", &out]).fails_with(&["qwen9", "qwen3-0.6b"]);
    paceline(&["synth", "toy", &out, "--type", "q9_z"]).fails_with(&["q9_z", "q4_k_m"]);
    assert!(paceline(&["synth", "--help"]).ok().contains("qwen3.6-27b"));
}
