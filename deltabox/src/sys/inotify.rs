//! inotify watches by number and descriptor (nix's are opaque and by path).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// Watches what `file` leads to (it may be `O_PATH`); the number of the watch.
pub fn add_watch(instance: BorrowedFd<'_>, file: BorrowedFd<'_>, mask: u32) -> io::Result<i32> {
    let link = CString::new(format!("/proc/thread-self/fd/{}", file.as_raw_fd())).map_err(io::Error::other)?;
    // SAFETY: `link` is a C string for the whole call.
    let number = check(unsafe { libc::inotify_add_watch(instance.as_raw_fd(), link.as_ptr(), mask) }.into())?;
    i32::try_from(number).map_err(io::Error::other)
}

/// Ends a watch; its reader gets `IN_IGNORED`.
pub fn remove_watch(instance: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::inotify_rm_watch(instance.as_raw_fd(), number) }.into()).map(drop)
}
