//! Files from the engine's hands into a stopped process: descriptors in their places, mappings, working directories.
//!
//! ```text
//! process                                     engine
//! socketpair(a, b) ------------------------>  pidfd_getfd(b)
//!                                             sendmsg(up to 60 descriptors)
//! one batch: recvmsg(a); dup3, mmap, fchdir; close_range
//! ... until all are there; with the last:
//!            close(a), close(b); locks; epoll
//! ```
//! recvmsg takes the lowest free numbers, and nothing else runs, so the engine knows them before it writes the batch.
//! Locks of the process come last: closing any descriptor of a file would take them away.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::pid_t;

use super::error::InjectError;
use super::inject::{Call, Hand};
use super::stop::Stopped;
use crate::sys::fs::chmod;
use crate::sys::process::{descriptor_limits, pidfd_getfd};
use crate::sys::socket::send_with_fds;
use crate::sys::stat::stat;

/// Descriptors per message: two calls each fit into one batch of 128.
const N_PER_MESSAGE: usize = 60;

/// Free numbers that it takes: both ends of the socket, and what arrives.
const LEAST_ROOM: usize = 3;

// Where things lie in the hand's scratch memory.
const PAIR: u64 = 0;
const HEADER: u64 = 64;
const VECTOR: u64 = HEADER + 64;
const BYTE: u64 = 144;
const CONTROL: u64 = 256;
const LIMITS: u64 = 1024;
const ARGUMENTS: u64 = 4096;

