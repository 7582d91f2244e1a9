//! What of the stopped processes lies on the old mount.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::watcher::Watcher;
use super::{
    Description, Holding, Kind, Mapping, OpenDirectory, Place, Plan, RebaseError, RebaseRefusal, Seat, listener,
};
use crate::deltacr::fdinfo::{FdInfo, Lock, Owner, Target};
use crate::deltacr::stop::{Process, Stopped};
use crate::deltacr::table::{Ahead, Link, Table, Tables, search, unshared};
use crate::deltacr::tasks::is_over;
use crate::sandbox::root::Root;
use crate::sys::maps::next_shared_file;
use crate::sys::process::{Compared, compare};
use crate::sys::stat::{stat, stat_at};
use crate::sys::unix::name_of;

impl Plan {
    /// Looks through all processes, whose root is `root`, for what is on `from`.
    ///
    /// # Errors
    /// Nothing has been changed.
    pub fn make(stopped: &Stopped, root: &Root, from: &Root, ahead: Ahead) -> Result<Self, RebaseError> {
        Self::look(stopped, root, from, ahead, None)
    }

    /// The same for the mappings of the processes in `pids` alone: all else of theirs is replaced in another way.
    ///
    /// # Errors
    /// Nothing has been changed.
    pub fn of_mappings(stopped: &Stopped, from: &Root, pids: &[pid_t]) -> Result<Self, RebaseError> {
        Self::look(stopped, from, from, Ahead::default(), Some(pids))
    }

    fn look(
        stopped: &Stopped,
        root: &Root,
        from: &Root,
        ahead: Ahead,
        mappings_of: Option<&[pid_t]>,
    ) -> Result<Self, RebaseError> {
        let (tables, known, descriptions) = Default::default();
        let mut finder = Finder { root, from, ahead, tables, known, descriptions };
        let mut seats = Vec::new();
        for process in stopped.processes() {
            let seat = match mappings_of {
                Some(pids) if !pids.contains(&process.pid) => continue,
                Some(_) => finder.seat_of_mappings(process),
                None => finder.seat(process),
            };
            let seat = match seat {
                // Killed meanwhile: it has nothing any more.
                Err(_) if is_over(process.pid) => continue,
                other => other?,
            };
            if seat.cwd.is_some() || !seat.holdings.is_empty() || !seat.mappings.is_empty() {
                seats.push(seat);
            }
        }
        Ok(Self { seats, descriptions: finder.descriptions })
    }

    /// Directories that processes have open for reading. Who walks through them compares devices and inode numbers on
    /// the way (fts of `find`, `rm`, `du`; Python's `rmtree`), and those change with the mount.
    pub fn open_directories(&self) -> BTreeSet<OpenDirectory> {
        let mut found = BTreeSet::new();
        for seat in &self.seats {
            for holding in &seat.holdings {
                let Description { kind, info, place, .. } = &self.descriptions[holding.description];
                let is_path_only = info.flags & libc::O_PATH != 0;
                if matches!(kind, Kind::File) && !is_path_only && place.stat.kind() == libc::S_IFDIR {
                    found.insert(OpenDirectory { pid: seat.pid, number: holding.number, path: place.path.clone() });
                }
            }
        }
        found
    }

    /// How many open file descriptions are to be moved.
    pub fn n_descriptions(&self) -> usize {
        self.descriptions.len()
    }
}

/// What a descriptor table holds, as a seat has it.
#[derive(Default)]
struct Held {
    holdings: Vec<Holding>,
    locks: Vec<(usize, Lock)>,
    epolls: Vec<(i32, Vec<Target>)>,
}

/// A descriptor by which a description was found, and the description's index.
type Found = (pid_t, i32, usize);

struct Finder<'a> {
    root: &'a Root,
    from: &'a Root,
    ahead: Ahead,
    tables: Tables,
    /// Descriptions that look alike, in kcmp's order: only those have to be compared.
    known: BTreeMap<(u64, i32, i64), Vec<Found>>,
    descriptions: Vec<Description>,
}

