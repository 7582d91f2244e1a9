//! The checkpoints of a sandbox: a small file each, and who is whose parent.
//!
//! A checkpoint exists if and only if its file was renamed into place: `checkpoints/cN.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;
use super::api::{CheckpointReport, PhaseTime};
use super::command::Tag;
use crate::deltafs::layer::{LayerId, RootLook};
use crate::sandbox::SandboxId;
use crate::sandbox::spec::parse_name;

/// Raised when a field changes its meaning.
const VERSION: u32 = 1;

/// Which checkpoint of a sandbox: `c1`, `c2`, ..., each number given once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct CheckpointId(pub(super) u32);

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}", self.0)
    }
}

impl FromStr for CheckpointId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('c').filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        let number = digits.and_then(|digits| digits.parse().ok());
        number.map(Self).ok_or_else(|| format!("`{text}` is not the id of a checkpoint"))
    }
}

impl TryFrom<String> for CheckpointId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<CheckpointId> for String {
    fn from(id: CheckpointId) -> String {
        id.to_string()
    }
}

/// `cN.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    version: u32,
    pub(super) id: CheckpointId,
    pub(super) name: Option<String>,
    pub(super) parent: Option<CheckpointId>,
    /// The epoch that it ended.
    pub(super) epoch: u64,
    pub(super) created_unix_ms: u64,
    /// The topmost frozen layer of its stack; none: nothing was written before it.
    pub(super) top: Option<LayerId>,
    /// How the root directory looked.
    pub(super) root: RootLook,
    /// Whether the live layer was frozen for it.
    pub(super) fs_frozen: bool,
    /// It holds no processes.
    pub(super) fs_only: bool,
    /// Its layers and this file were written to disk before it was answered.
    pub(super) durable: bool,
    pub(super) stopped_us: u64,
    pub(super) total_us: u64,
    pub(super) phases_us: Vec<PhaseTime>,
    pub(super) n_processes: usize,
    pub(super) n_threads: usize,
    pub(super) n_descriptions: usize,
    /// Memory of the processes that is theirs, not of files; 0 without processes.
    #[serde(default)]
    pub(super) memory_bytes: u64,
    /// Commands that ran, by PID inside.
    #[serde(default)]
    pub(super) commands: BTreeMap<u32, Tag>,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    pub(super) stopped_us: u64,
    pub(super) total_us: u64,
    pub(super) phases_us: Vec<PhaseTime>,
    pub(super) n_processes: usize,
    pub(super) n_threads: usize,
    pub(super) n_descriptions: usize,
    pub(super) memory_bytes: u64,
}

impl Checkpoint {
    #[expect(clippy::too_many_arguments, reason = "one per field, named at the only call")]
    pub(super) fn new(
        id: CheckpointId,
        name: Option<String>,
        parent: Option<CheckpointId>,
        epoch: u64,
        created_unix_ms: u64,
        top: Option<LayerId>,
        root: RootLook,
        fs_frozen: bool,
        durable: bool,
    ) -> Self {
        let Measured { stopped_us, total_us, phases_us, n_processes, n_threads, n_descriptions, memory_bytes } =
            Measured::default();
        Self {
            version: VERSION,
            id,
            name,
            parent,
            epoch,
            created_unix_ms,
            top,
            root,
            fs_frozen,
            fs_only: true,
            durable,
            stopped_us,
            total_us,
            phases_us,
            n_processes,
            n_threads,
            n_descriptions,
            memory_bytes,
            commands: BTreeMap::new(),
        }
    }

    pub(super) fn set_measured(&mut self, measured: Measured) {
        self.stopped_us = measured.stopped_us;
        self.total_us = measured.total_us;
        self.phases_us = measured.phases_us;
        self.n_processes = measured.n_processes;
        self.n_threads = measured.n_threads;
        self.n_descriptions = measured.n_descriptions;
        self.memory_bytes = measured.memory_bytes;
    }

    pub(super) fn report(&self, sandbox: &SandboxId) -> CheckpointReport {
        CheckpointReport {
            sandbox: sandbox.clone(),
            id: self.id.to_string(),
            name: self.name.clone(),
            parent: self.parent.map(|id| id.to_string()),
            epoch: self.epoch,
            created_unix_ms: self.created_unix_ms,
            fs_only: self.fs_only,
            fs_frozen: self.fs_frozen,
            durable: self.durable,
            stopped_us: self.stopped_us,
            total_us: self.total_us,
            phases_us: self.phases_us.clone(),
            n_processes: self.n_processes,
            n_threads: self.n_threads,
            n_descriptions: self.n_descriptions,
            memory_bytes: self.memory_bytes,
        }
    }
}

/// All checkpoints of a sandbox, on disk and here.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    dir: PathBuf,
    all: BTreeMap<CheckpointId, Checkpoint>,
    /// Files that could not be read.
    damaged: Vec<PathBuf>,
}

