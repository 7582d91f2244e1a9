//! Pipes: what is in one, and the ends that there are.
//!
//! ```text
//! read   pipe == tee ==> spare pipe --> bytes, and where packets end         (the pipe keeps its content)
//! make   pipe2 --> size, content, owner --> each description of an end; ends that nobody had are closed again
//! ```
//! A pipe without writers is read to its end, one without readers gives EPIPE: so an end that exists nowhere must not be
//! made. An end that somebody *outside* has is told by [`leads_out`]: such a pipe is not made again but stays
//! connected.
//!
//! Packets (O_DIRECT): a read ends where a packet does, and what does not fit is lost. Each is a buffer of its own. The
//! kernel does not tell which buffers are packets, but a copy does, by how much a read of one byte takes away. A pipe whose
//! only content is one packet of one byte counts as packets if a writer is in packet mode.
//!
//! A FIFO has its pipe at an inode: see [`Fifo`](super::Fifo).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use serde::{Deserialize, Serialize};

use super::own::{Access, Permissions, reopen};
use crate::sys::notify::n_readable;

/// A pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    capacity_bytes: usize,
    content: Vec<Piece>,
    /// One for each description.
    ends: Vec<Access>,
    permissions: Permissions,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Piece {
    is_packet: bool,
    bytes: Vec<u8>,
}

/// A pipe into which the content of others is duplicated, to be looked at. One serves for all pipes of a sandbox; it
/// can be made ahead.
#[derive(Debug)]
pub struct Spare {
    read: OwnedFd,
    write: OwnedFd,
}

impl Spare {
    /// An empty one.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { read, write })
    }

    /// Duplicates what is in `old`.
    fn take(&self, old: BorrowedFd<'_>) -> io::Result<()> {
        self.empty()?;
        duplicate(old, self.write.as_fd())
    }

    fn empty(&self) -> io::Result<()> {
        let n = n_readable(self.read.as_fd())?;
        if n > 0 {
            let mut bytes = vec![0; n];
            while self.read(&mut bytes)? > 0 {}
        }
        Ok(())
    }

    /// One read; 0: nothing is left.
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match nix::unistd::read(&self.read, bytes) {
            Err(Errno::EAGAIN) => Ok(0),
            read => Ok(read?),
        }
    }
}

