//! Signals: what a process does on each, which wait for it or for one of its threads, on what stacks handlers run, and
//! the interval timers that send them.
//!
//! ```text
//! read       rt_sigaction of each; getitimer; per thread PTRACE_PEEKSIGINFO, sigaltstack       one batch per thread
//! put back   take what waits (rt_sigtimedwait); actions, timers; stacks; queue again what waited
//! ```
//! Only what differs is put back, and a thread in which nothing does is left alone. A signal is queued by the thread it waits
//! for, with the sender's own words: only to itself may one say anything. (The sender's PID in them is one inside already.)
//!
//! A fork has the actions and its leader's stack; no timers, nothing that waits, no stack in its other threads.

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::batch::{Asked, Batch, Room};
use super::error::{StateError, process};
use super::threads::{host_threads, pair};
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::stop::Stopped;
use crate::fault;
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
const N_TIMERS: usize = 3;

/// Signals of a process as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signals {
    /// Inside.
    pid: pid_t,
    actions: Vec<u8>,
    timers: Vec<u8>,
    /// That wait for the process.
    shared: Vec<Vec<u8>>,
    /// In the order in which they were stopped.
    threads: Vec<ThreadSignals>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ThreadSignals {
    /// Inside.
    tid: pid_t,
    /// That wait for it alone.
    pending: Vec<Vec<u8>>,
    stack: Vec<u8>,
}

/// What a process was asked.
#[derive(Clone, Debug)]
pub(super) struct ProcessQuestions {
    pid: Asked,
    actions: (Room, Vec<Asked>),
    timers: (Room, Vec<Asked>),
}

/// What a thread was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThreadQuestions {
    tid: Asked,
    stack: (Asked, Room),
}

impl Signals {
    /// Reads those of a stopped process.
    ///
    /// # Errors
    /// It was killed, or a call could not be made in it. It is unchanged.
    pub fn read(stopped: &mut Stopped, pid: pid_t) -> Result<Self, StateError> {
        let mut signals = Self::default();
        for (at, tid) in host_threads(stopped, pid)?.into_iter().enumerate() {
            let mut hand = stopped.hand_of(pid, tid)?;
            let mut batch = Batch::new(&hand);
            let of_process = (at == 0).then(|| Self::ask_process(&mut batch));
            let of_thread = Self::ask_thread(&mut batch);
            batch.run(&mut hand)?;
            hand.close()?;
            signals.answer(&batch, of_process.as_ref(), &of_thread, (pid, tid))?;
        }
        Ok(signals)
    }

    /// Asks what belongs to the process.
    pub(super) fn ask_process(batch: &mut Batch) -> ProcessQuestions {
        let pid = batch.add("getpid", libc::SYS_getpid, &[]);
        let actions = batch.room(64 * ACTION_BYTES);
        let ask = |signal| {
            let at = actions.at + offset(signal) as u64;
            batch.add("rt_sigaction", libc::SYS_rt_sigaction, &[signal, 0, at, SET_BYTES])
        };
        let asked = changeable().map(ask).collect();
        let timers = batch.room(N_TIMERS * TIMER_BYTES);
        let ask = |timer| {
            let at = timers.at + (timer * TIMER_BYTES) as u64;
            batch.add("getitimer", libc::SYS_getitimer, &[timer as u64, at])
        };
        ProcessQuestions { pid, actions: (actions, asked), timers: (timers, (0..N_TIMERS).map(ask).collect()) }
    }

    /// Asks what belongs to a thread.
    pub(super) fn ask_thread(batch: &mut Batch) -> ThreadQuestions {
        let tid = batch.add("gettid", libc::SYS_gettid, &[]);
        let room = batch.room(STACK_BYTES);
        ThreadQuestions { tid, stack: (batch.add("sigaltstack", libc::SYS_sigaltstack, &[0, room.at]), room) }
    }

    /// Takes the answers of a thread (host PID and TID), with the first those of the process.
    pub(super) fn answer(
        &mut self,
        batch: &Batch,
        of_process: Option<&ProcessQuestions>,
        of_thread: &ThreadQuestions,
        (pid, tid): (pid_t, pid_t),
    ) -> Result<(), StateError> {
        if let Some(asked) = of_process {
            self.pid = batch.answer_pid(asked.pid)?;
            for one in asked.actions.1.iter().chain(&asked.timers.1) {
                batch.answer(*one)?;
            }
            self.actions = batch.bytes(asked.actions.0).to_vec();
            for signal in FIXED {
                // Not asked: whatever lay there.
                self.actions[offset(signal)..offset(signal) + ACTION_BYTES].fill(0);
            }
            self.timers = batch.bytes(asked.timers.0).to_vec();
            self.shared = peek(pid, tid, Pending::OfProcess)?;
        }
        batch.answer(of_thread.stack.0)?;
        let mut stack = batch.bytes(of_thread.stack.1).to_vec();
        // Not whether it is in use, nor padding.
        stack[8] &= !(libc::SS_ONSTACK.to_le_bytes()[0]);
        stack[12..16].fill(0);
        let pending = peek(pid, tid, Pending::OfThread)?;
        self.threads.push(ThreadSignals { tid: batch.answer_pid(of_thread.tid)?, pending, stack });
        Ok(())
    }

    /// PID inside.
    pub(super) fn pid(&self) -> pid_t {
        self.pid
    }

    /// TID inside of the thread that was asked last.
    pub(super) fn last_tid(&self) -> pid_t {
        self.threads.last().map_or(0, |thread| thread.tid)
    }

    /// Gives them back to a stopped process with the same threads. Signals that wait now are lost.
    ///
    /// # Errors
    /// `Threads`: it is unchanged. Anything else: it is neither what it was nor what it should be.
    pub fn put_back(&self, stopped: &mut Stopped, pid: pid_t) -> Result<(), StateError> {
        let now = Self::read(stopped, pid)?;
        self.put_back_from(&now, stopped, pid)
    }

