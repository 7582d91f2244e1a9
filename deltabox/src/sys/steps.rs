//! Children that run a prepared list of steps, each a system call or a few, and report the result of each.
//!
//! This is the safe way to let a child of a possibly multi-threaded program do something: between clone3 and _exit
//! it touches only memory that was prepared before, allocates nothing and takes no lock.
//!
//! ```text
//! parent                         child
//!   clone_steps ---------------->  prctl(PDEATHSIG, SIGKILL)
//!   <----- 8 bytes: result --------  step 0
//!   <----- 8 bytes: result --------  step 1   (Wait: reads one byte from the parent first)
//!   ...                              _exit(0)
//! ```

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::process::{Child, CloneRequest, clone_process, exec_descriptor};

/// One thing a child does; its result is the call's, or a negated error number.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// Reads one byte from the channel; the child ends if there is none to come.
    Wait,
    /// Leaves the namespaces of these `CLONE_NEW*` flags for new ones.
    Unshare(libc::c_int),
    /// Writes `text` to a file that exists, in one write.
    Write {
        /// The file.
        path: &'a CStr,
        /// What.
        text: &'a [u8],
    },
    /// Makes a grandchild of this PID that ends at once, and waits for it. The result is its PID.
    CloneWithPid(libc::pid_t),
    /// Asks for SIGALRM in so many seconds: the end of a child without handler that is no PID namespace's init.
    Alarm(u32),
    /// Gives up privileges by exec, which installing a filter without CAP_SYS_ADMIN needs.
    NoNewPrivileges,
    /// Installs a system call filter.
    Filter(&'a [libc::sock_filter]),
    /// Calls getpriority(2) for itself, a call without effect.
    GetPriority,
    /// Executes the program behind a descriptor, without arguments. Reports only failure.
    Exec(BorrowedFd<'a>),
}

/// Forks a child with `request`'s extras that runs `steps` and reports on `channel`, a connected SOCK_SEQPACKET
/// socket, one native-endian `i64` for each. It is killed when the calling thread ends.
pub fn clone_steps(request: CloneRequest<'_>, channel: BorrowedFd<'_>, steps: &[Step<'_>]) -> io::Result<Child> {
    // SAFETY: the closure only makes system calls on memory that exists already; nothing in it allocates,
    // locks or unwinds.
    unsafe {
        clone_process(request, || {
            die_with_parent();
            for step in steps {
                let result = run(step, channel);
                if !report(channel, result) || (matches!(step, Step::Wait) && result != 1) {
                    return 1;
                }
            }
            0
        })
    }
}

fn run(step: &Step<'_>, channel: BorrowedFd<'_>) -> i64 {
    match *step {
        Step::Wait => read_byte(channel),
        Step::Unshare(flags) => unshare(flags),
        Step::Write { path, text } => write_file(path, text),
        Step::CloneWithPid(pid) => clone_with_pid(pid),
        Step::Alarm(seconds) => alarm(seconds),
        Step::NoNewPrivileges => no_new_privileges(),
        Step::Filter(filter) => install(filter),
        Step::GetPriority => get_priority(),
        Step::Exec(program) => {
            let error = exec_descriptor(program, &[Some(c"probe"), None], &[None]);
            -i64::from(error.raw_os_error().unwrap_or(libc::EIO))
        }
    }
}

/// `ret`, or the negated error number of the call that just failed.
fn result(ret: i64) -> i64 {
    if ret >= 0 {
        return ret;
    }
    // SAFETY: the address of this thread's error number.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: valid for this thread, whose only one in this process it is.
    -i64::from(unsafe { *place })
}

fn die_with_parent() {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

fn report(channel: BorrowedFd<'_>, value: i64) -> bool {
    let bytes = value.to_ne_bytes();
    // SAFETY: the buffer is as long as told.
    let n = unsafe { libc::send(channel.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
    n == 8
}

fn read_byte(channel: BorrowedFd<'_>) -> i64 {
    let mut byte = 0_u8;
    // SAFETY: there is room for the one byte.
    result(unsafe { libc::recv(channel.as_raw_fd(), (&raw mut byte).cast(), 1, 0) } as i64)
}

fn unshare(flags: libc::c_int) -> i64 {
    // SAFETY: no pointers.
    result(unsafe { libc::unshare(flags) }.into())
}

fn write_file(path: &CStr, text: &[u8]) -> i64 {
    // SAFETY: a C string for the whole call.
    let file = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if file < 0 {
        return result(file.into());
    }
    // SAFETY: the buffer is as long as told.
    let written = result(unsafe { libc::write(file, text.as_ptr().cast(), text.len()) } as i64);
    // SAFETY: the descriptor was opened above and nobody else knows it.
    unsafe { libc::close(file) };
    written
}

fn clone_with_pid(pid: libc::pid_t) -> i64 {
    let request = CloneRequest { set_tid: Some(pid), ..CloneRequest::default() };
    // SAFETY: the closure does nothing at all.
    match unsafe { clone_process(request, || 0) } {
        Ok(grandchild) => {
            let mut status = 0;
            // SAFETY: there is room for the status.
            result(unsafe { libc::waitpid(grandchild.pid, &raw mut status, 0) }.into())
        }
        Err(error) => -i64::from(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

fn alarm(seconds: u32) -> i64 {
    // SAFETY: no pointers.
    i64::from(unsafe { libc::alarm(seconds) })
}

fn no_new_privileges() -> i64 {
    // SAFETY: no pointers.
    result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

fn install(filter: &[libc::sock_filter]) -> i64 {
    let Ok(len) = u16::try_from(filter.len()) else { return -i64::from(libc::E2BIG) };
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program is as long as told; the kernel copies it and writes nothing.
    result(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })
}

fn get_priority() -> i64 {
    // SAFETY: no pointers. The raw call, whose result is 20 minus the nice value and never negative.
    result(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) })
}
