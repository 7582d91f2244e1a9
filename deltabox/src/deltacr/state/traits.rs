//! What a process has as a whole and a fork does not all inherit: dumpable, huge pages, subreaper, the OOM killer's score.
//!
//! The score is told from outside. An engine with CAP_SYS_RESOURCE would set the lowest score that the process may give
//! itself too, which nobody can read: it lays that capability down meanwhile, and what is put back was allowed before.

use std::fs;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::batch::{Asked, Batch};
use super::error::{StateError, process};
use super::habits::prctl;
use super::impossible::{Impossible, Judge};
use crate::sys::process::without_sys_resource;

/// Those of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Traits {
    dumpable: u32,
    /// 1, and since Linux 6.18 with a flag.
    thp_disable: u32,
    subreaper: bool,
    oom_score_adj: i32,
}

/// What was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Questions {
    dumpable: Asked,
    thp_disable: Asked,
    subreaper: (Asked, super::batch::Room),
    keyrings: Asked,
}

impl Traits {
    /// Asks the process.
    pub(super) fn ask(batch: &mut Batch) -> Questions {
        let room = batch.room(4);
        Questions {
            dumpable: prctl(batch, libc::PR_GET_DUMPABLE, &[]),
            thp_disable: prctl(batch, libc::PR_GET_THP_DISABLE, &[0; 4]),
            subreaper: (prctl(batch, libc::PR_GET_CHILD_SUBREAPER, &[room.at]), room),
            // That of the process, not to be made.
            keyrings: batch.add("keyctl", libc::SYS_keyctl, &[0, (-2_i64).cast_unsigned(), 0]),
        }
    }

    /// Takes the answers, and reads the score.
    pub(super) fn answer(batch: &Batch, asked: &Questions, pid: pid_t, tid: pid_t) -> Result<Self, StateError> {
        batch.refuse_keyring(asked.keyrings, "its own")?;
        batch.answer(asked.subreaper.0)?;
        Ok(Self {
            dumpable: batch.answer_u32(asked.dumpable)?,
            thp_disable: batch.answer_u32(asked.thp_disable)?,
            subreaper: batch.words(asked.subreaper.1)[0] != 0,
            oom_score_adj: read_score(pid, tid)?,
        })
    }

    /// Whether there is a way back from `now`; `forgotten`: credentials change, and with them what is dumpable.
    pub(super) fn judge(&self, now: &Self, forgotten: bool, judge: &Judge) -> Result<(), Impossible> {
        // 2 is the kernel's to set (fs.suid_dumpable).
        let can = self.dumpable < 2 || (now.dumpable == self.dumpable && !forgotten);
        judge.unless(can, "dumpable", self.dumpable.to_string(), now.dumpable.to_string())
    }

    /// The steps back from `now`.
    pub(super) fn change(&self, now: &Self, forgotten: bool, batch: &mut Batch) {
        if self.thp_disable != now.thp_disable {
            let [on, flags] = [self.thp_disable & 1, self.thp_disable & !1].map(u64::from);
            prctl(batch, libc::PR_SET_THP_DISABLE, &[on, flags, 0, 0]);
        }
        if self.subreaper != now.subreaper {
            prctl(batch, libc::PR_SET_CHILD_SUBREAPER, &[self.subreaper.into()]);
        }
        if self.dumpable != now.dumpable || forgotten {
            prctl(batch, libc::PR_SET_DUMPABLE, &[self.dumpable.into()]);
        }
    }

    /// Puts the score back.
    pub(super) fn change_score(&self, now: &Self, pid: pid_t, tid: pid_t) -> Result<(), StateError> {
        if self.oom_score_adj == now.oom_score_adj {
            return Ok(());
        }
        let path = format!("/proc/{pid}/task/{tid}/oom_score_adj");
        let written = without_sys_resource(|| fs::write(path, self.oom_score_adj.to_string()));
        written.map_err(process("set the OOM killer's score of", pid))
    }
}

fn read_score(pid: pid_t, tid: pid_t) -> Result<i32, StateError> {
    let failed = || process("read the OOM killer's score of", pid);
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/oom_score_adj")).map_err(failed())?;
    text.trim().parse().map_err(|_| StateError::Status { pid, field: "oom_score_adj" })
}
