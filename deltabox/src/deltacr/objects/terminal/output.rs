//! What was written to a terminal and not shown yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use super::input::KEPT_BYTES;
use super::{has, open_slave};
use crate::sys::tty::{Ask, Modes, Order, ask, order, set_modes};

/// How long the kernel may take to move what was written on (chosen: a thread of its does it, in microseconds).
const MOVE_PATIENCE: Duration = Duration::from_millis(100);

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// By ^S: nothing more can be written.
    is_stopped: bool,
}

impl Output {
    /// Takes it. `slave` does not wait; packet mode is off.
    pub(super) fn take(master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let (mut bytes, mut buffer) = (Vec::new(), [0; KEPT_BYTES + 1]);
        while has(master, PollFlags::POLLIN)? {
            match nix::unistd::read(master, &mut buffer) {
                Ok(n @ 1..) => bytes.extend_from_slice(&buffer[..n]),
                // The slave is closed, and this was all.
                Ok(0) | Err(Errno::EIO | Errno::EAGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        // With nothing to be shown there is room, unless it may not write.
        let can_write = slave.map_or(Ok(true), |slave| has(slave, PollFlags::POLLOUT))?;
        Ok(Self { bytes, is_stopped: !can_write })
    }

    /// Writes it again, as it is. Packet mode is off.
    pub(super) fn give(&self, master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>, modes: &Modes) -> io::Result<()> {
        // Without anybody who may write, what the master keeps itself is put there.
        if (slave.is_none() || self.is_stopped) && self.bytes.len() <= KEPT_BYTES {
            return self.bytes.iter().try_for_each(|byte| order(master, Order::Type(*byte)));
        }
        let opened;
        let slave = if let Some(slave) = slave {
            slave
        } else {
            // Closed again it is as it was: who has written this has closed it.
            opened = open_slave(master, libc::O_RDWR | libc::O_NONBLOCK)?;
            opened.as_fd()
        };
        if self.is_stopped {
            order(slave, Order::StopOutput)?;
            order(slave, Order::StartOutput)?;
        }
        let mut plain = *modes;
        plain.output &= !libc::OPOST;
        set_modes(slave, &plain)?;
        let written = send(slave, master, &self.bytes);
        set_modes(slave, modes)?;
        if self.is_stopped {
            self.stop(slave, modes)?;
        }
        written
    }

    /// Stops what is written, as ^S does, if it was stopped.
    pub(super) fn stop(&self, slave: BorrowedFd<'_>, modes: &Modes) -> io::Result<()> {
        const STOP: u8 = 0x13;
        if !self.is_stopped {
            return Ok(());
        }
        if modes.input & libc::IXON == 0 {
            // Then only a program can have stopped it: to leave that mode is to start.
            return order(slave, Order::StopOutput);
        }
        let mut stopping = *modes;
        stopping.characters[libc::VSTOP] = STOP;
        set_modes(slave, &stopping)?;
        let typed = order(slave, Order::Type(STOP));
        set_modes(slave, modes)?;
        typed
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Sends bytes from a side that does not wait to the other, which has nothing to be read.
///
/// ```text
/// side --> queue of buffers, 8 KB each byte of which holds two --(a thread of the kernel's)--> 4095 bytes --> other
/// ```
/// What filled the queue has to fit again. A portion that does not fit into the last buffer gets one as long as itself,
/// rounded to 256; there is room for one more as long as all buffers together have not more than 8 KB (`tty_buffer_alloc`
/// of drivers/tty/tty_buffer.c). So portions are small, and the last one as large as can be.
///
/// # Errors
/// `WriteZero`: it does not fit.
pub(super) fn send(side: BorrowedFd<'_>, other: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let (first, rest) = bytes.split_at(bytes.len().min(KEPT_BYTES));
    send_portions(side, first)?;
    if rest.is_empty() {
        return Ok(());
    }
    // Only once it was moved on is the queue as empty as it gets.
    let end = Instant::now() + MOVE_PATIENCE;
    while usize::try_from(ask(other, Ask::Readable)?).unwrap_or(0) < first.len() {
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::yield_now();
    }
    send_portions(side, rest)
}

/// Sends bytes to a side that has its 4095 already.
///
/// # Errors
/// `WriteZero`: they do not fit.
pub(super) fn send_portions(side: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    const SMALL_BYTES: usize = 256;
    const LARGE_BYTES: usize = 3584;
    while !bytes.is_empty() {
        let portion_bytes = if has(side, PollFlags::POLLOUT)? { SMALL_BYTES } else { LARGE_BYTES };
        match nix::unistd::write(side, &bytes[..bytes.len().min(portion_bytes)]) {
            Ok(n @ 1..) => bytes = &bytes[n..],
            Ok(_) | Err(Errno::EAGAIN) => return Err(io::ErrorKind::WriteZero.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
