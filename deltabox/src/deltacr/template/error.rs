//! Why there is no template, or memory was not put back.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use libc::pid_t;

use crate::deltacr::InjectError;

/// A failure.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// Something about the process stands in the way.
    #[error(transparent)]
    Refused(#[from] TemplateRefusal),
    /// No call could be made inside the process.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A step outside the process failed.
    #[error("{op} process {pid}: {source}")]
    Process {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// A call inside the process, or inside the helper that it made, failed.
    #[error("{call} in process {pid}: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// The template's cgroup.
    #[error("{op} {path}: {source}", path = path.display())]
    Group {
        /// What was being done.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

/// What about a process prevents a template, or a return to one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateRefusal {
    /// The kernel lets the process make no other one.
    #[error("process {pid} may not make another process (RLIMIT_NPROC or a limit on processes)")]
    TooManyProcesses {
        /// The process.
        pid: pid_t,
    },
    /// The kernel has no memory for a copy, or may not promise it.
    #[error("no memory for a copy of process {pid} (overcommit, a memory limit)")]
    NoMemory {
        /// The process.
        pid: pid_t,
    },
    /// The helper had no descriptors.
    #[error("process {pid} may open fewer than 3 files (RLIMIT_NOFILE)")]
    TooFewDescriptors {
        /// The process.
        pid: pid_t,
    },
    /// The number is not free (yet).
    #[error("process number {number} is taken")]
    NumberTaken {
        /// As in the process's PID namespace.
        number: pid_t,
    },
    /// A number outside the namespace's range.
    #[error("process number {number} lies above the namespace's pid_max")]
    NumberTooHigh {
        /// As in the process's PID namespace.
        number: pid_t,
    },
    /// The process lacks a right of its own: to choose a number, or to enter the cgroup.
    #[error("process {pid} may not choose a number (CAP_CHECKPOINT_RESTORE) or enter the template's cgroup")]
    Denied {
        /// The process.
        pid: pid_t,
    },
    /// Another process runs on the same memory.
    #[error("processes {pid} and {other} share their memory")]
    SharedMemory {
        /// The process.
        pid: pid_t,
        /// The other.
        other: pid_t,
    },
    /// A mapping of a kind of which there is no copy.
    #[error("process {pid} maps {kind} at {start:#x}")]
    Mapping {
        /// The process.
        pid: pid_t,
        /// What it is.
        kind: &'static str,
        /// Its first address.
        start: u64,
    },
    /// More than one batch of calls would take.
    #[error("process {pid} has {n_mappings} mappings with DONTFORK, WIPEONFORK or shared writable pages")]
    TooManyAdvised {
        /// The process.
        pid: pid_t,
        /// How many ranges.
        n_mappings: usize,
    },
    /// Who became the template's parent is not who should have.
    #[error("the template of process {pid} became a child of {parent}")]
    Parent {
        /// The process.
        pid: pid_t,
        /// Who adopted it (host PID).
        parent: pid_t,
    },
    /// The cgroup holds something already.
    #[error("the template's cgroup has {n_processes} processes")]
    Occupied {
        /// How many.
        n_processes: usize,
    },
    /// The template is gone.
    #[error("the template {pid} is gone")]
    TemplateGone {
        /// Its host PID.
        pid: pid_t,
    },
    /// Another version of the engine made the template.
    #[error("the template {pid} has another engine's code in it")]
    ForeignTemplate {
        /// Its host PID.
        pid: pid_t,
    },
    /// Its parent is in another session than it was in, which it would inherit.
    #[error("process {pid} cannot be made again in session {session}: its parent is not in it")]
    Session {
        /// As in its PID namespace.
        pid: pid_t,
        /// Its session, as there.
        session: pid_t,
    },
    /// Nobody is in the process group that it was in.
    #[error("process {pid} cannot be made again in process group {group}: nobody of its session is in it")]
    Group {
        /// As in its PID namespace.
        pid: pid_t,
        /// Its group, as there.
        group: pid_t,
    },
    /// The kernel's own pages cannot be brought to where they were.
    #[error("the kernel's pages of process {pid} are others than recorded")]
    KernelsPages {
        /// The process.
        pid: pid_t,
    },
    /// It did not end as recorded, or its parent let nothing remain of it.
    #[error("process {pid} cannot be made again as a zombie: {why}")]
    Zombie {
        /// As in its PID namespace.
        pid: pid_t,
        /// What stands in the way.
        why: &'static str,
    },
    /// It is not the recorded process, or not stopped.
    #[error("process {pid} is not stopped, or not the one whose threads were recorded")]
    Threads {
        /// The process.
        pid: pid_t,
    },
    /// Its first thread has ended, others live: nobody can make such a process.
    #[error("the first thread of process {pid} has ended before the others")]
    LeaderEnded {
        /// The process.
        pid: pid_t,
    },
    /// A thread that would have to be made had other rights than the one that would make it.
    #[error("thread {tid} of process {pid} had other rights (user, capabilities, filters) than the first one has now")]
    ThreadRights {
        /// The process.
        pid: pid_t,
        /// The thread, as inside.
        tid: pid_t,
    },
    /// A mapping that is not there any more and that cannot be made again.
    #[error("process {pid} had {kind} at {start:#x}, which cannot be mapped again")]
    Lost {
        /// The process.
        pid: pid_t,
        /// What it was.
        kind: &'static str,
        /// Its first address.
        start: u64,
    },
    /// After all steps the mappings are still not those recorded.
    #[error("the mappings of process {pid} are not those recorded at {start:#x} to {end:#x}", start = range.start, end = range.end)]
    Unequal {
        /// The process.
        pid: pid_t,
        /// The first that differs.
        range: Range<u64>,
    },
}

pub(super) fn process<E: Into<io::Error>>(op: &'static str, pid: pid_t) -> impl Fn(E) -> TemplateError + Copy {
    move |source| TemplateError::Process { op, pid, source: source.into() }
}

/// The error number in a call's result.
pub(super) fn errno(result: i64) -> Option<i32> {
    (-4095..0).contains(&result).then(|| i32::try_from(-result).unwrap_or(libc::EIO))
}

pub(super) fn check(pid: pid_t, call: &'static str, result: i64) -> Result<(), TemplateError> {
    match errno(result) {
        None => Ok(()),
        Some(errno) => Err(TemplateError::Call { call, pid, source: io::Error::from_raw_os_error(errno) }),
    }
}
