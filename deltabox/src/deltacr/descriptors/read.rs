//! What stopped processes hold.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use libc::pid_t;
use nix::fcntl::{FcntlArg, fcntl, readlinkat};

use super::file::{self, gone};
use super::sockets;
use super::terminals::Terminals;
use super::{Cwd, DELETED, Description, DescriptorError, DescriptorRefusal, Held, Reading, Seat, Slot, What};
use crate::deltacr::fdinfo::{FdInfo, Lock, Owner};
use crate::deltacr::handover::check_room;
use crate::deltacr::objects::{
    Epoll, Eventfd, Holder, ObjectError, ObjectKind, Pidfd, Pipe, Settings, Signalfd, Spare, Timerfd, kind_of,
    leads_out,
};
use crate::deltacr::place::Place;
use crate::deltacr::shared;
use crate::deltacr::stop::{Process, Stopped};
use crate::deltacr::table::{Ahead, Table, Tables, search, unshared};
use crate::deltacr::tasks::{pid_depth, pid_inside};
use crate::sandbox::root::Root;
use crate::sys::process::{Compared, compare};
use crate::sys::stat::{Stat, stat, stat_at};

impl Held {
    /// Reads what all stopped processes hold, whose root is `root`; and the memory that some of it leads to. `init` is
    /// the sandbox's, which holds the other ends of what leads out.
    ///
    /// # Errors
    /// Nothing has been changed.
    pub(in crate::deltacr) fn read(
        stopped: &Stopped,
        root: &Root,
        init: pid_t,
        ahead: Ahead,
    ) -> Result<Reading, DescriptorError> {
        let (tables, known, raw, held) = Default::default();
        let mut reader = Reader { root, ahead, tables, known, raw, held };
        for process in stopped.processes() {
            reader.seat(process)?;
        }
        reader.finish(init)
    }
}

/// A descriptor by which a description was found, and the description's index.
type Found = (pid_t, i32, usize);

/// A description as it was met first.
pub(super) struct Raw {
    pub(super) pid: pid_t,
    pub(super) number: i32,
    pub(super) kind: ObjectKind,
    pub(super) link: Vec<u8>,
    pub(super) info: FdInfo,
    /// fdinfo as it is, of what is no file.
    pub(super) text: String,
    /// The engine's.
    pub(super) copy: OwnedFd,
    /// Of a file.
    pub(super) look: Option<Stat>,
    /// Tasks that have it: host TID, number, and the process's PID inside.
    pub(super) holders: Vec<(pid_t, i32, pid_t)>,
}

impl Raw {
    /// Those of the description.
    pub(super) fn locks(&self) -> Vec<Lock> {
        self.info.locks.iter().copied().filter(|lock| lock.owner != Owner::Process).collect()
    }
}

struct Reader<'a> {
    root: &'a Root,
    ahead: Ahead,
    tables: Tables,
    /// Descriptions that look alike, in kcmp's order: only those have to be compared.
    known: BTreeMap<(u64, i32, i64), Vec<Found>>,
    raw: Vec<Raw>,
    held: Held,
}