impl Finder<'_> {
    fn seat(&mut self, process: &Process) -> Result<Seat, RebaseError> {
        let pid = process.pid;
        let tid = process.threads.first().map_or(pid, |thread| thread.tid);
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        if let Some((tid, what)) = unshared(process).map_err(failed("compare threads"))? {
            return Err(RebaseRefusal::Unshared { pid, tid, what }.into());
        }
        let (mut table, numbers) = self.ahead.take(pid, tid).map_err(failed("open the descriptors"))?;
        self.check_root(pid, &table)?;
        let cwd = Place::behind(self.from, table.task(), c"cwd").map_err(failed("find the working directory"))?;
        // pivot_root itself moves those that are the root. One that was removed is as good on the old mount.
        let moves = |place: &Place| !self.from.is(&place.stat) && !place.unlinked;
        let cwd = cwd.filter(moves).map(|place| (place, None));
        let mut held = Held::default();
        if self.tables.number(tid).map_err(failed("compare the descriptors"))?.1 {
            for number in &numbers {
                self.look_at(&mut held, (pid, tid, *number), &mut table, cwd.as_ref().map(|(place, _)| place))?;
            }
        }
        let mappings = self.mappings(tid, &table).map_err(failed("find the mappings"))?;
        let Held { holdings, locks, epolls } = held;
        Ok(Seat { pid, tid, table, holdings, numbers, locks, epolls, cwd, mappings })
    }

    fn seat_of_mappings(&mut self, process: &Process) -> Result<Seat, RebaseError> {
        let pid = process.pid;
        let tid = process.threads.first().map_or(pid, |thread| thread.tid);
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        let (table, numbers) = self.ahead.take(pid, tid).map_err(failed("open the descriptors"))?;
        let mappings = self.mappings(tid, &table).map_err(failed("find the mappings"))?;
        let (holdings, locks, epolls) = Default::default();
        Ok(Seat { pid, tid, table, holdings, numbers, locks, epolls, cwd: None, mappings })
    }

    fn check_root(&self, pid: pid_t, table: &Table) -> Result<(), RebaseError> {
        let failed = |source| RebaseError::Process { op: "find the root", pid, source };
        let own = stat_at(table.task(), c"root").map_err(failed)?;
        if self.root.is(&own) { Ok(()) } else { Err(RebaseRefusal::Root { pid }.into()) }
    }

    fn look_at(
        &mut self,
        held: &mut Held,
        at: (pid_t, pid_t, i32),
        table: &mut Table,
        cwd: Option<&Place>,
    ) -> Result<(), RebaseError> {
        let (pid, _, number) = at;
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        let link = table.link(number).map_err(failed("read a descriptor's link"))?;
        if matches!(link, Link::Plain) {
            return Ok(());
        }
        let info = table.info(number).map_err(failed("read fdinfo"))?;
        if let Some(n @ 1..) = info.n_in_flight {
            return Err(RebaseRefusal::InFlight { pid, number, n }.into());
        }
        if !info.targets.is_empty() {
            held.epolls.push((number, info.targets));
            return Ok(());
        }
        // Unix sockets may have their name on the old mount, inotify instances may watch files of it.
        let depends = info.n_in_flight.is_some() || self.watches_old_files(&info);
        if info.mount != self.from.mount() && !depends {
            return Ok(());
        }
        if info.locks.iter().any(|lock| lock.owner == Owner::Other) {
            return Err(RebaseRefusal::Lease { pid, number }.into());
        }
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        let locks: Vec<_> = info.locks.iter().copied().filter(|lock| lock.owner == Owner::Process).collect();
        let Some(description) = self.description(at, link, info, table, cwd)? else { return Ok(()) };
        held.locks.extend(locks.into_iter().map(|lock| (description, lock)));
        held.holdings.push(Holding { number, close_on_exec, description });
        Ok(())
    }

    /// The index of the description behind a descriptor; `None`: it does not depend on the old mount.
    fn description(
        &mut self,
        task: (pid_t, pid_t, i32),
        link: Link,
        mut info: FdInfo,
        table: &Table,
        cwd: Option<&Place>,
    ) -> Result<Option<usize>, RebaseError> {
        let (pid, tid, number) = task;
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        info.flags &= !libc::O_CLOEXEC;
        let key = (info.ino, info.flags, info.position);
        let alike = self.known.get(&key).map_or(&[][..], Vec::as_slice);
        let found =
            search(alike, |(other_tid, other, _)| compare(*other_tid, tid, Compared::Descriptions(*other, number)));
        let at = match found.map_err(failed("compare the descriptors"))? {
            Ok(at) => return Ok(Some(alike[at].2)),
            Err(at) => at,
        };
        let old = table.copy(number).map_err(failed("copy a descriptor"))?;
        let look = stat(old.as_fd()).map_err(failed("look at a descriptor"))?;
        let (place, kind) = if info.mount == self.from.mount() {
            let Link::Path(path) = link else {
                let why = if matches!(link, Link::TooLong) { Errno::ENAMETOOLONG } else { Errno::ENOENT };
                return Err(failed("find a file")(why.into()));
            };
            (Place::named(self.from, look, path).map_err(failed("find a file"))?, Kind::File)
        } else if info.watches.is_empty() {
            let Some(name) = name_of(old.as_fd()).map_err(failed("find the name of a socket"))? else {
                return Ok(None);
            };
            let link = CString::new(format!("/proc/thread-self/fd/{}", name.as_raw_fd()))
                .map_err(|error| failed("find the name of a socket")(error.into()))?;
            let Some(place) =
                Place::behind(self.from, name.as_fd(), &link).map_err(failed("find the name of a socket"))?
            else {
                return Ok(None);
            };
            let Some(listener) = listener::look(&old, &place, pid, number)? else { return Ok(None) };
            (place, Kind::Listener(listener))
        } else {
            if has_unread(&old).map_err(failed("look at an inotify instance"))? {
                return Err(RebaseRefusal::Unread { pid, number }.into());
            }
            let near = cwd.map_or(c"/", |place| place.path.as_c_str());
            let watcher = Watcher::find(&info.watches, self.from, near);
            let watcher = watcher.map_err(|watch| RebaseRefusal::Watch { pid, number, watch })?;
            (Place { path: c"inotify".into(), stat: look, unlinked: true }, Kind::Watcher(watcher))
        };
        let index = self.descriptions.len();
        self.known.entry(key).or_default().insert(at, (tid, number, index));
        self.descriptions.push(Description { old: Some(old), place, info, kind, new: None });
        Ok(Some(index))
    }

    fn watches_old_files(&self, info: &FdInfo) -> bool {
        info.watches.iter().any(|watch| watch.dev == self.from.dev())
    }

    fn mappings(&self, tid: pid_t, table: &Table) -> io::Result<Vec<Mapping>> {
        let mut mappings = Vec::new();
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let maps = nix::fcntl::openat(table.task(), c"maps", flags, nix::sys::stat::Mode::empty())?;
        let mut address = 0;
        while let Some(found) = next_shared_file(maps.as_fd(), address)? {
            address = found.end;
            // A look at where each of them leads takes longer than all of this.
            if found.dev != self.from.dev() {
                continue;
            }
            let link = format!("/proc/{tid}/map_files/{:x}-{:x}", found.start, found.end);
            let Some(place) = Place::behind(self.from, table.task(), &CString::new(link.as_str())?)? else { continue };
            let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
            let old = nix::fcntl::open(link.as_str(), flags, nix::sys::stat::Mode::empty())?;
            mappings.push(Mapping {
                start: found.start,
                len_bytes: found.end - found.start,
                protection: found.protection,
                offset_bytes: found.offset_bytes,
                writable: fs::symlink_metadata(&link)?.permissions().mode() & 0o200 != 0,
                locked: false,
                place,
                old,
                new: None,
            });
        }
        if !mappings.is_empty() && has_locked_memory(tid)? {
            mark_locked(tid, &mut mappings)?;
        }
        Ok(mappings)
    }
}

