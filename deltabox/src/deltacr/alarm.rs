//! Deadlines of waits that cannot be polled: a timer that interrupts the calling thread, again and again.

use std::io;
use std::time::Duration;

use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

use crate::sys::process::handle_by_interruption;

/// The library's signal for this; a program that embeds the engine must leave it to it.
const INTERRUPTION: Signal = Signal::SIGVTALRM;

/// Interrupts blocking calls of the thread that made it, while it is armed.
///
/// It fires repeatedly, because once could be just before the call that it is to interrupt.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: Timer,
}

impl Alarm {
    /// A disarmed one, for the calling thread.
    pub(super) fn new() -> io::Result<Self> {
        handle_by_interruption(INTERRUPTION)?;
        SigSet::from(INTERRUPTION).thread_unblock()?;
        let thread_id = nix::unistd::gettid().as_raw();
        let event = SigEvent::new(SigevNotify::SigevThreadId { signal: INTERRUPTION, thread_id, si_value: 0 });
        Ok(Self { timer: Timer::new(ClockId::CLOCK_MONOTONIC, event)? })
    }

    /// From `first` on, every `every`.
    pub(super) fn arm(&mut self, first: Duration, every: Duration) -> io::Result<()> {
        // Zero would disarm.
        let first = first.max(Duration::from_micros(1));
        let when = Expiration::IntervalDelayed(first.into(), every.into());
        Ok(self.timer.set(when, TimerSetTimeFlags::empty())?)
    }

    pub(super) fn disarm(&mut self) -> io::Result<()> {
        Ok(self.timer.set(Expiration::OneShot(Duration::ZERO.into()), TimerSetTimeFlags::empty())?)
    }
}
