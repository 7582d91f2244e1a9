//! What may be only in some places: async code and unsafe code.

use super::Finding;
use super::lex::Kind;
use super::tree::Tree;

/// Where async code may be.
const ASYNC_PLACES: &[&str] = &["deltabox/src/daemon/", "deltabox/src/cli/"];

const ASYNC_CRATES: &[&str] = &["tokio", "axum", "hyper", "hyper_util", "http_body_util", "utoipa_axum"];

/// Where unsafe code may be.
const UNSAFE_PLACES: &[&str] = &["deltabox/src/sys/", "deltabox/init/src/sys.rs", "deltabox-ebpf/"];

/// No async below the daemon: a driver thread waits in system calls.
pub(super) fn check_async(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in tree.rust("deltabox/src/") {
        if ASYNC_PLACES.iter().any(|place| path.starts_with(place)) {
            continue;
        }
        for (at, token) in source.tokens.iter().enumerate() {
            let Kind::Word(word) = token.kind else { continue };
            let names_crate = ASYNC_CRATES.contains(&word)
                && (source.matches(at + 1, &[":", ":"])
                    || at > 0 && matches!(source.word(at - 1), Some("use" | "crate")));
            if names_crate || matches!(word, "async" | "await") {
                let what = format!("`{word}` belongs in daemon/ or cli/ only; give the caller a callback instead");
                findings.push(Finding { path: path.to_owned(), line: token.line, rule: "async", what });
            }
        }
    }
    findings
}

/// One place to audit.
pub(super) fn check_unsafe(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in tree.rust("") {
        if UNSAFE_PLACES.iter().any(|place| path.starts_with(place)) {
            continue;
        }
        for token in source.tokens.iter().filter(|token| token.kind == Kind::Word("unsafe")) {
            let what = "wrap the call in a safe function in deltabox/src/sys/".to_owned();
            findings.push(Finding { path: path.to_owned(), line: token.line, rule: "unsafe", what });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::testing::places;
    use super::*;

    #[test]
    fn async_code_is_found_below_the_daemon_only() {
        let files = [
            ("deltabox/src/daemon/mod.rs", "use tokio::net; async fn f() {}"),
            ("deltabox/src/cli/exec.rs", "use hyper_util::rt;"),
            ("deltabox/src/engine/mod.rs", "// tokio::spawn\nuse tokio::sync::oneshot;\nasync fn f() { g().await }\n"),
            ("deltabox/src/sys/fs.rs", "let hyper = 1;\nextern crate axum;\n"),
        ];
        assert_eq!(
            places(check_async, &files),
            [
                "deltabox/src/engine/mod.rs:2",
                "deltabox/src/engine/mod.rs:3",
                "deltabox/src/engine/mod.rs:3",
                "deltabox/src/sys/fs.rs:2",
            ]
        );
    }

    #[test]
    fn unsafe_code_is_found_outside_sys() {
        let files = [
            ("deltabox/src/sys/fs.rs", "unsafe { f() }"),
            ("deltabox/init/src/sys.rs", "unsafe { f() }"),
            ("deltabox-ebpf/src/lib.rs", "unsafe { f() }"),
            ("deltabox/init/src/main.rs", "#![deny(unsafe_code)]\n// unsafe\nfn f() { \"unsafe\" }\n"),
            ("deltabox/src/engine/mod.rs", "fn f() {\n    unsafe { g() }\n}\n"),
            ("tests/src/lib.rs", "unsafe fn f() {}"),
        ];
        assert_eq!(places(check_unsafe, &files), ["deltabox/src/engine/mod.rs:2", "tests/src/lib.rs:1"]);
    }
}
