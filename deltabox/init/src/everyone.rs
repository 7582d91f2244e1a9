//! `kill(-1)`: to everyone but templates. The filter hands it to init.
//!
//! ```text
//! caller                  kernel                init
//! kill(-1, signal) -----> waits, killable ----> everyone in /proc: may the caller? pidfd_send_signal
//! returns          <----- result         <----- 0 or the error that the kernel would give
//! ```
//! Who gets it, and what the caller is told, is as in the kernel (6.18, kill_something_info and check_kill_permission of
//! kernel/signal.c). Once init has taken a call up only a fatal signal ends the caller's wait
//! (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV): a stop of all programs waits for the end of it, and a checkpoint sees it
//! done or not begun. Before that it is interrupted as any call that waits, and made again.
//!
//! What differs: receivers see SI_QUEUE in place of SI_USER (init cannot claim SI_USER for another), with the caller's
//! number and user. The kernel does it in one go; here a process that is being forked meanwhile can escape. So SIGKILL and
//! SIGSTOP go round again until nobody new is found.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys::{self, Notified};

/// Rounds at most (chosen: each needs somebody who was forked during the one before).
const N_ROUNDS: usize = 100;
/// CAP_KILL, by number.
const KILL: u32 = 5;

/// Where the kernel tells of such calls.
pub(crate) struct Everyone {
    listener: OwnedFd,
    /// The lowest number that no program has.
    hidden_from: u32,
}

impl Everyone {
    pub(crate) fn new(listener: OwnedFd, hidden_from: u32) -> Self {
        Self { listener, hidden_from }
    }

    /// Readable when somebody has called.
    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Does what was asked for. The caller must be there: it blocks otherwise.
    pub(crate) fn serve(&self) {
        // It was killed, or interrupted, and will ask again.
        let Ok(notified) = sys::receive_notification(self.listener()) else { return };
        let errno = self.signal_all(&notified);
        let _ = sys::answer_notification(self.listener(), notified.id, errno);
    }

    /// The error number for the caller, 0 for none.
    fn signal_all(&self, call: &Notified) -> i32 {
        let caller = read_face(call.task);
        // Whose number it was may be another's by now.
        let Some(caller) = caller.filter(|_| sys::is_notification_valid(self.listener(), call.id)) else {
            return libc::ESRCH;
        };
        let repeats = [libc::SIGKILL, libc::SIGSTOP].contains(&call.signal);
        let mut verdict = Verdict::default();
        let mut seen = BTreeSet::from([1, caller.group]);
        for _ in 0..if repeats { N_ROUNDS } else { 1 } {
            let new: Vec<u32> = self.processes().filter(|pid| seen.insert(*pid)).collect();
            if new.is_empty() {
                break;
            }
            new.into_iter().for_each(|pid| verdict.add(send(&caller, pid, call.signal)));
        }
        verdict.errno()
    }

    fn processes(&self) -> impl Iterator<Item = u32> {
        let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
        let numbers = names.filter_map(|name| name.to_str()?.parse().ok());
        numbers.filter(|pid| *pid < self.hidden_from)
    }
}

/// The error number of one; `None`: there is no such process.
fn send(caller: &Face, pid: u32, signal: i32) -> Option<i32> {
    let pidfd = sys::pidfd_open(pid).ok()?;
    if !(0..=libc::SIGRTMAX()).contains(&signal) {
        return Some(libc::EINVAL);
    }
    // To read that takes ten times as long as all the rest.
    if !caller.may_kill && !caller.may_signal(&read_face(pid)?, signal) {
        return Some(libc::EPERM);
    }
    let sent = sys::pidfd_queue_signal(pidfd.as_fd(), signal, caller.group, caller.user);
    // A real-time signal without room for its sender's name: kill(2) sends it all the same.
    let sent = match sent {
        Err(libc::EAGAIN) => sys::pidfd_signal(pidfd.as_fd(), signal),
        other => other,
    };
    match sent {
        Ok(()) => Some(0),
        Err(libc::ESRCH) => None,
        Err(errno) => Some(errno),
    }
}

/// What the caller is told.
#[derive(Default)]
struct Verdict {
    n_found: usize,
    errno: i32,
}

impl Verdict {
    fn add(&mut self, result: Option<i32>) {
        let Some(errno) = result else { return };
        self.n_found += 1;
        // As the kernel has it: who may signal nobody of those that are there is told of success.
        if errno != libc::EPERM {
            self.errno = errno;
        }
    }

    fn errno(&self) -> i32 {
        if self.n_found == 0 { libc::ESRCH } else { self.errno }
    }
}

