//! Imports in the library only go down.

use super::Finding;
use super::lex::{Kind, Source};
use super::tree::Tree;

const SRC: &str = "deltabox/src/";

/// From the ground up. Rooms of one storey do not know each other.
const STOREYS: &[&[&str]] = &[
    &["sys"],
    &["latency", "kernel", "fault"],
    &["sandbox"],
    &["deltafs", "deltacr", "tracker", "image"],
    &["pool"],
    &["engine"],
    &["daemon", "cli"],
];

/// The one exception: the command line starts the daemon.
const ALLOWED: (&str, &str) = ("cli", "daemon");

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in tree.rust(SRC) {
        let modules = modules_of(&path[SRC.len()..]);
        // lib.rs and main.rs stand outside the house.
        let Some(room) = modules.first() else { continue };
        let finding = |line, what| Finding { path: path.to_owned(), line, rule: "imports", what };
        if storey_of(room).is_none() {
            findings.push(finding(1, format!("`{room}` has no storey; give it one in xtask/src/tidy/imports.rs")));
            continue;
        }
        for (line, target) in root_paths(&source, modules.len()) {
            if let Err(what) = judge(room, target) {
                findings.push(finding(line, what));
            }
        }
    }
    findings
}

fn storey_of(room: &str) -> Option<usize> {
    STOREYS.iter().position(|rooms| rooms.contains(&room))
}

fn judge(from: &str, to: &str) -> Result<(), String> {
    match (storey_of(from), storey_of(to)) {
        _ if from == to || (from, to) == ALLOWED => Ok(()),
        (_, None) => Err(format!("`crate::{to}` is no room of the library; import from the room that owns it")),
        (here, there) if there < here => Ok(()),
        (here, there) if there == here => {
            Err(format!("`{from}` and `{to}` are of one storey; move what both need further down"))
        }
        _ => Err(format!("`{from}` lies below `{to}`; imports only go down")),
    }
}

/// The module path of a file: `engine/api.rs` is `engine`, `api`.
fn modules_of(path: &str) -> Vec<&str> {
    let path = path.strip_suffix(".rs").unwrap_or(path);
    let mut modules: Vec<&str> = path.split('/').collect();
    match modules[..] {
        ["lib" | "main"] => modules.clear(),
        [.., "mod"] => modules.truncate(modules.len() - 1),
        _ => {}
    }
    modules
}

/// The first name of every path that starts at the crate's root, with its line.
fn root_paths<'t>(source: &Source<'t>, file_depth: usize) -> Vec<(usize, &'t str)> {
    let mut paths = Vec::new();
    let mut depth = file_depth;
    // For each open brace, whether it is an inline module's.
    let mut braces = Vec::new();
    for (at, token) in source.tokens.iter().enumerate() {
        match token.kind {
            Kind::Punct('{') => {
                let is_module = at >= 2 && source.word(at - 2) == Some("mod") && source.word(at - 1).is_some();
                depth += usize::from(is_module);
                braces.push(is_module);
            }
            Kind::Punct('}') => depth -= usize::from(braces.pop() == Some(true)),
            Kind::Word("crate") if source.matches(at + 1, &[":", ":"]) => {
                collect_first_names(source, at + 3, &mut paths);
            }
            Kind::Word("super") if at < 3 || !source.matches(at - 3, &["super", ":", ":"]) => {
                let mut n_up = 1;
                while source.matches(at + 3 * n_up - 2, &[":", ":", "super"]) {
                    n_up += 1;
                }
                let end = at + 3 * n_up - 2;
                if n_up >= depth && source.matches(end, &[":", ":"]) {
                    collect_first_names(source, end + 2, &mut paths);
                }
            }
            Kind::Word(_) | Kind::Str(_) | Kind::Punct(_) => {}
        }
    }
    paths
}

/// The name at `at`, or those at the first level of the braces there.
fn collect_first_names<'t>(source: &Source<'t>, at: usize, names: &mut Vec<(usize, &'t str)>) {
    let mut level = 0_usize;
    let mut begins_path = true;
    for token in source.tokens.iter().skip(at) {
        match token.kind {
            Kind::Punct('{') => {
                level += 1;
                begins_path = level == 1;
            }
            Kind::Punct('}') => {
                level = level.saturating_sub(1);
                begins_path = false;
            }
            Kind::Punct(',') => begins_path = level == 1,
            Kind::Word("self") => begins_path = false,
            Kind::Word(word) if begins_path => {
                names.push((token.line, word));
                begins_path = false;
            }
            Kind::Punct('*') if begins_path => {
                names.push((token.line, "*"));
                begins_path = false;
            }
            Kind::Word(_) | Kind::Str(_) | Kind::Punct(_) => {}
        }
        if level == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{findings, places};
    use super::*;

    #[test]
    fn imports_down_and_within_a_room_are_fine() {
        let files = [
            ("deltabox/src/lib.rs", "pub mod cli; use crate::cli::run;"),
            ("deltabox/src/cli/mod.rs", "use crate::{daemon, engine::{api, Error}, sys};\nuse super::super::kernel;"),
            ("deltabox/src/cli/run.rs", "use super::*; use crate::cli::print; pub(crate) fn f() {}"),
            (
                "deltabox/src/sys/fs.rs",
                "use super::check; use std::io; // crate::engine\n/// See crate::engine::X\nfn f() {}",
            ),
            ("deltabox/src/fault.rs", "mod tests { use super::*; fn f() { \"crate::engine::x\"; super::point() } }"),
        ];
        assert_eq!(places(check, &files), [] as [&str; 0]);
    }

    #[test]
    fn imports_up_are_found_wherever_they_stand() {
        let files = [
            ("deltabox/src/sys/fs.rs", "use std::io;\nuse crate::engine::Engine;\n"),
            ("deltabox/src/sandbox/mod.rs", "use crate::{\n    sys::{self, fs},\n    deltafs::{Layer},\n};\n"),
            ("deltabox/src/kernel.rs", "fn f() {\n    crate::engine::stop();\n    super::pool::take();\n}\n"),
            (
                "deltabox/src/pool/warm/mod.rs",
                "use super::super::{daemon, sys};\nmod m { use super::super::super::cli; }\n",
            ),
        ];
        assert_eq!(
            places(check, &files),
            [
                "deltabox/src/kernel.rs:2",
                "deltabox/src/kernel.rs:3",
                "deltabox/src/pool/warm/mod.rs:1",
                "deltabox/src/pool/warm/mod.rs:2",
                "deltabox/src/sandbox/mod.rs:3",
                "deltabox/src/sys/fs.rs:2",
            ]
        );
    }

    #[test]
    fn rooms_of_one_storey_do_not_import_each_other() {
        let files = [
            ("deltabox/src/deltafs/mod.rs", "use crate::image::Page;"),
            ("deltabox/src/daemon/mod.rs", "use crate::cli::print;"),
        ];
        let found = findings(check, &files);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].what.contains("one storey"), "{found:?}");
    }

    #[test]
    fn rooms_and_names_without_a_storey_are_found() {
        let files = [
            ("deltabox/src/helper/mod.rs", "use crate::sys;"),
            ("deltabox/src/engine/mod.rs", "use crate::Everything;\nuse crate::*;\n"),
        ];
        assert_eq!(
            places(check, &files),
            ["deltabox/src/engine/mod.rs:1", "deltabox/src/engine/mod.rs:2", "deltabox/src/helper/mod.rs:1"]
        );
    }
}
