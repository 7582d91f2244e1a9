//! The engine's hand in a stopped process: system calls made by one of its threads, memory read and written.
//!
//! An orphan goes on by itself. The engine can die (-9) between any two of its steps, the thread then runs on from
//! wherever its registers point, and that must always be its own code or code that leads back there:
//!
//! ```text
//! stopped at its own rip                        memory for the way back is written first
//!   SETREGS -> rip in boot or batch code        from here on the code finds the way back alone
//!   SETSIGMASK all, queue the marker signal     (the code itself blocks all first, in case this was not reached)
//!   CONT
//!     code: calls ..., unblock the marker ----> signal-delivery stop: the engine reads results
//!     |       orphan: nobody listens, the marker is a signal that the process ignores
//!     code: more calls? (the engine writes them, then their number, then SETSIGMASK, marker, CONT) back up
//!     code: rt_sigreturn, or load registers
//!   SETSIGMASK own, SETREGS own                 (in this order)
//! ```
//!
//! The marker takes the place of a breakpoint, which would kill an orphan, and of syscall stops, which would come
//! twice per call. Its stop is one in which the kernel handles signals: with the thread's own registers set, it
//! restarts the interrupted call as after any stop.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use libc::{pid_t, user_regs_struct as Registers};
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::area::{CALL_BYTES, Known, Memory, N_CALLS, Place, SCRATCH};
use super::error::{InjectError, InjectRefusal};
use super::frame::{self, AREA_XSTATE};
use super::interrupted::{self, GoOn};
use super::marker::choose_marker;
use super::rseq::leave_critical_section;
use super::stop::{Stopped, Thread};
use super::tasks::{self, Stat};
use crate::fault;
use crate::sys::blob::{AREA_BYTES, AREA_CALLS, AREA_CONTEXT, AREA_SLOTS, slot};
use crate::sys::ptrace::{get_signal_mask, get_xstate, queue_signal, resume, set_signal_mask, wait_thread};

/// How long a batch may take before the call it is in counts as blocked (chosen).
pub(super) const BATCH_PATIENCE: Duration = Duration::from_secs(5);
pub(super) const TICK: Duration = Duration::from_millis(10);

/// A system call to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub nr: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// A hand in one stopped process. Taken back on drop, or by [`Hand::close`], which tells of failure.
#[derive(Debug)]
pub struct Hand<'a> {
    pub(super) stopped: &'a mut Stopped,
    pub(super) pid: pid_t,
    pub(super) tid: pid_t,
    pub(super) memory: Memory,
    /// The thread's state to be left behind.
    own: Registers,
    mask: u64,
    pub(super) marker: i32,
    /// What the thread's end will be told by.
    pub(super) exit_signal: i32,
    pub(super) area: u64,
    /// The thread waits in batch code for more calls.
    waits: bool,
    closed: bool,
    /// As the process.
    ends_with_engine: bool,
}

/// What stopped injected code.
pub(super) enum Reached {
    /// Its marker.
    Marker,
    /// It made a process (host PID), and [`super::helper`] had asked to be told.
    Birth(pid_t),
}

/// How an area is come by.
enum Ground {
    Known(u64),
    Found { place: Place, area: Option<u64>, stat: std::fs::File },
}

