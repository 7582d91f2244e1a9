//! Which entry of the one state is which of the other.
//!
//! A directory is the same one if both sides merge it with the same directory of the common part, wherever either has
//! moved it to; else if it has the same name in directories that are one, and neither is elsewhere on the other side.
//! Files are paired by name; that a file was renamed is found out afterwards, among those without a partner.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use super::DiffError;
use crate::deltafs::view::place::MAX_DEEP_BYTES;
use crate::deltafs::view::{Entry, Node, View};

/// One of the two states.
pub(super) struct Side<'a> {
    pub(super) view: View<'a>,
    /// Directories with a part in a layer of this side alone.
    touched: BTreeMap<PathBuf, Node>,
    /// Where those are, by where they lie in the common part.
    homes: BTreeMap<PathBuf, PathBuf>,
    found: RefCell<BTreeMap<PathBuf, Option<Node>>>,
}

impl<'a> Side<'a> {
    /// Walks the first `n_top` of the layers.
    pub(super) fn read(layers: &'a [BorrowedFd<'a>], n_top: usize) -> Result<Self, DiffError> {
        let view = View::new(layers, n_top);
        let mut side = Self { view, touched: BTreeMap::new(), homes: BTreeMap::new(), found: RefCell::default() };
        let mut queue = vec![(PathBuf::new(), view.root())];
        while let Some((path, node)) = queue.pop() {
            for name in view.top_names(&node).map_err(DiffError::at(&path))? {
                let child = path.join(&name);
                let found = view.find_in(&node, &name).map_err(DiffError::at(&child))?;
                check_depth(&child)?;
                if let Some(found) = found.filter(|found| found.is_dir && found.is_touched(&view)) {
                    queue.push((child, found));
                }
            }
            if let Some(below) = node.below(&view) {
                side.homes.insert(below.to_owned(), path.clone());
            }
            side.touched.insert(path, node);
        }
        Ok(side)
    }

    /// What lies at a path.
    pub(super) fn find(&self, path: &Path) -> Result<Option<Node>, DiffError> {
        let known = |path: &Path| match self.touched.get(path) {
            Some(node) => Some(Some(node.clone())),
            None => self.found.borrow().get(path).cloned(),
        };
        // From the nearest directory that is known downwards: the root is.
        let mut missing = Vec::new();
        let mut at = Some(path);
        let mut found = None;
        while let Some(path) = at {
            match known(path) {
                Some(node) => {
                    found = node;
                    break;
                }
                None => missing.push(path),
            }
            at = path.parent();
        }
        for path in missing.into_iter().rev() {
            found = match (&found, path.file_name()) {
                (Some(dir), Some(name)) => self.view.find_in(dir, name).map_err(DiffError::at(path))?,
                _ => None,
            };
            self.found.borrow_mut().insert(path.to_owned(), found.clone());
        }
        Ok(found)
    }

    /// What lies at a path, opened.
    pub(super) fn open(&self, path: &Path) -> Result<Option<Entry>, DiffError> {
        match self.find(path)? {
            Some(node) => self.view.open(&node).map_err(DiffError::at(path)),
            None => Ok(None),
        }
    }

    /// Where this side has the directory that is at `below` in the common part.
    fn locate(&self, below: &Path) -> Result<Option<PathBuf>, DiffError> {
        let home = below.ancestors().find_map(|ancestor| Some((ancestor, self.homes.get(ancestor)?)));
        let Some((ancestor, home)) = home else { return Ok(None) };
        let rest = below.strip_prefix(ancestor).unwrap_or(Path::new(""));
        // Joining nothing would leave a slash at the end.
        let path = if rest.as_os_str().is_empty() { home.clone() } else { home.join(rest) };
        let is_it = self.find(&path)?.is_some_and(|node| node.below(&self.view) == Some(below));
        Ok(is_it.then_some(path))
    }

    fn directory(&self, path: &Path) -> Result<Option<Node>, DiffError> {
        Ok(self.find(path)?.filter(|node| node.is_dir))
    }
}

/// Looks for pairs of directories.
struct Matching<'a> {
    /// The side whose directories are asked for.
    here: &'a Side<'a>,
    there: &'a Side<'a>,
    known: RefCell<BTreeMap<PathBuf, Option<PathBuf>>>,
}

impl<'a> Matching<'a> {
    fn new(here: &'a Side<'a>, there: &'a Side<'a>) -> Self {
        Self { here, there, known: RefCell::default() }
    }

