//! Copies of files: of those without a name that somebody still writes to, also without a name, on the next root.
//!
//! A link across overlays is refused, so is a reflink (EXDEV, Linux 6.18). Those that are only read stay where they
//! are: the old mount keeps them, and sealed it lets nobody write.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, copy_file_range};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, Whence, fchown, lseek};

use super::{Place, Plan};
use crate::deltacr::reopen::reopen;
use crate::sandbox::root::Root;
use crate::sys::fs::{XATTR_MAX_BYTES, get_xattr, list_xattrs, set_times, set_xattr};
use crate::sys::stat::stat;

type Identity = ((u32, u32), u64);

#[derive(Debug, Default)]
pub(super) struct Copies {
    /// Files that somebody can write to.
    written: BTreeSet<Identity>,
    /// Those that can be written to without their times telling.
    mapped: BTreeSet<Identity>,
    carried: BTreeSet<Identity>,
    made: BTreeMap<Identity, OwnedFd>,
}

impl Copies {
    pub(super) fn note_writers(&mut self, plan: &Plan) {
        for description in &plan.descriptions {
            if description.info.flags & libc::O_ACCMODE != libc::O_RDONLY {
                self.written.insert(description.place.stat.identity());
            }
        }
        let mappings = plan.seats.iter().flat_map(|seat| &seat.mappings);
        self.mapped.extend(mappings.filter(|mapping| mapping.writable).map(|mapping| mapping.place.stat.identity()));
        self.written.extend(&self.mapped);
    }

    /// Makes the file of the same name like `old`, if that was written to since it was copied: a copy has its times.
    pub(super) fn carry_over(&mut self, place: &Place, old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
        let (identity, is, was) = (place.stat.identity(), place.stat, stat(new)?);
        let is_same = (is.size, is.mtime) == (was.size, was.mtime) && !self.mapped.contains(&identity);
        if is_same || !self.written.contains(&identity) || !self.carried.insert(identity) {
            return Ok(());
        }
        let (from, into) = (reopen(old, OFlag::O_RDONLY | OFlag::O_NOATIME)?, reopen(new, OFlag::O_WRONLY)?);
        File::from(into.try_clone()?).set_len(0)?;
        copy_content(&from, &into, is.size)?;
        set_times(into.as_fd(), is.atime, is.mtime)
    }

    /// The copy of a file, made at the first call; `None` if nobody can write to it.
    pub(super) fn of(&mut self, place: &Place, old: BorrowedFd<'_>, to: &Root) -> io::Result<Option<BorrowedFd<'_>>> {
        let identity = place.stat.identity();
        if !self.written.contains(&identity) {
            return Ok(None);
        }
        let made: &OwnedFd = match self.made.entry(identity) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(free) => free.insert(copy(place, old, to)?),
        };
        Ok(Some(made.as_fd()))
    }
}

fn copy(place: &Place, old: BorrowedFd<'_>, to: &Root) -> io::Result<OwnedFd> {
    crate::fault::point("rebase.copy")?;
    let from = reopen(old, OFlag::O_RDONLY | OFlag::O_NOATIME)?;
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let into = nix::fcntl::openat(to, c".", flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    copy_content(&from, &into, place.stat.size)?;
    copy_xattrs(from.as_fd(), into.as_fd())?;
    fchown(&into, Some(Uid::from_raw(place.stat.uid)), Some(Gid::from_raw(place.stat.gid)))?;
    // After the owner: a change of owner takes set-user-id bits away.
    crate::sys::fs::chmod(into.as_fd(), place.stat.mode & 0o7777)?;
    set_times(into.as_fd(), place.stat.atime, place.stat.mtime)?;
    Ok(into)
}

/// Data where there is data; holes stay holes.
fn copy_content(from: &OwnedFd, into: &OwnedFd, len_bytes: u64) -> io::Result<()> {
    let len = i64::try_from(len_bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    File::from(into.try_clone()?).set_len(len_bytes)?;
    let mut at = 0;
    while at < len {
        let start = match lseek(from, at, Whence::SeekData) {
            Ok(start) => start,
            // Nothing but a hole from here on.
            Err(Errno::ENXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(from, start, Whence::SeekHole)?.min(len);
        let (mut read, mut written) = (start, start);
        while read < end {
            let left = usize::try_from(end - read).unwrap_or(usize::MAX);
            if copy_file_range(from, Some(&mut read), into, Some(&mut written), left)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

fn copy_xattrs(from: BorrowedFd<'_>, into: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0; XATTR_MAX_BYTES];
    let n = match list_xattrs(from, &mut names) {
        Ok(0) => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        other => other?,
    };
    let mut value = vec![0; XATTR_MAX_BYTES];
    for name in names[..n].split_inclusive(|byte| *byte == 0) {
        let name = std::ffi::CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        let n = get_xattr(from, name, &mut value)?;
        set_xattr(into, name, &value[..n])?;
    }
    Ok(())
}
