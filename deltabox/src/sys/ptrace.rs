//! Looking into other processes: what nix's ptrace lacks, copies of their descriptors, comparison of those.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{check, check_fd};

/// Where a thread's restartable-sequence area lies (the kernel's `struct ptrace_rseq_configuration`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address, 0 if the thread registered none.
    pub address: u64,
    /// Its size.
    pub size_bytes: u32,
    /// The signature before every abort handler.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}

/// The restartable-sequence registration of `thread`, a tracee of this OS thread that is stopped (since Linux 5.13).
pub fn get_rseq_configuration(thread: libc::pid_t) -> io::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    // SAFETY: the kernel writes at most the size told into `configuration`.
    check(unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            libc::PTRACE_GET_RSEQ_CONFIGURATION,
            thread,
            size_of::<RseqConfiguration>(),
            &raw mut configuration,
        )
    })?;
    Ok(configuration)
}

/// A copy of descriptor `number` of the process behind `pidfd`.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// Whether descriptor `a.1` of process `a.0` and `b.1` of `b.0` share one open file description.
pub fn same_description(a: (libc::pid_t, RawFd), b: (libc::pid_t, RawFd)) -> io::Result<bool> {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: no pointers.
    let order = check(unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, a.1, b.1) })?;
    Ok(order == 0)
}
