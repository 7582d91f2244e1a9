//! Whose child a template becomes: the nearest subreaper's above the process, else init's. A program that has declared
//! itself a subreaper must not get one: its wait would find a child that it does not know. So it is none for a moment.
//!
//! For the process itself that is part of the batch. For those above it the engine's death in that moment, some hundred
//! microseconds, leaves them without the flag.

use std::fs;
use std::io;

use libc::pid_t;

use super::error::{TemplateError, check, process};
use crate::deltacr::handover::call;
use crate::deltacr::stop::Stopped;

/// The subreapers above a process, suspended.
#[derive(Debug, Default)]
pub(super) struct Reapers {
    suspended: Vec<pid_t>,
    learnt: Vec<(pid_t, bool)>,
}

impl Reapers {
    pub(super) fn suspend(stopped: &mut Stopped, pid: pid_t, keeper: Option<pid_t>) -> Result<Self, TemplateError> {
        let mut reapers = Self::default();
        let Some(keeper) = keeper else { return Ok(reapers) };
        let mut above = read_parent(pid)?;
        while above != keeper && stopped.processes().iter().any(|process| process.pid == above) {
            let known = stopped.subreapers.iter().find(|(known, _)| *known == above);
            let is_reaper = match known {
                Some((_, is_reaper)) => *is_reaper,
                None => {
                    let is_reaper = ask(stopped, above)?;
                    stopped.subreapers.push((above, is_reaper));
                    is_reaper
                }
            };
            if is_reaper {
                if let Err(error) = set(stopped, above, false) {
                    // The first failure is the one to report.
                    let _ = reapers.resume(stopped);
                    return Err(error);
                }
                reapers.suspended.push(above);
            }
            above = read_parent(above)?;
        }
        Ok(reapers)
    }

    /// What was learnt of a process on the way.
    pub(super) fn remember(&mut self, pid: pid_t, is_reaper: bool) {
        self.learnt.push((pid, is_reaper));
    }

    pub(super) fn resume(self, stopped: &mut Stopped) -> Result<(), TemplateError> {
        stopped.subreapers.extend(self.learnt);
        let mut resumed = Ok(());
        for pid in self.suspended {
            resumed = resumed.and(set(stopped, pid, true));
        }
        resumed
    }
}

fn ask(stopped: &mut Stopped, pid: pid_t) -> Result<bool, TemplateError> {
    let mut hand = stopped.hand(pid)?;
    let at = hand.scratch().start;
    let result = hand.call(libc::SYS_prctl, call(0, &[option(libc::PR_GET_CHILD_SUBREAPER), at]).args)?;
    check(pid, "prctl", result)?;
    let mut flag = [0; 4];
    hand.read(at, &mut flag)?;
    hand.close()?;
    Ok(flag != [0; 4])
}

fn set(stopped: &mut Stopped, pid: pid_t, on: bool) -> Result<(), TemplateError> {
    let mut hand = stopped.hand(pid)?;
    let result = hand.call(libc::SYS_prctl, call(0, &[option(libc::PR_SET_CHILD_SUBREAPER), on.into()]).args)?;
    check(pid, "prctl", result)?;
    hand.close()?;
    Ok(())
}

fn option(option: i32) -> u64 {
    option.cast_unsigned().into()
}

fn read_parent(pid: pid_t) -> Result<pid_t, TemplateError> {
    let failed = process("read the parent of", pid);
    let text = fs::read(format!("/proc/{pid}/stat")).map_err(failed)?;
    let text = String::from_utf8_lossy(&text);
    let parent = text.rfind(')').and_then(|end| text[end + 1..].split_ascii_whitespace().nth(1)?.parse().ok());
    parent.ok_or_else(|| failed(io::Error::from(io::ErrorKind::InvalidData)))
}
