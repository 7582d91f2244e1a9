//! `tidy`: rules of this repository that neither the compiler nor clippy knows. One file per rule.
//!
//! A rule is a function from a [`Tree`] to findings. It does not stop at the first, and prints nothing.

mod faults;
mod imports;
mod leftovers;
mod length;
mod lex;
mod manifests;
mod markdown;
mod places;
mod secrets;
mod tree;

use std::fmt;

use crate::Reported;
use crate::workspace::Workspace;
use tree::Tree;

/// Something to put right.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// Relative to the root.
    path: String,
    /// From 1.
    line: usize,
    rule: &'static str,
    /// What to do about it.
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.what)
    }
}

type Rule = fn(&Tree) -> Vec<Finding>;

const RULES: &[Rule] = &[
    imports::check,
    places::check_async,
    places::check_unsafe,
    length::check,
    faults::check,
    markdown::check,
    secrets::check,
    manifests::check,
    leftovers::check,
];

pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let tree = Tree::read(&workspace.root)?;
    let mut findings: Vec<Finding> = RULES.iter().flat_map(|rule| rule(&tree)).collect();
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} files, {} rules, {} findings", tree.len(), RULES.len(), findings.len());
    if findings.is_empty() { Ok(()) } else { Err(Reported.into()) }
}

#[cfg(test)]
mod testing {
    use super::{Finding, Rule, Tree};

    /// Writes the files into a fresh repository, reads it as the real one is read, and applies the rule.
    pub(super) fn findings(rule: Rule, files: &[(&str, &str)]) -> Vec<Finding> {
        let mut findings = rule(&tree(files));
        findings.sort();
        findings
    }

    /// `path:line` of each finding.
    pub(super) fn places(rule: Rule, files: &[(&str, &str)]) -> Vec<String> {
        findings(rule, files).iter().map(|finding| format!("{}:{}", finding.path, finding.line)).collect()
    }

    pub(super) fn tree(files: &[(&str, &str)]) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let mut init = std::process::Command::new("git");
        super::tree::clear_git_env(&mut init);
        assert!(init.args(["init", "-q"]).current_dir(dir.path()).status().unwrap().success());
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Tree::read(dir.path()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_reads_as_place_rule_and_what_to_do() {
        let finding = Finding { path: "a.rs".to_owned(), line: 3, rule: "unsafe", what: "move it".to_owned() };
        assert_eq!(finding.to_string(), "a.rs:3: unsafe: move it");
    }
}
