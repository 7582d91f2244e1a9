//! A template that is there: found again after an engine's death, removed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::pid_t;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{TemplateError, TemplateRefusal, process};
use super::freezer::Freezer;
use super::gauge::Gauge;
use super::source::{Learnt, Pages};
use crate::sys::process::{pidfd_open, pidfd_send_signal};

/// A frozen copy of a process. It outlives this handle, and the engine.
#[derive(Debug)]
pub struct Template {
    pid: pid_t,
    pidfd: Arc<OwnedFd>,
    freezer: Freezer,
    learnt: Arc<Learnt>,
}

impl Template {
    /// The one in `freezer`; `None` if that is empty: its template was lost, or never came to be.
    ///
    /// # Errors
    /// The cgroup cannot be read, or holds more than one process.
    pub fn find(freezer: Freezer) -> Result<Result<Self, Freezer>, TemplateError> {
        match freezer.processes()?.as_slice() {
            [] => Ok(Err(freezer)),
            &[pid] => {
                let pidfd = Arc::new(pidfd_open(pid).map_err(process("open", pid))?);
                // The number may have passed to another between the two steps; then it is not here any more.
                if freezer.processes()? != [pid] {
                    return Ok(Err(freezer));
                }
                Ok(Ok(Self { pid, pidfd, freezer, learnt: Arc::default() }))
            }
            many => Err(TemplateRefusal::Occupied { n_processes: many.len() }.into()),
        }
    }

    /// Its host PID.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Its cgroup.
    pub fn freezer(&self) -> &Freezer {
        &self.freezer
    }

    /// What tells its weight.
    pub fn gauge(&self) -> Gauge {
        Gauge::of(self.pid, Arc::clone(&self.pidfd))
    }

    /// Where its pages are found, and what is known of them.
    pub(super) fn pages(&self) -> io::Result<(Pages, Arc<Learnt>)> {
        Ok((Pages::of(self.pid)?, self.learnt.clone()))
    }

    /// Whether it lives (it may have been killed from outside).
    ///
    /// # Errors
    /// It could not be asked.
    pub fn lives(&self) -> Result<bool, TemplateError> {
        Ok(!self.shows(PollFlags::POLLIN, Duration::ZERO)?)
    }

    /// Tells it to end, whatever state it is in.
    pub(super) fn put_down(&self) {
        // A failure means that it is gone.
        let _ = pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Kills it and waits for its end; the empty cgroup is given back. Its parent reaps it.
    ///
    /// # Errors
    /// It did not end before the deadline, and is still being killed.
    pub fn kill(self, patience: Duration) -> Result<Freezer, TemplateError> {
        self.end(patience, PollFlags::POLLIN)
    }

    /// As [`Template::kill`], and waits until its parent has reaped it: its number is free then.
    pub(super) fn kill_and_wait(self, patience: Duration) -> Result<Freezer, TemplateError> {
        // Hanging up is always told.
        self.end(patience, PollFlags::empty())
    }

    fn end(self, patience: Duration, sign: PollFlags) -> Result<Freezer, TemplateError> {
        // Not by cgroup.kill: see `Freezer`. It may have been killed already.
        match pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(process("kill", self.pid)(error)),
            _ => {}
        }
        if !self.shows(sign, patience)? {
            return Err(process("end", self.pid)(io::Error::from(io::ErrorKind::TimedOut)));
        }
        Ok(self.freezer)
    }

    /// Kills it and removes its cgroup.
    ///
    /// # Errors
    /// As [`Template::kill`]; the cgroup remains.
    pub fn remove(self, patience: Duration) -> Result<(), TemplateError> {
        self.kill(patience)?.remove()
    }

    fn shows(&self, sign: PollFlags, patience: Duration) -> Result<bool, TemplateError> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.pidfd.as_fd(), sign)], timeout) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(process("wait for", self.pid)(error)),
            }
        }
    }
}
