//! A terminal for a client: what a person would type and see.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A program under a terminal of ours.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    seen: String,
}

impl Terminal {
    /// Starts `command` with 24 lines of 80 characters.
    pub fn run(command: &mut Command) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).expect("open a terminal");
        let end = |fd: &OwnedFd| fd.try_clone().expect("copy a descriptor");
        let child = command.stdin(end(&pty.slave)).stdout(end(&pty.slave)).stderr(pty.slave).spawn();
        Self { master: pty.master.into(), child: child.expect("start a client"), seen: String::new() }
    }

    /// PID of the client.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Types.
    pub fn type_in(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("type");
    }

    /// Waits until `text` has appeared since the last call. Returns what came before it.
    #[track_caller]
    pub fn until(&mut self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return before;
            }
            let left =
                PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::ZERO);
            let n = poll(&mut [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)], left).expect("poll");
            assert!(n > 0, "no `{text}` within 30 s, but: {:?}", self.seen);
            let mut buf = [0; 4096];
            let n =
                self.master.read(&mut buf).unwrap_or_else(|error| panic!("{error} before `{text}`: {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&buf[..n]));
        }
    }

    /// Changes the size and tells the client, as a terminal emulator does.
    pub fn resize(&mut self, rows: u16, cols: u16) {
        deltabox::sys::tty::set_window_size(&self.master, rows, cols).expect("resize");
        kill(self.pid(), Signal::SIGWINCH).expect("tell the client");
    }

    /// Waits for the client to end.
    pub fn wait(mut self) -> ExitStatus {
        // What it still prints must not block it.
        let mut rest = Vec::new();
        let _ = self.master.read_to_end(&mut rest);
        self.child.wait().expect("wait for the client")
    }
}
