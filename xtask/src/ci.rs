//! `ci`: what the CI machine runs, in its order. A failing step does not hide what the later ones find.

use std::time::{Duration, Instant};

use crate::test::{self, Tally};
use crate::workspace::{self, Workspace};
use crate::{Reported, ebpf, setup, tidy};

type Step = fn(&Workspace) -> anyhow::Result<Tally>;

const STEPS: &[(&str, Step)] = &[
    ("setup", |w| one(setup::ensure(w))),
    ("fmt", |w| one(check_format(w))),
    ("clippy", |w| one(run_clippy(w))),
    ("tidy", |w| one(tidy::run(w))),
    ("docs", |w| one(build_docs(w))),
    ("build-ebpf", |w| one(ebpf::run(w))),
    ("test", |w| test::run_all(w, &test::Args::default())),
];

/// Runs every step. The last line is `ci: N passed, N failed`: each test counts, and each other step as one.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut tally = Tally::default();
    let mut summary = Vec::new();
    for (name, step) in STEPS {
        println!("\n== {name}");
        let step_begin = Instant::now();
        let result = step(workspace).unwrap_or_else(|err| {
            if !err.is::<Reported>() {
                println!("{err:#}");
            }
            Tally { passed: 0, failed: 1 }
        });
        let verdict = if result.failed == 0 { "ok" } else { "FAILED" };
        let line = format!("{name:<12} {verdict:<8} {:>8}", seconds(step_begin.elapsed()));
        println!("== {line}");
        summary.push(line);
        tally += result;
    }
    println!("\n{}\n{:<21} {:>8}", summary.join("\n"), "all", seconds(begin.elapsed()));
    println!("ci: {tally}");
    if tally.failed == 0 { Ok(()) } else { Err(Reported.into()) }
}

fn one(result: anyhow::Result<()>) -> anyhow::Result<Tally> {
    result.map(|()| Tally { passed: 1, failed: 0 })
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn check_format(workspace: &Workspace) -> anyhow::Result<()> {
    let mut outside = workspace.cargo("fmt");
    outside.args(["--check", "--manifest-path", "deltabox-ebpf/Cargo.toml"]);
    workspace::run(workspace.cargo("fmt").args(["--all", "--check"]))?;
    workspace::run(&mut outside)
}

fn run_clippy(workspace: &Workspace) -> anyhow::Result<()> {
    let mut command = workspace.cargo("clippy");
    command.args(["--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    workspace::run(&mut command)
}

fn build_docs(workspace: &Workspace) -> anyhow::Result<()> {
    let mut command = workspace.cargo("doc");
    command.args(["--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings");
    workspace::run(&mut command)
}
