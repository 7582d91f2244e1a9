//! Back in place: a process that is still alive gets the memory and registers again that it had.
//!
//! ```text
//! check    it can have these threads; those that are missing are made and halted; a plan for the mappings; nothing is
//!          lost. Until here it is unchanged.
//! map      munmap, brk, mmap, mprotect, madvise, made by the process; then again, until the mappings are those wanted
//! pages    which differ; dropped by the process, copied by the engine
//! threads  those that are too many end; what the kernel keeps for each
//! ```
//! Pages that were never written since are one page with the template's, so the work is that of what was written.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::pid_t;

use super::error::{TemplateError, TemplateRefusal, check, process};
use super::mapping::{Advice, Mapping, read_maps, read_smaps};
use super::memory::{Counts, Memory, without};
use super::pages;
use super::plan::{Step, again, broken, covering, plan};
use super::source::{PAGE_BYTES, Pages, Source};
use super::threads::Threads;
use super::wares::Wares;
use crate::deltacr::handover::call;
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::shared::Present;
use crate::deltacr::stop::Stopped;
use crate::sandbox::root::Root;
use crate::sys::process::set_soft_limit;

/// So often the mappings are looked at again (chosen: one look more than any known cause needs).
const N_ATTEMPTS: usize = 3;

/// Accesses to these pages are SIGSEGV (since Linux 6.13, include/uapi/asm-generic/mman-common.h).
const MADV_GUARD_INSTALL: i32 = 102;
/// They are pages like others, and empty.
const MADV_GUARD_REMOVE: i32 = 103;

/// What there was to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Ranges that were unmapped.
    pub n_unmapped: usize,
    /// Ranges that were mapped again.
    pub n_mapped: usize,
    /// Ranges with another protection, advice or lock.
    pub n_changed: usize,
    /// Pages that were copied.
    pub n_copied_pages: u64,
    /// Pages that were dropped, for the checkpoint had none there.
    pub n_dropped_pages: u64,
    /// Pages that nobody had written to.
    pub n_equal_pages: u64,
    /// Threads whose registers were set.
    pub n_threads: usize,
    /// Of which so many were made.
    pub n_made_threads: usize,
    /// Threads that were ended.
    pub n_ended_threads: usize,
    /// Until the mappings were right.
    pub mappings: Duration,
    /// Until it was known which pages differ.
    pub comparison: Duration,
    /// Until they were right.
    pub pages: Duration,
}

/// What a process is to have again.
#[derive(Clone, Copy, Debug)]
pub struct Past<'a> {
    /// Its mappings.
    pub memory: &'a Memory,
    /// Its pages.
    pub source: &'a Source,
    /// Its threads.
    pub threads: &'a Threads,
    /// What it maps shared.
    pub files: Option<Files<'a>>,
}

/// What a process maps shared.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// Files of the sandbox.
    pub(in crate::deltacr) tree: Tree<'a>,
    /// Memory.
    pub(in crate::deltacr) shared: &'a Present<'a>,
}

/// The tree of files, then and now.
#[derive(Clone, Copy, Debug)]
pub(in crate::deltacr) struct Tree<'a> {
    /// Its device at the checkpoint, as the kernel numbers it.
    pub(in crate::deltacr) then: u64,
    /// That which the process has its files from before the return.
    pub(in crate::deltacr) now: u64,
    /// What it is to have them from.
    pub(in crate::deltacr) root: &'a Root,
}

/// What is to be done first to a process's mappings, to be found out while nothing has changed.
///
/// # Errors
/// Something cannot be mapped again.
pub(in crate::deltacr) fn plan_in_place(
    stopped: &mut Stopped,
    pid: pid_t,
    past: &Past<'_>,
) -> Result<First, TemplateError> {
    plan_mappings(stopped, pid, past).map(|(_, first)| first)
}

/// Fails if something cannot be mapped again that one who is rebuilt had.
///
/// # Errors
/// What.
pub(in crate::deltacr) fn check_rebuild(past: &Past<'_>) -> Result<(), TemplateError> {
    Room::check_empty(past, past.source.pid())
}

/// Gives a stopped process the memory and the registers again that it had.
///
/// # Errors
/// `Refused` with `Threads` or `Lost`: it is unchanged. Anything else: it is neither what it was nor what it should
/// be, and must not be let go.
pub fn restore_in_place(stopped: &mut Stopped, pid: pid_t, past: &Past<'_>) -> Result<Report, TemplateError> {
    restore_as_planned(stopped, pid, past, None)
}