/// Makes `new`, an empty pipe's end for writing, as big as `old` and puts the same into it. `old` keeps it.
///
/// # Errors
/// The kernel's word.
pub fn duplicate(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    let size = fcntl(old, FcntlArg::F_GETPIPE_SZ)?;
    if size != fcntl(new, FcntlArg::F_GETPIPE_SZ)? {
        fcntl(new, FcntlArg::F_SETPIPE_SZ(size))?;
    }
    // Not `size`: what was spliced into it may be more.
    let n = n_readable(old)?;
    if n == 0 {
        return Ok(());
    }
    let reader;
    let end = if Access::of(old)?.reads() {
        old
    } else {
        reader = reopen(old, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        reader.as_fd()
    };
    match tee(end, new, n, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(_) | Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether an end that none of these descriptions is of is open elsewhere: in init, at a client, or on its way in a
/// message. (Of a FIFO it need not be true: one that never had a writer looks as if it had one.)
///
/// # Errors
/// The kernel's word.
pub fn leads_out(descriptions: &[BorrowedFd<'_>]) -> io::Result<bool> {
    let mut accesses = Vec::with_capacity(descriptions.len());
    for description in descriptions {
        accesses.push(Access::of(*description)?);
    }
    let (reads, writes) = (accesses.iter().any(|end| end.reads()), accesses.iter().any(|end| end.writes()));
    let Some(first) = descriptions.first().filter(|_| reads != writes) else { return Ok(false) };
    let mut fds = [PollFd::new(*first, PollFlags::POLLIN | PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let gone = if reads { PollFlags::POLLHUP } else { PollFlags::POLLERR };
    Ok(!fds[0].revents().unwrap_or(PollFlags::empty()).intersects(gone))
}

impl Pipe {
    /// Reads the pipe that all of `descriptions` are of: every one that there is inside.
    ///
    /// # Errors
    /// The kernel's word; `InvalidInput` for no description.
    pub fn read(descriptions: &[BorrowedFd<'_>], spare: &Spare) -> io::Result<Self> {
        let first = *descriptions.first().ok_or(io::ErrorKind::InvalidInput)?;
        let (mut ends, mut packets) = (Vec::with_capacity(descriptions.len()), false);
        for description in descriptions {
            let end = Access::of(*description)?;
            packets |= end.writes() && fcntl(*description, FcntlArg::F_GETFL)? & libc::O_DIRECT != 0;
            ends.push(end);
        }
        let readable = descriptions.iter().zip(&ends).find(|(_, end)| end.reads());
        let end = readable.map_or(first, |(description, _)| *description);
        let capacity_bytes = usize::try_from(fcntl(first, FcntlArg::F_GETPIPE_SZ)?).map_err(io::Error::other)?;
        let content = read_content(end, spare, packets)?;
        Ok(Self { capacity_bytes, content, ends, permissions: Permissions::of(first)? })
    }

    /// Makes another one with the same content: its descriptions, in the order in which they were read.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self) -> io::Result<Vec<OwnedFd>> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        self.fill(write.as_fd())?;
        self.permissions.set(read.as_fd())?;
        for end in [&read, &write] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::empty()))?;
        }
        let mut made: Vec<Option<OwnedFd>> = Vec::with_capacity(self.ends.len());
        let first = |access| self.ends.iter().position(|end| *end == access);
        let (first_read, first_write) = (first(Access::Read), first(Access::Write));
        for (i, end) in self.ends.iter().enumerate() {
            let is_first = [first_read, first_write].contains(&Some(i));
            let more = || {
                // Opening for reading only waits for a writer.
                let opened = reopen(read.as_fd(), end.flag() | OFlag::O_NONBLOCK)?;
                fcntl(&opened, FcntlArg::F_SETFL(OFlag::empty()))?;
                Ok::<_, io::Error>(opened)
            };
            made.push((!is_first).then(more).transpose()?);
        }
        let (mut read, mut write) = (Some(read), Some(write));
        let ends = made.into_iter().zip(&self.ends);
        let ends = ends
            .filter_map(|(made, end)| made.or_else(|| if *end == Access::Read { read.take() } else { write.take() }));
        Ok(ends.collect())
    }

    /// Gives an empty pipe, by an end for writing that does not block, the size and content of this one. It must have a
    /// reader. Its packet mode is off afterwards.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn fill(&self, end: BorrowedFd<'_>) -> io::Result<()> {
        // What was spliced into it may be more than fits when written.
        let slots = |piece: &Piece| if piece.is_packet { 1 } else { piece.bytes.len().div_ceil(PAGE_BYTES) };
        let needed_bytes = self.content.iter().map(slots).sum::<usize>() * PAGE_BYTES;
        let capacity = i32::try_from(self.capacity_bytes.max(needed_bytes)).map_err(io::Error::other)?;
        if capacity != fcntl(end, FcntlArg::F_GETPIPE_SZ)? {
            fcntl(end, FcntlArg::F_SETPIPE_SZ(capacity))?;
        }
        let mut is_packet = false;
        for piece in &self.content {
            if piece.is_packet != is_packet {
                is_packet = piece.is_packet;
                set_packets(end, is_packet)?;
            }
            let written = nix::unistd::write(end, &piece.bytes)?;
            if written != piece.bytes.len() {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        if is_packet { set_packets(end, false) } else { Ok(()) }
    }

    /// Its ends, one for each description.
    pub fn ends(&self) -> &[Access] {
        &self.ends
    }

    /// Bytes in it.
    pub fn len_bytes(&self) -> usize {
        self.content.iter().map(|piece| piece.bytes.len()).sum()
    }
}

/// Of a buffer.
const PAGE_BYTES: usize = 4096;

fn set_packets(end: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, on);
    Ok(fcntl(end, FcntlArg::F_SETFL(flags)).map(drop)?)
}

fn read_content(end: BorrowedFd<'_>, spare: &Spare, packets: bool) -> io::Result<Vec<Piece>> {
    let n = n_readable(end)?;
    if n == 0 {
        return Ok(Vec::new());
    }
    spare.take(end)?;
    let mut bytes = vec![0; n];
    spare.read(&mut bytes[..1])?;
    let begins_plain = n_readable(spare.read.as_fd())? == n - 1;
    // A read that ends before the content does has met a packet.
    if begins_plain && !packets && spare.read(&mut bytes[1..])? == n - 1 {
        return Ok(vec![Piece { is_packet: false, bytes }]);
    }
    read_pieces(end, spare, packets, n)
}

/// Where packets may be.
fn read_pieces(end: BorrowedFd<'_>, spare: &Spare, packets: bool, n: usize) -> io::Result<Vec<Piece>> {
    // Each read of everything ends with a packet, or with the content.
    spare.take(end)?;
    let (mut bytes, mut ends, mut read) = (vec![0; n], Vec::new(), 0);
    while read < n {
        match spare.read(&mut bytes[read..])? {
            0 => break,
            more => read += more,
        }
        ends.push(read);
    }
    bytes.truncate(read);
    // A read of one byte takes all of a packet.
    spare.take(end)?;
    let (mut pieces, mut at): (Vec<Piece>, usize) = (Vec::new(), 0);
    let mut left = n_readable(spare.read.as_fd())?;
    while at < bytes.len() && spare.read(&mut [0])? > 0 {
        let left_now = n_readable(spare.read.as_fd())?;
        let next = at + (left - left_now);
        left = left_now;
        let piece = bytes.get(at..next).ok_or(io::ErrorKind::InvalidData)?;
        let is_end = ends.contains(&next);
        let is_packet = piece.len() > 1 || is_end && (packets || next < bytes.len());
        match pieces.last_mut().filter(|last| !last.is_packet && !is_packet) {
            Some(last) => last.bytes.extend(piece),
            None => pieces.push(Piece { is_packet, bytes: piece.to_vec() }),
        }
        at = next;
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use nix::unistd::{read, write};

    use super::*;

    fn pipe(flags: OFlag) -> (OwnedFd, OwnedFd) {
        pipe2(flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap()
    }

    fn record(ends: &[&OwnedFd]) -> Pipe {
        let fds: Vec<_> = ends.iter().map(|end| end.as_fd()).collect();
        Pipe::read(&fds, &Spare::new().unwrap()).unwrap()
    }

    /// Waits until the other end is closed: a child of another test has it until its exec.
    fn is_left_alone(end: &OwnedFd, flag: PollFlags) -> bool {
        let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::from(5000_u16)).unwrap();
        fds[0].revents().unwrap().contains(flag)
    }

    fn unblocked(end: &OwnedFd) -> &OwnedFd {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        end
    }

    /// What reads of `n` bytes give, to the end or until it would block.
    fn reads(end: &OwnedFd, n: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = vec![0; n];
        while let Ok(n @ 1..) = read(unblocked(end), &mut buffer) {
            all.push(buffer[..n].to_vec());
        }
        all
    }

    #[test]
    fn content_stays_where_it_is_and_is_in_the_new_one_too() {
        let (r, w) = pipe(OFlag::empty());
        write(&w, b"hello ").unwrap();
        write(&w, b"world").unwrap();
        let record = record(&[&r, &w]);
        assert_eq!(reads(&r, 100), [b"hello world"]);
        let made = record.make().unwrap();
        assert_eq!(made.len(), 2);
        assert_eq!(reads(&made[0], 4), [&b"hell"[..], b"o wo", b"rld"]);
        write(&made[1], b"more").unwrap();
        assert_eq!(reads(&made[0], 100), [b"more"]);
    }

    #[test]
    fn a_new_pipe_blocks_unless_its_settings_say_otherwise() {
        let (r, w) = pipe(OFlag::O_DIRECT);
        let made = record(&[&w, &r]).make().unwrap();
        let flags = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_GETFL).unwrap();
        assert_eq!((flags(&made[0]), flags(&made[1])), (libc::O_WRONLY, libc::O_RDONLY));
    }

    #[test]
    fn a_full_megabyte_comes_back() {
        let (r, w) = pipe(OFlag::empty());
        fcntl(&w, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
        let all: Vec<u8> = (0..1_u32 << 20).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        assert_eq!(write(&w, &all).unwrap(), 1 << 20);
        let record = record(&[&r, &w]);
        assert_eq!(record.len_bytes(), 1 << 20);
        let made = record.make().unwrap();
        assert_eq!(fcntl(&made[0], FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 20);
        assert_eq!(write(unblocked(&made[1]), b"x"), Err(Errno::EAGAIN));
        assert!(reads(&made[0], 1 << 20).concat() == all);
        assert!(reads(&r, 1 << 20).concat() == all);
    }

    #[test]
    fn sizes_other_than_the_usual_are_kept() {
        for size in [4096, 8192, 1 << 18] {
            let (r, w) = pipe(OFlag::empty());
            fcntl(&w, FcntlArg::F_SETPIPE_SZ(size)).unwrap();
            let made = record(&[&r, &w]).make().unwrap();
            assert_eq!(fcntl(&made[0], FcntlArg::F_GETPIPE_SZ).unwrap(), size);
            assert!(reads(&made[0], 10).is_empty());
        }
    }

    #[test]
    fn packets_keep_their_ends() {
        let (r, w) = pipe(OFlag::O_DIRECT);
        let packets = [&b"one"[..], b"x", b"y", b"fourth", b"z"];
        for packet in packets {
            write(&w, packet).unwrap();
        }
        let record = record(&[&r, &w]);
        assert_eq!(reads(&r, 100), packets);
        let made = record.make().unwrap();
        // As read with little room: the rest of a packet is lost.
        assert_eq!(reads(&made[0], 2), [&b"on"[..], b"x", b"y", b"fo", b"z"]);
        assert_eq!(reads(&record.make().unwrap()[0], 100), packets);
    }

    #[test]
    fn packets_of_a_writer_that_is_gone_and_bytes_before_them_are_told_apart() {
        let (r, w) = pipe(OFlag::empty());
        // A page: what is written behind less is appended to it, in packet mode too.
        let plain = [b'a'; PAGE_BYTES];
        write(&w, &plain).unwrap();
        fcntl(&w, FcntlArg::F_SETFL(OFlag::O_DIRECT)).unwrap();
        write(&w, b"packet").unwrap();
        write(&w, b"p").unwrap();
        fcntl(&w, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        write(&w, b"tail").unwrap();
        drop(w);
        let record = record(&[&r]);
        let piece = |is_packet, bytes: &[u8]| Piece { is_packet, bytes: bytes.to_vec() };
        let all = [piece(false, &plain), piece(true, b"packet"), piece(true, b"p"), piece(false, b"tail")];
        assert_eq!(record.content, all);
        let made = record.make().unwrap();
        assert_eq!(reads(&made[0], 4099), reads(&r, 4099));
    }

    #[test]
    fn without_writers_it_ends_after_its_content() {
        let (r, w) = pipe(OFlag::empty());
        write(&w, b"last").unwrap();
        drop(w);
        let made = record(&[&r]).make().unwrap();
        assert_eq!(made.len(), 1);
        let mut buffer = [0; 10];
        assert_eq!(read(&made[0], &mut buffer), Ok(4));
        assert_eq!(read(&made[0], &mut buffer), Ok(0));
    }

    #[test]
    fn without_readers_it_breaks_but_has_its_content() {
        let (r, w) = pipe(OFlag::empty());
        write(&w, b"unread").unwrap();
        drop(r);
        let record = record(&[&w]);
        assert!(is_left_alone(&w, PollFlags::POLLERR), "the look left a reader");
        let made = record.make().unwrap();
        assert!(is_left_alone(&made[0], PollFlags::POLLERR), "a reader was left");
        assert_eq!(write(&made[0], b"x"), Err(Errno::EPIPE));
        let late = reopen(made[0].as_fd(), OFlag::O_RDONLY).unwrap();
        assert_eq!(reads(&late, 100), [b"unread"]);
    }

    #[test]
    fn every_description_of_an_end_comes_back() {
        let (r, w) = pipe(OFlag::empty());
        let second = reopen(w.as_fd(), OFlag::O_WRONLY).unwrap();
        let both = reopen(w.as_fd(), OFlag::O_RDWR).unwrap();
        write(&second, b"x").unwrap();
        let record = record(&[&second, &both, &r, &w]);
        assert_eq!(record.ends(), [Access::Write, Access::Both, Access::Read, Access::Write]);
        let mut made = record.make().unwrap();
        assert_eq!(made.len(), 4);
        fcntl(&made[0], FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let flags = fcntl(&made[3], FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & libc::O_NONBLOCK, 0, "they share a description");
        write(&made[3], b"y").unwrap();
        assert_eq!(reads(&made[1], 9), [b"xy"]);
        let r = made.remove(2);
        drop(made);
        assert_eq!(read(&r, &mut [0; 1]), Ok(0), "a writer was left");
    }

    #[test]
    fn who_may_open_it_once_more_stays_the_same() {
        let (r, w) = pipe(OFlag::empty());
        let wanted = Permissions::of(r.as_fd()).unwrap();
        nix::unistd::fchown(&r, Some(nix::unistd::Uid::from_raw(1000)), Some(nix::unistd::Gid::from_raw(5))).unwrap();
        let record = record(&[&r, &w]);
        assert_ne!(record.permissions, wanted);
        let made = record.make().unwrap();
        assert_eq!(Permissions::of(made[1].as_fd()).unwrap(), record.permissions);
    }

    #[test]
    fn an_end_elsewhere_is_noticed() {
        let (r, w) = pipe(OFlag::empty());
        assert!(leads_out(&[r.as_fd()]).unwrap() && leads_out(&[w.as_fd()]).unwrap());
        assert!(!leads_out(&[r.as_fd(), w.as_fd()]).unwrap());
        drop(w);
        assert!(is_left_alone(&r, PollFlags::POLLHUP));
        assert!(!leads_out(&[r.as_fd()]).unwrap());
        let (r, w) = pipe(OFlag::empty());
        drop(r);
        assert!(is_left_alone(&w, PollFlags::POLLERR));
        assert!(!leads_out(&[w.as_fd()]).unwrap());
    }

    #[test]
    fn what_was_spliced_in_comes_back_even_if_it_is_more_than_fits() {
        let (mut a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let all = vec![7_u8; 60_000];
        std::io::Write::write_all(&mut a, &all).unwrap();
        let (r, w) = pipe(OFlag::empty());
        fcntl(&w, FcntlArg::F_SETPIPE_SZ(4096 * 2)).unwrap();
        let n = nix::fcntl::splice(&b, None, &w, None, 60_000, SpliceFFlags::SPLICE_F_NONBLOCK).unwrap();
        let record = record(&[&r, &w]);
        assert_eq!(record.len_bytes(), n);
        assert_eq!(reads(&record.make().unwrap()[0], 1 << 20).concat(), all[..n]);
    }

    #[test]
    fn a_fifo_is_filled_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["old", "new"] {
            nix::unistd::mkfifo(&path(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        let both = |name| {
            let mut options = std::fs::File::options();
            let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path(name)).unwrap();
            OwnedFd::from(file)
        };
        let (old, new) = (both("old"), both("new"));
        fcntl(&old, FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
        write(&old, b"in a fifo").unwrap();
        record(&[&old]).fill(new.as_fd()).unwrap();
        assert_eq!(fcntl(&new, FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
        assert_eq!(reads(&new, 100), [b"in a fifo"]);
    }
}
