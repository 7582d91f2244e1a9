//! The way to a stop: find the threads, seize and interrupt them, wait for each, until none is new.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use libc::pid_t;
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::error::{StopError, StopRefusal};
use super::stop::{Process, Request, Stopped, Thread};
use super::waits::Waits;
use super::{tasks, timeouts};
use crate::sys::ptrace::{reap_if_ended, resume, wait_thread};

/// After so long a thread that has not stopped is looked at (chosen: stops take 10 to 200 us; too short a time
/// only costs a look).
pub(super) const PATIENCE: Duration = Duration::from_millis(2);
/// How often it is looked at again, and the deadline (chosen).
pub(super) const TICK: Duration = Duration::from_millis(1);
/// So often a thread may turn out to be another one before it is seized (chosen: 25 ms of attempts).
const SEIZE_ATTEMPTS: usize = 1000;
/// How long, after a refusal, threads that can halt may take to do so (chosen: they need their turn on a CPU).
const CALM: Duration = Duration::from_millis(200);

/// What a wait for a thread that was interrupted found.
pub(super) enum Halt {
    Halted {
        group_stopped: bool,
    },
    Ended,
    /// Neither, and it sleeps uninterruptibly.
    Stuck,
}

pub(super) fn settle(stopped: &mut Stopped, request: Request<'_>) -> Result<(), StopError> {
    loop {
        seize_new(stopped, &request)?;
        interrupt_new(stopped)?;
        // After the deadline nothing new is begun, but what was interrupted is waited for: it can be let go then.
        let late = Instant::now() >= request.deadline;
        crate::fault::point("stop.interrupted").map_err(faulted)?;
        let stuck = wait_all(stopped, request.deadline)?;
        if !stuck.is_empty() {
            stopped.resume();
            for (pid, tid) in stuck {
                wait_unstuck(stopped, pid, tid, request.deadline)?;
            }
            seize_released(stopped);
            continue;
        }
        if is_complete(stopped, &request)? && read_all(stopped)? && is_complete(stopped, &request)? {
            return crate::fault::point("stop.halted").map_err(faulted);
        }
        if late {
            return Err(StopRefusal::Unsettled { n_threads: stopped.n_threads() }.into());
        }
    }
}

fn unread((path, source): (PathBuf, io::Error)) -> StopError {
    StopError::Group { op: "read", path, source }
}

fn faulted(source: io::Error) -> StopError {
    StopError::Tracer { op: "stop", source }
}

/// Forgets the threads that were let go: the next scan finds those that still live.
fn seize_released(stopped: &mut Stopped) {
    for process in &mut stopped.processes {
        process.threads.retain(|thread| thread.halted);
    }
    stopped.processes.retain(|process| !process.threads.is_empty());
}

/// Seizes what is not seized yet. It runs on meanwhile: only the interruption that follows makes it stand still.
fn seize_new(stopped: &mut Stopped, request: &Request<'_>) -> Result<(), StopError> {
    for pid in stopped.lists.processes().map_err(unread)? {
        if request.excluded.contains(&pid) {
            continue;
        }
        let tids = tasks::scan_threads(pid).map_err(|source| StopError::Thread {
            op: "list threads of",
            pid,
            tid: pid,
            source,
        })?;
        let at = match stopped.processes.iter().position(|process| process.pid == pid) {
            Some(at) => at,
            None => {
                stopped.processes.push(Process {
                    pid,
                    threads: Vec::new(),
                    ends_with_engine: false,
                    told: Default::default(),
                });
                stopped.processes.len() - 1
            }
        };
        for tid in tids {
            if stopped.processes[at].threads.iter().any(|thread| thread.tid == tid)
                || !seize(pid, tid, request.deadline)?
            {
                continue;
            }
            let registers = super::frame::zero_registers();
            let thread = Thread { tid, registers, group_stopped: false, interrupted: false, halted: false };
            let threads = &mut stopped.processes[at].threads;
            // The leader first, whoever was there before: it may have been let go for a while.
            threads.insert(if tid == pid { 0 } else { threads.len() }, thread);
        }
    }
    Ok(())
}