/// What decides who may signal whom.
#[derive(Debug, PartialEq, Eq)]
struct Face {
    /// The process's number, for any of its threads.
    group: u32,
    session: u32,
    user: u32,
    effective: u32,
    saved: u32,
    may_kill: bool,
}

impl Face {
    fn may_signal(&self, target: &Self, signal: i32) -> bool {
        let own = [self.effective, self.user];
        let is_own = own.contains(&target.saved) || own.contains(&target.user);
        let goes_on = signal == libc::SIGCONT && (target.session == 0 || target.session == self.session);
        self.may_kill || is_own || goes_on
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::split_ascii_whitespace)
        };
        let number = |name| field(name)?.last()?.parse().ok();
        let mut users = field("Uid")?;
        let mut user = || users.next()?.parse().ok();
        let (user, effective, saved) = (user()?, user()?, user()?);
        let capabilities = u64::from_str_radix(field("CapEff")?.next()?, 16).ok()?;
        let may_kill = capabilities & (1 << KILL) != 0;
        Some(Self { group: number("Tgid")?, session: number("NSsid")?, user, effective, saved, may_kill })
    }
}

fn read_face(pid: u32) -> Option<Face> {
    Face::parse(&String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/status")).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn face(user: u32) -> Face {
        Face { group: 7, session: 7, user, effective: user, saved: user, may_kill: false }
    }

    #[test]
    fn a_status_tells_who_may_signal_whom() {
        let status = "Name:\tx\nTgid:\t7\nPid:\t9\nUid:\t1\t2\t3\t4\nNSsid:\t5\nCapEff:\t0000000000000020\n";
        let expected = Face { group: 7, session: 5, user: 1, effective: 2, saved: 3, may_kill: true };
        assert_eq!(Face::parse(status), Some(expected));
        assert!(!Face::parse(&status.replace("20\n", "1f\n")).expect("a face").may_kill);
        for field in ["Tgid", "Uid", "NSsid", "CapEff"] {
            assert_eq!(Face::parse(&status.replace(field, "Other")), None, "without {field}");
        }
    }

    #[test]
    fn names_with_bytes_of_any_kind_are_no_obstacle() {
        // What the kernel writes of a name with a line end is escaped; other bytes may be no UTF-8.
        let name = [&b"Name:\t\xff\n"[..], b"Tgid:\t7\nUid:\t1\t1\t1\t1\nNSsid:\t5\nCapEff:\t0\n"].concat();
        assert!(Face::parse(&String::from_utf8_lossy(&name)).is_some());
    }

    #[test]
    fn users_signal_their_own_and_those_with_the_capability_all() {
        assert!(face(1000).may_signal(&face(1000), libc::SIGTERM));
        assert!(!face(1000).may_signal(&face(1001), libc::SIGTERM));
        assert!(!face(1000).may_signal(&face(0), 0));
        assert!(Face { may_kill: true, ..face(0) }.may_signal(&face(1001), libc::SIGKILL));
        // Root that has given it up is a user like others.
        assert!(!face(0).may_signal(&face(1001), libc::SIGKILL));
        // Real or effective against real or saved, never against effective.
        assert!(face(1000).may_signal(&Face { user: 0, effective: 0, saved: 1000, ..face(0) }, libc::SIGTERM));
        assert!(!face(1000).may_signal(&Face { effective: 1000, ..face(0) }, libc::SIGTERM));
        assert!(Face { effective: 5, ..face(1000) }.may_signal(&face(1000), libc::SIGTERM));
        assert!(!Face { saved: 1001, ..face(1000) }.may_signal(&face(1001), libc::SIGTERM));
    }

    #[test]
    fn a_session_lets_its_own_go_on() {
        assert!(face(1).may_signal(&face(2), libc::SIGCONT));
        assert!(!face(1).may_signal(&Face { session: 8, ..face(2) }, libc::SIGCONT));
        assert!(!face(1).may_signal(&face(2), libc::SIGSTOP));
    }

    #[test]
    fn the_caller_is_told_what_the_kernel_would_tell() {
        let told = |results: &[Option<i32>]| {
            let mut verdict = Verdict::default();
            results.iter().for_each(|result| verdict.add(*result));
            verdict.errno()
        };
        assert_eq!(told(&[]), libc::ESRCH);
        assert_eq!(told(&[None, None]), libc::ESRCH);
        assert_eq!(told(&[Some(0), Some(libc::EPERM)]), 0);
        assert_eq!(told(&[Some(libc::EPERM)]), 0);
        assert_eq!(told(&[Some(libc::EINVAL), Some(libc::EPERM)]), libc::EINVAL);
    }
}
