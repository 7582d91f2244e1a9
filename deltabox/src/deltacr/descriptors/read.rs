//! What stopped processes hold.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::readlinkat;

use super::{Cwd, Description, DescriptorError, DescriptorRefusal, Held, Seat, Slot, What};
use crate::deltacr::fdinfo::{FdInfo, Lock, Owner};
use crate::deltacr::place::Place;
use crate::deltacr::stop::{Process, Stopped};
use crate::deltacr::table::{Ahead, Link, Table, Tables, search, unshared};
use crate::deltacr::tasks::pid_inside;
use crate::deltacr::{position, shared};
use crate::sandbox::root::Root;
use crate::sys::process::{Compared, compare};
use crate::sys::stat::{stat, stat_at};

/// Pipes and sockets that somebody outside holds an end of, by the text of their links.
#[derive(Debug, Default)]
pub struct Outside(BTreeSet<Vec<u8>>);

impl Outside {
    /// What processes that are not to be stopped hold: init, and this one.
    ///
    /// # Errors
    /// One of them is gone.
    pub fn of(pids: &[pid_t]) -> io::Result<Self> {
        let mut found = BTreeSet::new();
        for pid in pids {
            for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
                // Closed meanwhile: then it is not outside any more.
                let Ok(link) = std::fs::read_link(entry?.path()) else { continue };
                let link = link.into_os_string().into_vec();
                if is_numbered(&link) {
                    found.insert(link);
                }
            }
        }
        Ok(Self(found))
    }
}

/// `pipe:[7]`, `socket:[7]`: two of these with the same text are the same.
pub(super) fn is_numbered(link: &[u8]) -> bool {
    link.starts_with(b"pipe:[") || link.starts_with(b"socket:[")
}

impl Held {
    /// Reads what all stopped processes hold, whose root is `root`; and the memory that some of it leads to.
    ///
    /// # Errors
    /// Nothing has been changed.
    pub(in crate::deltacr) fn read(
        stopped: &Stopped,
        root: &Root,
        outside: &Outside,
        ahead: Ahead,
    ) -> Result<(Self, Vec<shared::Found>), DescriptorError> {
        let (tables, known, held, memory) = Default::default();
        let mut reader = Reader { root, outside, ahead, tables, known, held, memory };
        for process in stopped.processes() {
            reader.seat(process)?;
        }
        Ok((reader.held, reader.memory))
    }
}

/// A descriptor by which a description was found, and the description's index.
type Found = (pid_t, i32, usize);

struct Reader<'a> {
    root: &'a Root,
    outside: &'a Outside,
    ahead: Ahead,
    tables: Tables,
    /// Descriptions that look alike, in kcmp's order: only those have to be compared.
    known: BTreeMap<(u64, i32, i64), Vec<Found>>,
    held: Held,
    memory: Vec<shared::Found>,
}

