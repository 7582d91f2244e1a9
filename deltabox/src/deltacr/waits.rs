//! Timeouts of calls that the stop makes begin anew, kept from stop to stop.
//!
//! A call that answers a wake-up with plain `EINTR` (`interrupted.rs`) is made again with its whole timeout. Stopped more
//! often than that it would never end. So the engine remembers when it first saw the call, and at the first
//! stop after its time is over lets it return what a timeout returns. Never early; late by at most the time to
//! the stops around begin and end, and by no more than the timeout if no further stop comes.
//!
//! Arguments are not shortened: a program may use the register again, and a `timespec` is its memory. Whether a call is
//! the one seen before, not the next of a loop, is told by a mark in the arithmetic flags, set where `EINTR`
//! is hidden. A call made again keeps the flags; a program that goes on has changed them as soon as it has looked
//! at the result. (Compilers take flags for lost at a system call.)

use std::time::{Duration, Instant};

use libc::{pid_t, user_regs_struct as Registers};

use super::interrupted::{self, Timeout};
use super::timed::TimedCalls;

/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8d5;
/// Zero and negative at once, of odd parity: no single instruction of arithmetic leaves that. The second one is for a
/// program that has just this.
const MARKS: [u64; 2] = [0x0c1, 0x8d0];

/// Calls in which threads of a sandbox waited at its last stop.
#[derive(Debug, Default)]
pub(super) struct Waits {
    waits: Vec<Wait>,
    /// Those of which the kernel knows the time left.
    pub(super) timed: TimedCalls,
}

/// How long a call may take and what it returns then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) time: Duration,
    pub(super) result: i64,
}

#[derive(Debug)]
struct Wait {
    tid: pid_t,
    /// As the call began, but for the mark.
    own: Registers,
    mark: u64,
    /// When it was first seen plus its timeout.
    deadline: Instant,
    result: i64,
    /// At the present stop.
    seen: bool,
}

impl Waits {
    /// The registers to be set for a thread that is stopped with `registers`; `None`: those it has. `read_limit` is
    /// asked once for each call.
    pub(super) fn pass(
        &mut self,
        tid: pid_t,
        registers: &Registers,
        now: Instant,
        read_limit: impl FnOnce(Timeout) -> Option<Limit>,
    ) -> Option<Registers> {
        self.timed.see(tid, registers);
        let hidden = interrupted::hide_interruption(registers);
        if let Some(at) = self.waits.iter().position(|wait| wait.tid == tid) {
            let wait = &mut self.waits[at];
            if wait.is_still(registers) {
                if now < wait.deadline {
                    wait.seen = true;
                    return hidden.map(|(hidden, _)| hidden);
                }
                let over = wait.over(registers);
                self.waits.swap_remove(at);
                return Some(over);
            }
            self.waits.swap_remove(at);
        }
        let (hidden, timeout) = hidden?;
        let Some(limit) = read_limit(timeout) else { return Some(hidden) };
        let Some(deadline) = now.checked_add(limit.time) else { return Some(hidden) };
        let mark = if registers.eflags & ARITHMETIC == MARKS[0] { MARKS[1] } else { MARKS[0] };
        self.waits.push(Wait { tid, own: *registers, mark, deadline, result: limit.result, seen: true });
        Some(Registers { eflags: registers.eflags & !ARITHMETIC | mark, ..hidden })
    }

    /// Forgets a thread's call: it has been put back to another time.
    pub(super) fn forget(&mut self, tid: pid_t) {
        self.waits.retain(|wait| wait.tid != tid);
    }

    /// Forgets the calls that were not seen since this was last called: their threads do something else.
    pub(super) fn end_stop(&mut self) {
        self.waits.retain_mut(|wait| std::mem::take(&mut wait.seen));
    }
}

impl Wait {
    /// Whether a thread is in this very call, or about to make it again.
    fn is_still(&self, now: &Registers) -> bool {
        let arguments = |registers: &Registers| {
            let Registers { rdi, rsi, rdx, r10, r8, r9, rsp, rbx, rbp, .. } = *registers;
            [rdi, rsi, rdx, r10, r8, r9, rsp, rbx, rbp]
        };
        let there = if now.rip == self.own.rip {
            now.orig_rax == self.own.orig_rax && interrupted::is_interrupted(now)
        } else {
            now.rip == self.own.rip.wrapping_sub(2) && now.rax == self.own.orig_rax
        };
        there && now.eflags & ARITHMETIC == self.mark && arguments(now) == arguments(&self.own)
    }

