//! When and where a thread runs: policy, nice, CPUs, and the class of its input and output.
//!
//! All of it is asked and told from outside (0.3 us each), with the engine's CAP_SYS_NICE: the process itself could not
//! lower its nice value again. The slice of an ordinary thread cannot be told from the default one: where the policy is put
//! back the slice is set too.

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::error::{StateError, process};
use crate::sys::schedule::{
    SchedulingAttributes, get_affinity, get_io_priority, get_scheduling, set_affinity, set_io_priority, set_nice,
    set_scheduling,
};

/// That of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Schedule {
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
    /// 64 CPUs to a word.
    cpus: Vec<u64>,
    io_priority: u32,
}

impl Schedule {
    /// Reads that of a thread.
    pub(super) fn read(pid: pid_t, tid: pid_t) -> Result<Self, StateError> {
        let failed = || process("read the scheduling of", pid);
        let read = get_scheduling(tid).map_err(failed())?;
        Ok(Self {
            policy: read.policy,
            flags: read.flags,
            nice: read.nice,
            priority: read.priority,
            runtime_ns: read.runtime_ns,
            deadline_ns: read.deadline_ns,
            period_ns: read.period_ns,
            cpus: get_affinity(tid).map_err(failed())?,
            io_priority: get_io_priority(tid).map_err(failed())?,
        })
    }

    /// Whether another policy than `now`'s: then the kernel has chosen a timer slack too.
    pub(super) fn is_other_policy(&self, now: &Self) -> bool {
        self.policy != now.policy
    }

    /// Puts it back where it differs from `now`.
    pub(super) fn change(&self, now: &Self, pid: pid_t, tid: pid_t) -> Result<(), StateError> {
        let failed = |what| process(what, pid);
        // CPUs first: a deadline policy is given only to a thread that may run on all.
        if self.cpus != now.cpus {
            set_affinity(tid, &self.cpus).map_err(failed("set the CPUs of"))?;
        }
        if (Self { nice: self.nice, cpus: self.cpus.clone(), io_priority: self.io_priority, ..now.clone() }) == *self {
            if self.nice != now.nice {
                set_nice(tid, self.nice).map_err(failed("set the nice value of"))?;
            }
        } else {
            set_scheduling(tid, self.attributes()).map_err(failed("set the scheduling policy of"))?;
        }
        if self.io_priority != now.io_priority {
            set_io_priority(tid, self.io_priority).map_err(failed("set the priority for input and output of"))?;
        }
        Ok(())
    }

    fn attributes(&self) -> SchedulingAttributes {
        SchedulingAttributes {
            size_bytes: 0,
            policy: self.policy,
            flags: self.flags,
            nice: self.nice,
            priority: self.priority,
            runtime_ns: self.runtime_ns,
            deadline_ns: self.deadline_ns,
            period_ns: self.period_ns,
        }
    }
}
