//! How long a tracer waits for what a task does in microseconds: by the clock, by what the tracer itself saw of that time,
//! and by what keeps the task.
//!
//! A clock alone is wrong on a machine that stands still for seconds (a virtual one that is paused, a host without a CPU to
//! spare): the time is over then before the task had its turn.

use std::time::{Duration, Instant};

/// Interruptions of a wait that are seen before its time can be over (chosen: a tracer that had so many turns was on
/// its CPU for a while, and so was the task).
const N_LOOKS: usize = 100;
/// So much longer, in terms of the patience, it may take a task that wants a CPU or sleeps where a signal does not wake it:
/// it is on its way, and killing it would wait for the same (chosen).
const ON_ITS_WAY: u32 = 4;

/// A patience that is being tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    end: Instant,
    last: Instant,
    n_looks: usize,
}

impl Patience {
    pub(super) fn new(now: Instant, patience: Duration) -> Self {
        Self { end: now + patience, last: now + patience * ON_ITS_WAY, n_looks: 0 }
    }

    /// The wait was interrupted: whether it is to be given up. `state` tells the letter of the task's `stat`, asked only
    /// if that decides.
    pub(super) fn is_over(&mut self, now: Instant, state: impl FnOnce() -> char) -> bool {
        self.n_looks += 1;
        now >= self.end && self.n_looks >= N_LOOKS && (now >= self.last || !matches!(state(), 'R' | 'D'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every `every_ms` until it is over; after how many milliseconds that is.
    fn tried(every_ms: u64, pause_ms: u64, state: char) -> u64 {
        let begin = Instant::now();
        let mut patience = Patience::new(begin, Duration::from_secs(5));
        let mut now_ms = pause_ms;
        loop {
            now_ms += every_ms;
            if patience.is_over(begin + Duration::from_millis(now_ms), || state) {
                return now_ms;
            }
        }
    }

    #[test]
    fn a_task_that_sleeps_is_given_up_when_the_time_is_over() {
        assert_eq!(tried(10, 0, 'S'), 5_000);
    }

    #[test]
    fn a_machine_that_stood_still_uses_up_no_patience() {
        assert_eq!(tried(10, 60_000, 'S'), 61_000);
    }

    #[test]
    fn a_task_that_wants_a_cpu_is_given_more_time() {
        assert_eq!(tried(10, 0, 'R'), 20_000);
        assert_eq!(tried(10, 0, 'D'), 20_000);
    }
}