impl<'a> Hand<'a> {
    pub(super) fn open(stopped: &'a mut Stopped, pid: pid_t, tid: Option<pid_t>) -> Result<Self, InjectError> {
        let thread = find_thread(stopped, pid, tid)?;
        let tid = thread.tid;
        let failed = |op: &'static str| move |source: io::Error| thread_error(op, pid, tid, source);
        if thread.registers.cs != interrupted::CODE_64 {
            return Err(InjectRefusal::ForeignArchitecture { pid }.into());
        }
        let memory = Memory::of(pid, tid);
        let process = stopped.processes.iter().find(|process| process.pid == pid);
        let ends_with_engine = process.is_some_and(|process| process.ends_with_engine);
        let (ground, stat) = match look_at_known(stopped, (pid, tid), &memory) {
            Some(known) => known,
            None => {
                let file = tasks::open_stat(pid, tid).map_err(failed("read the state of"))?;
                let Some(place) = Place::find(pid, tid, &memory).map_err(failed("read the vdso of"))? else {
                    let stat = tasks::reread_stat(&file).map_err(failed("read the state of"))?;
                    // What was killed lost its memory before it becomes a zombie.
                    let lives = stat.is_some_and(|stat| stat.state == 't');
                    return Err(if lives {
                        InjectRefusal::NoPlace { pid }.into()
                    } else {
                        InjectError::Gone { pid, tid }
                    });
                };
                let area = place.recorded(&memory).map_err(failed("read the vdso of"))?;
                // One that the engine made is where that left it.
                if !ends_with_engine {
                    stopped.finish_orphans(pid, |rip| place.is_injected(area, rip)).map_err(InjectError::Orphan)?;
                }
                // An orphan in boot code has unmapped what it made.
                let area = place.recorded(&memory).map_err(failed("read the vdso of"))?;
                let stat = tasks::reread_stat(&file)
                    .map_err(failed("read the state of"))?
                    .ok_or(InjectError::Gone { pid, tid })?;
                (Ground::Found { place, area, stat: file }, stat)
            }
        };
        let marker = choose_marker(&stat).ok_or(InjectRefusal::NoMarker { pid })?;
        let mask = get_signal_mask(tid).map_err(failed("read the signal mask of"))?;
        let mut own = find_thread(stopped, pid, Some(tid))?.registers;
        own.rip = leave_critical_section(&memory, tid, &own).map_err(failed("read the rseq area of"))?;
        stopped.keep_registers(tid, own);
        stopped.pin_to(stat.cpu);
        let exit_signal = stat.exit_signal;
        let (area, waits, closed) = (0, false, false);
        let mut hand =
            Self { stopped, pid, tid, memory, own, mask, marker, exit_signal, area, waits, closed, ends_with_engine };
        hand.set_options(libc::PTRACE_O_SUSPEND_SECCOMP)?;
        hand.enter(ground)?;
        Ok(hand)
    }

    /// The process.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// The thread that makes the calls.
    pub fn tid(&self) -> pid_t {
        self.tid
    }

    /// Addresses of the process that calls may point to, free for the caller's use until the hand is taken back.
    pub fn scratch(&self) -> Range<u64> {
        self.area + SCRATCH as u64..self.area + AREA_BYTES as u64
    }

    /// The whole of the engine's area: mappings that are not the process's own.
    pub fn area(&self) -> Range<u64> {
        self.area..self.area + AREA_BYTES as u64
    }

