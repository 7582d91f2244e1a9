//! Descriptors that tell of something, where nix does not let one say all: signalfd, epoll's targets, what can be read.

use std::cmp::Ordering;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{check, check_fd};

/// A descriptor from which signals of `mask` are read (bit n - 1 for signal n).
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    const MASK_BYTES: usize = 8;
    // SAFETY: reads 8 bytes of a mask, which lives through the call.
    check_fd(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, MASK_BYTES, libc::SFD_CLOEXEC) })
}

/// Bytes that can be read.
pub fn n_readable(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: writes one int, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) }.into())?;
    usize::try_from(n).map_err(io::Error::other)
}

/// Bytes that a socket has sent and that are not read yet, with the kernel's overhead (TIOCOUTQ).
pub fn n_unsent(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: writes one int, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) }.into())?;
    usize::try_from(n).map_err(io::Error::other)
}

/// Where an epoll instance has a target.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EpollSlot {
    /// The instance's number in the process.
    pub instance: u32,
    /// The number under which it was added.
    pub target: u32,
    /// How many targets with that number come before it.
    pub nth: u32,
}

/// Compares descriptor `number` of `task` with what an epoll instance of `holder` waits for (kcmp(2)).
///
/// # Errors
/// `EBADF`: the task has no such descriptor. `ENOENT`: the instance has no such target.
pub fn compare_target(task: libc::pid_t, number: i32, holder: libc::pid_t, slot: EpollSlot) -> io::Result<Ordering> {
    const KCMP_EPOLL_TFD: libc::c_int = 7;
    // SAFETY: reads one kcmp_epoll_slot, which lives through the call.
    let found =
        unsafe { libc::syscall(libc::SYS_kcmp, task, holder, KCMP_EPOLL_TFD, i64::from(number), &raw const slot) };
    match check(found)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        _ => Ok(Ordering::Greater),
    }
}
