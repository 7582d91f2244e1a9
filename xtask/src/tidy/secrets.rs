//! Nothing in the repository names the machine it was written on, or where that machine gets its packages.

use super::Finding;
use super::tree::Tree;

/// Directories of our own machines. Written in pieces, so that this file does not hold them.
const PATHS: &[&str] = &[concat!("/wo", "rk/"), concat!("/ro", "ot/")];

/// Parts of host names of package registries and mirrors.
const HOSTS: &[&str] = &[
    concat!("debian", ".org"),
    concat!("ubuntu", ".com"),
    concat!("py", "pi.org"),
    concat!("python", "hosted.org"),
    concat!("npm", "js."),
    concat!("index.crates", ".io"),
    concat!("static.crates", ".io"),
    concat!("static.rust-lang", ".org"),
    concat!("proxy.golang", ".org"),
];

/// Cargo writes this for every package of the default registry, whichever mirror it came from.
const LOCK_SOURCE: &str = concat!("source = \"registry+https://github.com/rust-lang/crates", ".io-index\"");

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.texts() {
        for (i, line) in text.lines().enumerate() {
            let mut found = |what: String| {
                findings.push(Finding { path: path.to_owned(), line: i + 1, rule: "machine", what });
            };
            for part in PATHS.iter().filter(|part| names_path(line, part)) {
                found(format!("`{part}` is a directory of one machine; use a relative path or find it at run time"));
            }
            for host in HOSTS.iter().filter(|host| line.contains(**host)) {
                found(format!("`{host}` is a registry's host; take it from the machine's configuration at run time"));
            }
            if path.ends_with("Cargo.lock") && line.starts_with("source = ") && line != LOCK_SOURCE {
                found("package from elsewhere than the default registry; lock it to that".to_owned());
            }
        }
    }
    findings
}

/// Whether the line holds an absolute path that begins so; `upper/work/` is none.
fn names_path(line: &str, prefix: &str) -> bool {
    line.match_indices(prefix)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.~*/}>)".contains(c)))
}

#[cfg(test)]
mod tests {
    use super::super::testing::places;
    use super::*;

    #[test]
    fn paths_and_hosts_of_a_machine_are_found() {
        let text = format!(
            "cd {}wt\nlet dir = \"{}x\";\nupper{}\n{{dir}}{}\nhttp://deb.{}/debian\nhttps://example.org\n",
            PATHS[0], PATHS[1], PATHS[0], PATHS[1], HOSTS[0]
        );
        assert_eq!(places(check, &[("docs/a.md", text.as_str())]), ["docs/a.md:1", "docs/a.md:2", "docs/a.md:5"]);
    }

    #[test]
    fn a_lock_file_names_the_default_registry_only() {
        let text = format!("version = 4\n{LOCK_SOURCE}\nsource = \"registry+https://mirror.example/index\"\n");
        assert_eq!(places(check, &[("Cargo.lock", text.as_str())]), ["Cargo.lock:3"]);
    }
}
