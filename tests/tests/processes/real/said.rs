//! What a program says of itself: a line for each lap that it has run, in files that go back with it.
//!
//! ```text
//!   /srv/said.NAME        LAP MILLISECONDS STATE...      laps without a gap; every thousandth begins the file anew,
//!   /srv/said.NAME.old                                   and the one that was there takes this name
//! ```
//! The state of a lap (counter, next numbers of its generator, hash of its heap) follows from its number alone, so each
//! lap must say the same whenever it is run. The time comes from the clock, which no rollback turns back: it tells the
//! laps from before a checkpoint and after a rollback from those between, which must not be there.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// One lap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lap {
    pub(super) number: u64,
    /// Since the Unix epoch, when it was run.
    pub(super) ms: u64,
    pub(super) state: String,
}

/// One file, and all that was ever said in it.
#[derive(Debug)]
pub(super) struct Voice {
    name: String,
    path: PathBuf,
    known: BTreeMap<u64, String>,
}

impl Voice {
    /// Of the file `/srv/said.NAME` below `root`.
    pub(super) fn new(root: &Path, name: &str) -> Self {
        Self { name: name.to_owned(), path: root.join(format!("srv/said.{name}")), known: BTreeMap::new() }
    }

    /// The laps that are there now; each must be what it was before, if it is run again.
    pub(super) fn hear(&mut self) -> Result<Vec<Lap>, String> {
        let laps = self.read()?;
        for lap in &laps {
            let first = self.known.entry(lap.number).or_insert_with(|| lap.state.clone());
            if *first != lap.state {
                return Err(format!("{}: lap {} says `{}`, it was `{first}`", self.name, lap.number, lap.state));
            }
        }
        Ok(laps)
    }

    /// What it is called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// How many different laps were heard.
    pub(super) fn n_known(&self) -> usize {
        self.known.len()
    }

    fn read(&self) -> Result<Vec<Lap>, String> {
        // Between the two readings the one can become the other.
        let mut failure = String::new();
        for _ in 0..10 {
            let read = |path: &Path| match fs::read_to_string(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
                other => other.map_err(|error| format!("{}: {error}", path.display())),
            };
            let old = read(&self.path.with_added_extension("old"))?;
            match parse(&(old + &read(&self.path)?)) {
                Ok(laps) => return Ok(laps),
                Err(error) => failure = error,
            }
        }
        Err(format!("{}: {failure}", self.name))
    }
}

/// Now, as programs say it.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The laps of a text; the last line may not be whole yet.
fn parse(text: &str) -> Result<Vec<Lap>, String> {
    let mut laps: Vec<Lap> = Vec::new();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for line in whole.lines() {
        let mut words = line.splitn(3, ' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let (Some(number), Some(ms), Some(state)) = (number(), number(), words.next()) else {
            return Err(format!("`{line}` is no lap"));
        };
        if laps.last().is_some_and(|last| last.number + 1 != number) {
            return Err(format!("lap {number} after {}", number_of(&laps)));
        }
        laps.push(Lap { number, ms, state: state.to_owned() });
    }
    Ok(laps)
}

fn number_of(laps: &[Lap]) -> u64 {
    laps.last().map_or(0, |lap| lap.number)
}

/// When a checkpoint was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    pub(super) begun_ms: u64,
    pub(super) done_ms: u64,
}

/// The last lap of a checkpoint, from what is there when a rollback to it, begun at `back_ms`, is done: all laps are from
/// before it or from after the rollback.
pub(super) fn last_before(laps: &[Lap], made: Made, back_ms: u64) -> Result<u64, String> {
    let first_after = laps.partition_point(|lap| lap.ms < back_ms);
    let Some(last) = laps[..first_after].last() else {
        // It may have been made before the first lap.
        let is_first = laps.first().is_none_or(|lap| lap.number == 1);
        return if is_first {
            Ok(0)
        } else {
            Err(format!("all of {laps:?} is younger than the rollback at {back_ms}"))
        };
    };
    if last.ms > made.done_ms {
        return Err(format!("lap {} of {} is of a branch left at {back_ms}; {made:?}", last.number, last.ms));
    }
    Ok(last.number)
}

/// The laps that a checkpoint may end with, from what is there when it has just been made: first and last.
pub(super) fn bracket(laps: &[Lap], made: Made) -> (u64, u64) {
    let at = |ms: u64| number_of(&laps[..laps.partition_point(|lap| lap.ms <= ms)]);
    // A lap takes its time before it writes it down: one more may be under way.
    (at(made.begun_ms.saturating_sub(1)), at(made.done_ms) + 1)
}

#[test]
fn laps_are_read_line_by_line_and_none_may_be_missing() {
    let lap = |number, ms, state: &str| Lap { number, ms, state: state.to_owned() };
    assert_eq!(parse("7 100 a b\n8 101 c\n9 10"), Ok(vec![lap(7, 100, "a b"), lap(8, 101, "c")]));
    assert_eq!(parse(""), Ok(vec![]));
    assert!(parse("7 100 a\n9 101 b\n").is_err());
    assert!(parse("7 100 a\nx 101 b\n").is_err());
}

#[test]
fn a_lap_of_a_branch_that_was_left_is_found() {
    let laps: Vec<_> = (1..=6).map(|n| Lap { number: n, ms: 100 * n, state: String::new() }).collect();
    let made = Made { begun_ms: 310, done_ms: 350 };
    // Rolled back at 450: laps 5 and 6 were run after that; lap 4 should not be there.
    assert!(last_before(&laps, made, 450).is_err());
    // At 390: lap 4 is the first after it.
    assert_eq!(last_before(&laps, made, 390), Ok(3));
    assert_eq!(last_before(&laps, made, 50), Ok(0));
    assert!(last_before(&laps[1..], made, 50).is_err());
    assert_eq!(bracket(&laps, made), (3, 4));
}
