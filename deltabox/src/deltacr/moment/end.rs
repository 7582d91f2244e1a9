//! The end of processes that are not to be there any more, without a trace for those that are.

use std::io;

use libc::pid_t;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Identity;
use super::error::{MomentError, process};
use crate::deltacr::handover::call;
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::{Child, scan_children};
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

/// Has `parent` (host PID) take the exit status of each of its children that has ended, but for those in `kept` (PIDs
/// inside): it must not learn of them.
///
/// # Errors
/// It could not.
pub(super) fn reap_children(stopped: &mut Stopped, parent: pid_t, kept: &[pid_t]) -> Result<(), MomentError> {
    let children = scan_children(parent).map_err(process("list the children of", parent))?;
    let ended = children.into_iter().filter(|child| child.is_zombie && !kept.contains(&child.inside));
    let wait = |child: Child| {
        let all = (libc::__WALL | libc::WNOHANG).cast_unsigned().into();
        call(libc::SYS_wait4, &[i64::from(child.inside).cast_unsigned(), 0, all, 0])
    };
    let calls: Vec<_> = ended.map(wait).collect();
    if calls.is_empty() {
        return Ok(());
    }
    let mut hand = stopped.hand(parent)?;
    // ECHILD: the parent ignores SIGCHLD, and the kernel has reaped it.
    hand.run(&calls)?;
    Ok(hand.close()?)
}
