//! The client's standard input, read only when there is something and somebody wants it.
//!
//! O_NONBLOCK would change the open file that we share with our shell, so it is left as it is: epoll says that
//! there may be something, poll makes sure at the moment of the read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

use crate::daemon::watch::{readable_now, watch};

/// Standard input.
pub(super) enum Input {
    /// Pipe, terminal, socket.
    Watched(AsyncFd<OwnedFd>),
    /// What epoll does not take (regular files, /dev/null): it is always ready.
    Ready(OwnedFd),
    /// Not wanted.
    Closed,
}

impl Input {
    pub(super) fn open() -> io::Result<Self> {
        let stdin = io::stdin();
        match watch(stdin.as_fd().try_clone_to_owned()?) {
            Ok(watched) => Ok(Self::Watched(watched)),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                Ok(Self::Ready(stdin.as_fd().try_clone_to_owned()?))
            }
            Err(error) => Err(error),
        }
    }

    /// The next bytes; 0 at the end. Cancelled, it has read nothing.
    pub(super) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Closed => std::future::pending().await,
            Self::Ready(fd) => read_now(fd, buffer),
            Self::Watched(fd) => loop {
                let mut guard = fd.readable().await?;
                if readable_now(fd)? {
                    return read_now(fd.get_ref(), buffer);
                }
                guard.clear_ready();
            },
        }
    }
}

fn read_now(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Err(Errno::EINTR) => {}
            // A terminal whose other side is gone.
            Err(Errno::EIO) => return Ok(0),
            result => return Ok(result?),
        }
    }
}
