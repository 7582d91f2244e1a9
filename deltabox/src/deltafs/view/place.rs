//! One layer, or another directory of a stack, without overlayfs: what lies at a path of it, and how overlayfs reads
//! that.
//!
//! Every path is opened from the layer's descriptor, beneath it, through no symbolic link and no mount point. Layers
//! may change while they are read: what vanishes in between is absent.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::fstat;

use crate::sys::fs::{XATTR_MAX_BYTES, get_xattr};

/// Overlayfs's attribute of a directory: `y` hides everything below it, `x` says that whiteouts in it may be
/// attributes.
pub(in crate::deltafs) const OPAQUE: &CStr = c"trusted.overlay.opaque";
/// Overlayfs's attribute of a directory that goes on elsewhere in the layers below.
pub(in crate::deltafs) const REDIRECT: &CStr = c"trusted.overlay.redirect";
/// Overlayfs's attribute of an empty file that stands for a whiteout.
pub(in crate::deltafs) const WHITEOUT: &CStr = c"trusted.overlay.whiteout";
/// Overlayfs's attribute of a copied-up file: the handle of what it was copied from.
pub(in crate::deltafs) const ORIGIN: &CStr = c"trusted.overlay.origin";

/// Longer paths are not gone into by those who keep the paths of all directories. (Chosen: twice PATH_MAX. A program can
/// nest directories without end.)
pub(in crate::deltafs) const MAX_DEEP_BYTES: usize = 8192;
/// Path bytes that are given to the kernel at once. (Chosen: below PATH_MAX of 4096; programs can nest deeper.)
const MAX_PATH_BYTES: usize = 3000;

/// What one layer says of one path.
#[derive(Debug)]
pub(super) enum Said {
    /// Nothing: the layers below decide.
    Nothing,
    /// It is not there, whatever lies below.
    Whiteout,
    /// Something else than a directory; hides what lies below.
    File,
    /// A directory, to be merged with one below.
    Directory(Merge),
}

/// With what below a directory is merged.
#[derive(Debug)]
pub(super) enum Merge {
    /// Its namesake.
    Same,
    /// With nothing.
    Opaque,
    /// Another in the same directory.
    Sibling(OsString),
    /// Another, by its path in the view of the layers below; relative to the root.
    Path(PathBuf),
}

/// Whether this error means that something is not there (any more), or was replaced by something else meanwhile.
pub(in crate::deltafs) fn is_absence(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ESTALE))
}

/// Opens `path` in `layer`, of a symbolic link the link itself; empty is the layer's root.
pub(in crate::deltafs) fn open(layer: BorrowedFd<'_>, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let mut chunk = PathBuf::new();
    let mut at: Option<OwnedFd> = None;
    let open_at = |at: &Option<OwnedFd>, path: &Path, flags| {
        let dir = at.as_ref().map_or(layer, AsFd::as_fd);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_XDEV;
        loop {
            let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW).resolve(resolve);
            match openat2(dir, path, how) {
                // A rename elsewhere on the machine came between (openat2(2)); it says nothing of this path.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
    };
    if path.as_os_str().len() > MAX_PATH_BYTES {
        for part in path {
            if chunk.as_os_str().len() + part.len() > MAX_PATH_BYTES {
                at = Some(open_at(&at, &chunk, OFlag::O_PATH | OFlag::O_DIRECTORY)?);
                chunk.clear();
            }
            chunk.push(part);
        }
        return Ok(open_at(&at, &chunk, flags)?);
    }
    Ok(open_at(&at, path, flags)?)
}

/// What `layer` says of `path`.
pub(super) fn read(layer: BorrowedFd<'_>, path: &Path) -> io::Result<Said> {
    let said = open(layer, path, OFlag::O_PATH).and_then(|fd| said(fd.as_fd()));
    match said {
        Err(error) if is_absence(&error) => Ok(Said::Nothing),
        other => other,
    }
}

fn said(fd: BorrowedFd<'_>) -> io::Result<Said> {
    let stat = fstat(fd)?;
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => Ok(Said::Directory(merge(fd)?)),
        libc::S_IFCHR if stat.st_rdev == 0 => Ok(Said::Whiteout),
        libc::S_IFREG if stat.st_size == 0 && read_xattr(fd, WHITEOUT)?.is_some() => Ok(Said::Whiteout),
        _ => Ok(Said::File),
    }
}

fn merge(dir: BorrowedFd<'_>) -> io::Result<Merge> {
    if read_xattr(dir, OPAQUE)?.as_deref() == Some(b"y") {
        return Ok(Merge::Opaque);
    }
    let Some(redirect) = read_xattr(dir, REDIRECT)? else { return Ok(Merge::Same) };
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a directory's redirect is no path");
    let is_name = |name: &[u8]| !name.is_empty() && name != b"." && name != b".." && !name.contains(&0);
    match redirect.strip_prefix(b"/") {
        None if is_name(&redirect) && !redirect.contains(&b'/') => Ok(Merge::Sibling(OsString::from_vec(redirect))),
        Some(path) if path.split(|byte| *byte == b'/').all(is_name) => Ok(Merge::Path(OsStr::from_bytes(path).into())),
        _ => Err(malformed()),
    }
}

/// The value of an attribute, if it is there.
pub(in crate::deltafs) fn read_xattr(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = [0; 512];
    match get_xattr(fd, name, &mut value) {
        Ok(n) => Ok(Some(value[..n].to_vec())),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(None),
            Some(libc::ERANGE) => {
                let mut value = vec![0; XATTR_MAX_BYTES];
                let n = get_xattr(fd, name, &mut value)?;
                value.truncate(n);
                Ok(Some(value))
            }
            _ => Err(error),
        },
    }
}

/// Adds the names in the directory `path` of `layer`, whiteouts among them, to `names`.
pub(in crate::deltafs) fn list(layer: BorrowedFd<'_>, path: &Path, names: &mut BTreeSet<OsString>) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let dir = match open(layer, path, flags | OFlag::O_NOATIME) {
        // An idmapped base may have directories of owners that the map does not know.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(layer, path, flags),
        other => other,
    };
    let dir = match dir {
        Err(error) if is_absence(&error) => return Ok(()),
        other => other?,
    };
    for entry in Dir::from_fd(dir)?.iter() {
        let entry = match entry {
            // The directory was removed while it was read.
            Err(Errno::ENOENT) => break,
            other => other?,
        };
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.insert(name.to_owned());
        }
    }
    Ok(())
}
