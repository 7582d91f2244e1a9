//! Making processes and holding them: clone3 into namespaces and cgroups, pidfd, exec by descriptor.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{check, check_fd};

/// The kernel's `struct clone_args` (88 bytes, since Linux 5.7).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// From the kernel (include/uapi/linux/sched.h); libc's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What an injected clone3 asks for, as the kernel reads it.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneCall {
    /// `CLONE_*` without CLONE_INTO_CGROUP.
    pub flags: u64,
    /// Address of the new thread's number, to be cleared at its end (with CLONE_CHILD_CLEARTID).
    pub child_tid: u64,
    /// Address at which the kernel tells the maker the new number (with CLONE_PARENT_SETTID).
    pub parent_tid: u64,
    /// What the base of `fs` becomes (with CLONE_SETTLS).
    pub tls: u64,
    /// What the parent is sent at its end, 0 for nothing.
    pub exit_signal: u64,
    /// Address of an int with the number to be taken, 0 for any.
    pub set_tid: u64,
    /// Number of a descriptor of the cgroup to be born into.
    pub cgroup: Option<u64>,
}

impl CloneCall {
    /// Bytes of the kernel's structure.
    pub const LEN_BYTES: usize = size_of::<CloneArgs>();

    /// The kernel's `struct clone_args`.
    pub fn bytes(self) -> [u8; Self::LEN_BYTES] {
        let into = if self.cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
        let words: [u64; Self::LEN_BYTES / 8] = [
            self.flags | into,
            0,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            0,
            0,
            self.tls,
            self.set_tid,
            u64::from(self.set_tid != 0),
            self.cgroup.unwrap_or(0),
        ];
        let mut bytes = [0; Self::LEN_BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// What a new process gets that a plain fork would not give.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneRequest<'a> {
    /// `CLONE_NEW*` flags, `CLONE_NEWTIME` included.
    pub namespaces: u64,
    /// Directory descriptor of the cgroup it is born into.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The PID it gets in its innermost namespace.
    pub set_tid: Option<libc::pid_t>,
}

/// A process made by [`clone_process`].
#[derive(Debug)]
pub struct Child {
    /// Its PID as the caller sees it.
    pub pid: libc::pid_t,
    /// A descriptor that cannot be taken over by another process of that number.
    pub pidfd: OwnedFd,
}

/// Forks with `request`'s extras. The child runs `child` and exits with what it returns.
///
/// # Safety
/// The child of a multi-threaded program: `child` may only make system calls on memory prepared before
/// (no allocation, no locks, no unwinding), as after fork(2) in general.
pub unsafe fn clone_process(request: CloneRequest<'_>, child: impl FnOnce() -> i32) -> io::Result<Child> {
    let mut pidfd: RawFd = -1;
    let set_tid = request.set_tid.unwrap_or(0);
    let mut args = CloneArgs {
        flags: request.namespaces | u64::from(libc::CLONE_PIDFD.cast_unsigned()),
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        ..CloneArgs::default()
    };
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    if request.set_tid.is_some() {
        args.set_tid = (&raw const set_tid) as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: no stack is given, so this is a fork: the child continues on its own copy of this stack;
    // `args` and what it points to live through the call.
    let ret = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if ret == 0 {
        let status = child();
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(status) }
    }
    let pid = libc::pid_t::try_from(ret).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    Ok(Child { pid, pidfd: check_fd(pidfd.into())? })
}

/// Executes the program behind `program` in place of the caller. Returns only on failure.
///
/// `argv` and `envp` are null-terminated arrays of C strings.
pub fn exec_descriptor(program: BorrowedFd<'_>, argv: &[Option<&CStr>], envp: &[Option<&CStr>]) -> io::Error {
    assert!(argv.last() == Some(&None) && envp.last() == Some(&None), "arrays must end with None");
    // SAFETY: `Option<&CStr>` is a fat pointer, so thin arrays are made first; both end with null.
    let thin = |list: &[Option<&CStr>], out: &mut [*const libc::c_char; 16]| {
        for (slot, text) in out.iter_mut().zip(list) {
            *slot = text.map_or(std::ptr::null(), CStr::as_ptr);
        }
    };
    let mut argv_thin = [std::ptr::null(); 16];
    let mut envp_thin = [std::ptr::null(); 16];
    assert!(argv.len() <= 15 && envp.len() <= 15, "arrays hold at most 14 strings");
    thin(argv, &mut argv_thin);
    thin(envp, &mut envp_thin);
    // SAFETY: null-terminated arrays of valid C strings that live through the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv_thin.as_ptr(),
            envp_thin.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    check(ret).err().unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// A descriptor for a running process (any process, not only a child).
pub fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A descriptor of one thread (its leader need not live).
pub fn pidfd_open_thread(tid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::PIDFD_THREAD) })
}

