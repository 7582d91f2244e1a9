//! Terminals: whose master is where.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::pid_t;
use nix::fcntl::OFlag;

use super::{DescriptorError, What};
use crate::deltacr::objects::ObjectError;
use crate::deltacr::objects::terminal::{Pair, Place, Terminal};
use crate::deltacr::tasks::pid_inside;
use crate::sandbox::root::Root;
use crate::sys::process::{pidfd_getfd, pidfd_open};
use crate::sys::tty::{Ask, ask};

/// The terminals that processes hold, as they are met.
pub(super) struct Terminals {
    init: pid_t,
    found: Vec<Found>,
}

struct Found {
    index: i32,
    /// Who had it first.
    pid: pid_t,
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
}

impl Terminals {
    pub(super) fn new(init: pid_t) -> Self {
        Self { init, found: Vec::new() }
    }

    /// Notes a description of a side that process `pid` has.
    pub(super) fn note(&mut self, pid: pid_t, copy: BorrowedFd<'_>, is_master: bool) -> io::Result<What> {
        let index = if is_master { ask(copy, Ask::Index)? } else { slave_index(copy)? };
        let terminal = match self.found.iter().position(|found| found.index == index) {
            Some(at) => at,
            None => {
                self.found.push(Found { index, pid, master: None, slave: None });
                self.found.len() - 1
            }
        };
        let found = &mut self.found[terminal];
        let side = if is_master { &mut found.master } else { &mut found.slave };
        if side.is_none() {
            *side = Some(copy.try_clone_to_owned()?);
        }
        Ok(What::Terminal { terminal, is_master })
    }

    /// Reads them all.
    pub(super) fn read(self) -> Result<Vec<Terminal>, DescriptorError> {
        if self.found.is_empty() {
            return Ok(Vec::new());
        }
        let init = self.init;
        let failed = |op| move |source| DescriptorError::Process { op, pid: init, source };
        let devpts = open_devpts(init).map_err(failed("open /dev/pts"))?;
        let mut terminals = Vec::with_capacity(self.found.len());
        for Found { index, pid, master, slave } in self.found {
            let place = if master.is_some() { Place::Inside } else { Place::Outside };
            let master =
                match master {
                    Some(master) => master,
                    None => find_master(init, index).map_err(failed("look for the master of a terminal"))?.ok_or_else(
                        || failed("find the master of a terminal")(io::Error::other("nobody has it: it was hung up")),
                    )?,
                };
            let pair = Pair { devpts: devpts.as_fd(), master: master.as_fd(), slave: slave.as_ref().map(AsFd::as_fd) };
            let object = |source: ObjectError| DescriptorError::Object { pid, number: -1, source };
            terminals.push(Terminal::read(pair, place, |host| pid_inside(host).ok()).map_err(object)?);
        }
        Ok(terminals)
    }
}

/// The sandbox's `/dev/pts`.
pub(super) fn open_devpts(init: pid_t) -> io::Result<OwnedFd> {
    Ok(Root::of(init)?.open(&c"/dev/pts".to_owned(), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?)
}

/// A copy of the master of a terminal that process `pid` has.
pub(super) fn find_master(pid: pid_t, index: i32) -> io::Result<Option<OwnedFd>> {
    let pidfd = pidfd_open(pid)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let is_master = fs::read_link(entry.path()).is_ok_and(|link| link.ends_with("ptmx"));
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (true, Some(number)) = (is_master, number) else { continue };
        let Ok(copy) = pidfd_getfd(pidfd.as_fd(), number) else { continue };
        if ask(copy.as_fd(), Ask::Index).is_ok_and(|found| found == index) {
            return Ok(Some(copy));
        }
    }
    Ok(None)
}

/// N of `/dev/pts/N`, also where it was opened as `/dev/tty`.
fn slave_index(slave: BorrowedFd<'_>) -> io::Result<i32> {
    let device = ask(slave, Ask::Device)?;
    Ok((device & 0xff) | (device >> 12) & 0xf_ff00)
}
