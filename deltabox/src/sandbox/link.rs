//! The engine's end of the conversation with a sandbox's init.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use deltabox_common::init::{Assembler, FromInit, ToInit};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::sys::socket;

/// How long a write to init may take before it counts as hung (chosen: init only ever blocks in poll).
const WRITE_DEADLINE: Duration = Duration::from_secs(5);

/// A connection to an init. Readable when a message may be there.
#[derive(Debug)]
pub struct InitLink {
    socket: UnixStream,
    input: Assembler<OwnedFd>,
}

impl AsFd for InitLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl InitLink {
    /// Takes over a connected stream socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, input: Assembler::default() })
    }

    /// Sends one message. Blocks while init is behind, at most a few seconds.
    pub fn send(&mut self, message: &ToInit, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = message.encode(fds.len());
        if bytes.len() > deltabox_common::init::MAX_PAYLOAD_LEN {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let end = Instant::now() + WRITE_DEADLINE;
        let (mut sent, mut fds) = (0, fds);
        while sent < bytes.len() {
            match socket::send_with_fds(self.socket.as_fd(), &bytes[sent..], fds) {
                Ok(n) => {
                    sent += n;
                    fds = &[];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT, end)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next message with its descriptors, if one has come. Never blocks.
    ///
    /// # Errors
    /// `UnexpectedEof` when init has gone; `InvalidData` for what no init of ours says.
    pub fn try_recv(&mut self) -> io::Result<Option<(FromInit, Vec<OwnedFd>)>> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let mut buf = [0_u8; 4096];
        loop {
            if let Some((kind, payload, fds)) = self.input.next_frame().map_err(invalid)? {
                return Ok(Some((FromInit::decode(kind, &payload).map_err(invalid)?, fds)));
            }
            let mut fds = Vec::new();
            match socket::recv_with_fds(self.socket.as_fd(), &mut buf, &mut fds) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.input.feed(&buf[..n], fds),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next message, waited for until `end`.
    ///
    /// # Errors
    /// As [`InitLink::try_recv`]; `TimedOut` at the deadline.
    pub fn recv(&mut self, end: Instant) -> io::Result<(FromInit, Vec<OwnedFd>)> {
        loop {
            if let Some(message) = self.try_recv()? {
                return Ok(message);
            }
            self.wait(PollFlags::POLLIN, end)?;
        }
    }

    fn wait(&self, events: PollFlags, end: Instant) -> io::Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.socket.as_fd(), events)];
        match nix::poll::poll(&mut fds, timeout) {
            Ok(0) if left.is_zero() => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
