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
//!     code: calls ..., unblock the marker ----> signal-delivery stop: the engine reads results, may start over
//!     |       orphan: nobody listens, the marker is a signal that the process ignores
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
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::area::{CALL_BYTES, CALLS, Memory, N_CALLS, Place, SCRATCH};
use super::error::{InjectError, InjectRefusal};
use super::frame::{self, AREA_XSTATE, XSTATE_MAX_BYTES};
use super::interrupted::{self, GoOn};
use super::stop::{Stopped, Thread};
use super::tasks;
use crate::sys::blob::{AREA_BYTES, AREA_CONTEXT, AREA_SLOTS};
use crate::sys::ptrace::{
    get_rseq_configuration, get_signal_mask, get_xstate, queue_signal, resume, set_signal_mask, wait_thread,
};

/// How long a batch may take before the call it is in counts as blocked (chosen).
const BATCH_PATIENCE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(10);

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
    stopped: &'a mut Stopped,
    pid: pid_t,
    tid: pid_t,
    memory: Memory,
    /// The thread's state to be left behind.
    own: Registers,
    mask: u64,
    marker: i32,
    area: u64,
    /// The tracer's own affinity.
    affinity: Option<CpuSet>,
    closed: bool,
}

impl<'a> Hand<'a> {
    pub(super) fn open(stopped: &'a mut Stopped, pid: pid_t) -> Result<Self, InjectError> {
        let thread = first_thread(stopped, pid)?;
        let tid = thread.tid;
        let failed = |op: &'static str| move |source: io::Error| thread_error(op, pid, tid, source);
        if thread.registers.cs != interrupted::CODE_64 {
            return Err(InjectRefusal::ForeignArchitecture { pid }.into());
        }
        let memory = Memory::open(pid, tid).map_err(failed("open the memory of"))?;
        let place = Place::find(pid, tid, &memory)
            .map_err(failed("read the vdso of"))?
            .ok_or(InjectRefusal::NoPlace { pid })?;
        let area = place.recorded(&memory).map_err(failed("read the vdso of"))?;
        stopped.finish_orphans(pid, |rip| place.is_injected(area, rip)).map_err(InjectError::Orphan)?;
        let stat =
            tasks::read_stat(pid, tid).map_err(failed("read the state of"))?.ok_or(InjectError::Gone { pid, tid })?;
        let marker = choose_marker(&stat).ok_or(InjectRefusal::NoMarker { pid })?;
        let mask = get_signal_mask(tid).map_err(failed("read the signal mask of"))?;
        let mut own = first_thread(stopped, pid)?.registers;
        own.rip = leave_critical_section(&memory, tid, &own).map_err(failed("read the rseq area of"))?;
        stopped.keep_registers(tid, own);
        let affinity = pin_to(stat.cpu);
        let mut hand = Self { stopped, pid, tid, memory, own, mask, marker, area: 0, affinity, closed: false };
        hand.set_filter_suspended(true)?;
        // An orphan in boot code has unmapped what it made.
        let area = place.recorded(&hand.memory).map_err(failed("read the vdso of"))?;
        hand.enter(place, area)?;
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
    /// Calls must return: no exit, no exec, no rt_sigreturn; nor may they unmap the area.
    ///
    /// # Errors
    /// The thread's own registers are restored in any case; calls may have been made.
    pub fn run(&mut self, calls: &[Call]) -> Result<Vec<i64>, InjectError> {
        let mut results = Vec::with_capacity(calls.len());
        for batch in calls.chunks(N_CALLS) {
            let mut bytes = Vec::with_capacity(batch.len() * CALL_BYTES);
            for call in batch {
                bytes.extend(call.nr.to_le_bytes());
                bytes.extend(call.args.iter().flat_map(|arg| arg.to_le_bytes()));
                bytes.extend([0; 8]);
            }
            let at = self.area + CALLS as u64;
            self.write(at, &bytes)?;
            let start = Registers { rip: self.area, rbx: at, r12: batch.len() as u64, ..self.foreign() };
            self.execute(start).map_err(|error| match error {
                InjectError::Blocked { pid, index } => InjectError::Blocked { pid, index: index + results.len() },
                error => error,
            })?;
            self.read(at, &mut bytes)?;
            let result = |call: &[u8]| call[CALL_BYTES - 8..].try_into().map_or(-1, i64::from_le_bytes);
            results.extend(bytes.chunks_exact(CALL_BYTES).map(result));
        }
        Ok(results)
    }

    /// One call.
    pub fn call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, InjectError> {
        Ok(self.run(&[Call { nr, args }])?[0])
    }

    /// Takes the hand back: the thread has its own registers and signal mask again, and its filter.
    pub fn close(mut self) -> Result<(), InjectError> {
        self.leave()
    }

    fn error(&self, op: &'static str, source: io::Error) -> InjectError {
        thread_error(op, self.pid, self.tid, source)
    }

    /// The own registers, fit to start foreign code: not in a call, no single step, forward string operations.
    fn foreign(&self) -> Registers {
        const TRAP_AND_DIRECTION: u64 = 0x100 | 0x400;
        Registers { orig_rax: u64::MAX, eflags: self.own.eflags & !TRAP_AND_DIRECTION, ..self.own }
    }

    /// Finds or makes the area and puts the way back into it.
    fn enter(&mut self, place: Place, recorded: Option<u64>) -> Result<(), InjectError> {
        let pid = self.pid;
        let (back, how) = interrupted::restarted(&self.own);
        let mut fresh = None;
        self.area = match recorded {
            Some(area) => area,
            None => {
                let slots = frame::slots(&back, self.mask, self.marker, GoOn::Plain);
                place.prepare(&self.memory, &slots).map_err(|source| self.error("write the vdso of", source))?;
                let end = self.execute(Registers { rip: place.boot(), ..self.foreign() })?;
                for result in [end.rbx.cast_signed(), end.r12.cast_signed()] {
                    if (-4095..0).contains(&result) {
                        return Err(InjectRefusal::AreaDenied { pid, errno: -result }.into());
                    }
                }
                fresh = Some(end.rbx);
                end.rbx
            }
        };
        let mut xstate = vec![0; XSTATE_MAX_BYTES];
        let filled = get_xstate(self.tid, &mut xstate).map_err(|source| self.error("read registers of", source))?;
        let len_bytes = frame::seal_xstate(&mut xstate, filled, frame::component_end)
            .ok_or(InjectRefusal::BigState { pid, len_bytes: filled })?;
        let context = frame::context(&back, self.mask, self.area + AREA_XSTATE as u64);
        self.write(self.area + AREA_XSTATE as u64, &xstate[..len_bytes])?;
        self.write(self.area + AREA_CONTEXT as u64, &context)?;
        self.write(self.area + AREA_SLOTS as u64, &frame::slots(&back, self.mask, self.marker, how))?;
        if let Some(area) = fresh {
            place.record(&self.memory, area).map_err(|source| self.error("write the vdso of", source))?;
        }
        Ok(())
    }

    /// Runs injected code until its marker; the registers there.
    fn execute(&mut self, start: Registers) -> Result<Registers, InjectError> {
        let tid = self.tid;
        let pid = Pid::from_raw(tid);
        ptrace::setregs(pid, start).map_err(|source| self.error("set registers of", source.into()))?;
        set_signal_mask(tid, u64::MAX).map_err(|source| self.error("set the signal mask of", source))?;
        queue_signal(self.pid, tid, self.marker, 0).map_err(|source| self.error("queue a signal for", source))?;
        self.stopped.alarm.arm(BATCH_PATIENCE, TICK).map_err(|source| self.error("time calls of", source))?;
        let reached = self.wait_marker();
        self.stopped.alarm.disarm().map_err(|source| self.error("time calls of", source))?;
        reached?;
        ptrace::getregs(pid).map_err(|source| self.error("read registers of", source.into()))
    }

    fn wait_marker(&mut self) -> Result<(), InjectError> {
        let (pid, tid) = (self.pid, self.tid);
        let deadline = Instant::now() + BATCH_PATIENCE;
        let mut interrupted = false;
        resume(tid, 0).map_err(|source| self.error("resume", source))?;
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
                    let done = left.saturating_sub(self.area + CALLS as u64) / CALL_BYTES as u64;
                    return Err(InjectError::Blocked { pid, index: usize::try_from(done).unwrap_or(0) });
                }
                // Job control has changed; that is for after the injection.
                _ if event != 0 => {}
                // The only signals that blocking does not hold back.
                libc::SIGSTOP => self.stopped.deferred.push((pid, signal)),
                _ if signal == self.marker => return Ok(()),
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

    fn set_filter_suspended(&self, suspended: bool) -> Result<(), InjectError> {
        let options = if suspended { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        ptrace::setoptions(Pid::from_raw(self.tid), ptrace::Options::from_bits_retain(options))
            .map_err(|source| self.error("suspend the system call filter of", source.into()))
    }

    fn leave(&mut self) -> Result<(), InjectError> {
        if self.closed {
            return Ok(());
        }
        self.closed = true;
        let mask = set_signal_mask(self.tid, self.mask).map_err(|source| self.error("set the signal mask of", source));
        let registers = ptrace::setregs(Pid::from_raw(self.tid), self.own)
            .map_err(|source| self.error("set registers of", source.into()));
        let filter = self.set_filter_suspended(false);
        if let Some(affinity) = self.affinity.take() {
            // CPUs may have gone meanwhile; then any will do.
            let _ = sched_setaffinity(Pid::from_raw(0), &affinity);
        }
        mask.and(registers).and(filter)
    }
}

impl Drop for Hand<'_> {
    fn drop(&mut self) {
        // A failure means that the thread is dead.
        let _ = self.leave();
    }
}

fn first_thread(stopped: &Stopped, pid: pid_t) -> Result<Thread, InjectRefusal> {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    process.and_then(|process| process.threads.first()).copied().ok_or(InjectRefusal::NotStopped { pid })
}

fn thread_error(op: &'static str, pid: pid_t, tid: pid_t, source: io::Error) -> InjectError {
    if source.raw_os_error() == Some(libc::ESRCH) {
        return InjectError::Gone { pid, tid };
    }
    InjectError::Thread { op, pid, tid, source }
}

/// A signal that has no effect on the process, so that an orphan can receive it, and is not pending for the thread.
fn choose_marker(stat: &tasks::Stat) -> Option<i32> {
    const IGNORED_BY_DEFAULT: [i32; 2] = [libc::SIGURG, libc::SIGWINCH];
    // Signals 1 to 31 but those that faults send and that stop, continue or kill, or that say something of children.
    const NEVER: [i32; 14] = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGCONT,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
        libc::SIGCHLD,
        libc::SIGABRT,
    ];
    let is_in = |set: u64, signal: i32| set & (1 << (signal - 1)) != 0;
    let harmless = IGNORED_BY_DEFAULT.into_iter().filter(|signal| !is_in(stat.caught, *signal));
    let ignored = (1..32).filter(|signal| is_in(stat.ignored, *signal) && !NEVER.contains(signal));
    harmless.chain(ignored).find(|signal| !is_in(stat.pending, *signal))
}

