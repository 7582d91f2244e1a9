//! What of the stopped processes lies on the old mount.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use libc::pid_t;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::fdinfo::{FdInfo, Owner};
use super::watcher::Watcher;
use super::{Description, Holding, Kind, Mapping, Place, Plan, RebaseError, RebaseRefusal, Seat, listener};
use crate::deltacr::stop::{Process, Stopped};
use crate::deltacr::tasks::{read_stat, scan_threads};
use crate::sandbox::root::{LANDING, Root};
use crate::sys::maps::next_shared_file;
use crate::sys::process::{Compared, compare, pidfd_getfd, pidfd_open_thread};

use crate::sys::stat::{Stat, stat, stat_path};
use crate::sys::unix::name_of;

/// What d_path puts behind the name of a file that has none any more.
const DELETED: &[u8] = b" (deleted)";

impl Plan {
    /// Looks through all processes, whose root is `root`, for what is on `from`.
    ///
    /// # Errors
    /// Nothing has been changed.
    pub fn make(stopped: &Stopped, root: &Root, from: &Root) -> Result<Self, RebaseError> {
        let look = stat(from.as_fd()).map_err(|source| RebaseError::Process { op: "find the root", pid: 0, source })?;
        // The kernel's own MKDEV (include/linux/kdev_t.h).
        let dev = u64::from(look.dev.0) << 20 | u64::from(look.dev.1);
        let (tables, known, descriptions) = Default::default();
        let mut finder = Finder { root, from, tables, known, descriptions, dev };
        let mut seats = Vec::new();
        for process in stopped.processes() {
            let seat = match finder.seat(process) {
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

    /// How many open file descriptions are to be moved.
    pub fn n_descriptions(&self) -> usize {
        self.descriptions.len()
    }
}

/// A descriptor by which a description was found, and the description's index.
type Found = (pid_t, i32, usize);

struct Finder<'a> {
    root: &'a Root,
    from: &'a Root,
    /// A task of each descriptor table seen, in kcmp's order.
    tables: Vec<pid_t>,
    /// Descriptions that look alike: only those have to be compared.
    known: BTreeMap<(u64, i32, i64), Vec<Found>>,
    descriptions: Vec<Description>,
    /// Device of the old root, as fdinfo shows it.
    dev: u64,
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
        let (own, root) = (stat_path(&path).map_err(failed)?, stat(self.root.as_fd()).map_err(failed)?);
        if (own.mount, own.ino) == (root.mount, root.ino) { Ok(()) } else { Err(RebaseRefusal::Root { pid }.into()) }
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
            if !info.targets.is_empty() {
                seat.epolls.push((number, info.targets));
                continue;
            }
            // Unix sockets may have their name on the old mount, inotify instances may watch files of it.
            let depends = info.n_in_flight.is_some() || self.watches_old_files(&info);
            if info.mount != self.from.mount() && !depends {
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
            let Some(description) = self.description(seat, number, info, pidfd)? else { continue };
            seat.locks.extend(locks.into_iter().map(|lock| (description, lock)));
            seat.holdings.push(Holding { number, close_on_exec, description });
        }
        Ok(())
    }

    /// The index of the description behind a descriptor; `None`: it does not depend on the old mount.
    fn description(
        &mut self,
        seat: &Seat,
        number: i32,
        mut info: FdInfo,
        pidfd: &OwnedFd,
    ) -> Result<Option<usize>, RebaseError> {
        let failed = |op| {
            let pid = seat.pid;
            move |source| RebaseError::Process { op, pid, source }
        };
        info.flags &= !libc::O_CLOEXEC;
        let alike = self.known.entry((info.ino, info.flags, info.position)).or_default();
        for &(tid, other, index) in alike.iter() {
            let same = compare(tid, seat.tid, Compared::Descriptions(other, number));
            if same.map_err(failed("compare the descriptors"))? == Ordering::Equal {
                return Ok(Some(index));
            }
        }
        let old = pidfd_getfd(pidfd.as_fd(), number).map_err(failed("copy a descriptor"))?;
        let link = format!("/proc/{}/task/{}/fd/{number}", seat.pid, seat.tid);
        let (place, kind) = if info.mount == self.from.mount() {
            let place = self.place(&link).map_err(failed("find a file"))?;
            (place.ok_or_else(|| failed("find a file")(io::Error::other("a descriptor that moved")))?, Kind::File)
        } else if info.watches.is_empty() {
            let Some(name) = name_of(old.as_fd()).map_err(failed("find the name of a socket"))? else {
                return Ok(None);
            };
            let link = format!("/proc/thread-self/fd/{}", name.as_raw_fd());
            let Some(place) = self.place(&link).map_err(failed("find the name of a socket"))? else { return Ok(None) };
            let Some(listener) = listener::look(&old, &place, seat.pid, number)? else { return Ok(None) };
            (place, Kind::Listener(listener))
        } else {
            if has_unread(&old).map_err(failed("look at an inotify instance"))? {
                return Err(RebaseRefusal::Unread { pid: seat.pid, number }.into());
            }
            let near = seat.cwd.as_ref().map_or(c"/", |(place, _)| place.path.as_c_str());
            let watcher = Watcher::find(&info.watches, self.from, near).map_err(|watch| RebaseRefusal::Watch {
                pid: seat.pid,
                number,
                watch,
            })?;
            let stat = stat(old.as_fd()).map_err(failed("look at an inotify instance"))?;
            (Place { path: c"inotify".into(), stat, unlinked: true }, Kind::Watcher(watcher))
        };
        let index = self.descriptions.len();
        let key = (info.ino, info.flags, info.position);
        self.known.entry(key).or_default().push((seat.tid, number, index));
        self.descriptions.push(Description { old: Some(old), place, info, kind, new: None });
        Ok(Some(index))
    }

    fn watches_old_files(&self, info: &FdInfo) -> bool {
        info.watches.iter().any(|watch| watch.dev == self.dev)
    }

    /// Where a magic link leads, if that is on the old mount.
    fn place(&self, link: &str) -> io::Result<Option<Place>> {
        let stat = stat_path(&CString::new(link)?)?;
        if stat.mount != self.from.mount() {
            return Ok(None);
        }
        let mut path = fs::read_link(link)?.into_os_string().into_vec();
        // Of a root that was left already; nobody else's files have this path.
        let landing = [b"/", LANDING.to_bytes()].concat();
        if let Some(rest) = path.strip_prefix(landing.as_slice()).filter(|rest| rest.is_empty() || rest[0] == b'/') {
            path = if rest.is_empty() { b"/".to_vec() } else { rest.to_vec() };
        }
        let unlinked = path.ends_with(DELETED) && !self.is_there(&path, &stat);
        if unlinked {
            path.truncate(path.len() - DELETED.len());
        }
        Ok(Some(Place { path: CString::new(path)?, stat, unlinked }))
    }

    /// Whether the file has just the name that d_path gave it: a name may end in " (deleted)".
    fn is_there(&self, path: &[u8], known: &Stat) -> bool {
        let Ok(path) = CString::new(path) else { return false };
        let found = self.from.open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW);
        found.is_ok_and(|found| stat(found.as_fd()).is_ok_and(|there| there.identity() == known.identity()))
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

/// How long a process that was killed may take to end (chosen: it needs a CPU and microseconds).
const END_PATIENCE: Duration = Duration::from_millis(100);

/// Whether a process has been killed, which is why something about it failed: waits for its end if it is about to.
pub(super) fn is_over(pid: pid_t) -> bool {
    let has_ended = || {
        read_stat(pid, pid).is_ok_and(|stat| stat.is_none_or(|stat| matches!(stat.state, 'Z' | 'X')))
            && scan_threads(pid).is_ok_and(|threads| threads.len() <= 1)
    };
    let end = Instant::now() + END_PATIENCE;
    while !has_ended() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::yield_now();
    }
    true
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

fn has_unread(instance: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(instance.as_fd(), PollFlags::POLLIN)];
    Ok(nix::poll::poll(&mut fds, PollTimeout::ZERO)? > 0)
}
