//! What goes into the engine and what comes out: plain data, shared with the HTTP interface.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Error;
use crate::deltacr::moment::Outlook;
use crate::deltafs::diff::Change;
use crate::pool::Weight;
use crate::sandbox::{PoolBounds, SandboxId, SandboxSpec};

/// Where an answer goes. Called exactly once, from whichever engine thread has it; must not block.
pub type Reply<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// What `create` takes.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct CreateRequest {
    /// Its name; generated when absent.
    #[serde(default)]
    pub name: Option<SandboxId>,
    /// What it is to be.
    #[serde(flatten)]
    pub spec: SandboxSpec,
}

/// Whether a sandbox has processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum SandboxState {
    /// Its init runs and takes commands.
    Running,
    /// It has no processes; its files are still there.
    Dead {
        /// What ended it.
        reason: String,
    },
}

/// A sandbox as `ls` and `inspect` show it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SandboxReport {
    /// Its name.
    pub id: SandboxId,
    /// Whether it runs.
    #[serde(flatten)]
    pub state: SandboxState,
    /// What it was asked to be.
    pub spec: SandboxSpec,
    /// When it was created, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// PID of its init on the host, while it runs.
    pub init_pid: Option<i32>,
    /// Its cgroup directory on the host.
    #[schema(value_type = String)]
    pub cgroup: PathBuf,
    /// The live layer's directory in the store.
    #[schema(value_type = String)]
    pub live_layer: PathBuf,
    /// The checkpoint that its state comes from.
    pub head: Option<String>,
    /// How often it was checkpointed or rolled back.
    pub epoch: u64,
    /// How long `create` took, microseconds, from the request to a ready init.
    pub create_us: u64,
}

/// How long one phase of an operation took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseTime {
    /// Its name, as in `stats`.
    pub phase: String,
    /// Microseconds.
    pub us: u64,
}

/// What `checkpoint` takes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckpointRequest {
    /// Its name besides its id.
    #[serde(default)]
    pub name: Option<String>,
    /// Files only, no processes.
    #[serde(default)]
    pub fs_only: bool,
    /// Answer when all of it is on disk.
    #[serde(default)]
    pub durable: bool,
    /// How long programs that walk through directories are waited for, milliseconds. After that they may fail.
    #[serde(default = "default_patience_ms")]
    pub patience_ms: u32,
}

impl Default for CheckpointRequest {
    fn default() -> Self {
        Self { name: None, fs_only: false, durable: false, patience_ms: default_patience_ms() }
    }
}

/// Chosen: most walks are shorter, and nobody waits where nobody walks.
fn default_patience_ms() -> u32 {
    10_000
}

/// A checkpoint, and how it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointReport {
    /// Whose.
    pub sandbox: SandboxId,
    /// Its id in the sandbox: `c1`, `c2`, ...
    pub id: String,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// The checkpoint that the sandbox's state came from when it was made.
    pub parent: Option<String>,
    /// The epoch that it ended.
    pub epoch: u64,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// It holds no processes.
    pub fs_only: bool,
    /// Whether a layer was frozen for it; else nothing had been written since its parent.
    pub fs_frozen: bool,
    /// Whether it was on disk when it was answered.
    pub durable: bool,
    /// How long the programs stood still, microseconds.
    pub stopped_us: u64,
    /// From the request to the answer, microseconds.
    pub total_us: u64,
    /// Where the time went, in order.
    pub phases_us: Vec<PhaseTime>,
    /// Processes that were stopped.
    pub n_processes: usize,
    /// Their threads.
    pub n_threads: usize,
    /// Open file descriptions that were moved.
    pub n_descriptions: usize,
    /// Memory of its processes that is theirs, not of files, bytes; 0 without processes.
    pub memory_bytes: u64,
}

/// What `rollback` takes.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct RollbackRequest {
    /// Id or name of the checkpoint.
    pub checkpoint: String,
    /// Files only; the processes go on as they are.
    #[serde(default)]
    pub fs_only: bool,
}

/// How a rollback went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RollbackReport {
    /// Id of the checkpoint.
    pub checkpoint: String,
    /// How long the programs stood still, microseconds.
    pub stopped_us: u64,
    /// From the request to the answer, microseconds.
    pub total_us: u64,
    /// Where the time went, in order.
    pub phases_us: Vec<PhaseTime>,
    /// Processes that were stopped.
    pub n_processes: usize,
    /// Their threads.
    pub n_threads: usize,
    /// Open file descriptions that were moved.
    pub n_descriptions: usize,
    /// What became of each process of the checkpoint; empty for a rollback of files alone.
    pub processes: Vec<BackReport>,
}

