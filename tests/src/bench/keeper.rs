//! The process that keeps a bench: it waits for the one that measures, and survives to clean up whatever happens.

use std::process::{Child, Command};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Signals that end the bench, after it has cleaned up.
const ENDS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// From its making on, signals that end the bench wait until somebody is looked after.
#[derive(Debug)]
pub struct Keeper {
    watched: SigSet,
}

impl Keeper {
    /// Blocks the signals. Children start with an empty mask again (std's spawn).
    pub fn new() -> anyhow::Result<Self> {
        let watched: SigSet = ENDS.into_iter().chain([Signal::SIGCHLD]).collect();
        watched.thread_block()?;
        Ok(Self { watched })
    }

    /// Starts a command and waits for its end; a signal to us ends it.
    pub fn look_after(&self, command: &mut Command) -> anyhow::Result<WaitStatus> {
        command.spawn().context("start measuring").and_then(|child| self.wait(&child))
    }

    fn wait(&self, child: &Child) -> anyhow::Result<WaitStatus> {
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        loop {
            if ENDS.contains(&self.watched.wait()?) {
                nix::sys::signal::kill(pid, Signal::SIGKILL)?;
                return Ok(waitpid(pid, None)?);
            }
            match waitpid(pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => {}
                status => return Ok(status),
            }
        }
    }
}
