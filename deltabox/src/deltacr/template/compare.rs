//! Which pages of two processes are one page: by the entries that the kernel shows of both.
//!
//! ```text
//! parts of 2 MB    0  1  2  3  4  5  6 ...        each is taken once, from the front
//! tracer           *     *     *                  and at the end what was taken and is not done yet, itself
//! second thread       *     *     *  (late)       nobody waits for it
//! ```
//! To read an entry the kernel looks at what it keeps of the page, which no cache holds: 0.08 us, so 10 ms for 500 MB of
//! both. Where there are many a second thread of the engine reads along, if a CPU is free; on a busy machine it comes late
//! or not at all, and has cost a wake-up.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

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
    let parts = parts(ranges);
    let done = parts.iter().map(|_| OnceLock::new()).collect();
    let job = Job { wanted: wanted.clone(), present: present.clone(), parts, next: AtomicUsize::new(0), done };
    let job = Arc::new(job);
    if job.parts.len() > FEW_PARTS {
        // One that works for another sandbox is left alone.
        let _ = second_thread().map(|thread| thread.try_send(job.clone()));
    }
    job.work()?;
    let mut found = Found::default();
    for (part, done) in job.parts.iter().zip(&job.done) {
        let one = match done.get() {
            Some(one) => one,
            // The second thread has lost its CPU in the middle of it, or failed: that is found out here too.
            None => &look(wanted, present, part)?,
        };
        found.n_equal += one.n_equal;
        one.written.iter().for_each(|range| push(&mut found.written, range.clone()));
        one.guarded.iter().for_each(|range| push(&mut found.guarded, range.clone()));
        one.bared.iter().for_each(|range| push(&mut found.bared, range.clone()));
    }
    Ok(found)
}

struct Job {
    wanted: Arc<Pages>,
    present: Arc<Pages>,
    parts: Vec<Range<u64>>,
    next: AtomicUsize,
    done: Vec<OnceLock<Found>>,
}

impl Job {
    /// Takes parts until none is left.
    fn work(&self) -> io::Result<()> {
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let (Some(part), Some(done)) = (self.parts.get(at), self.done.get(at)) else { return Ok(()) };
            // Set already only if the other one was given up.
            let _ = done.set(look(&self.wanted, &self.present, part)?);
        }
    }
}

/// The engine's second thread for this; it lives as long as the engine.
fn second_thread() -> Option<&'static SyncSender<Arc<Job>>> {
    static THREAD: OnceLock<Option<SyncSender<Arc<Job>>>> = OnceLock::new();
    let start = || {
        let (sender, jobs) = sync_channel::<Arc<Job>>(0);
        let work = move || {
            // It was started by a tracer, which is kept on one CPU.
            if let Ok(cpus) = sched_getaffinity(Pid::this()) {
                let _ = sched_setaffinity(Pid::from_raw(0), &cpus);
            }
            // A failure is the tracer's to find.
            jobs.into_iter().for_each(|job| drop(job.work()));
        };
        std::thread::Builder::new().name("compare".to_owned()).spawn(work).ok().map(|_| sender)
    };
    THREAD.get_or_init(start).as_ref()
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

/// Adds a range to others that it comes after.
pub(super) fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
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
