//! Every document can be reached, and every relative link leads somewhere.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::Tree;

/// Where readers start.
const ROOTS: &[&str] = &["README.md", "deltabox/ARCHITECTURE.md"];

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.texts().filter(|(path, _)| path.ends_with(".md")) {
        for (line, target) in links(text) {
            let resolved = resolve(path, target);
            if !resolved.as_deref().is_some_and(|resolved| resolved.is_empty() || tree.has(resolved)) {
                let what = format!("`{target}` leads nowhere; correct the link or add the file");
                findings.push(Finding { path: path.to_owned(), line, rule: "links", what });
            }
        }
    }
    let reached = reach(tree);
    for (path, _) in tree.texts().filter(|(path, _)| is_doc(path) && !reached.contains(*path)) {
        let what = format!("link it from {} or a document linked there", ROOTS.join(", "));
        findings.push(Finding { path: path.to_owned(), line: 1, rule: "unlinked", what });
    }
    findings
}

/// Whether readers must be able to find this file.
fn is_doc(path: &str) -> bool {
    path.ends_with(".md") && (!path.contains('/') || path.starts_with("deltabox/docs/"))
}

/// The documents that links lead to from the roots.
fn reach(tree: &Tree) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<String> = ROOTS.iter().map(|root| (*root).to_owned()).collect();
    while let Some(path) = open.pop() {
        let Some(text) = tree.text(&path) else { continue };
        open.extend(
            links(text).iter().filter_map(|(_, target)| resolve(&path, target)).filter(|p| !reached.contains(p)),
        );
        reached.insert(path);
    }
    reached
}

/// The path that a relative link means, seen from the root. None: it leaves the repository.
fn resolve(from: &str, target: &str) -> Option<String> {
    let target = target.split(['#', '?']).next().unwrap_or("");
    let mut parts: Vec<&str> = from.split('/').collect();
    if target.is_empty() {
        return Some(from.to_owned());
    }
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

/// Line and target of each relative link: `[text](target)`, images, and `[label]: target`. Not in code.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut links = Vec::new();
    let mut fence: Option<&str> = None;
    for (i, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let marker = ["```", "~~~"].into_iter().find(|marker| trimmed.starts_with(marker));
        match (fence, marker) {
            (None, Some(marker)) => fence = Some(marker),
            (Some(open), Some(marker)) if open == marker => fence = None,
            (Some(_), _) => {}
            (None, None) => links.extend(links_of_line(line).into_iter().map(|target| (i + 1, target))),
        }
    }
    links
}

fn links_of_line(line: &str) -> Vec<&str> {
    let mut targets = Vec::new();
    if let Some((label, target)) = line.trim_start().strip_prefix('[').and_then(|rest| rest.split_once("]:"))
        && !label.contains(']')
    {
        targets.push(target);
    }
    // Text between backquotes is code: only the even pieces are prose. A link's text may be code, its target not.
    let mut code = false;
    for (at, c) in line.char_indices() {
        if c == '`' {
            code = !code;
        } else if !code
            && let Some(target) = line[at..].strip_prefix("](")
            && let Some((target, _)) = target.split_once(')')
        {
            targets.push(target);
        }
    }
    targets
        .into_iter()
        .filter_map(|target| {
            // A title may follow.
            let target = target.split_whitespace().next()?;
            let target = target.trim_start_matches('<').trim_end_matches('>');
            let is_absolute = target.split('/').next().is_some_and(|first| first.contains(':'));
            (!is_absolute).then_some(target)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::places;
    use super::*;

    #[test]
    fn a_document_that_nothing_links_is_found() {
        let files = [
            ("README.md", "See [the house](deltabox/ARCHITECTURE.md) and [changes][c].\n\n[c]: CHANGELOG.md\n"),
            ("CHANGELOG.md", ""),
            ("NOTES.md", ""),
            ("deltabox/ARCHITECTURE.md", "[store](docs/store.md#layout \"title\")"),
            ("deltabox/docs/store.md", "[manifest](<./manifest.md>)"),
            ("deltabox/docs/manifest.md", "[up](../../README.md) [self](#x) [out](https://example.org/x.md)"),
            ("deltabox/docs/lost.md", "[store](store.md)"),
            ("tests/README.md", ""),
        ];
        assert_eq!(places(check, &files), ["NOTES.md:1", "deltabox/docs/lost.md:1"]);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_found() {
        let files = [
            (
                "README.md",
                "[a](a.md)\n`[b](b.md)`\n```\n[c](c.md)\n```\n[`d`](src/) ![e](e.png)\n[f](../f.md)\n[g]: g.md\n",
            ),
            ("src/x.rs", ""),
        ];
        assert_eq!(places(check, &files), ["README.md:1", "README.md:6", "README.md:7", "README.md:8"]);
    }
}
