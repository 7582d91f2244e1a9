//! Unix sockets that listen at a name in the tree: connect(2) looks for the inode behind the name, and on the next root
//! that is another one.
//!
//! A socket cannot get another name, so another socket takes its place under the same one. The process itself makes it
//! and listens (those who connect are shown who listened); the engine binds it (the path is the old one's, relative or
//! not, and needs no permission of the process). Its queue is empty: connections that wait are a reason to try again.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{SockType, UnixAddr, bind, getsockname, getsockopt, setsockopt, sockopt};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::open::file_error;
use super::{Place, RebaseError, RebaseRefusal};
use crate::sandbox::root::{Namespace, Root};
use crate::sys::fs::set_times;
use crate::sys::stat::{stat, stat_at};

/// A listening socket with a name.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) kind: SockType,
    address: UnixAddr,
    /// Directory (`O_PATH`, of the next root) and name; not there: the next root has no such socket.
    at: Option<(OwnedFd, CString)>,
}

/// Whether a Unix socket has to be made again; the mount its name is on is known.
pub(super) fn look(socket: &OwnedFd, place: &Place, pid: i32, number: i32) -> Result<Option<Listener>, RebaseError> {
    let failed = |op| move |errno: Errno| file_error(op, place, errno.into());
    let kind = getsockopt(socket, sockopt::SockType).map_err(failed("look at"))?;
    if kind == SockType::Datagram {
        let name = place.path.to_string_lossy().into_owned();
        return Err(RebaseRefusal::NamedDatagrams { pid, number, name }.into());
    }
    if !getsockopt(socket, sockopt::AcceptConn).map_err(failed("look at"))? || place.unlinked {
        return Ok(None);
    }
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    if nix::poll::poll(&mut fds, PollTimeout::ZERO).map_err(failed("poll"))? > 0 {
        return Err(RebaseRefusal::Pending { pid, number }.into());
    }
    let address: UnixAddr = getsockname(socket.as_raw_fd()).map_err(failed("look at"))?;
    if directory(&address, &place.path).is_none() {
        let name = place.path.to_string_lossy().into_owned();
        return Err(RebaseRefusal::Address { pid, number, name }.into());
    }
    Ok(Some(Listener { kind, address, at: None }))
}

/// From which directory the address leads to the place `path`; `None` for nowhere.
pub(in crate::deltacr) fn directory(address: &UnixAddr, path: &CString) -> Option<CString> {
    let address = address.path()?;
    if address.is_absolute() {
        return Some(c"/".into());
    }
    let address: std::path::PathBuf =
        address.components().filter(|part| *part != std::path::Component::CurDir).collect();
    let path = Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()));
    if !path.ends_with(&address) {
        return None;
    }
    let up = path.ancestors().nth(address.components().count())?;
    CString::new(up.as_os_str().as_bytes()).ok()
}

impl Listener {
    /// Looks for the place of its name on the next root.
    pub(super) fn find(&mut self, place: &Place, to: &Root) -> Result<(), RebaseError> {
        self.at = find_name(&place.path, to).map_err(|source| file_error("find", place, source))?;
        Ok(())
    }

    /// Whether the next root has it.
    pub(super) fn is_there(&self) -> bool {
        self.at.is_some()
    }

    /// Gives `new` the name, settings and flags of `old`. The process has to listen then.
    pub(super) fn take_over(
        &self,
        old: &OwnedFd,
        new: &OwnedFd,
        place: &Place,
        flags: i32,
        namespace: &Namespace,
    ) -> io::Result<()> {
        let Some(at) = &self.at else { return Ok(()) };
        setsockopt(new, sockopt::PassCred, &getsockopt(old, sockopt::PassCred)?)?;
        setsockopt(new, sockopt::ReceiveTimeout, &getsockopt(old, sockopt::ReceiveTimeout)?)?;
        setsockopt(new, sockopt::SendTimeout, &getsockopt(old, sockopt::SendTimeout)?)?;
        fcntl(new, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)))?;
        bind_again(new, &self.address, &place.path, at, |work| namespace.visit(work))
    }
}

/// The place of a socket's name on a root: its directory (`O_PATH`) and name; `None`: there is no such socket.
pub(in crate::deltacr) fn find_name(path: &CString, on: &Root) -> io::Result<Option<(OwnedFd, CString)>> {
    match on.open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
        Ok(found) if stat(found.as_fd()).is_ok_and(|stat| stat.kind() == libc::S_IFSOCK) => {}
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    let bytes = path.as_bytes();
    let cut = bytes.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let parent = CString::new(if cut == 0 { b"/" } else { &bytes[..cut] })?;
    let directory = on.open(&parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    Ok(Some((directory, CString::new(&bytes[cut + 1..])?)))
}

/// Binds `new` to an address that leads to the place `path`, whose name (as [`find_name`] tells it) another socket had; owner,
/// mode and times of the name and its directory stay. `visit` enters the sandbox's mounts.
pub(in crate::deltacr) fn bind_again(
    new: &OwnedFd,
    address: &UnixAddr,
    path: &CString,
    (parent, name): &(OwnedFd, CString),
    visit: impl FnOnce(&mut dyn FnMut() -> io::Result<()>) -> io::Result<()>,
) -> io::Result<()> {
    let (around, before) = (stat(parent.as_fd())?, stat_at(parent.as_fd(), name)?);
    let from = directory(address, path).unwrap_or_else(|| c"/".into());
    unlinkat(parent, name.as_c_str(), UnlinkatFlags::NoRemoveDir)?;
    visit(&mut || {
        nix::unistd::chdir(from.as_c_str())?;
        Ok(bind(new.as_raw_fd(), address)?)
    })?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // Not there: the address leads somewhere else now (a symbolic link was changed).
    let file = nix::fcntl::openat(parent, name.as_c_str(), flags, nix::sys::stat::Mode::empty())?;
    let (owner, group) = (nix::unistd::Uid::from_raw(before.uid), nix::unistd::Gid::from_raw(before.gid));
    nix::unistd::fchownat(&file, c"", Some(owner), Some(group), nix::fcntl::AtFlags::AT_EMPTY_PATH)?;
    crate::sys::fs::chmod(file.as_fd(), before.mode & 0o7777)?;
    set_times(file.as_fd(), before.atime, before.mtime)?;
    set_times(parent.as_fd(), around.atime, around.mtime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_from_the_directory_it_was_bound_in() {
        let from =
            |address: &str, path: &str| directory(&UnixAddr::new(address).unwrap(), &CString::new(path).unwrap());
        assert_eq!(from("/srv/s", "/srv/s"), Some(c"/".into()));
        assert_eq!(from("./run/s", "/srv/app/run/s"), Some(c"/srv/app".into()));
        assert_eq!(from("s", "/s"), Some(c"/".into()));
        assert_eq!(from("../s", "/srv/s"), None);
        assert_eq!(from("s", "/srv/t"), None);
    }
}