/// The same; `first` if it is known what has to be done.
///
/// # Errors
/// As [`restore_in_place`].
pub(in crate::deltacr) fn restore_as_planned(
    stopped: &mut Stopped,
    pid: pid_t,
    past: &Past<'_>,
    first: Option<First>,
) -> Result<Report, TemplateError> {
    let begin = Instant::now();
    let threads = past.threads;
    let mut cast = threads.cast(stopped, pid)?;
    threads.bear(stopped, pid, &mut cast)?;
    let (n_made_threads, n_ended_threads) = cast.counts();
    let n_threads = threads.n_threads();
    let mut report = Report { n_threads, n_made_threads, n_ended_threads, ..Report::default() };
    let planned = match first {
        Some(first) => Room::of(stopped, pid, past).map(|room| (room, first)),
        None => plan_mappings(stopped, pid, past),
    };
    if planned.is_err() {
        // The first failure is the one to report.
        let _ = cast.unmake(stopped, pid);
    }
    let (room, first) = planned?;
    // With their memory: the kernel writes to that of threads that run, injected calls or not.
    cast.part(stopped, pid)?;
    threads.unregister(stopped, pid, &cast)?;
    put_memory(stopped, past, &room, first, (begin, &mut report))?;
    threads.put_back(stopped, pid, &cast)?;
    Ok(report)
}

/// Gives a process that has nothing but the kernel's pages and the engine's area its memory.
pub(super) fn furnish_memory(stopped: &mut Stopped, pid: pid_t, past: &Past<'_>) -> Result<Report, TemplateError> {
    let begin = Instant::now();
    let mut report = Report::default();
    let (room, first) = plan_mappings(stopped, pid, past)?;
    put_memory(stopped, past, &room, first, (begin, &mut report))?;
    Ok(report)
}

fn put_memory(
    stopped: &mut Stopped,
    past: &Past<'_>,
    room: &Room<'_>,
    first: First,
    (begin, report): (Instant, &mut Report),
) -> Result<(), TemplateError> {
    let (pid, source) = (room.pid, past.source);
    let mut hand = stopped.hand(pid)?;
    room.put_mappings(&mut hand, source, first, report)?;
    report.mappings = begin.elapsed();
    let begin = Instant::now();
    let present = Arc::new(Pages::of(pid).map_err(process("open the memory of", pid))?);
    let wanted: Vec<Mapping> = room.wanted();
    let failed = process("compare the pages of", pid);
    let known = hand.stopped.kept.watches.known(pid, &present, source).map_err(failed)?;
    let differences = pages::find(source, &present, &wanted, known.as_ref()).map_err(failed)?;
    report.comparison = begin.elapsed();
    let begin = Instant::now();
    drop_pages(&mut hand, &wanted, &differences.dropped)?;
    advise(&mut hand, &differences.bared, MADV_GUARD_REMOVE)?;
    advise(&mut hand, &differences.guarded, MADV_GUARD_INSTALL)?;
    hand.close()?;
    // A locked mapping, and one with pages made ahead, are copied to all the same.
    pages::copy(source.pages(), &present, &differences.copied).map_err(process("copy the pages of", pid))?;
    let watched = stopped.kept.watches.begin(pid, &present, (source, &wanted));
    watched.map_err(process("watch the pages of", pid))?;
    seal(stopped, pid, &wanted)?;
    report.n_equal_pages = differences.n_equal;
    report.n_copied_pages = pages::n_pages(&differences.copied);
    report.n_dropped_pages = pages::n_pages(&differences.dropped);
    report.pages = begin.elapsed();
    Ok(())
}

/// What is to be done first. The process is unchanged.
pub(super) fn plan_mappings<'a>(
    stopped: &mut Stopped,
    pid: pid_t,
    past: &Past<'a>,
) -> Result<(Room<'a>, First), TemplateError> {
    let room = Room::of(stopped, pid, past)?;
    let mut hand = stopped.hand(pid)?;
    let first = room.plan_first(&mut hand)?;
    hand.close()?;
    Ok((room, first))
}

