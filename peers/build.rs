//! Leaves the commit that was built in `PACELINE_COMMIT`, for the records.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=../crates");
    println!("cargo:rerun-if-changed=src");
    let described = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let commit = described.ok().filter(|out| out.status.success()).map(|out| out.stdout);
    let commit = commit.map_or("unknown".into(), |out| String::from_utf8_lossy(&out).trim().to_string());
    println!("cargo:rustc-env=PACELINE_COMMIT={commit}");
}
