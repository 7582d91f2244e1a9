//! Where a file is in a sandbox's tree, as the kernel tells it by magic links.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;

use nix::fcntl::{OFlag, readlinkat};

use crate::sandbox::root::{LANDING, Root};
use crate::sys::stat::{Stat, stat, stat_at};

/// What d_path puts behind the name of a file that has none any more.
const DELETED: &[u8] = b" (deleted)";

/// A place in the tree of files.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// From the root, without symbolic links.
    pub(super) path: CString,
    pub(super) stat: Stat,
    /// It has no name any more.
    pub(super) unlinked: bool,
}

impl Place {
    /// Where a magic link (absolute, or in `dir`) leads, if that is on `root`'s mount.
    pub(super) fn behind(root: &Root, dir: BorrowedFd<'_>, link: &CStr) -> io::Result<Option<Self>> {
        let stat = stat_at(dir, link)?;
        if stat.mount != root.mount() {
            return Ok(None);
        }
        if root.is(&stat) {
            return Ok(Some(Self { path: c"/".into(), stat, unlinked: false }));
        }
        let path = readlinkat(dir, link)?.into_vec();
        Self::named(root, stat, path).map(Some)
    }

    /// The place of a file on `root`'s mount that d_path calls so.
    pub(super) fn named(root: &Root, stat: Stat, mut path: Vec<u8>) -> io::Result<Self> {
        // Of a root that was left already; nobody else's files have this path.
        let landing = [b"/", LANDING.to_bytes()].concat();
        if let Some(rest) = path.strip_prefix(landing.as_slice()).filter(|rest| rest.is_empty() || rest[0] == b'/') {
            path = if rest.is_empty() { b"/".to_vec() } else { rest.to_vec() };
        }
        let unlinked = path.ends_with(DELETED) && !is_there(root, &path, &stat);
        if unlinked {
            path.truncate(path.len() - DELETED.len());
        }
        Ok(Self { path: CString::new(path)?, stat, unlinked })
    }
}

/// Whether the file has just the name that d_path gave it: a name may end in " (deleted)".
fn is_there(root: &Root, path: &[u8], known: &Stat) -> bool {
    let Ok(path) = CString::new(path) else { return false };
    let found = root.open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW);
    found.is_ok_and(|found| stat(found.as_fd()).is_ok_and(|there| there.identity() == known.identity()))
}
