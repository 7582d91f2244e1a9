//! Memory that processes share for writing and that is no file of the tree: anonymous, memfds, System V segments.
//!
//! Copy-on-write does not reach it, so it is copied: at a checkpoint into a file beside it, at a rollback back into the
//! same object if a process still has that, else into a new one that takes its place in all of them.
//!
//! ```text
//! content file:  | data of object 0 ... | data of object 1 ... |     each: the ranges that had pages, in order
//! ```

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::objects::Permissions;
use super::reopen::reopen;
use super::template::{Mapping, read_maps};
use crate::sys::stat::stat;

/// With what the links of memfds begin.
const MEMFD: &[u8] = b"/memfd:";
/// Bytes on their way at once (chosen: they stay in the cache).
const BUFFER_BYTES: usize = 256 << 10;

/// Which object: device (major, minor) and inode number.
pub(super) type Key = ((u32, u32), u64);

/// All such memory of a sandbox's processes, as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SharedMemory {
    objects: Vec<Object>,
    /// Where its content is; none without objects.
    path: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Object {
    key: Key,
    /// As `maps` shows it.
    name: String,
    len_bytes: u64,
    /// Ranges with pages.
    data: Vec<Range<u64>>,
    /// Where in the content file its data begin.
    at: u64,
    /// `F_SEAL_*` of a memfd.
    seals: i32,
    permissions: Permissions,
}

/// Such memory, found at a process.
#[derive(Debug)]
pub(super) struct Found {
    key: Key,
    name: String,
    file: File,
}

impl Found {
    /// By a mapping of a stopped process.
    ///
    /// # Errors
    /// The kernel's word.
    pub(super) fn mapped(pid: pid_t, mapping: &Mapping) -> io::Result<Self> {
        let file = File::open(link(pid, mapping))?;
        Ok(Self { key: (mapping.device, mapping.inode), name: mapping.name.clone(), file })
    }

    /// By a copy of a descriptor.
    ///
    /// # Errors
    /// The kernel's word.
    pub(super) fn held(copy: BorrowedFd<'_>, name: String) -> io::Result<Self> {
        let look = stat(copy)?;
        let file = File::from(reopen(copy, OFlag::O_RDONLY)?);
        Ok(Self { key: (look.dev, look.ino), name, file })
    }

    /// Which object.
    pub(super) fn key(&self) -> Key {
        self.key
    }
}

impl SharedMemory {
    /// Copies what stopped processes share into a new file at `path`; where there is nothing there is none.
    ///
    /// # Errors
    /// No file is left.
    pub(super) fn read(found: &[Found], path: &Path) -> io::Result<Self> {
        if found.is_empty() {
            return Ok(Self::default());
        }
        let made = Self::copy(found, path);
        if made.is_err() {
            // The first failure is the one to report.
            let _ = fs::remove_file(path);
        }
        made
    }

    fn copy(found: &[Found], path: &Path) -> io::Result<Self> {
        let content = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        let (mut objects, mut at): (Vec<Object>, u64) = (Vec::new(), 0);
        for Found { key, name, file } in found {
            if objects.iter().any(|object| object.key == *key) {
                continue;
            }
            let len_bytes = file.metadata()?.len();
            let data = scan_data(file, len_bytes)?;
            let begin = at;
            for range in &data {
                each_part(range, |part, bytes| {
                    file.read_exact_at(bytes, part)?;
                    content.write_all_at(bytes, at + (part - range.start))
                })?;
                at += range.end - range.start;
            }
            objects.push(Object {
                key: *key,
                name: name.clone(),
                len_bytes,
                data,
                at: begin,
                seals: seals(file),
                permissions: Permissions::of(file.as_fd())?,
            });
        }
        Ok(Self { objects, path: Some(path.to_owned()) })
    }

    /// Bytes of its content.
    pub(super) fn n_bytes(&self) -> u64 {
        self.objects.iter().flat_map(|object| &object.data).map(|range| range.end - range.start).sum()
    }