/// A process that has come back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackReport {
    /// Its PID inside.
    pub pid: i32,
    /// `in place`: it lived, and what had changed in it was put back. `fork`: it had ended, and its template made it again.
    pub how: String,
}

/// The checkpoints of a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TreeReport {
    /// Whose.
    pub sandbox: SandboxId,
    /// Where its state comes from: the last checkpoint or rollback.
    pub head: Option<String>,
    /// By number, so that a parent comes before its children.
    pub checkpoints: Vec<TreeNode>,
    /// What its templates take.
    pub pool: PoolReport,
}

/// What templates take, and may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolReport {
    /// Those of the sandbox.
    pub sandbox: BoundReport,
    /// Those of all sandboxes.
    pub host: BoundReport,
}

/// What is held of what may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BoundReport {
    /// What is held.
    pub held: Weight,
    /// What may be.
    pub most: PoolBounds,
}

/// A checkpoint in its tree.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TreeNode {
    /// The checkpoint.
    #[serde(flatten)]
    pub checkpoint: CheckpointReport,
    /// Layers in its stack, the base not counted.
    pub n_layers: usize,
    /// Bytes on disk that only it needs: what its removal would free.
    pub own_bytes: u64,
    /// Bytes on disk of its layers that others need too.
    pub shared_bytes: u64,
    /// Whether templates of its processes are in memory: how a rollback would have them back.
    pub in_memory: bool,
    /// Templates that only it has: what its removal would free.
    pub own_templates: Weight,
    /// Templates that other checkpoints have too: of processes that were the same in both.
    pub shared_templates: Weight,
    /// How a rollback of its processes would go now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outlook: Option<Outlook>,
    /// Which layer of its stack is not whole, and why: no rollback to it then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

/// What a sandbox's files take on disk, bytes. The base is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskReport {
    /// What was written since the last checkpoint or rollback.
    pub live_bytes: u64,
    /// Layers that no other sandbox needs, the live one included.
    pub own_bytes: u64,
    /// Layers that another sandbox needs too.
    pub shared_bytes: u64,
    /// Layers under the live one.
    pub n_layers: usize,
}

/// What `diff` takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DiffRequest {
    /// The older state: a checkpoint by id or name; when absent the one that the sandbox's state comes from, or, without
    /// one, its state when it was created.
    pub from: Option<String>,
    /// The newer state: a checkpoint by id or name; when absent the live state.
    pub to: Option<String>,
    /// Also unified diffs of text files.
    #[serde(default)]
    pub patch: bool,
    /// Also each entry that was in a deleted directory.
    #[serde(default)]
    pub contents: bool,
}

/// What differs between two states of a sandbox's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiffReport {
    /// Whose.
    pub sandbox: SandboxId,
    /// The older state's checkpoint; none: as it was created.
    pub from: Option<String>,
    /// The newer state's checkpoint; none: the live state, which is read while programs may write to it.
    pub to: Option<String>,
    /// By path.
    pub changes: Vec<Change>,
}

/// What `gc` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GcReport {
    /// Layers that were removed.
    pub n_layers: usize,
    /// What they took on disk, bytes.
    pub bytes: u64,
}

/// One process of a sandbox, as `ps` shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ProcessReport {
    /// PID inside the sandbox.
    pub pid: u32,
    /// Its parent's PID inside; 0 when the parent is outside.
    pub ppid: u32,
    /// PID on the host.
    pub host_pid: i32,
    /// User inside.
    pub uid: u32,
    /// One letter as in ps(1): R, S, D, T, t, Z.
    pub state: String,
    /// Number of threads.
    pub n_threads: u32,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
    /// Command line, joined by spaces; the name in brackets when it has none.
    pub command: String,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// What a command's standard streams are connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Stdio {
    /// Three pipes to the client.
    Pipes {
        /// Whether the command has a standard input; without, it reads end of file at once.
        stdin: bool,
    },
    /// A terminal of the sandbox, controlled by the client.
    Pty {
        /// Its first size.
        size: WindowSize,
    },
    /// No input; standard output and error go to the command's log.
    Log,
}

/// What becomes of a command whose client disappears without saying goodbye.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDisconnect {
    /// Its process group gets SIGHUP, then SIGKILL if it is still there after five seconds.
    #[default]
    End,
    /// It goes on; what it prints goes to its log, and a client may attach again.
    Leave,
}

