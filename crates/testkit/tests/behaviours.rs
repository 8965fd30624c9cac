//! `docs/behaviours.md` is kept honest: every row is there, in order, and every test that a row names exists.

use std::{collections::HashMap, fs, path::Path};

const N_ROW: usize = 150;
const KINDS: [&str; 6] = ["F", "B", "T", "K", "M", "P"];

/// What is wrong with the row `line`, the `number`th. `has_test` says whether a citation is of a test that exists.
fn fault(line: &str, number: usize, has_test: &mut impl FnMut(&str) -> bool) -> Option<String> {
    let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
    let &[no, kind, statement, state, shown] = cells.as_slice() else {
        return Some(format!("expected 5 cells, found {}", cells.len()));
    };
    if no != number.to_string() {
        return Some(format!("expected row {number}, found {no}"));
    }
    if !KINDS.contains(&kind) || statement.is_empty() {
        return Some(format!(
            "expected a kind of {KINDS:?} and a statement, found {kind:?} and {statement:?}"
        ));
    }
    // Every second part of the cell is between backquotes.
    let cited: Vec<&str> =
        shown.split('`').skip(1).step_by(2).filter(|quoted| quoted.contains("::")).collect();
    if let Some(missing) = cited.iter().find(|citation| !has_test(citation)) {
        return Some(format!("there is no test {missing}"));
    }
    let is_told = shown.split_once("Missing: ").is_some_and(|(_, what)| !what.is_empty());
    let is_right = match state {
        "done" => !cited.is_empty() && !is_told,
        "partly" => !cited.is_empty() && is_told,
        "open" => cited.is_empty(),
        _ => return Some(format!("expected done, partly or open, found {state:?}")),
    };
    (!is_right).then(|| format!("{state} with {} tests; what is missing is told: {is_told}", cited.len()))
}

/// Whether `citation`, `crate/path.rs::test` or `tests/path.py::test`, is of a test in the repository.
fn is_test(root: &Path, files: &mut HashMap<String, String>, citation: &str) -> bool {
    let Some((path, name)) = citation.rsplit_once("::") else { return false };
    let is_python = path.ends_with(".py");
    let text = files.entry(path.to_string()).or_insert_with(|| {
        let folder = if is_python { root.to_path_buf() } else { root.join("crates") };
        fs::read_to_string(folder.join(path)).unwrap_or_default()
    });
    if is_python {
        return name.starts_with("test_") && text.contains(&format!("\ndef {name}("));
    }
    let Some((before, _)) = text.split_once(&format!("fn {name}(")) else { return false };
    // Only attributes and comments may stand between.
    let above = before.lines().rev().skip(usize::from(!before.ends_with('\n')));
    let mut attributes =
        above.map(str::trim).take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    attributes.any(|line| line == "#[test]")
}

#[test]
fn every_row_is_there_and_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let document = fs::read_to_string(root.join("docs/behaviours.md")).unwrap();
    let is_row =
        |line: &&str| line.starts_with("| ") && !["| # ", "| -"].iter().any(|head| line.starts_with(head));
    let rows: Vec<&str> = document.lines().filter(is_row).collect();
    let mut files = HashMap::new();
    let mut has_test = |citation: &str| is_test(&root, &mut files, citation);
    let faults: Vec<String> = (rows.iter().enumerate())
        .filter_map(|(i, row)| Some(format!("row {}: {}", i + 1, fault(row, i + 1, &mut has_test)?)))
        .collect();
    assert!(faults.is_empty(), "docs/behaviours.md:\n{}", faults.join("\n"));
    assert_eq!(rows.len(), N_ROW);
}

#[test]
fn faults_are_found() {
    let check = |line: &str, expected: Option<&str>| {
        let found = fault(line, 7, &mut |citation| citation == "a/b.rs::c");
        assert_eq!(found.as_deref(), expected, "{line}");
    };
    check("| 7 | F | it works | done | `a/b.rs::c` |", None);
    check("| 7 | F | it works | partly | `a/b.rs::c`. Missing: the rest |", None);
    check("| 7 | F | it works | open |  |", None);
    check("| 8 | F | it works | open |  |", Some("expected row 7, found 8"));
    check("| 7 | F | open |  |", Some("expected 5 cells, found 4"));
    check(
        "| 7 | F | it works | finished | `a/b.rs::c` |",
        Some("expected done, partly or open, found \"finished\""),
    );
    check("| 7 | F | it works | done | `a/b.rs::d` |", Some("there is no test a/b.rs::d"));
    check(
        "| 7 | F | it works | done | by looking |",
        Some("done with 0 tests; what is missing is told: false"),
    );
    check(
        "| 7 | F | it works | done | `a/b.rs::c`. Missing: x |",
        Some("done with 1 tests; what is missing is told: true"),
    );
    check(
        "| 7 | F | it works | partly | `a/b.rs::c` |",
        Some("partly with 1 tests; what is missing is told: false"),
    );
    check(
        "| 7 | F | it works | open | `a/b.rs::c` |",
        Some("open with 1 tests; what is missing is told: false"),
    );
}
