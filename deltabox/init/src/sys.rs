//! Init's system calls that neither std nor nix offer safely: one function per call, no policy.
#![expect(unsafe_code, reason = "system calls without a safe wrapper; tidy allows them in this file")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

#[path = "../../src/sys/mount.rs"]
#[allow(unreachable_pub, reason = "shared with the engine, where it is a public module")]
#[allow(dead_code, reason = "shared with the engine, which uses all of it")]
pub(crate) mod mount;
#[path = "../../src/sys/socket.rs"]
#[allow(unreachable_pub, reason = "shared with the engine, where it is a public module")]
pub(crate) mod socket;

/// The result of a raw system call as `io::Result`.
fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A raw system call that returns a new descriptor.
fn check_fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(check(ret)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor that the engine left open across the exec, by its agreed number. Close-on-exec from now on.
pub(crate) fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; fails with EBADF when there is no such descriptor.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    // SAFETY: the descriptor exists (checked above), and main takes each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Forks. The child runs `child` and exits with what it returns.
pub(crate) fn fork(child: impl FnOnce() -> i32) -> io::Result<u32> {
    // SAFETY: init has one thread, so the child may do whatever it likes.
    match unsafe { libc::fork() } {
        0 => std::process::exit(child()),
        pid => u32::try_from(pid).map_err(|_| io::Error::last_os_error()),
    }
}

/// Reaps one ended process of any kind; its PID and raw status. `None` if none is waiting.
pub(crate) fn reap() -> Option<(u32, i32)> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
    u32::try_from(pid).ok().filter(|&pid| pid > 0).map(|pid| (pid, status))
}

/// The slave of an unlocked terminal master (it never becomes the caller's controlling terminal).
pub(crate) fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }.into())?;
    // O_CLOEXEC would stay in the description's own flags, and show in fdinfo for all of its descriptors.
    let flags = libc::O_RDWR | libc::O_NOCTTY;
    // SAFETY: TIOCGPTPEER takes flags by value and returns a descriptor.
    let peer = check_fd(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())?;
    nix::fcntl::fcntl(&peer, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(peer)
}

/// Sets a terminal's size.
pub(crate) fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into()).map(drop)
}

/// Makes a terminal the controlling one of the caller, a session leader without one.
pub(crate) fn take_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number by value.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Puts a copy of `fd` at standard stream `number` (0 to 2), open across exec.
pub(crate) fn set_standard_stream(fd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: no pointers. A child before exec: nothing owns numbers 0 to 2.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into()).map(drop)
}

/// Takes a capability out of the bounding set.
pub(crate) fn drop_bounding_capability(number: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) }.into()).map(drop)
}

/// Empties the inheritable set and with it the ambient set, so that only exec's own rule gives capabilities.
pub(crate) fn clear_ambient_capabilities() -> io::Result<()> {
    let all = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, all, 0, 0, 0) }.into()).map(drop)
}

/// Installs a system call filter on the caller, inherited by every process it starts; where calls are told that it hands
/// over. Who makes one waits for an answer; once it is received only a fatal signal ends that.
pub(crate) fn set_filter(program: &[u8]) -> io::Result<OwnedFd> {
    // SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, since Linux 5.19.
    const WAIT_KILLABLE: libc::c_ulong = 1 << 5;
    let mut filter: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|c| libc::sock_filter {
            code: u16::from_le_bytes([c[0], c[1]]),
            jt: c[2],
            jf: c[3],
            k: u32::from_le_bytes([c[4], c[5], c[6], c[7]]),
        })
        .collect();
    let len = u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE;
    // SAFETY: `program` describes `filter`, which outlives the call; the kernel verifies its instructions.
    check_fd(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) })
}

/// A kill(2) that the filter has handed over.
pub(crate) struct Notified {
    /// For the answer.
    pub(crate) id: u64,
    /// The calling thread.
    pub(crate) task: u32,
    pub(crate) signal: i32,
}