    /// Where the directory `path` of this side is on the other one.
    fn partner(&self, path: &Path) -> Result<Option<PathBuf>, DiffError> {
        let mut missing = Vec::new();
        let mut found = Some(PathBuf::new());
        for path in path.ancestors().filter(|path| !path.as_os_str().is_empty()) {
            if let Some(known) = self.known.borrow().get(path) {
                found = known.clone();
                break;
            }
            missing.push(path);
        }
        for path in missing.into_iter().rev() {
            found = self.partner_given(found.as_deref(), path)?;
            self.known.borrow_mut().insert(path.to_owned(), found.clone());
        }
        Ok(found)
    }

    /// The same, where the partner of its parent is known.
    fn partner_given(&self, parent: Option<&Path>, path: &Path) -> Result<Option<PathBuf>, DiffError> {
        if let Some(there) = identical(self.here, path, self.there)? {
            return Ok(Some(there));
        }
        let (Some(parent), Some(name)) = (parent, path.file_name()) else { return Ok(None) };
        let there = parent.join(name);
        let is_both = self.here.directory(path)?.is_some() && self.there.directory(&there)?.is_some();
        Ok((is_both && identical(self.there, &there, self.here)?.is_none()).then_some(there))
    }

    /// Where `path` would be on the other side if nothing had moved it.
    fn expected(&self, path: &Path) -> Result<Option<PathBuf>, DiffError> {
        match path.parent().zip(path.file_name()) {
            Some((parent, name)) => Ok(self.partner(parent)?.map(|parent| parent.join(name))),
            None => Ok(Some(PathBuf::new())),
        }
    }
}

/// Where the other side has the very directory of the common part that `path` is merged with.
fn identical(here: &Side<'_>, path: &Path, there: &Side<'_>) -> Result<Option<PathBuf>, DiffError> {
    match here.directory(path)?.as_ref().and_then(|node| node.below(&here.view)) {
        Some(below) => there.locate(below),
        None => Ok(None),
    }
}

/// What may differ.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Old and new path of what is one, and whether it was renamed.
    pub(super) both: BTreeMap<(PathBuf, PathBuf), bool>,
    pub(super) deleted: BTreeSet<PathBuf>,
    pub(super) added: BTreeSet<PathBuf>,
    /// By the old path: a file that was there, or is there, where the other side has a directory.
    pub(super) replaced: BTreeMap<PathBuf, PathBuf>,
}

/// Finds all entries that may differ.
pub(super) fn find(from: &Side<'_>, to: &Side<'_>, contents: bool) -> Result<Found, DiffError> {
    let search = Search { from, to, old: Matching::new(from, to), new: Matching::new(to, from) };
    let mut found = Found::default();
    let mut dirs = BTreeSet::new();
    for path in from.touched.keys() {
        dirs.insert((Some(path.clone()), search.old.partner(path)?));
    }
    for path in to.touched.keys() {
        dirs.insert((search.new.partner(path)?, Some(path.clone())));
    }
    for (old, new) in &dirs {
        search.directory(old.as_deref(), new.as_deref(), &mut found)?;
    }
    let stand_for_all =
        |side: &Side<'_>, paths: &BTreeSet<PathBuf>, pure: bool| -> Result<BTreeSet<PathBuf>, DiffError> {
            let mut tops = BTreeSet::new();
            for path in paths {
                if side.directory(path)?.is_some_and(|node| !pure || node.below(&side.view).is_some()) {
                    tops.insert(path.clone());
                }
            }
            Ok(tops)
        };
    // What is new in a directory that is new itself lies in the layers that are read anyway; what is in one that is
    // gone, or that came back from the common part, does not.
    for (matching, paths, pure) in [(&search.old, &mut found.deleted, false), (&search.new, &mut found.added, true)] {
        let mut covering = stand_for_all(matching.here, paths, pure)?;
        if contents {
            for top in covering {
                matching.expand(&top, paths)?;
            }
            continue;
        }
        // Parents come first. What was moved out of a directory that is gone has partners, and what is in it parents
        // that do.
        for path in std::mem::take(paths) {
            if path.parent().is_some_and(|parent| covering.contains(parent)) {
                covering.insert(path);
            } else {
                paths.insert(path);
            }
        }
    }
    Ok(found)
}

