//! A file holds one idea; six hundred lines hold more.

use super::Finding;
use super::tree::Tree;

/// Lines outside `#[cfg(test)]` items. Chosen: what a reader keeps in mind.
const MAX_LINES: usize = 600;

/// Longer files, each with the reason why it is one idea all the same.
const ALLOWED: &[(&str, &str)] = &[];

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    check_with(tree, ALLOWED)
}

fn check_with(tree: &Tree, allowed: &[(&str, &str)]) -> Vec<Finding> {
    let finding = |path: &str, what| Finding { path: path.to_owned(), line: 1, rule: "length", what };
    let mut findings = Vec::new();
    // Stories are tests from end to end.
    for (path, source) in tree.rust("").filter(|(path, _)| !path.starts_with("tests/")) {
        let n_lines = source.n_code_lines();
        let is_allowed = allowed.iter().any(|(allowed, _)| *allowed == path);
        if n_lines > MAX_LINES && !is_allowed {
            findings.push(finding(
                path,
                format!("{n_lines} lines without tests, {MAX_LINES} is the limit; split it by ideas"),
            ));
        } else if n_lines <= MAX_LINES && is_allowed {
            findings.push(finding(
                path,
                "short enough again; take it out of the table in xtask/src/tidy/length.rs".to_owned(),
            ));
        }
    }
    for (path, _) in allowed.iter().filter(|(path, _)| !tree.has(path)) {
        findings.push(finding(path, "is gone; take it out of the table in xtask/src/tidy/length.rs".to_owned()));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::testing::{places, tree};
    use super::*;

    #[test]
    fn a_long_file_is_found_and_its_tests_do_not_count() {
        let long = "fn f() {}\n".repeat(601);
        let with_tests =
            format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", "fn f() {}\n".repeat(600), "fn t() {}\n".repeat(99));
        let files = [
            ("deltabox/src/long.rs", long.as_str()),
            ("deltabox/src/tested.rs", with_tests.as_str()),
            ("tests/tests/story.rs", long.as_str()),
        ];
        assert_eq!(places(check, &files), ["deltabox/src/long.rs:1"]);
    }

    #[test]
    fn the_table_of_long_files_is_kept_true() {
        let long = "fn f() {}\n".repeat(601);
        let tree = tree(&[("a.rs", long.as_str()), ("b.rs", "fn f() {}\n")]);
        let found = check_with(&tree, &[("a.rs", "one table"), ("b.rs", "was long"), ("c.rs", "was there")]);
        assert_eq!(found.iter().map(|finding| finding.path.as_str()).collect::<Vec<_>>(), ["b.rs", "c.rs"]);
    }
}
