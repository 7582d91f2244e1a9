//! Making a template.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use libc::pid_t;
use nix::sched::sched_setaffinity;
use nix::unistd::Pid;

use super::advise::Advised;
use super::error::{TemplateError, TemplateRefusal, check, errno, process};
use super::freezer::Freezer;
use super::mapping::read_smaps;
use super::memory::{Counts, Outline};
use super::reapers::Reapers;
use super::remove::Template;
use super::source::Pages;
use super::watch::Watch;
use crate::deltacr::handover::call;
use crate::deltacr::helper::{DATA, N_CALLS, Ran};
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::stop::Stopped;
use crate::fault;
use crate::sys::maps::next_shared_file;
use crate::sys::memory::UFFD_USER_MODE_ONLY;
use crate::sys::process::{CloneCall, Compared, compare, pidfd_getfd};
use crate::sys::socket::send_with_fds;

/// How long a template that is of no use may take to end (chosen: it needs microseconds and a CPU).
const END_PATIENCE: Duration = Duration::from_secs(5);

// Where things lie after the helper's calls.
const CLONE_HELPER: u64 = 0;
const CLONE_TEMPLATE: u64 = 96;
const NUMBERS: u64 = 192;
const MARKER: u64 = 200;
const PAIR: u64 = 208;
const FLAG: u64 = 216;
const HEADER: u64 = 256;
const VECTOR: u64 = 320;
const BYTE: u64 = 336;
const CONTROL: u64 = 384;

// Those of the helper's calls that fail for a reason of the program's.
const SOCKETPAIR: &str = "socketpair in the helper";
const USERFAULTFD: &str = "userfaultfd in the helper";
const CLONE3: &str = "clone3 in the helper";

// Its descriptors.
const SOCKET: u64 = 0;
const ENGINES_SOCKET: i32 = 1;
const WATCH: i32 = 2;

/// Process numbers to be taken, as in the process's PID namespace. The helper's stays taken (as that of a session) as
/// long as the template is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// The helper's.
    pub helper: pid_t,
    /// The template's.
    pub template: pid_t,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// Numbers to take. It needs CAP_CHECKPOINT_RESTORE in the process itself.
    pub numbers: Option<Numbers>,
    /// Who is to be the template's parent: the init of the sandbox (host PID). It must be running and reap what it does
    /// not know.
    pub keeper: Option<pid_t>,
    /// Read all flags of mappings at the stop, as is done anyway where there are shared writable or locked mappings.
    /// Set for a process whose last template needed it; otherwise that is found out at the cost of a second copy.
    pub careful: bool,
}

impl Template {
    /// Makes a template of a stopped process in an empty `freezer`.
    ///
    /// Parents before children is cheaper: who is a subreaper is asked once in a stop.
    ///
    /// # Errors
    /// The process is as it was, and there is no template; `freezer` is removed.
    pub fn make(
        stopped: &mut Stopped,
        pid: pid_t,
        freezer: Freezer,
        request: &Request,
    ) -> Result<(Self, Outline), TemplateError> {
        let path = freezer.path().to_owned();
        let made = make(stopped, pid, freezer, request);
        if made.is_err()
            && let Ok(freezer) = Freezer::open(path)
        {
            discard(freezer);
        }
        made
    }
}

/// Ends what may be in a freezer, and removes it. The failure that led here is the one to report.
fn discard(freezer: Freezer) {
    match Template::find(freezer) {
        Ok(Ok(template)) => drop(template.remove(END_PATIENCE)),
        Ok(Err(freezer)) => drop(freezer.remove()),
        Err(_) => {}
    }
}

