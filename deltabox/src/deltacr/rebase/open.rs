//! What is to be moved, opened on the next root. The engine opens it, from outside, so that it does not matter what the
//! processes may open now: a file opened before a setuid, one without any permission.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, Whence, lseek, unlinkat};

use super::unlinked::Copies;
use super::{Description, Kind, Missing, Place, Plan, RebaseError, fifo, position};
use crate::deltacr::fdinfo::{Lock, Owner};
use crate::deltacr::table::Table;
use crate::sandbox::root::Root;
use crate::sys::fs::{lock_description, set_times};
use crate::sys::stat::stat;

/// Flags that mattered when the file was opened, and not after. `O_TMPFILE` includes `O_DIRECTORY`.
const OPENING: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY;

/// A plan whose files are open on the next root: what [`Opened::commit`] gives the processes.
#[derive(Debug)]
pub struct Opened {
    pub(super) plan: Plan,
    /// Of the processes that have been served, to be closed when there is time.
    pub(super) tables: Vec<Table>,
}

impl Plan {
    /// Opens everything on `to`, which may be attached nowhere yet.
    ///
    /// # Errors
    /// No process has been changed.
    pub fn open(mut self, to: &Root, missing: Missing) -> Result<Opened, RebaseError> {
        let mut opener = Opener { to, missing, copies: Copies::default(), gone: None };
        if missing != Missing::Left {
            opener.copies.note_writers(&self);
        }
        fifo::open_all(&mut self.descriptions, to)?;
        for description in &mut self.descriptions {
            match &mut description.kind {
                Kind::File if description.place.stat.kind() == libc::S_IFIFO => continue,
                Kind::File => {}
                // Made in the process that has it, when its turn comes.
                Kind::Listener(listener) => {
                    listener.find(&description.place, to)?;
                    continue;
                }
                Kind::Watcher(watcher) => {
                    watcher.open(to);
                    continue;
                }
            }
            description.new = opener.description(description)?;
            if let Some(new) = &description.new {
                take_locks(new.as_fd(), description)?;
            }
        }
        for seat in &mut self.seats {
            if let Some((place, new)) = &mut seat.cwd {
                *new = opener.directory(place, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
            }
            for mapping in &mut seat.mappings {
                let flags = if mapping.writable { OFlag::O_RDWR } else { OFlag::O_RDONLY };
                mapping.new = opener.file(&mapping.place, mapping.old.as_fd(), flags)?;
            }
        }
        let tables = Vec::with_capacity(self.seats.len());
        Ok(Opened { plan: self, tables })
    }
}

struct Opener<'a> {
    to: &'a Root,
    missing: Missing,
    copies: Copies,
    /// A directory that was removed.
    gone: Option<OwnedFd>,
}

