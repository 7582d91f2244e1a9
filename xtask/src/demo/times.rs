//! What operations took, and the table of it.

use std::collections::BTreeMap;
use std::time::Duration;

/// Times by operation.
#[derive(Default)]
pub(super) struct Times {
    rows: BTreeMap<(&'static str, &'static str), Vec<Duration>>,
}

impl Times {
    /// Of one operation: as its caller saw it, and what the engine reports of it.
    pub(super) fn note(
        &mut self,
        what: &'static str,
        wall: Duration,
        total: Option<Duration>,
        stopped: Option<Duration>,
    ) {
        let all = [("command", Some(wall)), ("in the engine", total), ("programs stopped", stopped)];
        for (which, took) in all {
            if let Some(took) = took {
                self.rows.entry((what, which)).or_default().push(took);
            }
        }
    }

    /// All that commands of these operations took.
    pub(super) fn spent_on(&self, what: &[&str]) -> Duration {
        let of = |((name, which), times): (&(&str, &str), &Vec<Duration>)| {
            (what.contains(name) && *which == "command").then(|| times.iter().sum::<Duration>())
        };
        self.rows.iter().filter_map(of).sum()
    }

    pub(super) fn print(&self) {
        println!("{:<20} {:<17} {:>5} {:>9} {:>9} {:>9} {:>9}   ms", "", "", "n", "p50", "p90", "p99", "max");
        for ((what, which), times) in &self.rows {
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let at = |share: usize| sorted.get((sorted.len() * share).div_ceil(100).saturating_sub(1));
            let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
            let [p50, p90, p99, max] = [50, 90, 99, 100].map(|share| ms(at(share)));
            println!("{what:<20} {which:<17} {:>5} {p50:>9.2} {p90:>9.2} {p99:>9.2} {max:>9.2}", sorted.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_spent_is_what_commands_took() {
        let mut times = Times::default();
        let ms = Duration::from_millis;
        times.note("rollback", ms(5), Some(ms(3)), Some(ms(1)));
        times.note("rollback", ms(7), None, None);
        times.note("checkpoint", ms(2), None, None);
        times.note("tests", ms(100), None, None);
        assert_eq!(times.spent_on(&["rollback", "checkpoint"]), ms(14));
    }
}
