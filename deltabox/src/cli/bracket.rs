//! A command between a checkpoint and a rollback, which nothing but its output and exit status stays of.
//!
//! The checkpoint is this client's to remove. A client that is killed in between leaves it, under a name that tells
//! what it was for, and the sandbox in the middle: a rollback to it is what was left to do.

use crate::daemon::client::Client;
use crate::engine::{CheckpointReport, CheckpointRequest, RollbackReport, RollbackRequest};
use crate::sandbox::SandboxId;

use super::{Failure, Outcome};

pub(super) fn run(client: &Client, sandbox: &SandboxId, command: impl FnOnce() -> Outcome) -> Outcome {
    let name = Some(format!("bracket-{}", std::process::id()));
    let request = CheckpointRequest { name, ..CheckpointRequest::default() };
    let before: CheckpointReport = client.post(&format!("/v1/sandboxes/{sandbox}/checkpoints"), &request)?;
    // Whatever becomes of the command, there is a way back.
    let outcome = command();
    let request = RollbackRequest { checkpoint: before.id.clone(), fs_only: false };
    let back = client
        .post::<RollbackReport>(&format!("/v1/sandboxes/{sandbox}/rollback"), &request)
        .and_then(|_| client.delete(&format!("/v1/sandboxes/{sandbox}/checkpoints/{}", before.id)));
    match back {
        Ok(()) => outcome,
        Err(error) => Err(Failure::from(error).with_hint(&format!("its checkpoint {} is kept", before.id))),
    }
}
