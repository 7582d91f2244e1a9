//! What is to be moved, opened on the next root. The engine opens it, from outside, so that it does not matter what the
//! processes may open now: a file opened before a setuid, one without any permission.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};

use super::unlinked::Copies;
use super::{Description, Kind, Missing, Place, Plan, RebaseError, fifo};
use crate::deltacr::reopen::{OPENING, make_gone, reopen};
use crate::deltacr::table::Table;
use crate::deltacr::{locks, position};
use crate::sandbox::root::Root;
use crate::sys::stat::stat;

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
                locks::take(new.as_fd(), &description.info.locks)
                    .map_err(|source| file_error("lock", &description.place, source))?;
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

pub(super) fn file_error(op: &'static str, place: &Place, source: io::Error) -> RebaseError {
    RebaseError::File { op, path: place.path.to_string_lossy().into_owned(), source }
}
