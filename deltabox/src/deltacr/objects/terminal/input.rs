//! What was typed and not read yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use super::has;
use super::output::{send, send_portions};
use crate::sys::tty::{Modes, Order, order, set_modes};

/// Bytes that a terminal itself keeps (N_TTY_BUF_SIZE of drivers/tty/n_tty.c, less one).
pub(super) const KEPT_BYTES: usize = 4095;
/// Bytes after which somebody outside must be typing as fast as they are taken (chosen: both queues of the kernel).
const MAX_BYTES: usize = 128 << 10;

/// What was typed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Input {
    /// In line mode: lines that are ready.
    lines: Vec<Line>,
    /// In line mode: the line that is being typed. Else: everything.
    rest: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    bytes: Vec<u8>,
    /// It ended by ^D, which is not among the bytes.
    is_cut: bool,
}

impl Input {
    /// Takes it. `slave` does not wait; its modes are `modes` before and after.
    pub(super) fn take(slave: BorrowedFd<'_>, modes: &Modes) -> io::Result<Self> {
        let mut input = Self::default();
        let mut buffer = [0; KEPT_BYTES + 1];
        let mut n_bytes = 0;
        if is_lines(modes) {
            while n_bytes < MAX_BYTES && has(slave, PollFlags::POLLIN)? {
                let Some(n) = read(slave, &mut buffer)? else { break };
                let bytes = buffer[..n].to_vec();
                n_bytes += n + 1;
                let is_cut = bytes.last().is_none_or(|last| !ends_line(*last, modes));
                input.lines.push(Line { bytes, is_cut });
            }
        }
        let mut open = *modes;
        open.local &= !libc::ICANON;
        if open.characters[libc::VMIN] > 1 {
            // It counts as nothing until so many bytes are there.
            open.characters[libc::VMIN] = 1;
        }
        if open != *modes {
            set_modes(slave, &open)?;
        }
        let taken = loop {
            match has(slave, PollFlags::POLLIN) {
                Ok(true) if n_bytes < MAX_BYTES => {}
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
            match read(slave, &mut buffer) {
                Ok(Some(n @ 1..)) => {
                    input.rest.extend(&buffer[..n]);
                    n_bytes += n;
                }
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if open != *modes {
            set_modes(slave, modes)?;
        }
        taken.map(|()| input)
    }

    /// Types it again, quietly. Its modes are `modes` afterwards. `may_flush`: what is typed now by others may be lost.
    pub(super) fn give(
        &self,
        slave: BorrowedFd<'_>,
        master: BorrowedFd<'_>,
        modes: &Modes,
        may_flush: bool,
    ) -> io::Result<()> {
        if self.is_empty() {
            if may_flush && is_lines(modes) {
                set_modes(slave, modes)?;
                order(slave, Order::FlushInput)?;
            }
            return Ok(());
        }
        let end_of_file = self.unused_byte(modes);
        set_modes(slave, &quiet(modes, end_of_file))?;
        if may_flush {
            // A switch to line mode leaves the end of a line behind where no line is.
            order(slave, Order::FlushInput)?;
        }
        let end = |line: &Line| line.is_cut.then_some(end_of_file);
        let lines = self.lines.iter().flat_map(|line| line.bytes.iter().copied().chain(end(line)));
        let mut bytes = lines.chain(self.rest.iter().copied());
        if !is_lines(modes) && self.rest.len() > KEPT_BYTES {
            let sent = unblocked(master, || send(master, slave, &self.rest));
            return sent.and(set_modes(slave, modes));
        }
        for byte in bytes.by_ref().take(KEPT_BYTES) {
            order(slave, Order::Type(byte))?;
        }
        set_modes(slave, modes)?;
        // The rest has no place in it yet: it waits before it.
        let more: Vec<u8> = bytes.collect();
        if more.is_empty() { Ok(()) } else { unblocked(master, || send_portions(master, &more)) }
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.rest.is_empty()
    }

    /// One that can mean ^D without meaning itself.
    fn unused_byte(&self, modes: &Modes) -> u8 {
        let used = |byte: &u8| {
            ends_line(*byte, modes)
                || self.rest.contains(byte)
                || self.lines.iter().any(|line| line.bytes.contains(byte))
        };
        // All but a few of 255 in 4095 bytes: then ^D is as good as any.
        let usual = modes.characters[libc::VEOF].max(1);
        [usual].into_iter().chain(1..=u8::MAX).find(|byte| !used(byte)).unwrap_or(usual)
    }
}

/// The master may be one that waits, which is for whoever has it to say.
fn unblocked(master: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(master, FcntlArg::F_GETFL)?);
    fcntl(master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let done = work();
    fcntl(master, FcntlArg::F_SETFL(flags))?;
    done
}

/// Modes in which what is typed is taken as it is, but lines are lines.
fn quiet(modes: &Modes, end_of_file: u8) -> Modes {
    let mut quiet = *modes;
    // To switch flow control off would start what ^S has stopped; without characters for it it does nothing.
    quiet.input = modes.input & libc::IXON;
    quiet.local &= libc::ICANON | libc::EXTPROC | libc::IEXTEN;
    let mut characters = [0; 19];
    for kept in [libc::VEOL, libc::VEOL2] {
        characters[kept] = modes.characters[kept];
    }
    characters[libc::VEOF] = end_of_file;
    quiet.characters = characters;
    quiet
}

/// Whether programs get whole lines.
fn is_lines(modes: &Modes) -> bool {
    modes.local & libc::ICANON != 0 && modes.local & libc::EXTPROC == 0
}

fn ends_line(byte: u8, modes: &Modes) -> bool {
    let is = |character: usize| byte != 0 && byte == modes.characters[character];
    byte == b'\n' || is(libc::VEOL) || modes.local & libc::IEXTEN != 0 && is(libc::VEOL2)
}

/// `None`: nothing is there.
fn read(slave: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match nix::unistd::read(slave.as_fd(), buffer) {
        Ok(n) => Ok(Some(n)),
        Err(Errno::EAGAIN | Errno::EIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
