//! Descriptors of our own that tell tokio when there is something: streams, inotify.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// A descriptor that the current runtime watches for reading and writing.
///
/// # Errors
/// The kernel's word; EPERM for what is always ready (a regular file).
#[expect(
    deprecated,
    reason = "tokio's complaint is about types that do not own their descriptor; the replacement is unsafe, which only sys/ may be"
)]
pub(super) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// inotify on one path: told when it changes, without asking again and again.
pub(super) struct PathWatch(AsyncFd<OwnedFd>);

impl PathWatch {
    /// Watches from now on; what happens between this and [`Self::changed`] is not missed.
    pub(super) fn new(path: &Path, events: AddWatchFlags) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, events)?;
        watch(inotify.into()).map(Self)
    }

    /// Returns when something has happened since the last call.
    pub(super) async fn changed(&self) -> io::Result<()> {
        let mut events = [0; 4096];
        loop {
            let mut guard = self.0.readable().await?;
            if let Ok(read) = guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), &mut events)?)) {
                return read.map(drop);
            }
        }
    }
}

/// Whether a read would return at once, whatever was said before.
pub(super) fn readable_now(fd: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    Ok(poll(&mut [PollFd::new(fd.get_ref().as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? > 0)
}
