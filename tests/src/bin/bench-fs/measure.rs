//! The measuring process of one store: cell after cell, round after round.
//!
//! ```text
//! once   create, start the programs, checkpoints until the stack is as deep as wanted
//! round  write files; checkpoint | floor | bare stop; write files; rollback; rm of that checkpoint; wait for calm
//! ```
//! A round ends where it began: at the same checkpoint, with as many layers, nothing written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use deltabox::daemon::Place;
use deltabox::daemon::client::Client;
use deltabox::deltacr::stop::{Request, while_stopped};
use deltabox::engine::{
    CheckpointReport, CheckpointRequest, CreateRequest, DiskReport, PhaseTime, RollbackReport, RollbackRequest,
    SandboxReport,
};
use deltabox::sandbox::SandboxSpec;
use deltabox_tests::bench::{Samples, machine};
use serde_json::{Value, json};

use crate::baseline::Baselines;
use crate::cell::Cell;
use crate::floor::Floor;
use crate::results::{self, Timed};

/// What to measure, told by the keeper.
#[derive(clap::Args)]
pub(crate) struct Task {
    #[arg(long)]
    scratch: PathBuf,
    #[arg(long)]
    store: PathBuf,
    #[arg(long)]
    name: String,
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    results: PathBuf,
    #[arg(long)]
    quick: bool,
    #[arg(long)]
    cell: Vec<String>,
}

/// Rounds before the clock counts: caches are cold.
const N_WARM_UP: u32 = 3;

/// How long anything that should come soon may take (chosen).
const PATIENCE: Duration = Duration::from_secs(60);

/// Holds descriptions and sleeps; says so by a directory, which takes no description.
const PROGRAM: &str = "
import os, signal, sys
mode, n_descriptions, n_processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.makedirs('/srv/held')
number = 0
for k in range(1, n_processes):
    if os.fork() == 0:
        number = k
        break
for i in range(n_descriptions):
    path = f'/srv/held/{number}-{i}'
    with open(path, 'w') as file: file.write('x' * 4096)
    os.open(path, os.O_RDWR if mode == 'rw' else os.O_RDONLY)
os.mkdir(f'/srv/held/ready-{number}')
while True: signal.pause()
";

pub(crate) fn run(task: &Task) -> anyhow::Result<()> {
    let machine = machine::describe(&task.store);
    println!("store {}: {} rounds on {machine}\n", task.name, task.rounds);
    let client = Client::new(Place::find(None, None))?;
    let mut rows = Vec::new();
    for cell in Cell::some(&task.cell, task.quick) {
        eprintln!("{} {} ...", task.name, cell.name);
        let row = Bench::start(&client, task, cell)?.run();
        client.delete("/v1/sandboxes/box").context("rm")?;
        rows.push(row.with_context(|| format!("cell {}", cell.name))?);
    }
    println!("{}", results::table(&rows));
    let load_after = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load after: {}\n", load_after.trim());
    let value = json!({ "store": task.name, "machine": machine, "load_after": load_after.trim(), "rows": rows });
    Ok(fs::write(&task.results, value.to_string())?)
}

/// One sandbox with its programs, in the state where every round begins.
struct Bench<'a> {
    client: &'a Client,
    task: &'a Task,
    cell: Cell,
    init: i32,
    group: PathBuf,
    /// Where a rollback goes.
    home: String,
    /// Directories under the live layer there.
    n_frozen: usize,
}

impl<'a> Bench<'a> {
    fn start(client: &'a Client, task: &'a Task, cell: Cell) -> anyhow::Result<Self> {
        let spec = SandboxSpec { merge_above: cell.merge_above, ..SandboxSpec::default() };
        let request = CreateRequest { name: Some("box".parse()?), spec };
        let report: SandboxReport = client.post("/v1/sandboxes", &request).context("create")?;
        let init = report.init_pid.context("a running sandbox has an init")?;
        let group = report.cgroup.join("live");
        let mut bench = Self { client, task, cell, init, group, home: String::new(), n_frozen: cell.n_layers };
        bench.start_programs()?;
        for _ in 0..cell.n_layers {
            fs::write(bench.inside("srv/layer"), "x")?;
            let next = bench.checkpoint()?.0.id;
            let earlier = std::mem::replace(&mut bench.home, next);
            if !earlier.is_empty() && cell.merge_above < cell.n_layers {
                bench.forget(&earlier)?;
            }
        }
        wait_until("layers are merged", || Ok(bench.n_frozen()? <= cell.merge_above))?;
        bench.rollback()?;
        bench.n_frozen = bench.n_frozen()?;
        bench.calm()?;
        Ok(bench)
    }

    fn start_programs(&self) -> anyhow::Result<()> {
        let Cell { n_descriptions, writable, n_processes, .. } = self.cell;
        let mode = if writable { "rw" } else { "r" };
        let numbers = [n_descriptions, n_processes].map(|n| n.to_string());
        let status = Command::new(deltabox_tests::binary())
            .args(["exec", "-d", "box", "--", "/usr/bin/python3", "-c", PROGRAM, mode, &numbers[0], &numbers[1]])
            .stdout(Stdio::null())
            .status()
            .context("start the programs")?;
        ensure!(status.success(), "deltabox exec: {status}");
        let is_ready = |k: usize| self.inside(&format!("srv/held/ready-{k}")).exists();
        wait_until("the programs hold their descriptions", || Ok((0..n_processes).all(is_ready)))?;
        fs::create_dir(self.inside("srv/dirty")).context("create /srv/dirty")
    }

