//! Terminals: window size (what termios does is in nix, safely).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

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
