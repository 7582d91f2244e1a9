//! Numbers of processes that no program of a sandbox has: for the templates, and what helps to make them.
//!
//! ```text
//! 1 ............... PROGRAMS_END ................................. END
//!   programs         | helper, template | helper, template | ...
//!   pid_max of the namespace ^          raised to ^ while all programs stand still
//! ```
//! The kernel gives a number once at a time, so one that is taken is refused (EEXIST), and the next pair is tried. Given
//! are ever higher ones, from the beginning again at the end: a number is not used again soon after its process is gone.
//!
//! A process that has the right chooses the numbers of what it makes. Another one gets the next that is free; which that is
//! init sets for it (`init/src/numbers.rs`).
//!
//! The engine dies while `pid_max` is raised: programs get numbers from where they had got to, far below, until init has
//! put it back, which it does when its connection ends. But for the time in which such another process makes a template.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libc::pid_t;

/// Programs have numbers below this.
pub const PROGRAMS_END: pid_t = 1 << 20;
/// All numbers are below this (`PID_MAX_LIMIT` of the kernel on 64 bits).
const END: pid_t = 1 << 22;
/// How far to go on at once at most (a third of all).
const LONGEST_STRIDE: pid_t = 1 << 20;
/// How long init may take to answer (chosen: it only ever blocks in poll, but may be in the middle of a kill of everyone).
const PATIENCE: Duration = Duration::from_secs(2);

/// Those of one sandbox.
#[derive(Debug)]
pub struct Reserve {
    /// Of the sandbox's PID namespace, opened inside.
    pid_max: File,
    line: Mutex<Line>,
}

/// The socket to init, and what is known of numbers.
#[derive(Debug)]
struct Line {
    socket: UnixStream,
    /// To be given next.
    next: pid_t,
    /// How far to go on if that is taken.
    stride: pid_t,
}

/// Two numbers that belong together, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The lower one.
    pub first: pid_t,
    /// The higher one.
    pub second: pid_t,
}

impl Reserve {
    /// From what init gives with `Ready` and `ListEnd`. `pid_max` is what it is to be afterwards.
    ///
    /// # Errors
    /// Those are not what init gives, or `pid_max` cannot be set.
    pub fn new(fds: Vec<OwnedFd>) -> io::Result<Self> {
        let Ok([pid_max, socket]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "init gave no hold of its namespace's numbers"));
        };
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(PATIENCE))?;
        let line = Mutex::new(Line { socket, next: PROGRAMS_END, stride: 2 });
        let reserve = Self { pid_max: pid_max.into(), line };
        reserve.set(PROGRAMS_END)?;
        Ok(reserve)
    }

    /// A number is taken: those after it are given first.
    pub fn keep_clear_of(&self, number: pid_t) {
        let mut line = self.lock();
        if number >= line.next && number < END {
            line.next = (number + 2) & !1;
        }
    }

    /// Lets the numbers be taken as long as the guard lives. All programs must stand still.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn open(&self) -> io::Result<Opened<'_>> {
        self.set(END)?;
        Ok(Opened { reserve: self, programs: Mutex::new(None) })
    }

    fn set(&self, pid_max: pid_t) -> io::Result<()> {
        // Of a sysctl only what is written at its beginning counts.
        self.pid_max.write_all_at(pid_max.to_string().as_bytes(), 0)
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time in which numbers can be taken. Dropped: programs get theirs.
#[derive(Debug)]
pub struct Opened<'a> {
    reserve: &'a Reserve,
    /// The number that a program would have got next, once that was changed.
    programs: Mutex<Option<pid_t>>,
}

impl Opened<'_> {
    /// The next two, to be chosen by who has the right.
    pub fn take(&self) -> Pair {
        let mut line = self.reserve.lock();
        let pair = line.take();
        line.stride = 2;
        pair
    }

    /// The same when the last two were not free.
    pub fn take_another(&self) -> Pair {
        let mut line = self.reserve.lock();
        line.next = line.next.saturating_add(line.stride - 2);
        line.stride = (line.stride * 2).min(LONGEST_STRIDE);
        line.take()
    }

    /// Whether so many were not free that there can hardly be one that is.
    pub fn is_exhausted(&self) -> bool {
        self.reserve.lock().stride >= LONGEST_STRIDE
    }

    /// Has the kernel give free numbers from the next two on to whoever is made now, up to `n` processes.
    ///
    /// # Errors
    /// Init does not answer, or the kernel's word.
    pub fn set_next(&self, n: pid_t) -> io::Result<()> {
        let mut line = self.reserve.lock();
        if line.next + n > END {
            line.next = PROGRAMS_END;
        }
        let next = line.next;
        line.next += (n + 1) & !1;
        let before = line.ask(next)?;
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        programs.get_or_insert(before);
        Ok(())
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        let programs = self.programs.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let put_back = programs.map_or(Ok(()), |next| self.reserve.lock().ask(next).map(drop));
        // With the one done and not the other programs get numbers from the lowest that is free on.
        if let Err(error) = self.reserve.set(PROGRAMS_END).and(put_back) {
            tracing::error!(%error, "programs may get numbers that are not for them until the next checkpoint");
        }
    }
}

