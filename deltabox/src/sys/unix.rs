//! Unix sockets beyond what nix offers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The file that is the name of a Unix socket (an `O_PATH` descriptor); `None` if it has no such name.
pub fn name_of(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: this ioctl takes no argument.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE, 0) };
    if fd >= 0 {
        // SAFETY: the kernel just made this descriptor for us and nobody else knows its number.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }));
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTTY)) => Ok(None),
        error => Err(error),
    }
}
