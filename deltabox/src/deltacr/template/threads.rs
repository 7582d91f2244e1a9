//! The set of a process's threads: read at a checkpoint, and given to a process again, whatever threads it has now.
//!
//! ```text
//! cast      which threads are there, missing, too many: by their numbers inside. Nothing has changed.
//! bear      the missing ones are made, halted at their birth. That can be undone.
//! ---       here the memory is put back
//! part      those that are too many end
//! put_back  per thread: robust list, number's address, name, rseq; registers, extended registers, mask
//! ```
//! A thread inherits from its maker what it may do, so one that may do something else than the first thread is refused.

use std::time::{Duration, Instant};

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::error::{TemplateError, TemplateRefusal, errno, process};
use super::face::{self, Face};
use super::make::denied;
use super::thread::Record;
use crate::deltacr::births::quiet_end;
use crate::deltacr::halt::reap_ended;
use crate::deltacr::handover::call;
use crate::deltacr::stop::{Stopped, Thread};
use crate::fault;
use crate::sys::process::CloneCall;

/// Threads made in one batch: what their calls point at fits into the scratch room below the helper's calls.
const N_AT_ONCE: usize = 96;
/// What a clone3 points at: its arguments and a number.
const BIRTH_BYTES: usize = 96;
/// How long a number may stay taken that a thread or process which has ended had. The kernel gives it back last of all,
/// when `/proc` does not show the task any more (6.18, release_task), and the parent of a process has to reap it before.
pub(super) const NUMBER_PATIENCE: Duration = Duration::from_secs(1);
/// How long until the next attempt. Nobody is told when a number is free, and what ends there needs this CPU for its last
/// steps: with sched_yield in place of this sleep it did not get it in a second (measured, load 6); with it, in 1 to 70 ms.
pub(super) const NUMBER_TICK: Duration = Duration::from_micros(200);

/// The threads of a process as they were, the first one first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threads {
    records: Vec<Record>,
}

/// Who is there for whom.
#[derive(Debug)]
pub(in crate::deltacr) struct Cast {
    /// Host TID for each record, 0 for none.
    hosts: Vec<pid_t>,
    /// Of which nothing is known: records by their index.
    new: Vec<bool>,
    /// Host TIDs of those that were not there.
    extra: Vec<pid_t>,
}

impl Threads {
    /// Reads those of a stopped process.
    ///
    /// # Errors
    /// It is not among the stopped ones, its leader has ended, or it was killed. It is unchanged.
    pub fn read(stopped: &mut Stopped, pid: pid_t) -> Result<Self, TemplateError> {
        let tids = tids(stopped, pid)?;
        let records = tids.into_iter().map(|tid| Record::read(stopped, pid, tid)).collect::<Result<_, _>>()?;
        Ok(Self { records })
    }

    /// How many.
    pub fn n_threads(&self) -> usize {
        self.records.len()
    }

    /// Whether the first one may choose the numbers of what it makes.
    pub(in crate::deltacr) fn choose_numbers(&self) -> bool {
        self.leader().is_some_and(|leader| face::choose_numbers(&leader.rights))
    }

    /// The first one, whose number is the process's.
    pub(super) fn leader(&self) -> Option<&Record> {
        self.records.first()
    }

    /// Fails if the stopped process cannot be given these threads. (Numbers may be taken still.)
    pub(in crate::deltacr) fn check(&self, stopped: &Stopped, pid: pid_t) -> Result<(), TemplateError> {
        self.cast(stopped, pid).map(drop)
    }

    /// Whether a stopped process has just these threads.
    pub(in crate::deltacr) fn are_those_of(&self, stopped: &Stopped, pid: pid_t) -> Result<bool, TemplateError> {
        let cast = self.cast(stopped, pid)?;
        Ok(cast.extra.is_empty() && !cast.hosts.contains(&0))
    }

