//! All that a process is apart from memory, registers and descriptors, in one record.
//!
//! ```text
//! read       per thread one hand with one batch, status, three calls about its schedule       \
//!            with the first thread: limits, traits, membership, actions, timers               /  all before anything changes
//! can_be_put_back    pure: else the process is made again
//! put_back_from      other threads, then the first: schedule, credentials, habits;
//!                    last limits, dumpable, membership (what credentials forget)              early: limits hinder the rest
//! signals.put_back_from                                                                       last: all the rest makes signals
//! ```
//! Nothing that is as it was is touched: where nothing differs no process runs.

use std::fmt::Write;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::credentials::{self, Credentials};
use super::error::{StateError, process};
use super::habits::{self, Habits};
use super::impossible::{Impossible, Judge};
use super::limits::Limits;
use super::membership::Membership;
use super::schedule::Schedule;
use super::signals::Signals;
use super::status::Status;
use super::threads::{Pair, host_threads, pair};
use super::traits::Traits;
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::read_stat;
use crate::deltacr::told::PR_GET_TID_ADDRESS;
use crate::fault;
use crate::sys::process::{Compared, compare};

/// A process as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Person {
    /// Inside.
    pid: pid_t,
    limits: Limits,
    traits: Traits,
    membership: Membership,
    /// In the order in which they were stopped.
    threads: Vec<ThreadPerson>,
    /// Put back by themselves, after all else.
    pub signals: Signals,
    /// When it was read. Not a part of it: they are processes by themselves.
    #[serde(skip)]
    has_ended_children: bool,
}

/// A thread as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ThreadPerson {
    /// Inside.
    tid: pid_t,
    credentials: Credentials,
    habits: Habits,
    schedule: Schedule,
}

impl Person {
    /// Reads a stopped process.
    ///
    /// # Errors
    /// It was killed, a call could not be made in it, or it has what no checkpoint can hold (keyrings, more than 1024
    /// groups). It is unchanged.
    pub fn read(stopped: &mut Stopped, pid: pid_t) -> Result<Self, StateError> {
        let mut person = Self::default();
        for (at, tid) in host_threads(stopped, pid)?.into_iter().enumerate() {
            let mut hand = stopped.hand_of(pid, tid)?;
            let mut batch = Batch::new(&hand);
            let (habits, credentials) = (Habits::ask(&mut batch), Credentials::ask(&mut batch));
            let signals = Signals::ask_thread(&mut batch);
            // For the record of the thread: not asked in a hand of its own.
            let clear_tid = batch.room(8);
            let told = batch.add("prctl", libc::SYS_prctl, &[PR_GET_TID_ADDRESS, clear_tid.at]);
            let of_process = (at == 0).then(|| {
                let signals = Signals::ask_process(&mut batch);
                (Limits::ask(&mut batch), Traits::ask(&mut batch), Membership::ask(&mut batch), signals)
            });
            batch.run(&mut hand)?;
            let exit_signal = hand.exit_signal;
            hand.close()?;
            if let Some((limits, traits, membership, _)) = &of_process {
                person.limits = Limits::answer(&batch, limits)?;
                person.traits = Traits::answer(&batch, traits, pid, tid)?;
                let exit_signal = if tid == pid { exit_signal } else { leaders_exit_signal(pid)? };
                person.membership = Membership::answer(&batch, membership, exit_signal)?;
                person.has_ended_children = Membership::has_ended_children(&batch, membership);
            }
            let of_process = of_process.as_ref().map(|(_, _, _, signals)| signals);
            person.signals.answer(&batch, of_process, &signals, (pid, tid))?;
            person.pid = person.signals.pid();
            let (thread, status) = ThreadPerson::answer(&batch, (&habits, &credentials), (pid, tid))?;
            person.threads.push(thread);
            batch.answer(told)?;
            let clear_tid = batch.bytes(clear_tid).try_into().map_or(0, u64::from_le_bytes);
            stopped.remember(pid, tid, person.signals.last_tid(), clear_tid, status);
            if let Some(thread) = person.threads.last_mut() {
                thread.tid = person.signals.last_tid();
            }
        }
        Ok(person)
    }

    /// PID inside.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Whether it had children that had ended, and for which it had not waited, when it was read.
    pub fn has_ended_children(&self) -> bool {
        self.has_ended_children
    }

    /// Whether it may choose the numbers of processes and threads that it makes.
    pub fn chooses_numbers(&self) -> bool {
        self.threads.first().is_some_and(|thread| thread.credentials.chooses_numbers())
    }

