//! Why something of a process was not read, or not put back.

use std::io;

use libc::pid_t;

use super::Impossible;
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
    /// A call returned what it never does.
    #[error("{call} in process {pid} returned {result}")]
    Unclear {
        /// Its name.
        call: &'static str,
        /// The process.
        pid: pid_t,
        /// What it returned.
        result: i64,
    },
    /// `status` of a thread is not as known.
    #[error("the status of a thread of process {pid} has no usable {field}")]
    Status {
        /// The process.
        pid: pid_t,
        /// What was looked for.
        field: &'static str,
    },
    /// It keeps keys in a keyring that no checkpoint can hold.
    #[error("process {pid} has a keyring of {whose}, which a checkpoint cannot hold; revoke it by keyctl(2)")]
    Keyring {
        /// The process.
        pid: pid_t,
        /// Whose the keyring is.
        whose: &'static str,
    },
    /// There is no way back.
    #[error(transparent)]
    Impossible(#[from] Impossible),
    /// All calls succeeded, and it is not what it was.
    #[error("process {pid} was put back, and its {what} is not what it was")]
    Differs {
        /// The process.
        pid: pid_t,
        /// What.
        what: &'static str,
    },
    /// It has other threads than at the checkpoint.
    #[error("process {pid} has other threads than it had")]
    Threads {
        /// The process.
        pid: pid_t,
    },
}

impl StateError {
    /// Whether something about the process stands in the way, and no failure of the machine.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Inject(error) => matches!(error, InjectError::Refused(_)),
            Self::Keyring { .. } | Self::Impossible(_) | Self::Threads { .. } => true,
            _ => false,
        }
    }
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
