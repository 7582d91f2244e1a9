//! A helper: a process that a stopped one makes for the engine. It shares its memory, makes calls of its own and ends.
//!
//! ```text
//! process            clone3 -----------------------------------------------> wait4(helper); its other calls
//! helper                  born, traced: calls ...; marker --stop--> calls ...; exit_group
//! engine                  queues the marker                 attends          reaps it
//! ```
//!
//! The engine dies: the helper runs on, with the process's filter, to the first call that fails or its end, and the
//! process reaps it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use libc::pid_t;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::area::CALL_BYTES;
use super::error::InjectError;
use super::inject::{BATCH_PATIENCE, Call, Hand, Reached, TICK};
use super::patience::Patience;
use super::tasks;
use super::whereabouts::Whereabouts;
use crate::fault;
use crate::sys::blob::{AREA_BYTES, AREA_CALLS, AREA_HELPER};
use crate::sys::process::pidfd_open;
use crate::sys::ptrace::{queue_signal, resume, wait_thread};

/// Calls of the process itself in a batch with a helper: they reach into the scratch room.
pub(super) const N_CALLS: usize = (AREA_HELPER - AREA_CALLS) / CALL_BYTES;
/// Calls of a helper.
const N_HELPER_CALLS: usize = 16;
/// Room for what pointers of both point at, after the helper's calls.
pub(super) const DATA: usize = AREA_HELPER + N_HELPER_CALLS * CALL_BYTES;
const _: () = assert!(DATA + 2048 <= AREA_BYTES, "the data has room");

/// So long a helper is kept on the process's CPU (chosen: it needs 0.1 ms for 10 MB; with a busy one the turn of each other
/// takes 3 ms). After that it goes wherever there is a CPU.
const KEPT: Duration = Duration::from_millis(20);

/// What became of a batch with a helper.
pub(super) struct Ran<E> {
    /// Results of the process's calls.
    pub(super) results: Vec<i64>,
    /// Of the helper's: it ends after the first that failed, and those that it did not come to are 0.
    pub(super) helper: Vec<i64>,
    /// `None`: there was no helper, or it failed before its marker.
    pub(super) attended: Option<Result<(), E>>,
    /// The CPUs that its children are to have, if it had others.
    pub(super) cpus: Option<CpuSet>,
}

/// How a helper stops.
pub(super) enum Seen {
    Birth,
    Marker,
    Other,
    End,
}

