//! Every named fault point has a test that names it.

use super::Finding;
use super::lex::{Kind, Source};
use super::tree::Tree;

const SRC: &str = "deltabox/src/";
/// The tests of the mechanism use names of their own.
const MECHANISM: &str = "deltabox/src/fault.rs";

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let sources: Vec<(&str, Source<'_>)> = tree.rust("").filter(|(path, _)| *path != MECHANISM).collect();
    let mut findings = Vec::new();
    for (path, source) in sources.iter().filter(|(path, _)| path.starts_with(SRC)) {
        for (at, token) in source.tokens.iter().enumerate() {
            if !source.matches(at, &["fault", ":", ":", "point", "("]) || source.is_test(token.line) {
                continue;
            }
            let what = match source.tokens.get(at + 5).map(|token| token.kind) {
                Some(Kind::Str(name)) if sources.iter().any(|(path, source)| is_named(path, source, name)) => continue,
                Some(Kind::Str(name)) => {
                    format!("no test names `{name}`; add one that arms it and asserts the aftermath")
                }
                _ => "give the point a literal name, so that its test can be found".to_owned(),
            };
            findings.push(Finding { path: (*path).to_owned(), line: token.line, rule: "fault-points", what });
        }
    }
    findings
}

/// Whether a string in the test code of this file holds the whole name.
fn is_named(path: &str, source: &Source<'_>, name: &str) -> bool {
    let is_test_file = path.starts_with("tests/") || path.contains("/tests/");
    source.tokens.iter().any(|token| match token.kind {
        Kind::Str(text) => {
            (is_test_file || path.starts_with(SRC) && source.is_test(token.line)) && holds_name(text, name)
        }
        Kind::Word(_) | Kind::Punct(_) => false,
    })
}

fn holds_name(text: &str, name: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-');
    text.match_indices(name)
        .any(|(at, _)| !text[..at].ends_with(is_part) && !text[at + name.len()..].starts_with(is_part))
}

#[cfg(test)]
mod tests {
    use super::super::testing::places;
    use super::*;

    #[test]
    fn a_point_that_no_test_names_is_found() {
        let files = [
            ("deltabox/src/fault.rs", "#[cfg(test)]\nmod tests { fn t() { parse(\"create.mount\") } }"),
            (
                "deltabox/src/engine/mod.rs",
                "// \"create.mount\"\nfn f() {\n    fault::point(\"create.mount\")?;\n    crate::fault::point(\"create.init\")?;\n    \
                 fault::point(\"rm.files\")?;\n    fault::point(name)?;\n}\n\
                 #[cfg(test)]\nmod tests { fn t() { fault::point(\"x\"); arm(\"rm.files\") } }\n",
            ),
            ("tests/tests/crash.rs", "const ARMED: &str = \"create.mount2,create.init:kill\"; // create.mount"),
        ];
        assert_eq!(places(check, &files), ["deltabox/src/engine/mod.rs:3", "deltabox/src/engine/mod.rs:6"]);
    }
}
