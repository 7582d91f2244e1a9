//! signalfd(2): which signals are read from it. The signals themselves wait for whoever reads, not in it.
//!
//! To an epoll instance it has to be added by the process that waits there: the kernel notes whose signals wake it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::own::{field, own_fdinfo, unknown};
use crate::sys::notify::signalfd;

/// A signalfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signalfd {
    /// Bit n - 1 for signal n.
    mask: u64,
}

impl Signalfd {
    /// Reads it from the engine's copy.
    ///
    /// # Errors
    /// As [`Signalfd::parse`].
    pub fn read(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::parse(&own_fdinfo(fd)?)
    }

    /// What fdinfo tells is all there is.
    ///
    /// # Errors
    /// It is not what a kernel writes.
    pub fn parse(fdinfo: &str) -> io::Result<Self> {
        let mask = field(fdinfo, "sigmask").and_then(|mask| u64::from_str_radix(mask, 16).ok());
        mask.map(|mask| Self { mask }).ok_or_else(|| unknown("mask"))
    }

    /// Makes another one that is the same.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self) -> io::Result<OwnedFd> {
        signalfd(self.mask)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};

    use super::*;

    #[test]
    fn signals_are_read_from_a_new_one() {
        let wanted = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGRTMIN() + 3 - 1);
        let old = signalfd(wanted).unwrap();
        let record = Signalfd::read(old.as_fd()).unwrap();
        assert_eq!(record.mask, wanted);
        let new = record.make().unwrap();
        assert_eq!(Signalfd::read(new.as_fd()).unwrap(), record);
        let set = SigSet::from(Signal::SIGUSR1);
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None).unwrap();
        nix::sys::signal::raise(Signal::SIGUSR1).unwrap();
        let mut told = [0; 128];
        assert_eq!(nix::unistd::read(&new, &mut told).unwrap(), 128);
        assert_eq!(i32::from(told[0]), libc::SIGUSR1);
    }
}