/// Interrupts what was seized; what has ended since is forgotten. The first time programs stand still from here on.
fn interrupt_new(stopped: &mut Stopped) -> Result<(), StopError> {
    if stopped.begun.is_none() {
        stopped.follow();
        stopped.begun = Some(Instant::now());
    }
    for process in &mut stopped.processes {
        let mut at = 0;
        while let Some(thread) = process.threads.get_mut(at) {
            thread.interrupted = thread.interrupted || interrupt(process.pid, thread.tid)?;
            if thread.interrupted {
                at += 1;
            } else {
                process.threads.remove(at);
            }
        }
    }
    Ok(())
}

/// Seizes one thread; `false` if there is nothing to stop (it is dead).
///
/// Without PTRACE_O_SUSPEND_SECCOMP: the thread still runs, and would run unfiltered until it stops. The hand sets it.
fn seize(pid: pid_t, tid: pid_t, deadline: Instant) -> Result<bool, StopError> {
    let failed = |op: &'static str| move |source: io::Error| StopError::Thread { op, pid, tid, source };
    let mut n_attempts = 0;
    while n_attempts < SEIZE_ATTEMPTS {
        match ptrace::seize(Pid::from_raw(tid), ptrace::Options::empty()) {
            Ok(()) => return Ok(true),
            Err(nix::Error::ESRCH) => return Ok(false),
            Err(nix::Error::EPERM) => n_attempts += 1,
            // It waits for an exec in this process, and that for the end of its threads: of ours too, which are to be
            // reaped. Threads that someone else traces may never be.
            Err(nix::Error::EINTR) => {
                if Instant::now() >= deadline {
                    return Err(refuse(pid, tid).into());
                }
                reap_ended(pid);
                continue;
            }
            Err(error) => return Err(failed("seize")(error.into())),
        }
        let stat = tasks::read_stat(pid, tid).map_err(failed("read the state of"))?;
        if stat.is_none_or(|stat| matches!(stat.state, 'Z' | 'X')) {
            return Ok(false);
        }
        match tasks::read_tracer(pid, tid).map_err(failed("read the tracer of"))? {
            None => return Ok(false),
            // Its tracer let go in between. Or it was a leader that ended for another thread's exec: that holds back the
            // seizing until it is done, so the next attempt, made at once, comes before the next exec.
            Some(0) => {}
            // Ours under another name: it took over the leader's at an exec.
            Some(tracer) if tracer == nix::unistd::gettid().as_raw() || tracer == nix::unistd::getpid().as_raw() => {
                return Ok(true);
            }
            Some(tracer) => return Err(StopRefusal::TracedInside { pid, tracer }.into()),
        }
    }
    // We lack the right.
    Err(failed("seize")(nix::Error::EPERM.into()))
}

pub(super) fn interrupt(pid: pid_t, tid: pid_t) -> Result<bool, StopError> {
    match ptrace::interrupt(Pid::from_raw(tid)) {
        Ok(()) => Ok(true),
        Err(nix::Error::ESRCH) => Ok(false),
        Err(error) => Err(StopError::Thread { op: "interrupt", pid, tid, source: error.into() }),
    }
}

