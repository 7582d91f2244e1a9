//! From the mappings that are there to those that were: a list of steps. Pure.

use std::ops::Range;

use libc::pid_t;

use super::error::TemplateRefusal;
use super::mapping::{Advice, Mapping};
use super::ranges::without;

/// What is to be done with a range of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing was there.
    Unmap,
    /// Part of this mapping was there. It is put over what is there now.
    Map(Box<Mapping>),
    /// The stack reached so far down.
    Grow,
    /// It had this protection.
    Protect(u64),
    /// It had been advised otherwise: `MADV_*`.
    Advise(i32),
    /// It was locked.
    Lock,
    /// Its pages were locked from the first access on.
    LockOnFault,
    /// It was not locked.
    Unlock,
}

/// The steps, in the order in which they are to be made.
///
/// `heap` is what brk(2) will add or take away; `has_file` says of shared memory whether it can be mapped again.
///
/// # Errors
/// Something that cannot be made again is gone.
pub(super) fn plan(
    pid: pid_t,
    wanted: &[Mapping],
    present: &[Mapping],
    heap: &Range<u64>,
    has_file: &dyn Fn(&Mapping) -> bool,
) -> Result<Vec<(Range<u64>, Step)>, TemplateRefusal> {
    let mut steps = Vec::new();
    for range in pieces(wanted, present, heap) {
        let (was, is) = (covering(wanted, range.start), covering(present, range.start));
        let in_heap = heap.start <= range.start && range.end <= heap.end;
        match (was, is) {
            (None, None) => {}
            (None, Some(_)) | (Some(_), None) if in_heap => {}
            (None, Some(is)) if is.is_kernels() => return Err(lost(pid, is)),
            (None, Some(_)) => push(&mut steps, range, Step::Unmap),
            (Some(was), None) if grows_to(was, &range, present) => push(&mut steps, range, Step::Grow),
            (Some(was), Some(is)) if was.is_alike(is) && can_be_advised(was, is) => {
                if was.protection != is.protection {
                    push(&mut steps, range.clone(), Step::Protect(was.protection));
                }
                for step in advice(was, Some(is)) {
                    push(&mut steps, range.clone(), step);
                }
            }
            (Some(was), _) => {
                refuse_lost(pid, was, has_file)?;
                push(&mut steps, range.clone(), Step::Map(Box::new(was.clone())));
                for step in advice(was, None) {
                    push(&mut steps, range.clone(), step);
                }
            }
        }
    }
    // Room first: the heap and the stack may have to grow into what goes. Advice last: one piece of it may be for several
    // new mappings.
    let rank = |step: &Step| match step {
        Step::Unmap => 0,
        Step::Map(_) | Step::Grow => 1,
        Step::Protect(_) | Step::Advise(_) | Step::Lock | Step::LockOnFault | Step::Unlock => 2,
    };
    steps.sort_by_key(|(range, step)| (rank(step), range.start));
    Ok(steps)
}

/// Mappings that were one and are several, though each part is as it was: the kernel does not join what was moved or
/// made at another time. A program could not move such a one as a whole.
pub(super) fn broken<'a>(wanted: &'a [Mapping], present: &[Mapping]) -> Vec<&'a Mapping> {
    let is_whole = |was: &Mapping| covering(present, was.start).is_some_and(|is| is.end >= was.end);
    wanted.iter().filter(|was| !was.is_kernels() && !is_whole(was)).collect()
}

/// All steps that map something anew, but for `kept`.
pub(super) fn again(
    pid: pid_t,
    was: &Mapping,
    kept: &[Range<u64>],
    has_file: &dyn Fn(&Mapping) -> bool,
) -> Result<Vec<(Range<u64>, Step)>, TemplateRefusal> {
    refuse_lost(pid, was, has_file)?;
    let mut steps = Vec::new();
    for range in without(&[was.range()], kept) {
        steps.push((range.clone(), Step::Map(Box::new(was.clone()))));
        steps.extend(advice(was, None).into_iter().map(|step| (range.clone(), step)));
    }
    Ok(steps)
}

