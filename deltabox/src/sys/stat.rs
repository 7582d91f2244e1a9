//! statx(2): what a file is, and which mount it was reached through.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// A file as statx tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Number of the mount, as in `mnt_id` of fdinfo. Free for another once that mount is gone.
    pub mount: u64,
    /// Device, major and minor.
    pub dev: (u32, u32),
    /// Inode number.
    pub ino: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Names it has.
    pub n_links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Last access, seconds and nanoseconds.
    pub atime: (i64, u32),
    /// Last change of content.
    pub mtime: (i64, u32),
    /// Last change of anything.
    pub ctime: (i64, u32),
}

impl Stat {
    /// The bits of the type (`S_IFREG`, ...).
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// Device and inode number: the same file of a mounted file system.
    pub fn identity(&self) -> ((u32, u32), u64) {
        (self.dev, self.ino)
    }
}

/// What `path`, relative to `dir` (empty for `dir` itself), is. Symbolic links are followed, magic ones too.
pub fn stat_at(dir: BorrowedFd<'_>, path: &CStr) -> io::Result<Stat> {
    const STATX_MNT_ID: u32 = 0x1000;
    let mut buf = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_BASIC_STATS | STATX_MNT_ID;
    // SAFETY: `path` is a C string and `buf` room for one statx, both for the whole call.
    check(unsafe { libc::statx(dir.as_raw_fd(), path.as_ptr(), libc::AT_EMPTY_PATH, mask, buf.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed is a valid statx, and the call has filled it.
    let buf = unsafe { buf.assume_init() };
    let time = |time: libc::statx_timestamp| (time.tv_sec, time.tv_nsec);
    Ok(Stat {
        mount: buf.stx_mnt_id,
        dev: (buf.stx_dev_major, buf.stx_dev_minor),
        ino: buf.stx_ino,
        mode: buf.stx_mode.into(),
        n_links: buf.stx_nlink,
        uid: buf.stx_uid,
        gid: buf.stx_gid,
        size: buf.stx_size,
        atime: time(buf.stx_atime),
        mtime: time(buf.stx_mtime),
        ctime: time(buf.stx_ctime),
    })
}

/// What a descriptor leads to.
pub fn stat(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_at(fd, c"")
}

/// What an absolute path leads to.
pub fn stat_path(path: &CStr) -> io::Result<Stat> {
    // SAFETY: AT_FDCWD is not a descriptor that could be closed, and statx takes it.
    stat_at(unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }, path)
}
