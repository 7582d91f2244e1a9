//! What a stack shows, read from its layers without mounting it.
//!
//! A view is a list of directories, the topmost first, each by descriptor: layers, the skeleton, the base. It follows
//! overlayfs's own rules (`Documentation/filesystems/overlayfs.rst`; measured against the kernel by the property test):
//! ```text
//!   layer 0   d/ redirect=/x      f        w (whiteout)        o/ opaque
//!   layer 1   x/                  -        w                   o/
//!   layer 2   x/                  f        w                   o/
//!   view      d: 0:d 1:x 2:x      f: 0:f   nothing             o: 0:o
//! ```
//! Nothing is cached and no descriptor is held between calls, so a view of a live layer sees what is there now: each
//! answer is true of its moment, a walk of many is not a snapshot.

pub(in crate::deltafs) mod entry;
pub(in crate::deltafs) mod place;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

pub use entry::{Entry, Kind};
use place::{Merge, Said};

/// A read-only view of a stack.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    layers: &'a [BorrowedFd<'a>],
    /// How many of the layers are the top ones, whose entries can be told from those of the rest.
    n_top: usize,
}

/// A directory or file in one layer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// Number of the layer, from 0 at the top.
    pub layer: usize,
    /// Its path in the layer, which need not be that in the view.
    pub path: PathBuf,
}

/// Something that the view shows: where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Whether it is a directory.
    pub is_dir: bool,
    /// The topmost first. Only directories have more than one.
    pub parts: Vec<Part>,
    /// Where it would be in the view of the layers below the top ones; `None` if a top layer hides that.
    rest: Option<PathBuf>,
}

impl Node {
    /// Whether a top layer has a part of it.
    pub fn is_touched(&self, view: &View<'_>) -> bool {
        self.parts.first().is_some_and(|part| part.layer < view.n_top)
    }

    /// Where this directory is in the view of the layers below the top ones, if it is merged with one there.
    pub fn below(&self, view: &View<'_>) -> Option<&Path> {
        let reaches = self.is_dir && self.parts.last().is_some_and(|part| part.layer >= view.n_top);
        self.rest.as_deref().filter(|_| reaches)
    }
}

impl<'a> View<'a> {
    /// A view of `layers`, the topmost first, with the first `n_top` as its top ones.
    pub fn new(layers: &'a [BorrowedFd<'a>], n_top: usize) -> Self {
        Self { layers, n_top }
    }

    /// The top ones of its layers.
    pub(super) fn top_layers(&self) -> &'a [BorrowedFd<'a>] {
        &self.layers[..self.n_top]
    }

    /// Its root directory.
    pub fn root(&self) -> Node {
        self.root_from(0)
    }

    fn root_from(&self, first: usize) -> Node {
        let parts = (first..self.layers.len()).map(|layer| Part { layer, path: PathBuf::new() }).collect();
        Node { is_dir: true, parts, rest: Some(PathBuf::new()) }
    }

    /// What `path`, relative to the root and of plain names only, leads to. Symbolic links are not followed.
    pub fn find(&self, path: &Path) -> io::Result<Option<Node>> {
        self.find_from(0, path)
    }

    fn find_from(&self, first: usize, path: &Path) -> io::Result<Option<Node>> {
        let mut node = self.root_from(first);
        for name in path {
            match self.find_in(&node, name)? {
                Some(next) => node = next,
                None => return Ok(None),
            }
        }
        Ok(Some(node))
    }

    /// What `name` in the directory `dir` is. (The order of the rules is that of `ovl_lookup` in fs/overlayfs/namei.c.)
    pub fn find_in(&self, dir: &Node, name: &OsStr) -> io::Result<Option<Node>> {
        let is_plain =
            !matches!(name.as_encoded_bytes(), b"" | b"." | b"..") && !name.as_encoded_bytes().contains(&b'/');
        if !dir.is_dir || !is_plain {
            return Ok(None);
        }
        let mut found = Node { is_dir: true, parts: Vec::new(), rest: None };
        let mut name = name.to_owned();
        let mut rest = dir.rest.as_ref().map(|rest| rest.join(&name));
        for part in &dir.parts {
            let path = part.path.join(&name);
            let is_top = part.layer < self.n_top;
            let merge = match place::read(self.layers[part.layer], &path)? {
                Said::Nothing => continue,
                Said::Directory(merge) => merge,
                Said::File if found.parts.is_empty() => {
                    return Ok(Some(Node { is_dir: false, parts: vec![Part { layer: part.layer, path }], rest: None }));
                }
                Said::Whiteout | Said::File => {
                    rest = rest.filter(|_| !is_top);
                    break;
                }
            };
            found.parts.push(Part { layer: part.layer, path });
            match merge {
                Merge::Same => {}
                Merge::Opaque => {
                    rest = rest.filter(|_| !is_top);
                    break;
                }
                Merge::Sibling(other) => {
                    if is_top {
                        rest = dir.rest.as_ref().map(|rest| rest.join(&other));
                    }
                    name = other;
                }
                Merge::Path(other) => {
                    let lower = self.find_from(part.layer + 1, &other)?.filter(|lower| lower.is_dir);
                    if is_top {
                        rest = lower.as_ref().and_then(|lower| lower.rest.clone());
                    }
                    found.parts.extend(lower.into_iter().flat_map(|lower| lower.parts));
                    break;
                }
            }
        }
        found.rest = rest;
        Ok((!found.parts.is_empty()).then_some(found))
    }

    /// The names in the directory `dir`.
    pub fn list(&self, dir: &Node) -> io::Result<Vec<OsString>> {
        let mut shown = Vec::new();
        for name in self.names(dir, self.layers.len())? {
            if self.find_in(dir, &name)?.is_some() {
                shown.push(name);
            }
        }
        Ok(shown)
    }

    /// The names in the parts of `dir` that lie in top layers, whiteouts among them.
    pub(super) fn top_names(&self, dir: &Node) -> io::Result<BTreeSet<OsString>> {
        self.names(dir, self.n_top)
    }

    /// The names in all parts of `dir`, whiteouts among them.
    pub(super) fn all_names(&self, dir: &Node) -> io::Result<BTreeSet<OsString>> {
        self.names(dir, self.layers.len())
    }

    fn names(&self, dir: &Node, end: usize) -> io::Result<BTreeSet<OsString>> {
        let mut names = BTreeSet::new();
        for part in dir.parts.iter().filter(|part| dir.is_dir && part.layer < end) {
            place::list(self.layers[part.layer], &part.path, &mut names)?;
        }
        Ok(names)
    }

    /// What lies at a path of the view, opened.
    pub fn lookup(&self, path: &Path) -> io::Result<Option<Entry>> {
        match self.find(path)? {
            Some(node) => self.open(&node),
            None => Ok(None),
        }
    }

    /// Opens what was found; `None` if it has vanished since.
    pub fn open(&self, node: &Node) -> io::Result<Option<Entry>> {
        let Some(part) = node.parts.first() else { return Ok(None) };
        match Entry::open(self.layers[part.layer], part) {
            Err(error) if place::is_absence(&error) => Ok(None),
            other => other.map(Some),
        }
    }
}
