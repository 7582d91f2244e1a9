//! What of a file is held: its name, if it has one; else what there is of it.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::statfs::{FsType, fstatfs};

use super::read::{Raw, refuse, refuse_as};
use super::{DescriptorError, DescriptorRefusal, FifoName, Gone, Held, What};
use crate::deltacr::fdinfo::Owner;
use crate::deltacr::objects::{Fifo, Permissions, Spare};
use crate::deltacr::place::Place;
use crate::deltacr::position;
use crate::deltacr::shared::{Found, is_on_overlay};
use crate::sandbox::root::Root;
use crate::sys::stat::Stat;

/// Where message queues are (the kernel's MQUEUE_MAGIC, ipc/mqueue.c).
const MQUEUE_MAGIC: FsType = FsType(0x1980_0202);

/// Reads the file behind `raw[at]`. What has no name is added to `found`.
pub(super) fn read(
    root: &Root,
    raw: &[Raw],
    at: usize,
    held: &mut Held,
    found: &mut Vec<Found>,
) -> Result<What, DescriptorError> {
    let one = &raw[at];
    let Raw { pid, number, info, link, .. } = one;
    let failed = |op| move |source| DescriptorError::Process { op, pid: *pid, source };
    let (copy, Some(look)) = (&one.copy, &one.look) else { return Err(refuse(one)) };
    if info.mount != root.mount() {
        // Of a tree that was left: whatever its link says, no name leads there.
        if is_on_overlay(copy.as_fd()).map_err(failed("look at a descriptor"))? {
            return nameless(raw, at, held, found);
        }
        if look.kind() == libc::S_IFREG
            && fstatfs(copy).map_err(|errno| failed("look at a descriptor")(errno.into()))?.filesystem_type()
                == MQUEUE_MAGIC
        {
            return Err(refuse_as(one, "a POSIX message queue"));
        }
        // A name that is gone, or none.
        if link.ends_with(super::DELETED) || !link.starts_with(b"/") {
            return Err(refuse(one));
        }
        let path = CString::new(link.clone()).map_err(|error| failed("name a file")(error.into()))?;
        if path.to_bytes().starts_with(b"/proc/")
            && root.open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW).err() == Some(Errno::ENOENT)
        {
            return Err(refuse_as(one, "a file of a process that has ended"));
        }
        return Ok(What::Mount { path });
    }
    if link.is_empty() {
        return Err(failed("find a file")(Errno::ENAMETOOLONG.into()));
    }
    let place = Place::named(root, *look, link.clone()).map_err(failed("find a file"))?;
    if place.unlinked {
        return nameless(raw, at, held, found);
    }
    let is_path_only = info.flags & libc::O_PATH != 0;
    match look.kind() {
        libc::S_IFREG | libc::S_IFDIR => {}
        _ if is_path_only => {}
        libc::S_IFIFO => return fifo(raw, at, held, |_| FifoName::Path(place.path)),
        kind => return Err(refuse_as(one, word(kind))),
    }
    if info.locks.iter().any(|lock| lock.owner == Owner::Other) {
        return Err(DescriptorRefusal::Lease { pid: *pid, number: *number }.into());
    }
    let is_read = look.kind() == libc::S_IFDIR && info.position != 0;
    let unread = is_read.then(|| position::unread(copy.as_fd(), info.position)).flatten();
    Ok(What::File { path: place.path, kind: look.kind(), locks: one.locks(), unread })
}

/// A directory that was removed.
pub(super) fn gone(look: &Stat) -> Gone {
    Gone { key: look.identity(), permissions: Permissions::told(look) }
}

fn nameless(raw: &[Raw], at: usize, held: &mut Held, found: &mut Vec<Found>) -> Result<What, DescriptorError> {
    let one = &raw[at];
    let Raw { pid, number, info, link, .. } = one;
    let failed = |op| move |source| DescriptorError::Process { op, pid: *pid, source };
    let (copy, Some(look)) = (&one.copy, &one.look) else { return Err(refuse(one)) };
    if info.locks.iter().any(|lock| lock.owner == Owner::Other) {
        return Err(DescriptorRefusal::Lease { pid: *pid, number: *number }.into());
    }
    match look.kind() {
        libc::S_IFREG => {
            let name = String::from_utf8_lossy(link).into_owned();
            let file = Found::held(copy.as_fd(), name).map_err(failed("open a file without a name"))?;
            let key = file.key();
            found.push(file);
            Ok(What::Nameless { key, locks: one.locks() })
        }
        libc::S_IFDIR => Ok(What::Gone(gone(look))),
        libc::S_IFIFO if info.flags & libc::O_PATH == 0 => {
            fifo(raw, at, held, |look| FifoName::Gone(Permissions::told(look)))
        }
        kind => Err(refuse_as(one, word(kind))),
    }
}

/// A description of a FIFO, which is read with its first one.
fn fifo(
    raw: &[Raw],
    at: usize,
    held: &mut Held,
    name: impl FnOnce(&Stat) -> FifoName,
) -> Result<What, DescriptorError> {
    let one = &raw[at];
    let failed = |op| move |source| DescriptorError::Process { op, pid: one.pid, source };
    let Some(look) = one.look else { return Err(refuse(one)) };
    let is_end = |other: &Raw| {
        let is_same = other.look.is_some_and(|other| other.identity() == look.identity());
        is_same && other.info.flags & libc::O_PATH == 0
    };
    let ends: Vec<usize> = (0..raw.len()).filter(|other| is_end(&raw[*other])).collect();
    let (end, locks) = (ends.iter().position(|other| *other == at).unwrap_or(0), one.locks());
    if let Some(first) = ends.first().filter(|first| **first < at) {
        return match &held.descriptions[*first].what {
            What::Fifo { fifo, .. } => Ok(What::Fifo { fifo: *fifo, end, locks }),
            _ => Err(refuse(one)),
        };
    }
    let copies: Vec<BorrowedFd<'_>> = ends.iter().map(|end| raw[*end].copy.as_fd()).collect();
    let spare = Spare::new().map_err(failed("make a pipe to look at a FIFO"))?;
    let read = Fifo::read(&copies, &spare).map_err(failed("read a FIFO"))?;
    held.fifos.push((name(&look), read));
    Ok(What::Fifo { fifo: held.fifos.len() - 1, end, locks })
}

/// What a human calls something that cannot be held.
fn word(kind: u32) -> &'static str {
    match kind {
        libc::S_IFLNK => "a symbolic link without a name",
        libc::S_IFSOCK => "the name of a socket that was removed",
        libc::S_IFIFO => "a FIFO without a name, by its path alone",
        _ => "a device in the tree of files",
    }
}