struct Search<'a> {
    from: &'a Side<'a>,
    to: &'a Side<'a>,
    old: Matching<'a>,
    new: Matching<'a>,
}

impl Search<'_> {
    /// What is in a directory.
    fn directory(&self, old: Option<&Path>, new: Option<&Path>, found: &mut Found) -> Result<(), DiffError> {
        self.pair(old, new, found)?;
        let Some(new) = new else { return Ok(()) };
        let new_dir = self.to.directory(new)?;
        let old_dir = match old {
            Some(old) => self.from.directory(old)?,
            None => None,
        };
        for name in self.names(old_dir.as_ref(), new_dir.as_ref()).map_err(DiffError::at(new))? {
            let (old, new) = (old.map(|old| old.join(&name)), new.join(&name));
            let before = match &old {
                Some(old) => self.from.find(old)?,
                None => None,
            };
            let after = self.to.find(&new)?;
            let is_dir = |node: &Option<Node>| node.as_ref().map(|node| node.is_dir);
            match (is_dir(&before), is_dir(&after)) {
                (None, None) => {}
                (Some(false), Some(false)) => {
                    if let Some(old) = old {
                        found.both.insert((old, new), false);
                    }
                }
                (was_dir, is_dir) => {
                    if was_dir == Some(true) {
                        let partner = self.old.partner(old.as_deref().unwrap_or(Path::new("")))?;
                        self.pair(old.as_deref(), partner.as_deref(), found)?;
                    } else if was_dir == Some(false) {
                        found.deleted.extend(old.clone());
                    }
                    if is_dir == Some(true) {
                        self.pair(self.new.partner(&new)?.as_deref(), Some(&new), found)?;
                    } else if is_dir == Some(false) {
                        found.added.insert(new.clone());
                    }
                    if was_dir.is_some() && is_dir.is_some() && was_dir != is_dir {
                        found.replaced.extend(old.map(|old| (old, new)));
                    }
                }
            }
        }
        Ok(())
    }

    /// Two directories that are one, or one that has no partner.
    fn pair(&self, old: Option<&Path>, new: Option<&Path>, found: &mut Found) -> Result<(), DiffError> {
        match (old, new) {
            (Some(old), Some(new)) => {
                let is_renamed = self.new.expected(new)?.as_deref() != Some(old);
                found.both.insert((old.to_owned(), new.to_owned()), is_renamed);
            }
            (Some(old), None) => drop(found.deleted.insert(old.to_owned())),
            (None, Some(new)) => drop(found.added.insert(new.to_owned())),
            (None, None) => {}
        }
        Ok(())
    }

    /// The names that may differ: where both go on in one directory of the common part, only those above it.
    fn names(&self, old: Option<&Node>, new: Option<&Node>) -> io::Result<BTreeSet<OsString>> {
        let mut names = BTreeSet::new();
        match (old, new) {
            (Some(old), Some(new)) if old.below(&self.from.view) != new.below(&self.to.view) => {
                names.extend(self.from.view.all_names(old)?);
                names.extend(self.to.view.all_names(new)?);
            }
            _ => {
                for (view, dir) in [(&self.from.view, old), (&self.to.view, new)] {
                    names.extend(dir.map(|dir| view.top_names(dir)).transpose()?.into_iter().flatten());
                }
            }
        }
        Ok(names)
    }
}

impl Matching<'_> {
    /// Adds all that is in the directory `top` and not elsewhere on the other side.
    fn expand(&self, top: &Path, paths: &mut BTreeSet<PathBuf>) -> Result<(), DiffError> {
        let mut queue = vec![top.to_owned()];
        while let Some(dir) = queue.pop() {
            let Some(node) = self.here.directory(&dir)? else { continue };
            for name in self.here.view.list(&node).map_err(DiffError::at(&dir))? {
                let path = dir.join(name);
                check_depth(&path)?;
                if self.here.directory(&path)?.is_none() {
                    paths.insert(path);
                } else if self.partner(&path)?.is_none() {
                    paths.insert(path.clone());
                    queue.push(path);
                }
            }
        }
        Ok(())
    }
}

fn check_depth(path: &Path) -> Result<(), DiffError> {
    match path.as_os_str().len() {
        ..=MAX_DEEP_BYTES => Ok(()),
        _ => Err(DiffError::at(path.parent().unwrap_or(path))(io::ErrorKind::InvalidFilename.into())),
    }
}
