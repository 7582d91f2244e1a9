//! What an entry of a view is, as a program inside the sandbox would see it.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::{FileStat, fstat};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Part;
use super::place;
use crate::sandbox::idmap::{HOST_ID_BASE, N_IDS};
use crate::sys::fs::{XATTR_MAX_BYTES, list_xattrs};
use crate::sys::handle::{Handle, identity_at};

/// Whom an id belongs to that the sandbox does not have (the kernel's `overflowuid`).
const NOBODY: u32 = 65_534;

/// Which kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A name of a Unix socket.
    Socket,
    /// A character device node.
    CharDevice,
    /// A block device node.
    BlockDevice,
}

impl Kind {
    /// Of the type bits of a mode.
    pub(in crate::deltafs) fn of(mode: u32) -> Self {
        match mode & libc::S_IFMT {
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFBLK => Self::BlockDevice,
            _ => Self::File,
        }
    }
}

/// An entry of a view, opened (`O_PATH`).
#[derive(Debug)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner, as the inside counts.
    pub uid: u32,
    /// Group, as the inside counts.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Last change of content, seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Which device a device node stands for.
    pub rdev: u64,
    /// Number of the layer it was taken from, from 0 at the top.
    pub layer: usize,
    /// Device and inode number: entries that are one file have the same.
    pub identity: (u64, u64),
    fd: OwnedFd,
}

impl Entry {
    pub(super) fn open(layer: BorrowedFd<'_>, part: &Part) -> io::Result<Self> {
        let fd = place::open(layer, &part.path, OFlag::O_PATH)?;
        let stat: FileStat = fstat(&fd)?;
        Ok(Self {
            kind: Kind::of(stat.st_mode),
            mode: stat.st_mode & 0o7777,
            uid: inside(stat.st_uid),
            gid: inside(stat.st_gid),
            size: stat.st_size.try_into().unwrap_or(0),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            rdev: stat.st_rdev,
            layer: part.layer,
            identity: (stat.st_dev, stat.st_ino),
            fd,
        })
    }

    /// The descriptor, good for its metadata.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where a symbolic link leads; `None` for other kinds.
    pub fn target(&self) -> io::Result<Option<OsString>> {
        match self.kind {
            Kind::Symlink => Ok(Some(readlinkat(&self.fd, c"")?)),
            _ => Ok(None),
        }
    }

    /// The content of a regular file; an error for other kinds, which must not be opened.
    pub fn content(&self) -> io::Result<File> {
        if self.kind != Kind::File {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Through the descriptor, so that it is the very file that was looked at.
        File::open(format!("/proc/thread-self/fd/{}", self.fd.as_raw_fd()))
    }

    /// Attributes that a program in the sandbox can see.
    pub fn xattrs(&self) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        let all = read_xattrs(self.fd.as_fd())?;
        Ok(all.into_iter().filter(|(name, _)| !name.as_encoded_bytes().starts_with(b"trusted.")).collect())
    }

    /// What the kernel would call it in `trusted.overlay.origin` of a copy; `None` where the file system has no handles.
    pub(in crate::deltafs) fn handle(&self) -> Option<Handle> {
        identity_at(self.fd.as_fd(), c"").ok()
    }
}

/// The id inside of a sandbox.
pub(in crate::deltafs) fn inside(id: u32) -> u32 {
    id.checked_sub(HOST_ID_BASE).filter(|id| *id < N_IDS).unwrap_or(NOBODY)
}

/// All attributes of a file.
pub(in crate::deltafs) fn read_xattrs(fd: BorrowedFd<'_>) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    use std::os::unix::ffi::OsStringExt;
    let mut few = [0; 1024];
    let mut many;
    let names = match list_xattrs(fd, &mut few) {
        Ok(n) => &few[..n],
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => &[],
            Some(libc::ERANGE) => {
                many = vec![0; XATTR_MAX_BYTES];
                let n = list_xattrs(fd, &mut many)?;
                &many[..n]
            }
            _ => return Err(error),
        },
    };
    let mut xattrs = BTreeMap::new();
    for name in names.split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        if let Some(value) = place::read_xattr(fd, name)? {
            xattrs.insert(OsString::from_vec(name.to_bytes().to_vec()), value);
        }
    }
    Ok(xattrs)
}
