//! All layers of a store, and the stacks that they form.

mod draft;
mod spare;
mod stack;
mod tiles;

pub use draft::{Draft, FullDraft};
pub use spare::SpareLayer;
pub use stack::{Fork, Stack, StackError, Step};
pub use tiles::run_to_merge;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::stat::SFlag;

use super::layer::{LayerId, LiveLayer, Merged, Record, RootLook};
use super::remove::remove_tree;
use super::sync::{sync_dir, sync_tree};
use super::walk::walk;
use crate::sandbox::SandboxId;
use stack::Index;

/// Directories with this prefix are on their way out.
const REMOVING: &str = ".removing-";
/// Directories with this prefix are merged layers that are being made.
const MERGING: &str = ".merging-";

/// The layers under one directory. Any thread may use it.
#[derive(Debug)]
pub struct Layers {
    dir: PathBuf,
    next: AtomicU64,
    /// Of frozen layers that were walked once.
    usages: Mutex<BTreeMap<LayerId, Usage>>,
    /// Frozen layers that this engine has written to disk.
    synced: Mutex<BTreeSet<LayerId>>,
    index: Mutex<Index>,
}

/// What a layer takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated on disk, bytes.
    pub bytes: u64,
    /// Files, directories and the rest.
    pub n_entries: u64,
}

