//! What was written to a terminal and not shown yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::input::KEPT_BYTES;
use super::{has, open_slave};
use crate::sys::tty::{Modes, Order, order, set_modes};

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
        let written = write_all(slave, &self.bytes);
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

/// Writes to a side that does not wait, in portions that the kernel's queue packs well (measured: 22048 bytes fit in
/// portions of 1000, 13824 in one; whatever portions had filled it, its content fitted again in these).
pub(super) fn write_all(side: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    const PORTION_BYTES: usize = 1000;
    for mut portion in bytes.chunks(PORTION_BYTES) {
        let end = Instant::now() + MOVE_PATIENCE;
        while !portion.is_empty() {
            match nix::unistd::write(side, portion) {
                Ok(n @ 1..) => portion = &portion[n..],
                // Full, until the kernel has moved the first 4095 bytes on.
                Ok(_) | Err(Errno::EAGAIN) if Instant::now() < end => {
                    poll(&mut [PollFd::new(side, PollFlags::POLLOUT)], PollTimeout::from(1_u8))?;
                }
                Ok(_) | Err(Errno::EAGAIN) => return Err(io::ErrorKind::WriteZero.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}
