//! The JSON of the HTTP interface that is not already the engine's own (`engine::api`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::engine::{BaseReport, ExecReport, LogReport, ProcessReport, SandboxReport};

/// What is wrong, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// A stable word for programs.
    pub code: String,
    /// What failed, on what, why.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The one error.
    pub error: ErrorDetail,
}

/// What `ping` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PingReport {
    /// Version of the daemon's program.
    pub version: String,
    /// Version of this interface.
    pub api: u32,
    /// PID of the daemon.
    pub pid: u32,
    /// The store it works on.
    #[schema(value_type = String)]
    pub store: PathBuf,
}

/// All sandboxes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SandboxList {
    /// Sorted by name.
    pub sandboxes: Vec<SandboxReport>,
}

/// The processes of one sandbox.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ProcessList {
    /// One per process.
    pub processes: Vec<ProcessReport>,
}

/// The commands that one sandbox holds.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExecList {
    /// One per command.
    pub execs: Vec<ExecReport>,
}

/// Latencies of operations, measured by the engine since it started.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StatList {
    /// By operation: the whole first, then its phases in their order.
    pub stats: Vec<crate::latency::Row>,
}

/// The logs of one sandbox.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LogList {
    /// Oldest first.
    pub logs: Vec<LogReport>,
}

/// The imported bases.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// Sorted by name.
    pub images: Vec<BaseReport>,
}

/// What `image import` takes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageRequest {
    /// The name it is to have.
    pub name: String,
    /// Absolute path of a directory or tar archive on the daemon's host.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

/// What a command is to be sent.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct SignalRequest {
    /// The signal's number.
    #[schema(minimum = 1, maximum = 64)]
    pub signal: i32,
}

/// A command that was started, or attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// Its PID inside.
    pub pid: u32,
}
