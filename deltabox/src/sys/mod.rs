//! The only unsafe code of the library: one safe function per kernel call, no policy.
//!
//! Every function returns `io::Result` with the kernel's own error number and takes and gives owned
//! or borrowed descriptors. What nix or std offer safely is not wrapped again here.
#![expect(unsafe_code, reason = "system calls without a safe wrapper in std or nix; tidy keeps them in this directory")]

pub mod blob;
pub mod bpf;
pub mod fs;
pub mod handle;
pub mod inotify;
pub mod maps;
pub mod memory;
pub mod mount;
pub mod notify;
pub mod owner;
pub mod process;
pub mod ptrace;
pub mod reconfigure;
pub mod schedule;
pub mod seccomp;
pub mod socket;
pub mod stat;
pub mod steps;
pub mod timer;
pub mod tty;
pub mod unix;

use std::io;

/// The result of a raw system call as `io::Result`.
fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A raw system call that returns a new descriptor.
fn check_fd(ret: libc::c_long) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    let fd = check(ret)?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}
