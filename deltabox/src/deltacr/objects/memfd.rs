//! memfd_create(2) as a descriptor: name, seals, size, and content as bytes. Where it is mapped is not looked at here.
//!
//! ```text
//! read   --> record        copy_content --> a file of the caller's, holes stay holes
//! make (from that file) --> Unsealed: descriptions; map it where it was mapped; seal
//! ```
//! Seals come last: with F_SEAL_WRITE or F_SEAL_FUTURE_WRITE it can be neither filled nor mapped for writing.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, readlink};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::error::failed;
use super::own::{Access, Permissions, reopen};
use super::{ObjectError, ObjectRefusal};
use crate::sys::stat::stat;

/// Bytes per copy (chosen: what caches hold).
const COPY_BYTES: usize = 256 << 10;
/// May not be made executable (since Linux 6.3).
const F_SEAL_EXEC: i32 = 0x20;
// Both since Linux 6.3 (include/uapi/linux/memfd.h).
const MFD_NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(0x8);
const MFD_EXEC: MFdFlags = MFdFlags::from_bits_retain(0x10);
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A memfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memfd {
    name: Vec<u8>,
    /// `F_SEAL_*`.
    seals: i32,
    size_bytes: u64,
    openings: Vec<Opening>,
    permissions: Permissions,
}

/// A description of a memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opening {
    access: Access,
    position: i64,
}

/// A memfd that was made and is not sealed yet.
#[derive(Debug)]
pub struct Unsealed {
    /// One for each description, in the order in which they were read.
    pub descriptions: Vec<OwnedFd>,
    /// Open for both.
    whole: OwnedFd,
    seals: SealFlag,
}

impl Memfd {
    /// Reads the memfd that all of `descriptions` are of: every one that there is inside.
    ///
    /// # Errors
    /// `HugePages`; or the kernel's word.
    pub fn read(descriptions: &[BorrowedFd<'_>]) -> Result<Self, ObjectError> {
        let none = || io::Error::from(io::ErrorKind::InvalidInput);
        let first = *descriptions.first().ok_or_else(none).map_err(failed("read a memfd"))?;
        let name = read_name(first).map_err(failed("read the name of a memfd"))?;
        let file_system = fstatfs(first).map_err(failed("look at a memfd"))?.filesystem_type();
        if file_system.0 == HUGETLBFS_MAGIC {
            return Err(ObjectRefusal::HugePages { name: String::from_utf8_lossy(&name).into_owned() }.into());
        }
        let seals = fcntl(first, FcntlArg::F_GET_SEALS).map_err(failed("read the seals of a memfd"))?;
        let opening = |fd: &BorrowedFd<'_>| {
            Ok::<_, io::Error>(Opening { access: Access::of(*fd)?, position: lseek(fd, 0, Whence::SeekCur)? })
        };
        let openings = descriptions.iter().map(opening).collect::<Result<_, _>>();
        Ok(Self {
            name,
            seals,
            size_bytes: stat(first).map_err(failed("look at a memfd"))?.size,
            openings: openings.map_err(failed("read the position in a memfd"))?,
            permissions: Permissions::of(first).map_err(failed("look at a memfd"))?,
        })
    }

    /// Makes another one with what is in `content`, a file that [`copy_content`] has filled.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self, content: &File) -> Result<Unsealed, ObjectError> {
        let made = self.create().map_err(failed("make a memfd"))?;
        let whole = File::from(made);
        copy(content, &whole, self.size_bytes).map_err(failed("fill a memfd"))?;
        self.permissions.set(whole.as_fd()).map_err(failed("set the owner of a memfd"))?;
        let open = |opening: &Opening| {
            let opened = reopen(whole.as_fd(), opening.access.flag())?;
            lseek(&opened, opening.position, Whence::SeekSet)?;
            Ok::<_, io::Error>(opened)
        };
        let descriptions = self.openings.iter().map(open).collect::<Result<_, _>>();
        Ok(Unsealed {
            descriptions: descriptions.map_err(failed("open a memfd"))?,
            whole: whole.into(),
            seals: SealFlag::from_bits_retain(self.seals),
        })
    }

    fn create(&self) -> io::Result<OwnedFd> {
        let name = CString::new(self.name.as_slice())?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        // Said either way: what it is without a word is for the PID namespace to decide (vm.memfd_noexec).
        let kind = if self.seals & F_SEAL_EXEC == 0 { MFD_EXEC } else { MFD_NOEXEC_SEAL };
        match memfd_create(name.as_c_str(), flags | kind) {
            // Before Linux 6.3.
            Err(Errno::EINVAL) => Ok(memfd_create(name.as_c_str(), flags)?),
            made => Ok(made?),
        }
    }

    /// Bytes that its content has, holes too.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

impl Unsealed {
    /// Seals it, once it is mapped where it was mapped.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn seal(self) -> io::Result<Vec<OwnedFd>> {
        if !self.seals.is_empty() {
            fcntl(&self.whole, FcntlArg::F_ADD_SEALS(self.seals))?;
        }
        Ok(self.descriptions)
    }

    /// Without seals, open for both: what its mappings are made of.
    pub fn whole(&self) -> BorrowedFd<'_> {
        self.whole.as_fd()
    }
}

/// Copies what is in a memfd into an empty file. What is a hole is none of it; no position moves.
///
/// # Errors
/// The kernel's word.
pub fn copy_content(memfd: BorrowedFd<'_>, into: &File) -> io::Result<()> {
    // SEEK_DATA moves the position, so a description of its own.
    let from = File::from(reopen(memfd, OFlag::O_RDONLY)?);
    let size = from.metadata()?.len();
    copy(&from, into, size)
}

