//! Why something of a process was not read, or not put back.

use std::io;

use libc::pid_t;

use crate::deltacr::InjectError;

/// A failure.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// No call could be made inside the process.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A step outside of it failed.
    #[error("{op} process {pid}: {source}")]
    Process {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// A call inside it failed.
    #[error("{call} in process {pid}: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// It has other threads than at the checkpoint.
    #[error("process {pid} has other threads than it had")]
    Threads {
        /// The process.
        pid: pid_t,
    },
}

/// The result of an injected call: negative is an error number.
pub(super) fn check(call: &'static str, pid: pid_t, result: i64) -> Result<i64, StateError> {
    if result >= 0 {
        return Ok(result);
    }
    let errno = i32::try_from(-result).unwrap_or(libc::EINVAL);
    Err(StateError::Call { call, pid, source: io::Error::from_raw_os_error(errno) })
}

pub(super) fn process(op: &'static str, pid: pid_t) -> impl FnOnce(io::Error) -> StateError {
    move |source| StateError::Process { op, pid, source }
}
