//! Which process: numbers that tell it from every other, and its place in the family.

use std::fs;
use std::io;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use crate::deltacr::tasks::pid_inside;
use crate::deltacr::template::Kin;

/// A process among its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// In the sandbox's PID namespace.
    pub inside: pid_t,
    /// Of its parent; 1 for init.
    pub parent: pid_t,
    /// In the host's PID namespace.
    pub host: pid_t,
    /// When it was made, clock ticks since boot: a number is given again, with another time.
    pub start: u64,
    /// Its session, inside.
    pub session: pid_t,
    /// Its process group, inside.
    pub group: pid_t,
    /// What its parent is sent at its end; 0 for nothing.
    pub exit_signal: i32,
}

impl Identity {
    /// Reads that of a process, which may be a zombie.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn read(host: pid_t) -> io::Result<Self> {
        let text = fs::read(format!("/proc/{host}/stat"))?;
        let (parent, start) = parse(&String::from_utf8_lossy(&text)).ok_or(io::ErrorKind::InvalidData)?;
        // A parent in another namespace has no number here.
        let parent = if parent == 0 { 0 } else { pid_inside(parent)? };
        let Kin { pid, session, group, exit_signal } = Kin::read(host)?;
        Ok(Self { inside: pid, parent, host, start, session, group, exit_signal })
    }

    /// Whether both are the same process, whatever has changed in its family.
    pub(super) fn is(&self, other: &Self) -> bool {
        (self.host, self.start) == (other.host, other.start)
    }

    /// Whether it leads its session.
    pub(super) fn leads_session(&self) -> bool {
        self.session == self.inside
    }

    /// What another process needs to know to make it again.
    pub(super) fn kin(&self) -> Kin {
        Kin { pid: self.inside, session: self.session, group: self.group, exit_signal: self.exit_signal }
    }
}

/// Parent and start time of a line of `stat`.
fn parse(text: &str) -> Option<(pid_t, u64)> {
    let rest = &text[text.rfind(')')? + 1..];
    // Numbers of proc_pid_stat(5); the third is the first here.
    let mut fields = rest.split_ascii_whitespace();
    let parent = fields.nth(4 - 3)?.parse().ok()?;
    Some((parent, fields.nth(22 - 5)?.parse().ok()?))
}

#[cfg(test)]
impl Identity {
    /// A process in a session and group of its parent's, or, a child of init, of its own.
    pub(super) fn of(inside: pid_t, parent: pid_t, start: u64) -> Self {
        let leader = if parent == 1 { inside } else { parent };
        Self { inside, parent, host: inside + 1000, start, session: leader, group: leader, exit_signal: 17 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_stat_is_read_behind_the_name() {
        let line = "77 (a) b) S 5 77 77 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 3 0 1234 4096 10 1 1";
        assert_eq!(parse(line), Some((5, 1234)));
        assert_eq!(parse(&line[..line.find("1234").expect("its start")]), None);
    }

    #[test]
    fn this_process_is_a_child_of_its_parent() {
        let own = Identity::read(std::process::id().cast_signed()).expect("identity");
        assert_eq!(own.parent, std::os::unix::process::parent_id().cast_signed());
        assert!(own.is(&Identity { parent: 0, group: 0, ..own }) && !own.is(&Identity { start: own.start + 1, ..own }));
    }
}
