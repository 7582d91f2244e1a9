//! One layer on disk.
//!
//! ```text
//! LAYER/upper/       what overlayfs writes; frozen: read-only by being nobody's upper directory any more
//! LAYER/work/        overlayfs's own
//! LAYER/layer.json   what lies below it, and what its root looked like when it was made
//! ```
//! A merged layer has no `work`: it is never written to by overlayfs.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::str::FromStr;

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

use super::overlay::Top;
use crate::sandbox::SandboxId;
use crate::sandbox::idmap::HOST_ID_BASE;
use crate::sys::fs::{XATTR_MAX_BYTES, get_xattr, list_xattrs, remove_xattr, set_times, set_xattr};
use crate::sys::stat::stat;

/// Raised when a field of layer.json changes its meaning.
const VERSION: u32 = 2;
const RECORD: &str = "layer.json";

/// Which layer: a number that the store gives once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u64);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LayerId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// `layer.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Which layer.
    pub id: LayerId,
    /// The layer below; none: the skeleton and the base.
    pub parent: Option<LayerId>,
    /// How many layers lie below it, as they were frozen: each merged one counts as all that it stands for.
    pub depth: u64,
    /// For one that was made to be live: the directories it was mounted over, the topmost first.
    pub stack: Vec<LayerId>,
    /// For one that stands for others: which.
    pub merged: Option<Merged>,
    /// Whose live layer it was made to be.
    pub sandbox: SandboxId,
    /// The checkpoint in whose state that sandbox is while nothing is written: `None` before the first.
    pub head: Option<String>,
    /// Its root directory when it was made.
    pub root: RootLook,
}

/// A run of layers that one stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Merged {
    /// The topmost of them.
    pub top: LayerId,
    /// How many there were.
    pub n_layers: u64,
}

impl Record {
    /// Of a layer that is to be made, of a sandbox, over nothing.
    pub fn new(id: LayerId, sandbox: SandboxId, root: RootLook) -> Self {
        let (version, stack) = (VERSION, Vec::new());
        Self { version, id, parent: None, depth: 0, stack, merged: None, sandbox, head: None, root }
    }

    /// The topmost layer it stands for: itself, unless it is a merged one.
    pub fn name(&self) -> LayerId {
        self.merged.map_or(self.id, |merged| merged.top)
    }

    /// Writes it into a layer's directory.
    pub(super) fn save(&self, layer: &Path) -> io::Result<()> {
        let staging = layer.join(".layer.json");
        fs::write(&staging, serde_json::to_vec(self)?)?;
        fs::rename(staging, layer.join(RECORD))
    }

    /// Reads it from a layer's directory.
    pub fn load(layer: &Path) -> io::Result<Self> {
        let record: Self = serde_json::from_slice(&fs::read(layer.join(RECORD))?)?;
        if record.version == VERSION {
            return Ok(record);
        }
        let why = format!("version {} of {RECORD}; this deltabox reads version {VERSION}", record.version);
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }
}

/// What of a sandbox's root directory itself can change: an overlay takes it from the topmost layer alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootLook {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    /// Attributes but for overlayfs's own; values in hexadecimal.
    xattrs: BTreeMap<String, String>,
}

impl RootLook {
    /// The first layer's: it belongs to the sandbox's root.
    pub fn first() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let mtime = (i64::try_from(now.as_secs()).unwrap_or(0), now.subsec_nanos());
        Self { mode: 0o755, uid: HOST_ID_BASE, gid: HOST_ID_BASE, mtime, xattrs: BTreeMap::new() }
    }

    /// Of a directory.
    pub fn of(dir: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = stat(dir)?;
        let xattrs = read_xattrs(dir)?;
        Ok(Self { mode: stat.mode & 0o7777, uid: stat.uid, gid: stat.gid, mtime: stat.mtime, xattrs })
    }

    /// Makes a directory look so.
    pub fn apply(&self, dir: BorrowedFd<'_>) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        nix::unistd::fchownat(dir, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
        crate::sys::fs::chmod(dir, self.mode)?;
        for name in read_xattrs(dir)?.into_keys().filter(|name| !self.xattrs.contains_key(name)) {
            remove_xattr(dir, &CString::new(name)?)?;
        }
        for (name, value) in &self.xattrs {
            let digit = |at: usize| value.get(at..at + 2).and_then(|byte| u8::from_str_radix(byte, 16).ok());
            let value: Vec<u8> = (0..value.len()).step_by(2).filter_map(digit).collect();
            set_xattr(dir, &CString::new(name.as_str())?, &value)?;
        }
        set_times(dir, self.mtime, self.mtime)
    }
}

