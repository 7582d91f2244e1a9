//! inotify: watches are on inodes, and the next root has others.
//!
//! The kernel numbers watches itself, one after the other, and programs know theirs by number. So a fresh instance is
//! given watches in the old order, and throwaway ones where numbers are missing.
//!
//! What is watched is told only as a file handle, and that of an overlay without index is a number that leads nowhere
//! (fhandle-type 81, Linux 6.18). So the file is looked for: below the directory that the process works in, then
//! everywhere. One walk serves all watches of an instance.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::deltacr::fdinfo::Watch;
use crate::sandbox::root::Root;
use crate::sys::handle::{Handle, identity_at};
use crate::sys::inotify::{add_watch, remove_watch};
use crate::sys::stat::stat;

/// Numbers up to which the gaps between watches are filled (chosen: 2 us each).
const MAX_NUMBER: i32 = 20_000;
/// Files that are looked at before a watch counts as not found (chosen: 2 us each).
const MAX_FILES: usize = 300_000;

/// An inotify instance.
#[derive(Debug)]
pub(super) struct Watcher {
    /// By number.
    watches: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    number: i32,
    mask: u32,
    path: CString,
    /// The same on the next root, if that has it.
    next: Option<OwnedFd>,
    /// The next root does not have it.
    ends: bool,
}

impl Watcher {
    /// Finds what an instance watches; `near` is the directory in which its process works.
    ///
    /// # Errors
    /// The number of a watch whose file was not found.
    pub(super) fn find(watches: &[Watch], from: &Root, near: &CStr) -> Result<Self, i32> {
        let mut wanted: BTreeMap<Handle, Vec<&Watch>> = BTreeMap::new();
        for watch in watches {
            if watch.number > MAX_NUMBER {
                return Err(watch.number);
            }
            wanted.entry(watch.handle.clone()).or_default().push(watch);
        }
        let mut found = Vec::with_capacity(watches.len());
        let mut n_left = MAX_FILES;
        for start in [near, c"/"] {
            search(from, start, &mut n_left, |handle, path| {
                for watch in wanted.remove(handle).unwrap_or_default() {
                    found.push(Watched {
                        number: watch.number,
                        mask: watch.mask,
                        path: path.to_owned(),
                        next: None,
                        ends: true,
                    });
                }
                !wanted.is_empty()
            });
        }
        if let Some(watch) = wanted.values().flatten().next() {
            return Err(watch.number);
        }
        found.sort_by_key(|watch| watch.number);
        Ok(Self { watches: found })
    }

    /// Opens what it watches on the next root.
    pub(super) fn open(&mut self, to: &Root) {
        for watch in &mut self.watches {
            watch.next = to.open(&watch.path, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok();
        }
    }

    /// Adds the watches to a fresh instance, which never blocks its readers so far.
    pub(super) fn watch(&mut self, instance: &OwnedFd) -> io::Result<()> {
        let filler = memfd_create(c"deltabox", MFdFlags::MFD_CLOEXEC)?;
        let mut next = 1;
        for watch in &mut self.watches {
            while next < watch.number {
                let number = add_watch(instance.as_fd(), filler.as_fd(), libc::IN_DELETE_SELF)?;
                remove_watch(instance.as_fd(), number)?;
                next += 1;
            }
            // In the place of a file that is not there: its end is told by `settle`.
            let file = match watch.next.take() {
                Some(file) => {
                    watch.ends = false;
                    file
                }
                None => memfd_create(c"deltabox", MFdFlags::MFD_CLOEXEC)?,
            };
            let number = add_watch(instance.as_fd(), file.as_fd(), watch.mask)?;
            if number != watch.number {
                return Err(io::Error::other(format!("watch {} became {number}", watch.number)));
            }
            watch.next = Some(file);
            next += 1;
        }
        Ok(())
    }

    /// Takes out the events that the move itself caused, and ends watches whose files the next root does not have:
    /// programs are told so by `IN_IGNORED`, as when a file is deleted. `flags` are the instance's own.
    pub(super) fn settle(&mut self, instance: &OwnedFd, flags: i32) -> io::Result<()> {
        let mut events = [0; 4096];
        loop {
            match nix::unistd::read(instance, &mut events) {
                Ok(1..) => {}
                Ok(0) | Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        for watch in self.watches.iter().filter(|watch| watch.ends) {
            remove_watch(instance.as_fd(), watch.number)?;
        }
        fcntl(instance, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)))?;
        Ok(())
    }
}

/// Walks the directories below `start`, the near ones first, and shows each file's handle until `more` says enough.
fn search(from: &Root, start: &CStr, n_left: &mut usize, mut more: impl FnMut(&Handle, &CStr) -> bool) {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_NOATIME;
    let mut queue = VecDeque::from([start.to_owned()]);
    if let Ok(file) = from.open(&queue[0], OFlag::O_PATH)
        && let Ok(handle) = identity_at(file.as_fd(), c"")
        && !more(&handle, start)
    {
        return;
    }
    while let Some(path) = queue.pop_front() {
        let Ok(directory) = from.open(&path, flags) else { continue };
        // What is mounted there is none of ours.
        if stat(directory.as_fd()).is_ok_and(|stat| stat.mount != from.mount()) {
            continue;
        }
        let Ok(mut entries) = Dir::from_fd(directory) else { continue };
        let fd = entries.as_fd().try_clone_to_owned();
        let Ok(fd) = fd else { return };
        for entry in entries.iter().flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if *n_left == 0 {
                return;
            }
            *n_left -= 1;
            let Ok(handle) = identity_at(fd.as_fd(), name) else { continue };
            let slash: &[u8] = if path.to_bytes() == b"/" { b"" } else { b"/" };
            let Ok(whole) = CString::new([path.to_bytes(), slash, name.to_bytes()].concat()) else { continue };
            if !more(&handle, &whole) {
                return;
            }
            if entry.file_type().is_none_or(|kind| kind == nix::dir::Type::Directory) {
                queue.push_back(whole);
            }
        }
    }
}
