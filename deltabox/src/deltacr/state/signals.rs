//! Signals: what a process does on each, which wait for it or for one of its threads, on what stacks handlers run, and
//! the interval timers that send them.
//!
//! ```text
//! read       rt_sigaction of each; getitimer; per thread PTRACE_PEEKSIGINFO, sigaltstack
//! put back   take what waits (rt_sigtimedwait); actions; stacks; timers; queue again what waited
//! ```
//! A signal is queued by the thread it waits for, with the sender's own words: only to itself may one say anything.

use libc::pid_t;

use super::error::{StateError, check, process};
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::stop::Stopped;
use crate::sys::ptrace::{Pending, SIGNAL_INFO_BYTES, peek_signals};

/// The kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION_BYTES: usize = 32;
/// `stack_t`.
const STACK_BYTES: usize = 24;
/// `struct itimerval`.
const TIMER_BYTES: usize = 32;
/// Size of a signal set.
const SET_BYTES: u64 = 8;
/// Those whose action nobody can change.
const FIXED: [u64; 2] = [libc::SIGKILL as u64, libc::SIGSTOP as u64];
/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
const TIMERS: [u64; 3] = [0, 1, 2];

/// Signals of a process as they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signals {
    actions: Vec<u8>,
    timers: Vec<u8>,
    /// That wait for the process.
    shared: Vec<Vec<u8>>,
    threads: Vec<ThreadSignals>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ThreadSignals {
    tid: pid_t,
    /// That wait for it alone.
    pending: Vec<Vec<u8>>,
    stack: Vec<u8>,
}

impl Signals {
    /// Reads those of a stopped process.
    ///
    /// # Errors
    /// It was killed, or a call could not be made in it. It is unchanged.
    pub fn read(stopped: &mut Stopped, pid: pid_t) -> Result<Self, StateError> {
        let tids = tids(stopped, pid)?;
        let mut hand = stopped.hand(pid)?;
        let (actions, timers) = (read_actions(&mut hand)?, read_timers(&mut hand)?);
        hand.close()?;
        let peek = |tid, pending| peek_signals(tid, pending).map_err(process("look at the waiting signals of", pid));
        let shared = peek(tids[0], Pending::OfProcess)?;
        let mut threads = Vec::with_capacity(tids.len());
        for tid in tids {
            let mut hand = stopped.hand_of(pid, tid)?;
            let stack = read_stack(&mut hand)?;
            hand.close()?;
            threads.push(ThreadSignals { tid, pending: peek(tid, Pending::OfThread)?, stack });
        }
        Ok(Self { actions, timers, shared, threads })
    }

    /// Gives them back to a stopped process with the same threads. Signals that wait now are lost.
    ///
    /// # Errors
    /// `Threads`: it is unchanged. Anything else: it is neither what it was nor what it should be.
    pub fn put_back(&self, stopped: &mut Stopped, pid: pid_t) -> Result<(), StateError> {
        let tids = tids(stopped, pid)?;
        if !self.threads.iter().map(|thread| thread.tid).eq(tids.iter().copied()) {
            return Err(StateError::Threads { pid });
        }
        // All are taken before any is queued: one that waits for the process is taken by any thread.
        for tid in tids {
            let failed = || process("look at the waiting signals of", pid);
            let n = peek_signals(tid, Pending::OfThread).map_err(failed())?.len()
                + peek_signals(tid, Pending::OfProcess).map_err(failed())?.len();
            if n > 0 {
                let mut hand = stopped.hand_of(pid, tid)?;
                take_waiting(&mut hand, n)?;
                hand.close()?;
            }
        }
        let mut hand = stopped.hand(pid)?;
        write_actions(&mut hand, &self.actions)?;
        write_timers(&mut hand, &self.timers)?;
        hand.close()?;
        for thread in &self.threads {
            let mut hand = stopped.hand_of(pid, thread.tid)?;
            if read_stack(&mut hand)? != thread.stack {
                write_stack(&mut hand, &thread.stack)?;
            }
            queue(&mut hand, &thread.pending, libc::SYS_rt_tgsigqueueinfo)?;
            hand.close()?;
        }
        let mut hand = stopped.hand(pid)?;
        queue(&mut hand, &self.shared, libc::SYS_rt_sigqueueinfo)?;
        Ok(hand.close()?)
    }
}

fn tids(stopped: &Stopped, pid: pid_t) -> Result<Vec<pid_t>, StateError> {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    let threads = process.map(|process| process.threads.iter().map(|thread| thread.tid).collect::<Vec<_>>());
    threads.filter(|threads| !threads.is_empty()).ok_or(StateError::Threads { pid })
}

fn changeable() -> impl Iterator<Item = u64> {
    (1..=64).filter(|signal| !FIXED.contains(signal))
}

fn offset(signal: u64) -> usize {
    usize::try_from(signal - 1).unwrap_or(0) * ACTION_BYTES
}

fn read_actions(hand: &mut Hand<'_>) -> Result<Vec<u8>, StateError> {
    let (at, pid) = (hand.scratch().start, hand.pid());
    let mut actions = vec![0; 64 * ACTION_BYTES];
    hand.write(at, &actions)?;
    let read =
        |signal| Call { nr: libc::SYS_rt_sigaction, args: [signal, 0, at + offset(signal) as u64, SET_BYTES, 0, 0] };
    for result in hand.run(&changeable().map(read).collect::<Vec<_>>())? {
        check("rt_sigaction", pid, result)?;
    }
    hand.read(at, &mut actions)?;
    Ok(actions)
}

