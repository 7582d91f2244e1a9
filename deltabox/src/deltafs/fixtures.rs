//! What every sandbox needs and no base can be trusted to have: `/dev`, and the directories that mounts sit on.
//!
//! One tmpfs per engine, made outside of any sandbox (inside, mknod is refused), shared read-only by all:
//! ```text
//! dev/       null zero full random urandom tty  pts/ mqueue/ .deltabox/old/  ptmx fd stdin stdout stderr shm   -> /dev
//! skeleton/  dev/ proc/ sys/ tmp/ run/shm/ var/tmp/                                             -> topmost lower layer
//! ```
//! `/dev/shm` leads to `/run/shm`, which lies in the layers: what is written there is rolled back too.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::layer::open_dir;
use crate::sandbox::idmap::HOST_ID_BASE;
use crate::sys::mount::{self, Clone, attr};

/// Name, major and minor number of the device nodes (Documentation/admin-guide/devices.txt).
const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const DEV_LINKS: [(&str, &str); 6] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("shm", "/run/shm"),
];

/// Directories of the skeleton with their modes.
const SKELETON: [(&str, u32); 8] = [
    ("dev", 0o755),
    ("proc", 0o555),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("run", 0o755),
    ("run/shm", 0o1777),
    ("var", 0o755),
    ("var/tmp", 0o1777),
];

/// The engine's tmpfs with what all sandboxes share.
#[derive(Debug)]
pub struct Fixtures {
    mount: OwnedFd,
    skeleton: OwnedFd,
}

impl Fixtures {
    /// Makes them. Needs root in the initial user namespace.
    pub fn make() -> io::Result<Self> {
        let mount = mount_tmpfs(attr::NOSUID | attr::NOEXEC)?;
        let root = path_of(&mount);
        make_dev(&root.join("dev"))?;
        let skeleton = root.join("skeleton");
        make_dir(&skeleton, 0o755)?;
        for (name, mode) in SKELETON {
            make_dir(&skeleton.join(name), mode)?;
        }
        let skeleton = open_dir(&skeleton)?;
        Ok(Self { mount, skeleton })
    }

    /// A mount of `/dev` for one sandbox: read-only, its nodes usable.
    pub fn dev(&self) -> io::Result<OwnedFd> {
        let dev = mount::open_tree_clone(self.mount.as_fd(), c"dev", Clone::One)?;
        mount::mount_setattr(dev.as_fd(), attr::RDONLY, 0, None, Clone::One)?;
        Ok(dev)
    }

    /// The layer to put right above the base.
    pub fn skeleton(&self) -> &OwnedFd {
        &self.skeleton
    }
}

/// A fresh detached tmpfs.
pub(super) fn mount_tmpfs(attrs: u64) -> io::Result<OwnedFd> {
    let fs = mount::fsopen(c"tmpfs")?;
    mount::fsconfig_string(fs.as_fd(), c"mode", c"755")?;
    mount::fsconfig_create(fs.as_fd())?;
    mount::fsmount(fs.as_fd(), attrs)
}

/// A path into a detached mount, valid while the descriptor is open.
pub(super) fn path_of(mount: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()))
}

/// A directory of the sandbox's root with exactly this mode.
pub(super) fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    chown(path, Some(HOST_ID_BASE), Some(HOST_ID_BASE))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Where the root that is being left waits to be dropped ([`crate::sandbox::root::LANDING`]). The host's root owns the directory around
/// it, and for a sandbox's root that is nobody: it cannot get in.
fn make_landing(dev: &Path) -> io::Result<()> {
    let around = dev.join(".deltabox");
    fs::create_dir(&around)?;
    fs::create_dir(around.join("old"))?;
    fs::set_permissions(&around, fs::Permissions::from_mode(0o700))
}

fn make_dev(dev: &Path) -> io::Result<()> {
    make_dir(dev, 0o755)?;
    for (name, major, minor) in NODES {
        let path = dev.join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(major, minor))?;
        chown(&path, Some(HOST_ID_BASE), Some(HOST_ID_BASE))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    }
    for (name, target) in DEV_LINKS {
        symlink(target, dev.join(name))?;
    }
    make_landing(dev)?;
    make_dir(&dev.join("pts"), 0o755)?;
    make_dir(&dev.join("mqueue"), 0o755)
}
