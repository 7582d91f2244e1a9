//! The main job: an agent looks for the fix of a fault in a real project, and goes back whenever it is wrong.
//!
//! ```text
//! project (from PyPI, with its own tests; two faults are put into it) -> sandbox
//!   worker  python, holds an index of the project in memory        } live through all of it
//!   shell   bash, holds a variable                                 }
//! node = edits made so far = a checkpoint; for each candidate edit:
//!   rollback to the node it starts from -> apply -> tests in a bracket -> checkpoint
//! ```
//! What files, worker and shell are is recorded at every node, and compared at every arrival.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::keeper::{Keeper, Place};
use super::times::Times;
use crate::workspace::{self, Workspace};

const SANDBOX: &str = "demo-search";
/// A project that ships its tests, and needs nothing else.
const PROJECT: &str = "toolz==1.0.0";
/// What is put into it: file, text that stands there once, what takes its place.
const FAULTS: [(&str, &str, &str); 2] = [
    ("toolz/itertoolz.py", "    if N < 2:", "    if N < 3:"),
    ("toolz/itertoolz.py", "len(seq) == len(set(seq))", "len(seq) != len(set(seq))"),
];
/// Nodes that the tree has at least (chosen: a search of some size, well under three minutes).
const N_NODES: usize = 40;
/// Arrivals at random nodes after the search.
const N_VISITS: usize = 40;

/// What a node was when it was left.
#[derive(Clone, Debug, PartialEq)]
struct Look {
    files: Value,
    memory: Value,
    shell: String,
}

struct Node {
    checkpoint: String,
    edits: Vec<Value>,
    failing: Vec<String>,
    look: Look,
}

/// Searches; the times that it took.
pub(super) fn run(workspace: &Workspace, place: &Place, keeper: &mut Keeper) -> anyhow::Result<()> {
    let project = fetch(workspace)?;
    keeper.will_make(SANDBOX)?;
    let mut search = Search::begin(place, &project)?;
    let begin = Instant::now();
    let fixed = search.search()?;
    let took = begin.elapsed();
    let begin = Instant::now();
    search.visit()?;
    let visits = begin.elapsed();
    let Search { nodes, times, n_tests, n_mismatches, n_arrivals, .. } = &search;
    println!();
    println!(
        "{PROJECT}: {n_tests} tests, {} faults put in; {} nodes in {:.1} s",
        FAULTS.len(),
        nodes.len(),
        took.as_secs_f64()
    );
    for edit in &nodes[fixed].edits {
        println!(
            "  fixed by line {} of {}: `{}`",
            edit[1],
            edit[0].as_str().unwrap_or_default(),
            edit[4].as_str().unwrap_or_default()
        );
    }
    times.print();
    let state = times.spent_on(&["checkpoint", "rollback"]);
    let share = state.as_secs_f64() / (took + visits).as_secs_f64();
    println!("spent on state: {:.0} % of the time (the rest: tests, edits, digests, starting commands)", share * 100.0);
    println!("{n_arrivals} arrivals, {n_mismatches} mismatches of files, the worker's memory or the shell");
    ensure!(*n_mismatches == 0, "what came back was not what had been");
    search.worker.end()?;
    search.shell.end()
}

/// Downloads and unpacks the project, once.
fn fetch(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let dir = workspace.target.join("demo").join(PROJECT.replace("==", "-"));
    let done = dir.join("done");
    if !done.exists() {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut pip = Command::new("/usr/bin/python3");
        pip.args([
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--no-deps",
            "--no-compile",
            "-q",
            "--upgrade",
        ]);
        workspace::run(pip.arg("--root-user-action=ignore").arg("--target").arg(dir.join("project")).arg(PROJECT))?;
        for (file, right, wrong) in FAULTS {
            let path = dir.join("project").join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            ensure!(text.matches(right).count() == 1, "`{right}` should stand in {file} once");
            fs::write(&path, text.replace(right, wrong)).with_context(|| format!("write {}", path.display()))?;
        }
        fs::write(&done, "").with_context(|| format!("write {}", done.display()))?;
    }
    Ok(dir.join("project"))
}

struct Search<'a> {
    place: &'a Place,
    worker: Client,
    shell: Client,
    nodes: Vec<Node>,
    times: Times,
    n_tests: u64,
    n_arrivals: usize,
    n_mismatches: usize,
}

impl<'a> Search<'a> {
    fn begin(place: &'a Place, project: &std::path::Path) -> anyhow::Result<Self> {
        workspace::capture(&mut place.deltabox(&["create", SANDBOX]))?;
        let mut tar = Command::new("tar");
        let packed = tar.arg("-C").arg(project).args(["--owner=0", "--group=0", "-c", "."]).stdout(Stdio::piped());
        let mut packed = packed.spawn().context("start tar")?;
        let unpack = "mkdir /srv/project && exec tar -C /srv/project -x";
        let mut command = place.deltabox(&["exec", "-i", SANDBOX, "--", "sh", "-c", unpack]);
        let status = command.stdin(packed.stdout.take().context("tar's output")?).status().context("start deltabox")?;
        ensure!(
            packed.wait().context("wait for tar")?.success() && status.success(),
            "the project could not be copied"
        );
        let worker = Client::start(place, &["/usr/bin/python3", "-B", "-c", include_str!("worker.py")])?;
        let shell = Client::start(place, &["bash", "--norc"])?;
        let (nodes, times) = Default::default();
        Ok(Self { place, worker, shell, nodes, times, n_tests: 0, n_arrivals: 0, n_mismatches: 0 })
    }

