//! What was written to a terminal and not shown yet.

use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use super::has;
use super::input::KEPT_BYTES;
use crate::sys::tty::{Modes, Order, order, set_modes};

/// Bytes per read (from the kernel: all that its queue has).
const READ_BYTES: usize = 64 << 10;

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// By ^S: nothing more can be written.
    is_stopped: bool,
}

impl Output {
    /// Takes it. `slave` does not wait.
    pub(super) fn take(master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>, in_packets: bool) -> io::Result<Self> {
        let mut bytes = Vec::new();
        // What is there before a read makes room: nobody writes.
        while has(master, PollFlags::POLLIN)? {
            let start = bytes.len();
            bytes.resize(start + READ_BYTES, 0);
            let n = match nix::unistd::read(master, &mut bytes[start..]) {
                Ok(n) => n,
                // The slave is closed, and this was all.
                Err(Errno::EIO | Errno::EAGAIN) => 0,
                Err(errno) => return Err(errno.into()),
            };
            bytes.truncate(start + n);
            if n == 0 {
                break;
            }
            // Each read begins with a byte that says what happened: nothing.
            if in_packets {
                bytes.remove(start);
            }
        }
        // With nothing to be shown there is room, unless it may not write.
        let can_write = slave.map_or(Ok(true), |slave| has(slave, PollFlags::POLLOUT))?;
        Ok(Self { bytes, is_stopped: !can_write })
    }

    /// Writes it again, as it is.
    pub(super) fn give(&self, master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>, modes: &Modes) -> io::Result<()> {
        let Some(slave) = slave.filter(|_| !self.is_stopped || self.bytes.len() > KEPT_BYTES) else {
            return self.put_in(master);
        };
        if self.is_stopped {
            order(slave, Order::StopOutput)?;
            order(slave, Order::StartOutput)?;
        }
        let mut plain = *modes;
        plain.output &= !libc::OPOST;
        set_modes(slave, &plain)?;
        let written = write(slave, &self.bytes);
        set_modes(slave, modes)?;
        if self.is_stopped {
            stop(slave, modes)?;
        }
        written
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// Where no slave can write: as if it had.
    fn put_in(&self, master: BorrowedFd<'_>) -> io::Result<()> {
        if self.bytes.len() > KEPT_BYTES {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.iter().try_for_each(|byte| order(master, Order::Type(*byte)))
    }
}

/// As ^S does.
pub(super) fn stop(slave: BorrowedFd<'_>, modes: &Modes) -> io::Result<()> {
    const STOP: u8 = 0x13;
    let mut stopping = *modes;
    stopping.input = libc::IXON;
    stopping.local = modes.local & (libc::ICANON | libc::EXTPROC);
    stopping.characters[libc::VSTOP] = STOP;
    set_modes(slave, &stopping)?;
    let typed = order(slave, Order::Type(STOP));
    set_modes(slave, modes)?;
    typed
}

fn write(slave: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(slave, bytes) {
            Ok(n @ 1..) => bytes = &bytes[n..],
            Ok(_) | Err(Errno::EAGAIN) => return Err(io::ErrorKind::WriteZero.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