fn make(
    stopped: &mut Stopped,
    pid: pid_t,
    freezer: Freezer,
    request: &Request,
) -> Result<(Template, Outline), TemplateError> {
    let n_processes = freezer.processes()?.len();
    if n_processes > 0 {
        return Err(TemplateRefusal::Occupied { n_processes }.into());
    }
    refuse_shared_memory(stopped, pid)?;
    let mut reapers = Reapers::suspend(stopped, pid, request.keeper)?;
    let made = make_below(stopped, pid, freezer, request, &mut reapers);
    let resumed = reapers.resume(stopped);
    let made = made?;
    match resumed {
        Ok(()) => Ok(made),
        Err(error) => {
            drop(made.0.remove(END_PATIENCE));
            Err(error)
        }
    }
}

fn make_below(
    stopped: &mut Stopped,
    pid: pid_t,
    freezer: Freezer,
    request: &Request,
    reapers: &mut Reapers,
) -> Result<(Template, Outline), TemplateError> {
    let mut hand = stopped.hand(pid)?;
    let before = Counts::read(pid).map_err(process("read the state of", pid))?;
    let (brk, is_subreaper) = ask(&mut hand)?;
    reapers.remember(pid, is_subreaper);
    let needs_care = request.careful || hand.stopped.kept.careful.contains(&pid);
    let mut order =
        Order { request, is_subreaper, watches: Watch::pays(before.anonymous_bytes) && !is_watched(&hand)? };
    let careful = needs_care || before.locked_bytes > 0 || has_shared_writable(pid)?;
    let mut outline = Outline { pid, mappings: None, area: hand.area(), brk, is_subreaper };
    let mut freezer = freezer;
    if !careful {
        let template = clone(&mut hand, freezer, &order, Advised::none())?;
        order.watches = false;
        let copied = Counts::read(template.pid()).map_err(process("read the state of", template.pid()))?;
        // What the calls needed came before the copy.
        let own = Counts::read(pid).map_err(process("read the state of", pid))?;
        if (copied.mapped_bytes, copied.anonymous_bytes) == (own.mapped_bytes, own.anonymous_bytes) {
            adopted(&template, pid, copied, request)?;
            hand.close()?;
            return Ok((template, outline));
        }
        // Something did not come along, nor would it the next time. Numbers are free once it is reaped.
        hand.stopped.kept.careful.push(pid);
        freezer = if request.numbers.is_some() {
            template.kill_and_wait(END_PATIENCE)?
        } else {
            template.kill(END_PATIENCE)?
        };
    }
    let mappings = read_smaps(pid).map_err(process("read the mappings of", pid))?;
    let advised = Advised::find(pid, &mappings)?;
    if advised.n_ranges() == 0 {
        hand.stopped.kept.careful.retain(|other| *other != pid);
    }
    let left_out_bytes = advised.left_out_bytes();
    let template = clone(&mut hand, freezer, &order, advised)?;
    let copied = Counts::read(template.pid()).map_err(process("read the state of", template.pid()))?;
    adopted(&template, pid, copied, request)?;
    // Pages may have been given up since (MADV_FREE); mappings may not.
    if copied.mapped_bytes + left_out_bytes != before.mapped_bytes {
        let start = mappings.first().map_or(0, |mapping| mapping.start);
        return Err(TemplateRefusal::Mapping { pid, kind: "something that cannot be copied", start }.into());
    }
    hand.close()?;
    outline.mappings = Some(mappings);
    Ok((template, outline))
}

fn adopted(template: &Template, pid: pid_t, counts: Counts, request: &Request) -> Result<(), TemplateError> {
    match request.keeper {
        Some(keeper) if counts.parent != keeper => Err(TemplateRefusal::Parent { pid, parent: counts.parent }.into()),
        _ if template.lives()? => Ok(()),
        _ => Err(TemplateRefusal::TemplateGone { pid: template.pid() }.into()),
    }
}

