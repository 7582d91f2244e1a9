//! Stop every thread of every process of a group, and let them go on.
//!
//! One OS thread per stop does all the tracing: ptrace belongs to the thread that seized. It is also the last resort:
//! a thread that cannot be stopped cannot be detached either, but the end of its tracer frees it, unchanged.
//!
//! ```text
//! scan cgroup.procs, /proc/PID/task: seize --> interrupt --> wait for each --> cgroup.threads: all halted? --> Stopped
//!        ^                                                       |  one is in an uninterruptible sleep (vfork)
//!        +------ it stopped <------ let all others run <---------+--> deadline: refused
//! ```
//!
//! New threads and processes are found by scanning again, not by PTRACE_O_TRACECLONE: a seized thread stops at the
//! end of the call it is in, so it makes at most one more. At the end the kernel's own list of the group's tasks has none
//! that lives but those, they are all still stopped, and so it is when it is read once more: then nothing is left that
//! could make one. (The list of processes alone misses one that another of its threads replaces by an exec.) Events
//! would add a stop for each clone and a second kind of stop, from which nothing can be injected.

use std::io;
use std::marker::PhantomData;
use std::path::Path;
use std::time::{Duration, Instant};

use libc::{pid_t, user_regs_struct as Registers};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::alarm::Alarm;
use super::area::{Known, Memory, Place};
use super::error::StopError;
use super::frame::{self, XSTATE_MAX_BYTES};
use super::halt::{self, Halt, PATIENCE, TICK};
use super::inject::Hand;
use super::tasks::{self, Lists};
use super::template::Watches;
use super::told::Told;
use super::waits::Waits;
use super::{InjectError, interrupted};
use crate::sys::ptrace::{resume, wait_thread};

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

/// Stops one sandbox again and again, and remembers from stop to stop what makes the next one right and fast.
///
/// One for each sandbox, for as long as an engine has it. It remembers since when programs wait in calls whose timeout
/// each stop makes begin anew: without that such a call never ends if stops come more often than its timeout.
#[derive(Debug, Default)]
pub struct Tracer {
    kept: Kept,
}

/// What a tracer remembers.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) waits: Waits,
    /// Processes in which there was a hand.
    pub(super) known: Vec<Known>,
    /// Those of which a plain copy had not all (see [`super::template::Request`]). The number may be another's by now: that
    /// costs it a look.
    pub(super) careful: Vec<pid_t>,
    /// What big processes write.
    pub(super) watches: Watches,
    /// No thread is in injected code of an engine that died: this one has looked.
    pub(super) orphans_finished: bool,
}

impl Tracer {
    /// One that knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The watches over what its processes write.
    pub(super) fn watches(&mut self) -> &mut Watches {
        &mut self.kept.watches
    }

    /// Forgets since when calls wait: the processes have been put back to another time.
    pub fn forget_waits(&mut self) {
        self.kept.waits = Waits::default();
    }

    /// Stops the group, does `work` on it, lets it go on. `work` runs on a thread of its own, the tracer.
    ///
    /// A child of this very process that ends during the stop is reaped by it, and its exit status lost: exclude
    /// children, or let another process (init) be the parent. SIGVTALRM gets a handler in the whole process, and each
    /// tracer sends it to itself.
    ///
    /// # Errors
    /// All processes run on, unchanged.
    pub fn while_stopped<R, F>(&mut self, request: Request<'_>, work: F) -> Result<R, StopError>
    where
        R: Send,
        F: FnOnce(&mut Stopped) -> R + Send,
    {
        let kept = std::mem::take(&mut self.kept);
        let tracer = || {
            let alarm = Alarm::new().map_err(|source| StopError::Tracer { op: "make a timer", source })?;
            let lists =
                Lists::open(request.group).map_err(|(path, source)| StopError::Group { op: "open", path, source })?;
            let mut stopped = Stopped::new(alarm, kept, lists);
            let result = stop(&mut stopped, request).map(|()| work(&mut stopped));
            stopped.resume();
            Ok((result, std::mem::take(&mut stopped.kept)))
        };
        let (result, kept) = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("tracer".to_owned())
                .spawn_scoped(scope, tracer)
                .map_err(|source| StopError::Tracer { op: "start the tracer thread", source })?;
            thread.join().unwrap_or(Err(StopError::Panicked))
        })?;
        self.kept = kept;
        result
    }
}