/// Waits for every thread that was interrupted; the stuck ones.
fn wait_all(stopped: &mut Stopped, deadline: Instant) -> Result<Vec<(pid_t, pid_t)>, StopError> {
    let mut stuck = Vec::new();
    for process in &mut stopped.processes {
        let pid = process.pid;
        let mut at = 0;
        while let Some(thread) = process.threads.get_mut(at) {
            if thread.halted {
                at += 1;
                continue;
            }
            match wait_halt(pid, thread.tid, deadline)? {
                Halt::Halted { group_stopped } => {
                    thread.halted = true;
                    thread.group_stopped = group_stopped;
                    // Not stopped any more if it was killed since: the look at all of them finds that.
                    match read_thread(pid, thread, &mut stopped.kept.waits) {
                        Ok(()) | Err(nix::Error::ESRCH) => at += 1,
                        Err(error) => {
                            let (op, tid) = ("read registers of", thread.tid);
                            return Err(StopError::Thread { op, pid, tid, source: error.into() });
                        }
                    }
                }
                Halt::Ended => drop(process.threads.remove(at)),
                Halt::Stuck => {
                    stuck.push((pid, thread.tid));
                    at += 1;
                }
            }
        }
    }
    Ok(stuck)
}

/// Waits for a thread that sleeps uninterruptibly, while all others run.
fn wait_unstuck(stopped: &mut Stopped, pid: pid_t, tid: pid_t, deadline: Instant) -> Result<(), StopError> {
    loop {
        let halt = wait_halt(pid, tid, deadline)?;
        let Some(process) = stopped.processes.iter_mut().find(|process| process.pid == pid) else { return Ok(()) };
        match halt {
            Halt::Halted { group_stopped } => {
                for thread in process.threads.iter_mut().filter(|thread| thread.tid == tid) {
                    (thread.halted, thread.group_stopped) = (true, group_stopped);
                    match read_thread(pid, thread, &mut stopped.kept.waits) {
                        Ok(()) | Err(nix::Error::ESRCH) => {}
                        Err(error) => {
                            return Err(StopError::Thread { op: "read registers of", pid, tid, source: error.into() });
                        }
                    }
                }
                return Ok(());
            }
            Halt::Ended => {
                process.threads.retain(|thread| thread.tid != tid);
                return Ok(());
            }
            Halt::Stuck if Instant::now() >= deadline => return Err(refuse(pid, tid).into()),
            Halt::Stuck => {}
        }
    }
}