/// A copy of descriptor `number` of another process.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// What of two tasks is compared; numbers of `enum kcmp_type`.
#[derive(Clone, Copy, Debug)]
pub enum Compared {
    /// The open file descriptions behind two descriptors.
    Descriptions(i32, i32),
    /// The memory.
    Memory,
    /// The descriptor tables.
    Tables,
    /// Root, working directory and umask.
    Places,
}

/// Whether two tasks share something; a total order over what they do not share (kcmp(2)).
pub fn compare(a: libc::pid_t, b: libc::pid_t, what: Compared) -> io::Result<std::cmp::Ordering> {
    let (kind, x, y) = match what {
        Compared::Descriptions(x, y) => (0, x, y),
        Compared::Memory => (1, 0, 0),
        Compared::Tables => (2, 0, 0),
        Compared::Places => (3, 0, 0),
    };
    // SAFETY: no pointers for these kinds.
    match check(unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, libc::c_long::from(x), libc::c_long::from(y)) })? {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2 => Ok(std::cmp::Ordering::Greater),
        _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    }
}

/// The limit on descriptor numbers of a process, soft and hard.
pub fn descriptor_limits(pid: libc::pid_t) -> io::Result<(u64, u64)> {
    let limit = limit(pid, libc::RLIMIT_NOFILE)?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets a soft limit of a process (`RLIMIT_*`), to the hard one at most. Returns what it was.
pub fn set_soft_limit(pid: libc::pid_t, resource: libc::__rlimit_resource_t, soft: u64) -> io::Result<u64> {
    let limit = limit(pid, resource)?;
    let new = libc::rlimit64 { rlim_cur: soft.min(limit.rlim_max), ..limit };
    // SAFETY: the kernel reads one rlimit64 and writes none.
    check(unsafe { libc::prlimit64(pid, resource, &raw const new, std::ptr::null_mut()) }.into())?;
    Ok(limit.rlim_cur)
}

fn limit(pid: libc::pid_t, resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit64> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit64 and reads none.
    check(unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &raw mut limit) }.into())?;
    Ok(limit)
}

/// Sends `signal` to the process behind `pidfd`.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed: the kernel fills in that of kill(2).
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    })
    .map(drop)
}

/// A program for a new process: what it executes and which descriptors it finds where.
#[derive(Debug)]
pub struct Program<'a> {
    /// The executable (a sealed memfd, a file).
    pub file: BorrowedFd<'a>,
    /// Arguments, at most 14.
    pub argv: &'a [&'a CStr],
    /// Environment, at most 14.
    pub envp: &'a [&'a CStr],
    /// Descriptors and the numbers (below 100) they get; all others are closed at exec.
    pub fds: &'a [(BorrowedFd<'a>, RawFd)],
}

