//! Descriptions made again, by the engine, which no file's permissions stop.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Whence, lseek};

use super::read::is_numbered;
use super::{Cwd, Description, DescriptorError, DescriptorRefusal, Held, What};
use crate::deltacr::reopen::{OPENING, make_gone, reopen};
use crate::deltacr::shared::Present;
use crate::deltacr::stop::Stopped;
use crate::deltacr::{locks, position};
use crate::sandbox::root::Root;
use crate::sys::process::{pidfd_getfd, pidfd_open};
use crate::sys::stat::stat;

/// Status flags that fcntl(F_SETFL) sets.
const SETTABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;

/// All descriptions of a checkpoint, made again and in the engine's hands.
#[derive(Debug)]
pub struct Opened<'a> {
    pub(super) held: &'a Held,
    pub(super) descriptions: Vec<OwnedFd>,
    /// By PID inside.
    pub(super) cwds: BTreeMap<pid_t, OwnedFd>,
}

impl Held {
    /// Makes everything again: files of the tree on `to`, which may be attached nowhere yet; those of other mounts as
    /// process `init` sees them; for what led out of the sandbox a stopped process, or `init`, gives a copy.
    ///
    /// # Errors
    /// No process has been changed.
    pub(in crate::deltacr) fn open(
        &self,
        stopped: &Stopped,
        to: &Root,
        init: pid_t,
        memory: &Present<'_>,
    ) -> Result<Opened<'_>, DescriptorError> {
        let failed = |source| DescriptorError::Process { op: "find the root", pid: init, source };
        let around = Root::of(init).map_err(failed)?;
        let mut donors = Donors::find(stopped, init, self);
        let mut opener = Opener { to, around: &around, memory, gone: None };
        let mut descriptions = Vec::with_capacity(self.descriptions.len());
        for description in &self.descriptions {
            descriptions.push(match &description.what {
                What::Outside { link } => donors.give(link, description.flags)?,
                _ => opener.description(description)?,
            });
        }
        let mut cwds = BTreeMap::new();
        for (pid, seat) in &self.seats {
            cwds.insert(*pid, opener.cwd(&seat.cwd)?);
        }
        Ok(Opened { held: self, descriptions, cwds })
    }
}

struct Opener<'a> {
    to: &'a Root,
    around: &'a Root,
    memory: &'a Present<'a>,
    /// A directory that was removed.
    gone: Option<OwnedFd>,
}

impl Opener<'_> {
    fn description(&self, Description { flags, position, what }: &Description) -> Result<OwnedFd, DescriptorError> {
        let flags = OFlag::from_bits_retain(flags & !OPENING);
        match what {
            What::File { path, kind, locks, unread } => {
                let failed = |op| file_error(op, path);
                let mut flags = flags;
                if flags.contains(OFlag::O_PATH) {
                    flags.insert(OFlag::O_NOFOLLOW);
                } else if *kind != libc::S_IFDIR {
                    flags.remove(OFlag::O_TMPFILE);
                }
                let new = self.to.open(path, flags).map_err(|errno| failed("open")(errno.into()))?;
                let found = stat(new.as_fd()).map_err(failed("look at"))?.kind();
                if found != *kind {
                    return Err(failed("open")(io::Error::other("it is of another kind than it was")));
                }
                match unread {
                    Some(unread) => position::go_on(new.as_fd(), unread).map_err(failed("set the position in"))?,
                    None if *position != 0 && *kind == libc::S_IFREG => {
                        let set = lseek(&new, *position, Whence::SeekSet);
                        set.map_err(|errno| failed("set the position in")(errno.into()))?;
                    }
                    None => {}
                }
                locks::take(new.as_fd(), locks).map_err(failed("lock"))?;
                Ok(new)
            }
            What::Mount { path } => self.on_mount(path, flags, *position),
            What::Memory { key } => {
                let failed = file_error("open", c"a memfd");
                let file = self.memory.of(*key).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
                let new = reopen(file, flags).map_err(&failed)?;
                lseek(&new, *position, Whence::SeekSet).map_err(|errno| failed(errno.into()))?;
                Ok(new)
            }
            What::Outside { .. } => Err(file_error("open", c"")(io::ErrorKind::Unsupported.into())),
        }
    }

    fn on_mount(&self, path: &CString, flags: OFlag, position: i64) -> Result<OwnedFd, DescriptorError> {
        let failed = |errno: Errno| file_error("open", path)(errno.into());
        // Something that would wait (a terminal's carrier) does not.
        let opening = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let new = self.around.open(path, opening).map_err(failed)?;
        if !flags.contains(OFlag::O_NONBLOCK) && !flags.contains(OFlag::O_PATH) {
            fcntl(&new, FcntlArg::F_SETFL(flags)).map_err(failed)?;
        }
        if position != 0 {
            // What cannot seek had none to speak of.
            let _ = lseek(&new, position, Whence::SeekSet);
        }
        Ok(new)
    }

    fn cwd(&mut self, cwd: &Cwd) -> Result<OwnedFd, DescriptorError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        match cwd {
            Cwd::Tree { path } => self.to.open(path, flags).map_err(|errno| file_error("open", path)(errno.into())),
            Cwd::Mount { path } => {
                self.around.open(path, flags).map_err(|errno| file_error("open", path)(errno.into()))
            }
            Cwd::Gone => {
                let failed = file_error("take the place of", c"a directory that was removed");
                let gone = match &self.gone {
                    Some(gone) => gone,
                    None => match make_gone(self.to) {
                        Ok(made) => self.gone.insert(made),
                        Err(error) => return Err(failed(error)),
                    },
                };
                gone.try_clone().map_err(failed)
            }
        }
    }
}

