//! A layer on disk: `LAYER/upper`, which overlayfs fills, and `LAYER/work`, which is overlayfs's own.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::overlay::Top;
use crate::sandbox::idmap::HOST_ID_BASE;

/// A layer that can be mounted as the top of a stack.
#[derive(Debug)]
pub struct LiveLayer {
    upper: OwnedFd,
    work: OwnedFd,
}

impl LiveLayer {
    /// Makes an empty layer in `dir`, which must not exist. Its root belongs to the sandbox's root.
    pub fn create(dir: &Path) -> io::Result<Self> {
        crate::fault::point("create.layer")?;
        fs::create_dir(dir)?;
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::chown(&upper, Some(HOST_ID_BASE), Some(HOST_ID_BASE))?;
        Ok(Self { upper: open_dir(&upper)?, work: open_dir(&work)? })
    }

    /// For [`super::overlay::mount_stack`].
    pub fn top(&self) -> Top<'_> {
        Top { upper: self.upper.as_fd(), work: self.work.as_fd() }
    }
}

/// A descriptor that names a directory and nothing more.
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}
