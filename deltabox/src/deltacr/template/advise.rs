//! Mappings that a clone would lose or share, and the calls that prevent it. Pure.

use std::ops::Range;

use libc::pid_t;

use super::error::{TemplateError, TemplateRefusal};
use super::mapping::{Advice, Mapping};
use crate::deltacr::handover::call;
use crate::deltacr::inject::Call;

/// What is advised otherwise while the template is cloned: neighbours of one kind together.
#[derive(Debug)]
pub(super) struct Advised {
    ranges: Vec<(Range<u64>, Kind)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// MADV_DONTFORK: would be missing.
    Missing,
    /// MADV_WIPEONFORK: would be empty.
    Wiped,
    /// Both of them.
    MissingAndWiped,
    /// Would be shared, and is left out.
    Shared,
    /// Is left out as it is.
    SharedAndMissing,
}

impl Advised {
    pub(super) fn none() -> Self {
        Self { ranges: Vec::new() }
    }

    pub(super) fn find(pid: pid_t, mappings: &[Mapping]) -> Result<Self, TemplateError> {
        let mut ranges: Vec<(Range<u64>, Kind)> = Vec::new();
        for mapping in mappings.iter().filter(|mapping| !mapping.is_kernels()) {
            let refuse = |kind| TemplateRefusal::Mapping { pid, kind, start: mapping.start };
            if mapping.has(Advice::HugeTlb) {
                return Err(refuse("huge pages of hugetlbfs").into());
            }
            if mapping.has(Advice::Special) {
                return Err(refuse("memory of a device").into());
            }
            let missing = mapping.has(Advice::DontFork);
            // What may vanish at any time is not kept, nor may it be.
            let wiped = mapping.has(Advice::WipeOnFork) && !mapping.has(Advice::Droppable);
            let kind = match (mapping.has(Advice::SharedWritable), missing, wiped) {
                (true, false, _) => Kind::Shared,
                (true, true, _) => Kind::SharedAndMissing,
                (false, true, true) => Kind::MissingAndWiped,
                (false, true, false) => Kind::Missing,
                (false, false, true) => Kind::Wiped,
                (false, false, false) => continue,
            };
            match ranges.last_mut() {
                Some((last, other)) if last.end == mapping.start && *other == kind => last.end = mapping.end,
                _ => ranges.push((mapping.range(), kind)),
            }
        }
        Ok(Self { ranges })
    }

    /// What is advised in the batch that clones, in at most `n_calls` calls before and after it together, and what in
    /// batches of its own around that one. An engine that dies in between leaves the latter as the template needs it: so
    /// these are only ranges that a child does not get, and would get then.
    pub(super) fn split(self, n_calls: usize) -> (Self, Self) {
        let n_each = |kind: Kind| match kind {
            Kind::MissingAndWiped => 2,
            Kind::SharedAndMissing => 0,
            _ => 1,
        };
        let (missing, mut within): (Vec<_>, Vec<_>) =
            self.ranges.into_iter().partition(|(_, kind)| *kind == Kind::Missing);
        let n_taken: usize = within.iter().map(|(_, kind)| 2 * n_each(*kind)).sum();
        let n_more = (n_calls.saturating_sub(n_taken) / 2).min(missing.len());
        let mut missing = missing.into_iter();
        within.extend(missing.by_ref().take(n_more));
        (Self { ranges: within }, Self { ranges: missing.collect() })
    }

    pub(super) fn n_ranges(&self) -> usize {
        self.ranges.len()
    }

    /// Bytes that the template does not have.
    pub(super) fn left_out_bytes(&self) -> u64 {
        let left_out = |kind: &Kind| matches!(kind, Kind::Shared | Kind::SharedAndMissing);
        self.ranges.iter().filter(|(_, kind)| left_out(kind)).map(|(range, _)| range.end - range.start).sum()
    }

    pub(super) fn before(&self) -> Vec<Call> {
        self.calls(|kind| match kind {
            Kind::Missing => &[libc::MADV_DOFORK],
            Kind::Wiped => &[libc::MADV_KEEPONFORK],
            Kind::MissingAndWiped => &[libc::MADV_DOFORK, libc::MADV_KEEPONFORK],
            Kind::Shared => &[libc::MADV_DONTFORK],
            Kind::SharedAndMissing => &[],
        })
    }

    pub(super) fn after(&self) -> Vec<Call> {
        self.calls(|kind| match kind {
            Kind::Missing => &[libc::MADV_DONTFORK],
            Kind::Wiped => &[libc::MADV_WIPEONFORK],
            Kind::MissingAndWiped => &[libc::MADV_DONTFORK, libc::MADV_WIPEONFORK],
            Kind::Shared => &[libc::MADV_DOFORK],
            Kind::SharedAndMissing => &[],
        })
    }

    fn calls(&self, advice: impl Fn(Kind) -> &'static [i32]) -> Vec<Call> {
        let one = |range: &Range<u64>, advice: i32| {
            call(libc::SYS_madvise, &[range.start, range.end - range.start, advice.cast_unsigned().into()])
        };
        self.ranges
            .iter()
            .flat_map(|(range, kind)| advice(*kind).iter().map(move |advice| one(range, *advice)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advised(kinds: &[(Kind, u64)]) -> Advised {
        let ranges = kinds.iter().flat_map(|(kind, n)| (0..*n).map(|at| (at * 8192..at * 8192 + 4096, *kind)));
        Advised { ranges: ranges.collect() }
    }

    #[test]
    fn only_what_a_child_could_get_as_well_is_advised_apart() {
        let (within, apart) = advised(&[(Kind::Wiped, 3), (Kind::Missing, 500), (Kind::Shared, 2)]).split(100);
        assert_eq!((within.n_ranges(), within.before().len() + within.after().len()), (50, 100));
        assert!(apart.n_ranges() == 455 && apart.ranges.iter().all(|(_, kind)| *kind == Kind::Missing));
        let (within, apart) = advised(&[(Kind::MissingAndWiped, 30)]).split(100);
        // More than there is room for: refused elsewhere.
        assert_eq!((within.n_ranges(), within.before().len() + within.after().len(), apart.n_ranges()), (30, 120, 0));
        let (within, apart) = advised(&[(Kind::Missing, 50)]).split(100);
        assert_eq!((within.n_ranges(), apart.n_ranges()), (50, 0));
    }
}
