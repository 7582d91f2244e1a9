//! timerfd(2) as the kernel has it: any clock, and the ticks that nobody has read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::{check, check_fd};

/// The first expiry from now, or at a time, and the time between later ones. Zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// `it_value`.
    pub value: Duration,
    /// `it_interval`.
    pub interval: Duration,
}

impl Setting {
    fn raw(self) -> io::Result<libc::itimerspec> {
        Ok(libc::itimerspec { it_value: timespec(self.value)?, it_interval: timespec(self.interval)? })
    }
}

/// A timer of `clock` (`CLOCK_*`), not set.
pub fn create(clock: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) }.into())
}

/// The time left until the next expiry; one that is periodic and has expired is wound up to now first.
pub fn setting(timer: BorrowedFd<'_>) -> io::Result<Setting> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut raw = libc::itimerspec { it_value: none, it_interval: none };
    // SAFETY: writes one itimerspec, which lives through the call.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut raw) }.into())?;
    Ok(Setting { value: duration(raw.it_value)?, interval: duration(raw.it_interval)? })
}

/// Sets it; `flags` are `TFD_TIMER_*`.
pub fn set(timer: BorrowedFd<'_>, flags: i32, setting: Setting) -> io::Result<()> {
    let raw = setting.raw()?;
    // SAFETY: reads one itimerspec, which lives through the call, and is given no room for the old one.
    check(unsafe { libc::timerfd_settime(timer.as_raw_fd(), flags, &raw const raw, std::ptr::null_mut()) }.into())
        .map(drop)
}

/// Says how often it has expired since it was last read; not 0.
pub fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    // _IOW('T', 0, __u64) of include/uapi/linux/timerfd.h.
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: reads one u64, which lives through the call.
    check(unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) }.into()).map(drop)
}

/// What a clock shows.
pub fn now(clock: i32) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which lives through the call.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) }.into())?;
    duration(time)
}

fn duration(time: libc::timespec) -> io::Result<Duration> {
    match (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) {
        (Ok(secs), Ok(nanos)) => Ok(Duration::new(secs, nanos)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn timespec(time: Duration) -> io::Result<libc::timespec> {
    let secs = i64::try_from(time.as_secs()).map_err(io::Error::other)?;
    Ok(libc::timespec { tv_sec: secs, tv_nsec: time.subsec_nanos().into() })
}
