//! Descriptions made again, by the engine, which no file's permissions stop.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Whence, lseek};

use super::donors::Donors;
use super::sockets;
use super::terminals::{find_master, open_devpts};
use super::{Cwd, Description, DescriptorError, FifoName, Gone, Held, Slot, What};
use crate::deltacr::objects::terminal::{Pair, Place, Terminal, make_dead, open_slave};
use crate::deltacr::objects::{Fifo, ObjectError, Pidfd};
use crate::deltacr::reopen::{OPENING, make_gone, make_nameless_fifo, reopen};
use crate::deltacr::shared::{Key, Present};
use crate::deltacr::stop::Stopped;
use crate::deltacr::{locks, position};
use crate::sandbox::root::Root;
use crate::sys::stat::stat;

/// All descriptions of a checkpoint, made again and in the engine's hands.
#[derive(Debug)]
pub struct Opened<'a> {
    pub(super) held: &'a Held,
    /// `None`: made once the processes are there.
    pub(super) descriptions: Vec<Option<OwnedFd>>,
    /// By PID inside.
    pub(super) cwds: BTreeMap<pid_t, OwnedFd>,
    /// Host PID of the sandbox's init.
    pub(super) init: pid_t,
    devpts: Option<OwnedFd>,
    masters: Vec<OwnedFd>,
    /// Other ends, by description, of what led to where nobody is any more.
    streams: Vec<(usize, OwnedFd)>,
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
        let failed = |op| move |source| DescriptorError::Process { op, pid: init, source };
        let around = Root::of(init).map_err(failed("find the root"))?;
        let mut donors = Donors::find(stopped, init, self);
        let has_dead = self.descriptions.iter().any(|one| matches!(one.what, What::DeadTerminal));
        let devpts = (has_dead || !self.terminals.is_empty()).then(|| open_devpts(init)).transpose();
        let devpts = devpts.map_err(failed("open /dev/pts"))?;
        let mut masters = Vec::with_capacity(self.terminals.len());
        let mut streams = Vec::new();
        for (at, terminal) in self.terminals.iter().enumerate() {
            let (master, is_new) = find_or_make(stopped, init, terminal, devpts.as_ref())?;
            if is_new && terminal.place() == Place::Outside {
                let is_side = |one: &Description| matches!(one.what, What::Terminal { terminal, .. } if terminal == at);
                let side = self.descriptions.iter().position(is_side).unwrap_or(0);
                streams.push((side, master.try_clone().map_err(file_error("copy", c"the master of a terminal"))?));
            }
            masters.push(master);
        }
        let mut pipes = Vec::with_capacity(self.pipes.len());
        for pipe in &self.pipes {
            let ends = pipe.make().map_err(file_error("make", c"a pipe"))?;
            pipes.push(ends.into_iter().map(Some).collect::<Vec<_>>());
        }
        let mut fifos = Vec::with_capacity(self.fifos.len());
        for (name, fifo) in &self.fifos {
            fifos.push(open_fifo(name, fifo, to)?.into_iter().map(Some).collect::<Vec<_>>());
        }
        let mut sockets = sockets::make(&self.sockets, to, init)?;
        let mut opener = Opener { to, around: &around, memory, gone: BTreeMap::new() };
        let mut descriptions = Vec::with_capacity(self.descriptions.len());
        for description in &self.descriptions {
            let made = match &description.what {
                What::Outside { link } => {
                    let (own, other) = donors.give(link, description.flags)?;
                    streams.extend(other.map(|other| (descriptions.len(), other)));
                    Some(own)
                }
                What::Pipe { pipe, end } => pipes.get_mut(*pipe).and_then(|ends| ends.get_mut(*end)?.take()),
                What::Fifo { fifo, end, locks } => {
                    let made = fifos.get_mut(*fifo).and_then(|ends| ends.get_mut(*end)?.take());
                    let made = made.ok_or_else(|| file_error("find", c"a FIFO")(missing()))?;
                    locks::take(made.as_fd(), locks).map_err(file_error("lock", c"a FIFO"))?;
                    Some(made)
                }
                What::Terminal { terminal, is_master } => {
                    let master = masters.get(*terminal).ok_or_else(|| file_error("find", c"a terminal")(missing()))?;
                    let side = match is_master {
                        true => master.try_clone(),
                        false => open_slave(master.as_fd(), description.flags & libc::O_ACCMODE),
                    };
                    Some(side.map_err(file_error("open", c"a terminal"))?)
                }
                What::DeadTerminal => {
                    let devpts = devpts.as_ref().ok_or_else(|| file_error("open", c"/dev/pts")(missing()))?;
                    let made = make_dead(devpts.as_fd(), description.flags & libc::O_ACCMODE);
                    Some(made.map_err(file_error("make", c"a terminal that was hung up"))?)
                }
                What::Socket { socket } => sockets.get_mut(*socket).and_then(Option::take),
                What::Pidfd(_) => None,
                What::Mount { path } if self.is_of_process(path) => None,
                _ => Some(opener.description(description)?),
            };
            if let (Some(made), Some(settings)) = (&made, &description.settings)
                && !matches!(description.what, What::Outside { .. })
            {
                settings.set(made.as_fd()).map_err(file_error("set the flags of", c"a descriptor"))?;
            }
            descriptions.push(made);
        }
        let mut cwds = BTreeMap::new();
        for (pid, seat) in &self.seats {
            cwds.insert(*pid, opener.cwd(&seat.cwd)?);
        }
        Ok(Opened { held: self, descriptions, cwds, init, devpts, masters, streams })
    }
}

