//! Which pages differ from the checkpoint's, and putting them back.
//!
//! | the checkpoint has | the process has | |
//! |---|---|---|
//! | a page of its own | the same page | nothing: it was never written |
//! | a page of its own | another, none, or the file's | copied |
//! | none (zeros, or the file's) | a page of its own | dropped |
//! | none | none | nothing |

use std::io;
use std::ops::Range;

use super::mapping::{Advice, Mapping};
use super::source::{PAGE_BYTES, Pages, len_of};

/// Bytes on their way at once (chosen: they stay in the cache).
const BUFFER_BYTES: u64 = 256 * 1024;
/// Entries read at once (chosen): 2 MB of pages each.
const ENTRIES_BYTES: u64 = 512 * PAGE_BYTES;

/// What differs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Differences {
    pub(super) copied: Vec<Range<u64>>,
    pub(super) dropped: Vec<Range<u64>>,
    /// Pages that both have and are one.
    pub(super) n_equal: u64,
}

/// Whether a mapping's pages are the template's to give. What may vanish at any time is not: random numbers must
/// not come twice.
fn is_restored(mapping: &Mapping) -> bool {
    let is_elsewhere = mapping.has(Advice::SharedWritable) || mapping.has(Advice::Special);
    let is_the_files = mapping.shared && mapping.has_file();
    !mapping.is_kernels() && !is_elsewhere && !is_the_files
}

/// Compares all pages of `mappings`.
pub(super) fn find(wanted: &Pages, present: &Pages, mappings: &[Mapping]) -> io::Result<Differences> {
    let mut differences = Differences::default();
    let spans = spans(mappings);
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return Ok(differences) };
    let whole = first.start..last.end;
    let had = within(&wanted.scan_own(whole.clone())?, &spans);
    let has = within(&present.scan_own(whole)?, &spans);
    let both = within(&had, &has);
    differences.dropped = without(&has, &had);
    differences.copied = without(&had, &has);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for range in both {
        let mut at = range.start;
        while at < range.end {
            let part = at..range.end.min(at + ENTRIES_BYTES);
            wanted.read_entries(&part, &mut left)?;
            present.read_entries(&part, &mut right)?;
            for (page, (left, right)) in (0..).zip(left.iter().zip(&right)) {
                if left.is_shared_with(*right) {
                    differences.n_equal += 1;
                } else {
                    let page = part.start + page * PAGE_BYTES;
                    push(&mut differences.copied, page..page + PAGE_BYTES);
                }
            }
            at = part.end;
        }
    }
    differences.copied.sort_unstable_by_key(|range| range.start);
    Ok(differences)
}

/// Copies ranges from one to the other.
pub(super) fn copy(from: &Pages, to: &Pages, ranges: &[Range<u64>]) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(BUFFER_BYTES).unwrap_or(0)];
    let mut batch: Vec<Range<u64>> = Vec::new();
    let mut room = BUFFER_BYTES;
    let mut flush = |batch: &mut Vec<Range<u64>>| {
        let bytes = &mut buffer[..len_of(batch)];
        from.read(batch, bytes)?;
        to.write(batch, bytes)?;
        batch.clear();
        Ok::<_, io::Error>(())
    };
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + room);
            batch.push(at..end);
            room -= end - at;
            at = end;
            if room == 0 {
                flush(&mut batch)?;
                room = BUFFER_BYTES;
            }
        }
    }
    flush(&mut batch)
}

/// The addresses of mappings that are restored, neighbours joined.
fn spans(mappings: &[Mapping]) -> Vec<Range<u64>> {
    let mut spans = Vec::new();
    for mapping in mappings.iter().filter(|mapping| is_restored(mapping)) {
        push(&mut spans, mapping.range());
    }
    spans
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// What two sorted lists have in common.
fn within(left: &[Range<u64>], right: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut common = Vec::new();
    let mut first = 0;
    for one in left {
        while right.get(first).is_some_and(|other| other.end <= one.start) {
            first += 1;
        }
        for other in right[first..].iter().take_while(|other| other.start < one.end) {
            push(&mut common, one.start.max(other.start)..one.end.min(other.end));
        }
    }
    common
}

/// What the left list has and the right one has not.
fn without(left: &[Range<u64>], right: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut first = 0;
    for one in left {
        let mut at = one.start;
        while right.get(first).is_some_and(|other| other.end <= one.start) {
            first += 1;
        }
        for other in right[first..].iter().take_while(|other| other.start < one.end) {
            if other.start > at {
                push(&mut rest, at..other.start);
            }
            at = at.max(other.end);
        }
        if at < one.end {
            push(&mut rest, at..one.end);
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((1_u64..5, 1_u64..5), 0..12).prop_map(|steps| {
            let mut at = 0;
            let range = |(gap, len): (u64, u64)| {
                let start = at + gap;
                at = start + len;
                start..at
            };
            steps.into_iter().map(range).collect()
        })
    }

    fn holds(ranges: &[Range<u64>], at: u64) -> bool {
        ranges.iter().any(|range| range.contains(&at))
    }

    proptest! {
        #[test]
        fn sets_of_ranges_behave_as_sets(left in ranges(), right in ranges()) {
            let (common, rest) = (within(&left, &right), without(&left, &right));
            for at in 0..120 {
                prop_assert_eq!(holds(&common, at), holds(&left, at) && holds(&right, at));
                prop_assert_eq!(holds(&rest, at), holds(&left, at) && !holds(&right, at));
            }
            for list in [common, rest] {
                prop_assert!(list.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
