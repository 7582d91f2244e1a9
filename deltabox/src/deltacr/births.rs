//! Births and ends: what a stopped process makes for the engine is halted before its first instruction, and a thread
//! of it ends when the engine says so.
//!
//! ```text
//! thread     clone3 --event--> clone3 --event--> ... marker
//! newborn       born, traced: halted there, at the exit from clone3
//! ```
//! Its registers are then the batch code's: an engine that dies leaves it to the calls that were written for a helper,
//! of which the last ends it.

use std::io;

use libc::pid_t;
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::area::Place;
use super::error::InjectError;
use super::helper::{Seen, Wait, bytes_of};
use super::inject::{BATCH_PATIENCE, Call, Hand, Reached, TICK};
use super::stop::{Stopped, Thread};
use crate::sys::blob::AREA_HELPER;

/// What became of a batch of clone3 calls.
pub(super) struct Births {
    /// What each call returned.
    pub(super) results: Vec<i64>,
    /// Host TIDs of the newborn, in the order of the calls that succeeded.
    pub(super) born: Vec<pid_t>,
}

impl Hand<'_> {
    /// Makes `calls`, all of them clone3 without CLONE_VFORK, after memory was written at `before`. Should the engine die
    /// the newborn make the calls in `orphan`, of which the last must end them.
    ///
    /// # Errors
    /// As [`Hand::run`]. What was born ends.
    pub(super) fn bear(
        &mut self,
        calls: &[Call],
        before: (u64, &[u8]),
        orphan: &[Call],
    ) -> Result<Births, InjectError> {
        let mut bytes: Vec<u8> = orphan.iter().flat_map(bytes_of).collect();
        self.write(self.area().start + AREA_HELPER as u64, &bytes)?;
        self.set_options(libc::PTRACE_O_SUSPEND_SECCOMP | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK)?;
        let mut born = Vec::with_capacity(calls.len());
        let ran = self.begin_batch(calls, before, &mut bytes).and_then(|()| self.catch_all(&mut born));
        let results = ran
            .and_then(|()| self.set_options(libc::PTRACE_O_SUSPEND_SECCOMP))
            .and_then(|()| self.read_results(crate::sys::blob::AREA_CALLS, calls.len()));
        match results {
            Ok(results) => Ok(Births { results, born }),
            Err(error) => {
                for tid in born {
                    // It has ended, or does so now.
                    let _ = ptrace::detach(Pid::from_raw(tid), None);
                }
                Err(error)
            }
        }
    }

    fn catch_all(&mut self, born: &mut Vec<pid_t>) -> Result<(), InjectError> {
        loop {
            match self.go_on()? {
                Reached::Birth(child) => {
                    self.wait_birth(child)?;
                    born.push(child);
                }
                Reached::Marker => {
                    self.batch_is_finished();
                    return Ok(());
                }
            }
        }
    }

    fn wait_birth(&mut self, child: pid_t) -> Result<(), InjectError> {
        let timed = |hand: &Self, source| hand.error("time a birth in", source);
        self.stopped.alarm.listen(BATCH_PATIENCE, TICK).map_err(|source| timed(self, source))?;
        let mut wait = Wait::new("stop at its birth", None);
        let seen = loop {
            match self.see(child, &mut wait) {
                Ok(Seen::Birth) => break Ok(()),
                Ok(Seen::End) => break Err(InjectError::Gone { pid: self.pid, tid: child }),
                Ok(Seen::Marker | Seen::Other) => {
                    let resumed = crate::sys::ptrace::resume(child, 0);
                    if let Err(source) = resumed {
                        break Err(self.error("resume a newborn of", source));
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.stopped.alarm.deafen().map_err(|source| timed(self, source))?;
        seen
    }

    /// Takes the hand back and records another area, which is mapped already: the next hand uses it. The vdso is where the
    /// auxiliary vector says.
    ///
    /// # Errors
    /// Which area the process has is not known.
    pub(super) fn move_area(self, to: u64) -> io::Result<()> {
        let no_place = || io::Error::other("no vdso, or no room in it");
        let place = Place::find(self.pid, self.tid, &self.memory)?.ok_or_else(no_place)?;
        place.record(&self.memory, to)?;
        let pid = self.pid;
        self.stopped.kept.known.retain(|known| known.pid != pid);
        self.close().map_err(io::Error::other)
    }

    /// Ends the hand's thread, which is not the last of its process. Its memory does not change by that: nobody waits for
    /// its end, and what it holds stays held.
    ///
    /// # Errors
    /// It lives.
    pub(super) fn end_thread(mut self) -> Result<(), InjectError> {
        let calls = quiet_end();
        let mut bytes = Vec::new();
        let nothing = (self.area().start, &[][..]);
        let ran = self.begin_batch(&calls, nothing, &mut bytes).and_then(|()| self.go_on());
        match ran {
            Err(InjectError::Gone { .. }) => {
                let (pid, tid) = (self.pid, self.tid);
                self.forget();
                self.stopped.forget_thread(pid, tid);
                Ok(())
            }
            Err(error) => Err(error),
            Ok(_) => Err(self.error("end", io::Error::other("it goes on"))),
        }
    }
}

/// The end of a thread of which its memory does not tell.
pub(super) fn quiet_end() -> [Call; 3] {
    // The size of the kernel's `struct robust_list_head`.
    const LIST_BYTES: u64 = 24;
    let call = |nr, first, second| Call { nr, args: [first, second, 0, 0, 0, 0] };
    [call(libc::SYS_set_robust_list, 0, LIST_BYTES), call(libc::SYS_set_tid_address, 0, 0), call(libc::SYS_exit, 0, 0)]
}

impl Stopped {
    /// A newborn joins the stopped ones.
    pub(super) fn add_thread(&mut self, pid: pid_t, thread: Thread) {
        if let Some(process) = self.processes.iter_mut().find(|process| process.pid == pid) {
            process.threads.push(thread);
        }
    }

    fn forget_thread(&mut self, pid: pid_t, tid: pid_t) {
        if let Some(process) = self.processes.iter_mut().find(|process| process.pid == pid) {
            process.threads.retain(|thread| thread.tid != tid);
            process.forget_told(tid);
        }
        self.kept.known.retain(|known| known.tid != tid);
        self.kept.waits.forget(tid);
    }
}
