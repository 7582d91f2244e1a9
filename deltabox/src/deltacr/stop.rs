//! Stop every thread of every process of a group, and let them go on.
//!
//! One OS thread per stop does all the tracing: ptrace belongs to the thread that seized. It is also the last resort:
//! a thread that cannot be stopped cannot be detached either, but the end of its tracer frees it, unchanged.
//!
//! ```text
//! scan cgroup.procs, /proc/PID/task --> seize, interrupt --> wait for each --> twice nothing new? --> Stopped
//!        ^                                                       |  one is in an uninterruptible sleep (vfork)
//!        +------ it stopped <------ let all others run <---------+--> deadline: refused
//! ```
//!
//! New threads and processes are found by scanning again, not by PTRACE_O_TRACECLONE: a seized thread stops at the
//! end of the call it is in, so it makes at most one more, and none can be missed that was there before the last two
//! scans began. Events would add a stop for each clone and a second kind of stop, from which nothing can be injected.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libc::{pid_t, user_regs_struct as Registers};
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::alarm::Alarm;
use super::error::{StopError, StopRefusal};
use super::inject::Hand;
use super::{InjectError, interrupted, tasks};
use crate::sys::ptrace::{resume, wait_thread};

/// After so long a thread that has not stopped is looked at (chosen: stops take 10 to 200 us; too short a time
/// only costs a look).
const PATIENCE: Duration = Duration::from_millis(2);
/// How often it is looked at again, and the deadline (chosen).
const TICK: Duration = Duration::from_millis(1);
/// How long an orphan may take to find its way out of injected code (chosen: it needs microseconds).
const ORPHAN_PATIENCE: Duration = Duration::from_secs(1);

/// What to stop.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The cgroup directory that holds the processes.
    pub group: &'a Path,
    /// Processes in it to leave alone (init).
    pub excluded: &'a [pid_t],
    /// When to give up.
    pub deadline: Instant,
}

/// Stops the group, does `work` on it, lets it go on. `work` runs on a thread of its own, the tracer.
///
/// A child of this very process that ends during the stop is reaped by it, and its exit status lost: exclude children,
/// or let another process (init) be the parent.
///
/// # Errors
/// All processes run on, unchanged but for this: an `epoll_wait` that the stop interrupted starts its timeout over.
pub fn while_stopped<R, F>(request: Request<'_>, work: F) -> Result<R, StopError>
where
    R: Send,
    F: FnOnce(&mut Stopped) -> R + Send,
{
    let tracer = || {
        let mut stopped = stop(request)?;
        let result = work(&mut stopped);
        stopped.resume();
        Ok(result)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("tracer".to_owned())
            .spawn_scoped(scope, tracer)
            .map_err(|source| StopError::Tracer { op: "start the tracer thread", source })?;
        thread.join().unwrap_or(Err(StopError::Panicked))
    })
}

/// All threads of a group, stopped, as long as this lives. Belongs to the thread that stopped them.
#[derive(Debug)]
pub struct Stopped {
    processes: Vec<Process>,
    /// SIGSTOPs that arrived while injected code ran, to be sent again.
    pub(super) deferred: Vec<(pid_t, i32)>,
    pub(super) alarm: Alarm,
    /// Raw pointers are not `Send`: neither is this.
    not_send: PhantomData<*const ()>,
}

/// A stopped process.
#[derive(Debug)]
pub struct Process {
    /// Host PID.
    pub pid: pid_t,
    /// Its threads that live, the leader first if it does.
    pub threads: Vec<Thread>,
}

/// A stopped thread.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    /// Host TID.
    pub tid: pid_t,
    /// General registers at the stop.
    pub registers: Registers,
    /// Whether job control had stopped it before.
    pub group_stopped: bool,
    halted: bool,
}

impl Stopped {
    /// The processes, in the order in which the group listed them.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// How many threads are stopped.
    pub fn n_threads(&self) -> usize {
        self.processes.iter().map(|process| process.threads.len()).sum()
    }

