//! What the command line accepts, refuses and says.

use crate::command::{command, finish, paceline};

#[test]
fn unknown_flags_name_the_nearest() {
    paceline(&["serve", "--prallel", "2"]).fails_with(&["--prallel", "--parallel"]);
    paceline(&["run", "-ngll", "3", "-p", "x"]).fails_with(&["--ngll", "--ngl"]);
    paceline(&["serve", "--spec-draft-n-maxx", "2"]).fails_with(&["--spec-draft-n-max"]);
    paceline(&["srve"]).fails_with(&["serve"]);
}

#[test]
fn a_disk_needs_a_cache_in_front() {
    let serve = ["serve", "--port", "0", "--cache-disk"];
    paceline(&[&serve[..], &["x", "--cache-ram", "0"]].concat())
        .fails_with(&["--cache-disk", "--cache-ram 0"]);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    paceline(&[&serve[..], &[file]].concat()).fails_with(&["--cache-disk", file]);
}

#[test]
fn what_would_change_answers_is_refused() {
    let check = |args: &[&str], parts: &[&str]| {
        let mut all = vec!["run", "-p", "x"];
        all.extend(args);
        paceline(&all).fails_with(parts);
    };
    check(&["--lora", "a.gguf"], &["--lora a.gguf: not supported"]);
    check(&["--rope-scaling", "yarn"], &["--rope-scaling", "hint: --rope-scale 4"]);
    check(&["--yarn-beta-fast", "16"], &["hint: --rope-scaling yarn"]);
    check(&["--spec-type", "draft-mtp"], &["nextn_predict_layers", "prediction head", "paceline convert"]);
    check(&["--spec-type", "dflas"], &["ngram-simple or none, found `dflas`"]);
    check(&["--spec-type", "eagle3"], &["`eagle3` is not supported", "not built yet"]);
    check(&["--spec-type", "ngram-mod"], &["`ngram-mod` is not supported", "shared by all users"]);
    check(&["--spec-type", "dflash,draft"], &["only one kind can have the drafter's file", "hint:"]);
    check(&["--spec-type", "draft"], &["expected a drafter of kind draft, found dflash", "hint:"]);
    check(&["--spec-type", "ngram-simple", "-md", "x.gguf"], &["reads no file of its own", "hint:"]);
    check(&["-ctk", "q3_k"], &["expected one of f32, f16, bf16, q8_0, q5_0, q4_1, q4_0, iq4_nl", "q3_k"]);
    check(&["-ctvd", "q6"], &["expected one of f32", "q6"]);
    check(&["-c", "1"], &["-c 1", "expected at least 2"]);
    check(&["-np", "-3"], &["-np", "-3"]);
    check(&["--top-p", "nan"], &["top_p"]);
    check(&["--repeat-penalty", "0"], &["repeat_penalty"]);
    check(&["--samplers", "top_k;magic"], &["magic", "top_k"]);
    check(&["--chat-template", "llama3"], &["Jinja", "--chat-template-file"]);
    check(&["--chat-template-kwargs", "[1]"], &["JSON object"]);
    check(&["-m", "a.gguf", "-hf", "a/b"], &["cannot be used with"]);
    check(&["-hf", "nonsense"], &["owner/repo"]);
}

#[test]
fn what_is_harmless_is_said() {
    let ran = paceline(&[
        "run",
        "-p",
        "x",
        "-n",
        "2",
        "-ngl",
        "99",
        "-ngld",
        "all",
        "-fa",
        "on",
        "--jinja",
        "-cb",
        "--no-mmap",
        "-cd",
        "256",
        "-b",
        "256",
        "-ub",
        "64",
        "-ot",
        "token_embd.weight=CUDA0",
        "--spec-dflash-cross-ctx",
        "1024",
        "--draft-p-min",
        "0.75",
        "--n-parallel",
        "2",
        "--mtp-draft-n",
        "3",
        "-t",
        "2",
        "--no-cache-prompt",
        "--dflash",
    ]);
    for part in [
        "--n-gpu-layers 99",
        "--spec-draft-ngl all",
        "--no-mmap",
        "--spec-draft-ctx-size 256",
        "--override-tensor token_embd.weight=CUDA0",
        "--spec-dflash-cross-ctx 1024",
        "--spec-draft-p-min 0.75",
    ] {
        assert!(ran.err.contains(part), "{part} in {}", ran.err);
    }
    for part in ["--flash-attn", "--jinja", "--cont-batching", "--no-cache-prompt"] {
        assert!(!ran.err.contains(part), "{part} in {}", ran.err);
    }
    ran.ok();
}

#[test]
fn thinking_and_templates() {
    let n = |args: &[&str]| {
        let mut all = vec!["run", "-p", "x", "-n", "1", "--temp", "0", "--json"];
        all.extend(args);
        paceline(&all).json()["timings"]["prompt_n"].as_u64().unwrap()
    };
    let auto = n(&[]);
    let off = n(&["--reasoning", "off"]);
    assert!(off > auto, "an empty thought is added: {auto} {off}");
    assert_eq!(n(&["--chat-template-kwargs", "{\"enable_thinking\": false}"]), off);
    assert_eq!(n(&["--reasoning-budget", "0"]), off);
    assert!(n(&["--raw"]) < auto);
    assert_eq!(n(&["--chat-template", "{{ messages[0].content }}"]), n(&["--raw"]));
    assert!(n(&["-sys", "Be brief."]) > auto);
}

#[test]
fn version_help_and_switches_of_the_environment() {
    let version = paceline(&["--version"]).ok();
    assert!(version.starts_with(concat!("paceline ", env!("CARGO_PKG_VERSION"))), "{version}");
    let help = paceline(&["serve", "--help"]).ok();
    for part in ["--model-draft", "--spec-draft-n-max", "--api-key", "--n-gpu-layers"] {
        assert!(help.contains(part), "{part}");
    }
    let mut off = command(&["run", "-p", "x", "-n", "1"]);
    off.env("LLAMA_ARG_MLOCK", "disabled");
    assert!(!finish(off).err.contains("--mlock"));
    let mut on = command(&["run", "-p", "x", "-n", "1"]);
    on.env("LLAMA_ARG_MLOCK", "enabled");
    assert!(finish(on).err.contains("--mlock"));
}
