//! Files without a name: unlinked, or never linked. What of one is held besides its content, and another one like it.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

use crate::deltacr::objects::Permissions;
use crate::sandbox::root::Root;
use crate::sys::fs::{XATTR_MAX_BYTES, get_xattr, list_xattrs, set_times, set_xattr};
use crate::sys::stat::stat;

/// What a file has besides its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attributes {
    permissions: Permissions,
    /// Last access and last change, seconds and nanoseconds.
    times: [(i64, u32); 2],
    /// Names, each ended by a zero byte, and values.
    extended: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    pub(super) fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let look = stat(file)?;
        let (permissions, extended) = (Permissions::of(file)?, read_extended(file)?);
        Ok(Self { permissions, times: [look.atime, look.mtime], extended })
    }

    /// After the content: writing changes times.
    pub(super) fn set(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        for (name, value) in &self.extended {
            set_xattr(file, CStr::from_bytes_with_nul(name).map_err(io::Error::other)?, value)?;
        }
        self.permissions.set(file)?;
        set_times(file, self.times[0], self.times[1])
    }
}

fn read_extended(file: BorrowedFd<'_>) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; XATTR_MAX_BYTES];
    let n = match list_xattrs(file, &mut names) {
        Ok(0) => return Ok(Vec::new()),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut value = vec![0; XATTR_MAX_BYTES];
    let read = |name: &[u8]| {
        let n = get_xattr(file, CStr::from_bytes_with_nul(name).map_err(io::Error::other)?, &mut value)?;
        Ok((name.to_vec(), value[..n].to_vec()))
    };
    names[..n].split_inclusive(|byte| *byte == 0).map(read).collect()
}

/// Whether something is a file of a tree, of the present one or one that was left; shared memory is a file too.
pub(in crate::deltacr) fn is_on_overlay(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fstatfs(file)?.filesystem_type() == OVERLAYFS_SUPER_MAGIC)
}

/// A new file without a name in the tree.
pub(super) fn make_nameless(to: &Root) -> io::Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(to.as_fd(), c".", flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
}