fn refuse_lost(pid: pid_t, was: &Mapping, has_file: &dyn Fn(&Mapping) -> bool) -> Result<(), TemplateRefusal> {
    let is_elsewhere = was.has(Advice::SharedWritable) && !has_file(was);
    if was.is_kernels() || is_elsewhere || was.has(Advice::Special) {
        return Err(lost(pid, was));
    }
    Ok(())
}

fn lost(pid: pid_t, mapping: &Mapping) -> TemplateRefusal {
    let kind = match mapping {
        _ if mapping.is_kernels() => "pages of the kernel",
        _ => "shared memory",
    };
    TemplateRefusal::Lost { pid, kind, start: mapping.start }
}

/// Both lists cut at each other's limits, and at the heap's.
fn pieces(wanted: &[Mapping], present: &[Mapping], heap: &Range<u64>) -> Vec<Range<u64>> {
    let mut cuts: Vec<u64> = wanted.iter().chain(present).flat_map(|one| [one.start, one.end]).collect();
    cuts.extend([heap.start, heap.end]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// The mapping at an address; lists are sorted.
pub(super) fn covering(mappings: &[Mapping], at: u64) -> Option<&Mapping> {
    let next = mappings.partition_point(|one| one.end <= at);
    mappings.get(next).filter(|one| one.start <= at)
}

/// Whether a stack that is still there, with more room above, was longer.
fn grows_to(was: &Mapping, range: &Range<u64>, present: &[Mapping]) -> bool {
    was.has(Advice::GrowsDown)
        && covering(present, range.end).is_some_and(|above| above.start == range.end && was.is_alike(above))
}

/// Whether calls lead from what is advised to what was: none takes a word about huge pages back.
fn can_be_advised(was: &Mapping, is: &Mapping) -> bool {
    let said = |one: &Mapping| one.has(Advice::Huge) || one.has(Advice::NoHuge);
    said(was) || !said(is)
}

/// What has to be advised; `is` is `None` for a new mapping.
fn advice(was: &Mapping, is: Option<&Mapping>) -> Vec<Step> {
    const PAIRS: [(Advice, i32, Option<i32>); 6] = [
        (Advice::DontFork, libc::MADV_DONTFORK, Some(libc::MADV_DOFORK)),
        (Advice::WipeOnFork, libc::MADV_WIPEONFORK, Some(libc::MADV_KEEPONFORK)),
        (Advice::Huge, libc::MADV_HUGEPAGE, None),
        (Advice::NoHuge, libc::MADV_NOHUGEPAGE, None),
        (Advice::Mergeable, libc::MADV_MERGEABLE, Some(libc::MADV_UNMERGEABLE)),
        (Advice::DontDump, libc::MADV_DONTDUMP, Some(libc::MADV_DODUMP)),
    ];
    let has = |advice| is.is_some_and(|is| is.has(advice));
    let mut steps = Vec::new();
    for (advice, on, off) in PAIRS {
        match (was.has(advice), has(advice)) {
            (true, false) => steps.push(Step::Advise(on)),
            (false, true) => steps.extend(off.map(Step::Advise)),
            _ => {}
        }
    }
    let order = |one: &Mapping| (one.has(Advice::Sequential), one.has(Advice::Random));
    let is_order = is.map_or((false, false), order);
    if order(was) != is_order {
        steps.push(Step::Advise(match order(was) {
            (true, _) => libc::MADV_SEQUENTIAL,
            (_, true) => libc::MADV_RANDOM,
            _ => libc::MADV_NORMAL,
        }));
    }
    let lock = |one: &Mapping| match (one.has(Advice::Locked), one.has(Advice::LockedOnFault)) {
        (true, false) => Step::Lock,
        (true, true) => Step::LockOnFault,
        (false, _) => Step::Unlock,
    };
    if lock(was) != is.map_or(Step::Unlock, lock) {
        steps.push(lock(was));
    }
    steps
}

/// Adds a step, or makes the last one longer.
fn push(steps: &mut Vec<(Range<u64>, Step)>, range: Range<u64>, step: Step) {
    if let Some((last, _)) = steps.iter_mut().rev().find(|(last, one)| last.end == range.start && *one == step) {
        last.end = range.end;
        return;
    }
    steps.push((range, step));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64, protection: u64) -> Mapping {
        Mapping {
            start,
            end,
            protection,
            shared: false,
            offset_bytes: 0,
            device: (0, 0),
            inode: 0,
            name: String::new(),
            advice: Default::default(),
            anonymous_bytes: 0,
            in_tree: false,
        }
    }

    fn with(mut mapping: Mapping, advice: &[Advice]) -> Mapping {
        mapping.advice.extend(advice);
        mapping
    }

    fn steps(wanted: &[Mapping], present: &[Mapping]) -> Vec<(Range<u64>, Step)> {
        plan(1, wanted, present, &(0..0), &|_| false).expect("a plan")
    }

    #[test]
    fn equal_lists_need_no_step() {
        let list = [mapping(1, 5, 3), with(mapping(5, 9, 0), &[Advice::DontFork])];
        assert_eq!(steps(&list, &list), []);
    }

    #[test]
    fn what_is_new_goes_first_and_what_is_gone_comes_back_in_one_piece() {
        let (was, is) = ([mapping(10, 20, 3)], [mapping(12, 13, 3), mapping(30, 40, 3)]);
        let map = || Step::Map(Box::new(was[0].clone()));
        assert_eq!(steps(&was, &is), [(30..40, Step::Unmap), (10..12, map()), (13..20, map())]);
        assert_eq!(broken(&was, &is), [&was[0]]);
        assert_eq!(again(1, &was[0], &[], &|_| false).expect("steps"), [(10..20, map())]);
        let gaps = [(10..12, map()), (14..20, map())];
        assert_eq!(again(1, &was[0], &[12..14, 30..40], &|_| false).expect("steps"), gaps);
    }

    #[test]
    fn protection_and_advice_are_set_for_the_parts_that_differ() {
        let was = [with(mapping(10, 30, 3), &[Advice::DontFork])];
        let is = [with(mapping(10, 20, 1), &[Advice::DontFork]), mapping(20, 30, 1)];
        let expected = [(10..30, Step::Protect(3)), (20..30, Step::Advise(libc::MADV_DONTFORK))];
        assert_eq!(steps(&was, &is), expected);
    }

    #[test]
    fn locks_are_of_the_kind_that_they_were() {
        let lists = [&[][..], &[Advice::Locked], &[Advice::Locked, Advice::LockedOnFault]];
        let lists = lists.map(|advice| [with(mapping(1, 9, 3), advice)]);
        for (was, step) in lists.iter().zip([Step::Unlock, Step::Lock, Step::LockOnFault]) {
            for is in &lists {
                let expected = if was == is { vec![] } else { vec![(1..9, step.clone())] };
                assert_eq!(steps(was, is), expected);
            }
        }
    }

    #[test]
    fn a_word_about_huge_pages_is_only_taken_back_by_a_new_mapping() {
        let (was, is) = ([mapping(1, 9, 3)], [with(mapping(1, 9, 3), &[Advice::Huge])]);
        assert_eq!(steps(&was, &is), [(1..9, Step::Map(Box::new(was[0].clone())))]);
        assert_eq!(steps(&is, &was), [(1..9, Step::Advise(libc::MADV_HUGEPAGE))]);
    }

    #[test]
    fn a_stack_grows_and_the_heap_is_left_to_brk() {
        let stack = |start| Mapping { name: "[stack]".into(), ..with(mapping(start, 90, 3), &[Advice::GrowsDown]) };
        assert_eq!(steps(&[stack(70)], &[stack(80)]), [(70..80, Step::Grow)]);
        assert_eq!(steps(&[stack(80)], &[stack(70)]), [(70..80, Step::Unmap)]);
        assert_eq!(plan(1, &[mapping(10, 20, 3)], &[mapping(10, 15, 3)], &(10..20), &|_| false), Ok(vec![]));
        // Where no part of it is left it is made like any other.
        assert_eq!(steps(&[stack(80)], &[]), [(80..90, Step::Map(Box::new(stack(80))))]);
    }

    #[test]
    fn shared_memory_that_is_gone_is_refused() {
        let shared = with(Mapping { shared: true, inode: 7, ..mapping(1, 2, 3) }, &[Advice::SharedWritable]);
        assert_eq!(
            plan(9, &[shared], &[], &(0..0), &|_| false),
            Err(TemplateRefusal::Lost { pid: 9, kind: "shared memory", start: 1 })
        );
    }
}
