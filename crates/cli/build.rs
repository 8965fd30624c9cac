//! The commit that is built, for `--version` and the server's `build_info`.

use std::process::Command;

fn main() {
    let output = Command::new("git").args(["rev-parse", "--short=9", "HEAD"]).output();
    let commit = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_string(),
        // A source archive: the version has to do.
        _ => String::new(),
    };
    let version = env!("CARGO_PKG_VERSION");
    let build = if commit.is_empty() { version.to_string() } else { format!("{version}-{commit}") };
    println!("cargo::rustc-env=PACELINE_BUILD={build}");
    println!("cargo::rerun-if-changed=../../.git/logs/HEAD");
    println!("cargo::rerun-if-changed=build.rs");
}
