//! What was measured, as JSON for programs and as tables for people, held against the targets.

use std::fmt::Write;
use std::time::Duration;

use deltabox::engine::{CheckpointReport, PhaseTime, RollbackReport};
use deltabox_tests::bench::Samples;
use serde_json::{Map, Value, json};

use crate::criu::Took;

/// Stopped for a checkpoint: at most so many times the bare fork, and so many microseconds.
const TARGET_FORK: f64 = 1.5;
const TARGET_STOPPED_US: f64 = 1000.0;
/// Rollback with 1 % dirty: this part of CRIU's restore, by megabytes.
const TARGET_RESTORE: [(u64, f64); 2] = [(50, 20.0), (500, 60.0)];

/// One cell.
#[derive(Default)]
pub(crate) struct Timed {
    stopped: Samples,
    checkpoint_total: Samples,
    checkpoint_phases: Phases,
    rollback_stopped: Samples,
    running: Samples,
    replied: Samples,
    answered: Samples,
    rollback_phases: Phases,
    fork: Samples,
    kill: Samples,
    copy: Samples,
    dump: Samples,
    frozen: Samples,
    restore: Samples,
    cp: Samples,
}

/// Samples of each phase, in order of appearance.
#[derive(Default)]
struct Phases(Vec<(String, Samples)>);

impl Phases {
    fn record(&mut self, times: &[PhaseTime]) {
        for PhaseTime { phase, us } in times {
            let at = self.0.iter().position(|(known, _)| known == phase).unwrap_or_else(|| {
                self.0.push((phase.clone(), Samples::default()));
                self.0.len() - 1
            });
            self.0[at].1.record(Duration::from_micros(*us));
        }
    }

    fn describe(&self) -> Value {
        let all: Map<_, _> = self.0.iter().map(|(name, took)| (name.clone(), quantiles(took))).collect();
        Value::Object(all)
    }
}

impl Timed {
    pub(crate) fn record_checkpoint(&mut self, report: &CheckpointReport, total: Duration) {
        self.stopped.record(Duration::from_micros(report.stopped_us));
        self.checkpoint_total.record(total);
        self.checkpoint_phases.record(&report.phases_us);
    }

    pub(crate) fn record_rollback(&mut self, report: &RollbackReport, [running, replied, answered]: [Duration; 3]) {
        self.rollback_stopped.record(Duration::from_micros(report.stopped_us));
        self.rollback_phases.record(&report.phases_us);
        self.running.record(running);
        self.replied.record(replied);
        self.answered.record(answered);
    }

    pub(crate) fn record_floors(&mut self, fork: Duration, kill: Duration, copy: Duration) {
        self.fork.record(fork);
        self.kill.record(kill);
        self.copy.record(copy);
    }

    pub(crate) fn record_criu(&mut self, took: Took) {
        self.dump.record(Duration::from_micros(took.dump_us));
        self.frozen.record(Duration::from_micros(took.frozen_us));
        self.restore.record(Duration::from_micros(took.restore_us));
    }

    pub(crate) fn record_cp(&mut self, took: Duration) {
        self.cp.record(took);
    }

    pub(crate) fn describe(&self, row: &mut Value) {
        row["checkpoint"] = json!({
            "stopped": quantiles(&self.stopped),
            "total": quantiles(&self.checkpoint_total),
            "phases": self.checkpoint_phases.describe(),
        });
        row["rollback"] = json!({
            "running": quantiles(&self.running),
            "answered": quantiles(&self.answered),
            "stopped": quantiles(&self.rollback_stopped),
            "total": quantiles(&self.replied),
            "phases": self.rollback_phases.describe(),
        });
        row["floors"] = json!({
            "fork": quantiles(&self.fork),
            "kill": quantiles(&self.kill),
            "copy": quantiles(&self.copy),
        });
        row["criu"] = json!({
            "dump": quantiles(&self.dump),
            "frozen": quantiles(&self.frozen),
            "restore": quantiles(&self.restore),
        });
        row["cp"] = quantiles(&self.cp);
    }
}

/// Microseconds.
pub(crate) fn quantiles(samples: &Samples) -> Value {
    json!({
        "n": samples.n(),
        "p50_us": samples.quantile_us(0.5),
        "p90_us": samples.quantile_us(0.9),
        "p99_us": samples.quantile_us(0.99),
        "p99_9_us": samples.quantile_us(0.999),
        "max_us": samples.quantile_us(1.0),
    })
}

