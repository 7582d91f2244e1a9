//! Which layers of a stack to merge next.
//!
//! Blocks of `radix`, `radix`^2, ... layers, aligned to their size, counted from the base:
//! ```text
//!   radix 2     0 1 2 3 4 5 6 7 8 9 10
//!               [ ] [ ] [ ] [ ] [  ]          first
//!               [     ] [     ]               then
//!               [             ]               then: 3 directories are left of 11
//! ```
//! So a layer's content is copied once per power, and a stack of n layers ends with fewer than `radix` directories for
//! each power in n. Where a block begins does not depend on where the stack ends: stacks of one branch share theirs.

use std::ops::Range;

use super::stack::Step;

/// Which of `steps` (a stack's, the topmost first) one layer could stand for, if the stack has more than `bound`: the
/// lowest of the smallest blocks that are complete and not one yet. Runs that are `refused` are passed over.
pub fn run_to_merge(steps: &[Step], bound: usize, refused: impl Fn(&[Step]) -> bool) -> Option<Range<usize>> {
    if steps.len() <= bound {
        return None;
    }
    let depth = steps.first().map_or(0, |step| step.depth + step.n_layers);
    let radix = u64::try_from(bound / 2).map_or(u64::MAX, |radix| radix.max(2));
    let sizes = std::iter::successors(Some(radix), |size| size.checked_mul(radix));
    sizes.take_while(|size| *size <= depth).find_map(|size| {
        // From the base up.
        let mut end = steps.len();
        while end > 0 {
            let (begin, run) = block(&steps[..end], size);
            if run.is_some_and(|run| run.len() > 1 && !refused(run)) {
                return Some(begin..end);
            }
            end = begin;
        }
        None
    })
}

/// Where the block begins that the last of `steps` is in; and its steps, if they are just that block.
fn block(steps: &[Step], size: u64) -> (usize, Option<&[Step]>) {
    let Some(lowest) = steps.last() else { return (0, None) };
    let top = (lowest.depth / size + 1) * size;
    let begin = steps.iter().rposition(|step| step.depth >= top).map_or(0, |at| at + 1).min(steps.len() - 1);
    let run = &steps[begin..];
    let ends = run.first().is_some_and(|step| step.depth + step.n_layers == top);
    (begin, (ends && lowest.depth % size == 0).then_some(run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltafs::layer::LayerId;

    /// A stack, the topmost first, that grows by a layer at a time and is merged as told.
    fn grow(n: u64, bound: usize, mut check: impl FnMut(&[Step], u64)) {
        let (mut steps, mut n_copied): (Vec<Step>, u64) = (Vec::new(), 0);
        for depth in 0..n {
            let name = LayerId(depth + 1);
            steps.insert(
                0,
                Step { name, id: name, parent: depth.checked_sub(1).map(|_| LayerId(depth)), n_layers: 1, depth },
            );
            while let Some(run) = run_to_merge(&steps, bound, |_| false) {
                let (first, last) = (steps[run.start], steps[run.end - 1]);
                let n_layers = first.depth + first.n_layers - last.depth;
                assert_eq!(last.depth % n_layers, 0, "aligned to its size");
                assert!(run.len() > 1);
                n_copied += n_layers;
                steps.splice(run, [Step { n_layers, ..last }]);
            }
            let mut at = 0;
            for step in steps.iter().rev() {
                assert_eq!(step.depth, at, "without a gap");
                at += step.n_layers;
            }
            assert_eq!(at, depth + 1);
            check(&steps, n_copied);
        }
    }

    #[test]
    fn a_stack_stays_short_and_a_layer_is_copied_once_per_power() {
        for (bound, n, longest) in [(2, 3_000, 13), (4, 3_000, 13), (8, 4_000, 19), (32, 10_000, 61)] {
            let (mut most, mut copied) = (0, 0);
            grow(n, bound, |steps, n_copied| {
                most = most.max(steps.len());
                copied = n_copied;
            });
            assert!(most <= longest, "{most} directories at most above {bound}");
            let radix = u32::try_from(bound / 2).unwrap().max(2);
            let powers = n.ilog(u64::from(radix));
            assert!(copied <= n * u64::from(powers), "{copied} layers copied of {n}");
        }
    }

    #[test]
    fn a_short_stack_is_left_alone_and_a_refused_run_passed_over() {
        let steps: Vec<_> = (0..6)
            .rev()
            .map(|depth| Step { name: LayerId(depth + 1), id: LayerId(depth + 1), parent: None, n_layers: 1, depth })
            .collect();
        assert_eq!(run_to_merge(&steps, 6, |_| false), None);
        assert_eq!(run_to_merge(&steps, 4, |_| false), Some(4..6));
        assert_eq!(run_to_merge(&steps, 4, |run| run[0].depth == 1), Some(2..4));
        assert_eq!(run_to_merge(&steps, 4, |run| run.len() == 2), Some(2..6));
        assert_eq!(run_to_merge(&steps, 4, |_| true), None);
    }

    #[test]
    fn a_merged_layer_that_does_not_fit_a_block_is_no_part_of_one() {
        // Made under another bound.
        let step = |depth, n_layers| Step {
            name: LayerId(depth + n_layers),
            id: LayerId(depth + 100),
            parent: None,
            n_layers,
            depth,
        };
        let steps = [step(7, 1), step(6, 1), step(5, 1), step(4, 1), step(3, 1), step(0, 3)];
        assert_eq!(run_to_merge(&steps, 4, |_| false), Some(2..4));
    }
}
