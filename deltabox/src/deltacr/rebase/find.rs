//! What of the stopped processes lies on the old mount.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;

use libc::pid_t;
use nix::fcntl::OFlag;

use super::fdinfo::{FdInfo, Owner};
use super::{Description, Holding, Mapping, Place, Plan, RebaseError, RebaseRefusal, Seat};
use crate::deltacr::stop::{Process, Stopped};
use crate::sandbox::root::Root;
use crate::sys::maps::next_shared_file;
use crate::sys::process::{Compared, compare, pidfd_getfd, pidfd_open_thread};
use crate::sys::stat::stat_path;

/// What d_path puts behind the name of a file that has none any more.
const DELETED: &[u8] = b" (deleted)";

impl Plan {
    /// Looks through all processes.
    ///
    /// # Errors
    /// Nothing has been changed.
    pub fn make(stopped: &Stopped, from: &Root) -> Result<Self, RebaseError> {
        let mut finder = Finder { from, tables: Vec::new(), known: BTreeMap::new(), descriptions: Vec::new() };
        let mut seats = Vec::new();
        for process in stopped.processes() {
            let seat = finder.seat(process)?;
            if seat.cwd.is_some() || !seat.holdings.is_empty() || !seat.mappings.is_empty() {
                seats.push(seat);
            }
        }
        Ok(Self { seats, descriptions: finder.descriptions })
    }

    /// How many open file descriptions are to be moved.
    pub fn n_descriptions(&self) -> usize {
        self.descriptions.len()
    }
}

/// A descriptor by which a description was found, and the description's index.
type Found = (pid_t, i32, usize);

struct Finder<'a> {
    from: &'a Root,
    /// A task of each descriptor table seen, in kcmp's order.
    tables: Vec<pid_t>,
    /// Descriptions that look alike: only those have to be compared.
    known: BTreeMap<(u64, i32, i64), Vec<Found>>,
    descriptions: Vec<Description>,
}

