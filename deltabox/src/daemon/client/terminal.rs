//! The client's own terminal.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::engine::WindowSize;
use crate::sys;

/// Whether both standard input and output are terminals.
pub fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// The size of the terminal at standard output or input; 24 by 80 without one.
pub fn terminal_size() -> WindowSize {
    let size = sys::tty::window_size(io::stdout()).or_else(|_| sys::tty::window_size(io::stdin()));
    match size {
        Ok((rows, cols)) if rows > 0 && cols > 0 => WindowSize { rows, cols },
        _ => WindowSize { rows: 24, cols: 80 },
    }
}

/// Standard input's terminal in raw mode; as it was before when this is dropped, by whichever way.
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// `None` when standard input is no terminal.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone (SIGHUP); then there is nothing to restore.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}
