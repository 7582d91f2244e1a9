//! A stopped task's descriptor table, read in as few calls as the kernel allows: it is read while programs stand still.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use libc::pid_t;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::fdinfo::FdInfo;
use crate::sys::process::{pidfd_getfd, pidfd_open_thread};

/// Open directories of `/proc/PID/task/TID`.
#[derive(Debug)]
pub(super) struct Table {
    links: Dir,
    infos: OwnedFd,
    task: OwnedFd,
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

impl Table {
    pub(super) fn open(pid: pid_t, tid: pid_t) -> io::Result<Self> {
        let path = |name: &str| format!("/proc/{pid}/task/{tid}/{name}");
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            links: Dir::open(path("fd").as_str(), flags, Mode::empty())?,
            infos: nix::fcntl::open(path("fdinfo").as_str(), flags, Mode::empty())?,
            task: pidfd_open_thread(tid)?,
            text: vec![0; 1024],
        })
    }

    /// The numbers in use, sorted.
    pub(super) fn numbers(&mut self) -> io::Result<Vec<i32>> {
        let mut numbers = Vec::new();
        for entry in self.links.iter() {
            numbers.extend(entry?.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(super) fn link(&self, number: i32) -> io::Result<Link> {
        let link = match readlinkat(&self.links, number.to_string().as_str()) {
            // Only a path can be longer than PATH_MAX.
            Err(Errno::ENAMETOOLONG) => return Ok(Link::TooLong),
            link => link?,
        };
        Ok(match link.as_bytes() {
            [b'/', ..] => Link::Path(link.into_vec()),
            bytes if PLAIN.iter().any(|plain| bytes.starts_with(plain)) => Link::Plain,
            _ => Link::Other,
        })
    }

    pub(super) fn info(&mut self, number: i32) -> io::Result<FdInfo> {
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
        let info = str::from_utf8(&self.text[..len_bytes]).ok().and_then(FdInfo::parse);
        info.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// A copy of the description.
    pub(super) fn copy(&self, number: i32) -> io::Result<OwnedFd> {
        pidfd_getfd(self.task.as_fd(), number)
    }

    /// The pidfd of the task.
    pub(super) fn into_task(self) -> OwnedFd {
        self.task
    }
}
