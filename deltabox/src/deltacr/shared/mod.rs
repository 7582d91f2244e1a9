//! What processes share for writing and no checkpoint of files has: memory (anonymous, memfds, System V segments), and files
//! without a name.
//!
//! Copy-on-write does not reach it, so it is copied: at a checkpoint into a file beside it. At a rollback memory goes back
//! into the same object if a process still has that, else into a new one that takes its place in all of them; a file is
//! always a new one, on the next root, for the old ones are the present's.
//!
//! ```text
//! content file:  | data of object 0 ... | data of object 1 ... |     each: the ranges that had pages, in order
//!                  memory, during the stop      files whose root is sealed: once the processes run again
//! ```

mod content;
mod nameless;

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libc::pid_t;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::objects::Permissions;
use super::reopen::reopen;
use super::template::{Mapping, read_maps};
use crate::sandbox::root::Root;
use crate::sys::stat::stat;
use content::{fill, put_back, scan_data, write_all};
pub(super) use nameless::is_on_overlay;
use nameless::{Attributes, make_nameless};

/// With what the links of memfds begin.
const MEMFD: &[u8] = b"/memfd:";

/// Which object: device (major, minor) and inode number.
pub(super) type Key = ((u32, u32), u64);

/// All such objects of a sandbox's processes, as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SharedMemory {
    objects: Vec<Object>,
    /// Where its content is; none without objects.
    path: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Object {
    key: Key,
    /// As `maps` or a link shows it.
    name: String,
    len_bytes: u64,
    /// Ranges with pages.
    data: Vec<Range<u64>>,
    /// Where in the content file its data begin.
    at: u64,
    nature: Nature,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Nature {
    /// With `F_SEAL_*` of a memfd.
    Memory { seals: i32, permissions: Permissions },
    /// A file of the tree that has no name.
    File(Attributes),
}

/// Such an object, found at a process.
#[derive(Debug)]
pub(super) struct Found {
    key: Key,
    name: String,
    file: File,
    /// The number of its mount, if it is a file of a tree.
    tree: Option<u64>,
}

impl Found {
    /// By a mapping of a stopped process.
    ///
    /// # Errors
    /// The kernel's word.
    pub(super) fn mapped(pid: pid_t, mapping: &Mapping) -> io::Result<Self> {
        let file = File::open(link(pid, mapping))?;
        let tree = tree_of(file.as_fd())?;
        Ok(Self { key: (mapping.device, mapping.inode), name: mapping.name.clone(), file, tree })
    }

    /// By a copy of a descriptor.
    ///
    /// # Errors
    /// The kernel's word.
    pub(super) fn held(copy: BorrowedFd<'_>, name: String) -> io::Result<Self> {
        let (look, tree) = (stat(copy)?, tree_of(copy)?);
        let more = if tree.is_some() { OFlag::O_NOATIME } else { OFlag::empty() };
        let file = File::from(reopen(copy, OFlag::O_RDONLY | more)?);
        Ok(Self { key: (look.dev, look.ino), name, file, tree })
    }

    /// Which object.
    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// Whether it is a file of this tree, not of one that was left.
    pub(super) fn is_in(&self, root: &Root) -> bool {
        self.tree == Some(root.mount())
    }
}

impl SharedMemory {
    /// Copies objects into the content file at `path`, a new one for the first of them. Nobody may write to them meanwhile:
    /// processes are stopped, or what they are on is sealed.
    ///
    /// # Errors
    /// These are not there; those of earlier calls are.
    pub(super) fn add(&mut self, found: &[Found], path: &Path) -> io::Result<()> {
        let new: Vec<_> = found.iter().filter(|one| self.objects.iter().all(|object| object.key != one.key)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let is_first = self.path.is_none();
        crate::fault::point("shared.copy")?;
        let content = File::options().read(true).write(true).create(is_first).truncate(is_first).open(path)?;
        self.path = Some(path.to_owned());
        for Found { key, name, file, tree } in new {
            if self.objects.iter().any(|object| object.key == *key) {
                continue;
            }
            let (key, name, at) = (*key, name.clone(), self.n_content_bytes());
            let len_bytes = file.metadata()?.len();
            let data = scan_data(file, len_bytes)?;
            write_all(file, &data, &content, at)?;
            let nature = match tree {
                Some(_) => Nature::File(Attributes::of(file.as_fd())?),
                None => Nature::Memory { seals: seals(file), permissions: Permissions::of(file.as_fd())? },
            };
            self.objects.push(Object { key, name, len_bytes, data, at, nature });
        }
        Ok(())
    }

    /// Bytes of memory.
    pub(super) fn n_bytes(&self) -> u64 {
        let is_memory = |object: &&Object| matches!(object.nature, Nature::Memory { .. });
        self.objects.iter().filter(is_memory).map(Object::n_data_bytes).sum()
    }

    fn n_content_bytes(&self) -> u64 {
        self.objects.iter().map(Object::n_data_bytes).sum()
    }

    /// Finds each piece of memory at processes that live, or makes one like it, empty. Files are made on `to`, with what
    /// was in them.
    ///
    /// # Errors
    /// Nothing has changed.
    pub(super) fn open(&self, pids: &[pid_t], to: &Root) -> io::Result<Present<'_>> {
        let Some(path) = &self.path else { return Ok(Present::default()) };
        let content = File::open(path)?;
        let mut found: Vec<Option<Now>> = self.objects.iter().map(|_| None).collect();
        let mut note = |key: Key, link: &str| -> io::Result<()> {
            let Some(at) = self.objects.iter().position(|object| object.key == key) else { return Ok(()) };
            let Nature::Memory { seals: then, .. } = self.objects[at].nature else { return Ok(()) };
            if found[at].is_none() {
                let file = match File::options().read(true).write(true).open(link) {
                    // Somebody executes it: it cannot be written to.
                    Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => return Ok(()),
                    other => other?,
                };
                if can_be_put_back(seals(&file), then, file.metadata()?.len(), self.objects[at].len_bytes) {
                    found[at] = Some(Now { was: key, is: key, file });
                }
            }
            Ok(())
        };
        for pid in pids {
            for mapping in read_maps(*pid)?.iter().filter(|mapping| mapping.shared) {
                note((mapping.device, mapping.inode), &link(*pid, mapping))?;
            }
            for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
                let link = entry?.path();
                let (Ok(text), Some(link)) = (fs::read_link(&link), link.to_str()) else { continue };
                if text.as_os_str().as_encoded_bytes().starts_with(MEMFD) {
                    let look = fs::metadata(link)?;
                    let dev = look.dev();
                    note(((libc::major(dev), libc::minor(dev)), look.ino()), link)?;
                }
            }
        }
        let make = |(object, found): (&Object, Option<Now>)| match found {
            Some(now) => Ok(now),
            None => object.make(&content, to),
        };
        let objects = self.objects.iter().zip(found).map(make).collect::<io::Result<_>>()?;
        Ok(Present { memory: Some((self, content)), objects })
    }

    /// Removes its content.
    ///
    /// # Errors
    /// It stays.
    pub(super) fn remove(&self) -> io::Result<()> {
        match self.path.as_deref().map_or(Ok(()), fs::remove_file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

impl Object {
    fn n_data_bytes(&self) -> u64 {
        self.data.iter().map(|range| range.end - range.start).sum()
    }

    fn make(&self, content: &File, to: &Root) -> io::Result<Now> {
        let file = match &self.nature {
            Nature::Memory { permissions, .. } => self.make_memory(*permissions)?,
            Nature::File(attributes) => self
                .make_file(attributes, content, to)
                .map_err(|source| io::Error::new(source.kind(), format!("make {} again: {source}", self.name)))?,
        };
        let look = stat(file.as_fd())?;
        Ok(Now { was: self.key, is: (look.dev, look.ino), file })
    }

    fn make_memory(&self, permissions: Permissions) -> io::Result<File> {
        if self.name.starts_with("/SYSV") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a System V segment that all processes have left"));
        }
        let name = self.name.strip_prefix("/memfd:").and_then(|name| name.strip_suffix(" (deleted)"));
        let name = CString::new(name.unwrap_or("shared"))?;
        let file = File::from(memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(self.len_bytes)?;
        permissions.set(file.as_fd())?;
        Ok(file)
    }

    /// With its content: who has it is not asked once something has changed.
    fn make_file(&self, attributes: &Attributes, content: &File, to: &Root) -> io::Result<File> {
        crate::fault::point("shared.make")?;
        let file = make_nameless(to)?;
        fill(&file, self.len_bytes, &self.data, content, self.at)?;
        attributes.set(file.as_fd())?;
        Ok(file)
    }
}

/// The objects in which the content is to be.
#[derive(Debug, Default)]
pub(super) struct Present<'a> {
    memory: Option<(&'a SharedMemory, File)>,
    objects: Vec<Now>,
}

/// An object, then and now.
#[derive(Debug)]
struct Now {
    was: Key,
    is: Key,
    file: File,
}

/// The identity of no file.
const NOBODY: Key = ((u32::MAX, u32::MAX), u64::MAX);

impl Present<'_> {
    /// Makes the content of memory what it was. (Files were made with it.)
    ///
    /// # Errors
    /// It is neither what it was nor what it should be.
    pub(super) fn put_back(&self) -> io::Result<()> {
        let Some((memory, content)) = &self.memory else { return Ok(()) };
        for (object, Now { file, .. }) in memory.objects.iter().zip(&self.objects) {
            let Nature::Memory { permissions, .. } = object.nature else { continue };
            permissions.set(file.as_fd())?;
            if seals(file) & UNCHANGEABLE != UNCHANGEABLE {
                put_back(file, object.len_bytes, &object.data, content, object.at)?;
            }
        }
        Ok(())
    }

    /// Seals memory as it was, once all have it: what is sealed against later writers can still be mapped until then.
    ///
    /// # Errors
    /// Some is not sealed.
    pub(super) fn seal(&self) -> io::Result<()> {
        let Some((memory, _)) = &self.memory else { return Ok(()) };
        for (object, Now { file, .. }) in memory.objects.iter().zip(&self.objects) {
            let Nature::Memory { seals: then, .. } = object.nature else { continue };
            if seals(file) != then {
                fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(then)))?;
            }
        }
        Ok(())
    }

    /// The object that was this one.
    pub(super) fn of(&self, key: Key) -> Option<BorrowedFd<'_>> {
        self.objects.iter().find(|now| now.was == key).map(|now| now.file.as_fd())
    }

    /// Gives mappings of these objects the identity that they had: two lists can be compared then.
    pub(super) fn name_as_then(&self, mappings: &mut [Mapping]) {
        for mapping in mappings.iter_mut().filter(|mapping| mapping.shared) {
            let key = (mapping.device, mapping.inode);
            let name = match self.objects.iter().find(|now| now.is == key) {
                Some(now) => now.was,
                // Another one with a number that was given again.
                None if self.objects.iter().any(|now| now.was == key) => NOBODY,
                None => continue,
            };
            (mapping.device, mapping.inode) = name;
        }
    }

    /// The file to map where a mapping was of one of these objects.
    pub(super) fn file(&self, mapping: &Mapping) -> Option<BorrowedFd<'_>> {
        self.of((mapping.device, mapping.inode)).filter(|_| mapping.shared)
    }
}