// `_IOWR('!', 0, struct seccomp_notif)` and so on (include/uapi/linux/seccomp.h).
const NOTIF_RECV: libc::Ioctl = 0xC050_2100;
const NOTIF_SEND: libc::Ioctl = 0xC018_2101;
const NOTIF_ID_VALID: libc::Ioctl = 0x4008_2102;

/// Takes a call up. Blocks if there is none (and none has gone since the descriptor was readable).
pub(crate) fn receive_notification(listener: BorrowedFd<'_>) -> io::Result<Notified> {
    // SAFETY: plain old data, and the kernel wants all zeroes.
    let mut told: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one seccomp_notif.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &raw mut told) }.into())?;
    // The kernel too takes the low half, as a signed number.
    let [a, b, c, d, ..] = told.data.args[1].to_le_bytes();
    Ok(Notified { id: told.id, task: told.pid, signal: i32::from_le_bytes([a, b, c, d]) })
}

/// Lets the caller go on, with an error number or 0.
pub(crate) fn answer_notification(listener: BorrowedFd<'_>, id: u64, errno: i32) -> io::Result<()> {
    let answer = libc::seccomp_notif_resp { id, val: 0, error: -errno, flags: 0 };
    // SAFETY: the kernel reads one seccomp_notif_resp.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &raw const answer) }.into()).map(drop)
}

/// Whether the caller is there still.
pub(crate) fn is_notification_valid(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the kernel reads one u64.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_ID_VALID, &raw const id) }.into()).is_ok()
}

/// Holds a process.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal; the error number.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), i32> {
    let nothing = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: without a siginfo the kernel makes its own.
    errno(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, nothing, 0) })
}

/// Sends a signal that names its sender as sigqueue(3) does; the error number.
pub(crate) fn pidfd_queue_signal(pidfd: BorrowedFd<'_>, signal: i32, pid: u32, user: u32) -> Result<(), i32> {
    // The kernel's `siginfo_t`: signal, errno, code, a gap; sender, its user, a value; 128 bytes.
    let words = [signal, 0, libc::SI_QUEUE, 0, pid.cast_signed(), user.cast_signed()];
    let mut info = [0_i32; 32];
    info[..words.len()].copy_from_slice(&words);
    // SAFETY: the kernel reads one siginfo_t, 128 bytes.
    errno(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info.as_ptr(), 0) })
}

fn errno(ret: libc::c_long) -> Result<(), i32> {
    check(ret).map(drop).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

/// Sets the flags of the loopback interface to up.
pub(crate) fn loopback_up(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: ifreq is plain old data; all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *slot = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(libc::c_short::MAX);
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Sets every signal to its default action: whoever started the engine may have had some ignored (nohup).
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is valid for every signal; those that cannot be changed answer EINVAL, which is fine.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// What a new program expects after [`reset_signals`]: SIGPIPE, which Rust's start-up ignores, has its default action,
/// and nothing is blocked. (exec itself resets what init handles.)
pub(crate) fn default_sigpipe_and_mask() {
    // SAFETY: SIG_DFL is valid for SIGPIPE.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

/// Executes `path`. Returns only on failure.
pub(crate) fn exec(path: &CStr, argv: &[CString], envp: &[CString]) -> nix::Error {
    match nix::unistd::execve(path, argv, envp) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

/// Unmaps the program's own read-only pages; those still needed come back from the page cache at their next use.
/// What the set-up touched once would otherwise count as resident for the sandbox's whole life.
pub(crate) fn release_program_pages() -> io::Result<()> {
    unsafe extern "C" {
        // Placed by the linker at the first and behind the last byte of the read-only segments.
        static __executable_start: u8;
        static etext: u8;
    }
    let page = 4096;
    let start = (&raw const __executable_start) as usize & !(page - 1);
    let end = (&raw const etext) as usize & !(page - 1);
    // SAFETY: the range holds only read-only file pages of this program (a sealed memfd), so dropping them loses
    // nothing: the kernel maps the same bytes again on the next access.
    check(unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) }.into()).map(drop)
}