fn copy(from: &File, into: &File, size_bytes: u64) -> io::Result<()> {
    into.set_len(size_bytes)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    loop {
        let seek = |at: i64, whence| match lseek(from, at, whence) {
            Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        };
        let offset = |at: u64| i64::try_from(at).map_err(io::Error::other);
        let Some(start) = seek(offset(at)?, Whence::SeekData)?.filter(|start| *start < size_bytes) else {
            return Ok(());
        };
        let end = seek(offset(start)?, Whence::SeekHole)?.unwrap_or(size_bytes).min(size_bytes);
        at = start;
        while at < end {
            let room = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            from.read_exact_at(&mut buffer[..room], at)?;
            into.write_all_at(&buffer[..room], at)?;
            at += room as u64;
        }
    }
}

fn read_name(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let link = format!("/proc/thread-self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let link = readlink(link.as_str())?.into_vec();
    let name = link.strip_prefix(b"/memfd:").and_then(|name| name.strip_suffix(b" (deleted)"));
    name.map(<[u8]>::to_vec).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a memfd"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn comes_back(old: &[&OwnedFd]) -> (Memfd, Unsealed) {
        let fds: Vec<_> = old.iter().map(|fd| fd.as_fd()).collect();
        let before = lseek(old[0], 0, Whence::SeekCur).unwrap();
        let record = Memfd::read(&fds).unwrap();
        let content = tempfile::tempfile().unwrap();
        copy_content(fds[0], &content).unwrap();
        assert_eq!(lseek(old[0], 0, Whence::SeekCur).unwrap(), before);
        let made = record.make(&content).unwrap();
        (record, made)
    }

    fn same(record: &Memfd, made: &[OwnedFd]) {
        let fds: Vec<_> = made.iter().map(|fd| fd.as_fd()).collect();
        assert_eq!(&Memfd::read(&fds).unwrap(), record);
    }

    #[test]
    fn name_content_size_position_and_holes_come_back() {
        let old = memfd_create(c"a name (deleted)", MFdFlags::MFD_CLOEXEC).unwrap();
        let mut file = File::from(old.try_clone().unwrap());
        file.write_all(b"beginning").unwrap();
        file.write_all_at(b"end", 50 << 20).unwrap();
        file.set_len(60 << 20).unwrap();
        let (record, made) = comes_back(&[&old]);
        let made = made.seal().unwrap();
        same(&record, &made);
        let mut new = File::from(made.into_iter().next().unwrap());
        let (look, before) = (new.metadata().unwrap(), file.metadata().unwrap());
        assert_eq!((look.len(), look.blocks(), look.mode()), (60 << 20, before.blocks(), before.mode()));
        let mut bytes = [0; 3];
        new.read_exact_at(&mut bytes, 50 << 20).unwrap();
        assert_eq!(&bytes, b"end");
        // From its position on.
        new.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [0; 3]);
        // Without sealing allowed it stays so.
        assert_eq!(fcntl(&new, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)), Err(Errno::EPERM));
    }

    #[test]
    fn seals_hold_again() {
        let old = memfd_create(c"", MFdFlags::MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL).unwrap();
        nix::unistd::write(&old, b"sealed").unwrap();
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&old, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        let (record, made) = comes_back(&[&old]);
        assert!(nix::unistd::write(made.whole(), b"S").is_ok(), "it cannot be written while it is made");
        let made = made.seal().unwrap();
        same(&record, &made);
        assert_eq!(nix::unistd::write(&made[0], b"x"), Err(Errno::EPERM));
        assert_eq!(lseek(&made[0], 0, Whence::SeekCur), Ok(6));
    }

    #[test]
    fn each_description_has_its_own_position_and_access() {
        let old = memfd_create(c"two", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::write(&old, b"0123456789").unwrap();
        let reader = reopen(old.as_fd(), OFlag::O_RDONLY).unwrap();
        lseek(&reader, 4, Whence::SeekSet).unwrap();
        let (record, made) = comes_back(&[&reader, &old]);
        let made = made.seal().unwrap();
        same(&record, &made);
        let mut bytes = [0; 10];
        assert_eq!(nix::unistd::read(&made[0], &mut bytes), Ok(6));
        assert_eq!(&bytes[..6], b"456789");
        assert_eq!(nix::unistd::write(&made[0], b"x"), Err(Errno::EBADF));
        assert_eq!(nix::unistd::write(&made[1], b"x"), Ok(1));
    }

    #[test]
    fn owner_and_permissions_come_back() {
        let old = memfd_create(c"mine", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::fchown(&old, Some(nix::unistd::Uid::from_raw(1000)), None).unwrap();
        crate::sys::fs::chmod(old.as_fd(), 0o640).unwrap();
        let (record, made) = comes_back(&[&old]);
        same(&record, &made.seal().unwrap());
    }

    #[test]
    fn huge_pages_are_refused_by_name() {
        let made = memfd_create(c"big", MFdFlags::MFD_HUGETLB).expect("a memfd of huge pages, without any in it");
        let refused = Memfd::read(&[made.as_fd()]);
        let expected = ObjectRefusal::HugePages { name: "big".to_owned() };
        assert!(matches!(refused, Err(ObjectError::Refused(refusal)) if refusal == expected));
    }
}
