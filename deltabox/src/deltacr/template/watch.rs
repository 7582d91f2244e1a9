//! Watching what a big process writes, so that a return need not compare all its pages with the template's.
//!
//! ```text
//!              template T1 made            T2 made                     back to T1
//! process  ----|stop|=======w=====w=======|stop|=====w=========w======|stop|---
//!                    ^ protect             ^  protect again            ^ unwritten since T2, and alike in T1 and T2: equal
//!                      compare what was      note what T1 and T2         the rest is copied, all is protected again
//!                      written before        have alike
//! ```
//! The kernel protects pages for us (userfaultfd, WP_ASYNC), lifts that by itself at a write and remembers it: the process
//! is never halted for it, and where a first write copies the page for the template's sake it costs nothing more. The
//! descriptor belongs to the memory, not to a number: it is made by the helper that makes the template, in a table of its
//! own, so that nothing is left in the process whenever the engine dies; with it goes the protection.
//!
//! What is known: **a page that is protected and not doubtful has the content of the template's page.** It is protected first
//! and compared then. Memory that is unmapped, mapped anew, moved or dropped is not protected any more. Not seen is a device
//! that writes to pages pinned before: those are copied by the fork, found different, and doubtful for as long as they
//! are protected.
//!
//! The kernel joins no new mapping to one that is watched. So only big ones are, and each time only those that are big beside
//! what is watched already: their number grows with the logarithm of the memory.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use libc::pid_t;

use super::compare::{compare, guards};
use super::mapping::{Advice, Mapping};
use super::memory::Memory;
use super::pages::look_ahead;
use super::ranges::{len_of, push, union, within, without};
use super::remove::Template;
use super::source::{PAGE_BYTES, Pages, Source};
use crate::sys::blob::AREA_SLOTS;
use crate::sys::memory::{Search, UFFD_USER_MODE_ONLY, page_is, uffd_api, uffd_feature, uffd_register_wp, userfaultfd};

/// Processes with less memory of their own are not watched (chosen: to compare it takes 0.3 ms).
const LEAST_BYTES: u64 = 8 << 20;
/// Nor mappings with less (chosen: as many more are compared in 0.15 ms), or less than this part of what is watched.
const LEAST_MAPPED_BYTES: u64 = 4 << 20;
const LEAST_PART: u64 = 16;
/// Generations that are remembered (chosen: beyond, one comparison of everything begins the next ones).
const MOST_GENERATIONS: usize = 64;
/// Ranges that two generations may have alike to be remembered: 16 bytes each (chosen).
const MOST_RANGES: usize = 16 * 1024;

/// A template among those made of one memory, each after the other.
#[derive(Debug, Default)]
pub(super) struct Generation {
    /// How many are before it.
    depth: usize,
    /// The one that its process came from, and where it surely has the same pages.
    parent: Option<(Arc<Generation>, Vec<Range<u64>>)>,
}

impl Generation {
    fn below(parent: &Arc<Self>, alike: Vec<Range<u64>>) -> Self {
        if parent.depth >= MOST_GENERATIONS || alike.len() > MOST_RANGES {
            return Self::default();
        }
        match &parent.parent {
            // Nobody can go back there any more: the child takes its place.
            Some((above, also)) if Arc::strong_count(parent) == 1 => {
                Self { depth: parent.depth, parent: Some((above.clone(), within(&alike, also))) }
            }
            _ => Self { depth: parent.depth + 1, parent: Some((parent.clone(), alike)) },
        }
    }

    /// What of `known` is the same in both; `None` if they have no common ancestor that is remembered.
    fn alike(from: &Arc<Self>, to: &Arc<Self>, known: Vec<Range<u64>>) -> Option<Vec<Range<u64>>> {
        let (mut from, mut to, mut known) = (from, to, known);
        while !Arc::ptr_eq(from, to) {
            let lower = if from.depth >= to.depth { &mut from } else { &mut to };
            let (above, alike) = lower.parent.as_ref()?;
            known = within(&known, alike);
            *lower = above;
        }
        Some(known)
    }
}

/// The watch over one process's memory.
#[derive(Debug)]
pub(in crate::deltacr) struct Watch {
    pid: pid_t,
    uffd: OwnedFd,
    /// A page of the engine's area, watched too: whether the number still names the memory that the descriptor does.
    sign: Range<u64>,
    /// What is watched, as far as it is still mapped.
    spans: Vec<Range<u64>>,
    origins: Origins,
    /// The last template of which is known what is the same.
    since: Option<Arc<Generation>>,
    /// Pages that are that template's own.
    own: Arc<[Range<u64>]>,
    /// Protected, and yet maybe not what the template has.
    doubtful: Vec<Range<u64>>,
}

