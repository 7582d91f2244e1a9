//! What was measured, as JSON for programs and as tables for people.

use std::fmt::Write;
use std::time::Duration;

use deltabox_tests::bench::Samples;
use serde_json::{Map, Value, json};

/// Stopped at 4 descriptions, as a multiple of mount + pivot.
const TARGET_STOPPED: f64 = 3.0;
/// An unchanged checkpoint, as a multiple of the bare stop + resume.
const TARGET_UNCHANGED: f64 = 1.5;

/// The phases during which the programs stand still, then the others.
const STOPPED: [&str; 7] = ["stop", "plan", "open", "pivot", "rebase", "seal", "resume"];
const RUNNING: [&str; 3] = ["queue", "arm", "manifest"];

/// One operation of one cell.
#[derive(Default)]
pub(crate) struct Timed {
    stopped: Samples,
    total: Samples,
    phases: Vec<(String, Samples)>,
}

impl Timed {
    pub(crate) fn record(&mut self, stopped_us: u64, total: Duration, phases: &[(&str, u64)]) {
        self.stopped.record(Duration::from_micros(stopped_us));
        self.total.record(total);
        for &(name, us) in phases {
            let at = self.phases.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
                self.phases.push((name.to_owned(), Samples::default()));
                self.phases.len() - 1
            });
            self.phases[at].1.record(Duration::from_micros(us));
        }
    }

    pub(crate) fn describe(&self) -> Value {
        let phases: Map<_, _> = self.phases.iter().map(|(name, took)| (name.clone(), quantiles(took))).collect();
        json!({ "stopped": quantiles(&self.stopped), "total": quantiles(&self.total), "phases": phases })
    }
}

/// Microseconds.
pub(crate) fn quantiles(samples: &Samples) -> Value {
    json!({
        "n": samples.n(),
        "p50_us": samples.quantile_us(0.5),
        "p90_us": samples.quantile_us(0.9),
        "p99_us": samples.quantile_us(0.99),
        "max_us": samples.quantile_us(1.0),
    })
}

fn p50(value: &Value) -> f64 {
    value["p50_us"].as_f64().unwrap_or(0.0)
}

fn p99(value: &Value) -> f64 {
    value["p99_us"].as_f64().unwrap_or(0.0)
}

/// Stopped and total against the floors, then the phases' medians, then the baselines.
pub(crate) fn table(rows: &[Value]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<18}{:<11}{:>4} {:>8} {:>8} {:>8} {:>8} {:>7} {:>8} {:>7} {:>7}",
        "us", "", "n", "stopped", "p99", "total", "p99", "floor", "x floor", "(pivot)", "bare"
    );
    let operations = ["checkpoint", "rollback"];
    for (row, name) in rows.iter().flat_map(|row| operations.map(|name| (row, name))) {
        let [stopped, total] = ["stopped", "total"].map(|what| &row[name][what]);
        let [floor, pivot, bare] = ["floor", "floor_pivot", "stop"].map(|what| p50(&row[what]));
        let (cell, n) = (row["cell"].as_str().unwrap_or(""), row["n"].as_u64().unwrap_or(0));
        let _ = writeln!(
            text,
            "{cell:<18}{name:<11}{n:>4} {:>8.0} {:>8.0} {:>8.0} {:>8.0} {floor:>7.0} {:>8.2} {pivot:>7.0} {bare:>7.0}",
            p50(stopped),
            p99(stopped),
            p50(total),
            p99(total),
            p50(stopped) / floor
        );
    }
    let phases = || STOPPED.into_iter().chain(RUNNING);
    let _ = write!(text, "\n{:<18}{:<11}", "phases, p50", "");
    phases().for_each(|phase| _ = write!(text, " {phase:>8}"));
    for (row, name) in rows.iter().flat_map(|row| operations.map(|name| (row, name))) {
        let _ = write!(text, "\n{:<18}{name:<11}", row["cell"].as_str().unwrap_or(""));
        phases().for_each(|phase| _ = write!(text, " {:>8.0}", p50(&row[name]["phases"][phase])));
    }
    let _ = writeln!(text, "\n\n{:<18} {:>8} {:>8} {:>8}", "copies, p50", "cp -a", "rsync -a", "tar");
    for row in rows {
        let _ = write!(text, "{:<18}", row["cell"].as_str().unwrap_or(""));
        for tool in ["cp", "rsync", "tar"] {
            match &row["baselines"][tool] {
                Value::Null => _ = write!(text, " {:>8}", "-"),
                took => _ = write!(text, " {:>8.0}", p50(took)),
            }
        }
        text.push('\n');
    }
    text
}

/// One line for each target and store.
pub(crate) fn targets(stores: &[Value]) -> String {
    let mut text = String::new();
    let mut judge = |store: &Value, cell: &str, operation: &str, of: &str, limit: f64| {
        let rows = store["rows"].as_array().into_iter().flatten();
        let Some(row) = rows.into_iter().find(|row| row["cell"] == cell) else { return };
        let (stopped, against) = (p50(&row[operation]["stopped"]), p50(&row[of]));
        let ratio = stopped / against;
        let word = if ratio <= limit { "met" } else { "missed" };
        let store = store["store"].as_str().unwrap_or("");
        let of = if of == "floor" { "mount + pivot_root" } else { "the bare stop + resume" };
        let _ = writeln!(
            text,
            "target: {store}, {cell}: {operation} stopped at most {limit} times {of}: {word} ({stopped:.0} us, \
             {against:.0} us, {ratio:.2})"
        );
    };
    for store in stores {
        for (cell, operation) in
            [("base", "checkpoint"), ("base", "rollback"), ("read-only", "checkpoint"), ("read-only", "rollback")]
        {
            judge(store, cell, operation, "floor", TARGET_STOPPED);
        }
        judge(store, "unchanged", "checkpoint", "stop", TARGET_UNCHANGED);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_judged_by_medians_of_the_same_row() {
        let us = |us: f64| json!({ "p50_us": us });
        let row = |cell: &str, stopped: f64| {
            let operation = json!({ "stopped": us(stopped) });
            json!({ "cell": cell, "checkpoint": operation, "rollback": operation, "floor": us(100.0), "stop": us(40.0) })
        };
        let store = json!({ "store": "tmpfs", "rows": [row("base", 300.0), row("unchanged", 61.0)] });
        let text = targets(&[store]);
        let words: Vec<_> = text.lines().map(|line| (line.contains(": met"), line.contains(": missed"))).collect();
        assert_eq!(words, [(true, false), (true, false), (false, true)], "{text}");
    }

    #[test]
    fn phases_are_kept_apart_and_in_order() {
        let mut timed = Timed::default();
        timed.record(10, Duration::from_micros(30), &[("stop", 4), ("open", 6)]);
        timed.record(12, Duration::from_micros(32), &[("stop", 4), ("open", 8)]);
        let value = timed.describe();
        assert_eq!((value["phases"]["open"]["n"].as_u64(), value["stopped"]["n"].as_u64()), (Some(2), Some(2)));
        assert!(table(&[json!({ "cell": "base", "n": 2, "checkpoint": value })]).contains("base"));
    }
}
