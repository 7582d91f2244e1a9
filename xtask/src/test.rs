//! `test`: makes the machine ready, builds the product, runs doc tests and nextest, counts.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::Reported;
use crate::setup::{self, nextest};
use crate::workspace::{self, Profile, Workspace};

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Only what needs no sandbox: every package but deltabox-tests.
    #[arg(long, conflicts_with = "sandbox")]
    unit: bool,
    /// Only the stories in real sandboxes: package deltabox-tests.
    #[arg(long)]
    sandbox: bool,
    /// The big counts (tests see `DELTABOX_SOAK=1`), without time limits.
    #[arg(long)]
    soak: bool,
    /// Cases of each property test (tests see `DELTABOX_CASES`); many want --soak, for the time.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    cases: Option<u64>,
    /// Where their random numbers begin (`DELTABOX_SEED`): a failure prints it.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Run only tests whose name contains this.
    filter: Option<String>,
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<()> {
    let tally = run_all(workspace, args)?;
    println!("tests: {tally}");
    if tally.failed == 0 { Ok(()) } else { Err(Reported.into()) }
}

/// Everything but the closing line. Fails when a test could not be built or none ran.
pub(crate) fn run_all(workspace: &Workspace, args: &Args) -> anyhow::Result<Tally> {
    if args.soak {
        setup::ensure_for_soak(workspace)?
    } else {
        setup::ensure(workspace)?
    }
    let product = workspace.build_binary("deltabox", "deltabox", Profile::Dev)?;
    let mut tally = Tally::default();
    if !args.sandbox {
        tally += run_doc_tests(workspace, args.filter.as_deref())?;
    }
    tally += run_nextest(workspace, args, &product)?;
    Ok(tally)
}

/// The examples in the library's documentation, which nextest cannot run.
fn run_doc_tests(workspace: &Workspace, filter: Option<&str>) -> anyhow::Result<Tally> {
    let mut command = workspace.cargo("test");
    command.args(["--doc", "--package", "deltabox"]);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    let line = workspace::line_of(&command);
    println!("$ {line}");
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start `{line}`"))?;
    let report = String::from_utf8_lossy(&output.stdout);
    let tally = parse_libtest(&report);
    // A crate without examples reports a test run of none; that would only confuse.
    if tally != Tally::default() || !output.status.success() {
        print!("{report}");
    }
    if !output.status.success() && tally.failed == 0 {
        bail!("`{line}`: {}", output.status);
    }
    Ok(tally)
}

/// Sums the `test result:` lines of libtest.
fn parse_libtest(report: &str) -> Tally {
    let mut tally = Tally::default();
    for line in report.lines().filter(|line| line.starts_with("test result:")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            let count = pair[0].parse().unwrap_or(0);
            match pair[1] {
                "passed;" => tally.passed += count,
                "failed;" => tally.failed += count,
                _ => {}
            }
        }
    }
    tally
}

/// nextest's exit status when it ran and a test failed; any other but 0 means that it could not run them.
const NEXTEST_TESTS_FAILED: i32 = 100;

fn run_nextest(workspace: &Workspace, args: &Args, product: &PathBuf) -> anyhow::Result<Tally> {
    let profile = if args.soak { "soak" } else { "default" };
    let junit = workspace.target.join("nextest").join(profile).join("junit.xml");
    // Counts of an earlier run must not pass for this one's.
    if let Err(err) = fs::remove_file(&junit)
        && err.kind() != std::io::ErrorKind::NotFound
    {
        return Err(err).with_context(|| format!("remove {}", junit.display()));
    }
    let mut command = Command::new(nextest::program(workspace)?);
    command.args(["nextest", "run", "--no-tests", "fail", "--profile", profile]).current_dir(&workspace.root);
    match (args.unit, args.sandbox) {
        (true, _) => command.args(["--workspace", "--exclude", "deltabox-tests"]),
        (_, true) => command.args(["--package", "deltabox-tests"]),
        (false, false) => command.arg("--workspace"),
    };
    if args.soak {
        command.env("DELTABOX_SOAK", "1");
    }
    for (name, number) in [("DELTABOX_CASES", args.cases), ("DELTABOX_SEED", args.seed)] {
        if let Some(number) = number {
            command.env(name, number.to_string());
        }
    }
    if let Some(filter) = &args.filter {
        command.args(["--", filter]);
    }
    command.env("DELTABOX_BIN", product);
    let line = workspace::line_of(&command);
    println!("$ {line}");
    let status = command.status().with_context(|| format!("start `{line}`"))?;
    if !status.success() && status.code() != Some(NEXTEST_TESTS_FAILED) {
        bail!("`{line}`: {status}");
    }
    let report = fs::read_to_string(&junit).with_context(|| format!("read {}", junit.display()))?;
    let tally = parse_junit(&report).with_context(|| format!("no counts in {}", junit.display()))?;
    match (status.success(), tally) {
        (true, Tally { failed: 0, passed: 0 }) => bail!("`{line}` ran no test"),
        (true, Tally { failed: 0, .. }) => Ok(tally),
        (false, Tally { failed: 1.., .. }) => Ok(tally),
        (_, tally) => bail!("`{line}`: {status}, but it reports {tally}"),
    }
}

/// The counts of a JUnit report's outermost element.
fn parse_junit(report: &str) -> Option<Tally> {
    let (_, rest) = report.split_once("<testsuites ")?;
    let (attributes, _) = rest.split_once('>')?;
    let count = |name: &str| -> Option<u64> {
        let (_, value) = attributes.split_once(&format!("{name}=\""))?;
        value.split_once('"')?.0.parse().ok()
    };
    let failed = count("failures")? + count("errors")?;
    Some(Tally { passed: count("tests")?.checked_sub(failed)?, failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doc_test_results_are_summed() {
        let report = "running 3 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; \
                      finished in 0.00s\n\ntest result: FAILED. 1 passed; 4 failed; 0 ignored\n";
        assert_eq!(parse_libtest(report), Tally { passed: 3, failed: 4 });
        assert_eq!(parse_libtest("running 0 tests\n"), Tally::default());
    }

    #[test]
    fn the_counts_of_a_junit_report_are_those_of_its_outermost_element() {
        let report = concat!(
            r#"<?xml version="1.0" encoding="UTF-8"?>"#,
            "\n",
            r#"<testsuites name="nextest-run" tests="9" failures="2" errors="1" uuid="x" time="0.1">"#,
            "\n",
            r#"<testsuite name="a" tests="1" disabled="0" errors="0" failures="0">"#,
        );
        assert_eq!(parse_junit(report), Some(Tally { passed: 6, failed: 3 }));
        assert_eq!(parse_junit("<testsuites name=\"x\">"), None);
        assert_eq!(parse_junit(""), None);
    }
}
