//! What a process is apart from memory, registers and descriptors: read at a checkpoint, put back at a rollback.
//!
//! [`Person`] joins all pieces: one hand with one batch in each thread reads them, and each puts back only what differs. What
//! each way back finds, and so what there is to do (`=` nothing, it is there already):
//!
//! | | in place | fork of its template | rebuilt under another parent |
//! |---|---|---|---|
//! | users, groups, capability sets, securebits, no_new_privs | its own, since changed | = | the parent's |
//! | seccomp filters | its own: more of them are impossible | = | the parent's: only those of init |
//! | keyrings | session: never changed inside | session =, others none | session: the parent's |
//! | umask, limits, nice, policy, affinity, io priority | since changed | = (not after SCHED_RESET_ON_FORK) | the parent's |
//! | timer slack | since changed | = (what it falls back to by 0: the same) | the parent's |
//! | personality, name | since changed | = | the parent's |
//! | OOM score | since changed | = (unless the engine has given templates another) | the parent's |
//! | dumpable, huge pages (of the memory) | since changed | = | the parent's |
//! | PDEATHSIG, subreaper | since changed | none | none |
//! | process group, session | since changed: never a session that was left | the template's: it begins its own | the parent's |
//! | signal at its end | impossible if another | clone3's | clone3's |
//! | actions of signals, the leader's stack for them | since changed | = | the parent's |
//! | signals that wait, interval timers | since changed | none | none |
//! | all that other threads have | since changed | the leader's; no stacks, nothing waits | the parent's |
//!
//! What a process gave up for good since (capabilities, a hard limit, its session) it does not get back in place:
//! [`Person::can_be_put_back`] says so beforehand, and the process has to be made again from its template.
//!
//! Keyrings: nothing of them is in `/proc/PID`. A sandbox's filter denies keyctl and its kin, so the session keyring is that
//! of init, which is the one that the engine was started with. To ask for it makes one if there is none
//! (KEYCTL_GET_KEYRING_ID installs the user's, measured): it is not asked for. Thread and process keyrings answer ENOKEY
//! without a trace; a process that has one is refused.
//!
//! Not kept: CPU time used so far (RLIMIT_CPU counts anew in a new process), the autogroup's nice value, utilization clamps,
//! core scheduling cookies, PR_SET_MDWE, speculation control, syscall user dispatch, memory policies.

mod batch;
mod credentials;
mod error;
mod habits;
mod impossible;
mod limits;
mod membership;
mod person;
mod schedule;
mod signals;
mod status;
mod threads;
mod traits;

pub use error::StateError;
pub use impossible::Impossible;
pub use person::Person;
pub use signals::Signals;

/// How many system call filters a process has.
///
/// # Errors
/// There is no such process.
pub fn n_filters(pid: libc::pid_t) -> Result<u32, StateError> {
    Ok(status::Status::read(pid, pid)?.0.n_filters)
}