impl Watch {
    /// Whether a process is big enough, and the kernel able.
    pub(super) fn pays(own_bytes: u64) -> bool {
        static WORKS: LazyLock<bool> = LazyLock::new(|| {
            userfaultfd(UFFD_USER_MODE_ONLY).and_then(|uffd| uffd_api(uffd.as_fd(), uffd_feature::WATCHING)).is_ok()
        });
        own_bytes >= LEAST_BYTES && *WORKS
    }

    /// With a descriptor that was made for the process's memory; `area` is the engine's in it.
    pub(super) fn new(pid: pid_t, uffd: OwnedFd, area: &Range<u64>) -> io::Result<Self> {
        uffd_api(uffd.as_fd(), uffd_feature::WATCHING)?;
        let start = area.start + AREA_SLOTS as u64;
        let sign = start..start + PAGE_BYTES;
        uffd_register_wp(uffd.as_fd(), start..area.end)?;
        Ok(Self {
            pid,
            uffd,
            sign,
            spans: Vec::new(),
            origins: Origins::default(),
            since: None,
            own: Arc::default(),
            doubtful: Vec::new(),
        })
    }

    /// Whether `pages` are of the memory that is watched: exec makes another, whose area is another too.
    fn is_of(&self, pages: &Pages) -> bool {
        pages.scan(self.sign.clone(), Search::WATCHED).is_ok_and(|found| found == [self.sign.clone()])
    }

    fn scan(&self, pages: &Pages, search: Search) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        for span in &self.spans {
            pages.scan(span.clone(), search)?.into_iter().for_each(|range| push(&mut found, range));
        }
        Ok(found)
    }

    /// Turns to a template that was just made of the process, which may run.
    fn turn_to(&mut self, template: &Template, memory: &Memory) -> io::Result<()> {
        let pages = Arc::new(Pages::of(self.pid)?);
        if !self.is_of(&pages) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let source = Source::of(template)?;
        // Written since the last template or not: the rest was this one's too.
        let unwritten = self.scan(&pages, Search::UNWRITTEN)?;
        let alike = without(&unwritten, &self.doubtful);
        if let Some(since) = &self.since {
            source.inherit(within(&alike, &self.own));
            source.begin_generation(Generation::below(since, alike));
        }
        self.since = Some(source.generation());
        self.own = look_ahead(&source, &memory.mappings)?;
        self.watch_what_pays(memory, &pages)?;
        // They are protected before they are compared.
        let unsure = union(&self.scan(&pages, Search::PROTECT)?, &within(&unwritten, &self.doubtful));
        let found = compare(source.pages(), &pages, &unsure)?;
        self.doubtful = union(&found.written, &found.guarded);
        Ok(())
    }

    /// Watches the mappings that were big at the checkpoint, and those that are watched already.
    fn watch_what_pays(&mut self, memory: &Memory, pages: &Pages) -> io::Result<()> {
        let watched_bytes = len_of(&self.spans) as u64;
        let least = LEAST_MAPPED_BYTES.max(watched_bytes / LEAST_PART);
        let mut spans = Vec::new();
        for one in memory.mappings.iter().filter(|one| can_be_watched(one)) {
            let is_known = !within(&[one.range()], &self.spans).is_empty();
            if !is_known && one.anonymous_bytes < least {
                continue;
            }
            let watched = if is_known { pages.scan(one.range(), Search::WATCHED)? } else { Vec::new() };
            // The process may have put something else there since.
            if uffd_register_wp(self.uffd.as_fd(), one.range()).is_ok() {
                self.origins.begin(without(&[one.range()], &watched));
                push(&mut spans, one.range());
            }
        }
        self.spans = spans;
        Ok(())
    }
}

fn can_be_watched(one: &Mapping) -> bool {
    const NEVER: [Advice; 3] = [Advice::Special, Advice::HugeTlb, Advice::Droppable];
    !one.shared && !one.has_file() && !one.is_kernels() && NEVER.iter().all(|advice| !one.has(*advice))
}

