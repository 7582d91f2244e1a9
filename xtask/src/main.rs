//! Set-up, tests, checks and builds of the workspace: what a developer and the CI machine run.
//!
//! One file per command. Everything it makes lies under the target directory, but for packages that
//! `setup` installs.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people: what it prints is its product")]

mod bench;
mod ci;
mod demo;
mod ebpf;
mod setup;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

use workspace::Workspace;

/// Set-up, tests, checks and builds of deltabox.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
enum Command {
    /// Make this machine ready to build and test deltabox.
    Setup(setup::Args),
    /// Run the tests.
    Test(test::Args),
    /// Check what compilers and clippy do not: directions, places, links, leftovers.
    Tidy,
    /// Everything that CI runs, in its order.
    Ci,
    /// Build the eBPF programs.
    BuildEbpf,
    /// Show the product at work on this machine, and what each step took.
    Demo,
    /// Run one of the benches.
    Bench(bench::Args),
    /// The demo's daemon and its end; not for people.
    #[command(hide = true)]
    DemoKeeper(demo::KeeperArgs),
}

/// A failure that has been printed in full already.
#[derive(Debug)]
struct Reported;

impl std::fmt::Display for Reported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed, see above")
    }
}

impl std::error::Error for Reported {}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            if !err.is::<Reported>() {
                eprintln!("xtask: {err:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    if let Command::DemoKeeper(args) = command {
        return demo::keep(&args);
    }
    let workspace = Workspace::locate()?;
    match command {
        Command::Setup(args) => setup::run(&workspace, &args),
        Command::Test(args) => test::run(&workspace, &args),
        Command::Tidy => tidy::run(&workspace),
        Command::Ci => ci::run(&workspace),
        Command::BuildEbpf => ebpf::run(&workspace),
        Command::Demo => demo::run(&workspace),
        Command::Bench(args) => bench::run(&workspace, &args),
        Command::DemoKeeper(_) => Ok(()),
    }
}
