//! Reads how long an interrupted call may take, from the memory and the sockets of its process.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use libc::pid_t;
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};
use nix::sys::time::TimeValLike;

use super::area::Memory;
use super::interrupted::Timeout;
use super::waits::Limit;
use crate::sys::process::{pidfd_getfd, pidfd_open_thread};

const TIMED_OUT: i64 = 0;
const AGAIN: i64 = -(libc::EAGAIN as i64);
const IN_PROGRESS: i64 = -(libc::EINPROGRESS as i64);

/// `None`: for ever, or not to be found out (another thread may have unmapped or closed it: then the kernel
/// decides when the call is made again).
pub(super) fn read_limit(pid: pid_t, tid: pid_t, call: i64, timeout: Timeout) -> Option<Limit> {
    match timeout {
        Timeout::None => None,
        Timeout::Milliseconds(ms) => {
            let time = Duration::from_millis(u64::try_from(ms).ok()?);
            Some(Limit { time, result: TIMED_OUT })
        }
        Timeout::Timespec(at) => {
            let waits_for_one = call == libc::SYS_semtimedop || call == libc::SYS_rt_sigtimedwait;
            let result = if waits_for_one { AGAIN } else { TIMED_OUT };
            Some(Limit { time: read_time(pid, tid, at, 1)?, result })
        }
        Timeout::Timeval(at) => Some(Limit { time: read_time(pid, tid, at, 1000)?, result: TIMED_OUT }),
        Timeout::Receive(fd) => receive(&copy(tid, fd)?),
        Timeout::Send(fd) => send(&copy(tid, fd)?),
        Timeout::Connect(fd) => {
            let socket = copy(tid, fd)?;
            let limit = send(&socket)?;
            let is_unix = family(&socket) == Some(AddressFamily::Unix);
            Some(if is_unix { limit } else { Limit { result: IN_PROGRESS, ..limit } })
        }
        Timeout::Transfer(from, to) => {
            copy(tid, from).and_then(|socket| receive(&socket)).or_else(|| send(&copy(tid, to)?))
        }
    }
}

/// Seconds, then a fraction in units of `unit_ns`.
fn read_time(pid: pid_t, tid: pid_t, at: u64, unit_ns: u64) -> Option<Duration> {
    if at == 0 {
        return None;
    }
    let mut bytes = [0; 16];
    Memory::of(pid, tid).read(at, &mut bytes).ok()?;
    let word = |at: usize| bytes[at..at + 8].try_into().ok().map(i64::from_le_bytes);
    let (seconds, fraction) = (u64::try_from(word(0)?).ok()?, u64::try_from(word(8)?).ok()?);
    Duration::from_secs(seconds).checked_add(Duration::from_nanos(fraction.checked_mul(unit_ns)?))
}

fn copy(tid: pid_t, fd: u64) -> Option<OwnedFd> {
    let thread = pidfd_open_thread(tid).ok()?;
    pidfd_getfd(thread.as_fd(), i32::try_from(fd & 0xffff_ffff).ok()?).ok()
}

fn receive(socket: &OwnedFd) -> Option<Limit> {
    bounded(getsockopt(socket, sockopt::ReceiveTimeout).ok()?.num_microseconds())
}

fn send(socket: &OwnedFd) -> Option<Limit> {
    bounded(getsockopt(socket, sockopt::SendTimeout).ok()?.num_microseconds())
}

/// Zero is for ever.
fn bounded(us: i64) -> Option<Limit> {
    let time = Duration::from_micros(u64::try_from(us).ok().filter(|us| *us > 0)?);
    Some(Limit { time, result: AGAIN })
}

fn family(socket: &OwnedFd) -> Option<AddressFamily> {
    use std::os::fd::AsRawFd;
    getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok()?.family()
}