/// Who still has what leads out of the sandbox.
struct Donors {
    /// By link: process, number, flags.
    found: BTreeMap<Vec<u8>, Vec<(pid_t, i32)>>,
    /// A description is given once; another one like it is opened anew.
    given: BTreeSet<(Vec<u8>, i32)>,
}

impl Donors {
    fn find(stopped: &Stopped, init: pid_t, held: &Held) -> Self {
        let link = |one: &Description| match &one.what {
            What::Outside { link } => Some((link.clone(), Vec::new())),
            What::File { .. } | What::Mount { .. } | What::Memory { .. } => None,
        };
        let mut found: BTreeMap<Vec<u8>, Vec<(pid_t, i32)>> = held.descriptions.iter().filter_map(link).collect();
        if !found.is_empty() {
            let pids = stopped.processes().iter().map(|process| process.pid).chain([init]);
            pids.for_each(|pid| note(pid, &mut found));
        }
        Self { found, given: BTreeSet::new() }
    }

    /// A copy, or the same opened again.
    fn give(&mut self, link: &[u8], flags: i32) -> Result<OwnedFd, DescriptorError> {
        let lost = || DescriptorRefusal::Lost { link: String::from_utf8_lossy(link).into_owned() };
        let donors = self.found.get(link).ok_or_else(lost)?;
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
                return Ok(copy);
            }
        }
        // A socket has no second opening.
        let mut reopened = donors.iter().filter(|_| link.starts_with(b"pipe:[")).filter_map(|(pid, number)| {
            let copy = pidfd_open(*pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), *number)).ok()?;
            let new = reopen(copy.as_fd(), OFlag::from_bits_retain(access | libc::O_NONBLOCK)).ok()?;
            fcntl(&new, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags))).ok()?;
            Some(new)
        });
        Ok(reopened.next().ok_or_else(lost)?)
    }
}

fn note(pid: pid_t, found: &mut BTreeMap<Vec<u8>, Vec<(pid_t, i32)>>) {
    use std::os::unix::ffi::OsStringExt;
    // One that has been killed has nothing to give.
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for entry in entries.flatten() {
        let Ok(link) = std::fs::read_link(entry.path()) else { continue };
        let link = link.into_os_string().into_vec();
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (is_numbered(&link), number)
            && let Some(donors) = found.get_mut(&link)
        {
            donors.push((pid, number));
        }
    }
}

pub(super) fn file_error(op: &'static str, path: &std::ffi::CStr) -> impl Fn(io::Error) -> DescriptorError {
    let path = path.to_string_lossy().into_owned();
    move |source| DescriptorError::File { op, path: path.clone(), source }
}
