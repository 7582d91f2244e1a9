//! Paths inside a tree, and the only ways in which this module opens, walks and deletes there: by descriptor,
//! beneath a root, through no symbolic link and no mount point, whatever somebody planted in the tree.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Chosen: the kernel's PATH_MAX of 4096 less room for the directories of the store, so that whatever was made can
/// also be deleted by path.
const MAX_PATH_BYTES: usize = 4000;

/// A path relative to a tree's root, of plain components only. Empty is the root itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TreePath(PathBuf);

impl TreePath {
    /// Reads a name as tar does: a leading `/`, `.` components and doubled slashes mean nothing.
    pub(super) fn parse(raw: &[u8]) -> Result<Self, &'static str> {
        let mut path = Vec::with_capacity(raw.len().min(MAX_PATH_BYTES));
        for part in raw.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => return Err("its path contains `..`"),
                _ if part.contains(&0) => return Err("its path contains a zero byte"),
                _ if path.len() + part.len() >= MAX_PATH_BYTES => return Err("its path is longer than 4000 bytes"),
                _ if !path.is_empty() => path.push(b'/'),
                _ => {}
            }
            path.extend_from_slice(part);
        }
        Ok(Self(OsString::from_vec(path).into()))
    }

    pub(super) fn as_path(&self) -> &Path {
        &self.0
    }

    /// The directory and the name in it; `None` for the root.
    pub(super) fn split(&self) -> Option<(&Path, &OsStr)> {
        Some((self.0.parent()?, self.0.file_name()?))
    }

    /// The path of `name` in the same directory.
    pub(super) fn sibling(&self, name: &[u8]) -> Result<Self, &'static str> {
        match name {
            b"" | b"." | b".." => Err("it names no file"),
            _ => Ok(Self(self.0.with_file_name(OsStr::from_bytes(name)))),
        }
    }
}

impl AsRef<Path> for TreePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

/// Opens `path` beneath `root`; empty is `root` itself. ELOOP: a symbolic link on the way or at the end.
/// EXDEV: a mount point, or out of `root`.
pub(super) fn open_beneath(root: impl AsFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

/// Every name in the directory `path` beneath `root`, with whether it is a directory itself.
pub(super) fn for_each_name<E: From<io::Error>>(
    root: impl AsFd,
    path: &Path,
    mut each: impl FnMut(BorrowedFd<'_>, &OsStr, bool) -> Result<(), E>,
) -> Result<(), E> {
    let listing = open_beneath(&root, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY).map_err(io::Error::from)?;
    // A second descriptor for the calls on entries: the listing's own belongs to the iterator.
    let dir = listing.try_clone()?;
    for entry in Dir::from_fd(listing).map_err(io::Error::from)?.iter() {
        let entry = entry.map_err(io::Error::from)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let is_dir = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => is_dir(&stat_at(&dir, name).map_err(io::Error::from)?),
        };
        each(dir.as_fd(), name, is_dir)?;
    }
    Ok(())
}

/// Visits a directory and all below it. `enter` returns the names of the subdirectories to visit; `leave` comes
/// after them. Holds no descriptor between calls and names only along the current path, so depth costs little.
pub(super) fn walk<C, E>(
    context: &mut C,
    mut enter: impl FnMut(&mut C, &Path) -> Result<Vec<OsString>, E>,
    mut leave: impl FnMut(&mut C, &Path) -> Result<(), E>,
) -> Result<(), E> {
    let mut path = PathBuf::new();
    let mut levels = vec![enter(context, &path)?];
    while let Some(subdirs) = levels.last_mut() {
        if let Some(name) = subdirs.pop() {
            path.push(name);
            levels.push(enter(context, &path)?);
        } else {
            leave(context, &path)?;
            path.pop();
            levels.pop();
        }
    }
    Ok(())
}

/// Metadata of `name` in `dir`, of a symbolic link itself.
pub(super) fn stat_at(dir: impl AsFd, name: &OsStr) -> nix::Result<FileStat> {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

pub(super) fn is_dir(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// Deletes `name` in `parent`, a directory with all below it; `removed` hears of everything just before it goes.
/// That `name` does not exist is fine.
pub(super) fn delete(parent: impl AsFd, name: &OsStr, mut removed: impl FnMut(&FileStat)) -> io::Result<()> {
    let stat = match stat_at(&parent, name) {
        Err(Errno::ENOENT) => return Ok(()),
        stat => stat?,
    };
    if is_dir(&stat) {
        empty_dir(open_beneath(&parent, Path::new(name), OFlag::O_PATH | OFlag::O_DIRECTORY)?, &mut removed)?;
        removed(&stat);
        return Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?);
    }
    removed(&stat);
    Ok(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?)
}

/// Deletes everything in the directory `root`.
pub(super) fn empty_dir(root: impl AsFd, mut removed: impl FnMut(&FileStat)) -> io::Result<()> {
    let root = root.as_fd();
    walk(
        &mut removed,
        |removed, path| {
            let mut subdirs = Vec::new();
            for_each_name(root, path, |dir, name, is_dir| {
                if is_dir {
                    subdirs.push(name.to_owned());
                    return Ok(());
                }
                removed(&stat_at(dir, name)?);
                Ok::<_, io::Error>(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?)
            })?;
            Ok(subdirs)
        },
        |removed, path| {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
            let parent = open_beneath(root, parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
            removed(&stat_at(&parent, name)?);
            Ok::<_, io::Error>(unlinkat(&parent, name, UnlinkatFlags::RemoveDir)?)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_plain_components_or_refused() {
        let parse = |raw: &[u8]| TreePath::parse(raw).map(|path| path.0.into_os_string().into_vec());
        for root in [&b""[..], b"/", b".", b"./", b"././/"] {
            assert_eq!(parse(root), Ok(Vec::new()));
        }
        assert_eq!(parse(b"/etc//./passwd/"), Ok(b"etc/passwd".to_vec()));
        assert_eq!(parse(b"..a/b.."), Ok(b"..a/b..".to_vec()));
        for bad in [&b".."[..], b"../x", b"a/../b", b"/..", b"a\0b", &[b'a'; 4001]] {
            assert!(parse(bad).is_err(), "{bad:?} was taken");
        }
        assert!(parse(&[b'a'; 3999]).is_ok());
    }
}
