//! What was learnt of threads in this stop, so that it is not asked again: none of it changes while they stand still.
//!
//! A look at a thread's `status` takes 15 to 40 us, a hand in it 50; at a rollback each was looked at seven times.

use std::cell::RefCell;
use std::io;

use libc::pid_t;

use super::stop::{Process, Stopped};
use super::tasks::pid_inside;

/// prctl's number for asking where the kernel clears a thread's number at its end; the libc crate lacks it.
pub(super) const PR_GET_TID_ADDRESS: u64 = 40;

/// What is known of a process's threads.
#[derive(Debug, Default)]
pub(super) struct Told(RefCell<Vec<One>>);

/// Of one thread.
#[derive(Debug)]
struct One {
    /// Host TID.
    tid: pid_t,
    inside: pid_t,
    /// Where the kernel clears its number at its end.
    clear_tid: Option<u64>,
    /// Its `status`.
    status: Option<Vec<u8>>,
}

impl Stopped {
    /// The number inside of a stopped thread.
    pub(super) fn inside_of(&self, pid: pid_t, tid: pid_t) -> io::Result<pid_t> {
        let Some(Told(all)) = self.told(pid) else { return pid_inside(tid) };
        if let Some(one) = all.borrow().iter().find(|one| one.tid == tid) {
            return Ok(one.inside);
        }
        let inside = pid_inside(tid)?;
        all.borrow_mut().push(One { tid, inside, clear_tid: None, status: None });
        Ok(inside)
    }

    /// Remembers what a thread has told.
    pub(super) fn remember(&self, pid: pid_t, tid: pid_t, inside: pid_t, clear_tid: u64, status: Vec<u8>) {
        if let Some(Told(all)) = self.told(pid) {
            let mut all = all.borrow_mut();
            all.retain(|one| one.tid != tid);
            all.push(One { tid, inside, clear_tid: Some(clear_tid), status: Some(status) });
        }
    }

    /// What a thread has told besides its number: where that is cleared, and its `status`; once.
    pub(super) fn take_told(&self, pid: pid_t, tid: pid_t) -> Option<(u64, Vec<u8>)> {
        let mut all = self.told(pid)?.0.borrow_mut();
        let one = all.iter_mut().find(|one| one.tid == tid)?;
        one.clear_tid.take().zip(one.status.take())
    }

    /// Forgets all of a process but numbers: something about it changes.
    pub(super) fn forget_told(&self, pid: pid_t) {
        if let Some(Told(all)) = self.told(pid) {
            all.borrow_mut().iter_mut().for_each(|one| (one.clear_tid, one.status) = (None, None));
        }
    }

    fn told(&self, pid: pid_t) -> Option<&Told> {
        self.processes.iter().find(|process| process.pid == pid).map(|process| &process.told)
    }
}

impl Process {
    /// Forgets a thread that has ended.
    pub(super) fn forget_told(&mut self, tid: pid_t) {
        self.told.0.get_mut().retain(|one| one.tid != tid);
    }
}
