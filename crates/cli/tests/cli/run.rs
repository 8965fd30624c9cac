//! `paceline run` on the bundled pair.

use std::{
    io::{Read, Write},
    process::Stdio,
};

use crate::command::{command, finish, paceline};

const PROMPTS: &[&str] = &["Write a story about a lost kite.", "Count from 3 in steps of 4, 12 numbers."];

fn text(args: &[&str]) -> String {
    let mut all = vec!["run", "-n", "60"];
    all.extend(args);
    paceline(&all).ok()
}

#[test]
fn the_drafter_changes_no_letter() {
    for prompt in PROMPTS {
        for sampling in [&["--temp", "0"][..], &["--temp", "1.0", "--seed", "7"]] {
            let args = |more: &[&'static str]| [&["-p", prompt][..], sampling, more].concat();
            let plain = text(&args(&["--no-draft"]));
            assert!(plain.trim().len() > 40, "{plain}");
            assert_eq!(text(&args(&[])), plain);
            assert_eq!(text(&args(&["--spec-draft-n-max", "3"])), plain);
            assert_eq!(text(&args(&["--spec-type", "none"])), plain);
            for kinds in ["ngram-simple", "dflash,ngram-simple"] {
                assert_eq!(text(&args(&["--spec-type", kinds])), plain, "{kinds}");
                assert_eq!(text(&args(&["--spec-type", kinds, "--draft-fixed"])), plain, "{kinds}");
            }
            // Token by token, thoughts and their tags included.
            let shown = text(&args(&["--show-draft"]));
            assert!(shown.trim().ends_with(plain.trim()), "{shown}");
        }
    }
}

#[test]
fn figures_say_what_speculation_did() {
    let args = ["run", "-p", PROMPTS[0], "-n", "60", "--temp", "0", "--json", "--draft-fixed"];
    let with = paceline(&args).json();
    assert_eq!(with["speculation"]["state"], "active");
    assert_eq!(with["speculation"]["drafter"], "dflash");
    let (n, accepted) = (&with["timings"]["draft_n"], &with["timings"]["draft_n_accepted"]);
    assert!(n.as_u64() > accepted.as_u64() && accepted.as_u64() > Some(0), "{with}");
    let by_position = with["speculation"]["by_position"].as_array().unwrap();
    let sums = by_position
        .iter()
        .fold((0, 0), |(a, b), pair| (a + pair[0].as_u64().unwrap(), b + pair[1].as_u64().unwrap()));
    assert_eq!((Some(sums.0), Some(sums.1)), (n.as_u64(), accepted.as_u64()));
    assert_eq!(with["timings"]["predicted_n"], 60);
    assert_eq!(with["finish_reason"], "length");

    let without =
        paceline(&["run", "-p", PROMPTS[0], "-n", "60", "--temp", "0", "--json", "--no-draft"]).json();
    assert_eq!(without["speculation"]["state"], "no_drafter");
    assert!(without["timings"].get("draft_n").is_none());
    assert_eq!(with["tokens"], without["tokens"]);

    let said = paceline(&["run", "-p", "hi", "-n", "8", "--draft-fixed"]).err;
    assert!(said.contains("tok/s") && said.contains("speculation: dflash active"), "{said}");
}

#[test]
fn a_chat_reads_lines() {
    let mut command = command(&["run", "--temp", "0", "-n", "40"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = "/stats\nWrite JSON for a cat named Luna.\n/nonsense\n/clear\n\nWrite JSON for a cat named Luna.\n/stats\n/exit\nno\n";
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{err}");
    // Cleared in between, so the same answer twice, and nothing after /exit.
    let answers: Vec<&str> = out.split("{\"name\"").skip(1).map(str::trim).collect();
    assert_eq!(answers.len(), 2, "{out}");
    assert_eq!(answers[0], answers[1]);
    assert!(err.contains("unknown command /nonsense") && err.contains("no answer yet"), "{err}");
}

#[test]
fn a_second_turn_sees_the_first() {
    let ask = |lines: &str| {
        let mut command = command(&["run", "--temp", "0", "-n", "24", "--no-stats", "--json"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let last = out.lines().last().unwrap().to_string();
        serde_json::from_str::<serde_json::Value>(&last).unwrap()["timings"]["prompt_n"].as_u64().unwrap()
    };
    let (one, two) =
        (ask("Write a Python function add.\n"), ask("Tell me a story.\nWrite a Python function add.\n"));
    assert!(two > one + 24, "{one} {two}");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut command = command(&["run", "-p", PROMPTS[0], "-n", "400", "--ignore-eos"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 3]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !err.contains("error") && !err.contains("panicked"), "{err}");
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_answer() {
    let mut command = command(&["run", "-p", PROMPTS[0], "-n", "100000", "--ignore-eos", "-c", "200000"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    crate::serve::signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("speculation: "), "the figures up to there: {err}");
}

#[test]
fn the_environment_counts_less_than_the_command_line() {
    let n = |env: Option<&str>, args: &[&str]| {
        let mut all = vec!["run", "-p", PROMPTS[0], "--temp", "0", "--json"];
        all.extend(args);
        let mut command = command(&all);
        env.map(|value| command.env("LLAMA_ARG_N_PREDICT", value));
        finish(command).json()["timings"]["predicted_n"].as_u64().unwrap()
    };
    assert_eq!(n(Some("5"), &[]), 5);
    assert_eq!(n(Some("5"), &["-n", "3"]), 3);
}

#[test]
fn what_cannot_be_answered_is_said() {
    paceline(&["run", "-p", ""]).ok();
    paceline(&["run", "--raw", "-p", ""]).fails_with(&["the prompt is empty"]);
    let long = "word ".repeat(300);
    paceline(&["run", "-p", &long, "-c", "256"]).fails_with(&["prompt tokens", "256", "-c"]);
    paceline(&["run", "-m", "/no/such.gguf", "-p", "x"]).fails_with(&["/no/such.gguf", "No such file"]);
}
