//! Terminals: window size, and what of their state nix's termios does not have.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::{check, check_fd};

/// The size of the terminal behind `fd`: (rows, columns).
pub fn window_size(fd: impl AsFd) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which lives through the call.
    let ret = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    check(ret.into())?;
    Ok((size.ws_row, size.ws_col))
}

/// Sets the size of the terminal behind `fd` (either side); its foreground group gets SIGWINCH if it changed.
pub fn set_window_size(fd: impl AsFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one `winsize`, which lives through the call.
    let ret = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    check(ret.into()).map(drop)
}

/// The size of a terminal's window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Lines of characters.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
    /// Pixels from left to right, or 0.
    pub width: u16,
    /// Pixels from top to bottom, or 0.
    pub height: u16,
}

/// The whole size of the terminal behind `fd` (either side).
pub fn window(fd: BorrowedFd<'_>) -> io::Result<Window> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }.into())?;
    Ok(Window { rows: size.ws_row, columns: size.ws_col, width: size.ws_xpixel, height: size.ws_ypixel })
}

/// Sets the whole size; the foreground group gets SIGWINCH if it changed.
pub fn set_window(fd: BorrowedFd<'_>, window: Window) -> io::Result<()> {
    let Window { rows, columns, width, height } = window;
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: width, ws_ypixel: height };
    // SAFETY: TIOCSWINSZ reads one `winsize`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into()).map(drop)
}

/// What termios(3) has, as the kernel keeps it (`struct termios2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    /// `c_iflag`.
    pub input: u32,
    /// `c_oflag`.
    pub output: u32,
    /// `c_cflag`.
    pub control: u32,
    /// `c_lflag`.
    pub local: u32,
    /// `c_line`.
    pub line: u8,
    /// `c_cc`.
    pub characters: [u8; 19],
    /// Bits per second, of input and output.
    pub speeds: (u32, u32),
}

/// The modes of the terminal behind `fd`; of a pair, either side tells those of the slave.
pub fn modes(fd: BorrowedFd<'_>) -> io::Result<Modes> {
    let mut raw = std::mem::MaybeUninit::<libc::termios2>::zeroed();
    // SAFETY: TCGETS2 writes one `termios2`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCGETS2, raw.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed is a valid termios2, and the call has filled it.
    let raw = unsafe { raw.assume_init() };
    Ok(Modes {
        input: raw.c_iflag,
        output: raw.c_oflag,
        control: raw.c_cflag,
        local: raw.c_lflag,
        line: raw.c_line,
        characters: raw.c_cc,
        speeds: (raw.c_ispeed, raw.c_ospeed),
    })
}

/// Sets the modes at once (TCSANOW).
pub fn set_modes(fd: BorrowedFd<'_>, modes: &Modes) -> io::Result<()> {
    let raw = libc::termios2 {
        c_iflag: modes.input,
        c_oflag: modes.output,
        c_cflag: modes.control,
        c_lflag: modes.local,
        c_line: modes.line,
        c_cc: modes.characters,
        c_ispeed: modes.speeds.0,
        c_ospeed: modes.speeds.1,
    };
    // SAFETY: TCSETS2 reads one `termios2`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCSETS2, &raw const raw) }.into()).map(drop)
}

/// A question about a terminal whose answer is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Which of the pairs it is (of a master).
    Index,
    /// Its device, of a pair the slave's (on either side), in the kernel's encoding (new_encode_dev of
    /// include/linux/kdev_t.h).
    Device,
    /// Whether the slave may not be opened (of a master).
    Locked,
    /// Whether a master is told what happens to its slave (TIOCPKT).
    PacketMode,
    /// Whether nobody may open it again.
    Exclusive,
    /// Line discipline.
    Discipline,
    /// Foreground process group, in the caller's numbers. Of a slave only for who has it as controlling terminal.
    Foreground,
    /// Session, in the caller's numbers. As above.
    Session,
    /// Bytes that can be read.
    Readable,
}

/// Asks.
pub fn ask(fd: BorrowedFd<'_>, what: Ask) -> io::Result<i32> {
    let request = match what {
        Ask::Index => libc::TIOCGPTN,
        Ask::Device => libc::TIOCGDEV,
        Ask::Locked => libc::TIOCGPTLCK,
        Ask::PacketMode => libc::TIOCGPKT,
        Ask::Exclusive => libc::TIOCGEXCL,
        Ask::Discipline => libc::TIOCGETD,
        Ask::Foreground => libc::TIOCGPGRP,
        Ask::Session => libc::TIOCGSID,
        Ask::Readable => libc::FIONREAD,
    };
    let mut answer: libc::c_int = 0;
    // SAFETY: each of these requests writes one int, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut answer) }.into())?;
    Ok(answer)
}

/// Something to be done to a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Whether the slave may not be opened (of a master).
    Lock(bool),
    /// TIOCPKT (of a master).
    PacketMode(bool),
    /// Whether nobody may open it again.
    Exclusive(bool),
    /// Forgets what can be read of this side.
    FlushInput,
    /// Forgets what this side has written and the other has not read.
    FlushOutput,
    /// Holds output back.
    StopOutput,
    /// Lets it go on.
    StartOutput,
    /// Takes a byte as if it had been typed, at once (of a slave; CAP_SYS_ADMIN).
    Type(u8),
}

/// Does it.
pub fn order(fd: BorrowedFd<'_>, what: Order) -> io::Result<()> {
    let fd = fd.as_raw_fd();
    let ret = match what {
        Order::Lock(on) => {
            let on: libc::c_int = on.into();
            // SAFETY: reads one int, which lives through the call.
            unsafe { libc::ioctl(fd, libc::TIOCSPTLCK, &raw const on) }
        }
        Order::PacketMode(on) => {
            let on: libc::c_int = on.into();
            // SAFETY: reads one int, which lives through the call.
            unsafe { libc::ioctl(fd, libc::TIOCPKT, &raw const on) }
        }
        Order::Exclusive(on) => {
            let request = if on { libc::TIOCEXCL } else { libc::TIOCNXCL };
            // SAFETY: takes no argument.
            unsafe { libc::ioctl(fd, request) }
        }
        Order::FlushInput => {
            // SAFETY: takes a number.
            unsafe { libc::ioctl(fd, libc::TCFLSH, libc::TCIFLUSH) }
        }
        Order::FlushOutput => {
            // SAFETY: takes a number.
            unsafe { libc::ioctl(fd, libc::TCFLSH, libc::TCOFLUSH) }
        }
        Order::StopOutput => {
            // SAFETY: takes a number.
            unsafe { libc::ioctl(fd, libc::TCXONC, libc::TCOOFF) }
        }
        Order::StartOutput => {
            // SAFETY: takes a number.
            unsafe { libc::ioctl(fd, libc::TCXONC, libc::TCOON) }
        }
        Order::Type(byte) => {
            // SAFETY: reads one byte, which lives through the call.
            unsafe { libc::ioctl(fd, libc::TIOCSTI, &raw const byte) }
        }
    };
    check(ret.into()).map(drop)
}

/// Opens the slave of a master, whatever namespace it belongs to. `flags` are those of open(2).
///
/// TIOCGPTPEER leaves O_CLOEXEC in the description's own flags (Linux 6.18, ptm_open_peer), and fdinfo then shows it for
/// every descriptor of it, so it is set afterwards.
pub fn open_slave(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let open = flags & !libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value and returns a descriptor.
    let slave = check_fd(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, open) }.into())?;
    if flags & libc::O_CLOEXEC != 0 {
        nix::fcntl::fcntl(&slave, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    Ok(slave)
}
