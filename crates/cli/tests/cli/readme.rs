//! The commands that README.md shows are ones that the binary takes.

use std::fs;

use crate::command::{command, finish, repo};

#[test]
fn its_commands_are_understood() {
    let text = fs::read_to_string(repo("README.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut n = 0;
    for line in text.lines().filter_map(|line| line.strip_prefix("    ")) {
        let Some(args) = ["paceline ", "cargo run --release -- "].iter().find_map(|p| line.strip_prefix(p))
        else {
            continue;
        };
        // No word of these commands has a space in it but the prompts, which do not matter here.
        let mut args: Vec<&str> = args.split_whitespace().take_while(|word| !word.starts_with('"')).collect();
        n += 1;
        match args[..] {
            ["run", .., "-p"] => args.extend(["Hi", "-n", "1"]),
            ["serve"] => continue, // tests/e2e starts many
            ["serve", ..] => args.extend(["--port", "0"]),
            _ => {}
        }
        // Nothing listens there: hubs are not asked.
        let mut command = command(&args);
        command.current_dir(&dir).env("HF_ENDPOINT", "http://127.0.0.1:1").env("HF_HOME", dir.path());
        let ran = finish(command);
        let is_missing_files = ran.code == Some(1)
            && ["No such file", "config.json", "Connection refused"]
                .iter()
                .any(|part| ran.err.contains(part));
        assert!(ran.code == Some(0) || is_missing_files, "`{line}`: exit {:?}, {}", ran.code, ran.err);
    }
    assert!(n >= 7, "only {n} commands were found");
}
