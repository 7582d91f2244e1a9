//! Back by a fork: a process that has ended is made again by its template.
//!
//! ```text
//! template T   seized, interrupted | thawed: socketpair; recvmsg(live cgroup); clone3(C); close_range | frozen, let go
//! child C                                              born into the live cgroup, halted
//!   close_range; setsid; mappings that a child does not get as they were; threads
//! ```
//! Only a child of init is made so: C has T's parent. It begins a session, or is in one whose leader had ended: then T
//! makes a leader of that number first, which makes C and ends.
//!
//! T never runs a step of its own. Its next one is to end, and while its cgroup is thawed the kernel kills it with the
//! engine (PTRACE_O_EXITKILL), so an engine that dies leaves it frozen or dead; a cgroup that is not frozen holds no
//! template. C too dies with the engine until the stop is over: no half of a process runs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use libc::{pid_t, user_regs_struct as Registers};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::{TemplateError, TemplateRefusal, check, errno, process};
use super::face::Face;
use super::freezer::allow_writing;
use super::make::denied;
use super::remove::Template;
use super::restore::{Past, Report, Room, plan_mappings};
use super::thread::Record;
use super::threads::{Cast, NUMBER_PATIENCE, NUMBER_TICK};
use crate::deltacr::area;
use crate::deltacr::births::Births;
use crate::deltacr::error::StopError;
use crate::deltacr::halt::{self, Halt, PATIENCE, TICK};
use crate::deltacr::handover::call;
use crate::deltacr::inject::Hand;
use crate::deltacr::stop::{Process, Stopped, Thread};
use crate::fault;
use crate::sys::blob;
use crate::sys::process::{CloneCall, pidfd_getfd, pidfd_open};
use crate::sys::ptrace::wait_thread;
use crate::sys::socket::send_with_fds;

/// How long a template may take to stop (chosen: it sleeps).
const HALT_PATIENCE: Duration = Duration::from_secs(1);

// Where things lie in the scratch room.
const PAIR: u64 = 0;
const NUMBER: u64 = 16;
const HEADER: u64 = 64;
const VECTOR: u64 = 128;
const BYTE: u64 = 144;
const CLONE: u64 = 256;
const CONTROL: u64 = 512;

/// Makes a process again that has ended, from its template, in the cgroup at `live`; its host PID. It has its memory,
/// threads, number, and is in `session`, whose leader has ended, else its own; it has no descriptors, and the template's signal actions, limits and
/// places, which are those that it had. It is among the stopped ones.
///
/// # Errors
/// There is no such process. The template is as it was, or gone.
pub fn restore_by_fork(
    stopped: &mut Stopped,
    template: &Template,
    past: &Past<'_>,
    session: Option<pid_t>,
    live: &Path,
) -> Result<pid_t, TemplateError> {
    check_fork(template, past)?;
    let group = |source| TemplateError::Group { op: "open", path: live.to_owned(), source };
    let directory = File::open(live).map_err(group)?;
    allow_writing(&live.join("cgroup.procs")).map_err(group)?;
    seize(stopped, template, past.memory.area.start)?;
    let forked = fork(stopped, template, past, session, directory.as_fd());
    let let_go = let_go(stopped, template);
    let pid = forked?;
    let made = let_go.and_then(|()| furnish(stopped, pid, past));
    if made.is_err() {
        put_down(stopped, pid);
    }
    made.map(|()| pid)
}

/// What can be known before anything happens.
///
/// # Errors
/// There is no way by a fork.
pub(in crate::deltacr) fn check_fork(template: &Template, past: &Past<'_>) -> Result<(), TemplateError> {
    let pid = template.pid();
    if !template.lives()? {
        return Err(TemplateRefusal::TemplateGone { pid }.into());
    }
    let mut code = vec![0; blob::batch().len()];
    let there = area::Memory::of(pid, pid).read(past.memory.area.start, &mut code);
    if there.is_err() || code != blob::batch() {
        return Err(TemplateRefusal::ForeignTemplate { pid }.into());
    }
    let face = Face::read(pid, pid).map_err(process("read the state of", pid))?;
    past.threads.check_maker(pid, &face)?;
    Room::check_template(past, pid)
}

/// Stops the template, which stays frozen, and takes it among the stopped ones.
fn seize(stopped: &mut Stopped, template: &Template, area: u64) -> Result<(), TemplateError> {
    let pid = template.pid();
    let one = Pid::from_raw(pid);
    ptrace::seize(one, ptrace::Options::empty()).map_err(process("seize the template", pid))?;
    let halted = halt_it(stopped, pid);
    let registers = halted.and_then(|()| ptrace::getregs(one).map_err(process("read registers of", pid)));
    let ready = registers.and_then(|registers| {
        fault::point("fork.seized").map_err(process("seize the template", pid))?;
        Ok(registers)
    });
    match ready {
        Ok(registers) => {
            // Where it would be had it never been used.
            let rip = area + blob::exit_offset() as u64;
            let registers = Registers { rip, orig_rax: u64::MAX, ..registers };
            stopped.processes.push(alone(pid, registers));
            Ok(())
        }
        Err(error) => {
            // It is frozen still.
            let _ = ptrace::detach(one, None);
            Err(error)
        }
    }
}