    /// The engine's hand in process `pid`: its first thread will make system calls for the engine. The tracer is
    /// pinned to that thread's CPU meanwhile.
    ///
    /// # Errors
    /// The process is unchanged, apart from the area that an earlier hand left in it.
    pub fn hand(&mut self, pid: pid_t) -> Result<Hand<'_>, InjectError> {
        Hand::open(self, pid)
    }

    /// Lets all go on. Also happens on drop.
    pub fn resume(self) {
        drop(self);
    }

    /// Lets the threads of `pid` that are in injected code of an engine that died run until they are out of it: what
    /// they need for that would be overwritten. The others stay stopped.
    pub(super) fn finish_orphans(&mut self, pid: pid_t, is_injected: impl Fn(u64) -> bool) -> Result<(), StopError> {
        let deadline = Instant::now() + ORPHAN_PATIENCE;
        let failed = |op: &'static str, tid| move |source: io::Error| StopError::Thread { op, pid, tid, source };
        let Some(process) = self.processes.iter_mut().find(|process| process.pid == pid) else { return Ok(()) };
        for thread in process.threads.iter_mut().filter(|thread| is_injected(thread.registers.rip)) {
            let tid = thread.tid;
            while is_injected(thread.registers.rip) {
                resume(tid, 0).map_err(failed("resume", tid))?;
                thread.halted = false;
                // Its turn, should it be on this CPU: microseconds are all it needs.
                std::thread::yield_now();
                interrupt(pid, tid)?;
                self.alarm.arm(PATIENCE, TICK).map_err(failed("time", tid))?;
                let halt = wait_halt(pid, tid, deadline);
                self.alarm.disarm().map_err(failed("time", tid))?;
                match halt? {
                    Halt::Halted { .. } => thread.halted = true,
                    Halt::Ended => return Err(failed("wait for", tid)(io::Error::from_raw_os_error(libc::ESRCH))),
                    Halt::Stuck => return Err(refuse(pid, tid).into()),
                }
                if Instant::now() >= deadline {
                    return Err(refuse(pid, tid).into());
                }
                read_thread(thread).map_err(|error| failed("read registers of", tid)(error.into()))?;
            }
        }
        Ok(())
    }

    /// Remembers registers that differ from those at the stop: a later hand must start from them.
    pub(super) fn keep_registers(&mut self, tid: pid_t, registers: Registers) {
        if let Some((_, thread)) = self.threads_mut().find(|(_, thread)| thread.tid == tid) {
            thread.registers = registers;
        }
    }

    fn threads_mut(&mut self) -> impl Iterator<Item = (pid_t, &mut Thread)> {
        self.processes.iter_mut().flat_map(|process| {
            let pid = process.pid;
            process.threads.iter_mut().map(move |thread| (pid, thread))
        })
    }

    /// Detaches all that are halted; the others stay seized until this OS thread ends.
    fn release(&mut self) {
        for (pid, signal) in self.deferred.drain(..) {
            if let Ok(signal) = nix::sys::signal::Signal::try_from(signal) {
                // It may have died meanwhile.
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
            }
        }
        let mut dead = Vec::new();
        for (_, thread) in self.threads_mut().filter(|(_, thread)| thread.halted) {
            thread.halted = false;
            // Refused only for a thread that was killed: it waits to be reaped by its tracer.
            if ptrace::detach(Pid::from_raw(thread.tid), None).is_err() {
                dead.push(thread.tid);
            }
        }
        // The leader of a process is reaped after its threads. What is not yet dead is reaped at this OS thread's end.
        for tid in dead.into_iter().rev() {
            let _ = wait_thread(tid, libc::WNOHANG);
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.release();
    }
}

/// What a wait for a thread that was interrupted found.
enum Halt {
    Halted {
        group_stopped: bool,
    },
    Ended,
    /// Neither, and it sleeps uninterruptibly.
    Stuck,
}

fn stop(request: Request<'_>) -> Result<Stopped, StopError> {
    let alarm = Alarm::new().map_err(|source| StopError::Tracer { op: "make a timer", source })?;
    let mut stopped = Stopped { processes: Vec::new(), deferred: Vec::new(), alarm, not_send: PhantomData };
    let arm = |alarm: &mut Alarm| alarm.arm(PATIENCE, TICK);
    arm(&mut stopped.alarm).map_err(|source| StopError::Tracer { op: "arm a timer", source })?;
    settle(&mut stopped, request)?;
    stopped.alarm.disarm().map_err(|source| StopError::Tracer { op: "disarm a timer", source })?;
    Ok(stopped)
}

fn settle(stopped: &mut Stopped, request: Request<'_>) -> Result<(), StopError> {
    let procs = request.group.join("cgroup.procs");
    let mut n_clean_scans = 0;
    let mut late = false;
    loop {
        let n_new = seize_new(stopped, &procs, request.excluded)?;
        if n_new > 0 {
            n_clean_scans = 0;
            // After the deadline nothing new is begun, but what was interrupted is waited for: it can be let go then.
            late = Instant::now() >= request.deadline;
        }
        let stuck = wait_all(stopped, request.deadline)?;
        if !stuck.is_empty() {
            stopped.release();
            for (pid, tid) in stuck {
                wait_unstuck(stopped, pid, tid, request.deadline)?;
            }
            seize_released(stopped);
            n_clean_scans = 0;
            continue;
        }
        if n_new == 0 {
            n_clean_scans += 1;
        }
        if n_clean_scans >= 2 {
            if read_registers(stopped)? {
                return Ok(());
            }
            n_clean_scans = 0;
        }
        if late {
            return Err(StopRefusal::Unsettled { n_threads: stopped.n_threads() }.into());
        }
    }
}

/// Forgets the threads that were let go: the next scan finds those that still live.
fn seize_released(stopped: &mut Stopped) {
    for process in &mut stopped.processes {
        process.threads.retain(|thread| thread.halted);
    }
    stopped.processes.retain(|process| !process.threads.is_empty());
}