    /// Reads the process's memory, whatever its protection.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), InjectError> {
        self.memory.read(at, bytes).map_err(|source| self.error("read memory of", source))
    }

    /// Writes the process's memory, whatever its protection.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), InjectError> {
        self.memory.write(at, bytes).map_err(|source| self.error("write memory of", source))
    }

    /// Makes the calls one after the other, whatever they return; the results as the kernel gives them (a negated
    /// error number, or a value). One round trip for up to 128 calls.
    ///
    /// Calls must return: no exit, no exec, no rt_sigreturn, no clone; nor may they unmap the area.
    ///
    /// # Errors
    /// The thread's own registers are restored in any case; calls may have been made.
    pub fn run(&mut self, calls: &[Call]) -> Result<Vec<i64>, InjectError> {
        self.run_with(calls, (self.area, &[]), (self.area, &mut []))
    }

    /// As [`Hand::run`]; before the calls memory is written, after them memory is read, in no calls more than without.
    ///
    /// # Errors
    /// As [`Hand::run`].
    pub fn run_with(
        &mut self,
        calls: &[Call],
        before: (u64, &[u8]),
        (at, after): (u64, &mut [u8]),
    ) -> Result<Vec<i64>, InjectError> {
        let mut results = Vec::with_capacity(calls.len());
        let mut bytes = std::mem::take(&mut self.stopped.buffer);
        let made = calls.chunks(N_CALLS).try_for_each(|batch| {
            self.run_batch(batch, before, (at, &mut *after), &mut bytes).map_err(|error| match error {
                InjectError::Blocked { pid, index } => InjectError::Blocked { pid, index: index + results.len() },
                error => error,
            })?;
            let result = |call: &[u8]| call[CALL_BYTES - 8..].try_into().map_or(-1, i64::from_le_bytes);
            results.extend(bytes.chunks_exact(CALL_BYTES).map(result));
            Ok(())
        });
        self.stopped.buffer = bytes;
        made.map(|()| results)
    }

    /// Makes calls that fit into the area; `bytes` is what became of them.
    fn run_batch(
        &mut self,
        batch: &[Call],
        before: (u64, &[u8]),
        (after_at, after): (u64, &mut [u8]),
        bytes: &mut Vec<u8>,
    ) -> Result<(), InjectError> {
        self.begin_batch(batch, before, bytes)?;
        self.finish_batch()?;
        let at = self.area + AREA_CALLS as u64;
        if self.memory.read_all([(at, &mut *bytes), (after_at, &mut *after)]).is_ok() {
            return Ok(());
        }
        self.read(at, bytes)?;
        self.read(after_at, after)
    }

    /// Writes the calls, and memory before them, and lets them be reached; they begin with the next resumption.
    pub(super) fn begin_batch(
        &mut self,
        batch: &[Call],
        before: (u64, &[u8]),
        bytes: &mut Vec<u8>,
    ) -> Result<(), InjectError> {
        bytes.clear();
        for call in batch {
            bytes.extend(call.nr.to_le_bytes());
            bytes.extend(call.args.iter().flat_map(|arg| arg.to_le_bytes()));
            bytes.extend([0; 8]);
        }
        let at = self.area + AREA_CALLS as u64;
        // The number last: an orphan makes all of them or none.
        let count = (self.area + (AREA_SLOTS + slot::COUNT * 8) as u64, &(batch.len() as u64).to_le_bytes()[..]);
        self.memory.write_all([before, (at, bytes), count]).map_err(|source| self.error("write memory of", source))?;
        let start = if self.waits { None } else { Some(Registers { rip: self.area, ..self.foreign() }) };
        self.waits = false;
        self.begin(start)
    }

    /// Lets the calls be made, to the last.
    pub(super) fn finish_batch(&mut self) -> Result<(), InjectError> {
        match self.go_on()? {
            Reached::Marker => {}
            Reached::Birth(_) => return Err(self.error("run calls in", io::Error::other("a process was made"))),
        }
        self.batch_is_finished();
        Ok(())
    }

    /// The code waits at its marker.
    pub(super) fn batch_is_finished(&mut self) {
        self.waits = true;
    }

    /// One call.
    pub fn call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, InjectError> {
        Ok(self.run(&[Call { nr, args }])?[0])
    }

    /// Takes the hand back: the thread has its own registers and signal mask again, and its filter.
    pub fn close(mut self) -> Result<(), InjectError> {
        self.leave()
    }

    pub(super) fn error(&self, op: &'static str, source: io::Error) -> InjectError {
        thread_error(op, self.pid, self.tid, source)
    }

    /// The own registers, fit to start foreign code: not in a call, no single step, forward string operations.
    fn foreign(&self) -> Registers {
        const TRAP_AND_DIRECTION: u64 = 0x100 | 0x400;
        Registers { orig_rax: u64::MAX, eflags: self.own.eflags & !TRAP_AND_DIRECTION, ..self.own }
    }

    /// Finds or makes the area and puts the way back into it.
    fn enter(&mut self, ground: Ground) -> Result<(), InjectError> {
        let (back, how) = interrupted::restarted(&self.own);
        self.area = match &ground {
            Ground::Known(area) | Ground::Found { area: Some(area), .. } => *area,
            Ground::Found { place, area: None, .. } => self.boot(*place, &back)?,
        };
        let mut xstate = std::mem::take(&mut self.stopped.buffer);
        let written = self.write_way_back(&back, how, &mut xstate);
        self.stopped.buffer = xstate;
        written?;
        if let Ground::Found { place, area, stat } = ground {
            if area.is_none() {
                place.record(&self.memory, self.area).map_err(|source| self.error("write the vdso of", source))?;
            }
            fault::point("inject.recorded").map_err(|source| self.error("record the area of", source))?;
            let known = Known { pid: self.pid, tid: self.tid, stat, place, area: self.area };
            self.stopped.kept.known.retain(|other| other.pid != known.pid);
            self.stopped.kept.known.push(known);
        }
        Ok(())
    }

    /// Has the process map an area; its address.
    fn boot(&mut self, place: Place, back: &Registers) -> Result<u64, InjectError> {
        let slots = frame::slots(back, self.mask, self.marker, GoOn::Plain);
        place.prepare(&self.memory, &slots).map_err(|source| self.error("write the vdso of", source))?;
        fault::point("inject.prepared").map_err(|source| self.error("prepare", source))?;
        self.begin(Some(Registers { rip: place.boot(), ..self.foreign() }))?;
        self.go_on()?;
        let end = ptrace::getregs(Pid::from_raw(self.tid))
            .map_err(|source| self.error("read registers of", source.into()))?;
        for result in [end.rbx.cast_signed(), end.r12.cast_signed()] {
            if (-4095..0).contains(&result) {
                return Err(InjectRefusal::AreaDenied { pid: self.pid, errno: -result }.into());
            }
        }
        Ok(end.rbx)
    }

    fn write_way_back(&self, back: &Registers, how: GoOn, xstate: &mut Vec<u8>) -> Result<(), InjectError> {
        xstate.resize(frame::XSTATE_MAX_BYTES, 0);
        let filled = get_xstate(self.tid, xstate).map_err(|source| self.error("read registers of", source))?;
        let len_bytes = frame::seal_xstate(xstate, filled, frame::component_end)
            .ok_or(InjectRefusal::BigState { pid: self.pid, len_bytes: filled })?;
        let context = frame::context(back, self.mask, self.area + AREA_XSTATE as u64);
        let slots = frame::slots(back, self.mask, self.marker, how);
        let at = |offset: usize| self.area + offset as u64;
        let parts =
            [(at(AREA_XSTATE), &xstate[..len_bytes]), (at(AREA_CONTEXT), &context[..]), (at(AREA_SLOTS), &slots[..])];
        self.memory.write_all(parts).map_err(|source| self.error("write memory of", source))
    }

    /// Prepares injected code to be run to its marker: from `start`, or on from where it is.
    fn begin(&mut self, start: Option<Registers>) -> Result<(), InjectError> {
        let tid = self.tid;
        if let Some(start) = start {
            ptrace::setregs(Pid::from_raw(tid), start)
                .map_err(|source| self.error("set registers of", source.into()))?;
            fault::point("inject.registers").map_err(|source| self.error("set registers of", source))?;
        }
        set_signal_mask(tid, u64::MAX).map_err(|source| self.error("set the signal mask of", source))?;
        fault::point("inject.masked").map_err(|source| self.error("set the signal mask of", source))?;
        queue_signal(self.pid, tid, self.marker, 0).map_err(|source| self.error("queue a signal for", source))?;
        fault::point("inject.queued").map_err(|source| self.error("queue a signal for", source))
    }

    /// Lets injected code run until something stops it.
    pub(super) fn go_on(&mut self) -> Result<Reached, InjectError> {
        self.stopped.alarm.listen(BATCH_PATIENCE, TICK).map_err(|source| self.error("time calls of", source))?;
        let reached = self.wait_marker();
        self.stopped.alarm.deafen().map_err(|source| self.error("time calls of", source))?;
        let reached = reached?;
        fault::point("inject.marked").map_err(|source| self.error("wait for", source))?;
        Ok(reached)
    }

    fn wait_marker(&mut self) -> Result<Reached, InjectError> {
        let (pid, tid) = (self.pid, self.tid);
        let deadline = Instant::now() + BATCH_PATIENCE;
        let mut interrupted = false;
        resume(tid, 0).map_err(|source| self.error("resume", source))?;
        fault::point("inject.resumed").map_err(|source| self.error("resume", source))?;
        loop {
            let status = match wait_thread(tid, 0) {
                Ok(Some(status)) => status,
                Ok(None) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    if !interrupted && Instant::now() >= deadline {
                        ptrace::interrupt(Pid::from_raw(tid))
                            .map_err(|source| self.error("interrupt", source.into()))?;
                        interrupted = true;
                    }
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                    return Err(InjectError::Gone { pid, tid });
                }
                Err(error) => return Err(self.error("wait for", error)),
            };
            if !libc::WIFSTOPPED(status) {
                return Err(InjectError::Gone { pid, tid });
            }
            let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
            match signal {
                _ if event != 0 && interrupted => {
                    let left = ptrace::getregs(Pid::from_raw(tid)).map_or(0, |registers| registers.rbx);
                    let done = left.saturating_sub(self.area + AREA_CALLS as u64) / CALL_BYTES as u64;
                    return Err(InjectError::Blocked { pid, index: usize::try_from(done).unwrap_or(0) });
                }
                // A fork is what sends SIGCHLD at its end.
                _ if event == libc::PTRACE_EVENT_CLONE || event == libc::PTRACE_EVENT_FORK => {
                    let child = ptrace::getevent(Pid::from_raw(tid))
                        .map_err(|source| self.error("ask for the child of", source.into()))?;
                    let pid = pid_t::try_from(child);
                    return pid
                        .map(Reached::Birth)
                        .map_err(|_| self.error("ask for the child of", io::ErrorKind::InvalidData.into()));
                }
                // Job control has changed; that is for after the injection.
                _ if event != 0 => {}
                // The only signals that blocking does not hold back.
                libc::SIGSTOP => self.stopped.deferred.push((pid, signal)),
                _ if signal == self.marker => return Ok(Reached::Marker),
                libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP | libc::SIGSYS => {
                    let at = ptrace::getregs(Pid::from_raw(tid)).map_or(0, |registers| registers.rip);
                    return Err(InjectError::Fault { pid, signal, at });
                }
                // Blocked signals do not stop; should one do so, it goes back to where it came from.
                _ => self.stopped.deferred.push((pid, signal)),
            }
            resume(tid, 0).map_err(|source| self.error("resume", source))?;
        }
    }

    /// Sets the thread's `PTRACE_O_*`; without PTRACE_O_SUSPEND_SECCOMP its filter holds.
    pub(super) fn set_options(&self, options: i32) -> Result<(), InjectError> {
        let options = options | if self.ends_with_engine { libc::PTRACE_O_EXITKILL } else { 0 };
        ptrace::setoptions(Pid::from_raw(self.tid), ptrace::Options::from_bits_retain(options))
            .map_err(|source| self.error("set the trace options of", source.into()))
    }

    /// Its thread is no more: there is nothing to take back.
    pub(super) fn forget(&mut self) {
        self.closed = true;
    }

    fn leave(&mut self) -> Result<(), InjectError> {
        if self.closed {
            return Ok(());
        }
        self.closed = true;
        // No step is left out because one before it failed.
        let left = fault::point("inject.leaving").map_err(|source| self.error("leave", source));
        let mask = set_signal_mask(self.tid, self.mask).map_err(|source| self.error("set the signal mask of", source));
        let left = left.and(fault::point("inject.unmasked").map_err(|source| self.error("leave", source)));
        let registers = ptrace::setregs(Pid::from_raw(self.tid), self.own)
            .map_err(|source| self.error("set registers of", source.into()));
        let left = left.and(fault::point("inject.left").map_err(|source| self.error("leave", source)));
        let filter = self.set_options(0);
        if mask.is_err() || registers.is_err() {
            // It is dead, or finds its way out of injected code alone: the next stop looks.
            self.stopped.kept.orphans_finished = false;
            self.stopped.kept.known.retain(|known| known.pid != self.pid);
        }
        mask.and(registers).and(filter).and(left)
    }
}

