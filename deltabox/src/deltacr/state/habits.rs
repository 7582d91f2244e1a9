//! What a thread has arranged for itself: name, umask, personality, timer slack, the signal at its parent's end.
//!
//! None but the thread itself is told PDEATHSIG (and securebits, and its signal stack): that is why each thread of a
//! process needs a hand. A new thread or process has no PDEATHSIG, a change of credentials forgets it.
//! The umask belongs to what threads share as a rule (CLONE_FS): it comes back with that of the first thread then. One that
//! has unshared it gets its own. Made again as sharing it, threads with different umasks do not come back (an error).

use serde::{Deserialize, Serialize};

use super::batch::{Asked, Batch, Room};
use super::error::StateError;
use super::status::Status;

/// TASK_COMM_LEN.
const NAME_BYTES: usize = 16;

/// Those of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Habits {
    /// Up to its end.
    name: Vec<u8>,
    umask: u32,
    personality: u32,
    /// 0 for real-time policies.
    timer_slack_ns: u64,
    /// 0 for none.
    parent_death_signal: u32,
}

/// What was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Questions {
    name: (Asked, Room),
    personality: Asked,
    timer_slack: Asked,
    parent_death_signal: (Asked, Room),
}

/// A call of prctl(2).
pub(super) fn prctl(batch: &mut Batch, what: i32, args: &[u64]) -> Asked {
    batch.add("prctl", libc::SYS_prctl, &[&[what.cast_unsigned().into()], args].concat())
}

impl Habits {
    /// Asks a thread.
    pub(super) fn ask(batch: &mut Batch) -> Questions {
        let (name, signal) = (batch.room(NAME_BYTES), batch.room(4));
        Questions {
            name: (prctl(batch, libc::PR_GET_NAME, &[name.at]), name),
            // Asks without setting.
            personality: batch.add("personality", libc::SYS_personality, &[0xffff_ffff]),
            timer_slack: prctl(batch, libc::PR_GET_TIMERSLACK, &[]),
            parent_death_signal: (prctl(batch, libc::PR_GET_PDEATHSIG, &[signal.at]), signal),
        }
    }

    /// Takes the answers.
    pub(super) fn answer(batch: &Batch, asked: &Questions, status: &Status) -> Result<Self, StateError> {
        batch.answer(asked.name.0)?;
        batch.answer(asked.parent_death_signal.0)?;
        let name = batch.bytes(asked.name.1);
        Ok(Self {
            name: name.iter().copied().take_while(|byte| *byte != 0).collect(),
            umask: status.umask,
            personality: batch.answer_u32(asked.personality)?,
            timer_slack_ns: batch.answer(asked.timer_slack)?.cast_unsigned(),
            parent_death_signal: batch.words(asked.parent_death_signal.1)[0],
        })
    }

    pub(super) fn has_same_umask(&self, other: &Self) -> bool {
        self.umask == other.umask
    }

    /// Counts as having the umask of `other`.
    pub(super) fn take_umask(&mut self, other: &Self) {
        self.umask = other.umask;
    }

    /// The steps back from `now`. `forgotten`: credentials are put back before, and PDEATHSIG is gone; `new_policy`: the
    /// kernel has chosen another timer slack.
    pub(super) fn change(&self, now: &Self, forgotten: bool, new_policy: bool, batch: &mut Batch) {
        if self.name != now.name {
            let mut bytes = self.name.clone();
            bytes.resize(NAME_BYTES, 0);
            let at = batch.input(&bytes);
            prctl(batch, libc::PR_SET_NAME, &[at]);
        }
        if self.umask != now.umask {
            batch.add("umask", libc::SYS_umask, &[self.umask.into()]);
        }
        if self.personality != now.personality {
            batch.add("personality", libc::SYS_personality, &[self.personality.into()]);
        }
        // 0 would mean the default; only the kernel sets that, with a real-time policy.
        if self.timer_slack_ns != 0 && (new_policy || self.timer_slack_ns != now.timer_slack_ns) {
            prctl(batch, libc::PR_SET_TIMERSLACK, &[self.timer_slack_ns]);
        }
        if self.parent_death_signal != now.parent_death_signal || (forgotten && self.parent_death_signal != 0) {
            prctl(batch, libc::PR_SET_PDEATHSIG, &[self.parent_death_signal.into()]);
        }
    }
}
