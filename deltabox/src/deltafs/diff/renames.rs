//! Deleted and added files that are one: overlayfs has noted what a file is a copy of, or the content tells.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::DiffError;
use super::content::digest;
use super::pairs::{Found, Side};
use crate::deltafs::view::{Entry, Kind, place};
use crate::sys::handle::{Handle, identity_at};

/// Larger files are not read to find out whether they were renamed. (Chosen: a second of reading.)
const MAX_DIGESTED_BYTES: u64 = 256 << 20;

/// Moves what is one from `deleted` and `added` to `both`.
pub(super) fn join(from: &Side<'_>, to: &Side<'_>, found: &mut Found) -> Result<(), DiffError> {
    let deleted = files(from, &found.deleted)?;
    let added = files(to, &found.added)?;
    if deleted.is_empty() || added.is_empty() {
        return Ok(());
    }
    let origins = Origins::read(&[from, to])?;
    let mut joined = Vec::new();
    let mut by_origin: BTreeMap<_, &PathBuf> = BTreeMap::new();
    for (path, entry) in &deleted {
        if let Some(key) = origins.of(from, entry) {
            by_origin.entry((key, entry.kind)).or_insert(path);
        }
    }
    for (path, entry) in &added {
        let key = origins.of(to, entry).map(|key| (key, entry.kind));
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

/// What files were copied from, as overlayfs has noted it.
#[derive(Debug, Default)]
pub(in crate::deltafs) struct Origins {
    /// Of files in layers that have others above them: from the handle of a copy to that of its source.
    sources: BTreeMap<Handle, Handle>,
}

impl Origins {
    fn read(sides: &[&Side<'_>]) -> Result<Self, DiffError> {
        let mut origins = Self::default();
        for side in sides {
            for layer in side.view.top_layers().iter().skip(1) {
                origins.add(*layer).map_err(DiffError::at(Path::new("")))?;
            }
        }
        Ok(origins)
    }

    /// Walks a layer, hidden files too.
    pub(in crate::deltafs) fn add(&mut self, layer: BorrowedFd<'_>) -> std::io::Result<()> {
        let mut queue = vec![PathBuf::new()];
        while let Some(dir) = queue.pop() {
            let mut names = BTreeSet::new();
            place::list(layer, &dir, &mut names)?;
            for name in names {
                let path = dir.join(name);
                let Ok(fd) = place::open(layer, &path, OFlag::O_PATH) else { continue };
                let is_dir = Kind::of(nix::sys::stat::fstat(&fd)?.st_mode) == Kind::Directory;
                if is_dir {
                    queue.push(path);
                } else if let Some(source) = source(std::os::fd::AsFd::as_fd(&fd))?
                    && let Ok(handle) = identity_at(std::os::fd::AsFd::as_fd(&fd), c"")
                {
                    self.sources.insert(handle, source);
                }
            }
        }
        Ok(())
    }

    /// The first source of a chain of copies.
    pub(in crate::deltafs) fn first(&self, mut handle: Handle) -> Handle {
        // Each layer adds a copy at most; anything longer is damage.
        for _ in 0..1000 {
            match self.sources.get(&handle) {
                Some(source) => handle = source.clone(),
                None => break,
            }
        }
        handle
    }

    /// What an entry is a copy of, or itself.
    fn of(&self, side: &Side<'_>, entry: &Entry) -> Option<Handle> {
        if entry.layer < side.view.top_layers().len()
            && let Some(source) = source(entry.fd()).ok().flatten()
        {
            return Some(self.first(source));
        }
        entry.handle()
    }
}

/// The handle in a file's `trusted.overlay.origin`. (`struct ovl_fb` of fs/overlayfs/overlayfs.h: version 0, magic
/// 0xfb, length of all, flags, type of the handle, 16 bytes of UUID, the handle. Empty where the lower file system has
/// none, as another overlayfs.)
pub(in crate::deltafs) fn source(fd: BorrowedFd<'_>) -> std::io::Result<Option<Handle>> {
    const HEADER_BYTES: usize = 21;
    let value = place::read_xattr(fd, place::ORIGIN)?.unwrap_or_default();
    match value[..] {
        [0, 0xfb, len, _, kind, ..] if usize::from(len) == value.len() && value.len() > HEADER_BYTES => {
            Ok(Some((kind.into(), value[HEADER_BYTES..].to_vec())))
        }
        _ => Ok(None),
    }
}