/// One stop by a new [`Tracer`]. Timeouts that it makes begin anew are not remembered for the next one.
///
/// # Errors
/// All processes run on, unchanged.
pub fn while_stopped<R, F>(request: Request<'_>, work: F) -> Result<R, StopError>
where
    R: Send,
    F: FnOnce(&mut Stopped) -> R + Send,
{
    Tracer::new().while_stopped(request, work)
}

/// All threads of a group, stopped, as long as this lives. Belongs to the thread that stopped them.
#[derive(Debug)]
pub struct Stopped {
    pub(super) processes: Vec<Process>,
    /// Just before the first thread was interrupted.
    pub(super) begun: Option<Instant>,
    pub(super) lists: Lists,
    /// Bytes on their way, so that nothing is allocated at the stop.
    pub(super) buffer: Vec<u8>,
    /// The CPU to which the tracer is pinned.
    pub(super) pinned: Option<usize>,
    /// SIGSTOPs that arrived while injected code ran, to be sent again.
    pub(super) deferred: Vec<(pid_t, i32)>,
    /// PIDs inside of those that were made as children of init, whatever became of them.
    pub(super) born: Vec<pid_t>,
    /// Processes of which is known whether orphans become their children.
    pub(super) subreapers: Vec<(pid_t, bool)>,
    pub(super) alarm: Alarm,
    pub(super) kept: Kept,
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
    /// The engine made it, or thawed it: if the engine dies before the stop is over, it is killed.
    pub(super) ends_with_engine: bool,
    pub(super) told: Told,
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
    pub(super) interrupted: bool,
    pub(super) halted: bool,
}

impl Stopped {
    fn new(alarm: Alarm, kept: Kept, lists: Lists) -> Self {
        // Known before the stop, not in it.
        frame::component_end(2);
        Self {
            processes: Vec::with_capacity(64),
            buffer: vec![0; XSTATE_MAX_BYTES],
            begun: None,
            lists,
            pinned: None,
            deferred: Vec::with_capacity(16),
            born: Vec::new(),
            subreapers: Vec::new(),
            alarm,
            kept,
            not_send: PhantomData,
        }
    }

    /// Pins the tracer to where a process runs that is about to be interrupted: the way there is part of the wait for it,
    /// and takes longest for the tracer itself.
    pub(super) fn follow(&mut self) {
        let known =
            self.kept.known.iter().find(|known| self.processes.first().is_some_and(|first| first.pid == known.pid));
        if let Some(Ok(Some(stat))) = known.map(|known| tasks::reread_stat(&known.stat)) {
            self.pin_to(stat.cpu);
        }
    }

    /// Pins the tracer to `cpu`, once: a move takes 25 to 60 us, more than a hand's few batches save. A round trip across
    /// CPUs takes up to 10 times as long, but the kernel wakes a process where it likes (elsewhere, while the tracer is on
    /// its CPU and another is idle), so to run after it does not help.
    pub(super) fn pin_to(&mut self, cpu: usize) {
        if self.pinned.is_some() {
            return;
        }
        let mut one = CpuSet::new();
        // It may have gone meanwhile; then any will do.
        if one.set(cpu).is_ok() && sched_setaffinity(Pid::from_raw(0), &one).is_ok() {
            self.pinned = Some(cpu);
        }
    }

    /// From when on programs may have stood still.
    pub fn begun(&self) -> Instant {
        self.begun.unwrap_or_else(Instant::now)
    }

    /// The processes, in the order in which the group listed them.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// How many threads are stopped.
    pub fn n_threads(&self) -> usize {
        self.processes.iter().map(|process| process.threads.len()).sum()
    }

    /// Binds the life of all processes to this thread's until they are let go: what is half changed must not run on if the
    /// engine dies.
    ///
    /// # Errors
    /// The kernel's word.
    pub(super) fn bind(&mut self) -> io::Result<()> {
        for process in &mut self.processes {
            process.ends_with_engine = true;
        }
        for thread in self.processes.iter().flat_map(|process| &process.threads) {
            let options = ptrace::Options::PTRACE_O_EXITKILL;
            match ptrace::setoptions(Pid::from_raw(thread.tid), options) {
                // Killed meanwhile.
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The engine's hand in process `pid`: its first thread will make system calls for the engine. The first hand pins the
    /// tracer to that thread's CPU.
    ///
    /// # Errors
    /// The process is unchanged, apart from the area that an earlier hand left in it.
    pub fn hand(&mut self, pid: pid_t) -> Result<Hand<'_>, InjectError> {
        Hand::open(self, pid, None)
    }

    /// The same in one of its threads.
    pub(super) fn hand_of(&mut self, pid: pid_t, tid: pid_t) -> Result<Hand<'_>, InjectError> {
        Hand::open(self, pid, Some(tid))
    }

    /// Lets the threads of `pid` that are in injected code of an engine that died run until they are out of it: what
    /// they need for that would be overwritten. The others stay stopped.
    pub(super) fn finish_orphans(&mut self, pid: pid_t, is_injected: impl Fn(u64) -> bool) -> Result<(), StopError> {
        let deadline = Instant::now() + ORPHAN_PATIENCE;
        let failed = |op: &'static str, tid| move |source: io::Error| StopError::Thread { op, pid, tid, source };
        let Some(process) = self.processes.iter_mut().find(|process| process.pid == pid) else { return Ok(()) };
        let is_alone = process.threads.len() == 1;
        // A thread that the other engine was about to end, or its helper, which is one process.
        let mut ended = Vec::new();
        'threads: for thread in process.threads.iter_mut().filter(|thread| is_injected(thread.registers.rip)) {
            let tid = thread.tid;
            while is_injected(thread.registers.rip) {
                // A call that blocks would go on blocking; nobody wants its result.
                if let Some(given_up) = interrupted::given_up(&thread.registers) {
                    ptrace::setregs(Pid::from_raw(tid), given_up)
                        .map_err(|error| failed("set registers of", tid)(error.into()))?;
                }
                resume(tid, 0).map_err(failed("resume", tid))?;
                thread.halted = false;
                // Its turn, should it be on this CPU: microseconds are all it needs.
                std::thread::yield_now();
                halt::interrupt(pid, tid)?;
                self.alarm.listen(PATIENCE, TICK).map_err(failed("time", tid))?;
                let halt = halt::wait_halt(pid, tid, deadline);
                self.alarm.deafen().map_err(failed("time", tid))?;
                match halt? {
                    Halt::Halted { .. } => thread.halted = true,
                    Halt::Ended if tid != pid || is_alone => {
                        ended.push(tid);
                        continue 'threads;
                    }
                    Halt::Ended => return Err(failed("wait for", tid)(io::Error::from_raw_os_error(libc::ESRCH))),
                    Halt::Stuck => return Err(halt::refuse(pid, tid).into()),
                }
                if Instant::now() >= deadline {
                    return Err(halt::refuse(pid, tid).into());
                }
                halt::read_thread(pid, thread, &mut self.kept.waits)
                    .map_err(|error| failed("read registers of", tid)(error.into()))?;
            }
        }
        process.threads.retain(|thread| !ended.contains(&thread.tid));
        self.processes.retain(|process| !process.threads.is_empty());
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

    /// PIDs inside of those that were made as children of init, whatever became of them.
    pub fn take_born(&mut self) -> Vec<pid_t> {
        std::mem::take(&mut self.born)
    }

    /// Whether job control (SIGSTOP and its kin) has stopped a process.
    pub(super) fn is_job_stopped(&self, pid: pid_t) -> bool {
        let process = self.processes.iter().find(|process| process.pid == pid);
        process.is_some_and(|process| process.threads.iter().any(|thread| thread.group_stopped))
    }

    /// Takes a process out of job control's stop. A SIGCONT waits for it then, and its parent is told.
    pub(super) fn continue_job(&mut self, pid: pid_t) {
        // It may have died meanwhile.
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGCONT);
        let threads = self.processes.iter_mut().filter(|process| process.pid == pid).flat_map(|one| &mut one.threads);
        threads.for_each(|thread| thread.group_stopped = false);
    }

    /// Has job control stop a process when it is let go, of which its parent is told.
    pub(super) fn stop_job(&mut self, pid: pid_t) {
        self.deferred.push((pid, libc::SIGSTOP));
    }

    /// Lets all go on that are halted; the others stay seized until this OS thread ends. The end of the work does it too.
    pub fn resume(&mut self) {
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
        self.resume();
    }
}

fn stop(stopped: &mut Stopped, request: Request<'_>) -> Result<(), StopError> {
    let timer = |source| StopError::Tracer { op: "set a timer", source };
    stopped.alarm.listen(PATIENCE, TICK).map_err(timer)?;
    let settled = halt::settle(stopped, request);
    if settled.is_err() {
        halt::calm(stopped);
    }
    stopped.alarm.deafen().map_err(timer)?;
    settled?;
    if !stopped.kept.orphans_finished {
        finish_all_orphans(stopped)?;
        stopped.kept.orphans_finished = true;
    }
    stopped.kept.waits.end_stop();
    let Stopped { kept, processes, .. } = stopped;
    kept.known.retain(|known| processes.iter().any(|process| process.pid == known.pid));
    kept.careful.retain(|pid| processes.iter().any(|process| process.pid == *pid));
    Ok(())
}

/// Lets threads that are in injected code of a dead engine (blocked in a call, or stopped by job control) run out of it,
/// so that the registers of all threads are their own.
fn finish_all_orphans(stopped: &mut Stopped) -> Result<(), StopError> {
    let first = |process: &Process| Some((process.pid, process.threads.first()?.tid));
    let firsts: Vec<_> = stopped.processes.iter().filter_map(first).collect();
    for (pid, tid) in firsts {
        let failed = |source| StopError::Thread { op: "look for injected code in", pid, tid, source };
        let memory = Memory::of(pid, tid);
        let looked = Place::find(pid, tid, &memory).and_then(|place| match place {
            Some(place) => Ok(Some((place, place.recorded(&memory)?))),
            None => Ok(None),
        });
        match looked {
            Ok(Some((place, area))) => stopped.finish_orphans(pid, |rip| place.is_injected(area, rip))?,
            Ok(None) => {}
            // It has been killed since.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}