/// What is watched, by the mapping that it was when that began. The kernel joins parts of one that was cut again, if what is
/// put between them has no pages yet and is watched; two that each had pages it never joins.
#[derive(Debug, Default)]
struct Origins(Vec<Vec<Range<u64>>>);

impl Origins {
    fn begin(&mut self, ranges: Vec<Range<u64>>) {
        self.0.iter_mut().for_each(|one| *one = without(one, &ranges));
        self.0.push(ranges);
        self.0.retain(|one| !one.is_empty());
    }

    /// Takes in a range without pages: it becomes part of a neighbour.
    fn extend(&mut self, range: Range<u64>) {
        self.begin(vec![range.clone()]);
        let touches =
            |one: &&mut Vec<Range<u64>>| one.iter().any(|other| other.end == range.start || range.end == other.start);
        if let Some(neighbour) = self.0.iter_mut().find(touches) {
            *neighbour = union(neighbour, std::slice::from_ref(&range));
            self.0.pop();
        }
    }

    /// The most of `ranges` that is of one origin.
    fn most(&self, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        self.0.iter().map(|one| within(one, ranges)).max_by_key(|one| len_of(one)).unwrap_or_default()
    }
}

/// What is known of the pages of a process that is to come back.
#[derive(Debug)]
pub(super) struct Known {
    /// Where it is watched.
    pub(super) spans: Vec<Range<u64>>,
    /// Pages in it that are the template's.
    pub(super) equal: Vec<Range<u64>>,
    /// Guard pages in it.
    pub(super) guards: Vec<Range<u64>>,
}

/// The watches over a sandbox's processes.
#[derive(Debug, Default)]
pub(in crate::deltacr) struct Watches(Vec<Watch>);

impl Watches {
    /// Whether the process behind `pages` is watched.
    pub(super) fn has(&self, pid: pid_t, pages: &Pages) -> bool {
        self.0.iter().any(|watch| watch.pid == pid && watch.is_of(pages))
    }

    /// Takes in a new one, in place of another with the same number.
    pub(super) fn add(&mut self, watch: Watch) {
        self.0.retain(|other| other.pid != watch.pid);
        self.0.push(watch);
    }

    /// Leaves those of processes that are there no more.
    pub(in crate::deltacr) fn keep(&mut self, is_there: impl Fn(pid_t) -> bool) {
        self.0.retain(|watch| is_there(watch.pid));
    }

    /// After a template was made of process `pid`, which may run again: from now on is watched what becomes of that.
    pub(in crate::deltacr) fn turn_to(&mut self, pid: pid_t, template: &Template, memory: &Memory) {
        let Some(at) = self.0.iter().position(|watch| watch.pid == pid) else { return };
        if let Err(error) = self.0[at].turn_to(template, memory) {
            // It has ended, or runs another program: the next return compares.
            tracing::debug!(pid, %error, "not watched any more");
            self.0.swap_remove(at);
        }
    }

    /// What is known of the pages of process `pid`, which is stopped, is to have those of `source` and has its mappings.
    pub(super) fn known(&mut self, pid: pid_t, pages: &Pages, source: &Source) -> io::Result<Option<Known>> {
        let Some(watch) = self.0.iter_mut().find(|watch| watch.pid == pid) else { return Ok(None) };
        let Some(since) = watch.since.as_ref().filter(|_| watch.is_of(pages)) else { return Ok(None) };
        // The mappings are there, so that what is not found is a page that was not written.
        let (mut maybe, mut absent) = (Vec::new(), Vec::new());
        for span in &watch.spans {
            pages.scan_regions(span.clone(), Search::MAYBE_WRITTEN, |region| {
                push(&mut maybe, region.start..region.end);
                if region.categories & page_is::SWAPPED != 0 {
                    push(&mut absent, region.start..region.end);
                }
            })?;
        }
        let unwritten = without(&watch.spans, &maybe);
        let known = without(&unwritten, &watch.doubtful);
        watch.doubtful = within(&watch.doubtful, &unwritten);
        let alike = Generation::alike(since, &source.generation(), known);
        let Some(equal) = alike else { return Ok(None) };
        let guards = guards(pages, &absent)?;
        Ok(Some(Known { spans: watch.spans.clone(), equal, guards }))
    }

