//! Which host ids a sandbox's users are: one fixed map for all sandboxes, so that frozen layers can be shared.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::sys::process::{self, CloneRequest};

/// Host id of the sandbox's root.
pub const HOST_ID_BASE: u32 = 100_000;
/// How many ids a sandbox has.
pub const N_IDS: u32 = 65_536;

/// Writes the map of a process's new user namespace. Needs CAP_SETUID and CAP_SETGID outside.
pub fn write_maps(pid: libc::pid_t) -> io::Result<()> {
    let line = format!("0 {HOST_ID_BASE} {N_IDS}\n");
    fs::write(format!("/proc/{pid}/uid_map"), &line)?;
    fs::write(format!("/proc/{pid}/gid_map"), &line)
}

/// A user namespace with the map and no process, for idmapped mounts: on such a mount a file of host user 0
/// belongs to the sandbox's root.
pub fn open_namespace() -> io::Result<OwnedFd> {
    let (gate, hold) = io::pipe()?;
    let request =
        CloneRequest { namespaces: u64::from(libc::CLONE_NEWUSER.cast_unsigned()), ..CloneRequest::default() };
    let child = process::clone_waiting(request, gate.as_fd())?;
    let namespace = write_maps(child.pid).and_then(|()| fs::File::open(format!("/proc/{}/ns/user", child.pid)));
    drop(hold);
    process::reap(&child)?;
    Ok(namespace?.into())
}
