//! Who is sent a signal when a descriptor can be read or written (fcntl(2), "Managing signals").

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

// From the kernel (include/uapi/asm-generic/fcntl.h); the C library has them under _GNU_SOURCE only.
const F_SETSIG: libc::c_int = 10;
const F_GETSIG: libc::c_int = 11;
/// The number of fcntl's `F_SETOWN_EX`, for who has it called by another process.
pub const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;

/// The kernel's `struct f_owner_ex`: what kind of number (`F_OWNER_*`), and the number, 0 for nobody.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawOwner {
    /// 0: a thread; 1: a process; 2: a process group.
    pub kind: i32,
    /// In the caller's numbers.
    pub number: i32,
}

/// Who is sent the signal.
pub fn owner(fd: BorrowedFd<'_>) -> io::Result<RawOwner> {
    let mut owner = RawOwner::default();
    // SAFETY: writes one f_owner_ex, which lives through the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) }.into())?;
    Ok(owner)
}

/// Sets who is sent the signal; the caller's user is remembered as the one who wants that.
pub fn set_owner(fd: BorrowedFd<'_>, owner: RawOwner) -> io::Result<()> {
    // SAFETY: reads one f_owner_ex, which lives through the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) }.into()).map(drop)
}

/// Which signal; 0 for SIGIO without further words.
pub fn signal(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: no pointers.
    let signal = check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }.into())?;
    i32::try_from(signal).map_err(io::Error::other)
}

/// Sets which signal.
pub fn set_signal(fd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) }.into()).map(drop)
}
