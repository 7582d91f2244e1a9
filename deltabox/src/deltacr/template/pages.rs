//! Which pages differ from the checkpoint's, and putting them back.
//!
//! | the checkpoint has | the process has | |
//! |---|---|---|
//! | a page of its own | the same page | nothing: it was never written |
//! | a page of its own | another, none, or the file's | copied |
//! | none (zeros, or the file's) | a page of its own | dropped |
//! | none | none | nothing |
//! | a guard page (MADV_GUARD_INSTALL) | none | made one |
//! | none | a guard page | none any more, then as above |

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::compare::{compare, guards, look, parts, push};
use super::mapping::{Advice, Mapping};
use super::source::{PAGE_BYTES, Pages, Source, len_of};

/// Bytes on their way at once (chosen: they stay in the cache).
const BUFFER_BYTES: u64 = 256 * 1024;

/// As much is looked at twice rather than asked about in two calls (chosen: 16 pages cost a microsecond, as a call does).
const TAKEN_ALONG_BYTES: u64 = 16 * PAGE_BYTES;

/// What differs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Differences {
    pub(super) copied: Vec<Range<u64>>,
    pub(super) dropped: Vec<Range<u64>>,
    /// Are to be guard pages.
    pub(super) guarded: Vec<Range<u64>>,
    /// Are guard pages, and were none.
    pub(super) bared: Vec<Range<u64>>,
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
///
/// The entries of those are read on both sides; where there are none, only what the process has of its own is looked
/// for. To look for it everywhere took two thirds of the time: either way the kernel touches what it keeps of each page.
pub(super) fn find(source: &Source, present: &Arc<Pages>, mappings: &[Mapping]) -> io::Result<Differences> {
    let mut differences = Differences::default();
    let spans = spans(mappings);
    let had = within(&own(source, &spans)?, &spans);
    let found = compare(source.pages(), present, &had)?;
    for window in windows(&spans, &had) {
        differences.dropped.extend(without(&present.scan_own(window)?, &had));
    }
    differences.bared = found.bared;
    differences.bared.extend(guards(present, &differences.dropped)?);
    (differences.copied, differences.guarded, differences.n_equal) = (found.written, found.guarded, found.n_equal);
    Ok(differences)
}

/// The pages that both have and that are not one, if they have the same, and at most `most` bytes of them are not one.
pub(super) fn find_few(
    source: &Source,
    present: &Pages,
    mappings: &[Mapping],
    most: usize,
) -> io::Result<Option<Vec<Range<u64>>>> {
    let spans = spans(mappings);
    let had = within(&own(source, &spans)?, &spans);
    let mut written = Vec::new();
    for part in parts(&had) {
        let found = look(source.pages(), present, &part)?;
        written.extend(found.written);
        if len_of(&written) > most || !found.guarded.is_empty() || !found.bared.is_empty() {
            return Ok(None);
        }
    }
    for span in &spans {
        let own = present.scan_own(span.clone())?;
        if !without(&own, &had).is_empty() || !without(&within(&had, std::slice::from_ref(span)), &own).is_empty() {
            return Ok(None);
        }
    }
    Ok(Some(written))
}

/// Looks ahead which pages the checkpoint has of its own: [`find`] need not.
pub(super) fn look_ahead(source: &Source, mappings: &[Mapping]) -> io::Result<()> {
    own(source, &spans(mappings)).map(drop)
}

fn own(source: &Source, spans: &[Range<u64>]) -> io::Result<Arc<[Range<u64>]>> {
    match (spans.first(), spans.last()) {
        (Some(first), Some(last)) => source.own(first.start..last.end),
        _ => Ok(Arc::default()),
    }
}

/// Ranges within `spans` that together hold all of it that is not in `had`: one call for each, so that a little of what is
/// in `had` is taken along.
fn windows(spans: &[Range<u64>], had: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut windows: Vec<Range<u64>> = Vec::new();
    let mut span = spans.iter();
    let mut span_end = 0;
    for gap in without(spans, had) {
        match windows.last_mut() {
            Some(last) if gap.end <= span_end && gap.start - last.end <= TAKEN_ALONG_BYTES => last.end = gap.end,
            _ => windows.push(gap.clone()),
        }
        while span_end < gap.end {
            let Some(next) = span.next() else { break };
            span_end = next.end;
        }
    }
    windows
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
            let windows = windows(&left, &right);
            for at in 0..120 {
                let is_needed = holds(&left, at) && !holds(&right, at);
                prop_assert!(!is_needed || holds(&windows, at));
                prop_assert!(!holds(&windows, at) || holds(&left, at));
            }
            for list in [common, rest] {
                prop_assert!(list.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