fn p50(value: &Value) -> f64 {
    value["p50_us"].as_f64().unwrap_or(0.0)
}

/// Adds what was to be reached, what was, and whether it is enough: by medians.
pub(crate) fn judge(row: &mut Value) {
    let (stopped, fork) = (p50(&row["checkpoint"]["stopped"]), p50(&row["floors"]["fork"]));
    let limit = TARGET_FORK * fork + TARGET_STOPPED_US;
    let mut targets = vec![json!({
        "what": "stopped",
        "limit_us": limit,
        "reached_us": stopped,
        "factor": stopped / fork,
        "met": stopped <= limit,
    })];
    let (running, restore) = (p50(&row["rollback"]["running"]), p50(&row["criu"]["restore"]));
    if restore > 0.0 {
        let is_small = row["dirty_percent"].as_f64().is_some_and(|percent| percent <= 1.0);
        let part = TARGET_RESTORE.iter().find(|(mb, _)| is_small && row["mb"] == *mb).map(|(_, part)| *part);
        let limit = part.map(|part| restore / part);
        targets.push(json!({
            "what": "rollback",
            "limit_us": limit,
            "reached_us": running,
            "factor": restore / running,
            "met": limit.map(|limit| running <= limit),
        }));
    }
    row["targets"] = json!(targets);
}

fn name(row: &Value) -> String {
    let busy = if row["busy"] == true { "busy" } else { "idle" };
    format!("{} {:.0} % {busy}", row["program"].as_str().unwrap_or(""), row["dirty_percent"].as_f64().unwrap_or(0.0))
}

/// One cell in a line, while it goes on.
pub(crate) fn line(row: &Value) -> String {
    let quantile = |value: &Value| format!("{:.0}", p50(value));
    format!(
        "{}: stopped {} us (fork {}), rolled back and running after {} us (CRIU's restore {})",
        name(row),
        quantile(&row["checkpoint"]["stopped"]),
        quantile(&row["floors"]["fork"]),
        quantile(&row["rollback"]["running"]),
        quantile(&row["criu"]["restore"]),
    )
}

const QUANTILES: [&str; 4] = ["p50_us", "p90_us", "p99_us", "p99_9_us"];

/// All tables.
pub(crate) fn tables(rows: &[Value]) -> String {
    let mut text = String::from("\nAll times in microseconds.\n\n");
    checkpoints(&mut text, rows);
    rollbacks(&mut text, rows);
    let cut = |text: &mut String| text.push('\n');
    cut(&mut text);
    phases(&mut text, rows, "checkpoint");
    cut(&mut text);
    phases(&mut text, rows, "rollback");
    cut(&mut text);
    criu(&mut text, rows);
    cut(&mut text);
    text
}

fn checkpoints(text: &mut String, rows: &[Value]) {
    text.push_str(
        "| checkpoint | n | memory MB | threads | stopped p50 | p90 | p99 | p99.9 | total p50 | bare fork | x fork | at most | target |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let target = &row["targets"][0];
        let _ = write!(text, "| {} | {} | {} | {} |", name(row), row["n"], megabytes(row), row["n_threads"]);
        many(text, &row["checkpoint"]["stopped"]);
        one(text, p50(&row["checkpoint"]["total"]));
        one(text, p50(&row["floors"]["fork"]));
        let _ = write!(text, " {:.2} |", target["factor"].as_f64().unwrap_or(0.0));
        one(text, target["limit_us"].as_f64().unwrap_or(0.0));
        let _ = writeln!(text, " {} |", word(target));
    }
    text.push('\n');
}

fn rollbacks(text: &mut String, rows: &[Value]) {
    text.push_str(
        "| rollback | runs p50 | p90 | p99 | p99.9 | exec p50 | p90 | p99 | p99.9 | stopped p50 | kill + reap | memcpy | CRIU restore | its factor | at most | target |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let _ = write!(text, "| {} |", name(row));
        many(text, &row["rollback"]["running"]);
        many(text, &row["rollback"]["answered"]);
        one(text, p50(&row["rollback"]["stopped"]));
        one(text, p50(&row["floors"]["kill"]));
        one(text, p50(&row["floors"]["copy"]));
        let target = &row["targets"][1];
        if target.is_null() {
            text.push_str(" skipped | | | |\n");
            continue;
        }
        one(text, p50(&row["criu"]["restore"]));
        let _ = write!(text, " {:.1} |", target["factor"].as_f64().unwrap_or(0.0));
        match target["limit_us"].as_f64() {
            Some(limit) => one(text, limit),
            None => text.push_str(" |"),
        }
        let _ = writeln!(text, " {} |", word(target));
    }
}

