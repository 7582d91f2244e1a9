//! Stopped processes from one root to another: descriptors, working directories, mappings, locks.
//!
//! ```text
//!  Ahead::open   while they run still: what can be opened of them
//!  Plan::make    what of each process lies on the old mount; each open file description once
//!  Plan::open    the same on the next root: opened by the engine, which no file's permissions stop
//!  (pivot)
//!  commit        per process: a socket, the descriptions through it, one batch of dup3, fchdir, mmap
//! ```
//! A batch runs to its end even if the engine dies, so a process has either all of it or nothing, and what is still on
//! the old mount shows what is left to do.
//!
//! Knows mounts only by number and descriptor, layers not at all.

mod error;
mod fifo;
mod find;
mod gifts;
mod give;
pub(in crate::deltacr) mod listener;
mod open;
mod unlinked;
mod watcher;
mod writers;

use std::ffi::CString;
use std::os::fd::OwnedFd;

use libc::pid_t;

pub use super::table::Ahead;
pub use error::{RebaseError, RebaseRefusal};
pub use open::Opened;
pub use writers::find_private_writer;

use super::fdinfo::{FdInfo, Lock, Target};
use super::place::Place;
use super::stop::Stopped;
use super::table::Table;
use listener::Listener;
use watcher::Watcher;

/// What is to become of a file that the next root does not have under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The old mount is to be sealed: writers go on with a copy. (On the next root only unlinked files are missing.)
    Copied,
    /// The old mount stays writable for those that hold it.
    Left,
    /// As `Copied`, after an engine died in the middle of a move: what programs have written to the old mount since is
    /// carried over, where that engine had copied the file already.
    CopiedLate,
}

/// What has to be moved, found by [`Plan::make`]. Holds copies of the descriptions.
#[derive(Debug)]
pub struct Plan {
    seats: Vec<Seat>,
    descriptions: Vec<Description>,
}

/// A stopped process that something has to be done in.
#[derive(Debug)]
struct Seat {
    pid: pid_t,
    /// Its first thread.
    tid: pid_t,
    /// The same in `/proc`, and as a pidfd.
    table: Table,
    /// Descriptors to be replaced, unless another seat shares the table.
    holdings: Vec<Holding>,
    /// All descriptor numbers in use, sorted.
    numbers: Vec<i32>,
    /// Locks of the process, and the description whose file they are on.
    locks: Vec<(usize, Lock)>,
    /// Its epoll instances.
    epolls: Vec<(i32, Vec<Target>)>,
    /// Its working directory, if that has to be changed.
    cwd: Option<(Place, Option<OwnedFd>)>,
    mappings: Vec<Mapping>,
}

/// A directory that a process has open for reading.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpenDirectory {
    pid: pid_t,
    /// The descriptor's.
    number: i32,
    path: CString,
}

impl OpenDirectory {
    /// Host PID of the process.
    pub fn pid(&self) -> pid_t {
        self.pid
    }
}

/// A descriptor.
#[derive(Clone, Copy, Debug)]
struct Holding {
    number: i32,
    close_on_exec: bool,
    /// Index into the plan's descriptions.
    description: usize,
}

/// An open file description.
#[derive(Debug)]
struct Description {
    /// The engine's copy; gone once all processes have the new one.
    old: Option<OwnedFd>,
    place: Place,
    info: FdInfo,
    kind: Kind,
    /// The same on the next root; without it the old one stays in use.
    new: Option<OwnedFd>,
}

/// How a description depends on the old mount.
#[derive(Debug)]
enum Kind {
    /// It is a file of it.
    File,
    /// Its name is a file of it.
    Listener(Listener),
    /// It watches files of it.
    Watcher(Watcher),
}

/// A shared mapping of a file.
#[derive(Debug)]
struct Mapping {
    start: u64,
    len_bytes: u64,
    /// `PROT_*`.
    protection: u64,
    offset_bytes: u64,
    /// Its file was open for writing.
    writable: bool,
    locked: bool,
    place: Place,
    /// A name for the file that needs no path.
    old: OwnedFd,
    new: Option<OwnedFd>,
}