/// Why a process did not get what it should.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// It has no room for the two or three more descriptors that it takes.
    #[error("process {pid} has all descriptors open that its limit of {limit} allows")]
    Full {
        /// The process.
        pid: pid_t,
        /// RLIMIT_NOFILE.
        limit: u64,
    },
    /// It has a descriptor that even its hard limit does not allow any more.
    #[error("process {pid} has descriptor {number} open, which its limit of {limit} does not allow any more")]
    Beyond {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// RLIMIT_NOFILE, the hard one.
        limit: u64,
    },
    /// A step outside of it failed.
    #[error("{op} of process {pid}: {source}")]
    Process {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// A call inside it failed.
    #[error("{call} in process {pid}: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// No call could be made inside it.
    #[error(transparent)]
    Inject(#[from] InjectError),
}

impl HandoverError {
    /// Whether something about the process stands in the way, and no failure of the machine.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Beyond { .. } | Self::Inject(InjectError::Refused(_)))
    }

    /// Whether the process may not enter its working directory: all else has been given.
    pub(super) fn is_denied_directory(&self) -> bool {
        matches!(self, Self::Call { call: FCHDIR, source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// Who receives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receiver<'a> {
    pub(super) pid: pid_t,
    /// Its first thread.
    pub(super) tid: pid_t,
    /// That thread's pidfd.
    pub(super) task: BorrowedFd<'a>,
    /// All descriptor numbers in use, sorted.
    pub(super) numbers: &'a [i32],
}

const FCHDIR: &str = "fchdir";

/// A descriptor for a process, and what it is for.
pub(super) struct Gift<'a> {
    pub(super) file: BorrowedFd<'a>,
    pub(super) what: Use,
}

#[derive(Clone, Copy)]
pub(super) enum Use {
    Descriptor { number: i32, flags: i32 },
    WorkingDirectory,
    Mapping { start: u64, len_bytes: u64, protection: u64, flags: u64, offset_bytes: u64 },
}

/// Sets RLIMIT_NOFILE of the process itself to what lies at `at`.
fn limit_call(at: u64) -> Call {
    call(libc::SYS_prlimit64, &[0, libc::RLIMIT_NOFILE.into(), at, 0])
}

impl Use {
    /// Whether it is for a number that was open already when the limit was lowered below it.
    fn is_beyond(self, limit: u64) -> bool {
        matches!(self, Self::Descriptor { number, .. } if u64::try_from(number).is_ok_and(|number| number >= limit))
    }

    /// The call that puts descriptor `received` to its use, and its name.
    pub(super) fn call(self, received: i32) -> (Call, &'static str) {
        let received = number(received);
        match self {
            Self::Descriptor { number: to, flags } => {
                (call(libc::SYS_dup3, &[received, number(to), unsigned(flags)]), "dup3")
            }
            Self::WorkingDirectory => (call(libc::SYS_fchdir, &[received]), FCHDIR),
            Self::Mapping { start, len_bytes, protection, flags, offset_bytes } => {
                let args = [start, len_bytes, protection, flags, received, offset_bytes];
                (call(libc::SYS_mmap, &args), "mmap")
            }
        }
    }
}

/// A call with the address of bytes in memory as its last argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastCall {
    /// The call's name.
    pub name: &'static str,
    /// Its number.
    pub nr: i64,
    /// Its arguments before that one, at most five.
    pub args: Vec<u64>,
    /// What is to lie at that address.
    pub bytes: Vec<u8>,
}

/// Calls, and the name of each.
#[derive(Default)]
struct Batch {
    calls: Vec<Call>,
    names: Vec<&'static str>,
}

impl Batch {
    fn add(&mut self, name: &'static str, call: Call) {
        self.calls.push(call);
        self.names.push(name);
    }
}

/// Hands a process what it may not enter: after a [`Session::give`] in which that was denied, and all else was given.
///
/// A process may be in a directory that it may not enter (any more). fchdir asks the directory alone, so that lets
/// everybody in for a moment, in which nobody runs.
pub(super) fn give_denied_directory(
    stopped: &mut Stopped,
    receiver: Receiver<'_>,
    gifts: &[Gift<'_>],
) -> Result<(), HandoverError> {
    let failed = |source| HandoverError::Process { op: "change the working directory", pid: receiver.pid, source };
    let Some(gift) = gifts.iter().find(|gift| matches!(gift.what, Use::WorkingDirectory)) else { return Ok(()) };
    let mode = stat(gift.file).map_err(failed)?.mode & 0o7777;
    let session = Session::open(stopped, receiver)?;
    chmod(gift.file, mode | 0o111).map_err(failed)?;
    let given = session.give(&[Gift { file: gift.file, what: Use::WorkingDirectory }], &[]);
    chmod(gift.file, mode).map_err(failed)?;
    given
}

/// The engine at work in one process.
pub(super) struct Session<'a> {
    hand: Hand<'a>,
    pid: pid_t,
    /// Both ends in the process.
    pair: [i32; 2],
    /// They are open.
    paired: bool,
    /// The engine's end.
    socket: OwnedFd,
    task: BorrowedFd<'a>,
    /// Numbers that are free and below the limit, lowest first.
    free: Vec<i32>,
    /// RLIMIT_NOFILE, soft and hard.
    limits: (u64, u64),
}

impl<'a> Session<'a> {
    pub(super) fn open(stopped: &'a mut Stopped, receiver: Receiver<'a>) -> Result<Self, HandoverError> {
        let Receiver { pid, tid, task, numbers } = receiver;
        let failed = |op| move |source| HandoverError::Process { op, pid, source };
        let (limit, hard) = descriptor_limits(tid).map_err(failed("read the limits"))?;
        let free = free_numbers(numbers, limit, N_PER_MESSAGE + 2);
        if free.len() < LEAST_ROOM {
            return Err(HandoverError::Full { pid, limit });
        }
        let mut hand = stopped.hand(pid)?;
        let scratch = hand.scratch().start;
        let kind = unsigned(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
        let make = call(libc::SYS_socketpair, &[unsigned(libc::AF_UNIX), kind, 0, scratch + PAIR]);
        let mut bytes = [0; 8];
        let made = hand.run_with(&[make], (scratch, &[]), (scratch + PAIR, &mut bytes))?;
        check(pid, "socketpair", made[0])?;
        let pair = [0, 4].map(|at| bytes[at..at + 4].try_into().map_or(-1, i32::from_ne_bytes));
        let socket = pidfd_getfd(task, pair[1]).map_err(failed("copy a descriptor"))?;
        let free = free.into_iter().filter(|number| !pair.contains(number)).collect();
        Ok(Self { hand, pid, pair, paired: true, socket, task, free, limits: (limit, hard) })
    }

    /// Has the process make a descriptor; its number, and the engine's copy.
    pub(super) fn make_one(&mut self, name: &'static str, made: Call) -> Result<(u64, OwnedFd), HandoverError> {
        let result = self.hand.call(made.nr, made.args)?;
        check(self.pid, name, result)?;
        let number = i32::try_from(result).unwrap_or(-1);
        let copied = pidfd_getfd(self.task, number);
        let copy =
            copied.map_err(|source| HandoverError::Process { op: "copy a descriptor", pid: self.pid, source })?;
        Ok((result.cast_unsigned(), copy))
    }

    /// One call.
    pub(super) fn call(&mut self, name: &'static str, made: Call) -> Result<(), HandoverError> {
        let result = self.hand.call(made.nr, made.args)?;
        check(self.pid, name, result)
    }

    /// Closes a descriptor of the process.
    pub(super) fn close(&mut self, number: u64) -> Result<(), HandoverError> {
        self.call("close", call(libc::SYS_close, &[number]))
    }

    /// Hands over `gifts`, then makes the calls of `last`.
    pub(super) fn give(mut self, gifts: &[Gift<'_>], last: &[LastCall]) -> Result<(), HandoverError> {
        let mut rest = last;
        let given = self.give_gifts(gifts, &mut rest);
        let ended = self.end(rest);
        self.hand.close()?;
        given.and(ended)
    }

    /// Of `rest`, as many as there is room for come with the last of the gifts.
    fn give_gifts(&mut self, gifts: &[Gift<'_>], rest: &mut &[LastCall]) -> Result<(), HandoverError> {
        let mut chunks = gifts.chunks(self.free.len().min(N_PER_MESSAGE)).peekable();
        while let Some(some) = chunks.next() {
            let mut batch = Batch::default();
            let header = self.receive(some, &mut batch)?;
            if chunks.peek().is_none() {
                self.close_pair(&mut batch);
                *rest = self.add_last(rest, &mut batch)?;
            }
            let mut control = vec![0; control_bytes(some.len())];
            self.run(&batch, &header, &mut control)?;
            self.check_received(&control, some.len())?;
        }
        Ok(())
    }

    fn end(&mut self, mut rest: &[LastCall]) -> Result<(), HandoverError> {
        while self.paired || !rest.is_empty() {
            let mut batch = Batch::default();
            self.close_pair(&mut batch);
            rest = self.add_last(rest, &mut batch)?;
            self.run(&batch, &[], &mut [])?;
        }
        Ok(())
    }

    /// Sends files, and adds the calls that receive them and put them to their use; the message's header.
    fn receive(&mut self, gifts: &[Gift<'_>], batch: &mut Batch) -> Result<Vec<u8>, HandoverError> {
        let pid = self.pid;
        let files: Vec<_> = gifts.iter().map(|gift| gift.file).collect();
        send_with_fds(self.socket.as_fd(), &[0], &files).map_err(|source| HandoverError::Process {
            op: "send descriptors to a socket",
            pid,
            source,
        })?;
        let scratch = self.hand.scratch().start;
        let room_bytes = control_bytes(gifts.len()).next_multiple_of(8) as u64;
        let header = [0, 0, scratch + VECTOR, 1, scratch + CONTROL, room_bytes, 0, 0, scratch + BYTE, 1];
        let flags = unsigned(libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT);
        batch.add("recvmsg", call(libc::SYS_recvmsg, &[number(self.pair[0]), scratch + HEADER, flags]));
        let is_beyond = gifts.iter().any(|gift| gift.what.is_beyond(self.limits.0));
        if is_beyond {
            let (soft, hard) = self.limits;
            self.hand.write(scratch + LIMITS, &words(&[hard, hard, soft, hard]))?;
            batch.add("prlimit64", limit_call(scratch + LIMITS));
        }
        for (gift, received) in gifts.iter().zip(&self.free) {
            let (call, name) = gift.what.call(*received);
            batch.add(name, call);
        }
        if is_beyond {
            batch.add("prlimit64", limit_call(scratch + LIMITS + 16));
        }
        for (first, last) in runs(&self.free[..gifts.len()]) {
            batch.add("close_range", call(libc::SYS_close_range, &[number(first), number(last), 0]));
        }
        Ok(words(&header))
    }

    /// Numbers that are not those foreseen would have shown as EBADF, or show here.
    fn check_received(&self, control: &[u8], n: usize) -> Result<(), HandoverError> {
        let received = control[16..].chunks_exact(4).map(|four| four.try_into().map_or(-1, i32::from_ne_bytes));
        if received.eq(self.free[..n].iter().copied()) {
            Ok(())
        } else {
            let source = io::Error::other("descriptors arrived under other numbers than foreseen");
            Err(HandoverError::Call { call: "recvmsg", pid: self.pid, source })
        }
    }

    fn close_pair(&mut self, batch: &mut Batch) {
        if std::mem::take(&mut self.paired) {
            for end in self.pair {
                batch.add("close", call(libc::SYS_close, &[number(end)]));
            }
        }
    }

    /// As many as there is room for what they point to; the rest.
    fn add_last<'l>(&self, last: &'l [LastCall], batch: &mut Batch) -> Result<&'l [LastCall], HandoverError> {
        let memory = self.hand.scratch().start + ARGUMENTS..self.hand.scratch().end;
        let (mut bytes, mut n) = (Vec::new(), 0);
        for one in last {
            let at = memory.start + bytes.len() as u64;
            if at + one.bytes.len() as u64 > memory.end {
                break;
            }
            bytes.extend(&one.bytes);
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            batch.add(one.name, call(one.nr, &[one.args.as_slice(), &[at]].concat()));
            n += 1;
        }
        if n > 0 {
            self.hand.write(memory.start, &bytes)?;
        }
        Ok(&last[n..])
    }

    /// Makes the calls with a message's header and room for its control data, and looks at what came of them.
    fn run(&mut self, batch: &Batch, header: &[u8], control: &mut [u8]) -> Result<(), HandoverError> {
        let scratch = self.hand.scratch().start;
        let results = self.hand.run_with(&batch.calls, (scratch + HEADER, header), (scratch + CONTROL, control))?;
        // That of the directory last: whoever mends it must know that all others are right.
        let (directory, others): (Vec<_>, Vec<_>) =
            results.iter().zip(&batch.names).partition(|(_, name)| **name == FCHDIR);
        others.into_iter().chain(directory).try_for_each(|(result, name)| check(self.pid, name, *result))
    }
}

/// Fails unless a process with descriptors `numbers`, sorted, can be handed others, and those themselves.
pub(super) fn check_room(pid: pid_t, tid: pid_t, numbers: &[i32]) -> Result<(), HandoverError> {
    let failed = |source| HandoverError::Process { op: "read the limits", pid, source };
    let (limit, hard) = descriptor_limits(tid).map_err(failed)?;
    if let Some(last) = numbers.last().filter(|last| u64::try_from(**last).is_ok_and(|last| last >= hard)) {
        return Err(HandoverError::Beyond { pid, number: *last, limit: hard });
    }
    match free_numbers(numbers, limit, LEAST_ROOM).len() < LEAST_ROOM {
        true => Err(HandoverError::Full { pid, limit }),
        false => Ok(()),
    }
}

/// Of a message with `n` descriptors (cmsg(3)): its header, and they.
fn control_bytes(n: usize) -> usize {
    16 + 4 * n
}

/// The lowest `n` numbers that are not in use, below the limit.
fn free_numbers(used: &[i32], limit: u64, n: usize) -> Vec<i32> {
    let limit = i32::try_from(limit).unwrap_or(i32::MAX);
    let mut used = used.iter().copied().peekable();
    let is_free = |number: &i32| used.next_if_eq(number).is_none();
    (0..limit).filter(is_free).take(n).collect()
}

/// Runs of neighbours in a sorted list, first and last of each.
fn runs(numbers: &[i32]) -> Vec<(i32, i32)> {
    let mut runs: Vec<(i32, i32)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    runs
}

pub(super) fn check(pid: pid_t, call: &'static str, result: i64) -> Result<(), HandoverError> {
    if !(-4095..0).contains(&result) {
        return Ok(());
    }
    let errno = i32::try_from(-result).unwrap_or(libc::EIO);
    Err(HandoverError::Call { call, pid, source: io::Error::from_raw_os_error(errno) })
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A call with up to six arguments.
pub(super) fn call(nr: i64, args: &[u64]) -> Call {
    let mut six = [0; 6];
    six[..args.len()].copy_from_slice(args);
    Call { nr, args: six }
}

/// An argument as the kernel takes it.
pub(super) fn number(fd: i32) -> u64 {
    i64::from(fd).cast_unsigned()
}

pub(super) fn unsigned(flags: i32) -> u64 {
    flags.cast_unsigned().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_numbers_are_the_lowest_and_below_the_limit() {
        assert_eq!(free_numbers(&[0, 1, 2, 5], 100, 4), [3, 4, 6, 7]);
        assert_eq!(free_numbers(&[], 2, 4), [0, 1]);
        assert_eq!(free_numbers(&[0, 1, 200], 3, 4), [2]);
    }

    #[test]
    fn neighbours_are_closed_together() {
        assert_eq!(runs(&[3, 4, 6, 7, 8, 20]), [(3, 4), (6, 8), (20, 20)]);
        assert_eq!(runs(&[]), []);
    }
}