/// A process's addresses but for the engine's area in it.
pub(super) struct Room<'a> {
    pid: pid_t,
    area: Range<u64>,
    memory: &'a Memory,
    /// What is advised of mappings is read, for which the kernel walks all pages: where some are locked. Elsewhere it is
    /// taken to be what it was, and what of it a program could notice is said again.
    is_careful: bool,
    files: Option<Files<'a>>,
}

/// Each with the advice that it had then. Neighbours that were advised otherwise may have become one: they are several
/// again, or what differed between them would be taken to differ still, and advising it would change nothing.
fn taken_as_then(present: Vec<Mapping>, then: &[Mapping]) -> Vec<Mapping> {
    let mut taken = Vec::with_capacity(present.len());
    for one in present {
        let first = then.partition_point(|was| was.end <= one.start);
        let within = then[first..].iter().take_while(|was| was.start < one.end);
        let mut parts = within.filter(|was| was.shows_the_same(&one)).peekable();
        let mut at = one.start;
        // A stack has grown downwards: what lies below the first part is as that.
        while let Some(part) = parts.next() {
            let end = parts.peek().map_or(one.end, |next| next.start);
            let offset_bytes = one.offset_bytes + if one.has_file() { at - one.start } else { 0 };
            taken.push(Mapping { start: at, end, offset_bytes, advice: part.advice.clone(), ..one.clone() });
            at = end;
        }
        if at < one.end {
            taken.push(Mapping { start: at, advice: Default::default(), ..one });
        }
    }
    taken
}

/// The first look, and what follows from it.
#[derive(Debug)]
pub(in crate::deltacr) struct First {
    present: Vec<Mapping>,
    steps: Vec<(Range<u64>, Step)>,
    /// The end of the heap now and then.
    heap: Range<u64>,
}

impl<'a> Room<'a> {
    fn of(stopped: &mut Stopped, pid: pid_t, past: &Past<'a>) -> Result<Self, TemplateError> {
        let hand = stopped.hand(pid)?;
        let area = hand.area();
        hand.close()?;
        let Past { memory, files, .. } = *past;
        let locks = memory.mappings.iter().any(|one| one.has(Advice::Locked));
        let counts = Counts::read(pid).map_err(process("read the state of", pid))?;
        Ok(Self { pid, area, memory, is_careful: locks || counts.locked_bytes > 0, files })
    }

    fn wanted(&self) -> Vec<Mapping> {
        let mut wanted = self.memory.mappings.clone();
        without(&mut wanted, &self.area);
        if let Some(files) = self.files {
            Mapping::mark_tree(&mut wanted, &[files.tree.then]);
        }
        wanted
    }

    fn present(&self) -> Result<Vec<Mapping>, TemplateError> {
        let read = if self.is_careful { read_smaps } else { read_maps };
        let mut present = read(self.pid).map_err(process("read the mappings of", self.pid))?;
        if let Some(Files { tree, shared }) = self.files {
            Mapping::mark_tree(&mut present, &[tree.now, tree.root.dev()]);
            shared.name_as_then(&mut present);
        }
        if !self.is_careful {
            present = taken_as_then(present, &self.memory.mappings);
        }
        without(&mut present, &self.area);
        Ok(present)
    }