/// What `exec` takes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExecRequest {
    /// Program and arguments; looked up along PATH unless it holds a slash.
    pub argv: Vec<String>,
    /// `KEY=VALUE` on top of the sandbox's own environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory inside; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User inside.
    #[serde(default)]
    pub uid: u32,
    /// Group inside; the same number as `uid` when absent.
    #[serde(default)]
    pub gid: Option<u32>,
    /// Its standard streams.
    pub stdio: Stdio,
    /// What happens when the client disappears.
    #[serde(default)]
    pub on_disconnect: OnDisconnect,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "how")]
pub enum Exit {
    /// By itself, with this status (0 to 255).
    Exited {
        /// Its exit status.
        status: u8,
    },
    /// By a signal.
    Signaled {
        /// The signal's number.
        signal: u8,
        /// Whether a core was dumped.
        core_dumped: bool,
    },
    /// Unknown: the sandbox ended under it (killed, removed, out of memory).
    Lost,
}

impl Exit {
    /// The status a shell would report: 128 + signal for a signal, 137 when the sandbox was lost.
    pub fn shell_status(self) -> u8 {
        match self {
            Self::Exited { status } => status,
            Self::Signaled { signal, .. } => 128_u8.saturating_add(signal),
            Self::Lost => 137,
        }
    }
}

/// One command that a sandbox holds.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExecReport {
    /// PID inside.
    pub pid: u32,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Its standard streams.
    pub stdio: Stdio,
    /// What happens when its client disappears.
    pub on_disconnect: OnDisconnect,
    /// Whether a client is attached.
    pub attached: bool,
    /// When it was started, milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
}

/// The log of one command.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LogReport {
    /// PID inside of the command.
    pub pid: u32,
    /// The file on the host.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Its size in bytes.
    pub len_bytes: u64,
    /// Whether the command may still write to it.
    pub live: bool,
}

/// An imported base.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BaseReport {
    /// Its name.
    pub name: String,
    /// Regular files, directories, links and devices in it.
    pub n_entries: u64,
    /// Bytes of file content.
    pub len_bytes: u64,
    /// When it was imported, milliseconds since the Unix epoch.
    pub imported_unix_ms: u64,
    /// What it was imported from.
    pub source: String,
    /// What could not be kept as it was, one sentence each.
    pub notes: Vec<String>,
}

/// The host's ends of a command's streams: non-blocking, close-on-exec.
#[derive(Debug)]
pub enum Streams {
    /// Three pipes.
    Pipes {
        /// Write end; drop it for end of file. `None` if the command was started without input.
        stdin: Option<StdinEnd>,
        /// Read end.
        stdout: OwnedFd,
        /// Read end.
        stderr: OwnedFd,
    },
    /// The terminal's master: read, write, TIOCSWINSZ.
    Pty {
        /// The master.
        master: OwnedFd,
    },
    /// Nothing to read: the engine writes the log.
    Log,
}

/// The write end of a command's standard input.
#[derive(Debug)]
pub struct StdinEnd {
    /// The pipe's write end.
    pub fd: OwnedFd,
    /// To be dropped after `fd`: end of file for the command.
    pub hold: StdinHold,
}

impl From<OwnedFd> for StdinEnd {
    /// An input that no engine keeps open.
    fn from(fd: OwnedFd) -> Self {
        Self { fd, hold: StdinHold(None) }
    }
}

/// Keeps a command's standard input open. The copies that outlive a restart of the engine are closed when it is
/// dropped, and with them the last writer.
pub struct StdinHold(pub(super) Option<Box<dyn FnOnce() + Send + Sync>>);

impl Drop for StdinHold {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell();
        }
    }
}

impl std::fmt::Debug for StdinHold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StdinHold")
    }
}

/// A client's hold on a command. Dropping it tells the driver that the client is gone: a running command
/// is ended or left by its [`OnDisconnect`], an ended one is forgotten.
pub struct Attachment {
    /// PID inside.
    pub pid: u32,
    /// The command's streams; at most one attachment has them at a time.
    pub streams: Streams,
    pub(super) on_drop: Option<Box<dyn FnOnce(Departure) + Send>>,
}

/// How a client went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Departure {
    /// It vanished (or the command has ended and all was read).
    Gone,
    /// It said that the command is to go on without it.
    Detached,
}

impl Attachment {
    /// Lets the command go on, whatever its [`OnDisconnect`] says.
    pub fn detach(mut self) {
        if let Some(tell) = self.on_drop.take() {
            tell(Departure::Detached);
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(tell) = self.on_drop.take() {
            tell(Departure::Gone);
        }
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment").field("pid", &self.pid).field("streams", &self.streams).finish_non_exhaustive()
    }
}