fn refuse_shared_memory(stopped: &Stopped, pid: pid_t) -> Result<(), TemplateError> {
    let first = |pid: pid_t| {
        let process = stopped.processes().iter().find(|process| process.pid == pid);
        process.and_then(|process| process.threads.first()).map_or(pid, |thread| thread.tid)
    };
    let tid = first(pid);
    for other in stopped.processes().iter().map(|process| process.pid).filter(|other| *other != pid) {
        let order = compare(tid, first(other), Compared::Memory);
        if order.map_err(process("compare the memory of", pid))?.is_eq() {
            return Err(TemplateRefusal::SharedMemory { pid, other }.into());
        }
    }
    Ok(())
}

/// The end of the heap, and whether orphans become its children.
pub(super) fn ask(hand: &mut Hand<'_>) -> Result<(u64, bool), TemplateError> {
    let flag = hand.area().start + DATA as u64 + FLAG;
    let reaper = libc::PR_GET_CHILD_SUBREAPER.cast_unsigned().into();
    let results = hand.run(&[call(libc::SYS_brk, &[0]), call(libc::SYS_prctl, &[reaper, flag])])?;
    check(hand.pid(), "prctl", results[1])?;
    let mut bytes = [0; 4];
    hand.read(flag, &mut bytes)?;
    Ok((results[0].cast_unsigned(), bytes != [0; 4]))
}

/// Whether what a process writes is watched.
fn is_watched(hand: &Hand<'_>) -> Result<bool, TemplateError> {
    let pages = Pages::of(hand.pid()).map_err(process("open the memory of", hand.pid()))?;
    Ok(hand.stopped.kept.watches.has(hand.pid(), &pages))
}

/// Whether something is mapped that the process and its copy would both write to.
fn has_shared_writable(pid: pid_t) -> Result<bool, TemplateError> {
    let failed = process("read the mappings of", pid);
    let maps = fs::File::open(format!("/proc/{pid}/maps")).map_err(failed)?;
    let mut address = 0;
    while let Some(found) = next_shared_file(maps.as_fd(), address).map_err(failed)? {
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", found.start, found.end);
        // The link shows how the file was opened.
        if fs::symlink_metadata(&link).map_err(failed)?.permissions().mode() & 0o200 != 0 {
            return Ok(true);
        }
        address = found.end;
    }
    Ok(false)
}

/// Calls around the clone that are not advice: the clone, the wait, the subreaper off and on.
const N_OTHER_CALLS: usize = 4;

/// What the helper is to make.
struct Order<'a> {
    request: &'a Request,
    is_subreaper: bool,
    /// A descriptor to watch the memory with, too.
    watches: bool,
}

/// The double fork, within the advice that it needs.
fn clone(
    hand: &mut Hand<'_>,
    freezer: Freezer,
    order: &Order<'_>,
    advised: Advised,
) -> Result<Template, TemplateError> {
    let (within, apart) = advised.split(N_CALLS - N_OTHER_CALLS);
    let ahead = advise(hand, &apart.before());
    let cloned = ahead.and_then(|()| clone_within(hand, freezer, order, &within));
    let template = match advise(hand, &apart.after()) {
        Ok(()) => cloned?,
        Err(error) => {
            if let Ok(template) = cloned {
                drop(template.kill(END_PATIENCE));
            }
            return Err(error);
        }
    };
    Ok(template)
}

fn advise(hand: &mut Hand<'_>, calls: &[Call]) -> Result<(), TemplateError> {
    let pid = hand.pid();
    hand.run(calls)?.into_iter().try_for_each(|result| check(pid, "madvise", result))
}