    /// Whether [`Person::put_back`] can make this of what the process is `now`: the same one, changed since, or a fork of
    /// its template. Whether there is a group to go back to shows only then.
    ///
    /// # Errors
    /// What cannot be: the process has to be made again.
    pub fn can_be_put_back(&self, now: &Self) -> Result<(), Impossible> {
        let judge = Judge { pid: self.pid };
        let threads = |person: &Self| {
            let mut tids: Vec<pid_t> = person.threads.iter().map(|thread| thread.tid).collect();
            tids.sort_unstable();
            tids
        };
        judge.unless(self.pid == now.pid, "the PID inside", self.pid.to_string(), now.pid.to_string())?;
        judge.unless(threads(self) == threads(now), "threads", text(&threads(self)), text(&threads(now)))?;
        let mut forgotten = false;
        for was in &self.threads {
            for is in now.threads.iter().filter(|is| is.tid == was.tid) {
                was.credentials.judge(&is.credentials, &judge)?;
                forgotten |= was.credentials.is_other(&is.credentials);
            }
        }
        self.limits.judge(&now.limits, &judge)?;
        self.traits.judge(&now.traits, forgotten, &judge)?;
        self.membership.judge(&now.membership, &judge)
    }

    /// Whether [`Person::put_back`] can make this of a child that was just made by one like `maker`: another than its
    /// parent at the first time, whose filters it has. As many are not the same ones; those of init (`n_filters_of_init`)
    /// all processes of a sandbox have.
    ///
    /// # Errors
    /// What cannot be: there is no way to make the process again.
    pub fn can_be_made_by(&self, maker: &Self, n_filters_of_init: u32) -> Result<(), Impossible> {
        let judge = Judge { pid: self.pid };
        let most = |person: &Self| person.threads.iter().map(|one| one.credentials.n_filters()).max().unwrap_or(0);
        let only = most(self).max(most(maker)) <= n_filters_of_init;
        judge.unless(only, "the number of filters", most(self).to_string(), most(maker).to_string())?;
        let mut forgotten = false;
        for (was, is) in self.threads.iter().zip(maker.threads.iter().take(1).cycle()) {
            was.credentials.judge(&is.credentials, &judge)?;
            forgotten |= was.credentials.is_other(&is.credentials);
        }
        self.limits.judge(&maker.limits, &judge)?;
        self.traits.judge(&maker.traits, forgotten, &judge)
    }

    /// Makes a stopped process this again, its signals last. Signals that wait now are lost.
    ///
    /// # Errors
    /// `Impossible`, unless it is about the process group, and `Threads`: it is unchanged. Anything else: it is
    /// neither what it was nor what it should be.
    pub fn put_back(&self, stopped: &mut Stopped, pid: pid_t) -> Result<(), StateError> {
        let now = Self::read(stopped, pid)?;
        self.can_be_put_back(&now)?;
        self.put_back_from(&now, stopped, pid)?;
        if self.membership != now.membership {
            let mut hand = stopped.hand(pid)?;
            let mut batch = Batch::new(&hand);
            let group = self.membership.change(&now.membership, &mut batch);
            batch.run(&mut hand)?;
            hand.close()?;
            if group.is_some_and(|group| batch.result(group) == -i64::from(libc::EPERM)) {
                return Err(self.membership.no_group(&now.membership, self.pid).into());
            }
            batch.check_all()?;
        }
        self.signals.put_back_from(&now.signals, stopped, pid)
    }

    /// The same without signals, session and group, where it is known how it is `now`, in this very stop. To be done before
    /// memory and descriptors, which limits may hinder.
    ///
    /// # Errors
    /// As [`Person::put_back`].
    pub fn put_back_from(&self, now: &Self, stopped: &mut Stopped, pid: pid_t) -> Result<(), StateError> {
        if self.what_differs(now).is_none() {
            return Ok(());
        }
        self.can_be_put_back(now)?;
        stopped.forget_told(pid);
        fault::point("state.change").map_err(process("put back", pid))?;
        let hosts = host_threads(stopped, pid)?;
        let (was, is) = (self.threads.iter().map(|one| one.tid), now.threads.iter().map(|one| one.tid));
        let pairs = pair(was, is, &hosts).ok_or(StateError::Threads { pid })?;
        let mut forgotten = false;
        // The first last: what it says of the memory, any of them forgets.
        for one in pairs.iter().rev() {
            let is_told = pairs.first().is_some_and(|first| self.umask_comes_with(first, one, now));
            forgotten |= self.change_thread(now, stopped, (pid, one), is_told)?;
            fault::point("state.thread").map_err(process("put back", pid))?;
        }
        self.change_process(now, stopped, (pid, hosts[0]), forgotten)?;
        let differs = self.what_differs(&Self::read(stopped, pid)?);
        differs.map_or(Ok(()), |what| Err(StateError::Differs { pid, what }))
    }

