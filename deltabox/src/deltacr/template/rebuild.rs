//! Rebuilt: a process that has ended is made again as a child of the one that was its parent.
//!
//! ```text
//! parent R   [DONTFORK] clone3(FILES, set_tid) [DOFORK] --event--> marker; its memory and registers are as they were
//! child C         born with a copy of R's memory, halted
//!   close_range(UNSHARE); setsid or setpgid; rseq off
//!   what there is of R's memory goes, the kernel's pages move (ground.rs); mappings, pages (restore.rs); threads
//! ```
//! Nothing else is C's afterwards: no descriptors; R's places, signal actions, limits and rights.
//!
//! C never runs an instruction of its own before all that is done. If the engine dies C is killed with it
//! (PTRACE_O_EXITKILL) or, in the microseconds between its birth and that, runs into exit_group(0). R then gets the
//! signal of a child's end, and a zombie with the number of the child that its memory knows, killed by SIGKILL (or
//! exited with 0). A rebuild that fails is undone: R has its exit status taken and its signal taken back.

use std::ops::Range;
use std::time::Instant;

use libc::{pid_t, user_regs_struct as Registers};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::{TemplateError, TemplateRefusal, check, errno, process};
use super::face::Face;
use super::ground::{self, Ground};
use super::kin::Kin;
use super::make::denied;
use super::mapping::{Advice, Mapping};
use super::memory::Memory;
use super::restore::{Past, furnish_memory};
use super::threads::{Cast, NUMBER_PATIENCE};
use crate::deltacr::births::Births;
use crate::deltacr::handover::call;
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::stop::{Process, Stopped, Thread};
use crate::deltacr::tasks::pid_inside;
use crate::fault;
use crate::sys::process::CloneCall;
use crate::sys::ptrace::{get_rseq_configuration, wait_thread};

// Where things lie in the scratch room.
const CLONE: u64 = 0;
const NUMBER: u64 = 128;
const SET: u64 = 136;
const TIME: u64 = 144;

/// Makes a process again that has ended, as a child of the stopped process `parent` (host PID), which was its parent:
/// with its number, session, group, memory and threads. Its host PID; it is among the stopped ones and in the parent's
/// cgroup. If the parent's memory is known to be what it was, `above`, large parts of it are not copied to be thrown away.
/// Descriptors, places, signal actions and rights are its parent's affair or none: they are given to it later.
///
/// Parents come before children, the first process of a group before the others.
///
/// # Errors
/// There is no such process, and the parent knows nothing of it.
pub fn rebuild(
    stopped: &mut Stopped,
    parent: pid_t,
    above: Option<&Memory>,
    record: &Kin,
    past: &Past<'_>,
) -> Result<pid_t, TemplateError> {
    record.check(parent)?;
    let Some(leader) = past.threads.leader().filter(|leader| leader.tid == record.pid) else {
        return Err(TemplateRefusal::Threads { pid: record.pid }.into());
    };
    let registers = leader.registers();
    if past.threads.n_threads() > 1 {
        let face = Face::read(parent, parent).map_err(process("read the state of", parent))?;
        // What each of them may do is put back later, as with the first.
        if !face.chooses_numbers() {
            return Err(TemplateRefusal::Denied { pid: parent }.into());
        }
    }
    let ground = Ground::plan(parent, past)?;
    let parent = Parent::of(stopped, parent)?;
    let pid = parent.bear(stopped, above, record, registers)?;
    let made = furnish(stopped, pid, record, &ground, past);
    if made.is_err() {
        parent.put_down(stopped, pid, record.pid);
    }
    made.map(|()| pid)
}

/// The same for a process that was init's child in the session of another: a member of that session, `maker` (host PID),
/// has a child that makes it, and ends.
///
/// # Errors
/// There is no such process, and the maker knows nothing of it.
pub fn rebuild_orphan(
    stopped: &mut Stopped,
    maker: pid_t,
    above: Option<&Memory>,
    record: &Kin,
    past: &Past<'_>,
) -> Result<pid_t, TemplateError> {
    let kin = Kin::read(maker).map_err(process("read the state of", maker))?;
    let threads = stopped.processes().iter().find(|process| process.pid == maker).map(|process| &process.threads);
    let Some(registers) = threads.and_then(|threads| threads.first()).map(|thread| thread.registers) else {
        return Err(TemplateRefusal::Threads { pid: record.pid }.into());
    };
    let family = Parent::of(stopped, maker)?;
    let between = family.bear(stopped, above, &Kin { pid: ANY_NUMBER, exit_signal: 0, ..kin }, registers)?;
    let inside = pid_inside(between).map_err(process("read the state of", between));
    let made = inside.as_ref().map_or(Ok(0), |_| rebuild(stopped, between, None, record, past));
    // Its end gives the child to init.
    family.put_down(stopped, between, *inside.as_ref().unwrap_or(&0));
    inside.and(made)
}

