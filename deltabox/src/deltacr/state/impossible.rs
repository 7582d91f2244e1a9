//! What the kernel does not give back: then a process has to be made again.

use libc::pid_t;

/// Why a process cannot become what it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("process {pid} (inside) cannot be what it was: {what} was {was}, is {is}")]
pub struct Impossible {
    /// Its PID inside.
    pub pid: pid_t,
    /// What of it.
    pub what: &'static str,
    /// At the checkpoint.
    pub was: String,
    /// Now.
    pub is: String,
}

/// Judges one process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    pub(super) pid: pid_t,
}

impl Judge {
    /// Fails unless there is a way.
    pub(super) fn unless(self, can: bool, what: &'static str, was: String, is: String) -> Result<(), Impossible> {
        if can { Ok(()) } else { Err(Impossible { pid: self.pid, what, was, is }) }
    }
}
