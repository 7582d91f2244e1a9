//! Where the pages of a checkpoint live, and which of a process's pages are its own.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libc::pid_t;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::compare::guards;
use super::ranges::{len_of, push, union, without};
use super::remove::Template;
use super::watch::Generation;
use crate::sys::memory::{PageRegion, Search, pagemap_scan};

pub(super) const PAGE_BYTES: u64 = 4096;
/// Parts of one transfer (the kernel's UIO_MAXIOV).
const N_PARTS: usize = 1024;
/// Regions told at once (chosen).
const N_REGIONS: usize = 1024;

/// The pages of a checkpoint: those of its template.
#[derive(Debug)]
pub struct Source {
    pages: Arc<Pages>,
    learnt: Arc<Learnt>,
}

/// What was found out about a template. It never runs, so that does not change.
#[derive(Debug, Default)]
pub(super) struct Learnt {
    /// Which pages are its own, once somebody has looked.
    own: Mutex<Option<Looked>>,
    inherited: OnceLock<Vec<Range<u64>>>,
    guards: OnceLock<Vec<Range<u64>>>,
    generation: OnceLock<Arc<Generation>>,
}

/// Addresses that were looked at, and what of them is its own.
type Looked = (Range<u64>, Arc<[Range<u64>]>);

impl Source {
    /// The pages of a template.
    ///
    /// # Errors
    /// It is gone.
    pub fn of(template: &Template) -> io::Result<Self> {
        let (pages, learnt) = template.pages()?;
        Ok(Self { pages: Arc::new(pages), learnt })
    }

    /// The process that has them.
    pub(super) fn pid(&self) -> pid_t {
        self.pages.pid
    }

    pub(super) fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    /// Ranges of pages within `whole` that are its own, as [`Pages::scan_own`] has them; only the first time costs
    /// anything (0.1 us for each page that is not inherited).
    pub(super) fn own(&self, whole: Range<u64>) -> io::Result<Arc<[Range<u64>]>> {
        let mut looked = self.learnt.own.lock().unwrap_or_else(PoisonError::into_inner);
        match &*looked {
            Some((at, own)) if *at == whole => Ok(own.clone()),
            _ => {
                let own: Arc<[_]> = self.look(&whole)?.into();
                *looked = Some((whole, own.clone()));
                Ok(own)
            }
        }
    }

    fn look(&self, whole: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let inherited = self.learnt.inherited.get().map_or(&[][..], |own| own);
        let mut own = inherited.to_vec();
        for rest in without(std::slice::from_ref(whole), inherited) {
            own.extend(self.pages.scan_own(rest)?);
        }
        Ok(union(&own, &[]))
    }

    /// What is known to be its own, before anybody looks: pages that were another's, and that its process had not written
    /// since when this one was made of it.
    pub(super) fn inherit(&self, own: Vec<Range<u64>>) {
        // Whoever came first knew as much.
        let _ = self.learnt.inherited.set(own);
    }

    /// Guard pages among its own (`own`), as [`guards`] has them; only the first time costs anything (3 ns for each page).
    pub(super) fn guards(&self, own: &[Range<u64>]) -> io::Result<&[Range<u64>]> {
        if let Some(known) = self.learnt.guards.get() {
            return Ok(known);
        }
        let mut absent = Vec::new();
        if let (Some(first), Some(last)) = (own.first(), own.last()) {
            absent = self.pages.scan(first.start..last.end, Search::ABSENT)?;
        }
        let found = guards(&self.pages, &absent)?;
        Ok(self.learnt.guards.get_or_init(|| found))
    }

    /// What its pages have in common with those of other templates.
    pub(super) fn generation(&self) -> Arc<Generation> {
        self.begin_generation(Generation::default())
    }

    /// The same; it is `next` if nobody has said yet.
    pub(super) fn begin_generation(&self, next: Generation) -> Arc<Generation> {
        self.learnt.generation.get_or_init(|| Arc::new(next)).clone()
    }
}

/// The pages of a process that does not run.
#[derive(Debug)]
pub(super) struct Pages {
    pid: pid_t,
    pagemap: File,
    memory: File,
}

/// An entry of `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    /// Whether both name the same page of memory or swap, so that nobody has written to it since it was shared.
    ///
    /// A page that only one process maps (bit 56) is not shared with the other: that both were moved so that one took
    /// the other's place between two reads is ruled out by it.
    pub(super) fn is_shared_with(self, other: Self) -> bool {
        const EXCLUSIVE: u64 = 1 << 56;
        const WHERE: u64 = (3 << 62) | ((1 << 55) - 1);
        const FRAME: u64 = (1 << 55) - 1;
        (self.0 | other.0) & EXCLUSIVE == 0 && self.0 & WHERE == other.0 & WHERE && self.0 & FRAME != 0
    }

    /// Whether whoever touches it gets SIGSEGV (MADV_GUARD_INSTALL; told since Linux 6.15).
    pub(super) fn is_guard(self) -> bool {
        self.0 & 1 << 58 != 0
    }
}