/// Makes a process that waits for one byte from `gate`, becomes user and group 0 of its user namespace, leads a
/// session of its own, and executes `program`. If the gate's other end closes without a byte it exits.
///
/// Its exit status before the program runs is 120 (gate closed), 121 (ids), 122 (descriptors) or 123 (exec).
pub fn clone_and_exec(request: CloneRequest<'_>, gate: BorrowedFd<'_>, program: &Program<'_>) -> io::Result<Child> {
    let argv: Vec<Option<&CStr>> = program.argv.iter().copied().map(Some).chain([None]).collect();
    let envp: Vec<Option<&CStr>> = program.envp.iter().copied().map(Some).chain([None]).collect();
    let mut high: Vec<(RawFd, RawFd)> = program.fds.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect();
    let (gate, file) = (gate.as_raw_fd(), program.file.as_raw_fd());
    let mut kept: Vec<RawFd> = high.iter().map(|(source, _)| *source).chain([gate, file]).collect();
    kept.sort_unstable();
    let child = || {
        // Before anything that waits: it is a copy of the caller with all its descriptors, the gate's other end, locks and
        // listening sockets among them. If the caller dies now, nothing of it may live on here.
        if close_all_but(&kept).is_err() {
            return 122;
        }
        if !read_one_byte(gate) {
            return 120;
        }
        if become_root_and_leader().is_err() {
            return 121;
        }
        // Sources first out of the way of the numbers that they are to take.
        let Ok(file) = duplicate_above(file, true) else { return 122 };
        for (source, _) in &mut high {
            match duplicate_above(*source, false) {
                Ok(fd) => *source = fd,
                Err(_) => return 122,
            }
        }
        for (source, number) in &high {
            // SAFETY: no pointers; both are numbers of this process's own table.
            if unsafe { libc::dup2(*source, *number) } < 0 {
                return 122;
            }
        }
        // SAFETY: no pointers. Everything above 99 closes at exec.
        unsafe { libc::syscall(libc::SYS_close_range, 100, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        // SAFETY: the descriptor was made above and stays open until exec.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        exec_descriptor(file, &argv, &envp);
        123
    };
    // SAFETY: the closure makes system calls on memory prepared above; it neither allocates nor locks.
    unsafe { clone_process(request, child) }
}

/// Makes a process that does nothing until the other end of `gate` is closed, then exits with status 0.
pub fn clone_waiting(request: CloneRequest<'_>, gate: BorrowedFd<'_>) -> io::Result<Child> {
    let gate = gate.as_raw_fd();
    let child = || {
        // Its own copy of the other end, above all: with it, it would wait for ever for a caller that died.
        if close_all_but(&[gate]).is_err() {
            return 122;
        }
        while read_one_byte(gate) {}
        0
    };
    // SAFETY: the closure makes system calls only.
    unsafe { clone_process(request, child) }
}

/// Waits for a child to end and reaps it; its raw status.
pub fn reap(child: &Child) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        match check(unsafe { libc::waitpid(child.pid, &raw mut status, libc::__WALL) }.into()) {
            Ok(_) => return Ok(status),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The pidfd of a process that has ended and was reaped: one is made for that. `of_thread`: with PIDFD_THREAD.
pub fn pidfd_of_ended(of_thread: bool) -> io::Result<OwnedFd> {
    // SAFETY: the closure does nothing.
    let child = unsafe { clone_process(CloneRequest::default(), || 0) }?;
    // It has its number until it is reaped.
    let thread = of_thread.then(|| pidfd_open_thread(child.pid)).transpose();
    reap(&child)?;
    Ok(thread?.unwrap_or(child.pidfd))
}

/// Closes every descriptor that is not in `kept`, which is sorted.
fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut next: u32 = 0;
    for fd in kept {
        let fd = fd.cast_unsigned();
        if fd > next {
            // SAFETY: no pointers. In a child before exec: nothing that runs there owns these.
            check(unsafe { libc::syscall(libc::SYS_close_range, next, fd - 1, 0) })?;
        }
        next = fd.saturating_add(1);
    }
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_close_range, next, u32::MAX, 0) }).map(drop)
}

fn read_one_byte(fd: RawFd) -> bool {
    let mut byte = 0_u8;
    loop {
        // SAFETY: room for one byte.
        let n = unsafe { libc::read(fd, (&raw mut byte).cast(), 1) };
        if n >= 0 {
            return n == 1;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return false;
        }
    }
}

/// The raw calls, not libc's wrappers: those would ask all threads of the parent's library state to join in.
fn become_root_and_leader() -> io::Result<()> {
    // SAFETY: no pointers are read for zero groups.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_setsid) }).map(drop)
}

fn duplicate_above(fd: RawFd, close_on_exec: bool) -> io::Result<RawFd> {
    let command = if close_on_exec { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD };
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::fcntl(fd, command, 100) }.into())?;
    i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}

/// The calling thread yields the processors to others: nice 10 (chosen: a tenth of the weight of an ordinary thread, not
/// nothing).
pub fn be_nice() -> io::Result<()> {
    // SAFETY: no pointers; 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Marks every descriptor of the caller from number 3 up close-on-exec (they stay open here): what it
/// inherited without knowing then ends with the next exec.
pub fn set_all_close_on_exec() -> io::Result<()> {
    // SAFETY: no pointers; closes nothing in this process (CLOSE_RANGE_CLOEXEC, since Linux 5.11).
    check(unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Makes the process that `command` starts the leader of a session of its own, without a terminal.
pub fn start_in_new_session(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let setsid = || {
        // SAFETY: no pointers.
        check(unsafe { libc::syscall(libc::SYS_setsid) }).map(drop)
    };
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing
    // (`last_os_error` only reads errno).
    unsafe { command.pre_exec(setsid) };
}

/// Does something while the calling thread has no effective CAP_SYS_RESOURCE.
///
/// # Errors
/// That of `work`, or of laying the capability down or taking it up again.
pub fn without_sys_resource<R>(work: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    /// From the kernel (include/uapi/linux/capability.h); effective, permitted, inheritable of two halves.
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_SYS_RESOURCE: u32 = 1 << 24;
    let header = [VERSION_3, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: the header is the kernel's; of this version it writes two structures of three words.
    check(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) })?;
    if sets[0] & CAP_SYS_RESOURCE == 0 {
        return work();
    }
    let set = |sets: [u32; 6]| {
        // SAFETY: as above; the kernel reads two structures.
        check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) })
    };
    let mut without = sets;
    without[0] &= !CAP_SYS_RESOURCE;
    set(without)?;
    let done = work();
    set(sets)?;
    done
}
