//! Memory: own pages, PAGEMAP_SCAN, userfaultfd write protection, process_madvise.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{check, check_fd};

/// Private anonymous pages of this process, zeroed, unmapped on drop.
#[derive(Debug)]
pub struct Pages {
    start: *mut u8,
    len_bytes: usize,
}

impl Pages {
    /// Maps `len_bytes` (rounded up to pages by the kernel), readable and writable.
    pub fn map(len_bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at a place the kernel chooses touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len_bytes })
    }

    /// Stores `value` at `offset`, out of range is EFAULT.
    pub fn store(&self, offset: usize, value: u8) -> io::Result<()> {
        if offset >= self.len_bytes {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        // SAFETY: in range of the mapping, as just checked.
        let place = unsafe { self.start.add(offset) };
        // SAFETY: inside our own mapping, which is writable and has no references into it; volatile, so it happens.
        unsafe { place.write_volatile(value) }
        Ok(())
    }

    /// The addresses.
    pub fn range(&self) -> Range<u64> {
        let start = self.start as u64;
        start..start + self.len_bytes as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference exists.
        unsafe { libc::munmap(self.start.cast(), self.len_bytes) };
    }
}

/// Page categories of PAGEMAP_SCAN (include/uapi/linux/fs.h, since Linux 6.7).
pub mod page_is {
    /// Its range is registered for asynchronous write protection.
    pub const WPALLOWED: u64 = 1 << 0;
    /// Written since it was last write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// Of a file, or of shared memory.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In the swap.
    pub const SWAPPED: u64 = 1 << 4;
    /// The one page of zeros that all share.
    pub const ZERO: u64 = 1 << 5;
}

/// What PAGEMAP_SCAN also does.
pub mod scan_flag {
    /// Write-protects again the pages that matched.
    pub const WP_MATCHING: u64 = 1 << 0;
    /// Refuses (EPERM) ranges that are not registered for asynchronous write protection.
    pub const CHECK_WPASYNC: u64 = 1 << 1;
}

