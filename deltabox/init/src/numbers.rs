//! The numbers of the PID namespace, for an engine that makes processes which nobody inside may reach.
//!
//! Such processes have numbers above `pid_max`, which the engine raises while all programs stand still. A program that may
//! not choose a number for its child gets the next free one instead: only a process of the namespace can set which that
//! is, so init does it, asked over a socket of its own. It answers while the engine holds everything else still.
//!
//! ```text
//! request:  | next number i32 |        answer:  | errno i32 | what was the next number i32 |      (little endian)
//! ```
//! The engine dies: `pid_max` is what it was before anything else is heard. What is above it is never given then, wherever
//! the search for a free number begins.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

/// What only a process inside can open. Each file is read and written from its beginning.
pub(crate) struct Numbers {
    pid_max: File,
    last: File,
    highest: u32,
    line: Option<UnixStream>,
}

impl Numbers {
    /// With what programs get: numbers below `highest`.
    pub(crate) fn new(pid_max: File, last: File, highest: u32) -> io::Result<Self> {
        let numbers = Self { pid_max, last, highest, line: None };
        numbers.lower().map(|()| numbers)
    }

    /// What an engine needs: `pid_max`, opened for writing, and its end of a new line.
    pub(crate) fn lend(&mut self) -> io::Result<Vec<OwnedFd>> {
        self.lower()?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let pid_max = self.pid_max.try_clone()?;
        self.line = Some(ours);
        Ok(vec![pid_max.into(), theirs.into()])
    }

    /// Programs get their own numbers only.
    pub(crate) fn lower(&self) -> io::Result<()> {
        self.pid_max.write_all_at(self.highest.to_string().as_bytes(), 0)
    }

    /// Whether a program may have this number.
    pub(crate) fn is_programs(&self, number: u32) -> bool {
        number < self.highest
    }

    /// Readable when an engine asks something.
    pub(crate) fn line(&self) -> Option<BorrowedFd<'_>> {
        self.line.as_ref().map(AsFd::as_fd)
    }

    /// Answers one request, if there is one.
    pub(crate) fn serve(&mut self) {
        let Some(line) = &mut self.line else { return };
        let mut request = [0; 4];
        match line.read(&mut request) {
            Ok(4) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            _ => {
                self.line = None;
                return;
            }
        }
        let (errno, before) = match exchange(&self.last, i32::from_le_bytes(request)) {
            Ok(before) => (0, before),
            Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), 0),
        };
        let mut answer = [0; 8];
        answer[..4].copy_from_slice(&errno.to_le_bytes());
        answer[4..].copy_from_slice(&before.to_le_bytes());
        // It always has room for an answer to who has asked; a failure means that nobody listens.
        let _ = line.write_all(&answer);
    }
}

/// Sets the number that the next process gets, if it is free; what that was.
fn exchange(last: &File, next: i32) -> io::Result<i32> {
    let mut text = [0; 16];
    let n = last.read_at(&mut text, 0)?;
    let text = str::from_utf8(&text[..n]).map_err(io::Error::other)?;
    let before: i32 = text.trim().parse().map_err(io::Error::other)?;
    last.write_all_at((next - 1).to_string().as_bytes(), 0)?;
    Ok(before + 1)
}
