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

/// What getsockopt(2) tells of an option of `SOL_SOCKET`, in at most 16 bytes.
pub fn option(socket: BorrowedFd<'_>, name: libc::c_int) -> io::Result<Vec<u8>> {
    let mut value = [0_u8; 16];
    let mut len: libc::socklen_t = 16;
    let (at, len_at) = (value.as_mut_ptr().cast(), &raw mut len);
    // SAFETY: `value` has room for `len` bytes, and both live through the call.
    super::check(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, at, len_at) }.into())?;
    Ok(value[..usize::try_from(len).map_err(io::Error::other)?.min(16)].to_vec())
}

/// Sets an option of `SOL_SOCKET`, to bytes as [`option`] tells them.
pub fn set_option(socket: BorrowedFd<'_>, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    let len = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `len` bytes of `value`, which lives through the call.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, value.as_ptr().cast(), len) };
    super::check(set.into()).map(drop)
}
