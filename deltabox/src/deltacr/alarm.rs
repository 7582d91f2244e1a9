//! Deadlines of waits that cannot be polled: a timer that interrupts the calling thread, again and again.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

use crate::sys::ptrace::handle_by_interruption;

/// The library's signal for this; a program that embeds the engine must leave it to it.
const INTERRUPTION: Signal = Signal::SIGVTALRM;

/// Interrupts blocking calls of the thread that made it, while it is armed and listened to.
///
/// It fires repeatedly, because once could be just before the call that it is to interrupt.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: Timer,
    /// When it will fire.
    first: Option<Instant>,
}

impl Alarm {
    /// A disarmed one, for the calling thread.
    pub(super) fn new() -> io::Result<Self> {
        handle_by_interruption(INTERRUPTION)?;
        SigSet::from(INTERRUPTION).thread_block()?;
        let thread_id = nix::unistd::gettid().as_raw();
        let event = SigEvent::new(SigevNotify::SigevThreadId { signal: INTERRUPTION, thread_id, si_value: 0 });
        Ok(Self { timer: Timer::new(ClockId::CLOCK_MONOTONIC, event)?, first: None })
    }

    /// Interrupts from `first` on (up to a fifth later, or earlier if that is how it was armed last: it is the caller
    /// who knows the time), every `every`, until [`Alarm::deafen`].
    pub(super) fn listen(&mut self, first: Duration, every: Duration) -> io::Result<()> {
        let latest = Instant::now() + first + first / 5;
        if self.first.is_none_or(|at| at > latest) {
            // Zero would disarm.
            let ahead = (first + first / 5).max(Duration::from_micros(1));
            self.timer.set(Expiration::IntervalDelayed(ahead.into(), every.into()), TimerSetTimeFlags::empty())?;
            self.first = Some(latest);
        }
        Ok(SigSet::from(INTERRUPTION).thread_unblock()?)
    }

    /// Nothing is interrupted any more: the signal is blocked. The timer stays armed: setting it costs more than this,
    /// and the next time it is needed comes soon.
    pub(super) fn deafen(&self) -> io::Result<()> {
        Ok(SigSet::from(INTERRUPTION).thread_block()?)
    }
}
