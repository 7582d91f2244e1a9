//! Whole sandboxes: files and processes go back together, and the programs themselves confirm it.

mod crowd;
mod descriptors;
mod families;
mod faults;
mod fifos;
mod hidden;
mod leaks;
mod measured;
mod memory;
mod pool;
mod real;
mod sockets;
mod terminals;
mod trees;
mod unlinked;
mod watched;

use deltabox_tests::Host;
use serde_json::Value;

/// Makes a checkpoint with processes.
pub(crate) fn checkpoint(host: &Host) -> String {
    host.cli(["checkpoint", "box"]).ok()
}

/// Rolls back with processes.
pub(crate) fn roll_back(host: &Host, to: &str) -> Value {
    host.cli(["--json", "rollback", "box", to]).json()
}

/// Why a checkpoint is refused.
pub(crate) fn refusal(host: &Host) -> String {
    let refused = host.cli(["--json", "checkpoint", "box"]);
    assert_eq!(refused.code(), 3);
    refused.error()["message"].as_str().expect("a message").to_owned()
}
