//! `deltabox rm`.

use serde_json::json;

use crate::sandbox::SandboxId;

use super::{Context, Failure, Outcome, print};

/// Ends and removes sandboxes with everything they left.
#[derive(Debug, clap::Args)]
#[command(after_help = "Goes on after a sandbox that cannot be removed; the exit code is then 1.\n\n\
    Example:\n  deltabox rm dev test")]
pub(super) struct Args {
    /// The sandboxes.
    #[arg(required = true, value_name = "SANDBOX")]
    sandboxes: Vec<SandboxId>,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    let mut removed = Vec::new();
    let mut failed = Vec::new();
    for id in &args.sandboxes {
        match client.delete(&format!("/v1/sandboxes/{id}")) {
            Ok(()) => removed.push(id),
            Err(error) => {
                let failure = Failure::from(error);
                // Without a daemon the others would only say the same.
                if failure.exit_code == 125 {
                    return Err(failure);
                }
                failed.push((id, failure));
            }
        }
    }
    if context.json {
        let failed: Vec<_> = failed.iter().map(|(id, failure)| json!({"id": id, "error": failure.detail})).collect();
        print::json(&json!({"removed": removed, "failed": failed}))?;
    }
    // One object on standard error: that of the only failure, or their number.
    match failed.as_slice() {
        [] => Ok(0),
        [(_, failure)] if context.json => {
            Err(Failure::new(1, &failure.detail.code, &failure.detail.message, &failure.detail.hint))
        }
        several if context.json => {
            let message = format!("{} of {} sandboxes could not be removed", several.len(), args.sandboxes.len());
            Err(Failure::new(1, "not_removed", message, "`failed` on standard output has the reasons"))
        }
        several => {
            several.iter().for_each(|(_, failure)| failure.report(false));
            Ok(1)
        }
    }
}
