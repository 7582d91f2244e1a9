//! `deltabox rm`.

use serde_json::json;

use super::parse::{self, Target};
use super::{Context, Failure, Outcome, print};

/// Ends and removes sandboxes with everything they left, or single checkpoints of them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Goes on after one that cannot be removed; the exit code is then 1. The children of a removed \
    checkpoint become its parent's.\n\n\
    Examples:\n  deltabox rm dev test\n  deltabox rm dev@c3")]
pub(super) struct Args {
    /// The sandboxes and checkpoints.
    #[arg(required = true, value_name = "SANDBOX[@CHECKPOINT]", value_parser = parse::parse_target)]
    targets: Vec<Target>,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    let mut removed = Vec::new();
    let mut failed = Vec::new();
    for id in &args.targets {
        let path = match &id.checkpoint {
            None => format!("/v1/sandboxes/{}", id.sandbox),
            Some(checkpoint) => format!("/v1/sandboxes/{}/checkpoints/{checkpoint}", id.sandbox),
        };
        match client.delete(&path) {
            Ok(()) => removed.push(id.to_string()),
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
        let failed: Vec<_> =
            failed.iter().map(|(id, failure)| json!({"id": id.to_string(), "error": failure.detail})).collect();
        print::json(&json!({"removed": removed, "failed": failed}))?;
    }
    // One object on standard error: that of the only failure, or their number.
    match failed.as_slice() {
        [] => Ok(0),
        [(_, failure)] if context.json => {
            Err(Failure::new(1, &failure.detail.code, &failure.detail.message, &failure.detail.hint))
        }
        several if context.json => {
            let message = format!("{} of {} could not be removed", several.len(), args.targets.len());
            Err(Failure::new(1, "not_removed", message, "`failed` on standard output has the reasons"))
        }
        several => {
            several.iter().for_each(|(_, failure)| failure.report(false));
            Ok(1)
        }
    }
}
