//! Why processes were not stopped, or a call not injected. Refusals name what stands in the way; the rest is failure.

use std::io;
use std::path::PathBuf;

use libc::pid_t;

use super::whereabouts::Whereabouts;

/// Processes were not stopped. All of them run on as if nothing had happened.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Something about the processes stands in the way.
    #[error(transparent)]
    Refused(#[from] StopRefusal),
    /// The group of processes could not be read.
    #[error("{op} {path}: {source}", path = path.display())]
    Group {
        /// What was being done.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// The kernel denied the engine a step.
    #[error("{op} thread {tid} of process {pid}: {source}")]
    Thread {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The thread.
        tid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// The tracer thread could not be set up.
    #[error("{op}: {source}")]
    Tracer {
        /// What was being done.
        op: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// The work on the stopped processes panicked. The tracer thread ended, so everything runs on.
    #[error("the tracer thread panicked; the processes were let go")]
    Panicked,
}

/// What about the processes prevents a stop.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopRefusal {
    /// A debugger inside holds it.
    #[error("process {pid} is traced by process {tracer}; detach that debugger first")]
    TracedInside {
        /// The process.
        pid: pid_t,
        /// Who traces it (host PID).
        tracer: pid_t,
    },
    /// It waits for its vfork child, which neither executed a program nor ended within the deadline.
    #[error("process {pid} (thread {tid}) waits for its vfork child to exec or exit; try again later")]
    VforkInFlight {
        /// The process.
        pid: pid_t,
        /// The thread.
        tid: pid_t,
    },
    /// It did not stop within the deadline.
    #[error("thread {tid} of process {pid} did not stop: state {state}, system call {call}, waits in {wchan}")]
    Uninterruptible {
        /// The process.
        pid: pid_t,
        /// The thread.
        tid: pid_t,
        /// The letter of `/proc/TID/stat`.
        state: char,
        /// Number of the system call, -1 if not known.
        call: i64,
        /// Where in the kernel, as far as it tells.
        wchan: String,
    },
    /// New processes or threads kept appearing until the deadline.
    #[error("new threads kept appearing: {n_threads} were stopped when the time was over")]
    Unsettled {
        /// How many had been stopped.
        n_threads: usize,
    },
}

/// A call was not injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// Something about the process stands in the way; it is unchanged.
    #[error(transparent)]
    Refused(#[from] InjectRefusal),
    /// The thread is gone, killed from outside.
    #[error("thread {tid} of process {pid} is gone: killed while it was stopped")]
    Gone {
        /// The process.
        pid: pid_t,
        /// The thread.
        tid: pid_t,
    },
    /// The injected code was hit by a signal that only a fault in it causes. The registers are restored.
    #[error("injected code in process {pid} got signal {signal} at {at:#x}; its registers are restored")]
    Fault {
        /// The process.
        pid: pid_t,
        /// Number of the signal.
        signal: i32,
        /// Address of the instruction.
        at: u64,
    },
    /// An injected call did not return within the deadline and was given up. The registers are restored.
    #[error("injected call {index} in process {pid} did not return in time and was interrupted")]
    Blocked {
        /// The process.
        pid: pid_t,
        /// Which call of the batch; those before it were made.
        index: usize,
    },
    /// What it made for the engine, a helper or a thread, did not come as far as it had to, and was killed.
    #[error("what process {pid} made for the engine did not {step} in time: {helper}; its maker: {maker}")]
    Late {
        /// The process.
        pid: pid_t,
        /// What was waited for.
        step: &'static str,
        /// What was made.
        helper: Box<Whereabouts>,
        /// The thread that made it.
        maker: Box<Whereabouts>,
    },
    /// A thread is still in injected code of an engine that died, and does not come out of it.
    #[error("leave what an engine that died injected: {0}")]
    Orphan(#[source] StopError),
    /// The kernel denied the engine a step.
    #[error("{op} thread {tid} of process {pid}: {source}")]
    Thread {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The thread.
        tid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
}

/// What about a process prevents injection.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InjectRefusal {
    /// Not among the stopped processes.
    #[error("process {pid} is not among the stopped ones")]
    NotStopped {
        /// The process.
        pid: pid_t,
    },
    /// Its code is not x86-64.
    #[error("process {pid} runs 32-bit code")]
    ForeignArchitecture {
        /// The process.
        pid: pid_t,
    },
    /// It handles or waits for every signal that could tell the engine that a batch is done.
    #[error("process {pid} leaves no signal unhandled that could mark the end of injected code")]
    NoMarker {
        /// The process.
        pid: pid_t,
    },
    /// The few hundred bytes that the first injection needs were not found.
    #[error("process {pid} has no room for injected code in its vdso")]
    NoPlace {
        /// The process.
        pid: pid_t,
    },
    /// The process may not map the engine's area.
    #[error("process {pid} cannot map the engine's area: error {errno} (RLIMIT_AS, RLIMIT_DATA, a memory limit?)")]
    AreaDenied {
        /// The process.
        pid: pid_t,
        /// The kernel's error number.
        errno: i64,
    },
    /// Its extended registers do not fit into the area.
    #[error("the extended registers of process {pid} take {len_bytes} bytes, more than the area holds")]
    BigState {
        /// The process.
        pid: pid_t,
        /// How many.
        len_bytes: usize,
    },
}