    /// After process `pid` was given the pages of `source`, still stopped: from now on is watched what becomes of that.
    pub(super) fn begin(
        &mut self,
        pid: pid_t,
        pages: &Pages,
        (source, mappings): (&Source, &[Mapping]),
    ) -> io::Result<()> {
        let Some(watch) = self.0.iter_mut().find(|watch| watch.pid == pid) else { return Ok(()) };
        if watch.is_of(pages) {
            watch.scan(pages, Search::PROTECT)?;
            watch.since = Some(source.generation());
            watch.own = look_ahead(source, mappings)?;
        }
        Ok(())
    }

    /// What of `range`, which was one mapping and is in pieces, can stay: the kernel joins it again once new mappings in
    /// between are watched. Nothing, if it is not watched.
    pub(super) fn joinable(&self, pid: pid_t, pages: &Pages, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        match self.0.iter().find(|watch| watch.pid == pid && watch.is_of(pages)) {
            Some(watch) => Ok(watch.origins.most(&pages.scan(range, Search::WATCHED)?)),
            None => Ok(Vec::new()),
        }
    }

    /// Watches mappings that were just made where others were watched, before there are pages in them.
    pub(super) fn extend<'a>(&mut self, pid: pid_t, new: impl Iterator<Item = (&'a Range<u64>, &'a Mapping)>) {
        let Some(watch) = self.0.iter_mut().find(|watch| watch.pid == pid) else { return };
        for (range, _) in new.filter(|(_, mapping)| can_be_watched(mapping)) {
            let was_watched = !within(std::slice::from_ref(range), &watch.spans).is_empty();
            // Who is another by now is not watched: that fails.
            if was_watched && uffd_register_wp(watch.uffd.as_fd(), range.clone()).is_ok() {
                watch.origins.extend(range.clone());
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "sets of one range")]
mod tests {
    use super::*;

    /// A generation, and what its template has of it.
    fn generation(parent: &Arc<Generation>, alike: &[Range<u64>]) -> [Arc<Generation>; 2] {
        let one = Arc::new(Generation::below(parent, alike.to_vec()));
        [one.clone(), one]
    }

    #[test]
    fn what_generations_have_alike_is_found_over_their_common_ancestor() {
        let first = Arc::<Generation>::default();
        let _template = first.clone();
        let [left, _template] = generation(&first, &[0..6]);
        let [right, template] = generation(&first, &[2..9]);
        let alike = |from: &Arc<_>, to: &Arc<_>| Generation::alike(from, to, vec![0..10]);
        {
            let [leaf, _template] = generation(&right, &[3..9]);
            assert_eq!(alike(&leaf, &leaf), Some(vec![0..10]));
            assert_eq!(alike(&left, &leaf), Some(vec![3..6]));
            assert_eq!(alike(&leaf, &left), Some(vec![3..6]));
            assert_eq!(alike(&leaf, &first), Some(vec![3..9]));
            let stranger = Arc::default();
            assert_eq!(alike(&leaf, &stranger), None);
        }
        // One whose template is gone is stepped over.
        drop(template);
        let [next, _template] = generation(&right, &[5..7]);
        assert!(next.parent.as_ref().is_some_and(|(above, _)| Arc::ptr_eq(above, &first)));
        assert_eq!(alike(&next, &left), Some(vec![5..6]));
    }

    #[test]
    fn parts_of_one_mapping_are_known_to_be_that() {
        let mut origins = Origins::default();
        origins.begin(vec![0..10]);
        // What was put into a hole, and was watched later.
        origins.begin(vec![3..5]);
        assert_eq!(origins.most(&[0..10]), [0..3, 5..10]);
        origins.extend(3..5);
        assert_eq!(origins.most(&[0..10]), [0..10]);
        assert_eq!(origins.0.len(), 1);
        origins.extend(20..30);
        assert_eq!(origins.most(&[8..40]), [20..30]);
        origins.begin(vec![0..30]);
        assert_eq!(origins.0, [vec![0..30]]);
    }

    #[test]
    fn generations_are_not_remembered_for_ever() {
        let [mut last, template] = generation(&Arc::default(), &[]);
        let mut templates = vec![template];
        for depth in last.depth + 1..=MOST_GENERATIONS {
            let [next, template] = generation(&last, &[0..1]);
            assert_eq!(next.depth, depth);
            templates.push(template);
            last = next;
        }
        assert!(Generation::below(&last, vec![0..1]).parent.is_none());
        let many = (0..MOST_RANGES as u64 + 1).map(|at| 2 * at..2 * at + 1).collect();
        assert!(Generation::below(&templates[0], many).parent.is_none());
    }
}
