//! eventfd(2): a count.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use super::error::failed;
use super::own::{field, own_fdinfo, unknown};
use super::{ObjectError, ObjectRefusal};

/// An eventfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eventfd {
    count: u64,
    /// Each read takes one.
    is_semaphore: bool,
}

impl Eventfd {
    /// Reads it from the engine's copy.
    ///
    /// # Errors
    /// As [`Eventfd::parse`].
    pub fn read(fd: BorrowedFd<'_>) -> Result<Self, ObjectError> {
        Self::parse(&own_fdinfo(fd).map_err(failed("read fdinfo of an eventfd"))?)
    }

    /// What fdinfo tells is all there is.
    ///
    /// # Errors
    /// `Overflown`; or it is not what a kernel writes.
    pub fn parse(fdinfo: &str) -> Result<Self, ObjectError> {
        let count = field(fdinfo, "eventfd-count").and_then(|count| u64::from_str_radix(count, 16).ok());
        let count = count.ok_or_else(|| unknown("count")).map_err(failed("read an eventfd"))?;
        // Only the kernel itself counts so far (a signal of an eventfd that is full); write(2) cannot.
        if count == u64::MAX {
            return Err(ObjectRefusal::Overflown.into());
        }
        // Told since Linux 6.5.
        Ok(Self { count, is_semaphore: field(fdinfo, "eventfd-semaphore") == Some("1") })
    }

    /// Makes another one that is the same.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self) -> io::Result<OwnedFd> {
        let semaphore = if self.is_semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
        // The first value is an int only.
        let made = EventFd::from_value_and_flags(0, semaphore | EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        if self.count > 0 {
            made.write(self.count)?;
        }
        let made = OwnedFd::from(made);
        nix::fcntl::fcntl(&made, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_RDWR))?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn comes_back(value: u64, semaphore: EfdFlags) -> OwnedFd {
        let old = EventFd::from_value_and_flags(0, semaphore | EfdFlags::EFD_NONBLOCK).unwrap();
        if value > 0 {
            old.write(value).unwrap();
        }
        let record = Eventfd::read(old.as_fd()).unwrap();
        old.write(1).unwrap();
        let new = record.make().unwrap();
        assert_eq!(Eventfd::read(new.as_fd()).unwrap(), record);
        nix::fcntl::fcntl(&new, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        new
    }

    fn value(fd: &OwnedFd) -> nix::Result<u64> {
        let mut bytes = [0; 8];
        nix::unistd::read(fd, &mut bytes).map(|_| u64::from_ne_bytes(bytes))
    }

    #[test]
    fn a_count_comes_back() {
        assert_eq!(value(&comes_back(7, EfdFlags::empty())), Ok(7));
        assert_eq!(value(&comes_back(u64::MAX - 2, EfdFlags::empty())), Ok(u64::MAX - 2));
        assert_eq!(value(&comes_back(0, EfdFlags::empty())), Err(nix::errno::Errno::EAGAIN));
    }

    #[test]
    fn a_semaphore_gives_one_at_a_time() {
        let made = comes_back(2, EfdFlags::EFD_SEMAPHORE);
        assert_eq!((value(&made), value(&made)), (Ok(1), Ok(1)));
        assert_eq!(value(&made), Err(nix::errno::Errno::EAGAIN));
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let full = Eventfd::parse("eventfd-count: ffffffffffffffff\n");
        assert!(matches!(full, Err(ObjectError::Refused(ObjectRefusal::Overflown))));
        assert!(matches!(Eventfd::parse("pos:\t0\n"), Err(ObjectError::Failed { .. })));
    }
}
