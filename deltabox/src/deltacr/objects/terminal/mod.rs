//! Pairs of pseudo-terminals: a master that shows and types, a slave that programs use.
//!
//! ```text
//!            typed, not read yet (lines, the line being typed)
//!  master  ---------------------------------------------------->  slave   modes, window, foreground group, session
//!          <----------------------------------------------------
//!            written, not shown yet
//! ```
//! The master is inside (tmux, script), or outside: the sandbox's init has it, a client is at its other end. Then only
//! the slave is held; the master, the window's size and what was written already are the client's and stay as they
//! are.
//!
//! What is typed cannot be looked at without taking it. So it is taken and typed again, quietly: without echo, signals and
//! conversions, each line ended as it was. For a line that is still being typed the terminal has to be switched out of
//! line mode and back; what a client types in these microseconds is taken as it is. An engine killed right there
//! loses what was typed. The kernel remembers the switch in one bit: of the next 4095 bytes typed in line mode
//! the last one ends a line (as after every program that switches).
//!
//! More than 4095 bytes wait in a queue before the terminal; taking them makes it look at them (echo, ^C), and it
//! does once more when they are typed again.
//!
//! # Order at a rollback
//! 1. The processes of the dropped time are gone, or stopped. Master outside or alive: it is used; else
//!    [`Terminal::make`].
//! 2. [`open_slave`] for each description of the slave; [`Terminal::put_back`]. Before signals are put back: who is in
//!    the foreground gets SIGWINCH if the size differs.
//! 3. The leader of the session, and nobody else of it yet: [`lead_session`]; its descriptors; [`take_terminal`].
//! 4. The others are made by it or by its children, and so have the terminal too; [`join_group`] in each.
//! 5. In the leader: [`bring_forward`].
//! 6. Master outside: [`Terminal::announce_window`].
//!
//! Not held: output stopped by ^S where the master is outside (it goes on), what was typed where nobody has the slave,
//! times of the node in `/dev/pts`, locked modes (TIOCSLCKTRMIOS), positions in the line for the echo of tabs.

mod input;
mod output;
mod session;

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

pub use session::{bring_forward, join_group, lead_session, take_terminal};

use super::error::failed;
use super::own::Permissions;
use super::{ObjectError, ObjectRefusal};
use crate::sys::tty::{self, Ask, Modes, Order, Window, ask, order};
use input::Input;
use output::Output;

/// The usual line discipline (include/uapi/linux/tty.h).
const N_TTY: i32 = 0;

/// A terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    index: i32,
    modes: Modes,
    window: Window,
    /// Nobody may open the slave again (TIOCEXCL).
    is_exclusive: bool,
    /// The node in `/dev/pts`.
    node: Permissions,
    input: Input,
    /// Inside the sandbox.
    session: Option<pid_t>,
    /// Inside the sandbox.
    foreground: Option<pid_t>,
    /// `None`: it is outside.
    master: Option<Master>,
}

/// A master that is inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Master {
    /// It is told what happens to the slave (TIOCPKT).
    in_packets: bool,
    /// The slave may not be opened.
    is_locked: bool,
    /// The slave was open, and is not any more.
    is_hung_up: bool,
    output: Output,
}

/// Where the master is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A process of the sandbox has it.
    Inside,
    /// Init has it, or somebody it was given to.
    Outside,
}

/// Both sides of a terminal.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The sandbox's `/dev/pts`.
    pub devpts: BorrowedFd<'a>,
    /// The engine's copy of the master's descriptor, its own or init's.
    pub master: BorrowedFd<'a>,
    /// A copy of any description of the slave. `None`: nobody has one.
    pub slave: Option<BorrowedFd<'a>>,
}

