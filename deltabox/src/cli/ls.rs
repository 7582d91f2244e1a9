//! `deltabox ls`.

use crate::daemon::types::SandboxList;
use crate::engine::{SandboxReport, SandboxState};

use super::{Context, Outcome, print};

/// Lists the sandboxes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args, context: &Context) -> Outcome {
    let list: SandboxList = context.client()?.get("/v1/sandboxes")?;
    if context.json {
        print::json(&list)?;
    } else {
        let rows: Vec<_> = list.sandboxes.iter().map(row).collect();
        print::table(&["SANDBOX", "STATE", "BASE", ">AGE", ">INIT"], &rows)?;
    }
    Ok(0)
}

fn row(sandbox: &SandboxReport) -> Vec<String> {
    vec![
        sandbox.id.to_string(),
        state(&sandbox.state),
        sandbox.spec.base.to_string(),
        print::age(sandbox.created_unix_ms),
        sandbox.init_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
    ]
}

/// The state in one cell.
pub(super) fn state(state: &SandboxState) -> String {
    match state {
        SandboxState::Running => "running".to_owned(),
        SandboxState::Dead { reason } => format!("dead ({reason})"),
    }
}