impl Finder<'_> {
    fn seat(&mut self, process: &Process) -> Result<Seat, RebaseError> {
        let pid = process.pid;
        let tid = process.threads.first().map_or(pid, |thread| thread.tid);
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        for thread in process.threads.iter().skip(1) {
            for (what, name) in [(Compared::Tables, "a descriptor table"), (Compared::Places, "a working directory")] {
                if compare(tid, thread.tid, what).map_err(failed("compare threads"))? != Ordering::Equal {
                    return Err(RebaseRefusal::Unshared { pid, tid: thread.tid, what: name }.into());
                }
            }
        }
        let mut seat = Seat {
            pid,
            tid,
            holdings: Vec::new(),
            numbers: Vec::new(),
            locks: Vec::new(),
            epolls: Vec::new(),
            cwd: None,
            mappings: Vec::new(),
        };
        self.check_root(pid, tid)?;
        let cwd = self.place(&format!("/proc/{pid}/task/{tid}/cwd")).map_err(failed("find the working directory"))?;
        // pivot_root itself moves those that are the root. One that was removed is as good on the old mount.
        let moves = |place: &Place| place.path.as_bytes() != b"/" && !place.unlinked;
        seat.cwd = cwd.filter(moves).map(|place| (place, None));
        if self.is_new_table(tid).map_err(failed("compare the descriptors"))? {
            self.read_table(&mut seat)?;
        } else {
            seat.numbers = numbers(pid, tid).map_err(failed("list the descriptors"))?;
        }
        seat.mappings = self.mappings(pid, tid).map_err(failed("find the mappings"))?;
        Ok(seat)
    }

    fn check_root(&self, pid: pid_t, tid: pid_t) -> Result<(), RebaseError> {
        let failed = |source| RebaseError::Process { op: "find the root", pid, source };
        let path = CString::new(format!("/proc/{pid}/task/{tid}/root")).map_err(|error| failed(error.into()))?;
        let (own, from) =
            (stat_path(&path).map_err(failed)?, crate::sys::stat::stat(self.from.as_fd()).map_err(failed)?);
        if (own.mount, own.ino) == (from.mount, from.ino) { Ok(()) } else { Err(RebaseRefusal::Root { pid }.into()) }
    }

    /// Whether no process before has this task's descriptor table.
    fn is_new_table(&mut self, tid: pid_t) -> io::Result<bool> {
        let (mut low, mut high) = (0, self.tables.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            match compare(self.tables[middle], tid, Compared::Tables)? {
                Ordering::Equal => return Ok(false),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        self.tables.insert(low, tid);
        Ok(true)
    }

    fn read_table(&mut self, seat: &mut Seat) -> Result<(), RebaseError> {
        let (pid, tid) = (seat.pid, seat.tid);
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        seat.numbers = numbers(pid, tid).map_err(failed("list the descriptors"))?;
        let mut pidfd = None;
        for &number in &seat.numbers {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/fdinfo/{number}"));
            let text = text.map_err(failed("read fdinfo"))?;
            let info = FdInfo::parse(&text).ok_or_else(|| failed("read fdinfo")(io::ErrorKind::InvalidData.into()))?;
            if let Some(n @ 1..) = info.n_in_flight {
                return Err(RebaseRefusal::InFlight { pid, number, n }.into());
            }
            if info.mount != self.from.mount() {
                if !info.targets.is_empty() {
                    seat.epolls.push((number, info.targets));
                }
                continue;
            }
            if info.locks.iter().any(|lock| lock.owner == Owner::Other) {
                return Err(RebaseRefusal::Lease { pid, number }.into());
            }
            let pidfd = match &pidfd {
                Some(pidfd) => pidfd,
                None => pidfd.insert(pidfd_open_thread(tid).map_err(failed("open"))?),
            };
            let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
            let locks: Vec<_> = info.locks.iter().copied().filter(|lock| lock.owner == Owner::Process).collect();
            let description = self.description(seat, number, info, pidfd).map_err(failed("copy a descriptor"))?;
            seat.locks.extend(locks.into_iter().map(|lock| (description, lock)));
            seat.holdings.push(Holding { number, close_on_exec, description });
        }
        Ok(())
    }

    /// The index of the description behind a descriptor.
    fn description(&mut self, seat: &Seat, number: i32, mut info: FdInfo, pidfd: &OwnedFd) -> io::Result<usize> {
        info.flags &= !libc::O_CLOEXEC;
        let alike = self.known.entry((info.ino, info.flags, info.position)).or_default();
        for &(tid, other, index) in alike.iter() {
            if compare(tid, seat.tid, Compared::Descriptions(other, number))? == Ordering::Equal {
                return Ok(index);
            }
        }
        let index = self.descriptions.len();
        alike.push((seat.tid, number, index));
        let old = Some(pidfd_getfd(pidfd.as_fd(), number)?);
        let path = format!("/proc/{}/task/{}/fd/{number}", seat.pid, seat.tid);
        let place = self.place(&path)?.ok_or_else(|| io::Error::other("a descriptor that moved"))?;
        self.descriptions.push(Description { old, place, info, new: None });
        Ok(index)
    }

    /// Where a magic link leads, if that is on the old mount.
    fn place(&self, link: &str) -> io::Result<Option<Place>> {
        let stat = stat_path(&CString::new(link)?)?;
        if stat.mount != self.from.mount() {
            return Ok(None);
        }
        let mut path = fs::read_link(link)?.into_os_string().into_vec();
        let unlinked = path.ends_with(DELETED) && !self.is_there(&path, &stat);
        if unlinked {
            path.truncate(path.len() - DELETED.len());
        }
        Ok(Some(Place { path: CString::new(path)?, stat, unlinked }))
    }

    /// Whether the file has just the name that d_path gave it: a name may end in " (deleted)".
    fn is_there(&self, path: &[u8], stat: &crate::sys::stat::Stat) -> bool {
        let Ok(path) = CString::new(path) else { return false };
        let found = self.from.open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW);
        found.is_ok_and(|found| {
            crate::sys::stat::stat(found.as_fd()).is_ok_and(|there| there.identity() == stat.identity())
        })
    }

    fn mappings(&self, pid: pid_t, tid: pid_t) -> io::Result<Vec<Mapping>> {
        let mut mappings = Vec::new();
        let maps = File::open(format!("/proc/{pid}/task/{tid}/maps"))?;
        let mut address = 0;
        while let Some(found) = next_shared_file(maps.as_fd(), address)? {
            address = found.end;
            let link = format!("/proc/{tid}/map_files/{:x}-{:x}", found.start, found.end);
            let Some(place) = self.place(&link)? else { continue };
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

/// The descriptor numbers of a task, sorted.
fn numbers(pid: pid_t, tid: pid_t) -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task/{tid}/fd"))? {
        let name: OsString = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn has_locked_memory(tid: pid_t) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    Ok(locked.is_some_and(|rest| rest.split_ascii_whitespace().next() != Some("0")))
}

/// Reads which mappings are mlocked: a walk over all memory of the process, so only done where something is.
fn mark_locked(tid: pid_t, mappings: &mut [Mapping]) -> io::Result<()> {
    let smaps = fs::read_to_string(format!("/proc/{tid}/smaps"))?;
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