impl Layers {
    /// Opens the directory, making it where it is missing, and finishes removals that were cut short, and removes what
    /// merges have left. What cannot be removed waits for the next start.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (next, usages, synced, index) = (AtomicU64::new(1), Mutex::default(), Mutex::default(), Mutex::default());
        let layers = Self { dir: dir.to_owned(), next, usages, synced, index };
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let doomed = [REMOVING, MERGING].iter().find_map(|prefix| name.strip_prefix(prefix));
            if let Ok(id) = doomed.unwrap_or(&name).parse() {
                layers.keep_clear_of(id);
            }
            if doomed.is_some() {
                if let Err(error) = remove_tree(&entry.path()) {
                    tracing::error!(path = %entry.path().display(), %error, "the removal of a layer cannot be finished");
                }
            } else if let Ok(Record { id, merged: Some(merged), .. }) = Record::load(&entry.path()) {
                lock(&layers.index).add_merged(id, merged);
            }
        }
        Ok(layers)
    }

    /// No new layer gets this number or a lower one.
    pub fn keep_clear_of(&self, id: LayerId) {
        self.next.fetch_max(id.0 + 1, Ordering::Relaxed);
    }

    /// Where a layer lies.
    pub fn path(&self, id: LayerId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Where its content lies.
    pub fn upper(&self, id: LayerId) -> PathBuf {
        self.path(id).join("upper")
    }

    /// Makes an empty layer above a stack. What a failure has made is removed again.
    pub fn create(
        &self,
        below: &Stack,
        sandbox: &SandboxId,
        head: Option<String>,
        root: RootLook,
    ) -> io::Result<LiveLayer> {
        let id = self.next_id();
        let mut record = Record::new(id, sandbox.clone(), root);
        (record.parent, record.depth, record.stack, record.head) = (below.top(), below.depth(), below.dirs(), head);
        LiveLayer::create(&self.path(id), record).inspect_err(|_| drop(self.remove(id)))
    }

    fn next_id(&self) -> LayerId {
        LayerId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A layer that is there.
    pub fn load(&self, id: LayerId) -> io::Result<LiveLayer> {
        LiveLayer::open(&self.path(id))
    }

    /// All there are, whole or not.
    pub fn list(&self) -> io::Result<BTreeSet<LayerId>> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)? {
            found.extend(entry?.file_name().to_str().and_then(|name| name.parse::<LayerId>().ok()));
        }
        Ok(found)
    }

    /// Removes a layer: first by a rename, so that a crash in between leaves nothing that looks like one. What is not
    /// there is removed.
    pub fn remove(&self, id: LayerId) -> io::Result<()> {
        let doomed = self.dir.join(format!("{REMOVING}{id}"));
        match fs::rename(self.path(id), &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        lock(&self.usages).remove(&id);
        lock(&self.synced).remove(&id);
        lock(&self.index).remove(id);
        crate::fault::point("layers.remove")?;
        remove_tree(&doomed)
    }

    /// What a frozen layer takes: walked once.
    pub fn frozen_usage(&self, id: LayerId) -> io::Result<Usage> {
        if let Some(usage) = lock(&self.usages).get(&id) {
            return Ok(*usage);
        }
        let usage = self.scan_usage(id)?;
        lock(&self.usages).insert(id, usage);
        Ok(usage)
    }

    /// Walks a layer.
    pub fn scan_usage(&self, id: LayerId) -> io::Result<Usage> {
        let mut usage = Usage::default();
        let mut seen = BTreeSet::new();
        walk(&self.upper(id), |entry| {
            usage.n_entries += 1;
            if entry.stat.st_nlink == 1 || entry.kind() == SFlag::S_IFDIR || seen.insert(entry.stat.st_ino) {
                usage.bytes += u64::try_from(entry.stat.st_blocks).unwrap_or(0) * 512;
            }
            Ok(())
        })?;
        Ok(usage)
    }

    /// Writes a frozen layer to disk for good, its name included: once in the life of this engine.
    pub fn sync(&self, id: LayerId) -> io::Result<()> {
        if lock(&self.synced).contains(&id) {
            return Ok(());
        }
        sync_tree(&self.path(id))?;
        sync_dir(&self.dir)?;
        lock(&self.synced).insert(id);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look() -> RootLook {
        use std::os::fd::AsFd;
        let dir = tempfile::tempdir().unwrap();
        RootLook::of(super::super::layer::open_dir(dir.path()).unwrap().as_fd()).unwrap()
    }

    #[test]
    fn a_stack_ends_at_a_layer_without_parent_and_numbers_are_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let name = "a".parse().unwrap();
        let first = layers.create(&Stack::default(), &name, None, look()).unwrap().record().id;
        let above = layers.stack(Some(first)).unwrap();
        let second = layers.create(&above, &name, None, look()).unwrap().record().id;
        assert_eq!(layers.stack(Some(second)).unwrap().dirs(), [second, first]);
        assert!(layers.stack(None).unwrap().is_empty());
        layers.remove(second).unwrap();
        assert_eq!(layers.stack(Some(second)).unwrap_err().id, second);
        let again = Layers::open(dir.path()).unwrap();
        again.keep_clear_of(second);
        assert!(again.create(&above, &name, None, look()).unwrap().record().id > second);
    }

    #[test]
    fn a_removal_or_merge_cut_short_goes_and_its_number_is_not_given_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(".removing-6/upper/x")).unwrap();
        fs::create_dir_all(dir.path().join(".merging-7/upper/x")).unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(
            layers.create(&Stack::default(), &"a".parse().unwrap(), None, look()).unwrap().record().id,
            LayerId(8)
        );
    }

    #[test]
    fn a_damaged_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let id = layers.create(&Stack::default(), &"a".parse().unwrap(), None, look()).unwrap().record().id;
        let record = layers.path(id).join("layer.json");
        let text = fs::read_to_string(&record).unwrap();
        for damaged in ["", "{", &text.replace("\"parent\":null", "\"parent\":1"), &text[..text.len() - 2]] {
            fs::write(&record, damaged).unwrap();
            assert_eq!(layers.stack(Some(id)).unwrap_err().id, id, "{damaged}");
        }
    }

    #[test]
    fn a_layer_is_unchanged_until_something_is_written_or_its_root_looks_different() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let layer = layers.create(&Stack::default(), &"a".parse().unwrap(), None, look()).unwrap();
        assert!(layer.is_unchanged().unwrap());
        let upper = layers.upper(layer.record().id);
        fs::write(upper.join("x"), "").unwrap();
        assert!(!layer.is_unchanged().unwrap());
        fs::remove_file(upper.join("x")).unwrap();
        // The time of the root's change is a change.
        assert!(!layer.is_unchanged().unwrap());
    }
}
