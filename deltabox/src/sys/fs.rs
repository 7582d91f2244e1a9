//! Files: reflinks and extended attributes by descriptor.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// Makes all of `to` share the blocks of `from` (copy on write). EOPNOTSUPP where the filesystem cannot.
pub fn ficlone(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is a descriptor number, no pointer.
    check(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) }.into()).map(drop)
}

/// Sets the extended attribute `name` of the file behind `file` (a real descriptor, not O_PATH).
pub fn fsetxattr(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: `name` is a C string, `value` as long as told, both for the whole call.
    check(unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) }.into())
        .map(drop)
}
