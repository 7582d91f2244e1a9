//! `deltabox kill`.

use serde_json::json;

use crate::sandbox::SandboxId;

use super::{Context, Outcome, print};

/// Ends every process of a sandbox; its files stay until `rm`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let () = context.client()?.post(&format!("/v1/sandboxes/{}/kill", args.sandbox), &())?;
    if context.json {
        print::json(&json!({"killed": args.sandbox}))?;
    }
    Ok(0)
}