    /// Advises again what a child would notice: which mappings it gets, and which of them empty; and where huge pages are
    /// wanted or not. The rest (the order of reading, dumps, huge pages where nothing had been said) no program can tell.
    /// Calls that change nothing cost 0.2 us each.
    fn say_again(&self, hand: &mut Hand<'_>) -> Result<(), TemplateError> {
        let pid = self.pid;
        let mut calls = Vec::new();
        for one in self.wanted().iter().filter(|one| !one.is_kernels() && !one.has(Advice::Special)) {
            let mut advise = |advice: i32| {
                calls.push(call(libc::SYS_madvise, &[one.start, one.len_bytes(), advice.cast_unsigned().into()]));
            };
            advise(if one.has(Advice::DontFork) { libc::MADV_DONTFORK } else { libc::MADV_DOFORK });
            if one.has(Advice::Huge) || one.has(Advice::NoHuge) {
                advise(if one.has(Advice::Huge) { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
            }
            // Only private memory without a file can be so.
            if !one.shared && !one.has_file() {
                advise(if one.has(Advice::WipeOnFork) { libc::MADV_WIPEONFORK } else { libc::MADV_KEEPONFORK });
            }
        }
        hand.run(&calls)?.into_iter().try_for_each(|result| check(pid, "madvise", result))
    }

    /// Whether there is something to map where a mapping was that the template does not have.
    fn has_file_for(&self, mapping: &Mapping) -> bool {
        mapping.in_tree || self.files.is_some_and(|files| files.shared.file(mapping).is_some())
    }

    /// Fails if something cannot be mapped again that the template does not have.
    pub(super) fn check_template(past: &Past<'_>, template: pid_t) -> Result<(), TemplateError> {
        let Past { memory, files, .. } = *past;
        // What was advised is the template's own affair.
        let room = Room { pid: template, area: memory.area.clone(), memory, is_careful: false, files };
        plan(template, &room.wanted(), &room.present()?, &(0..0), &|mapping| room.has_file_for(mapping))?;
        Ok(())
    }

    /// Fails if something cannot be mapped again in a process that has nothing but the kernel's pages.
    pub(super) fn check_empty(past: &Past<'_>, pid: pid_t) -> Result<(), TemplateError> {
        let Past { memory, files, .. } = *past;
        let room = Room { pid, area: memory.area.clone(), memory, is_careful: false, files };
        let wanted = room.wanted();
        let present: Vec<Mapping> = wanted.iter().filter(|mapping| mapping.is_kernels()).cloned().collect();
        plan(pid, &wanted, &present, &(0..0), &|mapping| room.has_file_for(mapping))?;
        Ok(())
    }

    fn plan_first(&self, hand: &mut Hand<'_>) -> Result<First, TemplateError> {
        let brk = hand.call(libc::SYS_brk, [0; 6])?.cast_unsigned();
        let (now, then) = (brk.next_multiple_of(PAGE_BYTES), self.memory.brk.next_multiple_of(PAGE_BYTES));
        let heap = now.min(then)..now.max(then);
        let present = self.present()?;
        let mut steps = plan(self.pid, &self.wanted(), &present, &heap, &|mapping| self.has_file_for(mapping))?;
        if then > now && present.iter().any(|one| one.start < heap.end && heap.start < one.end) {
            // Something else took the heap's place.
            steps.insert(0, (heap.clone(), Step::Unmap));
        }
        Ok(First { present, steps, heap: now..then })
    }

    pub(super) fn put_mappings(
        &self,
        hand: &mut Hand<'_>,
        source: &Source,
        first: First,
        report: &mut Report,
    ) -> Result<(), TemplateError> {
        let pid = self.pid;
        let wanted = self.wanted();
        let First { present, steps, heap: Range { start: now, end: then } } = first;
        let mut planned = Some((present, steps));
        let heap = 0..0;
        let mut is_mended = false;
        for _ in 0..N_ATTEMPTS {
            let (present, mut steps) = match planned.take() {
                Some(planned) => planned,
                None => {
                    let present = self.present()?;
                    let steps = plan(pid, &wanted, &present, &heap, &|mapping| self.has_file_for(mapping))?;
                    (present, steps)
                }
            };
            if steps.is_empty() && brk_is(hand, self.memory.brk)? {
                let parted = broken(&wanted, &present);
                if parted.is_empty() {
                    return if self.is_careful { Ok(()) } else { self.say_again(hand) };
                }
                let kept = if is_mended { Vec::new() } else { self.joinable(hand, &parted)? };
                is_mended = true;
                for one in parted {
                    steps.extend(again(pid, one, &kept, &|mapping| self.has_file_for(mapping))?);
                }
            }
            self.make(hand, source, &steps, report)?;
            let new = steps.iter().filter_map(|(range, step)| match step {
                Step::Map(mapping) => Some((range, &**mapping)),
                _ => None,
            });
            hand.stopped.kept.watches.extend(pid, new);
        }
        let present = self.present()?;
        if let Some((range, _)) =
            plan(pid, &wanted, &present, &heap, &|mapping| self.has_file_for(mapping))?.into_iter().next()
        {
            return Err(TemplateRefusal::Unequal { pid, range }.into());
        }
        let parted = broken(&wanted, &present).first().map(|one| one.range());
        let heap = (!brk_is(hand, self.memory.brk)?).then_some(now..then);
        match parted.or(heap) {
            Some(range) => Err(TemplateRefusal::Unequal { pid, range }.into()),
            None => Ok(()),
        }
    }

    /// What of mappings that are in pieces can stay.
    fn joinable(&self, hand: &Hand<'_>, parted: &[&Mapping]) -> Result<Vec<Range<u64>>, TemplateError> {
        let failed = process("look at the pages of", self.pid);
        let pages = Pages::of(self.pid).map_err(failed)?;
        let ranges = parted.iter().map(|one| hand.stopped.kept.watches.joinable(self.pid, &pages, one.range()));
        Ok(ranges.collect::<io::Result<Vec<_>>>().map_err(failed)?.concat())
    }

    fn make(
        &self,
        hand: &mut Hand<'_>,
        source: &Source,
        steps: &[(Range<u64>, Step)],
        report: &mut Report,
    ) -> Result<(), TemplateError> {
        let pid = self.pid;
        // The descriptors first: without room for them nothing has changed yet.
        let wares = Wares::give(hand, source, steps, self.files.as_ref())?;
        let mut calls = Vec::new();
        let unmaps = steps.iter().take_while(|(_, step)| *step == Step::Unmap).count();
        for (range, _) in &steps[..unmaps] {
            calls.push(call(libc::SYS_munmap, &[range.start, range.end - range.start]));
        }
        calls.push(call(libc::SYS_brk, &[self.memory.brk]));
        let mut grown = Vec::new();
        for (range, step) in &steps[unmaps..] {
            match step {
                Step::Grow => grown.push(range.start),
                Step::Map(mapping) => {
                    report.n_mapped += 1;
                    calls.push(map_call(mapping, range, wares.number(mapping)));
                }
                step => {
                    report.n_changed += 1;
                    calls.push(change_call(range, step));
                }
            }
        }
        report.n_unmapped += unmaps;
        calls.extend(wares.close_calls());
        // A soft limit that was lowered when it had been locked does not stand in its way. (Killed here, the engine takes the
        // process with it.)
        let locks = steps.iter().any(|(_, step)| matches!(step, Step::Lock | Step::LockOnFault));
        let failed = process("change the limits of", pid);
        let limit = locks.then(|| set_soft_limit(pid, libc::RLIMIT_MEMLOCK, u64::MAX)).transpose().map_err(failed)?;
        let results = hand.run(&calls);
        limit.map(|limit| set_soft_limit(pid, libc::RLIMIT_MEMLOCK, limit)).transpose().map_err(failed)?;
        let results = results?;
        for (result, call) in results.iter().zip(&calls) {
            check(pid, name_of(call), *result)?;
        }
        if !grown.is_empty() {
            let pages = Pages::of(pid).map_err(process("open the memory of", pid))?;
            for at in grown {
                pages.grow_stack(at).map_err(process("grow the stack of", pid))?;
            }
        }
        name_new(hand, steps)
    }
}

fn brk_is(hand: &mut Hand<'_>, wanted: u64) -> Result<bool, TemplateError> {
    Ok(hand.call(libc::SYS_brk, [0; 6])?.cast_unsigned() == wanted)
}

fn map_call(mapping: &Mapping, range: &Range<u64>, number: Option<i32>) -> Call {
    let optional = |advice, flag: i32| if mapping.has(advice) { flag } else { 0 };
    let kind = if mapping.shared {
        libc::MAP_SHARED
    } else if mapping.has(Advice::Droppable) {
        libc::MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE
    };
    let flags = kind
        | libc::MAP_FIXED
        | if number.is_some() { 0 } else { libc::MAP_ANONYMOUS }
        | optional(Advice::NoReserve, libc::MAP_NORESERVE)
        | optional(Advice::GrowsDown, libc::MAP_GROWSDOWN);
    let descriptor = i64::from(number.unwrap_or(-1)).cast_unsigned();
    let offset = if number.is_some() { mapping.offset_bytes + (range.start - mapping.start) } else { 0 };
    let flags = flags.cast_unsigned().into();
    call(libc::SYS_mmap, &[range.start, range.end - range.start, mapping.protection, flags, descriptor, offset])
}

fn change_call(range: &Range<u64>, step: &Step) -> Call {
    let (start, len_bytes) = (range.start, range.end - range.start);
    match step {
        Step::Protect(protection) => call(libc::SYS_mprotect, &[start, len_bytes, *protection]),
        Step::Advise(advice) => call(libc::SYS_madvise, &[start, len_bytes, advice.cast_unsigned().into()]),
        Step::Lock => call(libc::SYS_mlock, &[start, len_bytes]),
        Step::LockOnFault => call(libc::SYS_mlock2, &[start, len_bytes, libc::MLOCK_ONFAULT.into()]),
        Step::Unlock => call(libc::SYS_munlock, &[start, len_bytes]),
        Step::Unmap | Step::Map(_) | Step::Grow => call(libc::SYS_munmap, &[start, 0]),
    }
}

fn name_of(call: &Call) -> &'static str {
    match call.nr {
        libc::SYS_mmap => "mmap",
        libc::SYS_munmap => "munmap",
        libc::SYS_mprotect => "mprotect",
        libc::SYS_madvise => "madvise",
        libc::SYS_brk => "brk",
        libc::SYS_mlock => "mlock",
        libc::SYS_mlock2 => "mlock2",
        libc::SYS_mseal => "mseal",
        libc::SYS_munlock => "munlock",
        _ => "close",
    }
}

/// Gives new mappings without a file the names that they had (PR_SET_VMA_ANON_NAME). Where the kernel knows no
/// names they had none.
fn name_new(hand: &mut Hand<'_>, steps: &[(Range<u64>, Step)]) -> Result<(), TemplateError> {
    for (range, step) in steps {
        let Step::Map(mapping) = step else { continue };
        let Some(name) = mapping.name.strip_prefix("[anon:").and_then(|rest| rest.strip_suffix(']')) else { continue };
        let at = hand.scratch().start;
        hand.write(at, &[name.as_bytes(), &[0]].concat())?;
        let (set, name) = (libc::PR_SET_VMA.cast_unsigned().into(), libc::PR_SET_VMA_ANON_NAME.cast_unsigned().into());
        let args = [set, name, range.start, range.end - range.start, at];
        check(hand.pid(), "prctl", hand.call(libc::SYS_prctl, call(0, &args).args)?)?;
    }
    Ok(())
}

/// Has the process drop pages: they are zeros, or the file's, again.
fn drop_pages(hand: &mut Hand<'_>, wanted: &[Mapping], dropped: &[Range<u64>]) -> Result<(), TemplateError> {
    let mut calls = Vec::new();
    for range in dropped {
        let mut at = range.start;
        while at < range.end {
            // One call for each mapping: locked ones want a word of their own.
            let Some(mapping) = covering(wanted, at) else { break };
            let end = range.end.min(mapping.end);
            let locked = mapping.has(Advice::Locked);
            let advice = if locked { libc::MADV_DONTNEED_LOCKED } else { libc::MADV_DONTNEED };
            calls.push(call(libc::SYS_madvise, &[at, end - at, advice.cast_unsigned().into()]));
            at = end;
        }
    }
    if calls.is_empty() {
        return Ok(());
    }
    let results = hand.run(&calls)?;
    results.iter().try_for_each(|result| check(hand.pid(), "madvise", *result))
}

/// Seals what was sealed (mseal(2)): last, for nothing can be dropped or mapped anew then. What is sealed stays so.
fn seal(stopped: &mut Stopped, pid: pid_t, wanted: &[Mapping]) -> Result<(), TemplateError> {
    let sealed = wanted.iter().filter(|one| one.has(Advice::Sealed) && !one.is_kernels());
    let calls: Vec<_> = sealed.map(|one| call(libc::SYS_mseal, &[one.start, one.len_bytes(), 0])).collect();
    if calls.is_empty() {
        return Ok(());
    }
    let mut hand = stopped.hand(pid)?;
    let results = hand.run(&calls)?;
    hand.close()?;
    results.iter().try_for_each(|result| check(pid, "mseal", *result))
}

fn advise(hand: &mut Hand<'_>, ranges: &[Range<u64>], advice: i32) -> Result<(), TemplateError> {
    if ranges.is_empty() {
        return Ok(());
    }
    let advise = |range: &Range<u64>| {
        call(libc::SYS_madvise, &[range.start, range.end - range.start, advice.cast_unsigned().into()])
    };
    let results = hand.run(&ranges.iter().map(advise).collect::<Vec<_>>())?;
    results.iter().try_for_each(|result| check(hand.pid(), "madvise", *result))
}

/// A file that must be mapped again could not be opened or handed over.
pub(super) fn unopened(pid: pid_t) -> impl Fn(io::Error) -> TemplateError + Copy {
    process("hand a file to", pid)
}
