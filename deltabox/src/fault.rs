//! Named fault points: places where a test makes the next step fail or the process die.
//!
//! `DELTABOX_FAULT=NAME[:kill|error|once|stop][,NAME...]` in the daemon's environment arms them. Unarmed, a point costs one
//! relaxed load. Every point has a test that asserts the aftermath (`cargo xtask tidy` checks it).

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an armed point does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Error,
    /// The first time only.
    Once,
    Kill,
    /// Stands still until somebody sends SIGCONT, then passes.
    Stop,
}

static ARMED: OnceLock<Vec<(String, Action)>> = OnceLock::new();
/// What was to fail once has.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

fn armed() -> &'static [(String, Action)] {
    ARMED.get_or_init(|| parse_armed(&std::env::var("DELTABOX_FAULT").unwrap_or_default()))
}

fn parse_armed(text: &str) -> Vec<(String, Action)> {
    text.split(',')
        .filter(|item| !item.is_empty())
        .map(|item| match item.split_once(':') {
            Some((name, "kill")) => (name.to_owned(), Action::Kill),
            Some((name, "stop")) => (name.to_owned(), Action::Stop),
            Some((name, "once")) => (name.to_owned(), Action::Once),
            Some((name, _)) => (name.to_owned(), Action::Error),
            None => (item.to_owned(), Action::Error),
        })
        .collect()
}

/// Passes, unless a test armed this point: then fails with EIO or kills this process with SIGKILL.
///
/// `name` is `area.step`, a literal, so that tidy finds it.
pub fn point(name: &'static str) -> io::Result<()> {
    match armed().iter().find(|(armed, _)| armed == name) {
        None => Ok(()),
        Some((_, Action::Once)) if HAS_FAILED.swap(true, Ordering::Relaxed) => Ok(()),
        Some((_, Action::Error | Action::Once)) => Err(io::Error::other(format!("fault point {name}"))),
        Some((_, Action::Stop)) => {
            let stopped = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGSTOP);
            Ok(stopped?)
        }
        Some((_, Action::Kill)) => {
            // A real crash: no destructors, no flushes.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            Err(io::Error::other(format!("fault point {name}: SIGKILL did not take")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_points_is_read_with_its_actions() {
        assert_eq!(parse_armed(""), []);
        assert_eq!(
            parse_armed("create.mount,create.manifest:kill"),
            [("create.mount".to_owned(), Action::Error), ("create.manifest".to_owned(), Action::Kill)]
        );
    }
}
