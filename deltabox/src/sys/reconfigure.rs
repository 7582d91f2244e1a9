//! Changing a superblock that is mounted: fspick(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{check, check_fd};

/// Reconfigures the file system that `root` is the root directory of, to what it is already. What that does: the kernel
/// drops every cached name that nobody uses, and with them the inodes (reconfigure_super in fs/super.c).
pub fn drop_caches_of(root: BorrowedFd<'_>) -> io::Result<()> {
    const FSPICK_CLOEXEC: libc::c_uint = 1;
    const FSPICK_EMPTY_PATH: libc::c_uint = 8;
    const FSCONFIG_CMD_RECONFIGURE: libc::c_uint = 7;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: the empty path is a C string for the whole call.
    let picked = check_fd(unsafe {
        libc::syscall(libc::SYS_fspick, root.as_raw_fd(), c"".as_ptr(), FSPICK_CLOEXEC | FSPICK_EMPTY_PATH)
    })?;
    // SAFETY: this command takes neither key nor value.
    let done =
        unsafe { libc::syscall(libc::SYS_fsconfig, picked.as_raw_fd(), FSCONFIG_CMD_RECONFIGURE, null, null, 0) };
    check(done).map(drop)
}
