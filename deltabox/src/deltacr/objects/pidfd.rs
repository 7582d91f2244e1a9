//! pidfd_open(2): whom it is of. Of a process that has ended and was reaped the kernel tells nothing; another one that
//! has ended, made and reaped for that, answers as it does (polls as readable, ESRCH, ECHILD).

use std::os::fd::OwnedFd;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::error::failed;
use super::own::{field, unknown};
use super::{ObjectError, ObjectRefusal};
use crate::sys::process::{pidfd_of_ended, pidfd_open, pidfd_open_thread};

/// A pidfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pidfd {
    /// Inside the sandbox; `None`: it has ended and was reaped.
    pid: Option<pid_t>,
    /// Of one thread (PIDFD_THREAD).
    is_thread: bool,
}

impl Pidfd {
    /// What fdinfo tells is all there is. `depth` is how many PID namespaces the sandbox's lies below the one that
    /// `/proc` shows.
    ///
    /// # Errors
    /// `OutsideProcess`; or it is not what a kernel writes.
    pub fn parse(fdinfo: &str, depth: usize) -> Result<Self, ObjectError> {
        let parsed = || {
            let flags = field(fdinfo, "flags").and_then(|flags| i32::from_str_radix(flags, 8).ok());
            let pid = field(fdinfo, "Pid").and_then(|pid| pid.parse::<pid_t>().ok());
            flags.zip(pid).ok_or_else(|| unknown("pid"))
        };
        let (flags, outer) = parsed().map_err(failed("read a pidfd"))?;
        let is_thread = flags & libc::O_EXCL != 0;
        if outer == -1 {
            return Ok(Self { pid: None, is_thread });
        }
        let inner = field(fdinfo, "NSpid").and_then(|pids| pids.split_ascii_whitespace().nth(depth)?.parse().ok());
        let pid: pid_t = inner.filter(|pid| *pid > 0).ok_or(ObjectRefusal::OutsideProcess { pid: outer })?;
        Ok(Self { pid: Some(pid), is_thread })
    }

    /// Whose it is, inside the sandbox; `None`: it has ended and was reaped.
    pub fn pid(&self) -> Option<pid_t> {
        self.pid
    }

    /// Makes another one, of the process (or thread) with that host PID, which has to be there, a zombie too. Without
    /// one, of one that has ended: a copy of the whole engine, so make it ahead.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self, host: Option<pid_t>) -> Result<OwnedFd, ObjectError> {
        match (host, self.is_thread) {
            (Some(pid), false) => pidfd_open(pid),
            (Some(tid), true) => pidfd_open_thread(tid),
            (None, is_thread) => pidfd_of_ended(is_thread),
        }
        .map_err(failed("make a pidfd"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::deltacr::objects::own_fdinfo;
    use crate::sys::process::pidfd_send_signal;

    fn read(fd: &OwnedFd) -> Pidfd {
        Pidfd::parse(&own_fdinfo(fd.as_fd()).unwrap(), 0).unwrap()
    }

    fn has_ended(fd: &OwnedFd) -> bool {
        poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn a_process_is_found_again() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = pid_t::try_from(child.id()).unwrap();
        let old = pidfd_open(pid).unwrap();
        let record = read(&old);
        assert_eq!(record, Pidfd { pid: Some(pid), is_thread: false });
        let new = record.make(Some(pid)).unwrap();
        assert!(!has_ended(&new));
        pidfd_send_signal(new.as_fd(), libc::SIGKILL).unwrap();
        // A zombie still has a number.
        let mut fds = [PollFd::new(new.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5000_u16)).unwrap(), 1);
        assert_eq!(read(&new), record);
        assert!(has_ended(&record.make(Some(pid)).unwrap()));
        child.wait().unwrap();
        assert_eq!(read(&old).pid(), None);
    }

    #[test]
    fn what_has_ended_has_ended() {
        for is_thread in [false, true] {
            let record = Pidfd { pid: None, is_thread };
            let made = record.make(None).unwrap();
            assert_eq!(read(&made), record);
            assert!(has_ended(&made));
            let sent = pidfd_send_signal(made.as_fd(), 0).unwrap_err();
            assert_eq!(sent.raw_os_error(), Some(libc::ESRCH));
        }
    }

    #[test]
    fn a_thread_is_told_from_a_process() {
        let own = pidfd_open_thread(nix::unistd::gettid().as_raw()).unwrap();
        let record = read(&own);
        assert!(record.is_thread);
        assert_eq!(read(&record.make(record.pid()).unwrap()), record);
    }

    #[test]
    fn the_number_inside_is_taken_and_a_process_outside_refused() {
        let text = "flags:\t02000002\nPid:\t950\nNSpid:\t950\t7\n";
        assert_eq!(Pidfd::parse(text, 1).unwrap().pid(), Some(7));
        let outside = Pidfd::parse("flags:\t02\nPid:\t950\nNSpid:\t950\n", 1);
        assert!(matches!(outside, Err(ObjectError::Refused(ObjectRefusal::OutsideProcess { pid: 950 }))));
    }
}
