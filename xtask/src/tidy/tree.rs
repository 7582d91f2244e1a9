//! The files that tidy looks at: what git tracks, or would track.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use super::lex::Source;
use crate::workspace;

/// All files by path relative to the root, with `/`. No text: not UTF-8.
pub(super) struct Tree {
    files: BTreeMap<String, Option<String>>,
}

impl Tree {
    /// Reads what git lists: tracked files, and new ones that it does not ignore.
    pub(super) fn read(root: &Path) -> anyhow::Result<Self> {
        let mut git = Command::new("git");
        clear_git_env(&mut git);
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root);
        let mut files = BTreeMap::new();
        for path in workspace::capture(&mut git)?.split_terminator('\0') {
            match fs::read(root.join(path)) {
                Ok(bytes) => {
                    files.insert(path.to_owned(), String::from_utf8(bytes).ok());
                }
                // Deleted and not committed yet.
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                Err(err) => return Err(err).with_context(|| format!("read {path}")),
            }
        }
        Ok(Self { files })
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether it is a file, or a directory with files in it.
    pub(super) fn has(&self, path: &str) -> bool {
        let prefix = format!("{path}/");
        self.files.contains_key(path)
            || self.files.range(prefix.clone()..).next().is_some_and(|(file, _)| file.starts_with(&prefix))
    }

    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path)?.as_deref()
    }

    /// Path and text of every text file.
    pub(super) fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter_map(|(path, text)| Some((path.as_str(), text.as_deref()?)))
    }

    /// Every Rust file under a directory (`""` for all), read into tokens.
    pub(super) fn rust<'t>(&'t self, under: &'t str) -> impl Iterator<Item = (&'t str, Source<'t>)> {
        self.texts()
            .filter(move |(path, _)| path.starts_with(under) && path.ends_with(".rs"))
            .map(|(path, text)| (path, Source::read(text)))
    }
}

/// A git hook points these at its own repository; ours is the directory we stand in.
pub(super) fn clear_git_env(git: &mut Command) {
    for name in ["GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_PREFIX"] {
        git.env_remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::tree;

    #[test]
    fn ignored_files_are_not_looked_at() {
        let tree = tree(&[(".gitignore", "target/\n"), ("target/x.rs", "unsafe"), ("src/x.rs", "fn x() {}")]);
        assert_eq!(tree.texts().map(|(path, _)| path).collect::<Vec<_>>(), [".gitignore", "src/x.rs"]);
        assert!(tree.has("src") && tree.has("src/x.rs"));
        assert!(!tree.has("sr") && !tree.has("target"));
    }
}