fn phases(text: &mut String, rows: &[Value], operation: &str) {
    // Those that any cell has, in the order of the first one that does.
    let mut names: Vec<&String> = Vec::new();
    for row in rows {
        let phases = row[operation]["phases"].as_object();
        names.extend(phases.into_iter().flatten().map(|(name, _)| name));
    }
    let order = [
        "queue", "arm", "stop", "plan", "take", "open", "prepare", "pivot", "kill", "restore", "rebase", "seal",
        "resume", "describe", "manifest",
    ];
    let names: Vec<_> = order.into_iter().filter(|name| names.iter().any(|known| *known == name)).collect();
    let _ = writeln!(text, "| phases of a {operation}, p50 | {} |", names.join(" | "));
    let _ = writeln!(text, "|---|{}", "---|".repeat(names.len()));
    for row in rows {
        let _ = write!(text, "| {} |", name(row));
        for phase in &names {
            match &row[operation]["phases"][phase] {
                Value::Null => text.push_str(" |"),
                took => one(text, p50(took)),
            }
        }
        text.push('\n');
    }
}

fn criu(text: &mut String, rows: &[Value]) {
    text.push_str(
        "| CRIU | n | dump p50 | p99 | of it frozen p50 | restore p50 | p99 | cp -a |\n|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let _ = write!(text, "| {} |", name(row));
        let criu = &row["criu"];
        if criu["restore"]["n"].as_u64().unwrap_or(0) == 0 {
            let _ = writeln!(text, " skipped: {} |", criu["skipped"].as_str().unwrap_or("no CRIU").replace('\n', " "));
            continue;
        }
        let _ = write!(text, " {} |", criu["restore"]["n"]);
        one(text, p50(&criu["dump"]));
        one(text, criu["dump"]["p99_us"].as_f64().unwrap_or(0.0));
        one(text, p50(&criu["frozen"]));
        one(text, p50(&criu["restore"]));
        one(text, criu["restore"]["p99_us"].as_f64().unwrap_or(0.0));
        one(text, p50(&row["cp"]));
        text.push('\n');
    }
}

fn many(text: &mut String, value: &Value) {
    QUANTILES.iter().for_each(|quantile| one(text, value[*quantile].as_f64().unwrap_or(0.0)));
}

fn one(text: &mut String, us: f64) {
    let _ = write!(text, " {us:.0} |");
}

fn megabytes(row: &Value) -> u64 {
    row["memory_bytes"].as_u64().unwrap_or(0) >> 20
}

fn word(target: &Value) -> &'static str {
    match target["met"].as_bool() {
        Some(true) => "met",
        Some(false) => "missed",
        None => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(stopped: f64, running: f64) -> Value {
        let us = |us: f64| json!({ "p50_us": us });
        json!({
            "program": "python-50", "mb": 50, "dirty_percent": 1.0, "busy": false,
            "checkpoint": { "stopped": us(stopped), "total": us(stopped), "phases": { "stop": us(4.0) } },
            "rollback": { "running": us(running) },
            "floors": { "fork": us(1000.0) },
            "criu": { "restore": us(60_000.0) },
        })
    }

    #[test]
    fn targets_are_judged_by_medians_of_the_same_row() {
        for (stopped, running, met) in [(2500.0, 3000.0, [true, true]), (2501.0, 3001.0, [false, false])] {
            let mut row = row(stopped, running);
            judge(&mut row);
            assert_eq!([&row["targets"][0]["met"], &row["targets"][1]["met"]], [&json!(met[0]), &json!(met[1])]);
        }
    }

    #[test]
    fn a_cell_without_criu_is_called_skipped() {
        let mut row = row(1.0, 1.0);
        row["criu"] = json!({ "skipped": "not here" });
        judge(&mut row);
        let text = tables(&[row]);
        assert!(text.contains("skipped: not here"), "{text}");
        assert!(text.contains("| python-50 1 % idle | 4 |"), "{text}");
    }
}