impl Drop for Hand<'_> {
    fn drop(&mut self) {
        // A failure means that the thread is dead.
        let _ = self.leave();
    }
}

/// One of a process's threads; without `tid` the first.
fn find_thread(stopped: &Stopped, pid: pid_t, tid: Option<pid_t>) -> Result<Thread, InjectRefusal> {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    let mut threads = process.iter().flat_map(|process| &process.threads);
    let found = threads.find(|thread| tid.is_none_or(|tid| thread.tid == tid));
    found.copied().ok_or(InjectRefusal::NotStopped { pid })
}

fn thread_error(op: &'static str, pid: pid_t, tid: pid_t, source: io::Error) -> InjectError {
    // Memory of a process that has ended reads and writes as nothing; its files in /proc are not found.
    let gone = [io::ErrorKind::NotFound, io::ErrorKind::UnexpectedEof, io::ErrorKind::WriteZero];
    if source.raw_os_error() == Some(libc::ESRCH) || gone.contains(&source.kind()) {
        return InjectError::Gone { pid, tid };
    }
    InjectError::Thread { op, pid, tid, source }
}

/// The ground of a process that the tracer knows from an earlier hand, if all is as it was, and the state of the thread:
/// the area is the same for all threads.
fn look_at_known(stopped: &Stopped, (pid, tid): (pid_t, pid_t), memory: &Memory) -> Option<(Ground, Stat)> {
    let known = stopped.kept.known.iter().find(|known| known.pid == pid)?;
    let stat =
        if known.tid == tid { tasks::reread_stat(&known.stat).ok()?? } else { tasks::read_stat(pid, tid).ok()?? };
    known.holds(memory).then_some((Ground::Known(known.area), stat))
}
