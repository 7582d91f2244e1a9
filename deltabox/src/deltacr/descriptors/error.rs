//! Why descriptors were not read, or not given back.

use std::io;

use libc::pid_t;

use crate::deltacr::HandoverError;
use crate::deltacr::objects::ObjectError;

/// A failure.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// Something that a process has cannot be kept, or not be had again.
    #[error(transparent)]
    Refused(#[from] DescriptorRefusal),
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
    /// What is behind a descriptor, or was.
    #[error("descriptor {number} of process {pid}: {source}")]
    Object {
        /// The process.
        pid: pid_t,
        /// The descriptor; -1 for all of a terminal's.
        number: i32,
        /// What went wrong.
        source: ObjectError,
    },
    /// A file could not be opened again.
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

/// What a process has that a checkpoint cannot hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorRefusal {
    /// A kind that is not known how to make again.
    #[error("descriptor {number} of process {pid} is {what} ({link}), which a checkpoint cannot hold")]
    Kind {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// What a human calls it.
        what: &'static str,
        /// What its link says.
        link: String,
    },
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
    /// A lease.
    #[error("descriptor {number} of process {pid} holds a lease")]
    Lease {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
    },
    /// What led out of the sandbox is not there any more.
    #[error("{link} led out of the sandbox, and nobody has its inner end any more")]
    Lost {
        /// What the link said.
        link: String,
    },
}
