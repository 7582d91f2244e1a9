//! Signals that reach the client while it stands in for a command.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use nix::sys::signal::{SigSet, Signal as Number};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that a command is to get, or that end a client with a terminal in raw mode.
const PASSED: [Number; 4] = [Number::SIGINT, Number::SIGTERM, Number::SIGHUP, Number::SIGQUIT];

/// Holds back INT, TERM and HUP on this thread, from before a sandbox is made until a session takes them over
/// (which then gets those that came meanwhile), so that the sandbox is always removed.
#[derive(Debug)]
pub struct SignalHold(());

impl SignalHold {
    /// Begins to hold. Must be called before the client makes threads.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn begin() -> io::Result<Self> {
        mask().thread_block()?;
        Ok(Self(()))
    }
}

impl Drop for SignalHold {
    fn drop(&mut self) {
        // Cannot fail: the set is valid. What came meanwhile is delivered here.
        let _ = mask().thread_unblock();
    }
}

fn mask() -> SigSet {
    [Number::SIGINT, Number::SIGTERM, Number::SIGHUP].into_iter().collect()
}

/// The signals of [`PASSED`] that the client was not started to ignore, and SIGWINCH.
pub(super) struct Signals {
    passed: Vec<(u8, Signal)>,
    window: Signal,
}

impl Signals {
    /// From now on they come here (and nowhere else until the program ends).
    pub(super) fn listen() -> io::Result<Self> {
        let ignored = ignored()?;
        let mut passed = Vec::new();
        for number in PASSED {
            let number = number as i32;
            if ignored & (1 << (number - 1)) == 0 {
                passed.push((u8::try_from(number).unwrap_or(0), signal(SignalKind::from_raw(number))?));
            }
        }
        let window = signal(SignalKind::window_change())?;
        // A hold ends here, now that there is somebody to take what was held.
        mask().thread_unblock()?;
        Ok(Self { passed, window })
    }

    /// The next of them.
    pub(super) async fn next(&mut self) -> u8 {
        poll_fn(|cx| {
            for (number, signal) in &mut self.passed {
                if let Poll::Ready(Some(())) = signal.poll_recv(cx) {
                    return Poll::Ready(*number);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The next of them, or `None` when the terminal has another size.
    pub(super) async fn next_or_resize(&mut self) -> Option<u8> {
        poll_fn(|cx| {
            for (number, signal) in &mut self.passed {
                if let Poll::Ready(Some(())) = signal.poll_recv(cx) {
                    return Poll::Ready(Some(*number));
                }
            }
            self.window.poll_recv(cx).map(|_| None)
        })
        .await
    }
}

/// What this process ignores, as a mask: nohup and shells' background jobs start us so, and it is to stay so.
fn ignored() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let field = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    Ok(field.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0))
}