/// Waits until an interrupted thread halts where the kernel is about to return to it and handle signals.
pub(super) fn wait_halt(pid: pid_t, tid: pid_t, deadline: Instant) -> Result<Halt, StopError> {
    let failed = |op: &'static str| move |source: io::Error| StopError::Thread { op, pid, tid, source };
    loop {
        let status = match wait_thread(tid, 0) {
            Ok(Some(status)) => status,
            Ok(None) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                // An exec waits for the end of all other threads, those that are waited for later too.
                reap_ended(pid);
                let state = tasks::read_stat(pid, tid).map_err(failed("read the state of"))?.map(|stat| stat.state);
                match state {
                    // A leader that ended before its threads is not reported until they end.
                    None | Some('Z' | 'X') => return Ok(Halt::Ended),
                    Some('D') => return Ok(Halt::Stuck),
                    Some(_) if Instant::now() >= deadline => return Err(refuse(pid, tid).into()),
                    // It may have become another one, by an exec.
                    Some(_) => match interrupt(pid, tid)? {
                        true => continue,
                        false => return Ok(Halt::Ended),
                    },
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(Halt::Ended),
            Err(error) => return Err(failed("wait for")(error)),
        };
        if !libc::WIFSTOPPED(status) {
            return Ok(Halt::Ended);
        }
        let signal = libc::WSTOPSIG(status);
        match status >> 16 {
            libc::PTRACE_EVENT_STOP => return Ok(Halt::Halted { group_stopped: signal != libc::SIGTRAP }),
            // A signal came before the interruption: it is delivered now, and the halt follows at its handler's first
            // instruction. Or it ends the process.
            event => {
                let signal = if event == 0 { signal } else { 0 };
                match resume(tid, signal) {
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(failed("resume")(error)),
                    _ => {}
                }
            }
        }
    }
}

/// Reaps the threads of a process that have ended and are ours: an exec waits for that, whichever of them is waited for.
pub(super) fn reap_ended(pid: pid_t) {
    // A process that cannot be looked at is gone.
    for tid in tasks::scan_threads(pid).unwrap_or_default() {
        reap_if_ended(tid);
    }
}

pub(super) fn refuse(pid: pid_t, tid: pid_t) -> StopRefusal {
    let (call, first_argument, wchan) = tasks::read_whereabouts(pid, tid);
    let state = tasks::read_stat(pid, tid).ok().flatten().map_or('?', |stat| stat.state);
    if state == 'D' && tasks::waits_for_vfork(call, first_argument) {
        return StopRefusal::VforkInFlight { pid, tid };
    }
    StopRefusal::Uninterruptible { pid, tid, state, call, wchan }
}

/// Whether all threads of the group are among the stopped ones: the kernel's own list of its tasks, for during an exec a
/// process can escape a scan by its leader.
fn is_complete(stopped: &Stopped, request: &Request<'_>) -> Result<bool, StopError> {
    let tids = stopped.lists.threads().map_err(unread)?;
    let is_stopped = |tid| stopped.processes.iter().any(|process| process.threads.iter().any(|t| t.tid == tid));
    let is_excluded = |tid| request.excluded.iter().any(|pid| tasks::is_thread_of(*pid, tid));
    // One that is gone may have become the leader meanwhile: the next scan tells.
    let has_ended = |tid| matches!(tasks::read_stat(tid, tid), Ok(Some(stat)) if matches!(stat.state, 'Z' | 'X'));
    Ok(tids.into_iter().all(|tid| is_stopped(tid) || is_excluded(tid) || has_ended(tid)))
}

/// Reads all registers again, for a thread can be another one than the one that halted: an exec killed the leader and
/// its thread, interrupted too, halts under the leader's number. `false` if a thread is not stopped (killed): it
/// is forgotten, and the next scan decides.
fn read_all(stopped: &mut Stopped) -> Result<bool, StopError> {
    let mut all = true;
    let Stopped { processes, kept, .. } = stopped;
    for process in &mut *processes {
        let pid = process.pid;
        let mut failure = None;
        process.threads.retain_mut(|thread| match read_thread(pid, thread, &mut kept.waits) {
            Ok(()) => true,
            Err(nix::Error::ESRCH) => {
                all = false;
                false
            }
            Err(error) => {
                let (op, tid) = ("read registers of", thread.tid);
                failure = Some(StopError::Thread { op, pid, tid, source: error.into() });
                true
            }
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
    }
    processes.retain(|process| !process.threads.is_empty());
    Ok(all)
}

/// Reads a halted thread's registers and hides the interruption in them: at once, for it may be let go at any step.
pub(super) fn read_thread(pid: pid_t, thread: &mut Thread, waits: &mut Waits) -> nix::Result<()> {
    let tid = thread.tid;
    let registers = ptrace::getregs(Pid::from_raw(tid))?;
    let call = registers.orig_rax.cast_signed();
    let read_limit = |timeout| timeouts::read_limit(pid, tid, call, timeout);
    thread.registers = match waits.pass(tid, &registers, Instant::now(), read_limit) {
        None => registers,
        Some(hidden) => {
            ptrace::setregs(Pid::from_raw(tid), hidden)?;
            hidden
        }
    };
    Ok(())
}

/// After a refusal: waits for the threads that were interrupted, so that the interruption is hidden from them too.
/// Those that cannot be halted stay as they are: the tracer's end lets them go before they have noticed anything.
pub(super) fn calm(stopped: &mut Stopped) {
    let deadline = Instant::now() + CALM;
    for process in &mut stopped.processes {
        for thread in process.threads.iter_mut().filter(|thread| thread.interrupted && !thread.halted) {
            if let Ok(Halt::Halted { .. }) = wait_halt(process.pid, thread.tid, deadline) {
                thread.halted = true;
                // A failure means that it was killed.
                let _ = read_thread(process.pid, thread, &mut stopped.kept.waits);
            }
        }
    }
}
