//! Zombies: children that have ended and for which their parent has not waited. Read at a checkpoint, made again.
//!
//! ```text
//! parent R   clone3(VM, FILES, FS, set_tid) --event--> marker
//! child C         born, halted; let go: setpgid or setsid; exit_group(code), or a signal to itself
//! ```
//! C makes no other calls whether or not the engine lives, so an engine that dies makes no difference to R. A signal of
//! the kind that dumps core would take R's memory along: for that C gets a copy of it, which must not be dumped. The mark
//! that a core was dumped is therefore lost, as are the times that C had used. R's pending SIGCHLD is the caller's job.

use std::fs;
use std::io;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::error::{TemplateError, TemplateRefusal, check, process};
use super::kin::Kin;
use super::rebuild::{Parent, clone};
use crate::deltacr::handover::call;
use crate::deltacr::inject::Call;
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks;
use crate::sys::ptrace::{resume, wait_thread};

/// Where a signal set, the default action and the parent's own lie in the scratch room: after what a clone3 points at.
const NO_SIGNALS: u64 = 256;
const ACTION: u64 = 320;
const OLD_ACTION: u64 = 384;
/// Bytes of the kernel's `struct sigaction`.
const ACTION_BYTES: usize = 32;
const SIGCHLD: u64 = libc::SIGCHLD as u64;
/// Signals whose default is to dump core.
const DUMPING: [i32; 10] = [
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGSYS,
];

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// By itself, with this code, 0 to 255.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl End {
    /// Reads it of a zombie; `None` for a process that lives. It needs the right to trace it.
    ///
    /// # Errors
    /// There is no such process.
    pub fn read(host: pid_t) -> io::Result<Option<Self>> {
        let text = fs::read(format!("/proc/{host}/stat"))?;
        let text = String::from_utf8_lossy(&text);
        let fields: Vec<&str> = text[text.rfind(')').map_or(0, |at| at + 1)..].split_ascii_whitespace().collect();
        // Numbers of proc_pid_stat(5); the third is the first here.
        match (fields.first(), fields.get(52 - 3).and_then(|status| status.parse().ok())) {
            (Some(&"Z"), Some(status)) => Ok(Some(Self::of(status))),
            (Some(_), Some(_)) => Ok(None),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn of(status: i32) -> Self {
        match libc::WTERMSIG(status) {
            0 => Self::Exited(libc::WEXITSTATUS(status)),
            signal => Self::Killed(signal),
        }
    }
}

/// Has the stopped process `parent` (host PID) make a child again that had ended in this way; the zombie's host PID.
///
/// # Errors
/// There is no such zombie, and the parent knows nothing of it.
pub fn make_zombie(stopped: &mut Stopped, parent: pid_t, record: &Kin, end: End) -> Result<pid_t, TemplateError> {
    let failed = |why| TemplateError::from(TemplateRefusal::Zombie { pid: record.pid, why });
    record.check(parent)?;
    let family = Parent::of(stopped, parent)?;
    let mut hand = stopped.hand(parent)?;
    let at = hand.scratch().start;
    hand.write(at + NO_SIGNALS, &[0; 8])?;
    hand.write(at + ACTION, &[0; ACTION_BYTES])?;
    let action = |new: u64, old: u64| call(libc::SYS_rt_sigaction, &[SIGCHLD, new, old, 8]);
    // One that ignores such signals has no zombies. It may do so only since.
    check(parent, "rt_sigaction", hand.run(&[action(at + ACTION, at + OLD_ACTION)])?[0])?;
    let is_dumping = matches!(end, End::Killed(signal) if DUMPING.contains(&signal));
    let memory = if is_dumping { 0 } else { libc::CLONE_VM };
    let flags = memory | libc::CLONE_FILES | libc::CLONE_FS;
    let pid = clone(&mut hand, record, flags, &calls(record, end, is_dumping, at))?;
    let closed = hand.close();
    let ended = closed.map_err(TemplateError::from).and_then(|()| watch_end(pid));
    let mut hand = stopped.hand(parent)?;
    let back = hand.run(&[action(at + OLD_ACTION, 0)])?;
    hand.close()?;
    let ended = check(parent, "rt_sigaction", back[0]).and(ended);
    let made = ended.and_then(|ended| if ended == end { Ok(()) } else { Err(failed("it ends in another way")) });
    let made = made.and_then(|()| match tasks::read_stat(pid, pid).map_err(process("read the state of", pid))? {
        Some(stat) if stat.state == 'Z' => Ok(pid),
        _ => Err(failed("it was gone at once")),
    });
    if made.is_err() {
        family.put_down(stopped, pid, record.pid);
    }
    made
}

/// What it calls; the first failure ends it with 0.
fn calls(record: &Kin, end: End, is_dumping: bool, at: u64) -> Vec<Call> {
    let flags = |number: i32| u64::from(number.cast_unsigned());
    let mut calls = vec![record.join()];
    match end {
        End::Exited(code) => calls.push(call(libc::SYS_exit_group, &[flags(code)])),
        End::Killed(signal) => {
            calls.extend(is_dumping.then(|| call(libc::SYS_prctl, &[flags(libc::PR_SET_DUMPABLE), 0])));
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                calls.push(call(libc::SYS_rt_sigaction, &[flags(signal), at + ACTION, 0, 8]));
            }
            calls.push(call(libc::SYS_rt_sigprocmask, &[flags(libc::SIG_SETMASK), at + NO_SIGNALS, 0, 8]));
            calls.push(call(libc::SYS_kill, &[flags(record.pid), flags(signal)]));
            calls.push(call(libc::SYS_exit_group, &[0]));
        }
    }
    calls
}

/// Lets it run to its end.
fn watch_end(pid: pid_t) -> Result<End, TemplateError> {
    let failed = process("wait for the end of", pid);
    let mut signal = 0;
    loop {
        resume(pid, signal).map_err(failed)?;
        let status = loop {
            match wait_thread(pid, 0) {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        };
        if !libc::WIFSTOPPED(status) {
            return Ok(End::of(status));
        }
        // Its own signal goes through; an event of the tracer does not.
        signal = if status >> 16 == 0 { libc::WSTOPSIG(status) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_code_or_a_signal() {
        assert_eq!(End::of(7 << 8), End::Exited(7));
        assert_eq!(End::of(9), End::Killed(9));
        assert_eq!(End::of(11 | 0x80), End::Killed(11), "with a core");
    }
}
