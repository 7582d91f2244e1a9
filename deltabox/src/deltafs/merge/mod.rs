//! Several consecutive frozen layers made into one that has their effect, so that stacks do not grow without end.
//!
//! ```text
//!   above          above
//!   run 0  \
//!   ..      ->     merged      every path shows what it showed
//!   run n  /
//!   below          below
//! ```
//! The merged layer says of each path that the run says anything of:
//! ```text
//!   what the stack shows there            the merged layer has
//!   a file of the run                     a copy; names that are one file are one file again
//!   a directory that ends in the run      the directory, opaque if its parent goes on below
//!   a directory that goes on below        the directory; with a redirect to where, unless its parent's leads there
//!   nothing                               a whiteout, if there is something below to hide
//! ```
//! Redirects are composed by following each directory through the whole run: what counts is where it lies in the view
//! of the layers below, however many renames of it and of its parents have led away from there. Nothing is shared with
//! the sources but blocks, where the file system can: a hard link would show inside (link count, change time).

mod copy;
#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};

use self::copy::Copier;
use super::origins::Origins;
use super::view::place::MAX_DEEP_BYTES;
use super::view::{Node, Part, View, place};
use crate::sys::fs::set_xattr;

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeReport {
    /// Files, directories and the rest; no whiteouts.
    pub n_entries: u64,
    /// Whiteouts.
    pub n_whiteouts: u64,
    /// Regular files that share their blocks with their source.
    pub n_shared: u64,
    /// Bytes that were copied, holes not counted.
    pub copied_bytes: u64,
}

/// Why there is no merged layer. What was made of it is of no use; the sources are as before.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// One layer cannot say what these say of a directory.
    #[error("/{path}: no single layer can say where it goes on below", path = path.display())]
    NotExpressible {
        /// The directory.
        path: PathBuf,
    },
    /// It was not begun: there is too little room for now.
    #[error("copies could take more than half of what is free")]
    NoRoom,
    /// Nobody wants it any more.
    #[error("cancelled")]
    Cancelled,
    /// A directory lies too deep.
    #[error("a path of more than {MAX_DEEP_BYTES} bytes")]
    TooDeep,
    /// A file operation.
    #[error("{op} /{path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what, in the view.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MergeError {
    let path = path.to_owned();
    move |source| MergeError::Io { op, path, source }
}