fn read_xattrs(dir: BorrowedFd<'_>) -> io::Result<BTreeMap<String, String>> {
    let mut names = [0; 4096];
    let n = match list_xattrs(dir, &mut names) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => 0,
        other => other?,
    };
    let mut xattrs = BTreeMap::new();
    for name in names[..n].split_inclusive(|byte| *byte == 0).filter(|name| !name.starts_with(b"trusted.overlay.")) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        let mut value = vec![0; XATTR_MAX_BYTES];
        let n = get_xattr(dir, name, &mut value)?;
        let hex = value[..n].iter().map(|byte| format!("{byte:02x}")).collect();
        xattrs.insert(name.to_string_lossy().into_owned(), hex);
    }
    Ok(xattrs)
}

/// A layer that can be mounted as the top of a stack.
#[derive(Debug)]
pub struct LiveLayer {
    record: Record,
    upper: OwnedFd,
    work: OwnedFd,
}

impl LiveLayer {
    /// Makes an empty layer in `dir`, which must not exist.
    pub(super) fn create(dir: &Path, record: Record) -> io::Result<Self> {
        let layer = Self::prepare(dir, record)?;
        layer.record.save(dir)?;
        Ok(layer)
    }

    /// The same without its record on disk: not a layer yet.
    pub(super) fn prepare(dir: &Path, record: Record) -> io::Result<Self> {
        crate::fault::point("create.layer")?;
        fs::create_dir(dir)?;
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let (upper, work) = (open_for_looks(&upper)?, open_dir(&work)?);
        record.root.apply(upper.as_fd())?;
        Ok(Self { record, upper, work })
    }

    /// Makes a prepared one a layer above others.
    pub(super) fn settle(
        &mut self,
        dir: &Path,
        parent: Option<LayerId>,
        depth: u64,
        stack: Vec<LayerId>,
        head: Option<String>,
    ) -> io::Result<()> {
        let record = Record { parent, depth, stack, head, ..self.record.clone() };
        record.save(dir)?;
        self.record = record;
        Ok(())
    }

    /// One that is there.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let record = Record::load(dir)?;
        Ok(Self { record, upper: open_for_looks(&dir.join("upper"))?, work: open_dir(&dir.join("work"))? })
    }

    /// What it was made as.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its root looked different when programs began to use it. Not on disk: an engine that reads the record later takes
    /// the layer for changed, and freezes it empty.
    pub fn set_first_look(&mut self, look: RootLook) {
        self.record.root = look;
    }

    /// For [`super::overlay::mount_stack`].
    pub fn top(&self) -> Top<'_> {
        Top { upper: self.upper.as_fd(), work: self.work.as_fd() }
    }

    /// How its root looks now.
    pub fn root_look(&self) -> io::Result<RootLook> {
        RootLook::of(self.upper.as_fd())
    }

    /// Whether nothing was written to it. True for sure only while nobody can write.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        Ok(!self.has_entries()? && self.root_look()? == self.record.root)
    }

    /// Whether anything is in it.
    fn has_entries(&self) -> io::Result<bool> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = nix::dir::Dir::openat(&self.upper, c".", flags, Mode::empty())?;
        for entry in dir.iter() {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Not by name only: to look at a root is faster then, and it is looked at while programs stand still.
fn open_for_looks(path: &Path) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// A descriptor that names a directory and nothing more.
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_looks_as_it_was_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open_dir(dir.path()).unwrap();
        let mut look = RootLook::of(fd.as_fd()).unwrap();
        look.mode = 0o1711;
        look.mtime = (1_000_000_000, 123_456_789);
        look.xattrs.insert("user.mark".into(), "00ff61".into());
        look.apply(fd.as_fd()).unwrap();
        assert_eq!(RootLook::of(fd.as_fd()).unwrap(), look);
        look.xattrs.clear();
        look.apply(fd.as_fd()).unwrap();
        assert_eq!(RootLook::of(fd.as_fd()).unwrap(), look);
    }

    #[test]
    fn a_record_of_another_version_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new(LayerId(3), "a".parse().unwrap(), RootLook::first());
        record.merged = Some(Merged { top: LayerId(2), n_layers: 2 });
        record.save(dir.path()).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), record);
        record.version = VERSION + 1;
        record.save(dir.path()).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
}
