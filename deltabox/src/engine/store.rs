//! The store directory: who may use it, and where things lie in it.
//!
//! ```text
//! STORE/            0700
//!   lock            flock: one engine per store
//!   tag             16 hex digits that name this store's cgroups
//!   daemon.log
//!   bases/NAME/     imported images
//!   frames/DIGEST/  what `--base host` shows (deltafs::hostbase)
//!   layers/LAYER/   layer.json  upper/  work/     shared by all sandboxes (deltafs::layers)
//!   spares/LAYER/   upper/  work/                 layers that nobody uses yet (engine::driver::spare)
//!   sandboxes/ID/   sandbox.json  init.sock  checkpoints/cN.json  logs/PID.log
//! ```
//! A sandbox exists if and only if its `sandbox.json` was renamed into place.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::Error;
use super::tree::CheckpointId;
use crate::deltafs::remove::remove_tree;
use crate::deltafs::sync::sync_dir;
use crate::sandbox::SandboxId;

/// An open store.
#[derive(Debug)]
pub(super) struct Store {
    root: PathBuf,
    tag: String,
    _lock: Flock<File>,
}

impl Store {
    /// Makes the directory where it is missing and takes its lock.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let io = |op| move |source| Error::Io { op, path: root.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io("create the store"))?;
        let root = fs::canonicalize(root).map_err(io("resolve the store"))?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(io("restrict the store"))?;
        let lock = root.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock);
        let file = file.map_err(|source| Error::Io { op: "open", path: lock, source })?;
        let lock = lock_within(file, LOCK_PATIENCE).map_err(|errno| match errno {
            nix::Error::EWOULDBLOCK => Error::Refused {
                what: format!("open the store {}", root.display()),
                why: "another deltabox daemon uses it".to_owned(),
                hint: "use that daemon's socket, or another --store".to_owned(),
            },
            errno => Error::Io { op: "lock the store", path: root.clone(), source: errno.into() },
        })?;
        for dir in ["sandboxes", "bases", "frames", "layers", "spares"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).map_err(|source| Error::Io { op: "create", path: dir, source })?;
        }
        let tag = read_or_make_tag(&root).map_err(|source| Error::Io {
            op: "read the tag of",
            path: root.clone(),
            source,
        })?;
        sync_names(&root).map_err(|source| Error::Io { op: "write to disk", path: root.clone(), source })?;
        Ok(Self { root, tag, _lock: lock })
    }

    /// Names this store's cgroups.
    pub(super) fn tag(&self) -> &str {
        &self.tag
    }

    pub(super) fn bases(&self) -> PathBuf {
        self.root.join("bases")
    }

    pub(super) fn frames(&self) -> PathBuf {
        self.root.join("frames")
    }

    pub(super) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(super) fn spares(&self) -> PathBuf {
        self.root.join("spares")
    }

    pub(super) fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    pub(super) fn sandbox(&self, id: &SandboxId) -> SandboxDir {
        SandboxDir(self.sandboxes().join(id.as_str()))
    }
}

/// How long a lock may still be held by what a killed daemon has left: a child that is about to close it (chosen).
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// flock(2) has no deadline, and nothing else tells of its end.
fn lock_within(mut file: File, patience: Duration) -> nix::Result<Flock<File>> {
    let end = Instant::now() + patience;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((held, nix::Error::EWOULDBLOCK)) if Instant::now() < end => file = held,
            Err((_, errno)) => return Err(errno),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What durable checkpoints stand on: the store itself, after a power failure. Costs nothing where it is on disk.
fn sync_names(root: &Path) -> io::Result<()> {
    sync_dir(root)?;
    root.parent().map_or(Ok(()), sync_dir)
}

fn read_or_make_tag(root: &Path) -> io::Result<String> {
    let path = root.join("tag");
    match fs::read_to_string(&path) {
        Ok(tag) if tag.len() == 16 && tag.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(tag),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "not 16 hex digits")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let tag = random_hex(8)?;
            let staging = root.join(".tag");
            fs::write(&staging, &tag)?;
            // Without it no later engine opens the store.
            File::open(&staging)?.sync_all()?;
            fs::rename(&staging, &path)?;
            Ok(tag)
        }
        Err(error) => Err(error),
    }
}

/// `n_bytes` of randomness in hexadecimal.
pub(super) fn random_hex(n_bytes: usize) -> io::Result<String> {
    let mut bytes = vec![0_u8; n_bytes];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Directories with this prefix had a manifest that could not be read; a human may look, nothing uses them.
pub(super) const DAMAGED: &str = ".damaged-";

/// The directory of one sandbox.
#[derive(Clone, Debug)]
pub(super) struct SandboxDir(PathBuf);

/// Directories with this prefix are on their way out; no sandbox can have such a name.
pub(super) const REMOVING: &str = ".removing-";

impl SandboxDir {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn listener(&self) -> PathBuf {
        self.0.join("init.sock")
    }

    pub(super) fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// What a checkpoint holds of processes.
    pub(super) fn processes(&self, id: CheckpointId) -> PathBuf {
        self.checkpoints().join(format!("{id}.processes"))
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    pub(super) fn log(&self, pid: u32) -> PathBuf {
        self.logs().join(format!("{pid}.log"))
    }

    /// Makes the directory itself and those in it. Fails if it exists.
    pub(super) fn create(&self) -> io::Result<()> {
        fs::create_dir(&self.0)?;
        fs::create_dir(self.checkpoints())?;
        fs::create_dir(self.logs())
    }

    /// Writes the manifest and the names of this directory and its own to disk for good.
    pub(super) fn sync(&self) -> io::Result<()> {
        File::open(self.0.join("sandbox.json"))?.sync_all()?;
        sync_dir(&self.0)?;
        self.0.parent().map_or(Ok(()), sync_dir)
    }

    /// Removes everything: first by a rename, so that a crash in between leaves nothing that looks like a sandbox.
    pub(super) fn remove(&self) -> io::Result<()> {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let doomed = self.0.with_file_name(format!("{REMOVING}{name}"));
        match fs::rename(&self.0, &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // One of an earlier removal that was cut short.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST)) => {
                remove_tree(&doomed)?;
                fs::rename(&self.0, &doomed)?;
            }
            other => other?,
        }
        crate::fault::point("remove.delete")?;
        remove_tree(&doomed)
    }
}
