//! Which pages of two processes are one page: by the entries that the kernel shows of both.
//!
//! To read an entry the kernel looks at what it keeps of the page, which no cache holds: 0.08 us, so 10 ms for 500 MB of
//! both. Where there are many a second thread reads along.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::ranges::push;
use super::second::share;
use super::source::{PAGE_BYTES, Pages};

/// Pages that are compared at once (chosen): 2 MB, a table of the kernel's.
const PART_BYTES: u64 = 512 * PAGE_BYTES;
/// With fewer parts the second thread is not woken (chosen: 8 MB take 0.3 ms, a wake-up 0.1).
const FEW_PARTS: usize = 4;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Pages that are not one.
    pub(super) written: Vec<Range<u64>>,
    /// Guard pages of the template alone.
    pub(super) guarded: Vec<Range<u64>>,
    /// Guard pages of the process alone.
    pub(super) bared: Vec<Range<u64>>,
    /// How many are.
    pub(super) n_equal: u64,
}

/// Compares all pages of `ranges`.
pub(super) fn compare(wanted: &Arc<Pages>, present: &Arc<Pages>, ranges: &[Range<u64>]) -> io::Result<Found> {
    let (wanted, present) = (wanted.clone(), present.clone());
    let mut found = Found::default();
    let take = |_: &Range<u64>, one: Found| {
        found.n_equal += one.n_equal;
        one.written.into_iter().for_each(|range| push(&mut found.written, range));
        one.guarded.into_iter().for_each(|range| push(&mut found.guarded, range));
        one.bared.into_iter().for_each(|range| push(&mut found.bared, range));
        Ok(())
    };
    share(parts(ranges), FEW_PARTS, move |part: &Range<u64>| look(&wanted, &present, part), take)?;
    Ok(found)
}

/// Compares the pages of one part.
pub(super) fn look(wanted: &Pages, present: &Pages, part: &Range<u64>) -> io::Result<Found> {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    wanted.read_entries(part, &mut left)?;
    present.read_entries(part, &mut right)?;
    let mut found = Found::default();
    for (page, (left, right)) in (0..).zip(left.iter().zip(&right)) {
        let page = part.start + page * PAGE_BYTES;
        let page = page..page + PAGE_BYTES;
        match (left.is_guard(), right.is_guard()) {
            (true, true) => found.n_equal += 1,
            (true, false) => push(&mut found.guarded, page),
            (false, false) if left.is_shared_with(*right) => found.n_equal += 1,
            (false, is_guard) => {
                if is_guard {
                    push(&mut found.bared, page.clone());
                }
                push(&mut found.written, page);
            }
        }
    }
    Ok(found)
}

/// The guard pages within `ranges`.
pub(super) fn guards(pages: &Pages, ranges: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    let (mut guards, mut entries) = (Vec::new(), Vec::new());
    for part in parts(ranges) {
        pages.read_entries(&part, &mut entries)?;
        for (page, _) in (0..).zip(&entries).filter(|(_, entry)| entry.is_guard()) {
            let page = part.start + page * PAGE_BYTES;
            push(&mut guards, page..page + PAGE_BYTES);
        }
    }
    Ok(guards)
}

/// All of `ranges`, in pieces.
pub(super) fn parts(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + PART_BYTES);
            parts.push(at..end);
            at = end;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_of_the_ranges() {
        let ranges = [0x1000..0x3000, 0x10_0000..0x10_0000 + 2 * PART_BYTES + PAGE_BYTES];
        let parts = parts(&ranges);
        assert_eq!(parts.len(), 4);
        let mut joined = Vec::new();
        parts.into_iter().for_each(|part| push(&mut joined, part));
        assert_eq!(joined, ranges);
    }
}