impl Reader<'_> {
    fn seat(&mut self, process: &Process) -> Result<(), DescriptorError> {
        let pid = process.pid;
        let tid = process.threads.first().map_or(pid, |thread| thread.tid);
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        if let Some((tid, what)) = unshared(process).map_err(failed("compare threads"))? {
            return Err(DescriptorRefusal::Unshared { pid, tid, what }.into());
        }
        let (mut table, numbers) = self.ahead.take(pid, tid).map_err(failed("open the descriptors"))?;
        // Now, not on the way back: there is no other then.
        check_room(pid, tid, &numbers)?;
        let own = stat_at(table.task(), c"root").map_err(failed("find the root"))?;
        if !self.root.is(&own) {
            return Err(DescriptorRefusal::Root { pid }.into());
        }
        let cwd = self.cwd(&table).map_err(failed("find the working directory"))?;
        let (number, is_new) = self.tables.number(tid).map_err(failed("compare the descriptors"))?;
        let inside = pid_inside(pid).map_err(failed("find the number"))?;
        let mut locks = Vec::new();
        if is_new {
            let mut slots = Vec::with_capacity(numbers.len());
            for number in numbers {
                slots.push(self.slot((pid, tid, inside), number, &mut table, &mut locks)?);
            }
            self.held.tables.push(slots);
        }
        self.held.seats.insert(inside, Seat { table: number, cwd, locks });
        Ok(())
    }

    fn cwd(&self, table: &Table) -> io::Result<Cwd> {
        Ok(match Place::behind(self.root, table.task(), c"cwd")? {
            Some(Place { unlinked: true, stat, .. }) => Cwd::Gone(gone(&stat)),
            Some(Place { path, .. }) => Cwd::Tree { path },
            None => {
                let path = readlinkat(table.task(), c"cwd")?.into_vec();
                // Of a tree that was left.
                match path.ends_with(DELETED) {
                    true => Cwd::Gone(gone(&stat_at(table.task(), c"cwd")?)),
                    false => Cwd::Mount { path: CString::new(path)? },
                }
            }
        })
    }

    fn slot(
        &mut self,
        (pid, tid, inside): (pid_t, pid_t, pid_t),
        number: i32,
        table: &mut Table,
        locks: &mut Vec<(usize, Lock)>,
    ) -> Result<Slot, DescriptorError> {
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        let text = table.info_text(number).map_err(failed("read fdinfo"))?;
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let mut info = FdInfo::parse(text).ok_or_else(invalid).map_err(failed("read fdinfo"))?;
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        info.flags &= !libc::O_CLOEXEC;
        let own: Vec<_> = info.locks.iter().copied().filter(|lock| lock.owner == Owner::Process).collect();
        let key = (info.ino, info.flags, info.position);
        let alike = self.known.get(&key).map_or(&[][..], Vec::as_slice);
        let found =
            search(alike, |(other_tid, other, _)| compare(*other_tid, tid, Compared::Descriptions(*other, number)));
        let description = match found.map_err(failed("compare the descriptors"))? {
            Ok(at) => alike[at].2,
            Err(at) => {
                let text = text.to_owned();
                let raw = Self::look(pid, number, info, text, table).map_err(failed("look at a descriptor"))?;
                let index = self.raw.len();
                self.raw.push(raw);
                self.known.entry(key).or_default().insert(at, (tid, number, index));
                index
            }
        };
        self.raw[description].holders.push((tid, number, inside));
        locks.extend(own.into_iter().map(|lock| (description, lock)));
        Ok(Slot { number, close_on_exec, description })
    }

    fn look(pid: pid_t, number: i32, info: FdInfo, text: String, table: &Table) -> io::Result<Raw> {
        let link = table.link_text(number)?;
        let kind = kind_of(&link, &text);
        let copy = table.copy(number)?;
        let look = (kind == ObjectKind::File).then(|| stat(copy.as_fd())).transpose()?;
        Ok(Raw { pid, number, kind, link, info, text, copy, look, holders: Vec::new() })
    }

    /// Now that all that there are are known: what each of them is.
    fn finish(self, init: pid_t) -> Result<Reading, DescriptorError> {
        let Self { root, raw, mut held, .. } = self;
        let failed = |op| move |source| DescriptorError::Process { op, pid: init, source };
        let (mut memory, mut doubtful) = (Vec::new(), Vec::new());
        let depth = pid_depth(init).map_err(failed("find the number"))?;
        let mut terminals = Terminals::new(init);
        let sockets = sockets::read(root, &raw, init, &mut held)?;
        for (at, one) in raw.iter().enumerate() {
            let object =
                |error: ObjectError| DescriptorError::Object { pid: one.pid, number: one.number, source: error };
            let io = |op| move |source| DescriptorError::Process { op, pid: one.pid, source };
            let copy = one.copy.as_fd();
            let what = match one.kind {
                ObjectKind::File => file::read(root, &raw, at, &mut held, &mut memory)?,
                ObjectKind::Memfd => {
                    let name = String::from_utf8_lossy(&one.link).into_owned();
                    let found = shared::Found::held(copy, name).map_err(io("open a memfd"))?;
                    let key = found.key();
                    memory.push(found);
                    What::Memory { key }
                }
                ObjectKind::Pipe => pipe(&raw, at, &mut held)?,
                ObjectKind::Eventfd => What::Eventfd(Eventfd::parse(&one.text).map_err(object)?),
                ObjectKind::Timerfd => What::Timerfd(Timerfd::read(copy).map_err(object)?),
                ObjectKind::Signalfd => What::Signalfd(Signalfd::parse(&one.text).map_err(io("read a signalfd"))?),
                ObjectKind::Pidfd => What::Pidfd(Pidfd::parse(&one.text, depth).map_err(object)?),
                ObjectKind::Epoll => {
                    let holder = |(task, number, _): &(pid_t, i32, pid_t)| Holder { task: *task, number: *number };
                    let holders: Vec<_> = one.holders.iter().map(holder).collect();
                    let epoll = Epoll::read(&one.text, &holders).map_err(object)?;
                    What::Epoll { epoll, holders: one.holders.iter().map(|(_, number, pid)| (*pid, *number)).collect() }
                }
                ObjectKind::TerminalMaster | ObjectKind::Terminal | ObjectKind::ControllingTerminal => {
                    let is_master = one.kind == ObjectKind::TerminalMaster;
                    let own = fcntl(copy, FcntlArg::F_GETFL).map_err(|errno| io("look at a terminal")(errno.into()))?;
                    if own & libc::O_CLOEXEC != 0 {
                        doubtful.extend(one.holders.iter().map(|(task, number, inside)| (*task, *inside, *number)));
                    }
                    terminals.note(one.pid, copy, is_master).map_err(io("look at a terminal"))?
                }
                ObjectKind::DeadTerminal => What::DeadTerminal,
                ObjectKind::Socket => match sockets.get(&at) {
                    Some(socket) => What::Socket { socket: *socket },
                    None => return Err(refuse(one)),
                },
                _ => return Err(refuse(one)),
            };
            let settings = match one.kind {
                ObjectKind::File if !matches!(what, What::Fifo { .. }) => None,
                ObjectKind::Memfd => None,
                _ => Some(Settings::read(copy, |_, host| pid_inside(host).ok()).map_err(io("look at a descriptor"))?),
            };
            let (flags, position) = (one.info.flags, one.info.position);
            held.descriptions.push(Description { flags, position, what, settings });
        }
        held.terminals = terminals.read()?;
        Ok(Reading { held, memory, doubtful })
    }
}

