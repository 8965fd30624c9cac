//! Dependencies point one way: a crate may use those above it in this list and none below. Reads the manifests.

use std::{fs, path::Path};

/// The crates in reading order, from the file to the command line.
const ORDER: &[&str] = &[
    "gguf", "kernels", "backend", "memory", "models", "text", "sampling", "spec", "engine", "server",
    "convert", "cli",
];

/// Arrows that the order alone would allow and the design forbids.
const NEVER: &[(&str, &str, &str)] = &[
    ("memory", "models", "memory never learns which model or drafter is in use"),
    ("models", "kernels", "models never ask which device they run on"),
    ("engine", "models", "the engine names no architecture"),
    ("engine", "gguf", "the engine names no tensor type"),
    ("server", "backend", "the server never sees a tensor"),
    ("server", "models", "the server never sees a tensor"),
    ("server", "gguf", "the server never sees a file"),
];

fn dependencies(crate_dir: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(crate_dir).join("Cargo.toml");
    let manifest = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut section = "";
    let mut found = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        } else if section == "[dependencies]"
            && let Some(rest) = line.strip_prefix("paceline-")
        {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
            found.push(rest[..end].to_string());
        }
    }
    found
}

#[test]
fn arrows_point_up() {
    for (at, name) in ORDER.iter().enumerate() {
        for dependency in dependencies(name) {
            let above = ORDER.iter().position(|c| *c == dependency);
            assert!(above.is_some_and(|above| above < at), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn the_never_lines_hold() {
    for (from, to, why) in NEVER {
        assert!(!dependencies(from).iter().any(|d| d == to), "{from} depends on {to}, but {why}");
    }
}

#[test]
fn every_crate_is_in_the_order() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for entry in fs::read_dir(crates).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            name == "testkit" || ORDER.contains(&name.as_str()),
            "crates/{name} has no place in the order"
        );
    }
    // testkit is for tests alone.
    for name in ORDER {
        assert!(!dependencies(name).iter().any(|d| d == "testkit"), "{name} ships testkit");
    }
}

#[test]
fn unsafe_code_stays_where_it_belongs() {
    for name in ORDER.iter().filter(|n| !["gguf", "kernels", "backend"].contains(n)) {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src");
        let roots = ["lib.rs", "main.rs"].map(|f| fs::read_to_string(src.join(f)).unwrap_or_default());
        assert!(
            roots.iter().any(|r| r.contains("#![forbid(unsafe_code)]")),
            "{name} must forbid unsafe code"
        );
    }
}
