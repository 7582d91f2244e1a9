//! Nothing unfinished is left in the source.

use super::Finding;
use super::tree::Tree;

/// Marks of unfinished work, in pieces, so that this file does not hold them.
const WORDS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("TB", "D")];
const MACROS: &[&str] = &[concat!("to", "do!"), concat!("unimple", "mented!")];

const EXTENSIONS: &[&str] = &[".rs", ".sh", ".py", ".c", ".toml", ".ci/run"];

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.texts().filter(|(path, _)| EXTENSIONS.iter().any(|end| path.ends_with(end))) {
        for (i, line) in text.lines().enumerate() {
            for mark in WORDS.iter().chain(MACROS).filter(|mark| holds_word(line, mark)) {
                let what = format!("`{mark}`: do it, or open an issue and delete the mark");
                findings.push(Finding { path: path.to_owned(), line: i + 1, rule: "leftovers", what });
            }
        }
    }
    findings
}

fn holds_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(is_part) && (word.ends_with('!') || !line[at + word.len()..].starts_with(is_part))
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::places;
    use super::*;

    #[test]
    fn marks_of_unfinished_work_are_found_as_words() {
        let text = format!(
            "// {}: later\nlet name = \"tmp.{}{}\";\nfn f() {{ {}() }}\n//! {}\n",
            WORDS[0], WORDS[2], WORDS[2], MACROS[0], WORDS[3]
        );
        let files = [("deltabox/src/a.rs", text.as_str()), ("README.md", text.as_str())];
        assert_eq!(places(check, &files), ["deltabox/src/a.rs:1", "deltabox/src/a.rs:3", "deltabox/src/a.rs:4"]);
    }
}