pub(super) fn refuse(one: &Raw) -> DescriptorError {
    refuse_as(one, one.kind.word())
}

pub(super) fn refuse_as(one: &Raw, what: &'static str) -> DescriptorError {
    let Raw { pid, number, link, .. } = one;
    let link = String::from_utf8_lossy(link).into_owned();
    DescriptorRefusal::Kind { pid: *pid, number: *number, what, link }.into()
}

/// An end of a pipe; the pipe is read with its first one.
fn pipe(raw: &[Raw], at: usize, held: &mut Held) -> Result<What, DescriptorError> {
    let one = &raw[at];
    let failed = |op| move |source| DescriptorError::Process { op, pid: one.pid, source };
    let ends: Vec<usize> = (0..raw.len()).filter(|other| raw[*other].link == one.link).collect();
    let end = ends.iter().position(|other| *other == at).unwrap_or(0);
    if let Some(first) = ends.first().filter(|first| **first < at) {
        return Ok(match &held.descriptions[*first].what {
            What::Pipe { pipe, .. } => What::Pipe { pipe: *pipe, end },
            _ => What::Outside { link: one.link.clone() },
        });
    }
    let copies: Vec<BorrowedFd<'_>> = ends.iter().map(|end| raw[*end].copy.as_fd()).collect();
    if leads_out(&copies).map_err(failed("look at a pipe"))? {
        return Ok(What::Outside { link: one.link.clone() });
    }
    let spare = Spare::new().map_err(failed("make a pipe to look at one"))?;
    held.pipes.push(Pipe::read(&copies, &spare).map_err(failed("read a pipe"))?);
    Ok(What::Pipe { pipe: held.pipes.len() - 1, end })
}