    /// The same where it is known how they are `now`, in this very stop. What waits is looked at again.
    ///
    /// # Errors
    /// As [`Signals::put_back`].
    pub fn put_back_from(&self, now: &Self, stopped: &mut Stopped, pid: pid_t) -> Result<(), StateError> {
        let hosts = host_threads(stopped, pid)?;
        let (was, is) = (self.threads.iter().map(|one| one.tid), now.threads.iter().map(|one| one.tid));
        let pairs = pair(was, is, &hosts).ok_or(StateError::Threads { pid })?;
        let mut waiting = Vec::with_capacity(hosts.len());
        for tid in &hosts {
            waiting.push(peek(pid, *tid, Pending::OfThread)?);
        }
        let shared = peek(pid, hosts[0], Pending::OfProcess)?;
        let waits_alike =
            shared == self.shared && pairs.iter().all(|one| waiting[one.now] == self.threads[one.was].pending);
        if !waits_alike {
            // All are taken before any is queued: one that waits for the process is taken by any thread.
            for (tid, own) in hosts.iter().zip(&waiting) {
                let n = own.len() + peek(pid, *tid, Pending::OfProcess)?.len();
                if n > 0 {
                    let mut hand = stopped.hand_of(pid, *tid)?;
                    take_waiting(&mut hand, n)?;
                    hand.close()?;
                }
            }
            fault::point("state.taken").map_err(process("put back the waiting signals of", pid))?;
        }
        let runs = |timers: &[u8]| timers.iter().any(|byte| *byte != 0);
        if self.actions != now.actions || runs(&self.timers) || runs(&now.timers) {
            let mut hand = stopped.hand(pid)?;
            self.change_process(now, &mut hand)?;
            hand.close()?;
        }
        for one in &pairs {
            let (was, is) = (&self.threads[one.was], &now.threads[one.now]);
            let queued: &[Vec<u8>] = if waits_alike { &[] } else { &was.pending };
            if was.stack != is.stack || !queued.is_empty() {
                let mut hand = stopped.hand_of(pid, one.host)?;
                if was.stack != is.stack {
                    let mut batch = Batch::new(&hand);
                    let at = batch.input(&was.stack);
                    batch.add("sigaltstack", libc::SYS_sigaltstack, &[at, 0]);
                    batch.run_all(&mut hand)?;
                }
                queue(&mut hand, queued, libc::SYS_rt_tgsigqueueinfo, (self.pid, was.tid))?;
                hand.close()?;
            }
        }
        if !waits_alike && !self.shared.is_empty() {
            let mut hand = stopped.hand(pid)?;
            queue(&mut hand, &self.shared, libc::SYS_rt_sigqueueinfo, (self.pid, 0))?;
            hand.close()?;
        }
        Ok(())
    }

    /// Sets the actions that differ, and all timers.
    fn change_process(&self, now: &Self, hand: &mut Hand<'_>) -> Result<(), StateError> {
        let marker = u64::from(hand.marker.unsigned_abs());
        let mut batch = Batch::new(hand);
        for signal in changeable() {
            let range = offset(signal)..offset(signal) + ACTION_BYTES;
            if self.actions[range.clone()] == now.actions[range.clone()] {
                continue;
            }
            let at = batch.input(&self.actions[range]);
            batch.add("rt_sigaction", libc::SYS_rt_sigaction, &[signal, at, 0, SET_BYTES]);
            if signal == marker {
                // One that is to be ignored is taken out of the queue, and with it what ends the calls.
                let first = now.threads.first().map_or(0, |thread| thread.tid);
                let [pid, tid] = [self.pid, first].map(|number| u64::from(number.unsigned_abs()));
                batch.add("tgkill", libc::SYS_tgkill, &[pid, tid, marker]);
            }
        }
        let at = batch.input(&self.timers);
        for timer in 0..N_TIMERS {
            let at = at + (timer * TIMER_BYTES) as u64;
            batch.add("setitimer", libc::SYS_setitimer, &[timer as u64, at, 0]);
        }
        batch.run_all(hand)
    }
}

fn peek(pid: pid_t, tid: pid_t, pending: Pending) -> Result<Vec<Vec<u8>>, StateError> {
    peek_signals(tid, pending).map_err(process("look at the waiting signals of", pid))
}

fn changeable() -> impl Iterator<Item = u64> {
    (1..=64).filter(|signal| !FIXED.contains(signal))
}

fn offset(signal: u64) -> usize {
    usize::try_from(signal - 1).unwrap_or(0) * ACTION_BYTES
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

/// Queues signals for the hand's thread or its process (PID and TID inside).
fn queue(hand: &mut Hand<'_>, signals: &[Vec<u8>], call: i64, (pid, tid): (pid_t, pid_t)) -> Result<(), StateError> {
    let scratch = hand.scratch();
    let room = usize::try_from(scratch.end - scratch.start).unwrap_or(0) / SIGNAL_INFO_BYTES;
    let [pid, tid] = [pid, tid].map(|number| u64::from(number.unsigned_abs()));
    for some in signals.chunks(room.min(100)) {
        let mut batch = Batch::new(hand);
        for signal in some {
            let (at, number) = (batch.input(signal), u64::from(signal[0]));
            match call {
                libc::SYS_rt_tgsigqueueinfo => batch.add("rt_tgsigqueueinfo", call, &[pid, tid, number, at]),
                _ => batch.add("rt_sigqueueinfo", call, &[pid, number, at]),
            };
        }
        batch.run_all(hand)?;
    }
    Ok(())
}
