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