    /// The registers after the call has timed out.
    fn over(&self, now: &Registers) -> Registers {
        let eflags = now.eflags & !ARITHMETIC | self.own.eflags & ARITHMETIC;
        Registers { rax: self.result.cast_unsigned(), rip: self.own.rip, orig_rax: u64::MAX, eflags, ..*now }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltacr::frame::zero_registers;

    const LIMIT: Limit = Limit { time: Duration::from_secs(1), result: -11 };

    fn waiting() -> Registers {
        let call = libc::SYS_epoll_wait.cast_unsigned();
        let rax = (-4_i64).cast_unsigned();
        Registers { orig_rax: call, rax, rip: 0x1002, rdi: 3, eflags: 0x246, cs: 0x33, ..zero_registers() }
    }

    /// What the next stop finds if the call was made again.
    fn again(set: Registers) -> Registers {
        Registers { rax: (-4_i64).cast_unsigned(), ..set }
    }

    #[test]
    fn a_call_ends_at_the_first_stop_after_its_time() {
        let (mut waits, begin) = (Waits::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        let mut set = waits.pass(7, &waiting(), begin, |_| Some(LIMIT)).expect("hidden");
        for ms in [100, 600, 999] {
            waits.end_stop();
            set = waits.pass(7, &again(set), at(ms), |_| panic!("it is known")).expect("hidden");
            assert_eq!(set.rax.cast_signed(), -514);
        }
        // Read twice at one stop.
        assert_eq!(waits.pass(7, &set, at(999), |_| panic!("it is known")), None);
        waits.end_stop();
        let over = waits.pass(7, &again(set), at(1000), |_| panic!("it is known")).expect("over");
        assert_eq!((over.rax.cast_signed(), over.rip, over.orig_rax, over.eflags), (-11, 0x1002, u64::MAX, 0x246));
        assert_eq!(waits.pass(7, &over, at(1000), |_| panic!("no call")), None);
    }

    #[test]
    fn a_call_that_was_not_yet_made_again_ends_too() {
        let (mut waits, begin) = (Waits::default(), Instant::now());
        let set = waits.pass(7, &waiting(), begin, |_| Some(LIMIT)).expect("hidden");
        let before = Registers { rip: 0x1000, rax: set.orig_rax, ..set };
        waits.end_stop();
        assert_eq!(waits.pass(7, &before, begin, |_| None), None);
        waits.end_stop();
        let over = waits.pass(7, &before, begin + LIMIT.time, |_| None).expect("over");
        assert_eq!((over.rax.cast_signed(), over.rip), (-11, 0x1002));
    }

    #[test]
    fn the_next_call_of_a_loop_begins_anew() {
        let (mut waits, begin) = (Waits::default(), Instant::now());
        waits.pass(7, &waiting(), begin, |_| Some(LIMIT)).expect("hidden");
        waits.end_stop();
        let later = begin + 2 * LIMIT.time;
        let set = waits.pass(7, &waiting(), later, |_| Some(LIMIT)).expect("hidden");
        assert_eq!(set.rax.cast_signed(), -514);
        waits.end_stop();
        assert_eq!(waits.pass(7, &again(set), later, |_| None).map(|set| set.rax.cast_signed()), Some(-514));
    }

    #[test]
    fn a_thread_that_did_something_else_is_forgotten() {
        let (mut waits, begin) = (Waits::default(), Instant::now());
        waits.pass(7, &waiting(), begin, |_| Some(LIMIT)).expect("hidden");
        waits.pass(8, &waiting(), begin, |_| Some(LIMIT)).expect("hidden");
        waits.end_stop();
        assert_eq!(waits.pass(7, &zero_registers(), begin, |_| None), None);
        waits.end_stop();
        assert!(waits.waits.is_empty());
    }

    #[test]
    fn flags_that_are_the_mark_get_another_one() {
        let (mut waits, begin) = (Waits::default(), Instant::now());
        let own = Registers { eflags: 0x202 | MARKS[0], ..waiting() };
        let set = waits.pass(7, &own, begin, |_| Some(LIMIT)).expect("hidden");
        assert_eq!(set.eflags, 0x202 | MARKS[1]);
    }

    #[test]
    fn a_call_without_a_timeout_is_not_marked() {
        let mut waits = Waits::default();
        let set = waits.pass(7, &waiting(), Instant::now(), |_| None).expect("hidden");
        assert_eq!((set.rax.cast_signed(), set.eflags), (-514, 0x246));
        assert!(waits.waits.is_empty());
    }
}
