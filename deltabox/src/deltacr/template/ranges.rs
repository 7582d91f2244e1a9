//! Sets of addresses: sorted lists of ranges that do not touch.

use std::ops::Range;

/// Adds a range to others that it comes after.
pub(super) fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// What two sorted lists have in common.
pub(super) fn within(left: &[Range<u64>], right: &[Range<u64>]) -> Vec<Range<u64>> {
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
pub(super) fn without(left: &[Range<u64>], right: &[Range<u64>]) -> Vec<Range<u64>> {
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

/// What is in either of two lists.
pub(super) fn union(left: &[Range<u64>], right: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = left.iter().chain(right).cloned().collect();
    all.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(all.len());
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Bytes in ranges. Address ranges of this machine fit.
pub(super) fn len_of(ranges: &[Range<u64>]) -> usize {
    ranges.iter().map(|range| usize::try_from(range.end - range.start).unwrap_or(usize::MAX)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltacr::template::pages::windows;
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
            let (common, rest, all) = (within(&left, &right), without(&left, &right), union(&left, &right));
            for at in 0..120 {
                prop_assert_eq!(holds(&common, at), holds(&left, at) && holds(&right, at));
                prop_assert_eq!(holds(&rest, at), holds(&left, at) && !holds(&right, at));
                prop_assert_eq!(holds(&all, at), holds(&left, at) || holds(&right, at));
            }
            let windows = windows(&left, &right);
            for at in 0..120 {
                let is_needed = holds(&left, at) && !holds(&right, at);
                prop_assert!(!is_needed || holds(&windows, at));
                prop_assert!(!holds(&windows, at) || holds(&left, at));
            }
            for list in [common, rest, all] {
                prop_assert!(list.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
