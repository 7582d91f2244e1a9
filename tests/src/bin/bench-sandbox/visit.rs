//! The floor of exec: a process enters a running sandbox's namespaces by itself and starts a program there.
//!
//! Only a process with one thread may enter a user namespace, and it cannot come back: every round is a new
//! process of this program, which measures itself once it is warm.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use deltabox::sys::process::pidfd_open;
use nix::sched::{CloneFlags, setns};

/// What a visitor starts.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Visit {
    /// `/bin/true` without streams.
    True,
    /// `printf` of 1024 bytes into a pipe.
    Kib,
    /// `/bin/true` with a terminal of the sandbox.
    Pty,
}

/// The program that both sides of the comparison run.
pub(crate) fn argv(visit: Visit) -> &'static [&'static str] {
    match visit {
        Visit::True | Visit::Pty => &["/bin/true"],
        Visit::Kib => &["/usr/bin/printf", "%01024d", "0"],
    }
}

/// Starts a visitor and gives what it measured.
pub(crate) fn visit(init: i32, visit: Visit) -> anyhow::Result<Duration> {
    let kind = clap::ValueEnum::to_possible_value(&visit).map_or_else(String::new, |kind| kind.get_name().to_owned());
    let output = Command::new("/proc/self/exe")
        .args(["visit", &init.to_string(), &kind])
        .stderr(Stdio::inherit())
        .output()
        .context("start a visitor")?;
    ensure!(output.status.success(), "visitor: {}", output.status);
    let ns = String::from_utf8_lossy(&output.stdout).trim().parse().context("read what a visitor measured")?;
    Ok(Duration::from_nanos(ns))
}

/// The visitor's whole life; gives what it measured.
pub(crate) fn run(init: i32, visit: Visit) -> anyhow::Result<Duration> {
    let init = pidfd_open(init).context("open the init of the sandbox")?;
    // Code, page tables and the processor are warm after this.
    run_program(Visit::Kib)?;
    let begun = Instant::now();
    enter(&init)?;
    run_program(visit)?;
    Ok(begun.elapsed())
}

fn enter(init: &OwnedFd) -> anyhow::Result<()> {
    let all = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    setns(init.as_fd(), all).context("enter the sandbox")?;
    let (user, group) = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    nix::unistd::setresgid(group, group, group)?;
    Ok(nix::unistd::setresuid(user, user, user)?)
}

/// fork (posix_spawn, which is a vfork), exec, wait.
fn run_program(visit: Visit) -> anyhow::Result<()> {
    let argv = argv(visit);
    let mut command = Command::new(argv[0]);
    command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = match visit {
        Visit::True => command.status()?,
        Visit::Kib => {
            let mut child = command.stdout(Stdio::piped()).spawn()?;
            let mut bytes = Vec::new();
            child.stdout.take().context("stdout is piped")?.read_to_end(&mut bytes)?;
            ensure!(bytes.len() == 1024, "{} bytes instead of 1024", bytes.len());
            child.wait()?
        }
        Visit::Pty => {
            let pty = nix::pty::openpty(None, None).context("open a terminal")?;
            command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).stderr(pty.slave);
            command.status()?
        }
    };
    ensure!(status.success(), "{argv:?}: {status}");
    Ok(())
}
