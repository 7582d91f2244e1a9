//! FIFOs with a name: the pipe behind one belongs to an inode of the old mount, so a new pipe takes its place.
//!
//! All descriptions of the old pipe are among those that move. What is in it is duplicated, not taken: should the move
//! be undone, the old one still has it. A FIFO without a name stays: nobody else can find it, and it does not hinder
//! the seal.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::open::file_error;
use super::{Description, Kind, RebaseError};
use crate::deltacr::objects::{End, duplicate, open_ends};
use crate::sandbox::root::Root;
use crate::sys::stat::stat;

/// Gives each description of a FIFO one of the FIFO that `to` has under its name.
pub(super) fn open_all(descriptions: &mut [Description], to: &Root) -> Result<(), RebaseError> {
    let mut fifos: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (at, description) in descriptions.iter_mut().enumerate() {
        let place = &description.place;
        if !matches!(description.kind, Kind::File) || place.stat.kind() != libc::S_IFIFO || place.unlinked {
            continue;
        }
        if description.info.flags & libc::O_PATH != 0 {
            description.new = to.open(&place.path, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok().filter(is_fifo);
        } else {
            fifos.entry(place.stat.identity()).or_default().push(at);
        }
    }
    for ends in fifos.into_values() {
        open(descriptions, &ends, to)?;
    }
    Ok(())
}

/// The same for all descriptions of one FIFO.
fn open(descriptions: &mut [Description], ends: &[usize], to: &Root) -> Result<(), RebaseError> {
    let Some(place) = ends.first().map(|first| descriptions[*first].place.clone()) else { return Ok(()) };
    let failed = |op| {
        let place = place.clone();
        move |source| file_error(op, &place, source)
    };
    let fifo = match to.open(&place.path, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
        Ok(fifo) if is_fifo(&fifo) => fifo,
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
        Err(errno) => return Err(failed("open")(errno.into())),
    };
    let old: Vec<_> = ends.iter().filter_map(|end| descriptions[*end].old.as_ref()).map(AsFd::as_fd).collect();
    let Some(first) = old.first() else { return Ok(()) };
    let looks = End::all_of(&old).map_err(failed("look at"))?;
    let opened = open_ends(fifo.as_fd(), &looks, |end| duplicate(*first, end)).map_err(failed("carry over"))?;
    for (end, new) in ends.iter().zip(opened) {
        let flags = OFlag::from_bits_retain(descriptions[*end].info.flags);
        fcntl(&new, FcntlArg::F_SETFL(flags)).map_err(|errno| failed("set the flags of")(errno.into()))?;
        descriptions[*end].new = Some(new);
    }
    Ok(())
}

fn is_fifo(fd: &OwnedFd) -> bool {
    stat(fd.as_fd()).is_ok_and(|stat| stat.kind() == libc::S_IFIFO)
}
