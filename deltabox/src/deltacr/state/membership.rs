//! The session and the process group that a process belongs to, and what its parent is sent at its end.
//!
//! ```text
//! same session     another group: setpgid. A group is there as long as it has a member: its leader comes back first
//! new session      of its own only, and only from a group that it does not lead: setsid   (a fork of its template)
//! any other        impossible: nobody leaves or enters a session otherwise
//! ```

use serde::{Deserialize, Serialize};

use super::batch::{Asked, Batch, Room};
use super::error::StateError;
use super::impossible::{Impossible, Judge};

/// That of a process. Numbers as inside; 0 for a group or session of another PID namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Membership {
    session: u32,
    group: u32,
    exit_signal: i32,
}

/// What was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Questions {
    session: Asked,
    group: Asked,
    ended: Room,
}

/// Of waitid(2): any child that has ended, whatever it sends, and nothing is changed.
const LOOK: u64 = (libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL).cast_unsigned() as u64;
/// Of `siginfo_t`.
const INFO_BYTES: usize = 128;

impl Membership {
    /// Asks the process.
    pub(super) fn ask(batch: &mut Batch) -> Questions {
        let ended = batch.room(INFO_BYTES);
        // ECHILD: it has no children; the answer is written all the same.
        batch.add("waitid", libc::SYS_waitid, &[libc::P_ALL.into(), 0, ended.at, LOOK, 0]);
        Questions {
            session: batch.add("getsid", libc::SYS_getsid, &[0]),
            group: batch.add("getpgid", libc::SYS_getpgid, &[0]),
            ended,
        }
    }

    /// Takes the answers.
    pub(super) fn answer(batch: &Batch, asked: &Questions, exit_signal: i32) -> Result<Self, StateError> {
        let (session, group) = (batch.answer_u32(asked.session)?, batch.answer_u32(asked.group)?);
        Ok(Self { session, group, exit_signal })
    }

    /// Whether it has children that have ended and for which it has not waited.
    pub(super) fn has_ended_children(batch: &Batch, asked: &Questions) -> bool {
        // The signal's number: 0 if there is none.
        batch.bytes(asked.ended)[..4] != [0; 4]
    }

    /// Whether there is a way back from `now`, as far as the process alone can tell: there has to be a group to go to.
    pub(super) fn judge(&self, now: &Self, judge: &Judge) -> Result<(), Impossible> {
        let own = judge.pid.unsigned_abs();
        let can = self.session == now.session || (self.session == own && now.group != own);
        judge.unless(can, "the session", self.session.to_string(), now.session.to_string())?;
        let can = self.group == now.group
            || (self.group != 0 && now.session != own)
            // The leader of a new session leads its group.
            || (self.session != now.session && self.group == own);
        judge.unless(can, "the process group", self.group.to_string(), now.group.to_string())?;
        let can = self.exit_signal == now.exit_signal;
        judge.unless(can, "the signal at its end", self.exit_signal.to_string(), now.exit_signal.to_string())
    }

    /// The group that it had is gone, or has moved to another session.
    pub(super) fn no_group(&self, now: &Self, pid: libc::pid_t) -> Impossible {
        Impossible {
            pid,
            what: "the process group, which is gone now,",
            was: self.group.to_string(),
            is: now.group.to_string(),
        }
    }

    /// The steps back from `now`; the last one is told if it may fail because there is no such group.
    pub(super) fn change(&self, now: &Self, batch: &mut Batch) -> Option<Asked> {
        if self.session != now.session {
            batch.add("setsid", libc::SYS_setsid, &[]);
            return None;
        }
        (self.group != now.group).then(|| batch.add("setpgid", libc::SYS_setpgid, &[0, self.group.into()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_left_and_sessions_are_only_begun() {
        let of = |session, group| Membership { session, group, exit_signal: 17 };
        let judge = Judge { pid: 7 };
        let cases = [
            // was, is, whether there is a way
            (of(3, 3), of(3, 3), true),
            (of(3, 3), of(3, 7), true),
            (of(3, 7), of(3, 3), true),
            // It has become the leader of a session.
            (of(3, 3), of(7, 7), false),
            (of(3, 7), of(7, 7), false),
            // A fork of its template, in the session of that.
            (of(7, 7), of(50, 50), true),
            (of(7, 7), of(50, 7), false),
            (of(3, 3), of(50, 50), false),
            // A group outside of the namespace that it has left.
            (of(0, 0), of(0, 7), false),
            (of(0, 0), of(0, 0), true),
        ];
        for (was, is, can) in cases {
            assert_eq!(was.judge(&is, &judge).is_ok(), can, "{was:?} from {is:?}");
        }
        let is = Membership { exit_signal: 0, ..of(3, 3) };
        assert_eq!(of(3, 3).judge(&is, &judge).expect_err("another signal").what, "the signal at its end");
    }
}
