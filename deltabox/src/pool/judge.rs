//! Whether there is room for another checkpoint. Pure.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::sandbox::{PoolBounds as Bounds, SandboxId};

/// What templates take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Weight {
    /// How many.
    pub n_templates: usize,
    /// Their memory, bytes (PSS), when it was last measured.
    pub bytes: u64,
}

impl std::ops::Add for Weight {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { n_templates: self.n_templates + other.n_templates, bytes: self.bytes + other.bytes }
    }
}

/// Whose bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The sandbox's own.
    Sandbox,
    /// That of all sandboxes together.
    Host,
}

/// Which bound has been reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// So many templates.
    Templates(usize),
    /// So many bytes.
    Bytes(u64),
}

/// How many more templates may be made, at least one, or the bound that is in the way.
///
/// `held`: with those that are just being made. Of memory it is not known ahead what a template will take: new ones are
/// made until the bound is reached.
pub(super) fn judge(bounds: [(Whose, Bounds, Weight); 2]) -> Result<usize, (Whose, Reached)> {
    let mut room = usize::MAX;
    for (whose, bounds, held) in bounds {
        if let Some(most) = bounds.bytes.filter(|most| held.bytes >= *most) {
            return Err((whose, Reached::Bytes(most)));
        }
        if let Some(most) = bounds.n_templates {
            if held.n_templates >= most {
                return Err((whose, Reached::Templates(most)));
            }
            room = room.min(most - held.n_templates);
        }
    }
    Ok(room)
}

/// A checkpoint whose removal would make room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Whose.
    pub sandbox: SandboxId,
    /// Its number.
    pub checkpoint: u32,
    /// What goes with it.
    pub weight: Weight,
    /// How long nobody has made it or gone back to it.
    pub unused: Duration,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sandbox, checkpoint, weight: Weight { n_templates, bytes }, unused } = self;
        let seconds = unused.as_secs();
        write!(f, "{sandbox}@c{checkpoint} ({n_templates} templates, {}, unused for {seconds} s)", Size(*bytes))
    }
}

/// Those whose removal frees most, the longest unused of equals first.
pub(super) fn largest(mut candidates: Vec<Candidate>, n: usize) -> Vec<Candidate> {
    let order = |one: &Candidate| (one.weight.bytes, one.weight.n_templates, one.unused);
    candidates.retain(|one| one.weight.n_templates > 0);
    candidates.sort_by_key(|one| std::cmp::Reverse(order(one)));
    candidates.truncate(n);
    candidates
}

/// Bytes for people.
pub(super) struct Size(pub(super) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes < 10 << 20 => write!(f, "{} KiB", bytes >> 10),
            bytes => write!(f, "{} MiB", bytes >> 20),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(n_templates: usize, bytes: u64) -> Weight {
        Weight { n_templates, bytes }
    }

    #[test]
    fn the_nearest_bound_decides() {
        let bounds = |n_templates, bytes| Bounds { n_templates, bytes };
        let none = Bounds::default();
        let judged = |own: Bounds, own_held, host: Bounds, host_held| {
            judge([(Whose::Sandbox, own, own_held), (Whose::Host, host, host_held)])
        };
        assert_eq!(judged(none, held(1000, 1 << 50), none, held(9000, 1 << 60)), Ok(usize::MAX));
        assert_eq!(judged(bounds(Some(10), None), held(7, 0), none, held(7, 0)), Ok(3));
        assert_eq!(judged(bounds(Some(10), None), held(7, 0), bounds(Some(8), None), held(7, 0)), Ok(1));
        let full = Err((Whose::Sandbox, Reached::Templates(7)));
        assert_eq!(judged(bounds(Some(7), None), held(7, 0), none, held(7, 0)), full);
        let full = Err((Whose::Host, Reached::Bytes(100)));
        assert_eq!(judged(bounds(None, Some(200)), held(1, 99), bounds(None, Some(100)), held(2, 100)), full);
        assert_eq!(
            judged(bounds(None, Some(200)), held(1, 199), bounds(None, Some(300)), held(2, 299)),
            Ok(usize::MAX)
        );
        assert_eq!(
            judged(bounds(Some(0), None), held(0, 0), none, held(0, 0)),
            Err((Whose::Sandbox, Reached::Templates(0)))
        );
    }

    #[test]
    fn the_largest_are_named_and_none_that_frees_nothing() {
        let one = |checkpoint, weight, seconds| Candidate {
            sandbox: "a".parse().expect("a name"),
            checkpoint,
            weight,
            unused: Duration::from_secs(seconds),
        };
        let all = vec![one(1, held(1, 5), 9), one(2, held(0, 0), 99), one(3, held(1, 7), 1), one(4, held(1, 5), 10)];
        let numbers = |n| largest(all.clone(), n).iter().map(|one| one.checkpoint).collect::<Vec<_>>();
        assert_eq!(numbers(9), [3, 4, 1]);
        assert_eq!(numbers(2), [3, 4]);
    }
}