impl Held {
    /// Whether a path is of one of these processes in `/proc`, where there is none as long as that has to be made. What it
    /// has open and mapped is not there again before this is.
    fn is_of_process(&self, path: &CStr) -> bool {
        const LATER: [&[u8]; 3] = [b"fd", b"fdinfo", b"map_files"];
        let mut parts = path.to_bytes().rsplit(|byte| *byte == b'/');
        if parts.nth(1).is_some_and(|parent| LATER.contains(&parent)) {
            return false;
        }
        let number = path.to_bytes().strip_prefix(b"/proc/").and_then(|rest| rest.split(|byte| *byte == b'/').next());
        let number = number.and_then(|number| str::from_utf8(number).ok()?.parse::<pid_t>().ok());
        number.is_some_and(|number| self.seats.contains_key(&number))
    }
}

impl Opened<'_> {
    /// Gives what lives on at both ends the state that it had, and makes what can only be made with the processes there:
    /// `host` tells the host PID of one by that inside. Processes that go must have gone.
    ///
    /// # Errors
    /// Terminals are neither what they were nor what they should be.
    pub(in crate::deltacr) fn settle(&mut self, host: impl Fn(pid_t) -> Option<pid_t>) -> Result<(), DescriptorError> {
        for (at, (terminal, master)) in self.held.terminals.iter().zip(&self.masters).enumerate() {
            let is_slave =
                |one: &Description| matches!(one.what, What::Terminal { terminal, is_master: false } if terminal == at);
            let slave = self.held.descriptions.iter().position(is_slave);
            let slave = slave.and_then(|slave| self.descriptions.get(slave)?.as_ref());
            let Some(devpts) = &self.devpts else { continue };
            let pair = Pair { devpts: devpts.as_fd(), master: master.as_fd(), slave: slave.map(AsFd::as_fd) };
            terminal.put_back(pair).map_err(object)?;
        }
        for (description, made) in self.held.descriptions.iter().zip(&mut self.descriptions) {
            match &description.what {
                What::Pidfd(pidfd) => *made = Some(make_pidfd(pidfd, &host)?),
                What::Mount { path } if self.held.is_of_process(path) => {
                    let failed = |source| DescriptorError::Process { op: "find the root", pid: self.init, source };
                    let around = Root::of(self.init).map_err(failed)?;
                    let flags = OFlag::from_bits_retain(description.flags & !OPENING);
                    *made = Some(open_on_mount(&around, path, flags, description.position)?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The other ends of what led to where nobody is any more, each with a process (PID inside) that has it.
    pub(in crate::deltacr) fn take_streams(&mut self) -> Vec<(pid_t, OwnedFd)> {
        let held = self.held;
        let owner = |description: usize| {
            let has = |table: &Vec<Slot>| table.iter().any(|slot| slot.description == description);
            let seat = held.seats.iter().find(|(_, seat)| held.tables.get(seat.table).is_some_and(has));
            seat.map_or(0, |(pid, _)| *pid)
        };
        self.streams.drain(..).map(|(description, end)| (owner(description), end)).collect()
    }

    /// Tells programs whose client's window has changed since.
    pub(in crate::deltacr) fn announce_windows(&self) {
        for (terminal, master) in self.held.terminals.iter().zip(&self.masters) {
            if terminal.place() == Place::Outside {
                // It hung up meanwhile: there is no window.
                let _ = terminal.announce_window(master.as_fd());
            }
        }
    }
}

fn open_on_mount(around: &Root, path: &CString, flags: OFlag, position: i64) -> Result<OwnedFd, DescriptorError> {
    let failed = |errno: Errno| file_error("open", path)(errno.into());
    // Something that would wait (a terminal's carrier) does not.
    let opening = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let new = around.open(path, opening).map_err(failed)?;
    if !flags.contains(OFlag::O_NONBLOCK) && !flags.contains(OFlag::O_PATH) {
        fcntl(&new, FcntlArg::F_SETFL(flags)).map_err(failed)?;
    }
    if position != 0 {
        // What cannot seek had none to speak of.
        let _ = lseek(&new, position, Whence::SeekSet);
    }
    Ok(new)
}

fn make_pidfd(pidfd: &Pidfd, host: impl Fn(pid_t) -> Option<pid_t>) -> Result<OwnedFd, DescriptorError> {
    pidfd.make(pidfd.pid().and_then(host)).map_err(object)
}

/// The master of a terminal, where it was; one that is no more is made again (`true`).
fn find_or_make(
    stopped: &Stopped,
    init: pid_t,
    terminal: &Terminal,
    devpts: Option<&OwnedFd>,
) -> Result<(OwnedFd, bool), DescriptorError> {
    let failed = |source| DescriptorError::Process { op: "look for the master of a terminal", pid: init, source };
    if terminal.place() == Place::Outside {
        if let Some(master) = find_master(init, terminal.index()).map_err(failed)? {
            return Ok((master, false));
        }
    } else {
        for process in stopped.processes() {
            // One that was killed meanwhile has none.
            if let Ok(Some(master)) = find_master(process.pid, terminal.index()) {
                return Ok((master, false));
            }
        }
    }
    let devpts = devpts.ok_or_else(|| failed(missing()))?;
    Ok((terminal.make(devpts.as_fd()).map_err(object)?, true))
}

fn object(source: ObjectError) -> DescriptorError {
    DescriptorError::Object { pid: 0, number: -1, source }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

struct Opener<'a> {
    to: &'a Root,
    around: &'a Root,
    memory: &'a Present<'a>,
    /// Directories that were removed.
    gone: BTreeMap<Key, OwnedFd>,
}

impl Opener<'_> {
    fn description(&mut self, description: &Description) -> Result<OwnedFd, DescriptorError> {
        let Description { flags, position, what, .. } = description;
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
            What::Mount { path } => open_on_mount(self.around, path, flags, *position),
            What::Memory { key } => {
                let failed = file_error("open", c"a memfd");
                let file = self.memory.of(*key).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
                let new = reopen(file, flags).map_err(&failed)?;
                lseek(&new, *position, Whence::SeekSet).map_err(|errno| failed(errno.into()))?;
                Ok(new)
            }
            What::Nameless { key, locks } => {
                let failed = file_error("open", c"a file without a name");
                let file = self.memory.of(*key).ok_or_else(|| failed(missing()))?;
                // Which includes O_DIRECTORY.
                let new = reopen(file, flags.difference(OFlag::O_TMPFILE)).map_err(&failed)?;
                if *position != 0 && !flags.contains(OFlag::O_PATH) {
                    lseek(&new, *position, Whence::SeekSet).map_err(|errno| failed(errno.into()))?;
                }
                locks::take(new.as_fd(), locks).map_err(file_error("lock", c"a file without a name"))?;
                Ok(new)
            }
            What::Gone(gone) => {
                let made = self.gone(gone)?;
                reopen(made, flags).map_err(file_error("open", c"a directory that was removed"))
            }
            What::Eventfd(eventfd) => eventfd.make().map_err(file_error("make", c"an eventfd")),
            What::Timerfd(timerfd) => timerfd.make().map_err(file_error("make", c"a timer")),
            What::Signalfd(signalfd) => signalfd.make().map_err(file_error("make", c"a signalfd")),
            What::Epoll { epoll, .. } => epoll.make().map_err(file_error("make", c"an epoll instance")),
            What::Outside { .. }
            | What::Fifo { .. }
            | What::Pipe { .. }
            | What::Socket { .. }
            | What::Pidfd(_)
            | What::Terminal { .. }
            | What::DeadTerminal => Err(file_error("open", c"a descriptor")(missing())),
        }
    }

    fn cwd(&mut self, cwd: &Cwd) -> Result<OwnedFd, DescriptorError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        match cwd {
            Cwd::Tree { path } => self.to.open(path, flags).map_err(|errno| file_error("open", path)(errno.into())),
            Cwd::Mount { path } => {
                self.around.open(path, flags).map_err(|errno| file_error("open", path)(errno.into()))
            }
            Cwd::Gone(gone) => {
                let failed = file_error("take the place of", c"a directory that was removed");
                self.gone(gone)?.try_clone_to_owned().map_err(failed)
            }
        }
    }

    /// The same one for all who had it.
    fn gone(&mut self, gone: &Gone) -> Result<BorrowedFd<'_>, DescriptorError> {
        let made: &OwnedFd = match self.gone.entry(gone.key) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(free) => {
                let failed = file_error("take the place of", c"a directory that was removed");
                let made = make_gone(self.to).map_err(&failed)?;
                gone.permissions.set(made.as_fd()).map_err(&failed)?;
                free.insert(made)
            }
        };
        Ok(made.as_fd())
    }
}

/// Every description of a FIFO, on `to`.
fn open_fifo(name: &FifoName, fifo: &Fifo, to: &Root) -> Result<Vec<OwnedFd>, DescriptorError> {
    let (failed, found) = match name {
        FifoName::Path(path) => {
            let found = to.open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW);
            (file_error("open", path), found.map_err(|errno| file_error("open", path)(errno.into()))?)
        }
        FifoName::Gone(permissions) => {
            let failed = file_error("make", c"a FIFO that was removed");
            let made = make_nameless_fifo(to).map_err(&failed)?;
            permissions.set(made.as_fd()).map_err(&failed)?;
            (failed, made)
        }
    };
    if stat(found.as_fd()).map_err(&failed)?.kind() != libc::S_IFIFO {
        return Err(failed(io::Error::other("it is of another kind than it was")));
    }
    fifo.open(found.as_fd()).map_err(failed)
}

pub(super) fn file_error(op: &'static str, path: &CStr) -> impl Fn(io::Error) -> DescriptorError {
    let path = path.to_string_lossy().into_owned();
    move |source| DescriptorError::File { op, path: path.clone(), source }
}
