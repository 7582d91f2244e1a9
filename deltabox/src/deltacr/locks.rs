//! Locks on files: of a description (flock(2), open file description locks) and of a process (fcntl(2)).

use std::io;
use std::os::fd::BorrowedFd;

use nix::fcntl::{FcntlArg, fcntl};

use super::fdinfo::{Lock, Owner};
use super::handover::{LastCall, number, unsigned};
use crate::sys::fs::lock_description;

/// Takes those that belong to the description. On a new file nobody else can hold any.
pub(super) fn take(new: BorrowedFd<'_>, locks: &[Lock]) -> io::Result<()> {
    for lock in locks {
        match lock.owner {
            Owner::Description => lock_description(new, lock.exclusive)?,
            Owner::DescriptionRange => fcntl(new, FcntlArg::F_OFD_SETLK(&range(lock))).map(drop)?,
            Owner::Process | Owner::Other => {}
        }
    }
    Ok(())
}

/// Has a process take one of its own, through its descriptor `held`.
pub(super) fn call(held: i32, lock: &Lock) -> LastCall {
    let l = range(lock);
    let mut bytes = Vec::with_capacity(size_of::<libc::flock>());
    bytes.extend(l.l_type.to_ne_bytes());
    bytes.extend(l.l_whence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(l.l_start.to_ne_bytes());
    bytes.extend(l.l_len.to_ne_bytes());
    bytes.extend([0; 8]);
    let args = vec![number(held), unsigned(libc::F_SETLK)];
    LastCall { name: "fcntl(F_SETLK)", nr: libc::SYS_fcntl, args, bytes }
}

/// Whether a descriptor with these flags can take it: a shared one wants to read, an exclusive one to write.
pub(super) fn can_take(lock: &Lock, flags: i32) -> bool {
    let wrong = if lock.exclusive { libc::O_RDONLY } else { libc::O_WRONLY };
    flags & libc::O_ACCMODE != wrong && flags & libc::O_PATH == 0
}

/// A lock as fcntl(2) takes it.
fn range(lock: &Lock) -> libc::flock {
    #[expect(clippy::cast_possible_truncation, reason = "small constants of the C library")]
    libc::flock {
        l_type: if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: lock.start,
        l_len: lock.len_bytes,
        l_pid: 0,
    }
}
