//! The measuring process: cell after cell, round after round.
//!
//! ```text
//! checkpoint | fork of the same process and its end   (A B in even rounds, B A in odd ones)
//! the program goes on: it writes to its memory
//! rollback, exec of /bin/true; the program says when it ran; copy of as many pages
//! sometimes: CRIU's dump and restore of the same program, cp -a of the layer's files
//! rm of the checkpoint; wait until its templates are gone
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use deltabox::daemon::Place;
use deltabox::daemon::client::{Client, Ended, Local, OutputTo};
use deltabox::engine::{
    CheckpointReport, CheckpointRequest, CreateRequest, ExecRequest, Exit, OnDisconnect, RollbackReport,
    RollbackRequest, SandboxReport, Stdio as Streams,
};
use deltabox_tests::bench::machine;
use serde_json::{Value, json};

use crate::busy::Busy;
use crate::cell::{Cell, Kind, Program};
use crate::criu::{self, Criu, Order};
use crate::floor::{self, Copy};
use crate::program::{self, PATIENCE, Running};
use crate::results::{self, Timed};

/// What to measure, told by the keeper.
#[derive(clap::Args)]
pub(crate) struct Task {
    #[arg(long)]
    scratch: PathBuf,
    #[arg(long)]
    store: PathBuf,
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    quick: bool,
    #[arg(long)]
    no_criu: bool,
    #[arg(long)]
    program: Vec<String>,
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Rounds before the clock counts: caches are cold.
const N_WARM_UP: u32 = 3;
/// Files of 4 KiB in the sandbox's layer, for copies of it.
const N_FILES: usize = 20;

pub(crate) fn run(task: &Task) -> anyhow::Result<()> {
    let machine = machine::describe(&task.store);
    println!("bench process: {} rounds on {machine}\n", task.rounds);
    let client = Client::new(Place::find(None, None))?;
    let criu = if task.no_criu { None } else { criu::find() };
    let mut skipped = Vec::new();
    if criu.is_none() {
        let why = if task.no_criu { "--no-criu" } else { "not here; `cargo xtask setup --with-criu` brings it" };
        skipped.push(("CRIU".to_owned(), why.to_owned()));
    }
    let mut rows: Vec<Value> = Vec::new();
    for program in Program::some(&task.program, task.quick) {
        if let Some(why) = program::missing(program.kind) {
            skipped.push((program.name.to_owned(), why));
            continue;
        }
        for cell in program.cells(task.quick) {
            let busy = if cell.busy { "busy" } else { "idle" };
            eprintln!("{} {:.0} % {busy} ...", program.name, cell.dirty_percent());
            let measured = measure(&client, task, cell, criu.as_deref());
            client.delete("/v1/sandboxes/box").context("rm")?;
            match measured {
                Ok(row) => rows.push(row),
                Err(why) => {
                    skipped.push((format!("{} {:.0} % {busy}", program.name, cell.dirty_percent()), format!("{why:#}")))
                }
            }
        }
    }
    print!("{}", results::tables(&rows));
    for (what, why) in &skipped {
        println!("skipped: {what}: {why}");
    }
    let load_after = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load after: {}", load_after.trim());
    let Some(file) = &task.json else { return Ok(()) };
    let skipped: Vec<_> = skipped.iter().map(|(what, why)| json!({ "what": what, "why": why })).collect();
    let value = json!({
        "bench": "process",
        "quick": task.quick,
        "machine": machine,
        "load_after": load_after.trim(),
        "rows": rows,
        "skipped": skipped,
    });
    fs::write(file, serde_json::to_string_pretty(&value)? + "\n").with_context(|| format!("write {}", file.display()))
}

/// A sandbox with one program.
struct Bench<'a> {
    client: &'a Client,
    cell: Cell,
    cgroup: PathBuf,
    live_upper: PathBuf,
    program: Running,
}

fn measure(client: &Client, task: &Task, cell: Cell, criu: Option<&Path>) -> anyhow::Result<Value> {
    let request = CreateRequest { name: Some("box".parse()?), ..CreateRequest::default() };
    let report: SandboxReport = client.post("/v1/sandboxes", &request).context("create")?;
    let init = report.init_pid.context("a running sandbox has an init")?;
    let inside = PathBuf::from(format!("/proc/{init}/root/srv"));
    for i in 0..N_FILES {
        fs::write(inside.join(format!("{i}")), [b'y'; 4096]).context("write a file of the sandbox")?;
    }
    let classes = task.scratch.join("classes");
    if cell.program.kind == Kind::Jvm {
        program::compile(&classes)?;
        fs::copy(classes.join("Program.class"), inside.join("Program.class"))?;
    }
    let program = Running::start("box", &report.cgroup.join("live"), &cell, "/srv")?;
    let live_upper = report.live_layer.join("upper");
    let bench = Bench { client, cell, cgroup: report.cgroup, live_upper, program };
    let criu = criu.map(|criu| order(task, &cell, criu, &classes)).transpose()?;
    bench.run(task, criu.as_ref())
}

fn order(task: &Task, cell: &Cell, criu: &Path, classes: &Path) -> anyhow::Result<Order> {
    let criu = criu.canonicalize().context("find CRIU")?;
    let needed = (cell.program.kind == Kind::Jvm).then(|| classes.join("Program.class"));
    Ok(Order { criu, argv: program::argv(cell, "still", "/run"), scratch: task.scratch.join("container"), needed })
}

