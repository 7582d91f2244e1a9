//! `sandbox.json`: what an engine must know of a sandbox that it did not make itself.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::tree::CheckpointId;
use crate::deltafs::layer::LayerId;
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::{SandboxId, SandboxSpec};

const FILE: &str = "sandbox.json";
/// Raised when a field changes its meaning.
const VERSION: u32 = 2;

/// A sandbox on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    version: u32,
    pub(super) id: SandboxId,
    pub(super) spec: SandboxSpec,
    pub(super) created_unix_ms: u64,
    pub(super) create_us: u64,
    pub(super) cgroups: Cgroups,
    /// The layer that takes its changes.
    pub(super) live: LayerId,
    /// The layer that was to become the live one when this was written, and may have.
    pub(super) next: Option<LayerId>,
    /// The checkpoint that its state comes from.
    pub(super) head: Option<CheckpointId>,
    /// Raised by every checkpoint and rollback.
    pub(super) epoch: u64,
    /// Number of the next checkpoint.
    pub(super) next_checkpoint: u32,
    /// The frame, for a host base.
    pub(super) frame: Option<String>,
    pub(super) init: InitIdentity,
}

/// Which process is init: a PID alone can be taken over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InitIdentity {
    pub(super) pid: i32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat).
    start_ticks: u64,
    boot_id: String,
}

impl Manifest {
    #[expect(clippy::too_many_arguments, reason = "one per field, named at the only call")]
    pub(super) fn new(
        id: SandboxId,
        spec: SandboxSpec,
        created_unix_ms: u64,
        create_us: u64,
        cgroups: Cgroups,
        live: LayerId,
        frame: Option<String>,
        init: InitIdentity,
    ) -> Self {
        Self {
            version: VERSION,
            id,
            spec,
            created_unix_ms,
            create_us,
            cgroups,
            live,
            next: None,
            head: None,
            epoch: 0,
            next_checkpoint: 1,
            frame,
            init,
        }
    }

    /// Puts it in place; from the rename on the sandbox exists. `durable`: there are checkpoints that survive a power
    /// failure, so its content is on disk before its name is. (Names can be written first, where others sync: xfs.)
    pub(super) fn save(&self, dir: &Path, durable: bool) -> io::Result<()> {
        let staging = dir.join(".sandbox.json");
        fs::write(&staging, serde_json::to_vec_pretty(self)?)?;
        if durable {
            fs::File::open(&staging)?.sync_all()?;
        }
        crate::fault::point("create.manifest")?;
        fs::rename(&staging, dir.join(FILE))
    }

    /// Reads it back. `NotFound` if the sandbox was never finished.
    pub(super) fn load(dir: &Path) -> io::Result<Self> {
        let bytes = fs::read(dir.join(FILE))?;
        let manifest: Self = serde_json::from_slice(&bytes)?;
        if manifest.version == VERSION {
            Ok(manifest)
        } else {
            let why = format!("version {} of sandbox.json; this deltabox reads version {VERSION}", manifest.version);
            Err(io::Error::new(io::ErrorKind::Unsupported, why))
        }
    }
}

impl InitIdentity {
    /// Of a process that runs now.
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id()? })
    }

    /// Whether that very process still runs.
    pub(super) fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|id| id == self.boot_id) && start_ticks(self.pid).is_ok_and(|t| t == self.start_ticks)
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, may hold anything; what follows its last parenthesis does not.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = fields.split_whitespace().nth(19).and_then(|text| text.parse().ok());
    field.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time in stat"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_another_start_time_is_not_it() {
        let mut me = InitIdentity::of(std::process::id().cast_signed()).unwrap();
        assert!(me.is_alive());
        me.start_ticks += 1;
        assert!(!me.is_alive());
    }
}
