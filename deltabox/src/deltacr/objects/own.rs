//! The engine's own copy of a descriptor: what the kernel tells of it, and the same opened once more.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchownat};
use serde::{Deserialize, Serialize};

use crate::sys::fs::chmod;
use crate::sys::stat::{Stat, stat};

/// What a description was opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// O_RDONLY.
    Read,
    /// O_WRONLY.
    Write,
    /// O_RDWR.
    Both,
}

impl Access {
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(match fcntl(fd, FcntlArg::F_GETFL)? & libc::O_ACCMODE {
            libc::O_RDONLY => Self::Read,
            libc::O_WRONLY => Self::Write,
            _ => Self::Both,
        })
    }

    pub(super) fn flag(self) -> OFlag {
        match self {
            Self::Read => OFlag::O_RDONLY,
            Self::Write => OFlag::O_WRONLY,
            Self::Both => OFlag::O_RDWR,
        }
    }

    pub(super) fn reads(self) -> bool {
        self != Self::Write
    }

    pub(super) fn writes(self) -> bool {
        self != Self::Read
    }
}

/// Owner and permissions of what has no name: they decide who may open it once more through `/proc/self/fd`, as
/// `> /dev/stderr` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::deltacr) struct Permissions {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Permissions {
    pub(in crate::deltacr) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        stat(fd).map(|look| Self::told(&look))
    }

    /// As stat tells them.
    pub(in crate::deltacr) fn told(look: &Stat) -> Self {
        Self { uid: look.uid, gid: look.gid, mode: look.mode & 0o7777 }
    }

    pub(in crate::deltacr) fn set(self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let present = Self::of(fd)?;
        if (present.uid, present.gid) != (self.uid, self.gid) {
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
            fchownat(fd, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
        }
        // A change of owner takes bits away.
        if Self::of(fd)?.mode != self.mode {
            chmod(fd, self.mode)?;
        }
        Ok(())
    }
}

/// fdinfo of a descriptor of this process.
pub fn own_fdinfo(fd: BorrowedFd<'_>) -> io::Result<String> {
    let path = format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd());
    let file = nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let (mut text, mut buffer) = (Vec::new(), [0; 1024]);
    loop {
        let n = nix::unistd::read(&file, &mut buffer)?;
        text.extend_from_slice(&buffer[..n]);
        // The kernel writes as many whole lines as there is room for.
        if n == 0 || text.len() < buffer.len() / 2 {
            return String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into());
        }
    }
}

/// Opens what a descriptor leads to once more: another description, with a position of its own.
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> io::Result<OwnedFd> {
    let link = format!("/proc/thread-self/fd/{}", fd.as_raw_fd());
    Ok(nix::fcntl::open(link.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// What stands behind `key:` in fdinfo.
pub(super) fn field<'a>(fdinfo: &'a str, key: &str) -> Option<&'a str> {
    fdinfo.lines().find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim()))
}

/// The kernel said something else than kernels do.
pub(super) fn unknown(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("no {what} in fdinfo"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "pos:\t0\nflags:\t02\neventfd-count:               1f\nPid:\t-1\nNSpid:\t5\t6\n";
        assert_eq!(field(text, "eventfd-count"), Some("1f"));
        assert_eq!(field(text, "NSpid"), Some("5\t6"));
        assert_eq!(field(text, "pid"), None);
        assert_eq!(field(text, "eventfd"), None);
    }

    #[test]
    fn what_is_opened_once_more_has_a_position_of_its_own() {
        use nix::unistd::{Whence, lseek};
        let file = tempfile::tempfile().unwrap();
        lseek(&file, 7, Whence::SeekSet).unwrap();
        let other = reopen(file.as_fd(), OFlag::O_RDONLY).unwrap();
        lseek(&other, 3, Whence::SeekSet).unwrap();
        assert!(own_fdinfo(file.as_fd()).unwrap().contains("pos:\t7\n"));
        assert!(own_fdinfo(other.as_fd()).unwrap().contains("pos:\t3\n"));
    }
}
