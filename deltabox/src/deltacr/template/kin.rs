//! Where a process stands in its family: number, session, group, and what its parent is sent at its end.

use std::fs;
use std::io;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::error::{TemplateError, TemplateRefusal, errno};
use crate::deltacr::handover::call;
use crate::deltacr::inject::Call;
use crate::deltacr::tasks;

/// A process among others; all numbers as in its own PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kin {
    /// Its number.
    pub pid: pid_t,
    /// Its session; its own number if it leads one.
    pub session: pid_t,
    /// Its process group.
    pub group: pid_t,
    /// What its parent is sent at its end; 0 for nothing.
    pub exit_signal: i32,
}

impl Kin {
    /// Reads it of a process, which may be a zombie.
    ///
    /// # Errors
    /// There is none.
    pub fn read(host: pid_t) -> io::Result<Self> {
        let text = fs::read(format!("/proc/{host}/status"))?;
        let stat = tasks::read_stat(host, host)?.ok_or(io::ErrorKind::NotFound)?;
        Self::parse(&String::from_utf8_lossy(&text), stat.exit_signal).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(status: &str, exit_signal: i32) -> Option<Self> {
        let number = |field: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            value?.split_ascii_whitespace().last()?.parse().ok()
        };
        Some(Self { pid: number("NSpid")?, session: number("NSsid")?, group: number("NSpgid")?, exit_signal })
    }

    /// Fails unless a child of `parent` can come to be in the session.
    pub(super) fn check(&self, parent: pid_t) -> Result<(), TemplateError> {
        let Self { pid, session, .. } = *self;
        let above = Self::read(parent).map_err(super::error::process("read the state of", parent))?;
        if session != pid && session != above.session {
            return Err(TemplateRefusal::Session { pid, session }.into());
        }
        Ok(())
    }

    /// What a newborn has to call.
    pub(super) fn join(&self) -> Call {
        match u64::try_from(self.group) {
            _ if self.session == self.pid => call(libc::SYS_setsid, &[]),
            Ok(group) => call(libc::SYS_setpgid, &[0, group]),
            // No group has such a number: refused by the kernel.
            Err(_) => call(libc::SYS_setpgid, &[0, u64::MAX]),
        }
    }

    pub(super) fn check_join(&self, result: i64) -> Result<(), TemplateError> {
        match errno(result) {
            None => Ok(()),
            Some(_) => Err(TemplateRefusal::Group { pid: self.pid, group: self.group }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_innermost_namespace() {
        let status = "Name:\tx\nNSpid:\t812\t7\nNSpgid:\t810\t5\nNSsid:\t800\t1\n";
        assert_eq!(Kin::parse(status, 17), Some(Kin { pid: 7, session: 1, group: 5, exit_signal: 17 }));
        assert_eq!(Kin::parse(&status[..status.len() - 12], 17), None);
    }
}
