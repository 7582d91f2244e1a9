//! File system calls that std and nix do not have.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;

/// Sets an extended attribute of what `path` names, not following a symbolic link.
pub fn set_xattr(path: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both C strings and the value live through the call, and the value's true length is passed.
    check(unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) }.into())
        .map(drop)
}

/// An extended attribute of at most 4096 bytes, not following a symbolic link. `None` if it is not set.
pub fn get_xattr(path: &Path, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut value = vec![0_u8; 4096];
    // SAFETY: the buffer's true length is passed; the strings live through the call.
    let n = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match usize::try_from(n) {
        Ok(n) => {
            value.truncate(n);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
            error => Err(error),
        },
    }
}

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