fn clone_within(
    hand: &mut Hand<'_>,
    freezer: Freezer,
    &Order { request, is_subreaper, watches }: &Order<'_>,
    advised: &Advised,
) -> Result<Template, TemplateError> {
    let pid = hand.pid();
    let data = hand.area().start + DATA as u64;
    write_data(hand, data, request, watches)?;
    let mut calls = advised.before();
    let set_reaper = |on: u64| call(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER.cast_unsigned().into(), on]);
    calls.extend(is_subreaper.then(|| set_reaper(0)));
    let cloned_at = calls.len();
    calls.push(call(libc::SYS_clone3, &[data + CLONE_HELPER, CloneCall::LEN_BYTES as u64]));
    // Of whom the kernel tells; a number that no process has, as long as it does not.
    let all = libc::__WALL.cast_unsigned().into();
    calls.push(call(libc::SYS_wait4, &[0x7fff_ffff, 0, all, 0]));
    calls.extend(is_subreaper.then(|| set_reaper(1)));
    calls.extend(advised.after());
    if calls.len() > N_CALLS {
        return Err(TemplateRefusal::TooManyAdvised { pid, n_mappings: advised.n_ranges() }.into());
    }
    // The kernel writes the helper's number to where it is waited for.
    let awaited = hand.call_address(cloned_at + 1) + 8;
    let helper = CloneCall {
        flags: flags(libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_PARENT_SETTID),
        parent_tid: awaited,
        set_tid: request.numbers.map_or(0, |_| data + NUMBERS),
        ..CloneCall::default()
    };
    hand.write(data + CLONE_HELPER, &helper.bytes())?;
    let mut uffd = None;
    let hand_over = |pidfd: BorrowedFd<'_>| {
        let failed = process("hand a cgroup to the helper of", pid);
        let socket = pidfd_getfd(pidfd, ENGINES_SOCKET).map_err(failed)?;
        send_with_fds(socket.as_fd(), &[0], &[freezer.directory()]).map_err(failed)?;
        if watches {
            uffd = Some(pidfd_getfd(pidfd, WATCH).map_err(failed)?);
        }
        Ok(())
    };
    let (names, helper): (Vec<_>, Vec<_>) = helper_calls(data, watches).into_iter().unzip();
    let mut ran = hand.run_with_helper(&calls, &helper, hand_over)?;
    ran.attended.take().unwrap_or(Ok(()))?;
    judge(pid, &ran, cloned_at, request, &names)?;
    if let Some(uffd) = uffd {
        let watch = Watch::new(pid, uffd, &hand.area()).map_err(process("watch the memory of", pid))?;
        hand.stopped.kept.watches.add(watch);
    }
    let undone = ran.results[cloned_at + 2..].iter().chain(&ran.results[..cloned_at]);
    undone.copied().try_for_each(|result| check(pid, "madvise or prctl", result))?;
    fault::point("template.cloned").map_err(process("make a template of", pid))?;
    match Template::find(freezer)? {
        Ok(template) => {
            if let Some(cpus) = ran.cpus {
                // Should it fail: whoever is made from it gets what its record says all the same.
                let _ = sched_setaffinity(Pid::from_raw(template.pid()), &cpus);
            }
            Ok(template)
        }
        Err(_) => Err(TemplateRefusal::TemplateGone { pid }.into()),
    }
}

/// Writes all that the calls point at.
fn write_data(hand: &Hand<'_>, data: u64, request: &Request, watches: bool) -> Result<(), TemplateError> {
    // Of the descriptors that there are, the next one is the cgroup's.
    let received = WATCH + i32::from(watches);
    let template = CloneCall {
        // The table is the helper's: what that closes is closed here too.
        flags: flags(libc::CLONE_FILES | libc::CLONE_UNTRACED),
        exit_signal: libc::SIGCHLD.cast_unsigned().into(),
        set_tid: request.numbers.map_or(0, |_| data + NUMBERS + 4),
        cgroup: Some(u64::from(received.cast_unsigned())),
        ..CloneCall::default()
    };
    hand.write(data + CLONE_TEMPLATE, &template.bytes())?;
    let numbers = request.numbers.map_or([0, 0], |numbers| [numbers.helper, numbers.template]);
    hand.write(data + NUMBERS, &numbers.map(i32::to_le_bytes).concat())?;
    hand.write(data + MARKER, &hand.marker_set().to_le_bytes())?;
    let header = [0, 0, data + VECTOR, 1, data + CONTROL, 24, 0];
    hand.write(data + HEADER, &header.map(u64::to_le_bytes).concat())?;
    hand.write(data + VECTOR, &[data + BYTE, 1].map(u64::to_le_bytes).concat())?;
    Ok(())
}

