//! Opening again what was open before.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::sandbox::root::Root;
use crate::sys::fs::set_times;
use crate::sys::stat::stat;

/// Flags that mattered when the file was opened, and not after. `O_TMPFILE` includes `O_DIRECTORY`.
pub(super) const OPENING: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY;

/// Opens what a descriptor leads to once more.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> io::Result<OwnedFd> {
    let link = format!("/proc/thread-self/fd/{}", fd.as_raw_fd());
    let flags = flags.difference(OFlag::O_NOFOLLOW) | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(link.as_str(), flags, Mode::empty())?)
}

/// A directory that was removed: what a program is in whose directory the next root does not have.
pub(super) fn make_gone(to: &Root) -> io::Result<OwnedFd> {
    const NAME: &std::ffi::CStr = c".deltabox-gone";
    let before = stat(to.as_fd())?;
    nix::sys::stat::mkdirat(to, NAME, Mode::S_IRWXU)?;
    let opened = to.open(&CString::from(NAME), OFlag::O_PATH | OFlag::O_DIRECTORY);
    // fchdir asks whether the process may.
    let allowed = opened.as_ref().map(|gone| crate::sys::fs::chmod(gone.as_fd(), 0o755));
    unlinkat(to, NAME, UnlinkatFlags::RemoveDir)?;
    set_times(to.as_fd(), before.atime, before.mtime)?;
    allowed.unwrap_or(Ok(()))?;
    Ok(opened?)
}
