//! FIFOs: the pipe behind one belongs to its inode, so all who open that meet on it, by name too.
//!
//! ```text
//! open   both ends, without waiting --> size, content --> each description --> the first one goes; ends that nobody had are gone
//! ```
//! Opening for writing alone fails without a reader, and opening for reading makes one: so the first opening is for both.
//!
//! A reader that was opened before any writer came is *quiet*: no POLLHUP tells it that there is none, so it can wait for
//! the first. (The kernel compares how many writers there had been when it was opened, pipe_poll of fs/pipe.c.)
//! It has to be opened when there is no writer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::own::{Access, reopen};
use super::{Pipe, Spare};

/// A FIFO that is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fifo {
    pipe: Pipe,
    ends: Vec<End>,
}

/// A description of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    access: Access,
    is_quiet: bool,
}

impl End {
    /// Of all descriptions of a FIFO that there are.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn all_of(descriptions: &[BorrowedFd<'_>]) -> io::Result<Vec<Self>> {
        let accesses = descriptions.iter().map(|one| Access::of(*one)).collect::<io::Result<Vec<_>>>()?;
        let has_writer = accesses.iter().any(|access| access.writes());
        let end = |(description, access): (&BorrowedFd<'_>, Access)| {
            let is_quiet = !has_writer && !is_hung_up(*description)?;
            Ok(Self { access, is_quiet })
        };
        descriptions.iter().zip(accesses).map(end).collect()
    }
}

impl Fifo {
    /// Reads the one that all of `descriptions` are of: every one that there is inside.
    ///
    /// # Errors
    /// The kernel's word; `InvalidInput` for no description.
    pub fn read(descriptions: &[BorrowedFd<'_>], spare: &Spare) -> io::Result<Self> {
        Ok(Self { ends: End::all_of(descriptions)?, pipe: Pipe::read(descriptions, spare)? })
    }

    /// Opens another one that nobody has open, and fills it: its descriptions, in the order in which they were read.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn open(&self, fifo: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
        open_ends(fifo, &self.ends, |end| self.pipe.fill(end))
    }
}

/// Opens a FIFO (any descriptor of it, `O_PATH` too) that nobody has open, once for each of `ends`; `fill` puts into it what is to be there.
/// None of the descriptions waits.
///
/// # Errors
/// The kernel's word.
pub fn open_ends(
    fifo: BorrowedFd<'_>,
    ends: &[End],
    fill: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<Vec<OwnedFd>> {
    let open = |access: Access| reopen(fifo, access.flag() | OFlag::O_NONBLOCK);
    let both = open(Access::Both)?;
    fill(both.as_fd())?;
    let loud = |end: &End| (!end.is_quiet).then(|| open(end.access)).transpose();
    let mut made = ends.iter().map(loud).collect::<io::Result<Vec<_>>>()?;
    // Somebody has it open at any time: what is in it would be gone.
    let keeper = open(Access::Read)?;
    drop(both);
    for (made, end) in made.iter_mut().zip(ends).filter(|(_, end)| end.is_quiet) {
        *made = Some(open(end.access)?);
    }
    drop(keeper);
    Ok(made.into_iter().flatten().collect())
}

fn is_hung_up(description: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(description, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::stat::Mode;
    use nix::unistd::{mkfifo, read, write};

    use super::*;

    /// Two FIFOs, by descriptors that do not open them.
    fn fifos() -> (tempfile::TempDir, [OwnedFd; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let made = ["old", "new"].map(|name| {
            let path = dir.path().join(name);
            mkfifo(&path, Mode::S_IRWXU).unwrap();
            nix::fcntl::open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
        });
        (dir, made)
    }

    fn open(fifo: &OwnedFd, flags: OFlag) -> OwnedFd {
        reopen(fifo.as_fd(), flags | OFlag::O_NONBLOCK).unwrap()
    }

    fn again(new: &OwnedFd, ends: &[&OwnedFd]) -> Vec<OwnedFd> {
        let fds: Vec<_> = ends.iter().map(|end| end.as_fd()).collect();
        Fifo::read(&fds, &Spare::new().unwrap()).unwrap().open(new.as_fd()).unwrap()
    }

    fn hung_up(end: &OwnedFd) -> bool {
        is_hung_up(end.as_fd()).unwrap()
    }

    #[test]
    fn every_end_meets_the_others_and_a_newcomer_on_the_new_one() {
        let (_dir, [old, new]) = fifos();
        let (r, w) = (open(&old, OFlag::O_RDONLY), open(&old, OFlag::O_WRONLY));
        fcntl(&w, FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
        write(&w, b"in a fifo").unwrap();
        let made = again(&new, &[&w, &r]);
        assert_eq!(fcntl(&made[0], FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
        write(open(&new, OFlag::O_WRONLY), b", more").unwrap();
        let mut bytes = [0; 100];
        let n = read(&made[1], &mut bytes).unwrap();
        assert_eq!(&bytes[..n], b"in a fifo, more");
        assert_eq!(read(&r, &mut bytes), Ok(9), "it was taken from the old one");
    }

    #[test]
    fn an_end_that_nobody_had_is_not_there() {
        let (_dir, [old, new]) = fifos();
        let (r, w) = (open(&old, OFlag::O_RDONLY), open(&old, OFlag::O_WRONLY));
        write(&w, b"left").unwrap();
        drop(w);
        let made = again(&new, &[&r]);
        let mut bytes = [0; 9];
        assert_eq!((read(&made[0], &mut bytes), read(&made[0], &mut bytes)), (Ok(4), Ok(0)));
        drop(made);
        let (r, w) = (open(&old, OFlag::O_RDONLY), open(&old, OFlag::O_WRONLY));
        drop(r);
        assert_eq!(write(&again(&new, &[&w])[0], b"x"), Err(Errno::EPIPE));
    }

    #[test]
    fn a_reader_that_waits_for_its_first_writer_is_not_told_that_there_is_none() {
        let (_dir, [old, new]) = fifos();
        let quiet = open(&old, OFlag::O_RDONLY);
        assert!(!hung_up(&quiet));
        let made = again(&new, &[&quiet]);
        assert!(!hung_up(&made[0]));
        drop(open(&new, OFlag::O_WRONLY));
        assert!(hung_up(&made[0]), "it had its writer");
        drop(made);
        // With another one that is told, and something that has not been read.
        write(open(&old, OFlag::O_WRONLY), b"kept").unwrap();
        let later = open(&old, OFlag::O_RDONLY);
        assert!(hung_up(&quiet) && !hung_up(&later));
        let made = again(&new, &[&later, &quiet]);
        assert!(hung_up(&made[1]) && !hung_up(&made[0]));
        assert_eq!(read(&made[0], &mut [0; 9]), Ok(4));
        // With a writer there is one.
        let writer = open(&old, OFlag::O_WRONLY);
        let made = again(&new, &[&quiet, &writer]);
        assert!(!hung_up(&made[0]));
    }
}