/// The helper's calls, each with its name.
fn helper_calls(data: u64, watches: bool) -> Vec<(&'static str, Call)> {
    let last = u32::MAX.into();
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC).cast_unsigned().into();
    let unblock = libc::SIG_UNBLOCK.cast_unsigned().into();
    let mut calls = vec![
        ("close_range in the helper", call(libc::SYS_close_range, &[0, last, libc::CLOSE_RANGE_UNSHARE.into()])),
        ("setsid in the helper", call(libc::SYS_setsid, &[])),
        // The table is empty: each gets the lowest numbers.
        (SOCKETPAIR, call(libc::SYS_socketpair, &[flags(libc::AF_UNIX), kind, 0, data + PAIR])),
    ];
    let watch = flags(libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY);
    calls.extend(watches.then(|| (USERFAULTFD, call(libc::SYS_userfaultfd, &[watch]))));
    let receive = [SOCKET, data + HEADER, flags(libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)];
    calls.extend([
        ("rt_sigprocmask in the helper", call(libc::SYS_rt_sigprocmask, &[unblock, data + MARKER, 0, 8])),
        ("recvmsg in the helper", call(libc::SYS_recvmsg, &receive)),
        (CLONE3, call(libc::SYS_clone3, &[data + CLONE_TEMPLATE, CloneCall::LEN_BYTES as u64])),
        ("close_range in the helper", call(libc::SYS_close_range, &[0, last, 0])),
        ("exit_group in the helper", call(libc::SYS_exit_group, &[0])),
    ]);
    calls
}

/// What went wrong, if something did.
fn judge(
    pid: pid_t,
    ran: &Ran<TemplateError>,
    cloned_at: usize,
    request: &Request,
    names: &[&'static str],
) -> Result<(), TemplateError> {
    let number = |of: fn(Numbers) -> pid_t| request.numbers.map_or(0, of);
    if let Some(errno) = errno(ran.results[cloned_at]) {
        return Err(denied(pid, "clone3", errno, number(|numbers| numbers.helper)));
    }
    for (name, result) in names.iter().zip(&ran.helper) {
        let Some(errno) = errno(*result) else { continue };
        let error = match *name {
            SOCKETPAIR | USERFAULTFD if errno == libc::EMFILE => TemplateRefusal::TooFewDescriptors { pid }.into(),
            // The cgroup's descriptor was not received.
            CLONE3 if errno == libc::EBADF => TemplateRefusal::TooFewDescriptors { pid }.into(),
            CLONE3 => denied(pid, CLONE3, errno, number(|numbers| numbers.template)),
            name => check(pid, name, *result).err().unwrap_or(TemplateRefusal::TemplateGone { pid }.into()),
        };
        return Err(error);
    }
    check(pid, "wait4", ran.results[cloned_at + 1])
}

pub(super) fn denied(pid: pid_t, call: &'static str, errno: i32, number: pid_t) -> TemplateError {
    match errno {
        libc::EAGAIN => TemplateRefusal::TooManyProcesses { pid }.into(),
        libc::ENOMEM => TemplateRefusal::NoMemory { pid }.into(),
        libc::EPERM | libc::EACCES => TemplateRefusal::Denied { pid }.into(),
        libc::EEXIST => TemplateRefusal::NumberTaken { number }.into(),
        libc::EINVAL if number != 0 => TemplateRefusal::NumberTooHigh { number }.into(),
        _ => TemplateError::Call { call, pid, source: io::Error::from_raw_os_error(errno) },
    }
}

fn flags(flags: i32) -> u64 {
    flags.cast_unsigned().into()
}
