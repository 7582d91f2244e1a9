//! What differs between two stacks that share their lower part: from the layers above that alone.
//!
//! ```text
//!   from:  a1 .. an  \                 pairs      which directories of the two are one, wherever they lie
//!                      common, base    compare    what differs between the two entries of a pair
//!   to:    b1 .. bm  /                 renames    deleted and added files that are one
//!                                      patch      unified diff of text
//! ```
//! Cost: proportional to what a and b hold. The common part is looked up by name, and listed only where a directory was
//! replaced by another of the same name, and by [`Options::contents`]. A live layer may be read while programs write to
//! it: then the answer is a mixture of moments, not a snapshot.

mod compare;
mod content;
mod pairs;
mod patch;
mod renames;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::pairs::{Found, Side};
use super::view::Kind;

/// The two stacks.
#[derive(Clone, Copy, Debug)]
pub struct Stacks<'a> {
    /// Layers of the older state that the newer one does not have, the topmost first.
    pub from: &'a [BorrowedFd<'a>],
    /// Layers of the newer state that the older one does not have, the topmost first.
    pub to: &'a [BorrowedFd<'a>],
    /// What both have below: further layers, skeleton, base.
    pub common: &'a [BorrowedFd<'a>],
}

/// What to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Also what deleted directories held (and what those held that are back), entry by entry: walks them.
    pub contents: bool,
    /// Unified diffs of text files.
    pub patch: bool,
}

/// What happened to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// It was not there before.
    Added,
    /// It is not there any more. A directory stands for all that was in it.
    Deleted,
    /// Its content or attributes differ.
    Modified,
    /// It was somewhere else; it may differ, too.
    Renamed,
    /// It is of another kind.
    TypeChanged,
}

/// Before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Both<T> {
    /// Before.
    pub from: T,
    /// After.
    pub to: T,
}

/// One difference. Paths are absolute, as the inside sees them; bytes that are not UTF-8 are shown as U+FFFD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// Where; of a deleted entry, where it was.
    pub path: String,
    /// What happened.
    pub change: What,
    /// What it is; of a deleted entry, what it was.
    pub kind: Kind,
    /// What it was, of a changed type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub was: Option<Kind>,
    /// Where it was, of a renamed entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Whether the content of a file differs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub content: bool,
    /// Bytes of a regular file before it was deleted or changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_size_bytes: Option<u64>,
    /// Bytes of a regular file after it was added or changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_size_bytes: Option<u64>,
    /// Permissions in octal digits, if they differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Both<String>>,
    /// `uid:gid`, if they differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Both<String>>,
    /// Extended attributes that differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<String>,
    /// Where a symbolic link leads, if it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Both<String>>,
    /// Unified diff of its text, or one line that says why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
}

/// A layer that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("compare /{path}: {source}", path = path.display())]
pub struct DiffError {
    /// Where.
    pub path: PathBuf,
    /// The kernel's word.
    pub source: io::Error,
}

impl DiffError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { path, source }
    }
}

/// All differences, sorted by path (by bytes, a directory before what is in it).
pub fn diff(stacks: &Stacks<'_>, options: Options) -> Result<Vec<Change>, DiffError> {
    let from = [stacks.from, stacks.common].concat();
    let to = [stacks.to, stacks.common].concat();
    let from = Side::read(&from, stacks.from.len())?;
    let to = Side::read(&to, stacks.to.len())?;
    let mut found = pairs::find(&from, &to, options.contents)?;
    renames::join(&from, &to, &mut found)?;
    let mut budget = patch::Budget::default();
    let mut changes = BTreeMap::new();
    for pair in pairs(found) {
        let Some(opened) = compare::Opened::open(&from, &to, &pair)? else { continue };
        let Some(mut change) = opened.compare(&pair).map_err(DiffError::at(pair.shown()))? else { continue };
        if options.patch {
            change.patch = opened.patch(&pair, &change, &mut budget).map_err(DiffError::at(pair.shown()))?;
        }
        changes.insert((pair.shown().to_owned(), change.change), change);
    }
    Ok(changes.into_values().collect())
}

/// An entry of both states, or of one.
#[derive(Clone, Debug)]
struct Pair {
    old: Option<PathBuf>,
    new: Option<PathBuf>,
    /// They are one, and not at the place where it would be if nothing had moved it.
    is_renamed: bool,
}

impl Pair {
    /// The path to report it under.
    fn shown(&self) -> &Path {
        self.new.as_deref().or(self.old.as_deref()).unwrap_or(Path::new(""))
    }
}

fn pairs(mut found: Found) -> Vec<Pair> {
    let both = found.both.into_iter();
    let mut pairs: Vec<_> =
        both.map(|((old, new), is_renamed)| Pair { old: Some(old), new: Some(new), is_renamed }).collect();
    for old in found.deleted {
        // Something else took its place.
        let new = found.replaced.get(&old).and_then(|new| found.added.take(new));
        pairs.push(Pair { old: Some(old), new, is_renamed: false });
    }
    pairs.extend(found.added.into_iter().map(|new| Pair { old: None, new: Some(new), is_renamed: false }));
    pairs
}

/// A path relative to the root as the inside writes it.
fn inside_path(path: &Path) -> String {
    format!("/{}", path.display())
}