impl Pages {
    pub(super) fn of(pid: pid_t) -> io::Result<Self> {
        Ok(Self {
            pid,
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            memory: File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?,
        })
    }

    /// Ranges of pages within `range` that are the process's own: in memory or swapped, not of a file.
    pub(super) fn scan_own(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.scan(range, Search::OWN)
    }

    /// Ranges of pages within `range` that are what is searched for.
    pub(super) fn scan(&self, range: Range<u64>, search: Search) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        self.scan_regions(range, search, |region| push(&mut found, region.start..region.end))?;
        Ok(found)
    }

    /// The same with what each region tells.
    pub(super) fn scan_regions(
        &self,
        range: Range<u64>,
        search: Search,
        mut take: impl FnMut(PageRegion),
    ) -> io::Result<()> {
        let mut regions = [PageRegion::default(); N_REGIONS];
        let mut at = range.start;
        while at < range.end {
            let (n, reached) = pagemap_scan(self.pagemap.as_fd(), at..range.end, search, &mut regions)?;
            regions[..n].iter().for_each(|region| take(*region));
            if reached <= at {
                return Err(io::ErrorKind::InvalidData.into());
            }
            at = reached;
        }
        Ok(())
    }

    /// The entries of a range's pages.
    pub(super) fn read_entries(&self, range: &Range<u64>, entries: &mut Vec<Entry>) -> io::Result<()> {
        let n_pages = usize::try_from((range.end - range.start) / PAGE_BYTES).map_err(io::Error::other)?;
        let mut bytes = vec![0; n_pages * 8];
        self.pagemap.read_exact_at(&mut bytes, range.start / PAGE_BYTES * 8)?;
        entries.clear();
        entries.extend(bytes.chunks_exact(8).map(|entry| Entry(entry.try_into().map_or(0, u64::from_le_bytes))));
        Ok(())
    }

    /// Reads ranges one after the other into `bytes`, whatever their protection.
    pub(super) fn read(&self, ranges: &[Range<u64>], bytes: &mut [u8]) -> io::Result<()> {
        let mut rest = &mut *bytes;
        for ranges in ranges.chunks(N_PARTS) {
            let (now, later) = rest.split_at_mut(len_of(ranges));
            rest = later;
            let n = process_vm_readv(Pid::from_raw(self.pid), &mut [IoSliceMut::new(now)], &parts(ranges));
            if n == Ok(now.len()) {
                continue;
            }
            let mut at = 0;
            for range in ranges {
                let end = at + len_of(std::slice::from_ref(range));
                self.memory.read_exact_at(&mut now[at..end], range.start)?;
                at = end;
            }
        }
        Ok(())
    }

    /// Writes to ranges one after the other, whatever their protection.
    pub(super) fn write(&self, ranges: &[Range<u64>], bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for ranges in ranges.chunks(N_PARTS) {
            let (now, later) = rest.split_at(len_of(ranges));
            rest = later;
            let n = process_vm_writev(Pid::from_raw(self.pid), &[IoSlice::new(now)], &parts(ranges));
            if n == Ok(now.len()) {
                continue;
            }
            let mut at = 0;
            for range in ranges {
                let end = at + len_of(std::slice::from_ref(range));
                self.memory.write_all_at(&now[at..end], range.start)?;
                at = end;
            }
        }
        Ok(())
    }

    /// Makes a stack reach down to `at`.
    pub(super) fn grow_stack(&self, at: u64) -> io::Result<()> {
        self.memory.write_all_at(&[0], at)
    }
}

fn parts(ranges: &[Range<u64>]) -> Vec<RemoteIoVec> {
    let part = |range: &Range<u64>| RemoteIoVec {
        base: usize::try_from(range.start).unwrap_or(usize::MAX),
        len: usize::try_from(range.end - range.start).unwrap_or(0),
    };
    ranges.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_equal_only_if_they_are_one() {
        let present = |frame: u64| Entry(1 << 63 | frame);
        let swapped = |slot: u64| Entry(1 << 62 | slot);
        assert!(present(7).is_shared_with(present(7)));
        assert!(Entry(present(7).0 | 1 << 55).is_shared_with(present(7)), "soft-dirty says nothing");
        assert!(!present(7).is_shared_with(present(8)));
        assert!(swapped(9).is_shared_with(swapped(9)));
        assert!(!swapped(7).is_shared_with(present(7)));
        assert!(!Entry(present(7).0 | 1 << 56).is_shared_with(present(7)), "nobody else maps it");
        assert!(!present(0).is_shared_with(present(0)), "frame numbers are hidden");
    }
}