    pub(super) fn cast(&self, stopped: &Stopped, pid: pid_t) -> Result<Cast, TemplateError> {
        let mut hosts = vec![0; self.records.len()];
        let mut extra = Vec::new();
        let tids = tids(stopped, pid)?;
        for tid in &tids {
            let inside = stopped.inside_of(pid, *tid).map_err(process("read the threads of", pid))?;
            match self.records.iter().position(|record| record.tid == inside) {
                Some(at) => hosts[at] = *tid,
                None => extra.push(*tid),
            }
        }
        if hosts.first() == Some(&0) {
            return Err(TemplateRefusal::Threads { pid }.into());
        }
        if let Some(first) = tids.first().filter(|_| hosts.contains(&0)) {
            let maker = Face::read(pid, *first).map_err(process("read the threads of", pid))?;
            self.may_be_made(pid, &hosts, &maker)?;
        }
        Ok(Cast { new: vec![false; hosts.len()], hosts, extra })
    }

    /// Fails unless a process with that face, a copy of the first thread, can make all threads.
    pub(super) fn check_maker(&self, pid: pid_t, face: &Face) -> Result<(), TemplateError> {
        Ok(self.may_be_made(pid, &vec![0; self.records.len()], face)?)
    }

    /// Fails unless `maker` can make the threads of which there is none.
    fn may_be_made(&self, pid: pid_t, hosts: &[pid_t], maker: &Face) -> Result<(), TemplateRefusal> {
        for (record, _) in self.records.iter().zip(hosts).filter(|(_, host)| **host == 0) {
            if !maker.chooses_numbers() {
                return Err(TemplateRefusal::Denied { pid });
            }
            if record.rights != maker.rights {
                return Err(TemplateRefusal::ThreadRights { pid, tid: record.tid });
            }
        }
        Ok(())
    }

    /// Makes the threads that are missing. They are halted, and end if they are let go as they are.
    ///
    /// # Errors
    /// The process is unchanged.
    pub(super) fn bear(&self, stopped: &mut Stopped, pid: pid_t, cast: &mut Cast) -> Result<(), TemplateError> {
        let missing: Vec<usize> = (0..self.records.len()).filter(|at| cast.hosts[*at] == 0).collect();
        let deadline = Instant::now() + NUMBER_PATIENCE;
        let born = missing.chunks(N_AT_ONCE).try_for_each(|some| {
            let mut rest = some.to_vec();
            loop {
                rest = self.bear_some(stopped, pid, cast, &rest, deadline)?;
                if rest.is_empty() {
                    return Ok(());
                }
                // A thread that ended in the middle of the stop is the engine's to reap; another's number is free a little
                // after its end was told.
                reap_ended(pid);
                std::thread::sleep(NUMBER_TICK);
            }
        });
        let born = born.and_then(|()| fault::point("threads.born").map_err(process("make threads of", pid)));
        if born.is_err() {
            // The first failure is the one to report.
            let _ = cast.unmake(stopped, pid);
        }
        born?;
        sort(stopped, pid, &cast.hosts);
        Ok(())
    }

    /// Those of `some` whose numbers are taken yet.
    fn bear_some(
        &self,
        stopped: &mut Stopped,
        pid: pid_t,
        cast: &mut Cast,
        some: &[usize],
        deadline: Instant,
    ) -> Result<Vec<usize>, TemplateError> {
        let mut hand = stopped.hand(pid)?;
        let base = hand.scratch().start;
        let (mut bytes, mut calls) = (Vec::with_capacity(some.len() * BIRTH_BYTES), Vec::with_capacity(some.len()));
        for at in some {
            let place = base + bytes.len() as u64;
            let number = place + CloneCall::LEN_BYTES as u64;
            bytes.extend(self.records[*at].birth(number).bytes());
            bytes.extend(self.records[*at].tid.to_le_bytes());
            bytes.extend([0; BIRTH_BYTES - CloneCall::LEN_BYTES - 4]);
            calls.push(call(libc::SYS_clone3, &[place, CloneCall::LEN_BYTES as u64]));
        }
        let births = hand.bear(&calls, (base, &bytes), &quiet_end())?;
        hand.close()?;
        let mut born = births.born.into_iter();
        let (mut rest, mut failure) = (Vec::new(), None);
        for (at, result) in some.iter().zip(&births.results) {
            let record = &self.records[*at];
            match errno(*result) {
                None => {
                    let Some(tid) = born.next() else { continue };
                    let (registers, halted) = (record.registers(), true);
                    (cast.hosts[*at], cast.new[*at]) = (tid, true);
                    stopped.add_thread(pid, Thread { tid, registers, group_stopped: false, interrupted: true, halted });
                }
                Some(libc::EEXIST) if Instant::now() < deadline => rest.push(*at),
                Some(errno) => failure = failure.or(Some(denied(pid, "clone3", errno, record.tid))),
            }
        }
        failure.map_or(Ok(rest), Err)
    }