/// Less is copied faster than it is spared (chosen: page tables of 1 MB take some 10 us).
const LARGE_BYTES: u64 = 1 << 20;
/// No number: a process that takes the next one.
const ANY_NUMBER: pid_t = 0;

/// A process that is to have a child.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parent {
    pub(super) pid: pid_t,
    /// A signal of a child's end waits for it, which is not to be taken from it.
    is_signalled: bool,
}

impl Parent {
    pub(super) fn of(stopped: &mut Stopped, pid: pid_t) -> Result<Self, TemplateError> {
        let mut hand = stopped.hand(pid)?;
        let at = hand.scratch().start + SET;
        let mut set = [0; 8];
        let results = hand.run_with(&[call(libc::SYS_rt_sigpending, &[at, 8])], (at, &[]), (at, &mut set))?;
        check(pid, "rt_sigpending", results[0])?;
        hand.close()?;
        Ok(Self { pid, is_signalled: u64::from_le_bytes(set) & child_set() != 0 })
    }

    /// Has it make a child, which is halted before its first instruction and dies with the engine.
    fn bear(
        self,
        stopped: &mut Stopped,
        above: Option<&Memory>,
        record: &Kin,
        registers: Registers,
    ) -> Result<pid_t, TemplateError> {
        // The table is shared until the child has one of its own, an empty one.
        let flags = libc::CLONE_FILES;
        let spared = above.map_or(Ok(Vec::new()), |above| self.spared(stopped, above))?;
        let mut hand = stopped.hand(self.pid)?;
        advise(&mut hand, &spared, libc::MADV_DONTFORK)?;
        let born = clone(&mut hand, record, flags, &[call(libc::SYS_exit_group, &[0])]);
        // Whatever has become of that.
        let advised = advise(&mut hand, &spared, libc::MADV_DOFORK);
        let closed = hand.close();
        let pid = born?;
        let kills = ptrace::Options::PTRACE_O_EXITKILL;
        let bound = ptrace::setoptions(Pid::from_raw(pid), kills).map_err(process("set the trace options of", pid));
        let thread = Thread { tid: pid, registers, group_stopped: false, interrupted: true, halted: true };
        stopped.processes.push(Process {
            pid,
            threads: vec![thread],
            ends_with_engine: true,
            told: Default::default(),
        });
        let bound = bound.and(advised).and(closed.map_err(TemplateError::from));
        let born = bound.and_then(|()| fault::point("rebuild.born").map_err(process("make a child of", self.pid)));
        if born.is_err() {
            self.put_down(stopped, pid, record.pid);
        }
        born.map(|()| pid)
    }

    /// Parts of its memory that a child can do without, and that it would get: large ones, and those that are sealed, of
    /// which it could not get rid.
    fn spared(self, stopped: &Stopped, above: &Memory) -> Result<Vec<Range<u64>>, TemplateError> {
        let found = stopped.processes().iter().find(|process| process.pid == self.pid);
        let mut needed = Vec::new();
        for thread in found.map_or(&[][..], |process| &process.threads) {
            // The kernel writes there when the child is scheduled.
            let rseq = get_rseq_configuration(thread.tid).map_err(process("read the state of", self.pid))?;
            needed.extend([rseq.address, thread.registers.rsp]);
        }
        let can_do_without = |mapping: &&Mapping| {
            let range = mapping.range();
            (mapping.anonymous_bytes >= LARGE_BYTES || mapping.has(Advice::Sealed))
                && !mapping.is_kernels()
                && ![Advice::DontFork, Advice::Special].iter().any(|advice| mapping.has(*advice))
                && !needed.iter().any(|address| range.contains(address))
                && (range.end <= above.area.start || above.area.end <= range.start)
        };
        Ok(above.mappings.iter().filter(can_do_without).map(Mapping::range).collect())
    }

    /// Ends a child as if it had never been.
    pub(super) fn put_down(self, stopped: &mut Stopped, pid: pid_t, inside: pid_t) {
        // It may have ended.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        let at = stopped.processes.iter().position(|process| process.pid == pid);
        let threads = at.map(|at| stopped.processes.remove(at).threads).unwrap_or_default();
        // The leader's end is told when no other thread is left.
        let others = threads.iter().rev().map(|thread| thread.tid).filter(|tid| *tid != pid);
        for tid in others.chain([pid]) {
            while matches!(wait_thread(tid, 0), Ok(Some(status)) if libc::WIFSTOPPED(status)) {}
        }
        stopped.kept.known.retain(|known| known.pid != pid);
        // The failure that led here is the one to report. Killed, the parent has nothing to forget.
        let _ = self.forget(stopped, inside);
    }