fn halt_it(stopped: &mut Stopped, pid: pid_t) -> Result<(), TemplateError> {
    let failed = process("stop the template", pid);
    let stop = |error: StopError| failed(io::Error::other(error));
    halt::interrupt(pid, pid).map_err(stop)?;
    stopped.alarm.listen(PATIENCE, TICK).map_err(failed)?;
    let halt = halt::wait_halt(pid, pid, Instant::now() + HALT_PATIENCE);
    stopped.alarm.deafen().map_err(failed)?;
    match halt.map_err(stop)? {
        Halt::Halted { .. } => Ok(()),
        Halt::Ended => Err(TemplateRefusal::TemplateGone { pid }.into()),
        Halt::Stuck => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}

fn alone(pid: pid_t, registers: Registers) -> Process {
    let thread = Thread { tid: pid, registers, group_stopped: false, interrupted: true, halted: true };
    Process { pid, threads: vec![thread], ends_with_engine: true, told: Default::default() }
}

/// Has the template make the process.
fn fork(
    stopped: &mut Stopped,
    template: &Template,
    past: &Past<'_>,
    session: Option<pid_t>,
    live: BorrowedFd<'_>,
) -> Result<pid_t, TemplateError> {
    let failed = process::<io::Error>("fork the template", template.pid());
    let Some(leader) = past.threads.leader() else {
        return Err(TemplateRefusal::Threads { pid: template.pid() }.into());
    };
    let session = session.unwrap_or(leader.tid);
    let kills = ptrace::Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(Pid::from_raw(template.pid()), kills).map_err(|error| failed(error.into()))?;
    template.freezer().thaw()?;
    fault::point("fork.thawed").map_err(failed)?;
    let mut hand = stopped.hand(template.pid())?;
    let born = hand_over(&mut hand, live).and_then(|group| bear(&mut hand, Some(group), session));
    // It must own nothing, whatever happened.
    let closed = hand.call(libc::SYS_close_range, [0, u32::MAX.into(), 0, 0, 0, 0]);
    let left = hand.close();
    let pid = born?;
    stopped.born.push(session);
    stopped.processes.push(alone(pid, leader.registers()));
    let kept = closed.map_err(TemplateError::from).and_then(|result| check(template.pid(), "close_range", result));
    let kept = kept.and(left.map_err(TemplateError::from)).and(fault::point("fork.born").map_err(failed));
    // What was born with the session's number leads it, and is the process or makes it.
    let kept = kept.and_then(|()| begin_session(stopped, pid));
    let kept = kept.and_then(|()| if session == leader.tid { Ok(pid) } else { bear_orphan(stopped, pid, leader) });
    if !matches!(kept, Ok(made) if made == pid) {
        put_down(stopped, pid);
    }
    kept
}

fn begin_session(stopped: &mut Stopped, pid: pid_t) -> Result<(), TemplateError> {
    let mut hand = stopped.hand(pid)?;
    let begin = [call(libc::SYS_close_range, &[0, u32::MAX.into(), 0]), call(libc::SYS_setsid, &[])];
    let results = hand.run(&begin)?;
    hand.close()?;
    check(pid, "close_range", results[0])?;
    check(pid, "setsid", results[1])
}

/// Has a session's leader make the process, which gets the leader's parent.
fn bear_orphan(stopped: &mut Stopped, leader: pid_t, record: &Record) -> Result<pid_t, TemplateError> {
    let mut hand = stopped.hand(leader)?;
    let born = bear(&mut hand, None, record.tid);
    let left = hand.close();
    let pid = born?;
    stopped.born.push(record.tid);
    stopped.processes.push(alone(pid, record.registers()));
    if let Err(error) = left {
        put_down(stopped, pid);
        return Err(error.into());
    }
    Ok(pid)
}

/// Gives the template the cgroup's descriptor; its number there.
fn hand_over(hand: &mut Hand<'_>, live: BorrowedFd<'_>) -> Result<u64, TemplateError> {
    let pid = hand.pid();
    let failed = process("hand a cgroup to", pid);
    let flags = |flags: i32| u64::from(flags.cast_unsigned());
    let data = hand.scratch().start;
    let mut pair = [0; 8];
    let make = [call(libc::SYS_socketpair, &[flags(libc::AF_UNIX), flags(libc::SOCK_DGRAM), 0, data + PAIR])];
    let made = hand.run_with(&make, (data, &[]), (data + PAIR, &mut pair))?;
    match errno(made[0]) {
        Some(libc::EMFILE) => return Err(TemplateRefusal::TooFewDescriptors { pid }.into()),
        _ => check(pid, "socketpair", made[0])?,
    }
    let [from, to] = [0, 4].map(|at| pair[at..at + 4].try_into().map_or(-1, i32::from_ne_bytes));
    let pidfd = pidfd_open(pid).map_err(failed)?;
    let socket = pidfd_getfd(pidfd.as_fd(), to).map_err(failed)?;
    send_with_fds(socket.as_fd(), &[0], &[live]).map_err(failed)?;
    let header = [0, 0, data + VECTOR, 1, data + CONTROL, 24, 0].map(u64::to_le_bytes).concat();
    let vector = [data + BYTE, 1].map(u64::to_le_bytes).concat();
    hand.write(data + VECTOR, &vector)?;
    let mut control = [0; 24];
    let from = i64::from(from).cast_unsigned();
    let receive = [call(libc::SYS_recvmsg, &[from, data + HEADER, flags(libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)])];
    let received = hand.run_with(&receive, (data + HEADER, &header), (data + CONTROL, &mut control))?;
    check(pid, "recvmsg", received[0])?;
    let len_bytes = control[..8].try_into().map_or(0, u64::from_le_bytes);
    let number = control[16..20].try_into().map_or(-1, i32::from_ne_bytes);
    match u64::try_from(number) {
        Ok(number) if len_bytes >= 20 => Ok(number),
        _ => Err(TemplateRefusal::TooFewDescriptors { pid }.into()),
    }
}

/// Into that cgroup, or its maker's.
fn bear(hand: &mut Hand<'_>, group: Option<u64>, number: pid_t) -> Result<pid_t, TemplateError> {
    let data = hand.scratch().start;
    hand.write(data + NUMBER, &number.to_le_bytes())?;
    // What the parent is sent at its end is as with the template: SIGCHLD.
    let flags = libc::CLONE_PARENT.cast_unsigned().into();
    let child = CloneCall { flags, set_tid: data + NUMBER, cgroup: group, ..CloneCall::default() }.bytes();
    let make = [call(libc::SYS_clone3, &[data + CLONE, CloneCall::LEN_BYTES as u64])];
    let deadline = Instant::now() + NUMBER_PATIENCE;
    loop {
        let Births { results, born } = hand.bear(&make, (data + CLONE, &child), &[call(libc::SYS_exit_group, &[0])])?;
        if let Some(pid) = born.first() {
            return Ok(*pid);
        }
        match errno(results[0]) {
            Some(libc::EEXIST) if Instant::now() < deadline => std::thread::sleep(NUMBER_TICK),
            Some(errno) => return Err(denied(hand.pid(), "clone3", errno, number)),
            None => return Err(TemplateRefusal::TemplateGone { pid: hand.pid() }.into()),
        }
    }
}

/// Freezes the template and lets go of it. If that cannot be it ends.
fn let_go(stopped: &mut Stopped, template: &Template) -> Result<(), TemplateError> {
    let pid = template.pid();
    let frozen = template.freezer().freeze();
    let frozen = frozen.and_then(|()| fault::point("fork.frozen").map_err(process("freeze the template", pid)));
    if frozen.is_err() {
        template.put_down();
    }
    // From here on it may outlive the engine.
    let _ = ptrace::setoptions(Pid::from_raw(pid), ptrace::Options::empty());
    let freed = fault::point("fork.freed").map_err(process("let go of the template", pid));
    if ptrace::detach(Pid::from_raw(pid), None).is_err() {
        // It was killed: its parent hears of it once it is reaped here.
        let _ = wait_thread(pid, 0);
    }
    stopped.processes.retain(|process| process.pid != pid);
    stopped.kept.known.retain(|known| known.pid != pid);
    frozen.and(freed)
}

/// Makes a newborn what it was.
fn furnish(stopped: &mut Stopped, pid: pid_t, past: &Past<'_>) -> Result<(), TemplateError> {
    // Advice that a child does not get is said again, locks are found missing.
    let (room, first) = plan_mappings(stopped, pid, past)?;
    let mut hand = stopped.hand(pid)?;
    room.put_mappings(&mut hand, past.source, first, &mut Report::default())?;
    hand.close()?;
    let mut cast = Cast::alone(pid, past.threads.n_threads());
    past.threads.bear(stopped, pid, &mut cast)?;
    past.threads.put_back(stopped, pid, &cast)?;
    fault::point("fork.furnished").map_err(process("furnish", pid))
}

/// Ends what was made. Its parent reaps it.
fn put_down(stopped: &mut Stopped, pid: pid_t) {
    // It may have ended.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let Some(at) = stopped.processes.iter().position(|process| process.pid == pid) else { return };
    let ended = stopped.processes.remove(at);
    // The leader's end is told when no other thread is left.
    for thread in ended.threads.iter().rev() {
        while matches!(wait_thread(thread.tid, 0), Ok(Some(status)) if libc::WIFSTOPPED(status)) {}
    }
    stopped.kept.known.retain(|known| known.pid != pid);
}
