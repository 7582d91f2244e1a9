//! `deltabox attach`.

use crate::daemon::types::ExecList;
use crate::engine::Stdio;
use crate::sandbox::SandboxId;

use super::exec::{local, report};
use super::{Context, Outcome};

/// Takes up a command that the sandbox holds; the exit status is the command's.
#[derive(Debug, clap::Args)]
#[command(after_help = "`deltabox inspect SANDBOX` shows the commands and their pids.\n\n\
    Example:\n  deltabox exec -t --on-disconnect leave dev -- bash      then close the terminal, and\n  \
    deltabox attach dev 12")]
pub(super) struct Args {
    /// Pass standard input on (a command with a terminal gets it anyway, if ours is one).
    #[arg(short, long)]
    interactive: bool,
    /// The sandbox.
    sandbox: SandboxId,
    /// PID of the command inside.
    pid: u32,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    let held: ExecList = client.get(&format!("/v1/sandboxes/{}/execs", args.sandbox))?;
    // An unknown pid is the daemon's to refuse.
    let stdio = held.execs.iter().find(|exec| exec.pid == args.pid).map(|exec| exec.stdio);
    let tty = matches!(stdio, Some(Stdio::Pty { .. })) && !context.json;
    let ended = client.attach(&args.sandbox, args.pid, local(tty, args.interactive, context.json))?;
    report(ended, &args.sandbox, context.json)
}
