//! What a task that does not come is doing: told with the error, for nobody can look afterwards.

use std::fmt;
use std::fs;

use libc::pid_t;

use super::tasks;

/// Lines of a kernel stack that are told (chosen: the upper ones say what is waited for).
const N_FRAMES: usize = 8;

/// A task seen from outside, as far as the kernel tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whereabouts {
    /// Host TID.
    pub tid: pid_t,
    /// The letter of `/proc/TID/stat`, `-` if it is gone.
    pub state: char,
    /// Number of the system call, -1 if not known.
    pub call: i64,
    /// The kernel function that it waits in.
    pub wchan: String,
    /// Its kernel stack, the innermost function first.
    pub stack: Vec<String>,
    /// The CPU it ran on last.
    pub cpu: usize,
    /// Those it may use, as a list.
    pub cpus: String,
    /// Nanoseconds that it ran, and that it waited for a CPU; times that it got one.
    pub ran: String,
}

impl Whereabouts {
    /// Looks at a task.
    pub(super) fn look(tid: pid_t) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/{tid}/{name}")).unwrap_or_default();
        let (call, _, wchan) = tasks::read_whereabouts(tid, tid);
        let stat = tasks::read_stat(tid, tid).ok().flatten();
        let (state, cpu) = stat.map_or(('-', 0), |stat| (stat.state, stat.cpu));
        let status = read("status");
        let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
        let stack = read("stack");
        let frames = stack.lines().map(|line| line.rsplit(' ').next().unwrap_or(line).to_owned());
        let (stack, cpus) = (frames.take(N_FRAMES).collect(), cpus.trim().to_owned());
        Self { tid, state, call, wchan, stack, cpu, cpus, ran: read("schedstat").trim().to_owned() }
    }
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tid, state, call, wchan, stack, cpu, cpus, ran } = self;
        let stack = stack.join(" < ");
        write!(f, "task {tid} in state {state}, system call {call}, waits in {wchan} ({stack}), ")?;
        write!(f, "CPU {cpu} of {cpus}, ran, waited, turns: {ran}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_told_with_its_state_and_its_cpus() {
        let me = Whereabouts::look(nix::unistd::gettid().as_raw());
        assert_eq!(me.state, 'R');
        assert!(!me.cpus.is_empty(), "{me}");
        assert_eq!(Whereabouts::look(pid_t::MAX).state, '-');
    }
}
