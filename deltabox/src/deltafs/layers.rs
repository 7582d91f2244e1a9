//! All layers of a store, and the chains that they form.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::stat::SFlag;

use super::layer::{LayerId, LiveLayer, Record, RootLook};
use super::remove::remove_tree;
use super::sync::{sync_dir, sync_tree};
use super::walk::walk;
use crate::sandbox::SandboxId;

/// Directories with this prefix are on their way out.
const REMOVING: &str = ".removing-";

/// The layers under one directory. Any thread may use it.
#[derive(Debug)]
pub struct Layers {
    dir: PathBuf,
    next: AtomicU64,
    /// Of frozen layers that were walked once.
    usages: Mutex<BTreeMap<LayerId, Usage>>,
    /// What lies below layers that were read once: it never changes.
    parents: Mutex<BTreeMap<LayerId, Option<LayerId>>>,
}

/// A layer that a chain needs and that is not whole.
#[derive(Debug, thiserror::Error)]
#[error("layer {id}: {source}")]
pub struct ChainError {
    /// Which one.
    pub id: LayerId,
    /// What is wrong with it.
    pub source: io::Error,
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
    /// Opens the directory, making it where it is missing, and finishes removals that were cut short. One that cannot
    /// be finished waits for the next start.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (next, usages, parents) = (AtomicU64::new(1), Mutex::default(), Mutex::default());
        let layers = Self { dir: dir.to_owned(), next, usages, parents };
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let id = name.strip_prefix(REMOVING).unwrap_or(&name).parse();
            id.into_iter().for_each(|id| layers.keep_clear_of(id));
            if name.starts_with(REMOVING)
                && let Err(error) = remove_tree(&entry.path())
            {
                tracing::error!(path = %entry.path().display(), %error, "the removal of a layer cannot be finished");
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

    /// Makes an empty layer above `parent`. What a failure has made is removed again.
    pub fn create(
        &self,
        parent: Option<LayerId>,
        sandbox: &SandboxId,
        head: Option<String>,
        root: RootLook,
    ) -> io::Result<LiveLayer> {
        let id = LayerId(self.next.fetch_add(1, Ordering::Relaxed));
        let made = LiveLayer::create(&self.path(id), Record::new(id, parent, sandbox.clone(), head, root));
        made.inspect_err(|_| drop(self.remove(id)))
    }

    /// A layer that is there.
    pub fn load(&self, id: LayerId) -> io::Result<LiveLayer> {
        LiveLayer::open(&self.path(id))
    }

    /// A layer and all below it, the topmost first; each is there.
    pub fn chain(&self, top: Option<LayerId>) -> Result<Vec<LayerId>, ChainError> {
        let (mut chain, mut next) = (Vec::new(), top);
        while let Some(id) = next {
            next = self.check(id)?;
            chain.push(id);
        }
        Ok(chain)
    }

    /// The same of layers that are in use: each is looked at once in the life of this engine.
    pub fn known_chain(&self, top: LayerId) -> Result<Vec<LayerId>, ChainError> {
        let (mut chain, mut next) = (Vec::new(), Some(top));
        while let Some(id) = next {
            next = self.parent(id)?;
            chain.push(id);
        }
        Ok(chain)
    }

    /// The layer below one that may have been looked at before.
    pub fn parent(&self, id: LayerId) -> Result<Option<LayerId>, ChainError> {
        let known = lock(&self.parents).get(&id).copied();
        known.map_or_else(|| self.check(id), Ok)
    }

    /// Looks at a layer on disk; returns the one below.
    pub fn check(&self, id: LayerId) -> Result<Option<LayerId>, ChainError> {
        let failed = |source| ChainError { id, source };
        let record = Record::load(&self.path(id)).map_err(failed)?;
        if !self.upper(id).is_dir() {
            return Err(failed(io::ErrorKind::NotFound.into()));
        }
        // Layers are made above older ones; anything else is damage that would never end.
        if record.id != id || record.parent.is_some_and(|parent| parent >= id) {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "its layer.json is another's")));
        }
        lock(&self.parents).insert(id, record.parent);
        Ok(record.parent)
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
        lock(&self.parents).remove(&id);
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

    /// Writes a layer to disk for good, its name included.
    pub fn sync(&self, id: LayerId) -> io::Result<()> {
        sync_tree(&self.path(id))?;
        sync_dir(&self.dir)
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
    fn a_chain_ends_at_a_layer_without_parent_and_numbers_are_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let name = "a".parse().unwrap();
        let first = layers.create(None, &name, None, look()).unwrap().record().id;
        let second = layers.create(Some(first), &name, None, look()).unwrap().record().id;
        assert_eq!(layers.chain(Some(second)).unwrap(), [second, first]);
        assert_eq!(layers.chain(None).unwrap(), []);
        layers.remove(second).unwrap();
        assert_eq!(layers.chain(Some(second)).unwrap_err().id, second);
        let again = Layers::open(dir.path()).unwrap();
        again.keep_clear_of(second);
        assert!(again.create(Some(first), &name, None, look()).unwrap().record().id > second);
    }

    #[test]
    fn a_removal_cut_short_is_finished_and_its_number_not_given_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(".removing-7/upper/x")).unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(layers.create(None, &"a".parse().unwrap(), None, look()).unwrap().record().id, LayerId(8));
    }

    #[test]
    fn a_damaged_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let id = layers.create(None, &"a".parse().unwrap(), None, look()).unwrap().record().id;
        let record = layers.path(id).join("layer.json");
        let text = fs::read_to_string(&record).unwrap();
        for damaged in ["", "{", &text.replace("\"parent\":null", "\"parent\":1"), &text[..text.len() - 2]] {
            fs::write(&record, damaged).unwrap();
            assert_eq!(layers.chain(Some(id)).unwrap_err().id, id, "{damaged}");
        }
    }

    #[test]
    fn a_layer_is_unchanged_until_something_is_written_or_its_root_looks_different() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let layer = layers.create(None, &"a".parse().unwrap(), None, look()).unwrap();
        assert!(layer.is_unchanged().unwrap());
        let upper = layers.upper(layer.record().id);
        fs::write(upper.join("x"), "").unwrap();
        assert!(!layer.is_unchanged().unwrap());
        fs::remove_file(upper.join("x")).unwrap();
        // The time of the root's change is a change.
        assert!(!layer.is_unchanged().unwrap());
    }
}
