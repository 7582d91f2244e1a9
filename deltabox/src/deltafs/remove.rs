//! Deleting what a sandbox has left, however it is shaped: a program can nest directories deeper than any stack or
//! descriptor table.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Levels that are walked one inside the other. What lies deeper is first moved up to the top.
/// (Chosen: two descriptors and a small frame each, and ordinary trees are no deeper.)
const MAX_DEPTH: usize = 24;

/// Deletes the directory `path` with all below it, never following a symbolic link. Every directory is visited once;
/// memory and descriptors are bounded.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let top = Dir::open(path, flags, Mode::empty())?.as_fd().try_clone_to_owned()?;
    let mut walk = Walk { top, n_moved: 0 };
    // Reading a directory while it changes may miss what was moved into it: until a pass finds nothing.
    while walk.empty(Dir::openat(&walk.top, ".", flags, Mode::empty())?, 0)? > 0 {}
    std::fs::remove_dir(path)
}

struct Walk {
    top: OwnedFd,
    n_moved: u64,
}

impl Walk {
    /// Deletes or moves up everything in `dir`; says how many entries it saw.
    fn empty(&mut self, mut dir: Dir, depth: usize) -> io::Result<usize> {
        let at = dir.as_fd().try_clone_to_owned()?;
        let mut n_seen = 0;
        for entry in dir.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            n_seen += 1;
            if entry.file_type().is_some_and(|kind| kind != Type::Directory) {
                unlinkat(&at, name, UnlinkatFlags::NoRemoveDir)?;
            } else {
                self.directory(&at, name, depth)?;
            }
        }
        Ok(n_seen)
    }

    /// `name` is a directory, or of a kind that this file system does not tell in its entries.
    fn directory(&mut self, at: &OwnedFd, name: &CStr, depth: usize) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match Dir::openat(at, name, flags, Mode::empty()) {
            Err(Errno::ENOTDIR | Errno::ELOOP) => return Ok(unlinkat(at, name, UnlinkatFlags::NoRemoveDir)?),
            Err(errno) => return Err(errno.into()),
            Ok(inner) if depth < MAX_DEPTH => {
                while self.empty(Dir::openat(&inner, ".", flags, Mode::empty())?, depth + 1)? > 0 {}
            }
            Ok(_) => {
                // A name that no directory entry of a layer has at the top, which is ours.
                self.n_moved += 1;
                return Ok(renameat(at, name, &self.top, format!(".deep-{}", self.n_moved).as_str())?);
            }
        }
        Ok(unlinkat(at, name, UnlinkatFlags::RemoveDir)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_tree_deeper_than_any_descriptor_table_is_deleted_and_links_are_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        let root = scratch.path().join("root");
        fs::create_dir(&root).unwrap();
        // Built from the inside out: the nest so far is moved into a new directory.
        for _ in 0..5000 {
            let (old, new) = (root.join("d"), root.join("new"));
            fs::create_dir(&new).unwrap();
            fs::write(new.join("file"), "x").unwrap();
            std::os::unix::fs::symlink(&outside, new.join("link")).unwrap();
            if old.exists() {
                fs::rename(&old, new.join("d")).unwrap();
            }
            fs::rename(&new, &old).unwrap();
        }
        remove_tree(&root).unwrap();
        assert!(!root.exists());
        assert!(outside.join("precious").exists());
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let error = remove_tree(&scratch.path().join("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
