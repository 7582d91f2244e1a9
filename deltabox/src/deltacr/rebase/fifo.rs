//! FIFOs with a name: the pipe behind one belongs to an inode of the old mount, so a new pipe takes its place.
//!
//! All descriptions of the old pipe are among those that move. What is in it is duplicated, not taken: should the move
//! be undone, the old one still has it. A FIFO without a name stays: nobody else can find it, and it does not hinder
//! the seal.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::open::file_error;
use super::{Description, Kind, RebaseError};
use crate::deltacr::objects::duplicate;
use crate::sandbox::root::Root;
use crate::sys::stat::stat;

/// Gives each description of a FIFO one of the FIFO that `to` has under its name.
pub(super) fn open_all(descriptions: &mut [Description], to: &Root) -> Result<(), RebaseError> {
    // Open for both ends while the others are opened, which do not have to wait for each other then.
    let mut pipes: BTreeMap<_, OwnedFd> = BTreeMap::new();
    for description in descriptions.iter_mut() {
        let (place, flags) = (&description.place, OFlag::from_bits_retain(description.info.flags));
        if !matches!(description.kind, Kind::File) || place.stat.kind() != libc::S_IFIFO || place.unlinked {
            continue;
        }
        if flags.contains(OFlag::O_PATH) {
            description.new = to.open(&place.path, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok().filter(is_fifo);
            continue;
        }
        let Some(old) = &description.old else { continue };
        let identity = place.stat.identity();
        if let Entry::Vacant(free) = pipes.entry(identity) {
            let pipe = match to.open(&place.path, OFlag::O_RDWR | OFlag::O_NONBLOCK) {
                Ok(pipe) if is_fifo(&pipe) => pipe,
                Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EISDIR | Errno::ENXIO) => continue,
                Err(errno) => return Err(file_error("open", place, errno.into())),
            };
            duplicate(old.as_fd(), pipe.as_fd())
                .map_err(|source| file_error("carry over what is in", place, source))?;
            free.insert(pipe);
        }
        let access = flags & OFlag::O_ACCMODE;
        let new = to.open(&place.path, access | OFlag::O_NONBLOCK);
        let new = new.map_err(|errno| file_error("open", place, errno.into()))?;
        fcntl(&new, FcntlArg::F_SETFL(flags)).map_err(|errno| file_error("set the flags of", place, errno.into()))?;
        description.new = Some(new);
    }
    Ok(())
}

fn is_fifo(fd: &OwnedFd) -> bool {
    stat(fd.as_fd()).is_ok_and(|stat| stat.kind() == libc::S_IFIFO)
}
