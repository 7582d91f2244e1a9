//! One sandbox as the kernel sees it: namespaces, cgroup, limits, system call filter, init.
//!
//! Owns how a sandbox comes to life around a root file system that it is given, how commands are
//! started in it, and how it ends. Does not know layers, checkpoints, or the store.

pub mod backstage;
pub mod cgroup;
pub mod cover;
pub mod filter;
pub mod idmap;
pub mod link;
pub mod reserve;
pub mod root;
pub mod spawn;
pub mod spec;

pub use spec::{BaseRef, Limits, Net, PoolBounds, SandboxId, SandboxSpec};

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

/// Connects to the init that listens at `path`.
pub fn connect_at(path: &Path) -> io::Result<UnixStream> {
    let (_dir, short) = short_path(path)?;
    UnixStream::connect(short)
}

/// A listening socket at `path`, in place of what is there.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_dir, short) = short_path(path)?;
    UnixListener::bind(short)
}

/// A name for `path` that fits a socket address (107 bytes), valid as long as the directory is held open.
fn short_path(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let dir = nix::fcntl::open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, short))
}

/// A read-only copy of the host's `/sys` without what is mounted below it: inside the host's network namespace a
/// sandbox cannot mount its own.
fn host_sys() -> io::Result<OwnedFd> {
    use crate::sys::mount::{self, Clone, attr};
    use std::os::fd::AsFd;
    let sys = nix::fcntl::open("/sys", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let copy = mount::open_tree_clone(sys.as_fd(), c"", Clone::One)?;
    let attrs = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
    mount::mount_setattr(copy.as_fd(), attrs, 0, None, Clone::One)?;
    Ok(copy)
}