    /// Best first: the edits of the nodes with the fewest failing tests. The node without any.
    fn search(&mut self) -> anyhow::Result<usize> {
        self.leave(Vec::new())?;
        println!("\nfailing at first: {}", self.nodes[0].failing.join(", "));
        let mut expanded = vec![false];
        let mut fixed = None;
        while fixed.is_none() || self.nodes.len() < N_NODES {
            let open = (0..self.nodes.len()).filter(|at| !expanded[*at] && !self.nodes[*at].failing.is_empty());
            let from = open.min_by_key(|at| self.nodes[*at].failing.len()).context("no edit is left to try")?;
            expanded[from] = true;
            self.arrive(from)?;
            let functions: Vec<_> =
                self.nodes[from].failing.iter().map(|test| test.trim_start_matches("test_")).collect();
            let candidates = self.worker.ask(&json!(["candidates", functions]))?;
            for edit in candidates.as_array().context("candidates")? {
                self.arrive(from)?;
                let mut words = vec![json!("apply")];
                words.extend(edit.as_array().context("an edit")?.iter().cloned());
                self.worker.ask(&Value::Array(words))?;
                let edits = self.nodes[from].edits.iter().chain([edit]).cloned().collect();
                self.leave(edits)?;
                expanded.push(false);
                let last = self.nodes.len() - 1;
                if self.nodes[last].failing.is_empty() && fixed.is_none() {
                    fixed = Some(last);
                }
                if fixed.is_some() && self.nodes.len() >= N_NODES {
                    break;
                }
            }
        }
        fixed.context("not fixed")
    }

    /// Random nodes, from wherever the last one was.
    fn visit(&mut self) -> anyhow::Result<()> {
        let mut random: u64 = 7;
        for _ in 0..N_VISITS {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = usize::try_from(random >> 33)? % self.nodes.len();
            self.arrive(at)?;
            // Something to be undone.
            self.shell.ask_shell("node=nowhere; echo nowhere > /srv/project/toolz/__init__.py; echo done")?;
        }
        Ok(())
    }

    /// Runs the tests, and makes a node of what is there now.
    fn leave(&mut self, edits: Vec<Value>) -> anyhow::Result<()> {
        let name = self.nodes.len().to_string();
        self.shell.ask_shell(&format!("node={name}; echo done"))?;
        let tests = ["--json", "exec", "--bracket", SANDBOX, "--", "/usr/bin/python3", "-c", include_str!("tests.py")];
        let told = self.timed("tests in a bracket", &tests)?;
        let output = told["stdout"].as_str().unwrap_or_default();
        let report: Value =
            serde_json::from_str(output).with_context(|| format!("the tests said `{output}`: {}", told["stderr"]))?;
        self.n_tests = report["n"].as_u64().unwrap_or(0);
        let failing = report["failing"].as_array().context("failing tests")?;
        let failing = failing.iter().filter_map(|test| Some(test.as_str()?.to_owned())).collect();
        let look = self.look()?;
        let made = self.timed("checkpoint", &["--json", "checkpoint", SANDBOX])?;
        let checkpoint = made["id"].as_str().context("a checkpoint's id")?.to_owned();
        self.nodes.push(Node { checkpoint, edits, failing, look });
        Ok(())
    }

    /// Goes to a node, and looks whether it is what it was.
    fn arrive(&mut self, at: usize) -> anyhow::Result<()> {
        let checkpoint = self.nodes[at].checkpoint.clone();
        self.timed("rollback", &["--json", "rollback", SANDBOX, &checkpoint])?;
        let look = self.look()?;
        self.n_arrivals += 1;
        if look != self.nodes[at].look {
            self.n_mismatches += 1;
            println!("MISMATCH at {checkpoint}: {look:?} instead of {:?}", self.nodes[at].look);
        }
        Ok(())
    }

    fn look(&mut self) -> anyhow::Result<Look> {
        let told = self.worker.ask(&json!(["look"]))?;
        let shell = self.shell.ask_shell("echo $node in $PWD")?;
        Ok(Look { files: told["files"].clone(), memory: told["memory"].clone(), shell })
    }

    fn timed(&mut self, what: &'static str, args: &[&str]) -> anyhow::Result<Value> {
        let begin = Instant::now();
        let output = self.place.deltabox(args).output().context("start deltabox")?;
        let took = begin.elapsed();
        ensure!(
            matches!(output.status.code(), Some(0)),
            "`deltabox {}` failed: {}",
            args[1..3].join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let report: Value = serde_json::from_slice(&output.stdout).context("read what deltabox reports")?;
        let us = |field: &str| report[field].as_u64().map(Duration::from_micros);
        self.times.note(what, took, us("total_us"), us("stopped_us"));
        Ok(report)
    }
}

/// A program inside that is asked line by line.
struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(place: &Place, words: &[&str]) -> anyhow::Result<Self> {
        let args: Vec<&str> = ["exec", "-i", SANDBOX, "--"].iter().chain(words).copied().collect();
        let mut command = place.deltabox(&args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start deltabox")?;
        let (input, output) = (child.stdin.take().context("an input")?, child.stdout.take().context("an output")?);
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    /// Closes its input, at which it ends.
    fn end(self) -> anyhow::Result<()> {
        let Self { mut child, input, output } = self;
        drop((input, output));
        ensure!(child.wait().context("wait for deltabox")?.success(), "a program inside failed");
        Ok(())
    }

    fn ask(&mut self, request: &Value) -> anyhow::Result<Value> {
        let line = self.ask_shell(&request.to_string())?;
        serde_json::from_str(&line).with_context(|| format!("the worker said `{line}`"))
    }

    fn ask_shell(&mut self, line: &str) -> anyhow::Result<String> {
        writeln!(self.input, "{line}").context("tell a program inside")?;
        let mut answer = String::new();
        self.output.read_line(&mut answer).context("hear a program inside")?;
        Ok(answer.trim_end().to_owned())
    }
}