    /// Takes the exit status and the signal of a child that has ended.
    fn forget(self, stopped: &mut Stopped, inside: pid_t) -> Result<(), TemplateError> {
        let mut hand = stopped.hand(self.pid)?;
        let at = hand.scratch().start;
        let how = (libc::__WALL | libc::WNOHANG).cast_unsigned().into();
        let mut calls = vec![call(libc::SYS_wait4, &[i64::from(inside).cast_unsigned(), 0, how, 0])];
        if !self.is_signalled {
            calls.push(call(libc::SYS_rt_sigtimedwait, &[at + SET, 0, at + TIME, 8]));
        }
        let set = [child_set(), 0, 0].map(u64::to_le_bytes).concat();
        // There may be nothing to be taken.
        hand.run_with(&calls, (at + SET, &set), (at, &mut []))?;
        Ok(hand.close()?)
    }
}

fn advise(hand: &mut Hand<'_>, ranges: &[Range<u64>], advice: i32) -> Result<(), TemplateError> {
    let advise = |range: &Range<u64>| {
        call(libc::SYS_madvise, &[range.start, range.end - range.start, advice.cast_unsigned().into()])
    };
    let calls: Vec<Call> = ranges.iter().map(advise).collect();
    let pid = hand.pid();
    hand.run(&calls)?.into_iter().try_for_each(|result| check(pid, "madvise", result))
}

/// Has the hand's process make a child; its host PID. Should nobody stop it, it makes the calls in `orphan`.
pub(super) fn clone(hand: &mut Hand<'_>, record: &Kin, flags: i32, orphan: &[Call]) -> Result<pid_t, TemplateError> {
    let at = hand.scratch().start;
    hand.write(at + NUMBER, &record.pid.to_le_bytes())?;
    let child = CloneCall {
        flags: flags.cast_unsigned().into(),
        exit_signal: record.exit_signal.cast_unsigned().into(),
        set_tid: if record.pid == ANY_NUMBER { 0 } else { at + NUMBER },
        ..CloneCall::default()
    };
    let make = [call(libc::SYS_clone3, &[at + CLONE, CloneCall::LEN_BYTES as u64])];
    let deadline = Instant::now() + NUMBER_PATIENCE;
    loop {
        let Births { results, born } = hand.bear(&make, (at + CLONE, &child.bytes()), orphan)?;
        if let Some(pid) = born.first() {
            return Ok(*pid);
        }
        match errno(results[0]) {
            // What had it is being reaped.
            Some(libc::EEXIST) if Instant::now() < deadline => std::thread::yield_now(),
            Some(errno) => return Err(denied(hand.pid(), "clone3", errno, record.pid)),
            None => return Err(TemplateRefusal::Zombie { pid: record.pid, why: "it was gone at once" }.into()),
        }
    }
}

/// Makes a newborn what it was.
fn furnish(
    stopped: &mut Stopped,
    pid: pid_t,
    record: &Kin,
    ground: &Ground,
    past: &Past<'_>,
) -> Result<(), TemplateError> {
    let rseq = get_rseq_configuration(pid).map_err(process("read the state of", pid))?;
    let mut hand = stopped.hand(pid)?;
    let mut calls =
        vec![call(libc::SYS_close_range, &[0, u32::MAX.into(), libc::CLOSE_RANGE_UNSHARE.into()]), record.join()];
    if rseq.address != 0 {
        // The kernel writes there whenever it is scheduled, and kills it if it cannot.
        const UNREGISTER: u64 = 1;
        let args = [rseq.address, rseq.size_bytes.into(), UNREGISTER, rseq.signature.into()];
        calls.push(call(libc::SYS_rseq, &args));
    }
    let results = hand.run(&calls)?;
    hand.close()?;
    check(pid, "close_range", results[0])?;
    record.check_join(results[1])?;
    results[2..].iter().try_for_each(|result| check(pid, "rseq", *result))?;
    fault::point("rebuild.begun").map_err(process("rebuild", pid))?;
    ground::clear(stopped, pid, ground, past)?;
    fault::point("rebuild.cleared").map_err(process("rebuild", pid))?;
    furnish_memory(stopped, pid, past)?;
    fault::point("rebuild.filled").map_err(process("rebuild", pid))?;
    let mut cast = Cast::alone(pid, past.threads.n_threads());
    past.threads.bear(stopped, pid, &mut cast)?;
    past.threads.put_back(stopped, pid, &cast)?;
    fault::point("rebuild.furnished").map_err(process("rebuild", pid))
}

fn child_set() -> u64 {
    1 << (libc::SIGCHLD - 1)
}
