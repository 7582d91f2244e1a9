//! What processes hold: every descriptor of every one of them, read at a checkpoint, given back at a rollback.
//!
//! ```text
//!  checkpoint   Held::read      stopped: tables, each open file description once, working directories, locks
//!  rollback     Held::open      each description made again on the next root, by the engine; nothing has changed yet
//!               Opened::settle  what lives on at both ends is made what it was: terminals; what needs the processes
//!               Opened::give    per process: all it has is closed; what it had goes to its number
//!               Opened::finish  per process: what needs all others to be there
//! ```
//! A description is one object, however many descriptors of however many processes lead to it (kcmp tells), so sharing
//! survives. What leads out of the sandbox (the streams of a command, whose other ends init or the engine hold) is not
//! made again: whoever still has it gives a copy.
//!
//! Records name files by their path inside; they mean something together with the layers of their checkpoint alone.

mod donors;
mod error;
mod file;
mod give;
mod open;
mod read;
mod sockets;
mod terminals;

use std::collections::BTreeMap;
use std::ffi::CString;

use libc::pid_t;
use serde::{Deserialize, Serialize};

pub use error::{DescriptorError, DescriptorRefusal};
pub use open::Opened;

use super::fdinfo::Lock;
use super::objects::socket::Socket;
use super::objects::terminal::Terminal;
use super::objects::{Epoll, Eventfd, Fifo, Permissions, Pidfd, Pipe, Settings, Signalfd, Timerfd};
use super::shared::{Found, Key};

/// What links say behind the name of a file that has none any more.
const DELETED: &[u8] = b" (deleted)";

/// All that the processes of a sandbox hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    descriptions: Vec<Description>,
    pipes: Vec<Pipe>,
    fifos: Vec<(FifoName, Fifo)>,
    terminals: Vec<Terminal>,
    sockets: Vec<Socket>,
    tables: Vec<Vec<Slot>>,
    /// By PID inside.
    seats: BTreeMap<pid_t, Seat>,
}

/// One process's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seat {
    /// Which table is its.
    table: usize,
    cwd: Cwd,
    /// Locks of the process (fcntl(2)), and the description whose file they are on.
    locks: Vec<(usize, Lock)>,
}

/// A working directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Cwd {
    /// In the tree.
    Tree { path: CString },
    /// On another mount of the sandbox.
    Mount { path: CString },
    /// It had been removed.
    Gone(Gone),
}

/// A directory that had been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Gone {
    /// Which.
    key: Key,
    permissions: Permissions,
}

/// Where a FIFO is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum FifoName {
    /// In the tree.
    Path(CString),
    /// It had been unlinked.
    Gone(Permissions),
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Slot {
    number: i32,
    close_on_exec: bool,
    description: usize,
}

/// An open file description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    /// As open(2) takes them, without `O_CLOEXEC`.
    flags: i32,
    /// Bytes; of a directory: its own.
    position: i64,
    what: What,
    /// Of what is no file.
    settings: Option<Settings>,
}

/// What is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum What {
    /// A file of the tree.
    File {
        path: CString,
        /// `S_IFREG` and so on.
        kind: u32,
        /// Of the description.
        locks: Vec<Lock>,
        /// Of a directory that is being read: the names that its reader has not been given yet.
        unread: Option<Vec<Vec<u8>>>,
    },
    /// A file of another mount of the sandbox: a device, something in `/proc`.
    Mount {
        path: CString,
    },
    /// A memfd, whose content is kept apart.
    Memory {
        key: Key,
    },
    /// Something whose other end is outside; what its link in `/proc/PID/fd` says.
    Outside {
        link: Vec<u8>,
    },
    /// A file without a name, whose content is kept apart.
    Nameless {
        key: Key,
        /// Of the description.
        locks: Vec<Lock>,
    },
    /// A directory that had been removed.
    Gone(Gone),
    /// Description `end` of a FIFO.
    Fifo {
        fifo: usize,
        end: usize,
        /// Of the description.
        locks: Vec<Lock>,
    },
    /// Description `end` of a pipe.
    Pipe {
        pipe: usize,
        end: usize,
    },
    Eventfd(Eventfd),
    Timerfd(Timerfd),
    Signalfd(Signalfd),
    Pidfd(Pidfd),
    /// A Unix socket.
    Socket {
        socket: usize,
    },
    /// Who had it: PID inside, and number.
    Epoll {
        epoll: Epoll,
        holders: Vec<(pid_t, i32)>,
    },
    /// A side of a terminal.
    Terminal {
        terminal: usize,
        is_master: bool,
    },
    /// The slave of a terminal whose master is gone.
    DeadTerminal,
}

/// What was read, and what belongs to it.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) held: Held,
    /// Memory, and files without a name, that descriptors lead to.
    pub(super) memory: Vec<Found>,
    /// Host PID, PID inside and number of descriptors of which only the process itself can tell whether exec closes them:
    /// fdinfo shows the flag that the description was opened with (TIOCGPTPEER, Linux 6.18).
    pub(super) doubtful: Vec<(pid_t, pid_t, i32)>,
}

impl Held {
    /// Says of a descriptor whether exec closes it.
    pub(super) fn set_close_on_exec(&mut self, inside: pid_t, number: i32, close_on_exec: bool) {
        let Some(table) = self.seats.get(&inside).and_then(|seat| self.tables.get_mut(seat.table)) else { return };
        if let Some(slot) = table.iter_mut().find(|slot| slot.number == number) {
            slot.close_on_exec = close_on_exec;
        }
    }

    /// Whether a process (PID inside) has its table of descriptors together with another one (CLONE_FILES).
    pub(in crate::deltacr) fn shares_table(&self, inside: pid_t) -> bool {
        let table = |inside: pid_t| self.seats.get(&inside).map(|seat| seat.table);
        let own = table(inside);
        self.seats.keys().any(|other| *other != inside && table(*other) == own)
    }

    /// Open file descriptions, of all processes together.
    pub fn n_descriptions(&self) -> usize {
        self.descriptions.len()
    }
}
