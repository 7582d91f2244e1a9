//! What every probe stands on: honest failures, children with deadlines, scratch directories.
//!
//! Everything made here undoes itself on drop, so a probe may return at any step.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sys::process::{Child, CloneRequest, pidfd_send_signal};
use crate::sys::steps::{Step, clone_steps};

/// How long one answer of a child or one event may take. Chosen: far above the milliseconds that they take on a
/// loaded machine; a probe that hangs costs this, not the report.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// SIGALRM after this many seconds ends a child whose ptrace stop is waited for, which cannot be polled for.
pub(super) const ALARM_S: u32 = 5;

/// Why a probe did not find what it looked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The kernel does not offer it.
    Missing(String),
    /// It may be there; this process is not allowed to use it.
    Denied(String),
    /// The probe could not be carried out, for a reason that says nothing about the kernel.
    NotProbed(String),
}

/// What was found, in a few words, or why not.
pub(super) type Outcome = Result<String, Failure>;

/// Sorts the failure of step `op` by its error number: only those that mean "not offered" are [`Failure::Missing`].
pub(super) fn at<E: Into<io::Error>>(op: &str) -> impl FnOnce(E) -> Failure {
    move |error| {
        let error = error.into();
        let Some(number) = error.raw_os_error() else {
            return Failure::NotProbed(format!("{op}: {error}"));
        };
        let errno = Errno::from_raw(number);
        let text = format!("{op}: {errno:?}");
        match errno {
            Errno::EPERM | Errno::EACCES => Failure::Denied(text),
            Errno::ENOSYS
            | Errno::EINVAL
            | Errno::EOPNOTSUPP
            | Errno::ENOENT
            | Errno::ENODEV
            | Errno::ENOTTY
            | Errno::ENOPROTOOPT
            | Errno::EROFS => Failure::Missing(text),
            _ => Failure::NotProbed(text),
        }
    }
}

/// The failure of a check: a call succeeded, but what it should have done is not there.
pub(super) fn unless(holds: bool, otherwise: &str) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::Missing(otherwise.to_owned())) }
}

/// Waits until `fd` has `events` (or an error or hang-up), at most until `deadline`; otherwise ETIMEDOUT.
pub(super) fn wait_for(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<()> {
    wait_for_any(&mut [PollFd::new(fd, events)], deadline)
}

fn wait_for_any(fds: &mut [PollFd<'_>], deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last wait does not spin.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(fds, timeout) {
            Ok(0) if Instant::now() >= deadline => return Err(Errno::ETIMEDOUT.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A child that runs steps for a probe; killed and reaped on drop.
#[derive(Debug)]
pub(super) struct ProbeChild {
    child: Child,
    channel: OwnedFd,
    reaped: bool,
}

impl ProbeChild {
    pub(super) fn start(request: CloneRequest<'_>, steps: &[Step<'_>]) -> io::Result<Self> {
        let (ours, childs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = clone_steps(request, childs.as_fd(), steps)?;
        Ok(Self { child, channel: ours, reaped: false })
    }

    pub(super) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.pid)
    }

    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    /// The next step's result. ESRCH if the child died instead.
    pub(super) fn next(&self) -> io::Result<i64> {
        let mut fds = [self.channel.as_fd(), self.pidfd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        wait_for_any(&mut fds, Instant::now() + PATIENCE)?;
        let mut bytes = [0; 8];
        match recv(std::os::fd::AsRawFd::as_raw_fd(&self.channel), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(8) => {}
            Ok(_) | Err(Errno::EAGAIN) => return Err(Errno::ESRCH.into()),
            Err(error) => return Err(error.into()),
        }
        let value = i64::from_ne_bytes(bytes);
        match i32::try_from(-value) {
            Ok(errno @ 1..) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(value),
        }
    }

    /// Lets a child go on that is at [`Step::Wait`], and takes that step's result.
    pub(super) fn go(&self) -> io::Result<()> {
        send(std::os::fd::AsRawFd::as_raw_fd(&self.channel), &[1], MsgFlags::MSG_NOSIGNAL)?;
        self.next().map(drop)
    }

    /// How it ended, once it has.
    pub(super) fn wait(mut self) -> io::Result<WaitStatus> {
        wait_for(self.pidfd(), PollFlags::POLLIN, Instant::now() + PATIENCE)?;
        let status = waitpid(self.pid(), Some(WaitPidFlag::__WALL))?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for ProbeChild {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        // Errors leave nothing better to do: it is dead already, or it will not die within the deadline.
        let _ = pidfd_send_signal(self.pidfd(), libc::SIGKILL);
        if wait_for(self.pidfd(), PollFlags::POLLIN, Instant::now() + PATIENCE).is_ok() {
            let _ = waitpid(self.pid(), Some(WaitPidFlag::__WALL));
        }
    }
}

/// A directory of our own, removed with its content on drop.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn create(parent: &Path) -> io::Result<Self> {
        let path = parent.join(unique_name());
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// A new directory in it, opened.
    pub(super) fn subdirectory(&self, name: &str) -> io::Result<OwnedFd> {
        let path = self.0.join(name);
        std::fs::create_dir(&path)?;
        open_directory(&path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A name that no other probe on the machine uses and that tells where it comes from.
pub(super) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(".deltabox-doctor.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `path`, opened as a directory to read.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    Ok(open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_error_number_means_missing() {
        let sorted = |errno: Errno| at("call")(errno);
        assert_eq!(sorted(Errno::EPERM), Failure::Denied("call: EPERM".to_owned()));
        assert_eq!(sorted(Errno::ENOSYS), Failure::Missing("call: ENOSYS".to_owned()));
        assert_eq!(sorted(Errno::EMFILE), Failure::NotProbed("call: EMFILE".to_owned()));
        assert_eq!(sorted(Errno::ENOMEM), Failure::NotProbed("call: ENOMEM".to_owned()));
    }

    #[test]
    fn a_child_reports_the_results_of_its_steps_in_order() {
        let child = ProbeChild::start(
            CloneRequest::default(),
            &[Step::GetPriority, Step::Wait, Step::Write { path: c"/nowhere/file", text: b"x" }],
        )
        .unwrap();
        assert!(child.next().unwrap() > 0);
        child.go().unwrap();
        assert_eq!(child.next().unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(matches!(child.wait().unwrap(), WaitStatus::Exited(_, 0)));
    }

    #[test]
    fn a_child_that_died_is_told_apart_from_one_that_is_slow() {
        let child = ProbeChild::start(CloneRequest::default(), &[Step::Wait]).unwrap();
        pidfd_send_signal(child.pidfd(), libc::SIGKILL).unwrap();
        assert_eq!(child.next().unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn a_wait_for_what_never_comes_ends_at_its_deadline() {
        let child = ProbeChild::start(CloneRequest::default(), &[Step::Wait]).unwrap();
        let waited = wait_for(child.pidfd(), PollFlags::POLLIN, Instant::now());
        assert_eq!(waited.unwrap_err().raw_os_error(), Some(libc::ETIMEDOUT));
    }

    #[test]
    fn a_dropped_child_is_gone_and_reaped() {
        let child = ProbeChild::start(CloneRequest::default(), &[Step::Wait]).unwrap();
        let pid = child.pid();
        drop(child);
        assert_eq!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Err(Errno::ECHILD));
    }

    #[test]
    fn a_dropped_scratch_directory_is_gone_with_its_content() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(parent.path()).unwrap();
        std::fs::create_dir_all(scratch.path().join("a/b")).unwrap();
        drop(scratch);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
