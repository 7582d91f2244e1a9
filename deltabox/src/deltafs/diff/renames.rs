//! Deleted and added files that are one: overlayfs has noted what a file is a copy of, or the content tells.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::DiffError;
use super::content::digest;
use super::pairs::{Found, Side};
use crate::deltafs::origins::{Origins, source};
use crate::deltafs::view::{Entry, Kind};
use crate::sys::handle::Handle;

/// Larger files are not read to find out whether they were renamed. (Chosen: a second of reading.)
const MAX_DIGESTED_BYTES: u64 = 256 << 20;

/// Moves what is one from `deleted` and `added` to `both`.
pub(super) fn join(from: &Side<'_>, to: &Side<'_>, found: &mut Found) -> Result<(), DiffError> {
    let deleted = files(from, &found.deleted)?;
    let added = files(to, &found.added)?;
    if deleted.is_empty() || added.is_empty() {
        return Ok(());
    }
    let origins = origins(&[from, to])?;
    let mut joined = Vec::new();
    let mut by_origin: BTreeMap<_, &PathBuf> = BTreeMap::new();
    for (path, entry) in &deleted {
        if let Some(key) = key(&origins, from, entry) {
            by_origin.entry((key, entry.kind)).or_insert(path);
        }
    }
    for (path, entry) in &added {
        let key = key(&origins, to, entry).map(|key| (key, entry.kind));
        if let Some(old) = key.and_then(|key| by_origin.remove(&key)) {
            joined.push((old.clone(), path.clone()));
        }
    }
    let is_joined = |path: &PathBuf| joined.iter().any(|(old, new)| old == path || new == path);
    let left = |files: BTreeMap<PathBuf, Entry>| -> Vec<_> {
        files.into_iter().filter(|(path, _)| !is_joined(path)).collect()
    };
    let by_content = same_content(left(deleted), left(added))?;
    for (old, new) in joined.into_iter().chain(by_content) {
        found.deleted.remove(&old);
        found.added.remove(&new);
        found.both.insert((old, new), true);
    }
    Ok(())
}

fn files(side: &Side<'_>, paths: &BTreeSet<PathBuf>) -> Result<BTreeMap<PathBuf, Entry>, DiffError> {
    let mut files = BTreeMap::new();
    for path in paths {
        if side.find(path)?.is_some_and(|node| !node.is_dir)
            && let Some(entry) = side.open(path)?
        {
            files.insert(path.clone(), entry);
        }
    }
    Ok(files)
}

/// Pairs that alone have their content among all of those files.
fn same_content(
    deleted: Vec<(PathBuf, Entry)>,
    added: Vec<(PathBuf, Entry)>,
) -> Result<Vec<(PathBuf, PathBuf)>, DiffError> {
    type Alike = BTreeMap<u64, [Vec<(PathBuf, Entry)>; 2]>;
    let mut by_size = Alike::new();
    for (side, files) in [deleted, added].into_iter().enumerate() {
        let files = files.into_iter().filter(|(_, entry)| entry.kind == Kind::File);
        for (path, entry) in files.filter(|(_, entry)| (1..=MAX_DIGESTED_BYTES).contains(&entry.size)) {
            by_size.entry(entry.size).or_default()[side].push((path, entry));
        }
    }
    let mut pairs = Vec::new();
    for sides in by_size.into_values().filter(|[deleted, added]| !deleted.is_empty() && !added.is_empty()) {
        let mut by_digest: BTreeMap<_, [Vec<PathBuf>; 2]> = BTreeMap::new();
        for (side, files) in sides.into_iter().enumerate() {
            for (path, entry) in files {
                let digest = digest(&entry).map_err(DiffError::at(&path))?;
                by_digest.entry(digest).or_default()[side].push(path);
            }
        }
        for alike in by_digest.into_values() {
            if let [[old], [new]] = alike.each_ref().map(Vec::as_slice) {
                pairs.push((old.clone(), new.clone()));
            }
        }
    }
    Ok(pairs)
}

fn origins(sides: &[&Side<'_>]) -> Result<Origins, DiffError> {
    let mut origins = Origins::default();
    for side in sides {
        // Nothing lies above the topmost layer that could be a copy out of it.
        for layer in side.view.top_layers().iter().skip(1) {
            origins.add(*layer).map_err(DiffError::at(Path::new("")))?;
        }
    }
    Ok(origins)
}

/// What an entry is a copy of, or itself.
fn key(origins: &Origins, side: &Side<'_>, entry: &Entry) -> Option<Handle> {
    if entry.layer < side.view.top_layers().len()
        && let Some(source) = source(entry.fd()).ok().flatten()
    {
        return Some(origins.first(source));
    }
    entry.handle()
}
