//! Probes of what finds dirty pages: PAGEMAP_SCAN and userfaultfd in asynchronous write-protect mode.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use super::Ground;
use super::probe::{Outcome, ProbeChild, at, unless};
use crate::sys::memory::{
    PageRegion, Pages, Search, UFFD_USER_MODE_ONLY, page_is, pagemap_scan, process_madvise_cold, scan_flag, uffd_api,
    uffd_feature, uffd_register_wp, userfaultfd,
};
use crate::sys::process::CloneRequest;
use crate::sys::steps::Step;

const N_PAGES: usize = 4;

fn page_size_bytes() -> usize {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| usize::try_from(size).ok()).unwrap_or(4096)
}

/// The bytes `first..first + n` pages into `pages`.
fn region(pages: &Pages, first: u64, n: u64, categories: u64) -> PageRegion {
    let (start, size) = (pages.range().start, page_size_bytes() as u64);
    PageRegion { start: start + first * size, end: start + (first + n) * size, categories }
}

fn scan(pages: &Pages, all: u64, flags: u64) -> io::Result<Vec<PageRegion>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut regions = [PageRegion::default(); N_PAGES];
    let search = Search { all, told: all, flags, ..Search::default() };
    let (n, _) = pagemap_scan(pagemap.as_fd(), pages.range(), search, &mut regions)?;
    Ok(regions[..n].to_vec())
}

/// Of four pages the one that was touched is found.
pub(super) fn scan_present(_: &Ground) -> Outcome {
    let size = page_size_bytes();
    let pages = Pages::map(N_PAGES * size).map_err(at("mmap"))?;
    pages.store(2 * size, 1).map_err(at("store"))?;
    let found = scan(&pages, page_is::PRESENT, 0).map_err(at("PAGEMAP_SCAN"))?;
    unless(found == [region(&pages, 2, 1, page_is::PRESENT)], "PAGEMAP_SCAN did not find the one page present")?;
    Ok("the one page present of four was found".to_owned())
}

/// Four protected pages, one write: the write goes through, exactly that page is reported.
pub(super) fn async_write_protect(_: &Ground) -> Outcome {
    let size = page_size_bytes();
    let pages = Pages::map(N_PAGES * size).map_err(at("mmap"))?;
    for page in 0..N_PAGES {
        pages.store(page * size, 1).map_err(at("store"))?;
    }
    let uffd = userfaultfd(UFFD_USER_MODE_ONLY).map_err(at("userfaultfd"))?;
    uffd_api(uffd.as_fd(), uffd_feature::WATCHING).map_err(at("UFFDIO_API with WP_ASYNC"))?;
    uffd_register_wp(uffd.as_fd(), pages.range()).map_err(at("UFFDIO_REGISTER for write protection"))?;
    let arm = scan_flag::WP_MATCHING | scan_flag::CHECK_WPASYNC;
    scan(&pages, page_is::WRITTEN, arm).map_err(at("PAGEMAP_SCAN that protects"))?;
    let clean = scan(&pages, page_is::WRITTEN, 0).map_err(at("PAGEMAP_SCAN"))?;
    unless(clean.is_empty(), "pages still count as written after they were protected")?;
    pages.store(size, 2).map_err(at("store"))?;
    let written = scan(&pages, page_is::WRITTEN, 0).map_err(at("PAGEMAP_SCAN"))?;
    unless(written == [region(&pages, 1, 1, page_is::WRITTEN)], "the written page was not reported, or others were")?;
    Ok("the one page written of four was reported".to_owned())
}

/// Advice on another process's memory is taken.
pub(super) fn advise_other(_: &Ground) -> Outcome {
    let size = page_size_bytes();
    let pages = Pages::map(N_PAGES * size).map_err(at("mmap"))?;
    // The child has the same mapping at the same place.
    let child = ProbeChild::start(CloneRequest::default(), &[Step::Wait]).map_err(at("clone3"))?;
    let advised = process_madvise_cold(child.pidfd(), pages.range()).map_err(at("process_madvise of a child"))?;
    unless(advised == (N_PAGES * size) as u64, "process_madvise took only a part of the range")?;
    Ok("a child's pages were advised".to_owned())
}