/// Neighbouring pages of the same categories (the kernel's `struct page_region`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Those categories of [`page_is`] that were asked for.
    pub categories: u64,
}

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR(group, number, T)` of include/uapi/asm-generic/ioctl.h.
const fn iowr<T>(group: u8, number: u8) -> u64 {
    (3 << 30) | ((size_of::<T>() as u64) << 16) | ((group as u64) << 8) | number as u64
}

/// What PAGEMAP_SCAN is to look for, in terms of [`page_is`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Search {
    /// Categories of which the opposite counts, in what follows.
    pub inverted: u64,
    /// Categories that a page must be in.
    pub all: u64,
    /// Categories of which it must be in one, if there are any.
    pub any: u64,
    /// Categories that regions are to tell of their pages.
    pub told: u64,
    /// What to do besides ([`scan_flag`]).
    pub flags: u64,
}

impl Search {
    /// Pages of a process's own: in memory or swapped, neither of a file nor the page of zeros.
    pub const OWN: Self = Self {
        inverted: page_is::FILE | page_is::ZERO,
        all: page_is::FILE | page_is::ZERO,
        any: page_is::PRESENT | page_is::SWAPPED,
        told: 0,
        flags: 0,
    };
    /// Pages that were protected and have not been written since. (Whether they are of a file is not asked: for that the
    /// kernel touches what it keeps of each page, 0.08 us.)
    pub const UNWRITTEN: Self = Self {
        inverted: page_is::WRITTEN,
        all: page_is::WPALLOWED | page_is::WRITTEN,
        any: page_is::PRESENT,
        told: 0,
        flags: 0,
    };
    /// Pages that are in the swap, and guard pages.
    pub const ABSENT: Self = Self { inverted: 0, all: page_is::SWAPPED, any: 0, told: 0, flags: 0 };
    /// Of all that is mapped what is not certainly so: what was written, and where there is no page. Where most was not
    /// written that costs a quarter of finding the opposite (3 ns for each page): the kernel puts out little.
    /// Of what is in the swap, or a guard page, regions tell [`page_is::SWAPPED`].
    pub const MAYBE_WRITTEN: Self = Self {
        inverted: page_is::PRESENT,
        all: 0,
        any: page_is::WRITTEN | page_is::PRESENT,
        told: page_is::SWAPPED,
        flags: 0,
    };
    /// Pages in memory that are not protected (any more); they are from now on.
    pub const PROTECT: Self = Self {
        inverted: 0,
        all: page_is::WPALLOWED | page_is::WRITTEN,
        any: page_is::PRESENT,
        told: 0,
        flags: scan_flag::WP_MATCHING,
    };
    /// Addresses that are registered for asynchronous write protection, whether there are pages or not.
    pub const WATCHED: Self = Self { inverted: 0, all: page_is::WPALLOWED, any: 0, told: 0, flags: 0 };
}

/// Finds pages in `range` of the process behind `pagemap`. Returns how many of `regions` were filled, and how far was
/// looked.
pub fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    range: Range<u64>,
    search: Search,
    regions: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let Search { inverted, all, any, told, flags } = search;
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags,
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: inverted,
        category_mask: all,
        category_anyof_mask: any,
        return_mask: told,
    };
    let request = iowr::<ScanArg>(b'f', 16);
    // SAFETY: `arg` is a pm_scan_arg that tells its own size, and `regions` is as long as told.
    let n = check(unsafe { libc::ioctl(pagemap.as_raw_fd(), request, &raw mut arg) }.into())?;
    let n = usize::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    // With room left it went to the end. Then `walk_end` is where a buffer of the kernel's was full last, if one was.
    let reached = match regions.get(..n).and_then(<[_]>::last) {
        Some(last) if n == regions.len() => arg.walk_end.max(last.end),
        _ => range.end,
    };
    Ok((n, reached))
}

/// Features of userfaultfd (include/uapi/linux/userfaultfd.h).
pub mod uffd_feature {
    /// Write protection of anonymous pages (since Linux 5.7).
    pub const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// Pages that are not there can be protected too (since Linux 6.4).
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// The kernel itself lifts the protection at a write and remembers it (since Linux 6.7).
    pub const WP_ASYNC: u64 = 1 << 15;
    /// What it takes to watch a process's writes without ever halting it.
    pub const WATCHING: u64 = PAGEFAULT_FLAG_WP | WP_UNPOPULATED | WP_ASYNC;
}

/// Flag of userfaultfd(2) that everybody may use: nothing is told of the kernel's own accesses, which asynchronous write
/// protection does not need (since Linux 5.11).
pub const UFFD_USER_MODE_ONLY: i32 = 1;

/// A userfaultfd of this process; `flags`: [`UFFD_USER_MODE_ONLY`] or none.
pub fn userfaultfd(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | flags) })
}

/// Agrees on `features` ([`uffd_feature`]): EINVAL if the kernel lacks one.
pub fn uffd_api(uffd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    let mut api = Api { api: 0xAA, features, ioctls: 0 };
    // SAFETY: `api` is a uffdio_api, which the request's size says.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), iowr::<Api>(0xAA, 0x3F), &raw mut api) }.into()).map(drop)
}

/// Registers `range` for write protection.
pub fn uffd_register_wp(uffd: BorrowedFd<'_>, range: Range<u64>) -> io::Result<()> {
    #[repr(C)]
    struct Register {
        start: u64,
        len: u64,
        mode: u64,
        ioctls: u64,
    }
    const MODE_WP: u64 = 1 << 1;
    let mut register = Register { start: range.start, len: range.end - range.start, mode: MODE_WP, ioctls: 0 };
    // SAFETY: `register` is a uffdio_register, which the request's size says; only the kernel's bookkeeping changes.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), iowr::<Register>(0xAA, 0x00), &raw mut register) }.into()).map(drop)
}

/// Tells the kernel that the process behind `pidfd` will not need `range` soon (`MADV_COLD`). Returns the bytes advised.
pub fn process_madvise_cold(pidfd: BorrowedFd<'_>, range: Range<u64>) -> io::Result<u64> {
    let part = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(usize::try_from(range.start).map_err(io::Error::other)?),
        iov_len: usize::try_from(range.end - range.start).map_err(io::Error::other)?,
    };
    // SAFETY: one valid iovec; the kernel checks its addresses, and MADV_COLD alters no content.
    let n = check(unsafe {
        libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), &raw const part, 1, libc::MADV_COLD, 0)
    })?;
    u64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn scans_of_any_length_go_on_where_the_last_ended() {
        const N_REGIONS: u64 = 1500;
        const PAGE_BYTES: u64 = 4096;
        let pages = Pages::map(2 * 4096 * 1500).expect("room");
        for at in 0..1500 {
            pages.store(2 * 4096 * at, 1).expect("store");
        }
        let pagemap = File::open("/proc/self/pagemap").expect("pagemap");
        for room in [1, 511, 512, 513, 1024, 1499, 1500, 1501, 4000] {
            let (mut found, mut at) = (Vec::new(), pages.range().start);
            let mut regions = vec![PageRegion::default(); room];
            while at < pages.range().end {
                let (n, reached) =
                    pagemap_scan(pagemap.as_fd(), at..pages.range().end, Search::OWN, &mut regions).expect("a scan");
                found.extend(regions[..n].iter().map(|region| region.start..region.end));
                assert!(reached > at, "no way forward with room for {room}");
                at = reached;
            }
            let every_second = (0..N_REGIONS).map(|at| pages.range().start + 2 * PAGE_BYTES * at);
            assert!(found.into_iter().eq(every_second.map(|start| start..start + PAGE_BYTES)), "room for {room}");
        }
    }
}