/// Makes, in the empty directory `into`, a layer that does in the place of `layers` what they do: consecutive frozen
/// layers of a stack, the topmost first, over all that lies `below` them. The sources are only read. On return nothing
/// is synced; on failure `into` is to be removed. Any thread; takes as long as copying what the layers hold, but ends
/// soon once `cancel` is set.
///
/// # Errors
/// [`MergeError::NotExpressible`] for layers that overlayfs did not make.
pub fn merge(
    layers: &[BorrowedFd<'_>],
    below: &[BorrowedFd<'_>],
    into: BorrowedFd<'_>,
    cancel: &AtomicBool,
) -> Result<MergeReport, MergeError> {
    let all = [layers, below].concat();
    let root = Path::new("");
    let mut origins = Origins::default();
    for layer in layers.iter().skip(1) {
        origins.add(*layer).map_err(failed("read a layer at", root))?;
    }
    let mut merging = Merging {
        n_run: layers.len(),
        view: View::new(&all, layers.len()),
        below: View::new(below, 0),
        into,
        copier: Copier::new(into, origins, cancel),
        cancel,
        report: MergeReport::default(),
    };
    let mut dirs = vec![(PathBuf::new(), merging.view.root())];
    let mut next = 0;
    while let Some((path, node)) = dirs.get(next).cloned() {
        next += 1;
        dirs.extend(merging.directory(&path, &node)?);
    }
    // Last, when nothing more is put into them: that would change their times.
    for (path, node) in &dirs {
        merging.finish(path, node)?;
    }
    Ok(merging.report)
}

struct Merging<'a> {
    n_run: usize,
    view: View<'a>,
    below: View<'a>,
    into: BorrowedFd<'a>,
    copier: Copier<'a>,
    cancel: &'a AtomicBool,
    report: MergeReport,
}

impl Merging<'_> {
    /// Fills a directory of the merged layer; returns its subdirectories, which are still empty.
    fn directory(&mut self, path: &Path, node: &Node) -> Result<Vec<(PathBuf, Node)>, MergeError> {
        let out = self.open(path).map_err(failed("open", path))?;
        let lower = self.lower(path, node)?;
        let mut subdirs = Vec::new();
        for name in self.view.top_names(node).map_err(failed("list", path))? {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(MergeError::Cancelled);
            }
            let child = path.join(&name);
            if child.as_os_str().len() > MAX_DEEP_BYTES {
                return Err(MergeError::TooDeep);
            }
            match self.view.find_in(node, &name).map_err(failed("read", &child))? {
                None => self.whiteout(out.as_fd(), &name, lower.as_ref()).map_err(failed("hide", &child))?,
                Some(found) if found.is_dir => {
                    self.make_directory(out.as_fd(), &name, &child, &found, node)?;
                    subdirs.push((child, found));
                }
                Some(found) => {
                    let copied = self.copy(out.as_fd(), &name, &child, &found);
                    copied.map_err(failed("copy", &child))?;
                }
            }
        }
        Ok(subdirs)
    }

    /// Where a directory goes on below. What one layer can say of it must be all there is to say.
    fn lower(&self, path: &Path, node: &Node) -> Result<Option<Node>, MergeError> {
        let lower = match node.below(&self.view) {
            Some(below) => self.below.find(below).map_err(failed("read", path))?,
            None => None,
        };
        let shifted = |part: &Part| Part { layer: part.layer + self.n_run, path: part.path.clone() };
        let expected: Vec<_> = lower.iter().flat_map(|lower| &lower.parts).map(shifted).collect();
        let is_said = node.parts.iter().filter(|part| part.layer >= self.n_run).eq(&expected);
        if is_said { Ok(lower) } else { Err(MergeError::NotExpressible { path: path.to_owned() }) }
    }

    fn whiteout(&mut self, out: BorrowedFd<'_>, name: &OsStr, lower: Option<&Node>) -> io::Result<()> {
        let Some(lower) = lower else { return Ok(()) };
        if self.below.find_in(lower, name)?.is_some() {
            mknodat(out, name, SFlag::S_IFCHR, Mode::empty(), 0)?;
            self.report.n_whiteouts += 1;
        }
        Ok(())
    }

    fn make_directory(
        &mut self,
        out: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        node: &Node,
        parent: &Node,
    ) -> Result<(), MergeError> {
        mkdirat(out, name, Mode::S_IRWXU).map_err(|errno| failed("make", path)(errno.into()))?;
        self.report.n_entries += 1;
        let natural = parent.below(&self.view).map(|below| below.join(name));
        let (attribute, value) = match node.below(&self.view) {
            Some(below) if natural.as_deref() == Some(below) => return Ok(()),
            Some(below) => (place::REDIRECT, [b"/", below.as_os_str().as_encoded_bytes()].concat()),
            None if natural.is_some() => (place::OPAQUE, b"y".to_vec()),
            // Nothing of its parent lies below, so nothing of it could.
            None => return Ok(()),
        };
        let dir = place::open(out, Path::new(name), OFlag::O_PATH | OFlag::O_DIRECTORY);
        dir.and_then(|dir| set_xattr(dir.as_fd(), attribute, &value)).map_err(failed("mark", path))
    }

    fn copy(&mut self, out: BorrowedFd<'_>, name: &OsStr, path: &Path, node: &Node) -> io::Result<()> {
        let Some(entry) = self.view.open(node)?.filter(|entry| entry.layer < self.n_run) else {
            // Nothing in the run says anything of it.
            return Ok(());
        };
        self.report.n_entries += 1;
        let copied = self.copier.copy(&entry, out, name, path)?;
        self.report.n_shared += u64::from(copied.is_shared);
        self.report.copied_bytes += copied.bytes;
        Ok(())
    }

    fn finish(&self, path: &Path, node: &Node) -> Result<(), MergeError> {
        let Some(entry) = self.view.open(node).map_err(failed("open", path))? else {
            return Err(failed("open", path)(io::ErrorKind::NotFound.into()));
        };
        let dir = self.open(path).map_err(failed("open", path))?;
        self.copier.attributes(&entry, dir.as_fd()).map_err(failed("set the attributes of", path))
    }

    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        place::open(self.into, path, OFlag::O_PATH | OFlag::O_DIRECTORY)
    }
}
