//! `deltabox rollback`.

use serde_json::json;

use crate::engine::{RollbackReport, RollbackRequest};
use crate::sandbox::SandboxId;

use super::{Context, Outcome, checkpoint, print};

/// Takes a sandbox back to a checkpoint of its tree.
///
/// With --fs-only its processes go on: an open file that the checkpoint has shows what it had then, one that it does not
/// have goes on without a name.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  deltabox rollback dev c1 --fs-only\n  deltabox rollback dev built --fs-only")]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
    /// Id or name of the checkpoint.
    checkpoint: String,
    /// Files only.
    #[arg(long)]
    fs_only: bool,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let request = RollbackRequest { checkpoint: args.checkpoint, fs_only: args.fs_only };
    let done: RollbackReport = context.client()?.post(&format!("/v1/sandboxes/{}/rollback", args.sandbox), &request)?;
    if context.json {
        let mut value = json!(done);
        value["phases_us"] = checkpoint::phases(&done.phases_us);
        print::json(&value)?;
    }
    Ok(0)
}
