//! A stopped task's descriptor table, read in as few calls as the kernel allows: it is read while programs stand still.

use std::cmp::Ordering;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::fdinfo::FdInfo;
use super::stop::Process;
use super::tasks::Lists;
use crate::sys::fs::read_entries;
use crate::sys::process::{Compared, compare, pidfd_getfd, pidfd_open_thread};

/// Of fdinfo, and of a directory's entries (chosen: 60 of those, and all of the former but long lists).
const TEXT_BYTES: usize = 2048;
/// Processes of which something is opened ahead (chosen: four descriptors each; a thousand is a usual limit).
const MAX_AHEAD: usize = 64;

/// A task's part of `/proc`, open.
#[derive(Debug)]
pub(super) struct Table {
    tid: pid_t,
    task: OwnedFd,
    links: OwnedFd,
    infos: OwnedFd,
    pidfd: OwnedFd,
    /// Of fdinfo; grows.
    text: Vec<u8>,
}

/// What a descriptor's link tells of its kind.
#[derive(Debug)]
pub(super) enum Link {
    /// A file: what d_path calls it.
    Path(Vec<u8>),
    /// A file whose path is longer than the kernel tells.
    TooLong,
    /// Nothing with a name, and nothing that watches files or other descriptors.
    Plain,
    /// Something else without a name: `socket:[1]`, `anon_inode:[eventpoll]`.
    Other,
}

/// Without names, and nothing is known of them that could be a file's.
const PLAIN: [&[u8]; 5] =
    [b"pipe:[", b"anon_inode:[eventfd]", b"anon_inode:[timerfd]", b"anon_inode:[signalfd]", b"anon_inode:[pidfd]"];

impl Link {
    /// Sorts the text of a link.
    pub(super) fn of(text: &[u8]) -> Self {
        match text {
            [b'/', ..] => Self::Path(text.to_vec()),
            // Only a path can be longer than PATH_MAX.
            [] => Self::TooLong,
            bytes if PLAIN.iter().any(|plain| bytes.starts_with(plain)) => Self::Plain,
            _ => Self::Other,
        }
    }
}

