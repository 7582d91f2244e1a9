//! Giving processes what was opened for them: descriptors in their places, working directories, mappings, locks.
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

use super::find::is_over;
use super::gifts::{FCHDIR, Gift, LastCall, Use, call, gifts, last_calls, needs_work, number, unsigned};
use super::open::{Opened, file_error};
use super::{Description, Kind, Plan, RebaseError, RebaseRefusal, Seat};
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::stop::Stopped;
use crate::sandbox::root::Namespace;
use crate::sys::fs::chmod;
use crate::sys::process::{descriptor_limit, pidfd_getfd};
use crate::sys::socket::send_with_fds;
use crate::sys::stat::stat;

/// Descriptors per message: two calls each fit into one batch of 128.
const N_PER_MESSAGE: usize = 60;

/// Of a listener that was made again (chosen: the kernel cuts it to net.core.somaxconn; the old one's is not told).
const BACKLOG: u64 = 4096;

// Where things lie in the hand's scratch memory.
const PAIR: u64 = 0;
const HEADER: u64 = 64;
const VECTOR: u64 = HEADER + 64;
const BYTE: u64 = 144;
const CONTROL: u64 = 256;
const ARGUMENTS: u64 = 4096;

impl Opened {
    /// Gives everything to the processes, then lets go of the old descriptions.
    ///
    /// # Errors
    /// Processes up to some have what is new, the others have not.
    pub fn commit(&mut self, stopped: &mut Stopped, namespace: &Namespace) -> Result<(), RebaseError> {
        let Self { plan: Plan { seats, descriptions }, tables } = self;
        for seat in seats.iter() {
            if !needs_work(seat, descriptions) {
                continue;
            }
            crate::fault::point("rebase.give").map_err(|source| RebaseError::Process {
                op: "give descriptors",
                pid: seat.pid,
                source,
            })?;
            match serve(stopped, seat, descriptions, namespace) {
                // Killed meanwhile: it needs nothing any more.
                Err(_) if is_over(seat.pid) => {}
                other => other?,
            }
        }
        // Closed before events are taken out: closing makes some.
        tables.extend(seats.drain(..).map(|seat| seat.table));
        for description in descriptions {
            description.old = None;
            if let (Kind::Watcher(watcher), Some(instance)) = (&mut description.kind, &description.new) {
                let settled = watcher.settle(instance, description.info.flags);
                settled.map_err(|source| file_error("settle", &description.place, source))?;
            }
        }
        Ok(())
    }

    /// Open file descriptions, of all processes together.
    pub fn n_descriptions(&self) -> usize {
        self.plan.descriptions.len()
    }
}

/// All that one process gets.
fn serve(
    stopped: &mut Stopped,
    seat: &Seat,
    descriptions: &mut [Description],
    namespace: &Namespace,
) -> Result<(), RebaseError> {
    let mut session = Session::open(stopped, seat)?;
    for holding in &seat.holdings {
        session.make(&mut descriptions[holding.description], namespace)?;
    }
    match session.give(&gifts(seat, descriptions), &last_calls(seat, descriptions)) {
        Err(RebaseError::Call { call: FCHDIR, source, .. }) if is_denied(&source) => {
            give_denied_directory(stopped, seat)
        }
        given => given,
    }
}

/// A process may be in a directory that it may not enter (any more). fchdir asks the directory alone, so that lets
/// everybody in for a moment, in which nobody runs. All else has been given.
fn give_denied_directory(stopped: &mut Stopped, seat: &Seat) -> Result<(), RebaseError> {
    let failed = |source| RebaseError::Process { op: "change the working directory", pid: seat.pid, source };
    let Some((_, Some(directory))) = &seat.cwd else { return Ok(()) };
    let mode = stat(directory.as_fd()).map_err(failed)?.mode & 0o7777;
    let session = Session::open(stopped, seat)?;
    chmod(directory.as_fd(), mode | 0o111).map_err(failed)?;
    let given = session.give(&[Gift { file: directory.as_fd(), what: Use::WorkingDirectory }], &[]);
    chmod(directory.as_fd(), mode).map_err(failed)?;
    given
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

/// The engine at work in one process.
struct Session<'a> {
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
}