/// The instruction to go on with: the own one, or the abort handler if that is in a restartable sequence.
///
/// The kernel itself aborts sequences when it returns to a thread that was scheduled out, but it would see the
/// injected code's address, find it outside, and forget the sequence.
fn leave_critical_section(memory: &Memory, tid: pid_t, registers: &Registers) -> io::Result<u64> {
    let rip = registers.rip;
    let area = get_rseq_configuration(tid)?.address;
    let mut pointer = [0; 8];
    // An area or a description that cannot be read would kill the thread at its next return; that is its affair.
    if area == 0 || memory.read(area + 8, &mut pointer).is_err() {
        return Ok(rip);
    }
    let mut section = [0; 32];
    let pointer = u64::from_le_bytes(pointer);
    if pointer == 0 || memory.read(pointer, &mut section).is_err() {
        return Ok(rip);
    }
    let word = |at: usize| section[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
    let (start, len_bytes, abort) = (word(8), word(16), word(24));
    Ok(if rip.wrapping_sub(start) < len_bytes { abort } else { rip })
}

/// Pins the calling thread to `cpu`; what it was pinned to before. A round trip across CPUs takes 10 times as long.
fn pin_to(cpu: usize) -> Option<CpuSet> {
    let own = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut one = CpuSet::new();
    one.set(cpu).ok()?;
    sched_setaffinity(Pid::from_raw(0), &one).ok()?;
    Some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn set(signals: &[i32]) -> u64 {
        let mut set = 0;
        let mut at = 0;
        while at < signals.len() {
            set |= 1 << (signals[at] - 1);
            at += 1;
        }
        set
    }

    fn marker(pending: u64, ignored: u64, caught: u64) -> Option<i32> {
        choose_marker(&tasks::Stat { state: 't', pending, ignored, caught, cpu: 0 })
    }

    #[test]
    fn the_marker_is_a_signal_that_the_process_does_not_notice() {
        assert_eq!(marker(0, 0, 0), Some(libc::SIGURG));
        assert_eq!(marker(set(&[libc::SIGURG]), 0, 0), Some(libc::SIGWINCH));
        assert_eq!(marker(0, 0, set(&[libc::SIGURG])), Some(libc::SIGWINCH));
        let both = set(&[libc::SIGURG, libc::SIGWINCH]);
        assert_eq!(marker(0, set(&[libc::SIGPIPE]), both), Some(libc::SIGPIPE));
        assert_eq!(marker(0, set(&[libc::SIGCHLD, libc::SIGTSTP, libc::SIGSEGV]), both), None);
    }
}