    /// Finds each object at processes that live, or makes one like it, empty.
    ///
    /// # Errors
    /// Nothing has changed.
    pub(super) fn open(&self, pids: &[pid_t]) -> io::Result<Present<'_>> {
        let Some(path) = &self.path else { return Ok(Present::default()) };
        let content = File::open(path)?;
        let mut found: Vec<Option<Now>> = self.objects.iter().map(|_| None).collect();
        let mut note = |key: Key, link: &str| -> io::Result<()> {
            let Some(at) = self.objects.iter().position(|object| object.key == key) else { return Ok(()) };
            if found[at].is_none() {
                let file = File::options().read(true).write(true).open(link)?;
                // A seal is for ever.
                if seals(&file) & !self.objects[at].seals == 0 {
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
            None => object.make(),
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
    fn make(&self) -> io::Result<Now> {
        if self.name.starts_with("/SYSV") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a System V segment that all processes have left"));
        }
        let name = self.name.strip_prefix("/memfd:").and_then(|name| name.strip_suffix(" (deleted)"));
        let name = CString::new(name.unwrap_or("shared"))?;
        let file = File::from(memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(self.len_bytes)?;
        self.permissions.set(file.as_fd())?;
        let look = stat(file.as_fd())?;
        Ok(Now { was: self.key, is: (look.dev, look.ino), file })
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

impl Present<'_> {
    /// Makes the content what it was.
    ///
    /// # Errors
    /// It is neither what it was nor what it should be.
    pub(super) fn put_back(&self) -> io::Result<()> {
        let Some((memory, content)) = &self.memory else { return Ok(()) };
        for (object, Now { file, .. }) in memory.objects.iter().zip(&self.objects) {
            const UNCHANGEABLE: i32 = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
            if seals(file) & UNCHANGEABLE == UNCHANGEABLE {
                continue;
            }
            if file.metadata()?.len() != object.len_bytes {
                file.set_len(object.len_bytes)?;
            }
            let mut at = object.at;
            for range in &object.data {
                let mut present = vec![0; BUFFER_BYTES];
                each_part(range, |part, bytes| {
                    content.read_exact_at(bytes, at + (part - range.start))?;
                    let present = &mut present[..bytes.len()];
                    file.read_exact_at(present, part)?;
                    if present == bytes { Ok(()) } else { file.write_all_at(bytes, part) }
                })?;
                at += range.end - range.start;
            }
            for hole in holes(&object.data, object.len_bytes) {
                punch(file, &hole)?;
            }
            if seals(file) != object.seals {
                let seals = SealFlag::from_bits_retain(object.seals);
                fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
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
            if let Some(now) = self.objects.iter().find(|now| now.is == key) {
                (mapping.device, mapping.inode) = now.was;
            }
        }
    }

    /// The file to map where a mapping was of one of these objects.
    pub(super) fn file(&self, mapping: &Mapping) -> Option<BorrowedFd<'_>> {
        self.of((mapping.device, mapping.inode)).filter(|_| mapping.shared)
    }
}

/// None, if it is no memfd or may not be sealed.
fn seals(file: &File) -> i32 {
    fcntl(file, FcntlArg::F_GET_SEALS).unwrap_or(libc::F_SEAL_SEAL)
}

fn link(pid: pid_t, mapping: &Mapping) -> String {
    format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end)
}

/// Shows a range in parts, each with room for its bytes.
fn each_part(range: &Range<u64>, mut with: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(BUFFER_BYTES);
        with(at, &mut buffer[..len])?;
        at += len as u64;
    }
    Ok(())
}

fn scan_data(file: &File, len_bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut data = Vec::new();
    let mut at = 0;
    while at < len_bytes {
        let from = i64::try_from(at).map_err(io::Error::other)?;
        let start = match lseek(file, from, Whence::SeekData) {
            Ok(start) => start,
            // Nothing but a hole from here on.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, start, Whence::SeekHole)?;
        let (start, end) = (start.cast_unsigned(), end.cast_unsigned().min(len_bytes));
        data.push(start..end);
        at = end;
    }
    Ok(data)
}

fn holes(data: &[Range<u64>], len_bytes: u64) -> Vec<Range<u64>> {
    let ends = data.iter().map(|range| range.end);
    let starts = data.iter().map(|range| range.start);
    let holes = [0].into_iter().chain(ends).zip(starts.chain([len_bytes]));
    holes.map(|(start, end)| start..end).filter(|hole| !hole.is_empty()).collect()
}

fn punch(file: &File, hole: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = |at: u64| i64::try_from(at).map_err(io::Error::other);
    Ok(fallocate(file, flags, offset(hole.start)?, offset(hole.end - hole.start)?)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    /// A memfd and its mapping as `maps` would show it, opened through this very process.
    fn object(bytes: &[u8], len_bytes: u64) -> (File, Key) {
        let mut file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file.set_len(len_bytes).unwrap();
        let look = stat(file.as_fd()).unwrap();
        (file, (look.dev, look.ino))
    }

    #[test]
    fn content_and_holes_are_as_they_were() {
        let (file, key) = object(b"first", 1 << 20);
        file.write_all_at(b"later", 600_000).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let data = scan_data(&file, 1 << 20).unwrap();
        let mut object = Object {
            key,
            name: String::new(),
            len_bytes: 1 << 20,
            data,
            at: 0,
            seals: libc::F_SEAL_SEAL,
            permissions: Permissions::of(file.as_fd()).unwrap(),
        };
        let content = File::options().read(true).write(true).create_new(true).open(dir.path().join("content")).unwrap();
        let mut at = 0;
        for range in &object.data {
            each_part(range, |part, bytes| {
                file.read_exact_at(bytes, part)?;
                content.write_all_at(bytes, at + part - range.start)
            })
            .unwrap();
            at += range.end - range.start;
        }
        object.name = "memory".to_owned();
        let memory = SharedMemory { objects: vec![object], path: Some(dir.path().join("content")) };
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        for changed in 0..2 {
            file.write_all_at(b"changed", 300_000).unwrap();
            file.write_all_at(b"x", 2).unwrap();
            file.set_len(if changed == 0 { 2 << 20 } else { 500_000 }).unwrap();
            let now = Now { was: key, is: key, file: File::options().read(true).write(true).open(&link).unwrap() };
            let present = Present { memory: Some((&memory, content.try_clone().unwrap())), objects: vec![now] };
            present.put_back().unwrap();
            let mut all = vec![0; 1 << 20];
            file.read_exact_at(&mut all, 0).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 1 << 20);
            let mut expected = vec![0; 1 << 20];
            expected[..5].copy_from_slice(b"first");
            expected[600_000..600_005].copy_from_slice(b"later");
            assert!(all == expected);
            assert_eq!(scan_data(&file, 1 << 20).unwrap(), memory.objects[0].data);
        }
    }

    #[test]
    fn holes_are_what_is_not_data() {
        assert_eq!(holes(&[0..5, 8..10], 20), [5..8, 10..20]);
        assert_eq!(holes(&[], 20).as_slice(), std::slice::from_ref(&(0..20)));
        assert_eq!(holes(&[0..20, 20..20], 20), []);
    }
}