impl Bench<'_> {
    fn run(mut self, task: &Task, order: Option<&Order>) -> anyhow::Result<Value> {
        let busy = if self.cell.busy { Some(Busy::start()?) } else { None };
        let n_rounds = self.cell.rounds(task.rounds);
        let mut timed = Timed::default();
        let mut copy = Copy::of(self.cell.n_dirty_pages())?;
        let mut no_criu = None;
        let mut criu = match order.map(Criu::start).transpose() {
            Ok(criu) => criu,
            Err(why) => {
                no_criu = Some(format!("{why:#}"));
                None
            }
        };
        let every = self.cell.criu_every(n_rounds);
        let (mut memory_bytes, mut n_threads, mut how) = (0, 0, String::new());
        for round in 0..n_rounds + N_WARM_UP {
            let large = self.program.large;
            // A B in even rounds, B A in odd ones.
            let ((checkpoint, total), forked) = if round.is_multiple_of(2) {
                let checkpoint = self.checkpoint()?;
                (checkpoint, floor::fork(large).context("fork")?)
            } else {
                let forked = floor::fork(large).context("fork")?;
                (self.checkpoint()?, forked)
            };
            self.program.go_on()?;
            self.program.prepare_return()?;
            let back = self.roll_back(&checkpoint.id)?;
            let copied = copy.measure();
            let counts = round >= N_WARM_UP;
            if counts {
                timed.record_checkpoint(&checkpoint, total);
                timed.record_rollback(&back.report, [back.running, back.replied, back.answered]);
                timed.record_floors(forked.fork, forked.kill, copied);
                (memory_bytes, n_threads) = (checkpoint.memory_bytes, checkpoint.n_threads);
                how = back.report.processes.iter().map(|one| one.how.as_str()).collect::<Vec<_>>().join(", ");
            }
            if counts && round.is_multiple_of(every) {
                if let Some(criu) = &mut criu {
                    match criu.measure() {
                        Ok(took) => timed.record_criu(took),
                        Err(why) => no_criu = Some(format!("{why:#}")),
                    }
                }
                if no_criu.is_some() {
                    criu = None;
                }
                timed.record_cp(self.copy_files(task)?);
            }
            self.forget(&checkpoint.id)?;
        }
        drop(busy);
        let mut row = self.cell.describe();
        row["n"] = json!(n_rounds);
        row["memory_bytes"] = json!(memory_bytes);
        row["n_threads"] = json!(n_threads);
        row["how"] = json!(how);
        timed.describe(&mut row);
        if let Some(why) = no_criu {
            row["criu"] = json!({ "skipped": why });
        }
        results::judge(&mut row);
        println!("{}", results::line(&row));
        Ok(row)
    }

    /// With the client's time: connect, request, until the reply.
    fn checkpoint(&self) -> anyhow::Result<(CheckpointReport, Duration)> {
        let begun = Instant::now();
        let report: CheckpointReport =
            self.client.post("/v1/sandboxes/box/checkpoints", &CheckpointRequest::default()).context("checkpoint")?;
        let took = begun.elapsed();
        let expected = self.cell.program.n_processes();
        ensure!(report.n_processes == expected, "{} processes, not {expected}", report.n_processes);
        Ok((report, took))
    }

    fn roll_back(&mut self, checkpoint: &str) -> anyhow::Result<RolledBack> {
        let request = RollbackRequest { checkpoint: checkpoint.to_owned(), fs_only: false };
        let begun = program::monotonic()?;
        let report: RollbackReport = self.client.post("/v1/sandboxes/box/rollback", &request).context("roll back")?;
        let replied = program::monotonic()?;
        self.exec()?;
        let answered = program::monotonic()?;
        let back = self.program.come_back()?;
        let since = |at: Duration| at.checked_sub(begun).context("it ran before the rollback");
        Ok(RolledBack { report, running: since(back.last_ran)?, replied: since(replied)?, answered: since(answered)? })
    }

    /// Runs `/bin/true` until its exit status is here.
    fn exec(&self) -> anyhow::Result<()> {
        let request = ExecRequest {
            argv: vec!["/bin/true".to_owned()],
            env: Vec::new(),
            cwd: None,
            uid: 0,
            gid: None,
            stdio: Streams::Pipes { stdin: false },
            on_disconnect: OnDisconnect::End,
        };
        let local = Local { stdin: false, tty: false, output: OutputTo::Capture };
        match self.client.exec(&"box".parse()?, &request, local).context("exec")? {
            Ended::Exit { exit: Exit::Exited { status: 0 }, .. } => Ok(()),
            other => bail!("exec: {other:?}"),
        }
    }

    /// `cp -a` of the layer that the files were written to, which a checkpoint with CRIU would need besides.
    fn copy_files(&self, task: &Task) -> anyhow::Result<Duration> {
        let to = task.scratch.join("copy");
        let begun = Instant::now();
        // Sockets and the like are reported, not copied.
        Command::new("cp")
            .arg("-a")
            .arg(&self.live_upper)
            .arg(&to)
            .stderr(Stdio::null())
            .status()
            .context("start cp")?;
        let took = begun.elapsed();
        fs::remove_dir_all(&to)?;
        Ok(took)
    }

    /// Takes the checkpoint away, and waits until its templates are gone.
    fn forget(&self, checkpoint: &str) -> anyhow::Result<()> {
        self.client.delete(&format!("/v1/sandboxes/box/checkpoints/{checkpoint}")).context("rm")?;
        let end = Instant::now() + PATIENCE;
        loop {
            let mut n_templates = 0;
            for entry in fs::read_dir(&self.cgroup).context("list the sandbox's groups")? {
                let name = entry?.file_name();
                n_templates += usize::from(name.as_encoded_bytes().starts_with(b"t"));
            }
            if n_templates == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < end, "not within {PATIENCE:?}: templates are gone");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A rollback, and when what happened, from its request on.
struct RolledBack {
    report: RollbackReport,
    running: Duration,
    replied: Duration,
    answered: Duration,
}
