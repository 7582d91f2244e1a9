//! Why processes were not moved to another root.

use std::io;

use libc::pid_t;

use crate::deltacr::HandoverError;

/// A failure. What was done before it is the caller's to undo.
#[derive(Debug, thiserror::Error)]
pub enum RebaseError {
    /// Something that a process has cannot be moved.
    #[error(transparent)]
    Refused(#[from] RebaseRefusal),
    /// A step failed.
    #[error("{op} of process {pid}: {source}")]
    Process {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// A file could not be opened on the next root.
    #[error("{op} {path}: {source}")]
    File {
        /// What was being done.
        op: &'static str,
        /// The file, as programs name it.
        path: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// A process could not be given what was opened for it.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

/// What a process has that cannot be moved.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RebaseRefusal {
    /// A thread does not share what threads of a process share.
    #[error("thread {tid} of process {pid} has {what} of its own")]
    Unshared {
        /// The process.
        pid: pid_t,
        /// The thread.
        tid: pid_t,
        /// A descriptor table, or a working directory.
        what: &'static str,
    },
    /// Its root is not the sandbox's.
    #[error("process {pid} has another root than its sandbox")]
    Root {
        /// The process.
        pid: pid_t,
    },
    /// Messages with descriptors wait in a socket.
    #[error("descriptor {number} of process {pid} is a Unix socket with {n} descriptors on their way")]
    InFlight {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// How many.
        n: u32,
    },
    /// Connections wait to be accepted.
    #[error("descriptor {number} of process {pid} has connections that it has not accepted yet")]
    Pending {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
    },
    /// Events wait to be read.
    #[error("descriptor {number} of process {pid} has inotify events that nobody has read yet")]
    Unread {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
    },
    /// A datagram socket with a name.
    #[error("descriptor {number} of process {pid} is a datagram socket with the name {name}")]
    NamedDatagrams {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// Its path.
        name: String,
    },
    /// A listening socket whose address does not say where it is.
    #[error("descriptor {number} of process {pid} listens at {name}, which its address no longer leads to")]
    Address {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// Its path.
        name: String,
    },
    /// A watch whose file is not known.
    #[error("descriptor {number} of process {pid}: what inotify watch {watch} is on cannot be found")]
    Watch {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// Number of the watch.
        watch: i32,
    },
    /// A private mapping of a file that was open for writing.
    #[error("process {pid} maps {name} at {start:#x} as its private copy, and had opened it for writing")]
    PrivateWriter {
        /// The process.
        pid: pid_t,
        /// First address of the mapping.
        start: u64,
        /// The file, as programs name it.
        name: String,
    },
    /// A lease or another lock that only the kernel can make.
    #[error("descriptor {number} of process {pid} holds a lease")]
    Lease {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
    },
}

impl RebaseRefusal {
    /// Whether it passes by itself, as soon as the programs have run a little.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::InFlight { .. } | Self::Pending { .. } | Self::Unread { .. })
    }
}
