//! timerfd_create(2): a clock, when it expires next, and how often it has without being read.
//!
//! A timer that was set to run for a while has as much left as it had. One that was set to a time (TFD_TIMER_ABSTIME)
//! expires at that time, or at once if it is over: so does a program expect it that was asleep meanwhile.
//!
//! ```text
//! read   timerfd_gettime (winds up a periodic one that has expired: until then it shows no time left, which when set
//!        would disarm it), then fdinfo: clock, flags, ticks
//! make   timerfd_create, timerfd_settime, TFD_IOC_SET_TICKS
//! ```
//! Times are those of the clocks of the host. An image that goes to another boot needs its monotonic times shifted.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::failed;
use super::own::{field, own_fdinfo, unknown};
use super::{ObjectError, ObjectRefusal};
use crate::sys::timer::{self, Setting};

/// A timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timerfd {
    /// `CLOCK_*`.
    clock: i32,
    /// `TFD_TIMER_*`, as it was set.
    flags: i32,
    expiry: Expiry,
    interval: Duration,
    /// How often it has expired since it was last read.
    ticks: u64,
}

/// When a timer expires next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Expiry {
    /// It is not set, or was set once and has expired.
    Never,
    /// So much was left of it.
    After(Duration),
    /// When its clock shows this.
    At(Duration),
}

impl Timerfd {
    /// Reads it from the engine's copy.
    ///
    /// # Errors
    /// `CancelledTimer`; or the kernel's word.
    pub fn read(fd: BorrowedFd<'_>) -> Result<Self, ObjectError> {
        let setting = timer::setting(fd).map_err(failed("read a timer"))?;
        Self::parse(setting, &own_fdinfo(fd).map_err(failed("read fdinfo of a timer"))?)
    }

    /// From what [`timer::setting`] has told, and fdinfo, read after that.
    ///
    /// # Errors
    /// As [`Timerfd::read`].
    pub fn parse(setting: Setting, fdinfo: &str) -> Result<Self, ObjectError> {
        let told = |key| field(fdinfo, key).ok_or_else(|| unknown("timer"));
        let parsed = || {
            let clock = told("clockid")?.parse().ok();
            let flags = i32::from_str_radix(told("settime flags")?, 8).ok();
            let ticks = told("ticks")?.parse().ok();
            let all = clock.zip(flags).zip(ticks);
            all.map(|((clock, flags), ticks)| (clock, flags, ticks)).ok_or_else(|| unknown("timer"))
        };
        let (clock, flags, ticks): (i32, i32, u64) = parsed().map_err(failed("read a timer"))?;
        let expiry = if setting.value.is_zero() {
            Expiry::Never
        } else if flags & libc::TFD_TIMER_ABSTIME == 0 {
            Expiry::After(setting.value)
        } else {
            let now = timer::now(clock).map_err(failed("read a clock"))?;
            Expiry::At(now.saturating_add(setting.value))
        };
        // A tick of a timer that runs for the first time comes from the clock alone.
        let cancelled = flags & libc::TFD_TIMER_CANCEL_ON_SET != 0 && setting.interval.is_zero() && ticks > 0;
        if cancelled && expiry != Expiry::Never {
            return Err(ObjectRefusal::CancelledTimer.into());
        }
        Ok(Self { clock, flags, expiry, interval: setting.interval, ticks })
    }

    /// Makes another one that goes on where this one was.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self) -> io::Result<OwnedFd> {
        let made = timer::create(self.clock)?;
        let (value, flags) = match self.expiry {
            Expiry::Never => (Duration::ZERO, self.flags),
            Expiry::After(left) => (left, 0),
            // Zero would disarm it.
            Expiry::At(time) => (time.max(Duration::from_nanos(1)), self.flags),
        };
        timer::set(fd(&made), flags, Setting { value, interval: self.interval })?;
        if self.ticks > 0 {
            timer::set_ticks(fd(&made), self.ticks)?;
        }
        Ok(made)
    }
}

