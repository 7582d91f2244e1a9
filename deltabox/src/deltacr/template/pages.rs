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

use super::compare::{compare, guards, look, parts};
use super::mapping::{Advice, Mapping};
use super::ranges::{len_of, push, union, within, without};
use super::second::share;
use super::source::{PAGE_BYTES, Pages, Source};
use super::watch::Known;

/// Bytes on their way at once (chosen: they stay in the cache).
const BUFFER_BYTES: u64 = 128 * 1024;
/// With fewer batches the second thread is not woken (chosen: a page takes 2.4 us, a wake-up 100).
const FEW_BATCHES: usize = 2;

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

/// Finds what differs in `mappings`, of which something may be `known`.
///
/// Otherwise the entries of the template's own pages are read on both sides; where there are none, only what the process
/// has of its own is looked for. To look for it everywhere took two thirds of the time: either way the kernel touches what
/// it keeps of each page.
pub(super) fn find(
    source: &Source,
    present: &Arc<Pages>,
    mappings: &[Mapping],
    known: Option<&Known>,
) -> io::Result<Differences> {
    let spans = spans(mappings);
    let had = within(&own(source, &spans)?, &spans);
    let (watched, equal) = known.map_or((&[][..], &[][..]), |known| (&known.spans, &known.equal));
    let found = compare(source.pages(), present, &without(&had, watched))?;
    let watched = within(&had, watched);
    let mut dropped = Vec::new();
    for window in windows(&spans, &had) {
        dropped.extend(without(&present.scan_own(window)?, &had));
    }
    let suspect = without(&watched, equal);
    let no_guards = Vec::new();
    let is = known.map_or(&no_guards, |known| &known.guards);
    let was = if suspect.is_empty() { Vec::new() } else { within(&suspect, source.guards(&had)?) };
    let mut bared = union(&found.bared, &within(&suspect, &without(is, &was)));
    bared.extend(guards(present, &dropped)?);
    Ok(Differences {
        copied: union(&found.written, &without(&suspect, &was)),
        dropped,
        guarded: union(&found.guarded, &without(&was, is)),
        bared,
        n_equal: found.n_equal + n_pages(&within(&watched, equal)),
    })
}

/// Pages in ranges.
pub(super) fn n_pages(ranges: &[Range<u64>]) -> u64 {
    len_of(ranges) as u64 / PAGE_BYTES
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

/// Looks which pages the checkpoint has of its own; [`find`] need not then.
pub(super) fn look_ahead(source: &Source, mappings: &[Mapping]) -> io::Result<Arc<[Range<u64>]>> {
    own(source, &spans(mappings))
}

fn own(source: &Source, spans: &[Range<u64>]) -> io::Result<Arc<[Range<u64>]>> {
    match (spans.first(), spans.last()) {
        (Some(first), Some(last)) => source.own(first.start..last.end),
        _ => Ok(Arc::default()),
    }
}

/// Ranges within `spans` that together hold all of it that is not in `had`: one call for each, so that a little of what is
/// in `had` is taken along.
pub(super) fn windows(spans: &[Range<u64>], had: &[Range<u64>]) -> Vec<Range<u64>> {
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
pub(super) fn copy(from: &Arc<Pages>, to: &Pages, ranges: &[Range<u64>]) -> io::Result<()> {
    let from = from.clone();
    let read = move |batch: &Vec<Range<u64>>| {
        let mut bytes = vec![0; len_of(batch)];
        from.read(batch, &mut bytes).map(|()| bytes)
    };
    share(batches(ranges), FEW_BATCHES, read, |batch, bytes| to.write(batch, &bytes))
}

/// All of `ranges`, so much at a time as is on its way at once.
fn batches(ranges: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let mut batches = vec![Vec::new()];
    let mut room = BUFFER_BYTES;
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            if room == 0 {
                batches.push(Vec::new());
                room = BUFFER_BYTES;
            }
            let end = range.end.min(at + room);
            batches.last_mut().into_iter().for_each(|batch| batch.push(at..end));
            room -= end - at;
            at = end;
        }
    }
    batches
}

/// The addresses of mappings that are restored, neighbours joined.
fn spans(mappings: &[Mapping]) -> Vec<Range<u64>> {
    let mut spans = Vec::new();
    for mapping in mappings.iter().filter(|mapping| is_restored(mapping)) {
        push(&mut spans, mapping.range());
    }
    spans
}
