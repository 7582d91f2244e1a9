//! The end of processes that are not to be there any more, without a trace for those that are.

use std::io;

use libc::pid_t;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Identity;
use super::error::{MomentError, process};
use crate::deltacr::handover::call;
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::scan_children;
use crate::fault;
use crate::sys::ptrace::wait_thread;

/// Ends stopped processes, and takes them out of `stopped`.
///
/// # Errors
/// Some have ended.
pub(super) fn end_all(stopped: &mut Stopped, ending: &[Identity]) -> Result<(), MomentError> {
    fault::point("moment.end").map_err(process("end", 0))?;
    for one in ending {
        // Killed meanwhile: as good.
        let _ = kill(Pid::from_raw(one.host), Signal::SIGKILL);
    }
    for one in ending {
        let Some(at) = stopped.processes.iter().position(|process| process.pid == one.host) else { continue };
        let ended = stopped.processes.swap_remove(at);
        // The leader's end is told when no other thread is left.
        for thread in ended.threads.iter().rev() {
            wait_end(thread.tid).map_err(process("wait for the end of", one.host))?;
        }
    }
    Ok(())
}

fn wait_end(tid: pid_t) -> io::Result<()> {
    loop {
        match wait_thread(tid, 0) {
            Ok(Some(status)) if libc::WIFSTOPPED(status) => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another has reaped it.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Has `parent` (host PID) take the exit status of each of its children that has ended, but for those in `kept` (host
/// PIDs): it must not learn of them.
///
/// # Errors
/// It could not.
pub(super) fn reap_children(stopped: &mut Stopped, parent: pid_t, kept: &[pid_t]) -> Result<(), MomentError> {
    let children = scan_children(parent).map_err(process("list the children of", parent))?;
    let ended = children.into_iter().filter(|child| child.is_zombie && !kept.contains(&child.host));
    let ended: Vec<pid_t> = ended.map(|child| child.inside).collect();
    if ended.is_empty() { Ok(()) } else { reap(stopped, parent, &ended) }
}

/// Has `parent` (host PID) take the exit status of children (PIDs inside) that have ended.
///
/// # Errors
/// It could not.
pub(super) fn reap(stopped: &mut Stopped, parent: pid_t, ended: &[pid_t]) -> Result<(), MomentError> {
    let wait = |inside: &pid_t| {
        let all = (libc::__WALL | libc::WNOHANG).cast_unsigned().into();
        call(libc::SYS_wait4, &[i64::from(*inside).cast_unsigned(), 0, all, 0])
    };
    let mut hand = stopped.hand(parent)?;
    // ECHILD: the parent ignores SIGCHLD, and the kernel has reaped it.
    hand.run(&ended.iter().map(wait).collect::<Vec<_>>())?;
    Ok(hand.close()?)
}

/// Has `parent` (host PID) hear that a child (PID inside) was continued, which it must not learn later.
///
/// # Errors
/// It could not.
pub(super) fn forget_continued(stopped: &mut Stopped, parent: pid_t, child: pid_t) -> Result<(), MomentError> {
    let look = (libc::WCONTINUED | libc::WNOHANG).cast_unsigned().into();
    let mut hand = stopped.hand(parent)?;
    // There may be nothing to be heard.
    hand.call(libc::SYS_waitid, call(0, &[libc::P_PID.into(), i64::from(child).cast_unsigned(), 0, look, 0]).args)?;
    Ok(hand.close()?)
}