/// Seizes and interrupts what is not seized yet; how many threads that were.
fn seize_new(stopped: &mut Stopped, procs: &Path, excluded: &[pid_t]) -> Result<usize, StopError> {
    let group = |source| StopError::Group { op: "read", path: PathBuf::from(procs), source };
    let mut n_new = 0;
    for pid in tasks::scan_group(procs).map_err(group)? {
        if excluded.contains(&pid) {
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
                stopped.processes.push(Process { pid, threads: Vec::new() });
                stopped.processes.len() - 1
            }
        };
        for tid in tids {
            if stopped.processes[at].threads.iter().any(|thread| thread.tid == tid) || !seize(pid, tid)? {
                continue;
            }
            let registers = super::frame::zero_registers();
            let thread = Thread { tid, registers, group_stopped: false, halted: false };
            stopped.processes[at].threads.push(thread);
            n_new += 1;
        }
    }
    Ok(n_new)
}

/// Seizes and interrupts one thread; `false` if there is nothing to stop (it is dead).
///
/// Without PTRACE_O_SUSPEND_SECCOMP: the thread still runs, and would run unfiltered until it stops. The hand sets it.
fn seize(pid: pid_t, tid: pid_t) -> Result<bool, StopError> {
    let failed = |op: &'static str| move |source: io::Error| StopError::Thread { op, pid, tid, source };
    match ptrace::seize(Pid::from_raw(tid), ptrace::Options::empty()) {
        Ok(()) => {}
        Err(nix::Error::ESRCH) => return Ok(false),
        Err(nix::Error::EPERM) => {
            let stat = tasks::read_stat(pid, tid).map_err(failed("read the state of"))?;
            if stat.is_none_or(|stat| matches!(stat.state, 'Z' | 'X')) {
                return Ok(false);
            }
            let Some(tracer) = tasks::read_tracer(pid, tid).map_err(failed("read the tracer of"))? else {
                return Ok(false);
            };
            if tracer == 0 {
                // Its tracer let go in between, or we lack the right.
                return match ptrace::seize(Pid::from_raw(tid), ptrace::Options::empty()) {
                    Ok(()) => interrupt(pid, tid),
                    Err(error) => Err(failed("seize")(error.into())),
                };
            }
            if tracer != nix::unistd::gettid().as_raw() && tracer != nix::unistd::getpid().as_raw() {
                return Err(StopRefusal::TracedInside { pid, tracer }.into());
            }
            // Ours under another name: it took over the leader's at an exec.
        }
        Err(error) => return Err(failed("seize")(error.into())),
    }
    interrupt(pid, tid)
}

fn interrupt(pid: pid_t, tid: pid_t) -> Result<bool, StopError> {
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
                    at += 1;
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
fn wait_halt(pid: pid_t, tid: pid_t, deadline: Instant) -> Result<Halt, StopError> {
    let failed = |op: &'static str| move |source: io::Error| StopError::Thread { op, pid, tid, source };
    loop {
        let status = match wait_thread(tid, 0) {
            Ok(Some(status)) => status,
            Ok(None) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                let state = tasks::read_stat(pid, tid).map_err(failed("read the state of"))?.map(|stat| stat.state);
                match state {
                    // A leader that ended before its threads is not reported until they end.
                    None | Some('Z' | 'X') => return Ok(Halt::Ended),
                    Some('D') => return Ok(Halt::Stuck),
                    Some(_) if Instant::now() >= deadline => return Err(refuse(pid, tid).into()),
                    Some(_) => continue,
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

fn refuse(pid: pid_t, tid: pid_t) -> StopRefusal {
    let (call, first_argument, wchan) = tasks::read_whereabouts(pid, tid);
    let state = tasks::read_stat(pid, tid).ok().flatten().map_or('?', |stat| stat.state);
    if state == 'D' && tasks::waits_for_vfork(call, first_argument) {
        return StopRefusal::VforkInFlight { pid, tid };
    }
    StopRefusal::Uninterruptible { pid, tid, state, call, wchan }
}

/// Reads every thread's registers and hides the interruption in them. `false` if a thread turned out to be not
/// stopped (killed, or replaced at an exec): it is forgotten, and the next scan decides.
fn read_registers(stopped: &mut Stopped) -> Result<bool, StopError> {
    let mut all = true;
    for process in &mut stopped.processes {
        let pid = process.pid;
        let mut failure = None;
        process.threads.retain_mut(|thread| match read_thread(thread) {
            Ok(()) => true,
            Err(nix::Error::ESRCH) => {
                all = false;
                false
            }
            Err(error) => {
                failure =
                    Some(StopError::Thread { op: "read registers of", pid, tid: thread.tid, source: error.into() });
                true
            }
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
    }
    stopped.processes.retain(|process| !process.threads.is_empty());
    Ok(all)
}

fn read_thread(thread: &mut Thread) -> nix::Result<()> {
    let pid = Pid::from_raw(thread.tid);
    thread.registers = ptrace::getregs(pid)?;
    if let Some(hidden) = interrupted::hide_interruption(&thread.registers) {
        ptrace::setregs(pid, hidden)?;
        thread.registers = hidden;
    }
    Ok(())
}