    /// What must come before the memory: the kernel writes to it.
    pub(super) fn unregister(&self, stopped: &mut Stopped, pid: pid_t, cast: &Cast) -> Result<(), TemplateError> {
        let mut pairs = self.records.iter().zip(&cast.hosts);
        pairs.try_for_each(|(record, tid)| record.unregister(stopped, pid, *tid))
    }

    /// Puts all of them back. Calls that waited begin their wait anew, and what was remembered of waits is forgotten.
    pub(super) fn put_back(&self, stopped: &mut Stopped, pid: pid_t, cast: &Cast) -> Result<(), TemplateError> {
        for ((record, tid), is_new) in self.records.iter().zip(&cast.hosts).zip(&cast.new) {
            record.put_back(stopped, pid, *tid, *is_new)?;
        }
        Ok(())
    }
}

impl Cast {
    /// Of a process that was made just now: its only thread is the first of `n_records`.
    pub(super) fn alone(pid: pid_t, n_records: usize) -> Self {
        let (mut hosts, mut new) = (vec![0; n_records], vec![false; n_records]);
        hosts.iter_mut().take(1).for_each(|host| *host = pid);
        new.iter_mut().take(1).for_each(|is_new| *is_new = true);
        Self { hosts, new, extra: Vec::new() }
    }

    /// How many were made, and how many are too many.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.new.iter().filter(|is_new| **is_new).count(), self.extra.len())
    }

    /// Ends those that are too many.
    pub(super) fn part(&self, stopped: &mut Stopped, pid: pid_t) -> Result<(), TemplateError> {
        self.extra.iter().try_for_each(|tid| end(stopped, pid, *tid))?;
        fault::point("threads.parted").map_err(process("end threads of", pid))
    }

    /// Ends those that were made.
    pub(super) fn unmake(&self, stopped: &mut Stopped, pid: pid_t) -> Result<(), TemplateError> {
        let made = self.hosts.iter().zip(&self.new).filter(|(_, is_new)| **is_new);
        made.map(|(tid, _)| end(stopped, pid, *tid)).fold(Ok(()), Result::and)
    }
}

fn end(stopped: &mut Stopped, pid: pid_t, tid: pid_t) -> Result<(), TemplateError> {
    Ok(stopped.hand_of(pid, tid)?.end_thread()?)
}

/// Host TIDs of a stopped process, the leader first.
fn tids(stopped: &Stopped, pid: pid_t) -> Result<Vec<pid_t>, TemplateError> {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    let tids = process.map(|process| process.threads.iter().map(|thread| thread.tid).collect::<Vec<_>>());
    match tids {
        Some(tids) if tids.first() == Some(&pid) => Ok(tids),
        Some(tids) if !tids.is_empty() => Err(TemplateRefusal::LeaderEnded { pid }.into()),
        _ => Err(TemplateRefusal::Threads { pid }.into()),
    }
}

/// The order of the records is that of the stopped threads: others keep lists of them too.
fn sort(stopped: &mut Stopped, pid: pid_t, hosts: &[pid_t]) {
    if let Some(process) = stopped.processes.iter_mut().find(|process| process.pid == pid) {
        let place = |tid| hosts.iter().position(|host| *host == tid).unwrap_or(usize::MAX);
        process.threads.sort_by_key(|thread| place(thread.tid));
    }
}
