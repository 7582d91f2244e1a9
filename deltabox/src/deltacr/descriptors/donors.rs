//! Copies of what leads out of the sandbox, from whoever still has it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use libc::pid_t;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use super::open::file_error;
use super::{Description, DescriptorError, DescriptorRefusal, Held, What};
use crate::deltacr::reopen::reopen;
use crate::deltacr::stop::Stopped;
use crate::sys::process::{pidfd_getfd, pidfd_open};

/// Status flags that fcntl(F_SETFL) sets.
const SETTABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;

/// Who still has what leads out of the sandbox.
pub(super) struct Donors {
    /// By link: process, number, flags.
    found: BTreeMap<Vec<u8>, Vec<(pid_t, i32)>>,
    /// A description is given once; another one like it is opened anew.
    given: BTreeSet<(Vec<u8>, i32)>,
}

impl Donors {
    pub(super) fn find(stopped: &Stopped, init: pid_t, held: &Held) -> Self {
        let link = |one: &Description| match &one.what {
            What::Outside { link } => Some((link.clone(), Vec::new())),
            _ => None,
        };
        let mut found: BTreeMap<Vec<u8>, Vec<(pid_t, i32)>> = held.descriptions.iter().filter_map(link).collect();
        if !found.is_empty() {
            let pids = stopped.processes().iter().map(|process| process.pid).chain([init]);
            pids.for_each(|pid| note(pid, &mut found));
        }
        Self { found, given: BTreeSet::new() }
    }

    /// A copy, or the same opened again. With it the other end, where nobody has that any more.
    pub(super) fn give(&mut self, link: &[u8], flags: i32) -> Result<(OwnedFd, Option<OwnedFd>), DescriptorError> {
        let lost = || DescriptorRefusal::Lost { link: String::from_utf8_lossy(link).into_owned() };
        let donors = self.found.get(link).map_or(&[][..], Vec::as_slice);
        let access = flags & libc::O_ACCMODE;
        if self.given.insert((link.to_vec(), access)) {
            for (pid, number) in donors {
                let Ok(copy) = pidfd_open(*pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), *number)) else { continue };
                let Ok(has) = fcntl(&copy, FcntlArg::F_GETFL) else { continue };
                if has & libc::O_ACCMODE != access {
                    continue;
                }
                if (has ^ flags) & SETTABLE != 0 {
                    let set = fcntl(&copy, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)));
                    set.map_err(|errno| file_error("set the flags of", c"what leads outside")(errno.into()))?;
                }
                return Ok((copy, None));
            }
        }
        // A socket has no second opening.
        let mut reopened = donors.iter().filter(|_| link.starts_with(b"pipe:[")).filter_map(|(pid, number)| {
            let copy = pidfd_open(*pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), *number)).ok()?;
            let new = reopen(copy.as_fd(), OFlag::from_bits_retain(access | libc::O_NONBLOCK)).ok()?;
            fcntl(&new, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags))).ok()?;
            Some(new)
        });
        if let Some(reopened) = reopened.next() {
            return Ok((reopened, None));
        }
        if !link.starts_with(b"pipe:[") {
            return Err(lost().into());
        }
        // Nobody is there any more: an input is at its end, and what is written somebody else will read.
        let failed = file_error("make", c"a pipe in the place of one that led outside");
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let (own, other) = if access == libc::O_RDONLY { (read, None) } else { (write, Some(read)) };
        fcntl(&own, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags))).map_err(|errno| failed(errno.into()))?;
        Ok((own, other))
    }
}

fn note(pid: pid_t, found: &mut BTreeMap<Vec<u8>, Vec<(pid_t, i32)>>) {
    // One that has been killed has nothing to give.
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for entry in entries.flatten() {
        let Ok(link) = std::fs::read_link(entry.path()) else { continue };
        let link = link.into_os_string().into_vec();
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number
            && let Some(donors) = found.get_mut(&link)
        {
            donors.push((pid, number));
        }
    }
}
