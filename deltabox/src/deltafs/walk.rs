//! Going through a tree that programs made, perhaps while they change it: however deep it is, never through a symbolic
//! link, never out of it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, SFlag, fstatat};

/// Bytes of a path below a descriptor; what lies deeper gets a descriptor of its own. (Chosen: half of the kernel's
/// PATH_MAX, so that one more name always fits.)
const MAX_PATH_BYTES: usize = 2048;

/// What was found.
#[derive(Debug)]
pub struct Entry<'a> {
    dir: BorrowedFd<'a>,
    name: &'a CStr,
    /// What it is; of a symbolic link, the link.
    pub stat: FileStat,
}

impl Entry<'_> {
    /// Its type.
    pub fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    /// Opens a regular file or directory for reading.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        Ok(openat2(self.dir, self.name, OpenHow::new().flags(flags).resolve(stay_inside()))?)
    }
}

/// Calls `visit` for everything below `top`. What vanishes meanwhile is passed over.
pub fn walk(top: &Path, mut visit: impl FnMut(&Entry<'_>) -> io::Result<()>) -> io::Result<()> {
    let mut queue = vec![(Rc::new(super::layer::open_dir(top)?), PathBuf::from("."))];
    while let Some((anchor, path)) = queue.pop() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = match openat2(&*anchor, &path, OpenHow::new().flags(flags).resolve(stay_inside())) {
            Err(errno) if has_vanished(errno) => continue,
            other => other?,
        };
        let mut dir = Dir::from_fd(fd)?;
        let at = dir.as_fd().try_clone_to_owned()?;
        for entry in dir.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = match fstatat(&at, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(errno) if has_vanished(errno) => continue,
                other => other?,
            };
            let entry = Entry { dir: at.as_fd(), name, stat };
            visit(&entry)?;
            if entry.kind() == SFlag::S_IFDIR {
                let below = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
                if below.as_os_str().len() <= MAX_PATH_BYTES {
                    queue.push((Rc::clone(&anchor), below));
                } else if let Ok(anchor) = entry.open() {
                    queue.push((Rc::new(anchor), PathBuf::from(".")));
                }
            }
        }
    }
    Ok(())
}

fn stay_inside() -> ResolveFlag {
    ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH
}

/// Removed, replaced by something else, or moved while it was looked up.
fn has_vanished(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EAGAIN)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn everything_is_visited_once_however_deep_and_links_are_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, outside) = (scratch.path().join("root"), scratch.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "x").unwrap();
        fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        // Built from the inside out: the nest so far is moved into a new directory.
        for _ in 0..3000 {
            let (old, new) = (root.join("nest"), root.join("new"));
            fs::create_dir(&new).unwrap();
            fs::write(new.join("file"), "x").unwrap();
            if old.exists() {
                fs::rename(&old, new.join("nest")).unwrap();
            }
            fs::rename(&new, &old).unwrap();
        }
        let (mut n_files, mut n_dirs, mut n_links) = (0, 0, 0);
        walk(&root, |entry| {
            match entry.kind() {
                SFlag::S_IFREG => n_files += 1,
                SFlag::S_IFDIR => n_dirs += 1,
                _ => n_links += 1,
            }
            Ok(())
        })
        .unwrap();
        assert_eq!((n_files, n_dirs, n_links), (3000, 3000, 1));
        super::super::remove::remove_tree(&root).unwrap();
    }
}