impl Opener<'_> {
    fn description(&mut self, description: &Description) -> Result<Option<OwnedFd>, RebaseError> {
        let Some(old) = &description.old else { return Ok(None) };
        let place = &description.place;
        let mut flags = OFlag::from_bits_retain(description.info.flags & !OPENING);
        if flags.contains(OFlag::O_PATH) {
            return self.named(place, flags | OFlag::O_NOFOLLOW);
        }
        let is_directory = place.stat.kind() == libc::S_IFDIR;
        let new = if is_directory {
            self.directory(place, flags)?
        } else {
            flags.remove(OFlag::O_TMPFILE);
            self.file(place, old.as_fd(), flags)?
        };
        let at = description.info.position;
        if let Some(new) = new.as_ref().filter(|_| at != 0) {
            let set = if is_directory {
                position::carry_over(old.as_fd(), at, new.as_fd())
            } else {
                lseek(new, at, Whence::SeekSet).map(drop).map_err(io::Error::from)
            };
            set.map_err(|source| file_error("set the position in", place, source))?;
        }
        Ok(new)
    }

    /// Under its name; `None` if the next root has nothing of this kind there.
    fn named(&self, place: &Place, flags: OFlag) -> Result<Option<OwnedFd>, RebaseError> {
        if place.unlinked {
            return Ok(None);
        }
        let found = match self.to.open(&place.path, flags) {
            Ok(found) => found,
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EISDIR | Errno::ENXIO) => return Ok(None),
            Err(errno) => return Err(file_error("open", place, errno.into())),
        };
        let kind = stat(found.as_fd()).map_err(|source| file_error("look at", place, source))?.kind();
        Ok((kind == place.stat.kind()).then_some(found))
    }

    fn directory(&mut self, place: &Place, flags: OFlag) -> Result<Option<OwnedFd>, RebaseError> {
        if place.unlinked {
            return Ok(None);
        }
        if let Some(found) = self.named(place, flags)? {
            return Ok(Some(found));
        }
        let gone = match &self.gone {
            Some(gone) => gone,
            None => {
                let made = make_gone(self.to).map_err(|source| file_error("take the place of", place, source))?;
                self.gone.insert(made)
            }
        };
        reopen(gone.as_fd(), flags).map(Some).map_err(|source| file_error("take the place of", place, source))
    }

    fn file(&mut self, place: &Place, old: BorrowedFd<'_>, flags: OFlag) -> Result<Option<OwnedFd>, RebaseError> {
        if let Some(found) = self.named(place, flags)? {
            if self.missing == Missing::CopiedLate {
                self.copies
                    .carry_over(place, old, found.as_fd())
                    .map_err(|source| file_error("carry over", place, source))?;
            }
            return Ok(Some(found));
        }
        if self.missing == Missing::Left || place.stat.kind() != libc::S_IFREG {
            return Ok(None);
        }
        let copy = self.copies.of(place, old, self.to).map_err(|source| file_error("copy", place, source))?;
        let opened = copy.map(|copy| reopen(copy, flags)).transpose();
        opened.map_err(|source| file_error("open the copy of", place, source))
    }
}

/// Opens what a descriptor leads to once more.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> io::Result<OwnedFd> {
    let link = format!("/proc/thread-self/fd/{}", fd.as_raw_fd());
    let flags = flags.difference(OFlag::O_NOFOLLOW) | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(link.as_str(), flags, Mode::empty())?)
}

/// A directory that was removed: what a program is in whose directory the next root does not have.
fn make_gone(to: &Root) -> io::Result<OwnedFd> {
    const NAME: &std::ffi::CStr = c".deltabox-gone";
    let before = stat(to.as_fd())?;
    nix::sys::stat::mkdirat(to, NAME, Mode::S_IRWXU)?;
    let opened = to.open(&CString::from(NAME), OFlag::O_PATH | OFlag::O_DIRECTORY);
    // fchdir asks whether the process may.
    let allowed = opened.as_ref().map(|gone| crate::sys::fs::chmod(gone.as_fd(), 0o755));
    unlinkat(to, NAME, UnlinkatFlags::RemoveDir)?;
    set_times(to.as_fd(), before.atime, before.mtime)?;
    allowed.unwrap_or(Ok(()))?;
    Ok(opened?)
}

/// Locks that belong to the description, taken on the new one. Nobody else can hold any there.
fn take_locks(new: BorrowedFd<'_>, description: &Description) -> Result<(), RebaseError> {
    for lock in &description.info.locks {
        let taken = match lock.owner {
            Owner::Description => lock_description(new, lock.exclusive),
            Owner::DescriptionRange => {
                fcntl(new, FcntlArg::F_OFD_SETLK(&range(lock))).map(drop).map_err(io::Error::from)
            }
            Owner::Process | Owner::Other => Ok(()),
        };
        taken.map_err(|source| file_error("lock", &description.place, source))?;
    }
    Ok(())
}

/// A lock as fcntl(2) takes it.
pub(super) fn range(lock: &Lock) -> libc::flock {
    #[expect(clippy::cast_possible_truncation, reason = "small constants of the C library")]
    libc::flock {
        l_type: if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: lock.start,
        l_len: lock.len_bytes,
        l_pid: 0,
    }
}

pub(super) fn file_error(op: &'static str, place: &Place, source: io::Error) -> RebaseError {
    RebaseError::File { op, path: place.path.to_string_lossy().into_owned(), source }
}
