//! What poll(2) says of a single descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

/// Whether `fd` becomes readable in time (for a pidfd: the process has ended).
pub(super) fn wait_readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let end = Instant::now() + within;
    loop {
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
        match nix::poll::poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], left) {
            Err(nix::Error::EINTR) => {}
            other => return other.is_ok_and(|n| n > 0),
        }
    }
}

/// Whether something is there to read or a writer is left.
pub(super) fn may_still_print(end: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(end.as_fd(), PollFlags::POLLIN)];
    match nix::poll::poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => {
            let events = fds[0].revents().unwrap_or(PollFlags::empty());
            events.contains(PollFlags::POLLIN) || !events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
        }
        Err(_) => false,
    }
}