impl Terminal {
    /// Reads it. `inside` tells the number inside the sandbox of a session or process group with a host number.
    ///
    /// # Errors
    /// `Discipline`, `PacketStatus`: nothing was touched. Or the kernel's word; if that is about what was typed or written,
    /// some of it is lost.
    pub fn read(pair: Pair<'_>, place: Place, inside: impl Fn(pid_t) -> Option<pid_t>) -> Result<Self, ObjectError> {
        let Pair { master, slave, .. } = pair;
        let index = ask(master, Ask::Index).map_err(failed("ask a terminal"))?;
        let discipline = ask(slave.unwrap_or(master), Ask::Discipline).map_err(failed("ask a terminal"))?;
        if discipline != N_TTY {
            return Err(ObjectRefusal::Discipline { index, discipline }.into());
        }
        let modes = tty::modes(master).map_err(failed("read the modes of a terminal"))?;
        let number = |what| {
            let number = none_if_not_it(ask(master, what)).map_err(failed("ask a terminal"))?;
            Ok::<_, ObjectError>(number.filter(|number| *number > 0).and_then(&inside))
        };
        let (session, foreground) = (number(Ask::Session)?, number(Ask::Foreground)?);
        let node = open_node(pair.devpts, index).and_then(|node| Permissions::of(node.as_fd()));
        let node = node.map_err(failed("look at a terminal"))?;
        let is_exclusive = slave.map_or(Ok(0), |slave| ask(slave, Ask::Exclusive));
        let is_exclusive = is_exclusive.map_err(failed("ask a terminal"))? != 0;
        let is_locked = ask(master, Ask::Locked).map_err(failed("ask a terminal"))? != 0;
        let in_packets = ask(master, Ask::PacketMode).map_err(failed("ask a terminal"))? != 0;
        let is_told = in_packets && place == Place::Inside;
        if is_told && has(master, PollFlags::POLLPRI).map_err(failed("poll a master"))? {
            return Err(ObjectRefusal::PacketStatus { index }.into());
        }
        let own = Own::open(pair).map_err(failed("open a terminal"))?;
        if is_told {
            // But not of what is done here.
            order(master, Order::PacketMode(false)).map_err(failed("set up a master"))?;
        }
        let input = own.input(&modes, place == Place::Inside);
        let output = (place == Place::Inside).then(|| own.output(&modes)).transpose();
        if is_told {
            order(master, Order::PacketMode(true)).map_err(failed("set up a master"))?;
        }
        let input = input.map_err(failed("read what was typed at a terminal"))?;
        let is_hung_up = has(master, PollFlags::POLLHUP).map_err(failed("poll a master"))?;
        let output = output.map_err(failed("read what was written to a terminal"))?;
        let master = output.map(|output| Master { in_packets, is_locked, is_hung_up, output });
        let window = tty::window(pair.master).map_err(failed("read the size of a terminal"))?;
        Ok(Self { index, modes, window, is_exclusive, node, input, session, foreground, master })
    }

    /// Makes a pair of the same name, empty and unlocked; its master.
    ///
    /// # Errors
    /// `TerminalTaken`: somebody has a terminal of that name. Or the kernel's word.
    pub fn make(&self, devpts: BorrowedFd<'_>) -> Result<OwnedFd, ObjectError> {
        // The kernel gives the lowest that is free: those below are taken for a moment.
        let mut below = Vec::new();
        loop {
            let master = open_master(devpts).map_err(failed("make a terminal"))?;
            let index = ask(master.as_fd(), Ask::Index).map_err(failed("ask a terminal"))?;
            if index > self.index {
                return Err(ObjectRefusal::TerminalTaken { index: self.index }.into());
            }
            if index == self.index {
                order(master.as_fd(), Order::Lock(false)).map_err(failed("unlock a terminal"))?;
                return Ok(master);
            }
            below.push(master);
        }
    }

    /// Gives a pair, this one or one that was made for it, the state it had. What was typed since is gone. All
    /// descriptions of the slave that there are to be are open.
    ///
    /// # Errors
    /// The kernel's word. It is neither what it was nor what it should be.
    pub fn put_back(&self, pair: Pair<'_>) -> Result<(), ObjectError> {
        let put = |op| failed::<io::Error>(op);
        if self.master.is_some() {
            // Off, and on at the end: then nobody is told of what is done here.
            order(pair.master, Order::PacketMode(false)).map_err(put("set up a master"))?;
        }
        let own = Own::open(pair).map_err(put("open a terminal"))?;
        own.forget_input().map_err(put("empty a terminal"))?;
        own.start().map_err(put("let a terminal write"))?;
        if let Some(master) = &self.master {
            order(pair.master, Order::FlushInput).map_err(put("empty a terminal"))?;
            own.show(&master.output, &self.modes).map_err(put("write to a terminal"))?;
        }
        own.type_again(&self.input, &self.modes, true).map_err(put("type at a terminal"))?;
        tty::set_modes(pair.master, &self.modes).map_err(put("set the modes of a terminal"))?;
        if let Some(slave) = pair.slave {
            order(slave, Order::Exclusive(self.is_exclusive)).map_err(put("set up a terminal"))?;
        }
        // Not of this record: a caller may take a pair of another name.
        let index = ask(pair.master, Ask::Index).map_err(put("ask a terminal"))?;
        let node = open_node(pair.devpts, index).and_then(|node| self.node.set(node.as_fd()));
        node.map_err(put("set the owner of a terminal"))?;
        let Some(master) = &self.master else { return Ok(()) };
        let window = tty::window(pair.master).map_err(put("read the size of a terminal"))?;
        if window != self.window {
            tty::set_window(pair.master, self.window).map_err(put("set the size of a terminal"))?;
        }
        if pair.slave.is_none() && master.is_hung_up && !has(pair.master, PollFlags::POLLHUP).map_err(put("poll"))? {
            drop(open_slave(pair.master, libc::O_RDWR).map_err(put("open a terminal"))?);
        }
        order(pair.master, Order::Lock(master.is_locked)).map_err(put("set up a master"))?;
        order(pair.master, Order::PacketMode(master.in_packets)).map_err(put("set up a master"))
    }

    /// Has the kernel tell the foreground group if the window has another size than it had (SIGWINCH).
    ///
    /// # Errors
    /// The kernel's word.
    pub fn announce_window(&self, master: BorrowedFd<'_>) -> io::Result<()> {
        let window = tty::window(master)?;
        if window != self.window {
            // It tells of changes only.
            tty::set_window(master, self.window)?;
            tty::set_window(master, window)?;
        }
        Ok(())
    }