impl Table {
    fn open(pid: pid_t, tid: pid_t) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let task = nix::fcntl::open(format!("/proc/{pid}/task/{tid}").as_str(), flags | OFlag::O_PATH, Mode::empty())?;
        let open = |name: &CStr| openat(&task, name, flags, Mode::empty());
        let (links, infos) = (open(c"fd")?, open(c"fdinfo")?);
        Ok(Self { tid, task, links, infos, pidfd: pidfd_open_thread(tid)?, text: vec![0; TEXT_BYTES] })
    }

    /// With the numbers in use.
    pub(super) fn open_with_numbers(pid: pid_t, tid: pid_t) -> io::Result<(Self, Vec<i32>)> {
        let mut table = Self::open(pid, tid)?;
        let numbers = table.numbers()?;
        Ok((table, numbers))
    }

    /// The task's directory.
    pub(super) fn task(&self) -> BorrowedFd<'_> {
        self.task.as_fd()
    }

    /// The pidfd of the task.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The numbers in use, sorted. ENOENT if the task is gone.
    fn numbers(&mut self) -> io::Result<Vec<i32>> {
        let mut numbers = Vec::new();
        let mut entries = std::mem::take(&mut self.text);
        entries.resize(entries.len().max(TEXT_BYTES), 0);
        let read = loop {
            match read_entries(self.links.as_fd(), &mut entries) {
                Ok(0) => break Ok(()),
                Ok(n) => numbers
                    .extend(names(&entries[..n]).filter_map(|name| str::from_utf8(name).ok()?.parse::<i32>().ok())),
                Err(error) => break Err(error),
            }
        };
        self.text = entries;
        read?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(super) fn link(&self, number: i32) -> io::Result<Link> {
        Ok(Link::of(&self.link_text(number)?))
    }

    /// What a descriptor's link says; nothing where that is a path longer than the kernel tells.
    pub(super) fn link_text(&self, number: i32) -> io::Result<Vec<u8>> {
        match readlinkat(&self.links, number.to_string().as_str()) {
            Err(Errno::ENAMETOOLONG) => Ok(Vec::new()),
            link => Ok(link?.into_vec()),
        }
    }

    pub(super) fn info(&mut self, number: i32) -> io::Result<FdInfo> {
        FdInfo::parse(self.info_text(number)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// fdinfo as the kernel writes it.
    pub(super) fn info_text(&mut self, number: i32) -> io::Result<&str> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(&self.infos, number.to_string().as_str(), flags, Mode::empty())?;
        let mut len_bytes = 0;
        loop {
            let n = nix::unistd::read(&file, &mut self.text[len_bytes..])?;
            len_bytes += n;
            // The kernel writes it in one piece if there is room.
            if n == 0 || len_bytes < self.text.len() {
                break;
            }
            self.text.resize(2 * len_bytes, 0);
        }
        str::from_utf8(&self.text[..len_bytes]).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// A copy of the description.
    pub(super) fn copy(&self, number: i32) -> io::Result<OwnedFd> {
        pidfd_getfd(self.pidfd.as_fd(), number)
    }
}

/// What can be opened of processes before they are stopped: none of it tells anything of them until it is read.
#[derive(Debug, Default)]
pub struct Ahead(Vec<Table>);

impl Ahead {
    /// Opens it for the processes of a group, up to a bound. What has ended by then, or cannot be opened, is left out.
    pub fn open(group: &Path, excluded: pid_t) -> Self {
        let pids = Lists::open(group).and_then(|lists| lists.processes()).unwrap_or_default();
        let pids = pids.into_iter().filter(|pid| *pid != excluded).take(MAX_AHEAD);
        Self(pids.filter_map(|pid| Table::open(pid, pid).ok()).collect())
    }

    /// The table of a stopped task, and the numbers in use.
    pub(super) fn take(&mut self, pid: pid_t, tid: pid_t) -> io::Result<(Table, Vec<i32>)> {
        if let Some(at) = self.0.iter().position(|table| table.tid == tid) {
            let mut table = self.0.swap_remove(at);
            // Not that of another task which has got the number since: one that is gone cannot be read.
            if let Ok(numbers) = table.numbers() {
                return Ok((table, numbers));
            }
        }
        Table::open_with_numbers(pid, tid)
    }
}

/// Descriptor tables, each known by a task that has it.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// In kcmp's order, with the number of each.
    known: Vec<(pid_t, usize)>,
}

impl Tables {
    /// The number of a task's table, and whether no task before had it.
    pub(super) fn number(&mut self, tid: pid_t) -> io::Result<(usize, bool)> {
        match search(&self.known, |(known, _)| compare(*known, tid, Compared::Tables))? {
            Ok(at) => Ok((self.known[at].1, false)),
            Err(at) => {
                let number = self.known.len();
                self.known.insert(at, (tid, number));
                Ok((number, true))
            }
        }
    }
}

/// A thread that does not share what threads of a process share, and what that is.
pub(super) fn unshared(process: &Process) -> io::Result<Option<(pid_t, &'static str)>> {
    let tid = process.threads.first().map_or(process.pid, |thread| thread.tid);
    for thread in process.threads.iter().skip(1) {
        for (what, name) in [(Compared::Tables, "a descriptor table"), (Compared::Places, "a working directory")] {
            if compare(tid, thread.tid, what)? != Ordering::Equal {
                return Ok(Some((thread.tid, name)));
            }
        }
    }
    Ok(None)
}

/// Where in a sorted list something is, or where it belongs.
pub(super) fn search<T>(
    sorted: &[T],
    mut compare: impl FnMut(&T) -> io::Result<Ordering>,
) -> io::Result<Result<usize, usize>> {
    let (mut low, mut high) = (0, sorted.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        match compare(&sorted[middle])? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

/// The names of directory entries (`struct linux_dirent64`).
fn names(mut entries: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(entries.get(16..18)?.try_into().ok()?));
        let name = entries.get(19..len)?;
        entries = &entries[len..];
        Some(&name[..name.iter().position(|byte| *byte == 0)?])
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_was_opened_ahead_of_a_task_that_is_gone_is_not_taken_for_another_one() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let gone = i32::try_from(child.id()).unwrap();
        let mut table = Table::open(gone, gone).unwrap();
        assert!(table.numbers().unwrap().starts_with(&[0, 1, 2]));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(table.numbers().is_err());
        // As if this thread had got its number.
        let (pid, tid) = (nix::unistd::getpid().as_raw(), nix::unistd::gettid().as_raw());
        let mut ahead = Ahead(vec![Table { tid, ..table }]);
        let file = File::open("/dev/null").unwrap();
        let (table, numbers) = ahead.take(pid, tid).unwrap();
        assert!(numbers.contains(&file.as_raw_fd()) && ahead.0.is_empty());
        assert!(matches!(table.link(file.as_raw_fd()).unwrap(), Link::Path(path) if path == b"/dev/null"));
    }

    #[test]
    fn a_long_list_of_descriptors_is_read_whole_and_in_order() {
        let files: Vec<_> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        let (pid, tid) = (nix::unistd::getpid().as_raw(), nix::unistd::gettid().as_raw());
        let numbers = Table::open(pid, tid).unwrap().numbers().unwrap();
        assert!(numbers.is_sorted() && files.iter().all(|file| numbers.binary_search(&file.as_raw_fd()).is_ok()));
    }
}