    /// What of it, without signals, session and group, is not as `now`.
    fn what_differs(&self, now: &Self) -> Option<&'static str> {
        let is_same = |was: &ThreadPerson| now.threads.iter().any(|is| is == was);
        match () {
            () if self.limits != now.limits => Some("limits"),
            () if self.traits != now.traits => Some("traits"),
            () if !self.threads.iter().all(is_same) || self.threads.len() != now.threads.len() => {
                Some("credentials, habits or schedule of a thread")
            }
            () => None,
        }
    }

    /// Whether a thread has its umask together with the first, which had the same: one hand less in each, as a rule.
    fn umask_comes_with(&self, first: &Pair, one: &Pair, now: &Self) -> bool {
        let was = |pair: &Pair| &self.threads[pair.was].habits;
        one.now != first.now
            && was(one).has_same_umask(was(first))
            && !was(one).has_same_umask(&now.threads[one.now].habits)
            // A failure costs a hand.
            && compare(first.host, one.host, Compared::Places).is_ok_and(std::cmp::Ordering::is_eq)
    }

    /// Whether credentials were changed. `has_umask`: its umask comes back with that of another thread.
    fn change_thread(
        &self,
        now: &Self,
        stopped: &mut Stopped,
        (pid, pair): (pid_t, &Pair),
        has_umask: bool,
    ) -> Result<bool, StateError> {
        let was = &self.threads[pair.was];
        let mut is = now.threads[pair.now].clone();
        if has_umask {
            is.habits.take_umask(&was.habits);
        }
        if *was == is {
            return Ok(false);
        }
        was.schedule.change(&is.schedule, pid, pair.host)?;
        let forgotten = was.credentials.is_other(&is.credentials);
        let new_policy = was.schedule.is_other_policy(&is.schedule);
        if was.credentials != is.credentials || was.habits != is.habits || new_policy {
            let mut hand = stopped.hand_of(pid, pair.host)?;
            let mut batch = Batch::new(&hand);
            was.credentials.change(&is.credentials, &mut batch);
            batch.run_all(&mut hand)?;
            let mut batch = Batch::new(&hand);
            was.habits.change(&is.habits, forgotten, new_policy, &mut batch);
            batch.run_all(&mut hand)?;
            hand.close()?;
        }
        Ok(forgotten)
    }

    fn change_process(
        &self,
        now: &Self,
        stopped: &mut Stopped,
        (pid, tid): (pid_t, pid_t),
        forgotten: bool,
    ) -> Result<(), StateError> {
        self.traits.change_score(&now.traits, pid, tid)?;
        let mut hand = stopped.hand(pid)?;
        let mut batch = Batch::new(&hand);
        self.limits.change(&now.limits, &mut batch);
        self.traits.change(&now.traits, forgotten, &mut batch);
        if batch.is_empty() {
            return Ok(hand.close()?);
        }
        batch.run_all(&mut hand)?;
        Ok(hand.close()?)
    }
}

impl ThreadPerson {
    fn answer(
        batch: &Batch,
        (habits, credentials): (&habits::Questions, &credentials::Questions),
        (pid, tid): (pid_t, pid_t),
    ) -> Result<(Self, Vec<u8>), StateError> {
        let (status, text) = Status::read(pid, tid)?;
        let person = Self {
            tid: 0,
            credentials: Credentials::answer(batch, credentials, &status)?,
            habits: Habits::answer(batch, habits, &status)?,
            schedule: Schedule::read(pid, tid)?,
        };
        Ok((person, text))
    }
}

/// That of a process whose leader has ended before its other threads.
fn leaders_exit_signal(pid: pid_t) -> Result<i32, StateError> {
    let stat = read_stat(pid, pid).map_err(process("read the state of", pid))?;
    stat.map(|stat| stat.exit_signal).ok_or(StateError::Threads { pid })
}

fn text(numbers: &[pid_t]) -> String {
    numbers.iter().fold(String::new(), |mut text, number| {
        // A String takes everything.
        let _ = write!(text, "{}{number}", if text.is_empty() { "" } else { " " });
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(tids: &[pid_t]) -> Person {
        let thread = |tid: &pid_t| ThreadPerson { tid: *tid, ..ThreadPerson::default() };
        Person { pid: 7, threads: tids.iter().map(thread).collect(), ..Person::default() }
    }

    #[test]
    fn threads_are_the_same_in_whatever_order() {
        assert_eq!(person(&[7, 8]).can_be_put_back(&person(&[8, 7])), Ok(()));
        assert_eq!(person(&[7, 8]).what_differs(&person(&[8, 7])), None);
        for now in [person(&[7]), person(&[7, 9]), person(&[7, 8, 9])] {
            let impossible = person(&[7, 8]).can_be_put_back(&now).expect_err("other threads");
            assert_eq!((impossible.what, impossible.was.as_str()), ("threads", "7 8"));
        }
        let other = Person { pid: 9, ..person(&[7, 8]) };
        assert_eq!(person(&[7, 8]).can_be_put_back(&other).expect_err("another process").what, "the PID inside");
    }

    #[test]
    fn what_the_kernel_alone_makes_dumpable_is_not_touched() {
        let with = |text: &str| Person { traits: serde_json::from_str(text).expect("traits"), ..person(&[7]) };
        let of = |dumpable| {
            with(&format!(r#"{{"dumpable":{dumpable},"thp_disable":0,"subreaper":false,"oom_score_adj":0}}"#))
        };
        let cases = [(0, 1, true), (1, 0, true), (1, 2, true), (2, 2, true), (2, 1, false), (2, 0, false)];
        for (was, is, can) in cases {
            assert_eq!(of(was).can_be_put_back(&of(is)).is_ok(), can, "{was} from {is}");
        }
    }
}