/// With these seals neither content nor size can change.
const UNCHANGEABLE: i32 = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;

/// Whether memory with seals `now` can have the content, size and seals again that it had: a seal is for ever.
fn can_be_put_back(now: i32, then: i32, len_now: u64, len_then: u64) -> bool {
    let has = |seals: i32| now & seals != 0;
    let is_new = now & !then != 0;
    let is_written = has(libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) && now & UNCHANGEABLE != UNCHANGEABLE;
    let is_sized = len_now < len_then && has(libc::F_SEAL_GROW) || len_now > len_then && has(libc::F_SEAL_SHRINK);
    !is_new && !is_written && !is_sized
}

/// None, if it is no memfd or may not be sealed.
fn seals(file: &File) -> i32 {
    fcntl(file, FcntlArg::F_GET_SEALS).unwrap_or(libc::F_SEAL_SEAL)
}

fn link(pid: pid_t, mapping: &Mapping) -> String {
    format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end)
}

fn tree_of(file: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    if is_on_overlay(file)? { stat(file).map(|look| Some(look.mount)) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::{F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE};

    #[test]
    fn sealed_memory_is_used_again_if_no_seal_hinders_what_is_to_be_done() {
        for (now, then, lens, can) in [
            (0, 0, (1, 2), true),
            (0, F_SEAL_WRITE, (1, 2), true),
            (F_SEAL_SEAL, 0, (1, 1), false),
            (UNCHANGEABLE, UNCHANGEABLE, (2, 2), true),
            (F_SEAL_WRITE, F_SEAL_WRITE, (2, 2), false),
            (F_SEAL_FUTURE_WRITE, F_SEAL_FUTURE_WRITE, (2, 2), false),
            (F_SEAL_GROW, F_SEAL_GROW, (1, 2), false),
            (F_SEAL_GROW, F_SEAL_GROW, (3, 2), true),
            (F_SEAL_SHRINK, F_SEAL_SHRINK, (3, 2), false),
            (F_SEAL_SHRINK, F_SEAL_SHRINK, (1, 2), true),
        ] {
            assert_eq!(can_be_put_back(now, then, lens.0, lens.1), can, "{now} {then} {lens:?}");
        }
    }
}