impl Reader<'_> {
    fn seat(&mut self, process: &Process) -> Result<(), DescriptorError> {
        let pid = process.pid;
        let tid = process.threads.first().map_or(pid, |thread| thread.tid);
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        if let Some((tid, what)) = unshared(process).map_err(failed("compare threads"))? {
            return Err(DescriptorRefusal::Unshared { pid, tid, what }.into());
        }
        let (mut table, numbers) = self.ahead.take(pid, tid).map_err(failed("open the descriptors"))?;
        let own = stat_at(table.task(), c"root").map_err(failed("find the root"))?;
        if !self.root.is(&own) {
            return Err(DescriptorRefusal::Root { pid }.into());
        }
        let cwd = self.cwd(&table).map_err(failed("find the working directory"))?;
        let (number, is_new) = self.tables.number(tid).map_err(failed("compare the descriptors"))?;
        let mut locks = Vec::new();
        if is_new {
            let mut slots = Vec::with_capacity(numbers.len());
            for number in numbers {
                slots.push(self.slot((pid, tid, number), &mut table, &mut locks)?);
            }
            self.held.tables.push(slots);
        }
        let inside = pid_inside(pid).map_err(failed("find the number"))?;
        self.held.seats.insert(inside, Seat { table: number, cwd, locks });
        Ok(())
    }

    fn cwd(&self, table: &Table) -> io::Result<Cwd> {
        Ok(match Place::behind(self.root, table.task(), c"cwd")? {
            Some(Place { unlinked: true, .. }) => Cwd::Gone,
            Some(Place { path, .. }) => Cwd::Tree { path },
            None => Cwd::Mount { path: CString::new(readlinkat(table.task(), c"cwd")?.into_vec())? },
        })
    }

    fn slot(
        &mut self,
        (pid, tid, number): (pid_t, pid_t, i32),
        table: &mut Table,
        locks: &mut Vec<(usize, Lock)>,
    ) -> Result<Slot, DescriptorError> {
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        let mut info = table.info(number).map_err(failed("read fdinfo"))?;
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        info.flags &= !libc::O_CLOEXEC;
        let key = (info.ino, info.flags, info.position);
        let alike = self.known.get(&key).map_or(&[][..], Vec::as_slice);
        let found =
            search(alike, |(other_tid, other, _)| compare(*other_tid, tid, Compared::Descriptions(*other, number)));
        let description = match found.map_err(failed("compare the descriptors"))? {
            Ok(at) => alike[at].2,
            Err(at) => {
                let description = self.description((pid, number), &info, table)?;
                let index = self.held.descriptions.len();
                self.held.descriptions.push(description);
                self.known.entry(key).or_default().insert(at, (tid, number, index));
                index
            }
        };
        let own = info.locks.iter().copied().filter(|lock| lock.owner == Owner::Process);
        locks.extend(own.map(|lock| (description, lock)));
        Ok(Slot { number, close_on_exec, description })
    }

    fn description(
        &mut self,
        (pid, number): (pid_t, i32),
        info: &FdInfo,
        table: &Table,
    ) -> Result<Description, DescriptorError> {
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        let text = table.link_text(number).map_err(failed("read a descriptor's link"))?;
        let refuse = || {
            let what = String::from_utf8_lossy(&text).into_owned();
            DescriptorError::from(DescriptorRefusal::Kind { pid, number, what })
        };
        let what = match Link::of(&text) {
            Link::Path(path) if info.mount == self.root.mount() => {
                let old = table.copy(number).map_err(failed("copy a descriptor"))?;
                let look = stat(old.as_fd()).map_err(failed("look at a descriptor"))?;
                let place = Place::named(self.root, look, path).map_err(failed("find a file"))?;
                if place.unlinked || !matches!(look.kind(), libc::S_IFREG | libc::S_IFDIR) {
                    return Err(refuse());
                }
                if info.locks.iter().any(|lock| lock.owner == Owner::Other) {
                    return Err(DescriptorRefusal::Lease { pid, number }.into());
                }
                let is_read = look.kind() == libc::S_IFDIR && info.position != 0;
                let unread = is_read.then(|| position::unread(old.as_fd(), info.position)).flatten();
                let locks = info.locks.iter().copied().filter(|lock| lock.owner != Owner::Process).collect();
                What::File { path: place.path, kind: look.kind(), locks, unread }
            }
            Link::Path(path) if path.starts_with(b"/memfd:") => {
                let copy = table.copy(number).map_err(failed("copy a descriptor"))?;
                let name = String::from_utf8_lossy(&path).into_owned();
                let found = shared::Found::held(copy.as_fd(), name).map_err(failed("open a memfd"))?;
                let key = found.key();
                self.memory.push(found);
                What::Memory { key }
            }
            // Not a name that is gone.
            Link::Path(path) if !path.ends_with(b" (deleted)") => {
                What::Mount { path: CString::new(path).map_err(|error| failed("name a file")(error.into()))? }
            }
            Link::TooLong => return Err(failed("find a file")(Errno::ENAMETOOLONG.into())),
            _ if self.outside.0.contains(&text) => What::Outside { link: text },
            Link::Path(_) | Link::Plain | Link::Other => return Err(refuse()),
        };
        Ok(Description { flags: info.flags, position: info.position, what })
    }
}
