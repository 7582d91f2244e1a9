//! Asking `/proc/PID/maps` for single mappings (PROCMAP_QUERY, since Linux 6.11).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `PROT_*`.
    pub protection: u64,
    /// Where in the file it begins, bytes.
    pub offset_bytes: u64,
    /// The kernel's own number of the file's device (MKDEV of include/linux/kdev_t.h).
    pub dev: u64,
}

/// `struct procmap_query` of include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    found: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const READABLE: u64 = 0x01;
const WRITABLE: u64 = 0x02;
const EXECUTABLE: u64 = 0x04;
const SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;
const FILE_BACKED: u64 = 0x20;

/// The first shared mapping of a file at `address` or above; `maps` is an open `/proc/PID/maps`.
pub fn next_shared_file(maps: BorrowedFd<'_>, address: u64) -> io::Result<Option<Mapped>> {
    // _IOWR('f', 17, struct procmap_query)
    const PROCMAP_QUERY: libc::c_ulong = 0xc000_6611 | (size_of::<Query>() as libc::c_ulong) << 16;
    let flags = SHARED | FILE_BACKED | COVERING_OR_NEXT;
    let mut query = Query { size: size_of::<Query>() as u64, flags, address, ..Query::default() };
    // SAFETY: the kernel reads and writes one procmap_query, whose size it is told; no buffers are offered.
    match check(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) }.into()) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        // The process has no memory any more.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    }
    let bit = |flag, protection: i32| if query.found & flag == 0 { 0 } else { u64::from(protection.cast_unsigned()) };
    let protection =
        bit(READABLE, libc::PROT_READ) | bit(WRITABLE, libc::PROT_WRITE) | bit(EXECUTABLE, libc::PROT_EXEC);
    let dev = u64::from(query.dev_major) << 20 | u64::from(query.dev_minor);
    Ok(Some(Mapped { start: query.start, end: query.end, protection, offset_bytes: query.offset, dev }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn shared_mappings_of_files_are_found_and_private_ones_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let length = std::num::NonZeroUsize::new(4096).unwrap();
        let (read, flags) = (nix::sys::mman::ProtFlags::PROT_READ, nix::sys::mman::MapFlags::MAP_SHARED);
        // SAFETY: a fresh mapping at an address that the kernel chooses.
        let at = unsafe { nix::sys::mman::mmap(None, length, read, flags, &file, 4096) }.unwrap().as_ptr() as u64;
        let maps = std::fs::File::open("/proc/self/maps").unwrap();
        let found = next_shared_file(maps.as_fd(), at).unwrap().expect("a mapping");
        assert_eq!(found, Mapped { start: at, end: at + 4096, protection: 1, offset_bytes: 4096, dev: found.dev });
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut next = 0;
        while let Some(mapped) = next_shared_file(maps.as_fd(), next).unwrap() {
            let line = text.lines().find(|line| line.starts_with(&format!("{:08x}-", mapped.start))).expect("a line");
            assert!(line.split(' ').nth(1).unwrap().ends_with('s'), "{line}");
            let dev = format!("{:02x}:{:02x}", mapped.dev >> 20, mapped.dev & 0xf_ffff);
            assert_eq!(line.split(' ').nth(3).unwrap(), dev, "{line}");
            next = mapped.end;
        }
    }
}