    fn run(self) -> anyhow::Result<Value> {
        let upper = |id: &u64| self.task.store.join("layers").join(id.to_string()).join("upper");
        let sandbox: SandboxReport = self.client.get("/v1/sandboxes/box").context("inspect")?;
        let record = fs::read(sandbox.live_layer.join("layer.json")).context("read the live layer's record")?;
        let record: Value = serde_json::from_slice(&record)?;
        let below: Vec<_> = record["stack"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        ensure!(below.len() == self.n_frozen, "{} layers, not {}", below.len(), self.n_frozen);
        let below: Vec<_> = below.iter().map(upper).collect();
        let mut floor = Floor::start(&self.task.scratch, &below)?;
        let (mut checkpoints, mut rollbacks) = (Timed::default(), Timed::default());
        let (mut floors, mut pivots, mut stops) = (Samples::default(), Samples::default(), Samples::default());
        let mut baselines = Baselines::new();
        let n_rounds = self.cell.rounds(self.task.rounds);
        for round in 0..n_rounds + N_WARM_UP {
            self.write_files()?;
            if let Some(round) = round.checked_sub(N_WARM_UP) {
                let live = self.layers()?.into_iter().max().context("a live layer")?;
                baselines.measure(round, &upper(&live), &self.task.scratch)?;
            }
            let floors_of = |floor: &mut Floor| anyhow::Ok((floor.measure()?, self.stop()?));
            // A B in even rounds, B A in odd ones.
            let ((checkpoint, total), ([mount, pivot], stop)) = if round.is_multiple_of(2) {
                let checkpoint = self.checkpoint()?;
                (checkpoint, floors_of(&mut floor)?)
            } else {
                let took = floors_of(&mut floor)?;
                (self.checkpoint()?, took)
            };
            self.write_files()?;
            let (rollback, total_back) = self.rollback()?;
            self.forget(&checkpoint.id)?;
            self.calm()?;
            if round >= N_WARM_UP {
                checkpoints.record(checkpoint.stopped_us, total, &phases(&checkpoint.phases_us));
                rollbacks.record(rollback.stopped_us, total_back, &phases(&rollback.phases_us));
                floors.record(mount);
                pivots.record(pivot);
                stops.record(stop);
            }
        }
        let mut row = self.cell.describe();
        row["n"] = json!(n_rounds);
        row["checkpoint"] = checkpoints.describe();
        row["rollback"] = rollbacks.describe();
        row["floor"] = results::quantiles(&floors);
        row["floor_pivot"] = results::quantiles(&pivots);
        row["stop"] = results::quantiles(&stops);
        row["baselines"] = baselines.describe();
        Ok(row)
    }

    /// With the client's time: connect, request, until the reply.
    fn checkpoint(&self) -> anyhow::Result<(CheckpointReport, Duration)> {
        let request = CheckpointRequest { fs_only: true, ..CheckpointRequest::default() };
        let begun = Instant::now();
        let report: CheckpointReport =
            self.client.post("/v1/sandboxes/box/checkpoints", &request).context("checkpoint")?;
        let took = begun.elapsed();
        let expected = if report.fs_frozen { self.cell.n_descriptions * self.cell.n_processes } else { 0 };
        ensure!(report.n_descriptions == expected, "{} descriptions moved, not {expected}", report.n_descriptions);
        Ok((report, took))
    }

    /// The same of a rollback to where the round began.
    fn rollback(&self) -> anyhow::Result<(RollbackReport, Duration)> {
        let request = RollbackRequest { checkpoint: self.home.clone(), fs_only: true };
        let begun = Instant::now();
        let report = self.client.post("/v1/sandboxes/box/rollback", &request).context("roll back")?;
        Ok((report, begun.elapsed()))
    }

    /// All threads stopped and let go.
    fn stop(&self) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + PATIENCE;
        let request = Request { group: &self.group, excluded: &[self.init], deadline };
        let (n, took) = while_stopped(request, |stopped| {
            stopped.resume();
            (stopped.processes().len(), stopped.begun().elapsed())
        })?;
        ensure!(n == self.cell.n_processes, "{n} processes stopped, not {}", self.cell.n_processes);
        Ok(took)
    }

    /// From the host: nothing of it is in the programs.
    fn write_files(&self) -> anyhow::Result<()> {
        for i in 0..self.cell.n_dirty {
            fs::write(self.inside(&format!("srv/dirty/{i}")), [b'y'; 4096]).context("write a file of the sandbox")?;
        }
        Ok(())
    }

    fn inside(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.init.to_string()).join("root").join(path)
    }

    fn layers(&self) -> anyhow::Result<Vec<u64>> {
        let mut layers = Vec::new();
        for entry in fs::read_dir(self.task.store.join("layers")).context("list layers")? {
            // Those on their way out are none any more, but not gone yet: 0 is nobody's number.
            layers.push(entry?.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(0));
        }
        Ok(layers)
    }

    fn forget(&self, checkpoint: &str) -> anyhow::Result<()> {
        self.client.delete(&format!("/v1/sandboxes/box/checkpoints/{checkpoint}")).context("rm")
    }

    /// Directories under the live layer.
    fn n_frozen(&self) -> anyhow::Result<usize> {
        let disk: DiskReport = self.client.get("/v1/sandboxes/box/disk").context("disk use")?;
        Ok(disk.n_layers)
    }

    /// Until what the round has left behind is removed.
    fn calm(&self) -> anyhow::Result<()> {
        wait_until("layers are removed", || Ok(self.layers()?.len() == self.n_frozen + 1))
    }
}

fn phases(times: &[PhaseTime]) -> Vec<(&str, u64)> {
    times.iter().map(|time| (time.phase.as_str(), time.us)).collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !is_so()? {
        ensure!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
