//! A file of a layer, copied with all that belongs to it.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mknodat};
use nix::unistd::{Gid, Uid, Whence, fchownat, linkat, lseek64, symlinkat};

use crate::deltafs::origins::{Origins, encode_source, source};
use crate::deltafs::view::entry::read_xattrs;
use crate::deltafs::view::{Entry, Kind, place};
use crate::sys::fs::{chmod, ficlone, set_times, set_xattr};

/// Chosen: large enough that calls cost nothing beside copying.
const CHUNK_BYTES: usize = 1 << 20;
/// Attributes of overlayfs itself: what they say of the source need not be true of the copy.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// Attributes that a program in a nested overlay has set: overlayfs keeps them under this name.
const ESCAPED: &[u8] = b"trusted.overlay.overlay.";

/// Copies files of layers, each at most once.
pub(super) struct Copier<'a> {
    into: BorrowedFd<'a>,
    origins: Origins,
    /// Where the copy of a file with several names is.
    copies: BTreeMap<(u64, u64), PathBuf>,
    cancel: &'a AtomicBool,
}

/// How much work it was.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Copied {
    pub(super) bytes: u64,
    pub(super) is_shared: bool,
}

impl<'a> Copier<'a> {
    pub(super) fn new(into: BorrowedFd<'a>, origins: Origins, cancel: &'a AtomicBool) -> Self {
        Self { into, origins, copies: BTreeMap::new(), cancel }
    }

    /// Copies anything but a directory to `name` in `out`, which is at `path` of the merged layer.
    pub(super) fn copy(&mut self, entry: &Entry, out: BorrowedFd<'_>, name: &OsStr, path: &Path) -> io::Result<Copied> {
        let stat = fstat(entry.fd())?;
        if stat.st_nlink > 1 {
            if let Some(copy) = self.copies.get(&entry.identity) {
                let copy = place::open(self.into, copy, OFlag::O_PATH)?;
                linkat(&copy, c"", out, name, AtFlags::AT_EMPTY_PATH)?;
                return Ok(Copied::default());
            }
            self.copies.insert(entry.identity, path.to_owned());
        }
        let mut copied = Copied::default();
        match entry.kind {
            Kind::File => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let to = File::from(openat(out, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
                copied = copy_content(entry, &stat, &to, self.cancel)?;
                self.attributes(entry, to.as_fd())?;
                return Ok(copied);
            }
            Kind::Symlink => symlinkat(entry.target()?.unwrap_or_default().as_os_str(), out, name)?,
            Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => {
                let kind = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT);
                mknodat(out, name, kind, Mode::S_IRUSR, stat.st_rdev)?;
            }
            Kind::Directory => return Err(io::ErrorKind::IsADirectory.into()),
        }
        let made = place::open(out, Path::new(name), OFlag::O_PATH)?;
        self.attributes(entry, made.as_fd())?;
        Ok(copied)
    }

    /// Gives `to` the owner, attributes, permissions and times of `entry`.
    pub(super) fn attributes(&self, entry: &Entry, to: BorrowedFd<'_>) -> io::Result<()> {
        let stat = fstat(entry.fd())?;
        // First: a change of the owner takes set-user-id bits and capabilities away.
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        fchownat(to, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
        for (name, value) in read_xattrs(entry.fd())? {
            let is_own = name.as_bytes().starts_with(OVERLAY) && !name.as_bytes().starts_with(ESCAPED);
            if !is_own {
                set_xattr(to, &CString::new(name.as_bytes())?, &value)?;
            }
        }
        if entry.kind != Kind::Directory
            && let Some(handle) = source(entry.fd())?
            && let Some(value) = encode_source(entry.fd(), &self.origins.first(handle))?
        {
            set_xattr(to, place::ORIGIN, &value)?;
        }
        if entry.kind != Kind::Symlink {
            chmod(to, stat.st_mode & 0o7777)?;
        }
        let time = |secs: i64, nanos: i64| u32::try_from(nanos).map(|nanos| (secs, nanos)).map_err(io::Error::other);
        set_times(to, time(stat.st_atime, stat.st_atime_nsec)?, time(stat.st_mtime, stat.st_mtime_nsec)?)
    }
}

fn copy_content(entry: &Entry, stat: &FileStat, to: &File, cancel: &AtomicBool) -> io::Result<Copied> {
    // Without a trace in the source's time of access.
    let flags = OFlag::O_NOATIME | OFlag::O_CLOEXEC;
    let path = format!("/proc/thread-self/fd/{}", entry.fd().as_raw_fd());
    let from = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    if ficlone(from.as_fd(), to.as_fd()).is_ok() {
        return Ok(Copied { bytes: 0, is_shared: stat.st_size > 0 });
    }
    let bytes = copy_data(&from, to, stat.st_size, cancel)?;
    to.set_len(entry.size)?;
    Ok(Copied { bytes, is_shared: false })
}

/// Copies all but holes; says how many bytes.
fn copy_data(from: &File, to: &File, end: i64, cancel: &AtomicBool) -> io::Result<u64> {
    let mut buffer = Vec::new();
    let (mut at, mut copied) = (0, 0);
    while at < end {
        let data = match lseek64(from, at, Whence::SeekData) {
            // Nothing but a hole up to the end.
            Err(nix::errno::Errno::ENXIO) => break,
            other => other?,
        };
        let hole = lseek64(from, data, Whence::SeekHole)?.min(end);
        buffer.resize(usize::try_from(hole - data).map_or(CHUNK_BYTES, |len| len.min(CHUNK_BYTES)), 0);
        let mut offset = u64::try_from(data).map_err(io::Error::other)?;
        let until = u64::try_from(hole).map_err(io::Error::other)?;
        while offset < until {
            if cancel.load(Ordering::Relaxed) {
                return Err(io::Error::other("cancelled"));
            }
            let len = usize::try_from(until - offset).map_or(buffer.len(), |left| left.min(buffer.len()));
            from.read_exact_at(&mut buffer[..len], offset)?;
            to.write_all_at(&buffer[..len], offset)?;
            let len = u64::try_from(len).map_err(io::Error::other)?;
            offset += len;
            copied += len;
        }
        at = hole;
    }
    Ok(copied)
}