impl Hand<'_> {
    /// Makes `calls` in one batch, up to [`N_CALLS`]. One of them is a clone3 with CLONE_VM and exit signal 0, its
    /// child makes `helper`'s calls: one unblocks the marker, at which `attend` is called with a pidfd of the
    /// helper; the last is exit_group. A later one of `calls` must reap it.
    ///
    /// # Errors
    /// As [`Hand::run`]. The helper is gone.
    pub(super) fn run_with_helper<E>(
        &mut self,
        calls: &[Call],
        helper: &[Call],
        attend: impl FnOnce(BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<Ran<E>, InjectError> {
        assert!(calls.len() <= N_CALLS && helper.len() <= N_HELPER_CALLS, "a batch that fits");
        let mut bytes: Vec<u8> = helper.iter().flat_map(bytes_of).collect();
        self.write(self.area + AREA_HELPER as u64, &bytes)?;
        self.set_options(libc::PTRACE_O_SUSPEND_SECCOMP | libc::PTRACE_O_TRACECLONE)?;
        let ran = self.begin_batch(calls, (self.area, &[]), &mut bytes).and_then(|()| self.go_on());
        let mut cpus = None;
        let attended = match ran {
            Ok(Reached::Birth(child)) => {
                cpus = self.keep_here(child);
                let attended = self.attend(child, cpus, attend);
                self.finish_batch().and(attended)
            }
            Ok(Reached::Marker) => {
                self.batch_is_finished();
                Ok(None)
            }
            Err(error) => Err(error),
        };
        self.set_options(libc::PTRACE_O_SUSPEND_SECCOMP)?;
        let attended = attended?;
        let results = self.read_results(AREA_CALLS, calls.len())?;
        let helper = self.read_results(AREA_HELPER, helper.len())?;
        Ok(Ran { results, helper, attended, cpus })
    }

    /// Where call `index` of a batch lies.
    pub(super) fn call_address(&self, index: usize) -> u64 {
        self.area + (AREA_CALLS + index * CALL_BYTES) as u64
    }

    /// A set of the marker.
    pub(super) fn marker_set(&self) -> u64 {
        1 << (self.marker - 1)
    }

    pub(super) fn read_results(&self, at: usize, n_calls: usize) -> Result<Vec<i64>, InjectError> {
        let mut bytes = vec![0; n_calls * CALL_BYTES];
        self.read(self.area + at as u64, &mut bytes)?;
        let result = |call: &[u8]| call[CALL_BYTES - 8..].try_into().map_or(-1, i64::from_le_bytes);
        Ok(bytes.chunks_exact(CALL_BYTES).map(result).collect())
    }

    /// From the helper's birth to its end; `None` if that came before its marker.
    fn attend<E>(
        &mut self,
        child: pid_t,
        cpus: Option<CpuSet>,
        attend: impl FnOnce(BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<Option<Result<(), E>>, InjectError> {
        let timed = |hand: &Self, source| hand.error("time a helper of", source);
        self.stopped.alarm.listen(KEPT, TICK).map_err(|source| timed(self, source))?;
        let mut wait = Wait::new("stop at its birth", cpus);
        let attended = self.raise(child, &mut wait).and_then(|is_there| {
            if !is_there {
                return Ok(None);
            }
            let pidfd = pidfd_open(child).map_err(|source| self.error("open a helper of", source))?;
            let attended = attend(pidfd.as_fd());
            fault::point("template.attended").map_err(|source| self.error("attend a helper of", source))?;
            resume(child, 0).map_err(|source| self.error("resume a helper of", source))?;
            wait.step = "make a copy, and end";
            while !matches!(self.see(child, &mut wait)?, Seen::End) {
                resume(child, 0).map_err(|source| self.error("resume a helper of", source))?;
            }
            Ok(Some(attended))
        });
        if attended.is_err() {
            self.put_down(child);
        }
        self.stopped.alarm.deafen().map_err(|source| timed(self, source))?;
        attended
    }

    /// Keeps a newborn helper on the tracer's CPU, which is the process's; the CPUs that it had before. Left to itself the
    /// kernel lets it begin on the idlest CPU: with both busy it waited there, and the memory that it copies is in this
    /// one's cache. `None`: it goes where it likes.
    fn keep_here(&self, child: pid_t) -> Option<CpuSet> {
        let mut here = CpuSet::new();
        here.set(self.stopped.pinned?).ok()?;
        let before = sched_getaffinity(Pid::from_raw(child)).ok()?;
        sched_setaffinity(Pid::from_raw(child), &here).ok().map(|()| before)
    }

    /// From its birth to its marker; `false` if it ended before.
    fn raise(&self, child: pid_t, wait: &mut Wait) -> Result<bool, InjectError> {
        while !matches!(self.see(child, wait)?, Seen::Birth) {
            resume(child, 0).map_err(|source| self.error("resume a helper of", source))?;
        }
        fault::point("template.born").map_err(|source| self.error("raise a helper of", source))?;
        queue_signal(child, child, self.marker, 0).map_err(|source| self.error("queue a signal for", source))?;
        wait.step = "come to its marker";
        loop {
            resume(child, 0).map_err(|source| self.error("resume a helper of", source))?;
            match self.see(child, wait)? {
                Seen::Marker => return Ok(true),
                Seen::Birth | Seen::Other => {}
                Seen::End => return Ok(false),
            }
        }
    }

    pub(super) fn see(&self, child: pid_t, wait: &mut Wait) -> Result<Seen, InjectError> {
        loop {
            let status = match wait_thread(child, 0) {
                Ok(Some(status)) => status,
                Ok(None) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    if wait.is_over(child) {
                        let [helper, maker] = [child, self.tid].map(|tid| Box::new(Whereabouts::look(tid)));
                        return Err(InjectError::Late { pid: self.pid, step: wait.step, helper, maker });
                    }
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(Seen::End),
                Err(error) => return Err(self.error("wait for a helper of", error)),
            };
            return Ok(match status {
                _ if !libc::WIFSTOPPED(status) => Seen::End,
                _ if status >> 16 == libc::PTRACE_EVENT_STOP => Seen::Birth,
                _ if status >> 16 == 0 && libc::WSTOPSIG(status) == self.marker => Seen::Marker,
                _ => Seen::Other,
            });
        }
    }

    /// Kills a helper. What it was in the middle of (copying a big memory) is done first.
    fn put_down(&self, child: pid_t) {
        // It may have ended; whatever else fails, the process waits for it and is told as blocked.
        let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        let mut wait = Wait::new("end", None);
        while matches!(self.see(child, &mut wait), Ok(Seen::Birth | Seen::Marker | Seen::Other)) {}
    }
}

/// A wait for a helper.
pub(super) struct Wait {
    /// What it is to do.
    step: &'static str,
    begun: Instant,
    patience: Patience,
    /// The CPUs that it is to have if it does not come.
    cpus: Option<CpuSet>,
}

impl Wait {
    pub(super) fn new(step: &'static str, cpus: Option<CpuSet>) -> Self {
        let begun = Instant::now();
        Self { step, begun, patience: Patience::new(begun, BATCH_PATIENCE), cpus }
    }

    /// It was interrupted: lets the helper go to where there is a CPU; whether it is to be given up.
    fn is_over(&mut self, child: pid_t) -> bool {
        let now = Instant::now();
        if now >= self.begun + KEPT
            && let Some(cpus) = self.cpus.take()
        {
            // Should it fail, it goes on where it is.
            let _ = sched_setaffinity(Pid::from_raw(child), &cpus);
        }
        let state = || tasks::read_stat(child, child).ok().flatten().map_or('-', |stat| stat.state);
        self.patience.is_over(now, state)
    }
}

pub(super) fn bytes_of(call: &Call) -> Vec<u8> {
    let mut bytes = call.nr.to_le_bytes().to_vec();
    bytes.extend(call.args.iter().flat_map(|arg| arg.to_le_bytes()));
    bytes.extend([0; 8]);
    bytes
}