fn has_locked_memory(tid: pid_t) -> io::Result<bool> {
    let status = fs::read(format!("/proc/{tid}/status"))?;
    let status = String::from_utf8_lossy(&status);
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    Ok(locked.is_some_and(|rest| rest.split_ascii_whitespace().next() != Some("0")))
}

/// Reads which mappings are mlocked: a walk over all memory of the process, so only done where something is.
fn mark_locked(tid: pid_t, mappings: &mut [Mapping]) -> io::Result<()> {
    // Names are any bytes.
    let smaps = fs::read(format!("/proc/{tid}/smaps"))?;
    let smaps = String::from_utf8_lossy(&smaps);
    let mut start = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let locked = flags.split_ascii_whitespace().any(|flag| flag == "lo");
            mappings
                .iter_mut()
                .filter(|mapping| Some(mapping.start) == start)
                .for_each(|mapping| mapping.locked = locked);
        } else if let Some((first, _)) = line.split_once('-')
            && let Ok(address) = u64::from_str_radix(first, 16)
        {
            start = Some(address);
        }
    }
    Ok(())
}

fn has_unread(instance: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(instance.as_fd(), PollFlags::POLLIN)];
    Ok(nix::poll::poll(&mut fds, PollTimeout::ZERO)? > 0)
}