impl Line {
    fn take(&mut self) -> Pair {
        if self.next + 2 > END {
            self.next = PROGRAMS_END;
        }
        let first = self.next;
        self.next += 2;
        Pair { first, second: first + 1 }
    }

    /// Tells init which number the next process gets; which it would have been.
    fn ask(&mut self, next: pid_t) -> io::Result<pid_t> {
        self.socket.write_all(&next.to_le_bytes())?;
        let mut answer = [0; 8];
        self.socket.read_exact(&mut answer)?;
        let [errno, before] = [0, 4].map(|at| answer[at..at + 4].try_into().map_or(libc::EIO, i32::from_le_bytes));
        if errno == 0 { Ok(before) } else { Err(io::Error::from_raw_os_error(errno)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reserve(next: pid_t) -> (Reserve, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let pid_max = tempfile::tempfile().expect("a file");
        let reserve = Reserve::new(vec![pid_max.into(), ours.into()]).expect("a reserve");
        reserve.lock().next = next;
        (reserve, theirs)
    }

    fn pid_max(reserve: &Reserve) -> String {
        let mut bytes = [0; 7];
        reserve.pid_max.read_exact_at(&mut bytes, 0).expect("pid_max");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[test]
    fn pid_max_is_raised_only_while_numbers_can_be_taken() {
        let (reserve, _init) = reserve(PROGRAMS_END);
        assert_eq!(pid_max(&reserve), "1048576");
        let opened = reserve.open().expect("open");
        assert_eq!(pid_max(&reserve), "4194304");
        drop(opened);
        assert_eq!(pid_max(&reserve), "1048576");
    }

    #[test]
    fn pairs_follow_each_other_and_begin_again_at_the_end() {
        let (reserve, _init) = reserve(END - 4);
        let opened = reserve.open().expect("open");
        let firsts: Vec<_> = (0..4).map(|_| opened.take().first).collect();
        assert_eq!(firsts, [END - 4, END - 2, PROGRAMS_END, PROGRAMS_END + 2]);
    }

    #[test]
    fn a_block_of_numbers_that_are_taken_is_left_behind_in_few_steps() {
        let (reserve, _init) = reserve(PROGRAMS_END);
        let opened = reserve.open().expect("open");
        let mut pair = opened.take();
        let mut n_steps = 0;
        while pair.first < PROGRAMS_END + 10_000 {
            pair = opened.take_another();
            assert!(pair.first % 2 == 0 && pair.first < END);
            n_steps += 1;
        }
        assert!(n_steps < 16, "{n_steps} steps");
        // However long that goes on.
        for _ in 0..100 {
            let pair = opened.take_another();
            assert!((PROGRAMS_END..END - 1).contains(&pair.first));
        }
    }

    #[test]
    fn what_lives_after_a_restart_is_passed_over() {
        let (reserve, _init) = reserve(PROGRAMS_END);
        for number in [PROGRAMS_END + 7, PROGRAMS_END + 1, 5, END] {
            reserve.keep_clear_of(number);
        }
        assert_eq!(reserve.open().expect("open").take().first, PROGRAMS_END + 8);
        reserve.keep_clear_of(END - 1);
        assert_eq!(reserve.open().expect("open").take().first, PROGRAMS_END);
    }

    #[test]
    fn init_sets_the_next_number_and_sets_it_back() {
        let (reserve, mut init) = reserve(PROGRAMS_END);
        let asked = std::thread::spawn(move || {
            let mut next = 77;
            let mut asked = Vec::new();
            let mut request = [0; 4];
            while init.read_exact(&mut request).is_ok() {
                let answer = [0, next];
                next = i32::from_le_bytes(request);
                asked.push(next);
                init.write_all(&answer.map(i32::to_le_bytes).concat()).expect("answer");
            }
            asked
        });
        let opened = reserve.open().expect("open");
        opened.set_next(2).expect("set");
        opened.set_next(4).expect("set");
        drop(opened);
        drop(reserve);
        assert_eq!(asked.join().expect("init"), [PROGRAMS_END, PROGRAMS_END + 2, 77]);
    }

    #[test]
    fn an_init_that_is_gone_is_an_error() {
        let (reserve, init) = reserve(PROGRAMS_END);
        drop(init);
        assert!(reserve.open().expect("open").set_next(2).is_err());
        assert!(Reserve::new(Vec::new()).is_err());
    }
}
