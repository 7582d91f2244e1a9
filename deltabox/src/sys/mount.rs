//! The new mount API by descriptors: fsopen, fsconfig, fsmount, open_tree, move_mount, mount_setattr, pivot. Also compiled into init.

use std::ffi::CStr;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{check, check_fd};

/// `MOUNT_ATTR_*` flags of a mount.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// Set-user-id bits have no effect.
    pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// Device nodes cannot be opened.
    pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
}

/// Begins the configuration of a file system of type `fstype`.
pub fn fsopen(fstype: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `fstype` is a valid C string for the whole call.
    check_fd(unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), libc::FSOPEN_CLOEXEC) })
}

const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_SET_FD: libc::c_uint = 5;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

fn fsconfig(
    fs: BorrowedFd<'_>,
    cmd: libc::c_uint,
    key: *const libc::c_char,
    value: *const libc::c_char,
    aux: i32,
) -> io::Result<()> {
    // SAFETY: callers pass C strings that live through the call, or null where the command takes none.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), cmd, key, value, aux) }).map(drop)
}

/// Sets a flag such as `volatile`.
pub fn fsconfig_flag(fs: BorrowedFd<'_>, key: &CStr) -> io::Result<()> {
    fsconfig(fs, FSCONFIG_SET_FLAG, key.as_ptr(), std::ptr::null(), 0)
}

/// Sets a string value (at most 255 bytes, the kernel's limit).
pub fn fsconfig_string(fs: BorrowedFd<'_>, key: &CStr, value: &CStr) -> io::Result<()> {
    fsconfig(fs, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr(), 0)
}

/// Sets a descriptor as value, such as overlayfs's `lowerdir+` (since Linux 6.13).
pub fn fsconfig_fd(fs: BorrowedFd<'_>, key: &CStr, value: BorrowedFd<'_>) -> io::Result<()> {
    fsconfig(fs, FSCONFIG_SET_FD, key.as_ptr(), std::ptr::null(), value.as_raw_fd())
}

/// Makes the superblock.
pub fn fsconfig_create(fs: BorrowedFd<'_>) -> io::Result<()> {
    fsconfig(fs, FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null(), 0)
}

/// A detached mount of the configured superblock; `attrs` from [`attr`].
pub fn fsmount(fs: BorrowedFd<'_>, attrs: u64) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attrs) })
}

/// The messages that the kernel attached to a failed configuration, joined by `; `. Empty if there are none.
pub fn fs_log(fs: BorrowedFd<'_>) -> String {
    let mut lines = Vec::new();
    let mut buf = [0_u8; 1024];
    let Ok(mut log) = fs.try_clone_to_owned().map(std::fs::File::from) else {
        return String::new();
    };
    while let Ok(n @ 1..) = log.read(&mut buf) {
        lines.push(String::from_utf8_lossy(&buf[..n]).trim_end().to_owned());
    }
    lines.join("; ")
}

/// What [`open_tree_clone`] copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clone {
    /// The one mount at the path.
    One,
    /// The mount and everything mounted below.
    Recursive,
}

/// A detached copy of the mount at `dir`/`path` (`path` may be empty for `dir` itself).
pub fn open_tree_clone(dir: BorrowedFd<'_>, path: &CStr, what: Clone) -> io::Result<OwnedFd> {
    let recursive = match what {
        Clone::One => 0,
        Clone::Recursive => libc::AT_RECURSIVE.cast_unsigned(),
    };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned() | recursive;
    // SAFETY: `path` is a valid C string for the whole call.
    check_fd(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches the mount `from` at `dir`/`path` (`path` may be empty for `dir` itself).
pub fn move_mount(from: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &CStr) -> io::Result<()> {
    const F_EMPTY_PATH: libc::c_uint = 0x4;
    const T_EMPTY_PATH: libc::c_uint = 0x40;
    // SAFETY: both paths are valid C strings for the whole call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            from.as_raw_fd(),
            c"".as_ptr(),
            dir.as_raw_fd(),
            path.as_ptr(),
            F_EMPTY_PATH | T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes a mount: sets and clears `attrs`; with `idmap` maps it through that user namespace.
pub fn mount_setattr(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    idmap: Option<BorrowedFd<'_>>,
    what: Clone,
) -> io::Result<()> {
    let mut attr = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    if let Some(user_ns) = idmap {
        attr.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attr.userns_fd = u64::from(user_ns.as_raw_fd().cast_unsigned());
    }
    let recursive = if what == Clone::Recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` is a valid mount_attr and its true size is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}