impl Tree {
    /// Reads the files in `dir`, a sandbox's directory of checkpoints, making it where it is missing. Files that cannot
    /// be read are left alone.
    pub(super) fn load(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (mut all, mut damaged) = (BTreeMap::new(), Vec::new());
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<CheckpointId>().ok());
            let Some(id) = id.filter(|_| path.extension().is_some_and(|extension| extension == "json")) else {
                continue;
            };
            match read(&path) {
                Ok(checkpoint) if checkpoint.id == id => drop(all.insert(id, checkpoint)),
                Ok(_) => damaged.push(path),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a checkpoint cannot be read; left alone");
                    damaged.push(path);
                }
            }
        }
        Ok(Self { dir: dir.to_owned(), all, damaged })
    }

    /// Whether there are checkpoints whose layers are not known: none must be removed then.
    pub(super) fn is_damaged(&self) -> bool {
        !self.damaged.is_empty()
    }

    /// Whether there are checkpoints that are to survive a power failure.
    pub(super) fn is_durable(&self) -> bool {
        self.iter().any(|one| one.durable)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Checkpoint> {
        self.all.values()
    }

    pub(super) fn get(&self, id: CheckpointId) -> Option<&Checkpoint> {
        self.all.get(&id)
    }

    /// By id or name.
    pub(super) fn find(&self, sandbox: &SandboxId, text: &str) -> Result<&Checkpoint, Error> {
        let by_id = text.parse().ok().and_then(|id| self.all.get(&id));
        let found = by_id.or_else(|| self.all.values().find(|one| one.name.as_deref() == Some(text)));
        found.ok_or_else(|| Error::NoCheckpoint { id: sandbox.clone(), checkpoint: text.to_owned() })
    }

    /// Whether a new checkpoint may have this name.
    pub(super) fn check_name(&self, name: &str) -> Result<(), Error> {
        let invalid = |why: String| Error::Invalid { what: "name", why };
        parse_name(name).map_err(|error| invalid(error.to_string()))?;
        if name.parse::<CheckpointId>().is_ok() {
            return Err(invalid(format!("`{name}` could be the id of a checkpoint")));
        }
        if self.all.values().any(|one| one.name.as_deref() == Some(name)) {
            return Err(Error::Exists { what: "checkpoint", name: name.to_owned() });
        }
        Ok(())
    }

    /// Puts it in place: from the rename on it exists. Durable ones are synced, with their directory.
    pub(super) fn add(&mut self, checkpoint: Checkpoint) -> io::Result<()> {
        self.write(&checkpoint)?;
        self.all.insert(checkpoint.id, checkpoint);
        Ok(())
    }

    /// Takes it away; its children become its parent's.
    pub(super) fn remove(&mut self, id: CheckpointId) -> io::Result<()> {
        let Some(parent) = self.all.get(&id).map(|one| one.parent) else { return Ok(()) };
        let children: Vec<_> = self.all.values().filter(|one| one.parent == Some(id)).cloned().collect();
        for mut child in children {
            child.parent = parent;
            self.write(&child)?;
            self.all.insert(child.id, child);
        }
        crate::fault::point("tree.remove")?;
        fs::remove_file(self.path(id))?;
        self.all.remove(&id);
        Ok(())
    }

    fn path(&self, id: CheckpointId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    fn write(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let staging = self.dir.join(format!(".{}.json", checkpoint.id));
        fs::write(&staging, serde_json::to_vec_pretty(checkpoint)?)?;
        if checkpoint.durable {
            File::open(&staging)?.sync_all()?;
        }
        crate::fault::point("tree.write")?;
        fs::rename(&staging, self.path(checkpoint.id))?;
        if checkpoint.durable {
            File::open(&self.dir)?.sync_all()?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Checkpoint> {
    let checkpoint: Checkpoint = serde_json::from_slice(&fs::read(path)?)?;
    if checkpoint.version == VERSION {
        return Ok(checkpoint);
    }
    let why = format!("version {}; this deltabox reads version {VERSION}", checkpoint.version);
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(number: u32, parent: Option<u32>, name: Option<&str>) -> Checkpoint {
        let name = name.map(str::to_owned);
        let (id, parent) = (CheckpointId(number), parent.map(CheckpointId));
        Checkpoint::new(id, name, parent, 1, 2, Some(LayerId(7)), RootLook::first(), true, false)
    }

    fn load(dir: &Path) -> (Tree, usize) {
        let tree = Tree::load(dir).unwrap();
        let n_damaged = tree.damaged.len();
        (tree, n_damaged)
    }

    #[test]
    fn what_was_added_is_there_again_and_children_of_a_removed_one_move_up() {
        let dir = tempfile::tempdir().unwrap();
        let (mut tree, _) = load(dir.path());
        for (number, parent) in [(1, None), (2, Some(1)), (3, Some(2)), (4, Some(2))] {
            tree.add(checkpoint(number, parent, None)).unwrap();
        }
        tree.remove(CheckpointId(2)).unwrap();
        let (tree, n_damaged) = load(dir.path());
        let parents: Vec<_> = tree.iter().map(|one| (one.id.0, one.parent.map(|id| id.0))).collect();
        assert_eq!((parents, n_damaged), (vec![(1, None), (3, Some(1)), (4, Some(1))], 0));
    }

    #[test]
    fn damaged_files_are_left_alone_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let (mut tree, _) = load(dir.path());
        tree.add(checkpoint(1, None, None)).unwrap();
        let text = fs::read_to_string(tree.path(CheckpointId(1))).unwrap();
        for damaged in ["", "{}", &text[..text.len() / 2], &text.replace("\"version\": 1", "\"version\": 9")] {
            fs::write(tree.path(CheckpointId(1)), damaged).unwrap();
            let (tree, n_damaged) = load(dir.path());
            assert_eq!((tree.iter().count(), n_damaged), (0, 1), "{damaged}");
        }
    }

    #[test]
    fn a_name_is_one_of_its_own_and_no_id() {
        let dir = tempfile::tempdir().unwrap();
        let (mut tree, _) = load(dir.path());
        tree.add(checkpoint(1, None, Some("good"))).unwrap();
        for bad in ["c1", "c99", "", "Bad", "good", "a/b"] {
            assert!(tree.check_name(bad).is_err(), "{bad}");
        }
        tree.check_name("cx").unwrap();
        let sandbox = "s".parse().unwrap();
        assert_eq!(tree.find(&sandbox, "good").unwrap().id, CheckpointId(1));
        assert_eq!(tree.find(&sandbox, "c1").unwrap().id, CheckpointId(1));
        assert!(tree.find(&sandbox, "c2").is_err());
    }
}