fn fd(timer: &OwnedFd) -> BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(timer)
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn timer_with(clock: i32, flags: i32, value: Duration, interval: Duration) -> OwnedFd {
        let made = timer::create(clock).unwrap();
        timer::set(fd(&made), flags, Setting { value, interval }).unwrap();
        made
    }

    /// Waits until it has expired, at most a while.
    fn expire(timer: &OwnedFd) -> bool {
        let mut fds = [PollFd::new(fd(timer), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(5000_u16)).unwrap() == 1
    }

    fn ticks(timer: &OwnedFd) -> nix::Result<u64> {
        fcntl(timer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut bytes = [0; 8];
        nix::unistd::read(timer, &mut bytes).map(|_| u64::from_ne_bytes(bytes))
    }

    #[test]
    fn what_is_left_goes_on() {
        let old = timer_with(libc::CLOCK_BOOTTIME, 0, 100 * SECOND, 7 * SECOND);
        let record = Timerfd::read(fd(&old)).unwrap();
        let Expiry::After(left) = record.expiry else { panic!("{record:?}") };
        assert!(left > 90 * SECOND && left <= 100 * SECOND);
        timer::set(fd(&old), 0, Setting::default()).unwrap();
        let new = record.make().unwrap();
        let setting = timer::setting(fd(&new)).unwrap();
        assert!(setting.value <= left && setting.value > left - 5 * SECOND);
        assert_eq!((setting.interval, ticks(&new)), (7 * SECOND, Err(nix::errno::Errno::EAGAIN)));
        assert_eq!(Timerfd::read(fd(&new)).unwrap().clock, libc::CLOCK_BOOTTIME);
    }

    #[test]
    fn a_periodic_timer_that_expired_unread_has_its_ticks_and_runs_on() {
        let interval = Duration::from_millis(2);
        let old = timer_with(libc::CLOCK_MONOTONIC, 0, interval, interval);
        assert!(expire(&old));
        let record = Timerfd::read(fd(&old)).unwrap();
        assert!(record.ticks >= 1 && matches!(record.expiry, Expiry::After(_)), "{record:?}");
        let new = record.make().unwrap();
        assert!(ticks(&new).unwrap() >= record.ticks);
        assert!(expire(&new), "it does not run");
    }

    #[test]
    fn a_timer_that_expired_once_can_be_read_once() {
        let old = timer_with(libc::CLOCK_MONOTONIC, 0, Duration::from_nanos(1), Duration::ZERO);
        assert!(expire(&old));
        let record = Timerfd::read(fd(&old)).unwrap();
        assert_eq!((record.expiry, record.ticks), (Expiry::Never, 1));
        let new = record.make().unwrap();
        assert_eq!(ticks(&new), Ok(1));
        assert_eq!(ticks(&new), Err(nix::errno::Errno::EAGAIN));
    }

    #[test]
    fn a_timer_set_to_a_time_expires_at_that_time() {
        let at = timer::now(libc::CLOCK_REALTIME).unwrap() + 50 * SECOND;
        let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        let old = timer_with(libc::CLOCK_REALTIME, flags, at, Duration::ZERO);
        let record = Timerfd::read(fd(&old)).unwrap();
        let Expiry::At(time) = record.expiry else { panic!("{record:?}") };
        assert!(time.abs_diff(at) < Duration::from_millis(500), "{:?}", time.abs_diff(at));
        let again = Timerfd::read(fd(&record.make().unwrap())).unwrap();
        assert_eq!(again.flags, flags);
        // One that is over.
        let past = Timerfd { expiry: Expiry::At(at - 60 * SECOND), ..record };
        assert!(expire(&past.make().unwrap()));
        let beginning = Timerfd { expiry: Expiry::At(Duration::ZERO), ..past };
        assert!(expire(&beginning.make().unwrap()));
    }

    #[test]
    fn a_timer_that_is_not_set_stays_so() {
        let record = Timerfd::read(fd(&timer::create(libc::CLOCK_REALTIME).unwrap())).unwrap();
        assert_eq!((record.expiry, record.ticks), (Expiry::Never, 0));
        let new = record.make().unwrap();
        assert_eq!(timer::setting(fd(&new)).unwrap(), Setting::default());
    }

    #[test]
    fn a_time_far_away_is_kept() {
        let old = timer_with(libc::CLOCK_MONOTONIC, libc::TFD_TIMER_ABSTIME, Duration::from_secs(1 << 40), SECOND);
        let record = Timerfd::read(fd(&old)).unwrap();
        let new = record.make().unwrap();
        assert!(timer::setting(fd(&new)).unwrap().value > Duration::from_secs(1 << 33));
    }
}
