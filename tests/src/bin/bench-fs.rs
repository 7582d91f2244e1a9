//! `cargo xtask bench fs`: how long programs stand still for a checkpoint or rollback of files, against bare floors.
//!
//! ```text
//!   keeper (this process)   a mount namespace of its own; per store: file system, daemon, and afterwards their end
//!     `- measure            one per store: every clock; alternates product and floors
//!          `- floor         one per cell: mount + pivot_root of the same stack, without processes
//! ```
//! `deltabox/docs/benchmarks.md` has what the clock windows and floors mean, and numbers.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people: what it prints is its product")]

#[path = "bench-fs/baseline.rs"]
mod baseline;
#[path = "bench-fs/cell.rs"]
mod cell;
#[path = "bench-fs/floor.rs"]
mod floor;
#[path = "bench-fs/measure.rs"]
mod measure;
#[path = "bench-fs/results.rs"]
mod results;
#[path = "bench-fs/store.rs"]
mod store;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Parser;
use deltabox::kernel::cgroups::Hierarchies;
use deltabox::sandbox::cgroup::{remove_tree, store_group};
use deltabox_tests::Host;
use deltabox_tests::bench::keeper::Keeper;
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use serde_json::{Value, json};
use store::StoreKind;

/// How long programs stand still for a checkpoint or rollback of files, against the least that the kernel asks for it.
#[derive(Parser)]
#[command(name = "cargo xtask bench fs", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    wanted: Wanted,
}

#[derive(clap::Args)]
struct Wanted {
    /// Write the numbers to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each cell is measured; a quarter of that where a round is long (512 descriptions, 2,000 files,
    /// 300 layers).
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// 12 rounds, and no layers beyond 50: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Only this store; may be given more than once.
    #[arg(long, value_name = "STORE", value_enum)]
    store: Vec<StoreKind>,
    /// Only cells with this name; may be given more than once.
    #[arg(long, value_name = "CELL")]
    cell: Vec<String>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// The measuring process; not for people.
    #[command(hide = true)]
    Measure(measure::Task),
    /// The floor; not for people.
    #[command(hide = true)]
    Floor { scratch: PathBuf },
}

/// `--quick`.
const QUICK_ROUNDS: u32 = 12;

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.role {
        None => keep(&args.wanted),
        Some(Role::Measure(task)) => measure::run(&task).map(|()| ExitCode::SUCCESS),
        Some(Role::Floor { scratch }) => floor::serve(&scratch).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("bench-fs: {error:#}");
        ExitCode::FAILURE
    })
}

fn keep(wanted: &Wanted) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "sandboxes need root; run as root");
    let looking = Keeper::new()?;
    // File systems of the bench go with its last process, and their loop devices with them.
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    store::make_private()?;
    let dir = tempfile::TempDir::with_prefix("deltabox-bench-").context("make a temporary directory")?;
    let (mut measured, mut ended) = (Vec::new(), ExitCode::SUCCESS);
    for kind in StoreKind::all().iter().copied().filter(|kind| wanted.store.is_empty() || wanted.store.contains(kind)) {
        let at = match store::make(kind, dir.path()) {
            Ok(at) => at,
            Err(why) => {
                println!("store {}: not measured: {why:#}\n", kind.name());
                continue;
            }
        };
        let kept = keep_one(kind, &at, wanted, &looking);
        store::take_down(kind, &at)?;
        match kept? {
            Some(value) => measured.push(value),
            None => {
                ended = ExitCode::FAILURE;
                break;
            }
        }
    }
    print!("{}", results::targets(&measured));
    if let Some(file) = &wanted.json {
        let value = json!({ "bench": "fs", "quick": wanted.quick, "stores": measured });
        let text = serde_json::to_string_pretty(&value)?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    Ok(ended)
}

/// One store with a daemon of its own; `None` if measuring ended early.
fn keep_one(kind: StoreKind, at: &Path, wanted: &Wanted, looking: &Keeper) -> anyhow::Result<Option<Value>> {
    let place = tempfile::TempDir::with_prefix_in("deltabox-test-", at).context("make a temporary directory")?;
    let mut host = Host::start_in(place, &[]);
    let results = host.scratch().join("results.json");
    let mut command = Command::new("/proc/self/exe");
    command.arg("measure").arg("--scratch").arg(host.scratch()).arg("--store").arg(host.store());
    let rounds = if wanted.quick { QUICK_ROUNDS } else { wanted.rounds };
    command.args(["--name", kind.name(), "--rounds", &rounds.to_string()]).arg("--results").arg(&results);
    if wanted.quick {
        command.arg("--quick");
    }
    for cell in &wanted.cell {
        command.args(["--cell", cell]);
    }
    let ended = looking.look_after(command.envs(host.environment()));
    let done = matches!(ended, Ok(WaitStatus::Exited(_, 0)));
    if !done {
        // A signal of the terminal has reached the daemon, too; dropping the host starts a fresh one that removes all.
        host.end_daemon(Signal::SIGTERM);
        eprint!("{}", host.daemon_log());
    }
    let value = if done { Some(fs::read(&results).context("read the results")?) } else { None };
    let tag = fs::read_to_string(host.store().join("tag")).context("read the store's tag")?;
    drop(host);
    remove_tree(&store_group(&Hierarchies::find()?.unified, &tag))?;
    match ended? {
        WaitStatus::Exited(_, 0) => {}
        other => eprintln!("bench-fs: measuring ended early: {other:?}"),
    }
    Ok(value.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
}
