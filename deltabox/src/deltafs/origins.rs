//! What copied-up files are copies of, as overlayfs has noted it in `trusted.overlay.origin`.
//!
//! ```text
//! struct ovl_fb (fs/overlayfs/overlayfs.h)
//!   0 version 0 | 1 magic 0xfb | 2 length of all | 3 flags | 4 type of the handle | 5..21 UUID, zero | 21.. the handle
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use nix::fcntl::OFlag;

use super::view::{Kind, place};
use crate::sys::handle::{Handle, identity_at};

const MAGIC: u8 = 0xfb;
const HEADER_BYTES: usize = 21;

/// What files were copied from, as overlayfs has noted it.
#[derive(Debug, Default)]
pub(super) struct Origins {
    /// Of files in layers that have others above them: from the handle of a copy to that of its source.
    sources: BTreeMap<Handle, Handle>,
}

impl Origins {
    /// Walks a layer, hidden files too.
    pub(super) fn add(&mut self, layer: BorrowedFd<'_>) -> io::Result<()> {
        let mut queue = vec![PathBuf::new()];
        while let Some(dir) = queue.pop() {
            let mut names = BTreeSet::new();
            place::list(layer, &dir, &mut names)?;
            for name in names {
                let path = dir.join(name);
                let Ok(fd) = place::open(layer, &path, OFlag::O_PATH) else { continue };
                let is_dir = Kind::of(nix::sys::stat::fstat(&fd)?.st_mode) == Kind::Directory;
                if is_dir {
                    if path.as_os_str().len() <= place::MAX_DEEP_BYTES {
                        queue.push(path);
                    }
                } else if let Some(source) = source(fd.as_fd())?
                    && let Ok(handle) = identity_at(fd.as_fd(), c"")
                {
                    self.sources.insert(handle, source);
                }
            }
        }
        Ok(())
    }

    /// The first source of a chain of copies.
    pub(super) fn first(&self, mut handle: Handle) -> Handle {
        // Each layer adds a copy at most; anything longer is damage.
        for _ in 0..1000 {
            match self.sources.get(&handle) {
                Some(source) => handle = source.clone(),
                None => break,
            }
        }
        handle
    }
}

/// The handle in a file's `trusted.overlay.origin`. Empty where the lower file system has none, as another overlayfs.
pub(super) fn source(fd: BorrowedFd<'_>) -> io::Result<Option<Handle>> {
    let value = place::read_xattr(fd, place::ORIGIN)?.unwrap_or_default();
    match value[..] {
        [0, MAGIC, len, _, kind, ..] if usize::from(len) == value.len() && value.len() > HEADER_BYTES => {
            Ok(Some((kind.into(), value[HEADER_BYTES..].to_vec())))
        }
        _ => Ok(None),
    }
}

/// The value of that attribute of `like`, with another handle in it.
pub(super) fn encode_source(like: BorrowedFd<'_>, (kind, bytes): &Handle) -> io::Result<Option<Vec<u8>>> {
    let value = place::read_xattr(like, place::ORIGIN)?.unwrap_or_default();
    let (Ok(kind), Ok(len)) = (u8::try_from(*kind), u8::try_from(HEADER_BYTES + bytes.len())) else { return Ok(None) };
    let Some([version, magic, _, flags, _, uuid @ ..]) = value.get(..HEADER_BYTES) else { return Ok(None) };
    Ok(Some([&[*version, *magic, len, *flags, kind], uuid, bytes].concat()))
}
