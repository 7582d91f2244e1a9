//! `deltabox ps`.

use crate::daemon::types::ProcessList;
use crate::sandbox::SandboxId;

use super::{Context, Outcome, print};

/// Lists the processes of a sandbox.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let list: ProcessList = context.client()?.get(&format!("/v1/sandboxes/{}/processes", args.sandbox))?;
    if context.json {
        print::json(&list)?;
        return Ok(0);
    }
    let row = |process: &crate::engine::ProcessReport| {
        vec![
            process.pid.to_string(),
            process.ppid.to_string(),
            process.host_pid.to_string(),
            process.uid.to_string(),
            process.state.clone(),
            process.n_threads.to_string(),
            print::size(process.rss_bytes),
            process.command.clone(),
        ]
    };
    let rows: Vec<_> = list.processes.iter().map(row).collect();
    print::table(&[">PID", ">PPID", ">HOST", ">UID", "S", ">THREADS", ">RSS", "COMMAND"], &rows)?;
    Ok(0)
}
