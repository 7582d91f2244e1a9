//! `deltabox logs`.

use std::io::{self, Write};

use crate::daemon::client::Client;
use crate::daemon::types::LogList;
use crate::engine::LogReport;
use crate::sandbox::SandboxId;

use super::{Context, Failure, Outcome, print};

/// Prints what detached commands wrote.
#[derive(Debug, clap::Args)]
#[command(after_help = "With --json: which logs there are and where, not what is in them.\n\n\
    Examples:\n  deltabox logs dev             all, oldest first\n  deltabox logs dev 12 -f       one, as it grows")]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
    /// PID inside of one command; all of them when absent.
    pid: Option<u32>,
    /// Go on while the command may write.
    #[arg(short, long, conflicts_with = "json")]
    follow: bool,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    // A pid that has no log is the daemon's to refuse.
    if let (Some(pid), false) = (args.pid, context.json) {
        copy(&client, &args.sandbox, pid, args.follow)?;
        return Ok(0);
    }
    let mut list: LogList = client.get(&format!("/v1/sandboxes/{}/logs", args.sandbox))?;
    if let Some(pid) = args.pid {
        list.logs.retain(|log| log.pid == pid);
    }
    if context.json {
        print::json(&list)?;
        return Ok(0);
    }
    let follow = if args.follow { Some(the_live_one(&list.logs)?) } else { None };
    for log in &list.logs {
        if list.logs.len() > 1 {
            print::line(&format!("==> {} <==", log.pid))?;
        }
        copy(&client, &args.sandbox, log.pid, follow == Some(log.pid))?;
    }
    Ok(0)
}

/// Which to follow when none was named: there must be no doubt.
fn the_live_one(logs: &[LogReport]) -> Result<u32, Failure> {
    let live: Vec<_> = logs.iter().filter(|log| log.live).map(|log| log.pid.to_string()).collect();
    match (live.len(), logs.last()) {
        (0, Some(last)) => Ok(last.pid),
        (1, _) => Ok(logs.iter().find(|log| log.live).map_or(0, |log| log.pid)),
        (0, None) => Err(Failure::new(1, "no_log", "no command of this sandbox has a log", "start one with `exec -d`")),
        _ => Err(Failure::usage(format!("several commands may still write: {}", live.join(", ")), "name one of them")),
    }
}

fn copy(client: &Client, sandbox: &SandboxId, pid: u32, follow: bool) -> Result<(), Failure> {
    let path = format!("/v1/sandboxes/{sandbox}/logs/{pid}?follow={follow}");
    let mut out = io::stdout().lock();
    client.copy(&path, &mut out)?;
    out.flush()
        .map_err(|source| Failure::from(crate::daemon::client::ClientError::Local { op: "write output", source }))
}
