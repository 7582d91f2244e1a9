//! `cargo xtask bench sandbox`: what a sandbox costs to make, to use and to keep, against bare floors.
//!
//! ```text
//!   keeper (this process)   starts the daemon, waits, cleans up whatever happens
//!     `- measure            every clock; alternates product and floor, so that drift of a shared machine hits both
//!          `- visit         one per round: the floor of exec, measured by itself
//! ```
//! `deltabox/docs/benchmarks.md` has what the clock windows and floors mean, and numbers.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people: what it prints is its product")]

#[path = "bench-sandbox/floor.rs"]
mod floor;
#[path = "bench-sandbox/many.rs"]
mod many;
#[path = "bench-sandbox/measure.rs"]
mod measure;
#[path = "bench-sandbox/memory.rs"]
mod memory;
#[path = "bench-sandbox/product.rs"]
mod product;
#[path = "bench-sandbox/visit.rs"]
mod visit;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Parser;
use deltabox::sandbox::cgroup::remove_tree;
use deltabox_tests::Host;
use deltabox_tests::bench::keeper::Keeper;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

/// What a sandbox costs to make, to use and to keep, against the least that the kernel asks for it.
#[derive(Parser)]
#[command(name = "cargo xtask bench sandbox", disable_help_subcommand = true)]
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
    /// How often each single operation is measured.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(clap::Subcommand)]
enum Role {
    /// The measuring process; not for people.
    #[command(hide = true)]
    Measure(measure::Place),
    /// The floor of exec; not for people.
    #[command(hide = true)]
    Visit { init: i32, visit: visit::Visit },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.role {
        None => keep(&args.wanted),
        Some(Role::Measure(place)) => {
            measure::run(&place, args.wanted.rounds, args.wanted.json.as_deref()).map(|()| ExitCode::SUCCESS)
        }
        Some(Role::Visit { init, visit }) => visit::run(init, visit).map(|took| {
            println!("{}", took.as_nanos());
            ExitCode::SUCCESS
        }),
    };
    done.unwrap_or_else(|error| {
        eprintln!("bench-sandbox: {error:#}");
        ExitCode::FAILURE
    })
}

fn keep(wanted: &Wanted) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "sandboxes need root; run as root");
    let looking = Keeper::new()?;
    let mut host = Host::start();
    let keeper = std::process::id();
    let mut command = Command::new("/proc/self/exe");
    command.args(["--rounds", &wanted.rounds.to_string()]);
    if let Some(json) = &wanted.json {
        command.arg("--json").arg(json);
    }
    command.arg("measure").arg("--scratch").arg(host.scratch()).arg("--store").arg(host.store());
    command.args(["--daemon", &host.daemon_pid().to_string(), "--keeper", &keeper.to_string()]);
    let ended = looking.look_after(command.envs(host.environment()));
    if !matches!(ended, Ok(WaitStatus::Exited(_, 0))) {
        // A signal of the terminal has reached the daemon, too; dropping the host starts a fresh one that removes all.
        host.end_daemon(Signal::SIGTERM);
        eprint!("{}", host.daemon_log());
    }
    let tag = std::fs::read_to_string(host.store().join("tag")).context("read the store's tag")?;
    drop(host);
    remove_groups(keeper, &tag)?;
    match ended? {
        WaitStatus::Exited(_, 0) => Ok(ExitCode::SUCCESS),
        other => {
            eprintln!("bench-sandbox: measuring ended early: {other:?}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The groups of the bench, and that of the store, which is gone for good.
fn remove_groups(keeper: u32, tag: &str) -> anyhow::Result<()> {
    let floor = floor::group(keeper)?;
    if floor.exists() {
        std::fs::write(floor.join("cgroup.kill"), "1").context("kill bare sandboxes")?;
        remove_tree(&floor)?;
    }
    remove_tree(&floor.with_file_name(tag))?;
    memory::remove_group(keeper)
}
