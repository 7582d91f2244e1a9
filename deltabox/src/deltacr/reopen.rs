//! Opening again what was open before.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};
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
    let gone = make_and_remove(to, UnlinkatFlags::RemoveDir, |name| Ok(mkdirat(to, name, Mode::S_IRWXU)?))?;
    // fchdir asks whether the process may.
    crate::sys::fs::chmod(gone.as_fd(), 0o755)?;
    Ok(gone)
}

/// A FIFO without a name.
pub(super) fn make_nameless_fifo(to: &Root) -> io::Result<OwnedFd> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    make_and_remove(to, UnlinkatFlags::NoRemoveDir, |name| Ok(mknodat(to, name, SFlag::S_IFIFO, mode, 0)?))
}

/// Has something made under a name in the root directory, and takes the name away.
fn make_and_remove(to: &Root, how: UnlinkatFlags, make: impl FnOnce(&CStr) -> io::Result<()>) -> io::Result<OwnedFd> {
    const NAME: &CStr = c".deltabox-gone";
    let before = stat(to.as_fd())?;
    make(NAME)?;
    let opened = to.open(&CString::from(NAME), OFlag::O_PATH | OFlag::O_NOFOLLOW);
    unlinkat(to, NAME, how)?;
    set_times(to.as_fd(), before.atime, before.mtime)?;
    Ok(opened?)
}
