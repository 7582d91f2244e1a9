//! `deltabox checkpoint`.

use serde_json::json;

use crate::engine::{CheckpointReport, CheckpointRequest, PhaseTime};
use crate::sandbox::SandboxId;

use super::{Context, Outcome, print};

/// Keeps the state of a sandbox, to come back to. Prints the checkpoint's id.
///
/// Its programs stand still for about a millisecond and notice nothing. So far files are held, not processes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  deltabox checkpoint dev --fs-only\n  \
                        deltabox checkpoint dev --fs-only --name built --json | jq .stopped_us")]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
    /// A name besides the id; unique in the sandbox.
    #[arg(long)]
    name: Option<String>,
    /// Files only.
    #[arg(long)]
    fs_only: bool,
    /// Come back only when all of it is on disk.
    #[arg(long)]
    durable: bool,
    /// How long to wait for programs that walk through directories (find, rm -r), milliseconds. After that they may
    /// fail.
    #[arg(long, value_name = "MS", default_value_t = CheckpointRequest::default().patience_ms)]
    patience: u32,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let Args { name, fs_only, durable, patience, .. } = args;
    let request = CheckpointRequest { name, fs_only, durable, patience_ms: patience };
    let made: CheckpointReport =
        context.client()?.post(&format!("/v1/sandboxes/{}/checkpoints", args.sandbox), &request)?;
    if context.json {
        let mut value = json!(made);
        value["phases_us"] = phases(&made.phases_us);
        print::json(&value)?;
    } else {
        print::line(&made.id)?;
    }
    Ok(0)
}

/// As an object, in order.
pub(super) fn phases(phases: &[PhaseTime]) -> serde_json::Value {
    phases.iter().map(|PhaseTime { phase, us }| (phase.clone(), json!(us))).collect()
}
