//! All layers of a store, and the chains that they form.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::layer::{LayerId, LiveLayer, Record, RootLook};
use super::remove::remove_tree;
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
    /// Opens the directory, making it where it is missing, and finishes removals that were cut short.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let layers = Self { dir: dir.to_owned(), next: AtomicU64::new(1), usages: Mutex::default() };
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(REMOVING) {
                remove_tree(&entry.path())?;
            } else if let Ok(id) = name.parse() {
                layers.keep_clear_of(id);
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
            let failed = |source| ChainError { id, source };
            let record = Record::load(&self.path(id)).map_err(failed)?;
            if !self.upper(id).is_dir() {
                return Err(failed(io::ErrorKind::NotFound.into()));
            }
            // Layers are made above older ones; anything else is damage that would never end.
            if record.id != id || record.parent.is_some_and(|parent| parent >= id) {
                return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "its layer.json is another's")));
            }
            chain.push(id);
            next = record.parent;
        }
        Ok(chain)
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
        self.usages.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        crate::fault::point("layers.remove")?;
        remove_tree(&doomed)
    }

    /// What a frozen layer takes: walked once.
    pub fn frozen_usage(&self, id: LayerId) -> io::Result<Usage> {
        let usages = || self.usages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(usage) = usages().get(&id) {
            return Ok(*usage);
        }
        let usage = self.scan_usage(id)?;
        usages().insert(id, usage);
        Ok(usage)
    }

    /// Walks a layer.
    pub fn scan_usage(&self, id: LayerId) -> io::Result<Usage> {
        let mut usage = Usage::default();
        let mut seen = BTreeSet::new();
        let mut queue = vec![self.upper(id)];
        while let Some(dir) = queue.pop() {
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                // A live layer changes while it is walked.
                let Ok(meta) = entry.metadata() else { continue };
                usage.n_entries += 1;
                if meta.nlink() == 1 || meta.is_dir() || seen.insert(meta.ino()) {
                    usage.bytes += meta.blocks() * 512;
                }
                if meta.is_dir() {
                    queue.push(entry.path());
                }
            }
        }
        Ok(usage)
    }
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
