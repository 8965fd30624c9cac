//! Which files go together, and what is said where they nearly do.

use paceline_gguf::Metadata;

use crate::command::{edited, paceline, repo_str};

const TARGET: &str = "models/bundled/target.gguf";
const DRAFTER: &str = "models/bundled/drafter.gguf";

fn run(target: &str, drafter: &str) -> crate::command::Ran {
    paceline(&["run", "-m", target, "-md", drafter, "-p", "hi", "-n", "8", "--temp", "0"])
}

#[test]
fn roles_of_tokens_may_differ_texts_may_not() {
    let dir = tempfile::tempdir().unwrap();
    let eos = edited(DRAFTER, dir.path(), "eos.gguf", &|metadata| {
        metadata.insert("tokenizer.ggml.eos_token_id", 1u32);
    });
    run(&repo_str(TARGET), &eos).ok();
    let texts = edited(DRAFTER, dir.path(), "texts.gguf", &|metadata| {
        let tokens = metadata.require_bytes_array("tokenizer.ggml.tokens").unwrap();
        let mut texts: Vec<Vec<u8>> = tokens.iter().map(<[u8]>::to_vec).collect();
        texts.swap(300, 301);
        metadata.insert("tokenizer.ggml.tokens", texts);
    });
    run(&repo_str(TARGET), &texts).fails_with(&[
        "texts.gguf",
        "2 tokens have other texts, the first is 300",
        "hint:",
    ]);
    let merges = edited(DRAFTER, dir.path(), "merges.gguf", &|metadata| {
        let merges = metadata.require_bytes_array("tokenizer.ggml.merges").unwrap();
        let mut merges: Vec<Vec<u8>> = merges.iter().map(<[u8]>::to_vec).collect();
        merges.swap(7, 9);
        metadata.insert("tokenizer.ggml.merges", merges);
    });
    run(&repo_str(TARGET), &merges).fails_with(&[
        "merges.gguf",
        "its vocabulary is not the target's: merges differ from rank 7 on: `",
        "hint:",
    ]);
    let silent = edited(DRAFTER, dir.path(), "silent.gguf", &|metadata| {
        let keys: Vec<String> = metadata.keys().map(str::to_string).collect();
        let tokenizer = |key: &&String| key.starts_with("tokenizer.") && !key.contains("mask");
        keys.iter().filter(tokenizer).for_each(|key| drop(metadata.remove(key)));
    });
    run(&repo_str(TARGET), &silent).ok();
}

#[test]
fn other_windows_earn_one_warning() {
    let dir = tempfile::tempdir().unwrap();
    let window = |key: &'static str, n: u32| move |metadata: &mut Metadata| metadata.insert(key, n);
    let target = edited(TARGET, dir.path(), "t.gguf", &window("qwen35.attention.sliding_window", 1024));
    let drafter = edited(DRAFTER, dir.path(), "d.gguf", &window("dflash.attention.sliding_window", 2048));
    let ran = run(&target, &drafter);
    let said: Vec<&str> = ran.err.lines().filter(|line| line.contains("sliding windows")).collect();
    assert_eq!(said.len(), 1, "{}", ran.err);
    assert!(said[0].contains("target_window=1024") && said[0].contains("drafter_window=2048"), "{said:?}");
    ran.ok();
}

#[test]
fn other_kinds_of_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapter =
        edited(TARGET, dir.path(), "a.gguf", &|metadata| metadata.insert("general.type", "adapter"));
    run(&adapter, &repo_str(DRAFTER)).fails_with(&[
        "a.gguf",
        "general.type",
        "expected `model`, found `adapter`",
    ]);
    run(&repo_str(TARGET), &adapter).fails_with(&["a.gguf", "found `adapter`"]);
}
