//! What every description has: its status flags, and who is sent a signal when something can be read or written.
//!
//! The flags are set by the engine. The owner is set by a process that has the description, at the very end: the kernel
//! looks it up by its number in the caller's namespace, so it must be there, and it remembers the caller's user as
//! the one who may send the signal. O_ASYNC comes after it: a terminal without an owner would take the caller.

use std::io;
use std::os::fd::BorrowedFd;

use libc::pid_t;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};

use crate::deltacr::LastCall;
use crate::deltacr::handover::{number as argument, unsigned};
use crate::sys::owner::{self, F_SETOWN_EX};

/// Settings of a description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// As F_GETFL tells them: access mode, O_NONBLOCK, O_APPEND, O_ASYNC, O_DIRECT, O_NOATIME.
    flags: i32,
    owner: Option<Owner>,
    /// Which signal; 0: SIGIO without further words.
    signal: i32,
}

/// Who is sent the signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// What the number is of.
    pub of: Owning,
    /// Inside the sandbox.
    pub number: pid_t,
}

/// What owns a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owning {
    /// A thread.
    Thread,
    /// A process.
    Process,
    /// A process group.
    Group,
}

impl Settings {
    /// Reads them. `inside` tells the number inside the sandbox of a thread, process or group with a host number; an owner
    /// that has none there is none.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn read(fd: BorrowedFd<'_>, inside: impl FnOnce(Owning, pid_t) -> Option<pid_t>) -> io::Result<Self> {
        let flags = fcntl(fd, FcntlArg::F_GETFL)?;
        let raw = owner::owner(fd)?;
        let of = match raw.kind {
            0 => Owning::Thread,
            1 => Owning::Process,
            _ => Owning::Group,
        };
        // 0: nobody, or one that has ended.
        let number = if raw.number == 0 { None } else { inside(of, raw.number) };
        Ok(Self { flags, owner: number.map(|number| Owner { of, number }), signal: owner::signal(fd)? })
    }

    /// Gives a new description the same, but for what [`Settings::last_calls`] does.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn set(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(self.flags & !libc::O_ASYNC);
        if fcntl(fd, FcntlArg::F_GETFL)? != flags.bits() {
            fcntl(fd, FcntlArg::F_SETFL(flags))?;
        }
        if self.signal != 0 {
            owner::set_signal(fd, self.signal)?;
        }
        Ok(())
    }

    /// What a process that has it under `number` does itself, once all processes are there.
    pub fn last_calls(&self, number: i32) -> Vec<LastCall> {
        let mut calls = Vec::new();
        let mut add = |command: i32, more: Option<i32>, bytes: Vec<u8>| {
            let args = [argument(number), unsigned(command)].into_iter().chain(more.map(unsigned)).collect();
            calls.push(LastCall { name: "fcntl", nr: libc::SYS_fcntl, args, bytes });
        };
        if let Some(owner) = self.owner {
            let kind: i32 = match owner.of {
                Owning::Thread => 0,
                Owning::Process => 1,
                Owning::Group => 2,
            };
            add(F_SETOWN_EX, None, [kind.to_ne_bytes(), owner.number.to_ne_bytes()].concat());
        }
        if self.flags & libc::O_ASYNC != 0 {
            add(libc::F_SETFL, Some(self.flags), Vec::new());
        }
        calls
    }

    /// As F_GETFL tells them.
    pub fn flags(&self) -> i32 {
        self.flags
    }

    /// Who is sent the signal.
    pub fn owner(&self) -> Option<Owner> {
        self.owner
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::owner::{RawOwner, set_owner, set_signal};

    #[test]
    fn flags_and_signal_are_set_on_another_description() {
        let (read, _write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        set_signal(read.as_fd(), libc::SIGUSR2).unwrap();
        let pid = nix::unistd::getpid().as_raw();
        set_owner(read.as_fd(), RawOwner { kind: 1, number: pid }).unwrap();
        let inside = |of, number| (of == Owning::Process && number == pid).then_some(17);
        let settings = Settings::read(read.as_fd(), inside).unwrap();
        assert_eq!(settings.owner(), Some(Owner { of: Owning::Process, number: 17 }));
        let (other, _write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        settings.set(other.as_fd()).unwrap();
        let again = Settings::read(other.as_fd(), |_, _| None).unwrap();
        assert_eq!(again, Settings { owner: None, ..settings.clone() });
        let calls = settings.last_calls(9);
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0].args, [9, 15]);
        assert_eq!(calls[0].bytes, [1_i32.to_ne_bytes(), 17_i32.to_ne_bytes()].concat());
    }

    #[test]
    fn an_owner_comes_before_the_flag_that_wants_one() {
        let owner = Some(Owner { of: Owning::Group, number: 3 });
        let calls = Settings { flags: libc::O_ASYNC | libc::O_RDWR, owner, signal: 0 }.last_calls(4);
        assert_eq!(calls.iter().map(|call| call.args[1]).collect::<Vec<_>>(), [15, 4]);
        assert_eq!(calls[1].args[2], unsigned(libc::O_ASYNC | libc::O_RDWR));
    }

    #[test]
    fn plain_settings_need_no_calls() {
        let (read, _write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let settings = Settings::read(read.as_fd(), |_, _| panic!("it has no owner")).unwrap();
        assert!(settings.last_calls(3).is_empty());
    }
}