impl<'a> Session<'a> {
    fn open(stopped: &'a mut Stopped, seat: &'a Seat) -> Result<Self, RebaseError> {
        let (pid, tid) = (seat.pid, seat.tid);
        let failed = |op| move |source| RebaseError::Process { op, pid, source };
        let limit = descriptor_limit(tid).map_err(failed("read the limits"))?;
        let free = free_numbers(&seat.numbers, limit, N_PER_MESSAGE + 2);
        if free.len() < 3 {
            return Err(RebaseRefusal::Full { pid, limit }.into());
        }
        let mut hand = stopped.hand(pid)?;
        let scratch = hand.scratch().start;
        let kind = unsigned(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
        let make = call(libc::SYS_socketpair, &[unsigned(libc::AF_UNIX), kind, 0, scratch + PAIR]);
        let mut bytes = [0; 8];
        let made = hand.run_with(&[make], (scratch, &[]), (scratch + PAIR, &mut bytes))?;
        check(pid, "socketpair", made[0])?;
        let pair = [0, 4].map(|at| bytes[at..at + 4].try_into().map_or(-1, i32::from_ne_bytes));
        let task = seat.table.pidfd();
        let socket = pidfd_getfd(task, pair[1]).map_err(failed("copy a descriptor"))?;
        let free = free.into_iter().filter(|number| !pair.contains(number)).collect();
        Ok(Self { hand, pid, pair, paired: true, socket, task, free })
    }

    /// Makes what only a process can make, and the engine's copy of it.
    fn make(&mut self, description: &mut Description, namespace: &Namespace) -> Result<(), RebaseError> {
        if description.new.is_some() {
            return Ok(());
        }
        let Some(old) = &description.old else { return Ok(()) };
        let (place, flags) = (&description.place, description.info.flags);
        match &mut description.kind {
            Kind::File => {}
            Kind::Listener(listener) if !listener.is_there() => {}
            Kind::Listener(listener) => {
                let kind = unsigned(listener.kind as i32 | libc::SOCK_CLOEXEC);
                let (number, new) =
                    self.make_one("socket", call(libc::SYS_socket, &[unsigned(libc::AF_UNIX), kind, 0]))?;
                let taken = listener.take_over(old, &new, place, flags, namespace);
                taken.map_err(|source| file_error("listen again at", place, source))?;
                let listened = self.hand.call(libc::SYS_listen, call(0, &[number, BACKLOG]).args)?;
                check(self.pid, "listen", listened)?;
                self.close(number)?;
                description.new = Some(new);
            }
            Kind::Watcher(watcher) => {
                let flags = unsigned(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
                let (number, new) = self.make_one("inotify_init1", call(libc::SYS_inotify_init1, &[flags]))?;
                watcher.watch(&new).map_err(|source| file_error("watch again with", place, source))?;
                self.close(number)?;
                description.new = Some(new);
            }
        }
        Ok(())
    }

    fn make_one(&mut self, name: &'static str, made: Call) -> Result<(u64, OwnedFd), RebaseError> {
        let result = self.hand.call(made.nr, made.args)?;
        check(self.pid, name, result)?;
        let number = i32::try_from(result).unwrap_or(-1);
        let copied = pidfd_getfd(self.task, number);
        let copy = copied.map_err(|source| RebaseError::Process { op: "copy a descriptor", pid: self.pid, source })?;
        Ok((result.cast_unsigned(), copy))
    }

    fn close(&mut self, number: u64) -> Result<(), RebaseError> {
        let closed = self.hand.call(libc::SYS_close, call(0, &[number]).args)?;
        check(self.pid, "close", closed)
    }

    fn give(mut self, gifts: &[Gift<'_>], last: &[LastCall]) -> Result<(), RebaseError> {
        let mut rest = last;
        let given = self.give_gifts(gifts, &mut rest);
        let ended = self.end(rest);
        self.hand.close()?;
        given.and(ended)
    }

    /// Of `rest`, as many as there is room for come with the last of the gifts.
    fn give_gifts(&mut self, gifts: &[Gift<'_>], rest: &mut &[LastCall]) -> Result<(), RebaseError> {
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

    fn end(&mut self, mut rest: &[LastCall]) -> Result<(), RebaseError> {
        while self.paired || !rest.is_empty() {
            let mut batch = Batch::default();
            self.close_pair(&mut batch);
            rest = self.add_last(rest, &mut batch)?;
            self.run(&batch, &[], &mut [])?;
        }
        Ok(())
    }

    /// Sends files, and adds the calls that receive them and put them to their use; the message's header.
    fn receive(&mut self, gifts: &[Gift<'_>], batch: &mut Batch) -> Result<Vec<u8>, RebaseError> {
        let pid = self.pid;
        let files: Vec<_> = gifts.iter().map(|gift| gift.file).collect();
        send_with_fds(self.socket.as_fd(), &[0], &files).map_err(|source| RebaseError::Process {
            op: "send descriptors to a socket",
            pid,
            source,
        })?;
        let scratch = self.hand.scratch().start;
        let room_bytes = control_bytes(gifts.len()).next_multiple_of(8) as u64;
        let header = [0, 0, scratch + VECTOR, 1, scratch + CONTROL, room_bytes, 0, 0, scratch + BYTE, 1];
        let flags = unsigned(libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT);
        batch.add("recvmsg", call(libc::SYS_recvmsg, &[number(self.pair[0]), scratch + HEADER, flags]));
        for (gift, received) in gifts.iter().zip(&self.free) {
            let (call, name) = gift.what.call(*received);
            batch.add(name, call);
        }
        for (first, last) in runs(&self.free[..gifts.len()]) {
            batch.add("close_range", call(libc::SYS_close_range, &[number(first), number(last), 0]));
        }
        Ok(words(&header))
    }

    /// Numbers that are not those foreseen would have shown as EBADF, or show here.
    fn check_received(&self, control: &[u8], n: usize) -> Result<(), RebaseError> {
        let received = control[16..].chunks_exact(4).map(|four| four.try_into().map_or(-1, i32::from_ne_bytes));
        if received.eq(self.free[..n].iter().copied()) {
            Ok(())
        } else {
            let source = io::Error::other("descriptors arrived under other numbers than foreseen");
            Err(RebaseError::Call { call: "recvmsg", pid: self.pid, source })
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
    fn add_last<'l>(&self, last: &'l [LastCall], batch: &mut Batch) -> Result<&'l [LastCall], RebaseError> {
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
    fn run(&mut self, batch: &Batch, header: &[u8], control: &mut [u8]) -> Result<(), RebaseError> {
        let scratch = self.hand.scratch().start;
        let results = self.hand.run_with(&batch.calls, (scratch + HEADER, header), (scratch + CONTROL, control))?;
        // That of the directory last: whoever mends it must know that all others are right.
        let (directory, others): (Vec<_>, Vec<_>) =
            results.iter().zip(&batch.names).partition(|(_, name)| **name == FCHDIR);
        others.into_iter().chain(directory).try_for_each(|(result, name)| check(self.pid, name, *result))
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

fn check(pid: pid_t, call: &'static str, result: i64) -> Result<(), RebaseError> {
    if !(-4095..0).contains(&result) {
        return Ok(());
    }
    let errno = i32::try_from(-result).unwrap_or(libc::EIO);
    Err(RebaseError::Call { call, pid, source: io::Error::from_raw_os_error(errno) })
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
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
