//! Resource limits of a process.
//!
//! A hard limit that was lowered stays so: to raise it takes CAP_SYS_RESOURCE in the first user namespace, which no sandbox
//! and not every engine has. The calls are the process's own: for those of another an engine needs its user.

use serde::{Deserialize, Serialize};

use super::batch::{Asked, Batch, Room};
use super::error::StateError;
use super::impossible::{Impossible, Judge};

/// RLIM_NLIMITS.
const N_LIMITS: usize = 16;
const LIMIT_BYTES: usize = 16;
/// By their numbers.
const NAMES: [&str; N_LIMITS] = [
    "the limit of CPU time",
    "the limit of file sizes",
    "the limit of data",
    "the limit of the stack",
    "the limit of core files",
    "the limit of resident memory",
    "the limit of processes",
    "the limit of descriptors",
    "the limit of locked memory",
    "the limit of address space",
    "the limit of file locks",
    "the limit of waiting signals",
    "the limit of message queues",
    "the limit of nice",
    "the limit of real-time priority",
    "the limit of real-time CPU time",
];

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Limits {
    each: [Limit; N_LIMITS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Limit {
    soft: u64,
    hard: u64,
}

/// What was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Questions {
    room: Room,
    asked: [Asked; N_LIMITS],
}

impl Limits {
    /// Asks the process.
    pub(super) fn ask(batch: &mut Batch) -> Questions {
        let room = batch.room(N_LIMITS * LIMIT_BYTES);
        let asked = std::array::from_fn(|number| {
            let at = room.at + (number * LIMIT_BYTES) as u64;
            batch.add("prlimit64", libc::SYS_prlimit64, &[0, number as u64, 0, at])
        });
        Questions { room, asked }
    }

    /// Takes the answers.
    pub(super) fn answer(batch: &Batch, asked: &Questions) -> Result<Self, StateError> {
        let mut each = [Limit::default(); N_LIMITS];
        let bytes = batch.bytes(asked.room).chunks_exact(LIMIT_BYTES);
        for ((limit, asked), bytes) in each.iter_mut().zip(asked.asked).zip(bytes) {
            batch.answer(asked)?;
            let word = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
            *limit = Limit { soft: word(0), hard: word(8) };
        }
        Ok(Self { each })
    }

    /// Whether there is a way back from `now`.
    pub(super) fn judge(&self, now: &Self, judge: &Judge) -> Result<(), Impossible> {
        for ((was, is), name) in self.each.iter().zip(&now.each).zip(NAMES) {
            let text = |limit: &Limit| format!("{} of at most {}", limit.soft, limit.hard);
            judge.unless(was.hard <= is.hard, name, text(was), text(is))?;
        }
        Ok(())
    }

    /// The steps back from `now`.
    pub(super) fn change(&self, now: &Self, batch: &mut Batch) {
        for (number, (was, is)) in self.each.iter().zip(&now.each).enumerate() {
            if was != is {
                let at = batch.input(&[was.soft.to_le_bytes(), was.hard.to_le_bytes()].concat());
                batch.add("prlimit64", libc::SYS_prlimit64, &[0, number as u64, at, 0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limits_go_both_ways_and_hard_ones_only_down() {
        let limits = |soft, hard| Limits { each: [Limit { soft, hard }; N_LIMITS] };
        let judge = Judge { pid: 7 };
        for (was, is) in
            [(limits(5, 10), limits(10, 10)), (limits(10, 10), limits(0, 10)), (limits(1, 5), limits(1, 9))]
        {
            assert_eq!(was.judge(&is, &judge), Ok(()));
        }
        let refused = limits(5, 10).judge(&limits(5, 9), &judge).expect_err("a lowered hard limit");
        let text =
            "process 7 (inside) cannot be what it was: the limit of CPU time was 5 of at most 10, is 5 of at most 9";
        assert_eq!(refused.to_string(), text);
    }
}