    /// N of `/dev/pts/N`.
    pub fn index(&self) -> i32 {
        self.index
    }

    /// The session whose controlling terminal it is, inside the sandbox.
    pub fn session(&self) -> Option<pid_t> {
        self.session
    }

    /// The process group in the foreground, inside the sandbox.
    pub fn foreground(&self) -> Option<pid_t> {
        self.foreground
    }

    /// Where its master was.
    pub fn place(&self) -> Place {
        if self.master.is_some() { Place::Inside } else { Place::Outside }
    }
}

/// N of `/dev/pts/N` that a descriptor is of: master, slave or `/dev/tty`. So both sides of a pair find each other.
///
/// # Errors
/// `InvalidInput`: it is a terminal of another kind; EIO: its master is closed. Or the kernel's word.
pub fn index_of(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let device = ask(fd, Ask::Device)?.cast_unsigned();
    // UNIX98_PTY_SLAVE_MAJOR of include/uapi/linux/major.h; new_decode_dev of include/linux/kdev_t.h.
    let (major, minor) = ((device >> 8) & 0xfff, device & 0xff | (device >> 12) & 0xf_ff00);
    if major == 136 { i32::try_from(minor).map_err(io::Error::other) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Opens the slave, locked or not: a description, which nobody gets as controlling terminal by that.
///
/// # Errors
/// The kernel's word.
pub fn open_slave(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let is_locked = ask(master, Ask::Locked)? != 0;
    if is_locked {
        order(master, Order::Lock(false))?;
    }
    let opened = tty::open_slave(master, flags | libc::O_NOCTTY | libc::O_CLOEXEC);
    if is_locked {
        order(master, Order::Lock(true))?;
    }
    opened
}

/// A slave whose master is closed: it reads as ended, and refuses all else with EIO.
///
/// # Errors
/// The kernel's word.
pub fn make_dead(devpts: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let master = open_master(devpts)?;
    open_slave(master.as_fd(), flags)
}

/// The engine at a terminal.
struct Own<'a> {
    master: BorrowedFd<'a>,
    /// A description that does not wait. Only if there are others: closing the last one would tell the master.
    slave: Option<OwnedFd>,
}

impl<'a> Own<'a> {
    fn open(pair: Pair<'a>) -> io::Result<Self> {
        let open = |_| open_slave(pair.master, libc::O_RDWR | libc::O_NONBLOCK);
        Ok(Self { master: pair.master, slave: pair.slave.map(open).transpose()? })
    }

    fn input(&self, modes: &Modes, may_flush: bool) -> io::Result<Input> {
        let Some(slave) = &self.slave else { return Ok(Input::default()) };
        let input = Input::take(slave.as_fd(), modes)?;
        self.type_again(&input, modes, may_flush)?;
        Ok(input)
    }

    fn type_again(&self, input: &Input, modes: &Modes, may_flush: bool) -> io::Result<()> {
        let Some(slave) = &self.slave else { return Ok(()) };
        input.give(slave.as_fd(), self.master, modes, may_flush)
    }

    fn forget_input(&self) -> io::Result<()> {
        match &self.slave {
            Some(slave) => order(slave.as_fd(), Order::FlushInput),
            None => order(self.master, Order::FlushOutput),
        }
    }

    /// Undoes ^S, which only starting what was stopped this way does.
    fn start(&self) -> io::Result<()> {
        let Some(slave) = &self.slave else { return Ok(()) };
        order(slave.as_fd(), Order::StopOutput)?;
        order(slave.as_fd(), Order::StartOutput)
    }

    fn output(&self, modes: &Modes) -> io::Result<Output> {
        let output = Output::take(self.master, self.slave())?;
        if !output.is_empty() {
            output.give(self.master, self.slave(), modes)?;
        }
        Ok(output)
    }

    fn show(&self, output: &Output, modes: &Modes) -> io::Result<()> {
        output.give(self.master, self.slave(), modes)?;
        self.slave().map_or(Ok(()), |slave| output.stop(slave, modes))
    }

    fn slave(&self) -> Option<BorrowedFd<'_>> {
        self.slave.as_ref().map(AsFd::as_fd)
    }
}

/// Whether poll tells one of `events` (or POLLHUP), having looked at all that was sent so far.
fn has(fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, events)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|told| told.intersects(events)))
}

fn none_if_not_it(answer: io::Result<i32>) -> io::Result<Option<i32>> {
    match answer {
        Err(error) if error.raw_os_error() == Some(Errno::ENOTTY as i32) => Ok(None),
        other => other.map(Some),
    }
}

fn open_master(devpts: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    open_at(devpts, c"ptmx", OFlag::O_RDWR | OFlag::O_NOCTTY)
}

fn open_node(devpts: BorrowedFd<'_>, index: i32) -> io::Result<OwnedFd> {
    open_at(devpts, &CString::new(index.to_string())?, OFlag::O_PATH | OFlag::O_NOFOLLOW)
}

fn open_at(devpts: BorrowedFd<'_>, name: &CStr, flags: OFlag) -> io::Result<OwnedFd> {
    Ok(openat(devpts, name, flags | OFlag::O_CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests;