/// Sets those that differ.
fn write_actions(hand: &mut Hand<'_>, actions: &[u8]) -> Result<(), StateError> {
    let present = read_actions(hand)?;
    let (at, pid, marker) = (hand.scratch().start, hand.pid(), u64::from(hand.marker.unsigned_abs()));
    hand.write(at, actions)?;
    let differs = |signal: &u64| {
        let range = offset(*signal)..offset(*signal) + ACTION_BYTES;
        present[range.clone()] != actions[range]
    };
    let numbers = hand.run(&[libc::SYS_getpid, libc::SYS_gettid].map(|nr| Call { nr, args: [0; 6] }))?;
    let [own_pid, own_tid] = [numbers[0].cast_unsigned(), numbers[1].cast_unsigned()];
    let mut calls = Vec::new();
    for signal in changeable().filter(differs) {
        let args = [signal, at + offset(signal) as u64, 0, SET_BYTES, 0, 0];
        calls.push(Call { nr: libc::SYS_rt_sigaction, args });
        if signal == marker {
            // One that is to be ignored is taken out of the queue, and with it what ends the calls.
            calls.push(Call { nr: libc::SYS_tgkill, args: [own_pid, own_tid, marker, 0, 0, 0] });
        }
    }
    for result in hand.run(&calls)? {
        check("rt_sigaction", pid, result)?;
    }
    Ok(())
}

fn read_timers(hand: &mut Hand<'_>) -> Result<Vec<u8>, StateError> {
    let (at, pid) = (hand.scratch().start, hand.pid());
    let calls = TIMERS
        .map(|timer| Call { nr: libc::SYS_getitimer, args: [timer, at + timer * TIMER_BYTES as u64, 0, 0, 0, 0] });
    for result in hand.run(&calls)? {
        check("getitimer", pid, result)?;
    }
    let mut timers = vec![0; TIMERS.len() * TIMER_BYTES];
    hand.read(at, &mut timers)?;
    Ok(timers)
}

fn write_timers(hand: &mut Hand<'_>, timers: &[u8]) -> Result<(), StateError> {
    let (at, pid) = (hand.scratch().start, hand.pid());
    hand.write(at, timers)?;
    let calls = TIMERS
        .map(|timer| Call { nr: libc::SYS_setitimer, args: [timer, at + timer * TIMER_BYTES as u64, 0, 0, 0, 0] });
    for result in hand.run(&calls)? {
        check("setitimer", pid, result)?;
    }
    Ok(())
}

/// Without the flag that says whether it is in use.
fn read_stack(hand: &mut Hand<'_>) -> Result<Vec<u8>, StateError> {
    let (at, pid) = (hand.scratch().start, hand.pid());
    check("sigaltstack", pid, hand.call(libc::SYS_sigaltstack, [0, at, 0, 0, 0, 0])?)?;
    let mut stack = vec![0; STACK_BYTES];
    hand.read(at, &mut stack)?;
    stack[8] &= !(libc::SS_ONSTACK.to_le_bytes()[0]);
    // Padding.
    stack[12..16].fill(0);
    Ok(stack)
}

fn write_stack(hand: &mut Hand<'_>, stack: &[u8]) -> Result<(), StateError> {
    let (at, pid) = (hand.scratch().start, hand.pid());
    hand.write(at, stack)?;
    check("sigaltstack", pid, hand.call(libc::SYS_sigaltstack, [at, 0, 0, 0, 0, 0])?)?;
    Ok(())
}

/// Takes what waits for the hand's thread or for its process. All signals are blocked meanwhile.
fn take_waiting(hand: &mut Hand<'_>, n: usize) -> Result<(), StateError> {
    let at = hand.scratch().start;
    // All but the one that ends the calls; no time.
    let all = !(1_u64 << (hand.marker - 1));
    hand.write(at, &[all.to_le_bytes(), [0; 8], [0; 8]].concat())?;
    let call = Call { nr: libc::SYS_rt_sigtimedwait, args: [at, 0, at + 8, SET_BYTES, 0, 0] };
    // Whatever they return: EAGAIN once there is none.
    hand.run(&vec![call; n])?;
    Ok(())
}

fn queue(hand: &mut Hand<'_>, signals: &[Vec<u8>], call: i64) -> Result<(), StateError> {
    let scratch = hand.scratch();
    let room = usize::try_from(scratch.end - scratch.start).unwrap_or(0) / SIGNAL_INFO_BYTES;
    let pid = hand.pid();
    for some in signals.chunks(room) {
        let numbers = [libc::SYS_getpid, libc::SYS_gettid].map(|nr| Call { nr, args: [0; 6] });
        let numbers = hand.run(&numbers)?;
        let [own_pid, own_tid] = [numbers[0].cast_unsigned(), numbers[1].cast_unsigned()];
        hand.write(scratch.start, &some.concat())?;
        let queue = |(i, signal): (usize, &Vec<u8>)| {
            let at = scratch.start + (i * SIGNAL_INFO_BYTES) as u64;
            let number = u64::from(signal[0]);
            let args = match call {
                libc::SYS_rt_tgsigqueueinfo => [own_pid, own_tid, number, at, 0, 0],
                _ => [own_pid, number, at, 0, 0, 0],
            };
            Call { nr: call, args }
        };
        let calls: Vec<_> = some.iter().enumerate().map(queue).collect();
        for result in hand.run(&calls)? {
            check("rt_sigqueueinfo", pid, result)?;
        }
    }
    Ok(())
}
