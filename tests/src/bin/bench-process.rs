//! `cargo xtask bench process`: how long programs stand still for a checkpoint, and what a rollback takes until they run.
//!
//! ```text
//!   keeper (this process)   starts the daemon, waits, cleans up whatever happens
//!     `- measure            every clock; alternates product and floors
//!          |- deltabox exec the measured program's client
//!          |- spin          one for each CPU, in busy cells
//!          `- criu          a container with the same program, for CRIU
//! ```
//! `deltabox/docs/benchmarks.md` has what the clock windows and floors mean, and numbers.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people: what it prints is its product")]

#[path = "bench-process/busy.rs"]
mod busy;
#[path = "bench-process/cell.rs"]
mod cell;
#[path = "bench-process/criu.rs"]
mod criu;
#[path = "bench-process/floor.rs"]
mod floor;
#[path = "bench-process/measure.rs"]
mod measure;
#[path = "bench-process/program.rs"]
mod program;
#[path = "bench-process/results.rs"]
mod results;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Parser;
use deltabox::kernel::cgroups::Hierarchies;
use deltabox::sandbox::cgroup::{remove_tree, store_group};
use deltabox_tests::Host;
use deltabox_tests::bench::keeper::Keeper;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

/// How long programs stand still for a checkpoint, and what a rollback takes until they run, against bare floors and
/// CRIU.
#[derive(Parser)]
#[command(name = "cargo xtask bench process", disable_help_subcommand = true)]
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
    /// How often each cell is measured; half of that with 500 MB, a fifth with 2 GB.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// 20 rounds of five programs, idle, with 1 % written: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Only this program; may be given more than once.
    #[arg(long, value_name = "PROGRAM")]
    program: Vec<String>,
    /// Without CRIU.
    #[arg(long)]
    no_criu: bool,
}

#[derive(clap::Subcommand)]
enum Role {
    /// The measuring process; not for people.
    #[command(hide = true)]
    Measure(measure::Task),
    /// CRIU's container; not for people.
    #[command(hide = true)]
    Criu {
        #[arg(long)]
        init: bool,
        order: String,
    },
    /// A process that never rests; not for people.
    #[command(hide = true)]
    Spin,
}

const ROUNDS: u32 = 200;
/// `--quick`.
const QUICK_ROUNDS: u32 = 20;

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.role {
        None => keep(&args.wanted),
        Some(Role::Measure(task)) => measure::run(&task).map(|()| ExitCode::SUCCESS),
        Some(Role::Criu { init, order }) => criu::run(init, &order).map(|()| ExitCode::SUCCESS),
        Some(Role::Spin) => busy::spin().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("bench-process: {error:#}");
        ExitCode::FAILURE
    })
}

fn keep(wanted: &Wanted) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "sandboxes need root; run as root");
    let looking = Keeper::new()?;
    let mut host = Host::start();
    let mut command = Command::new("/proc/self/exe");
    command.arg("measure").arg("--scratch").arg(host.scratch()).arg("--store").arg(host.store());
    let rounds = wanted.rounds.unwrap_or(if wanted.quick { QUICK_ROUNDS } else { ROUNDS });
    command.args(["--rounds", &rounds.to_string()]);
    for (flag, is_set) in [("--quick", wanted.quick), ("--no-criu", wanted.no_criu)] {
        if is_set {
            command.arg(flag);
        }
    }
    for program in &wanted.program {
        command.args(["--program", program]);
    }
    if let Some(json) = &wanted.json {
        command.arg("--json").arg(json);
    }
    let ended = looking.look_after(command.envs(host.environment()));
    if !matches!(ended, Ok(WaitStatus::Exited(_, 0))) {
        // A signal of the terminal has reached the daemon, too; dropping the host starts a fresh one that removes all.
        host.end_daemon(Signal::SIGTERM);
        eprint!("{}", host.daemon_log());
    }
    let tag = std::fs::read_to_string(host.store().join("tag")).context("read the store's tag")?;
    drop(host);
    remove_tree(&store_group(&Hierarchies::find()?.unified, &tag))?;
    match ended? {
        WaitStatus::Exited(_, 0) => Ok(ExitCode::SUCCESS),
        other => {
            eprintln!("bench-process: measuring ended early: {other:?}");
            Ok(ExitCode::FAILURE)
        }
    }
}
