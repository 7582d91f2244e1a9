//! The engine: every sandbox of one store, each with a driver thread of its own.
//!
//! Callers (the daemon) hand in a request and a [`Reply`]; the driver of that sandbox answers from
//! its own thread, so a caller never waits inside the engine and nothing here is async.

mod api;
mod error;

pub use api::{
    Attachment, BaseReport, CreateRequest, ExecReport, ExecRequest, Exit, LogReport, OnDisconnect, ProcessReport,
    Reply, SandboxReport, SandboxState, Stdio, Streams, WindowSize,
};
pub use error::{Error, Kind};

use std::path::PathBuf;

use crate::sandbox::SandboxId;

/// Where an engine keeps its state.
#[derive(Clone, Debug)]
pub struct Config {
    /// The store directory; made with mode 0700 when missing.
    pub store: PathBuf,
}

/// All sandboxes of one store. Cheap to share behind an `Arc`; every method may be called from any thread.
#[derive(Debug)]
pub struct Engine {}

#[allow(clippy::todo, unused_variables, missing_docs)]
impl Engine {
    /// Locks the store (one engine per store), recovers what is in it, cleans up what was half made.
    pub fn open(config: Config) -> Result<Self, Error> {
        todo!()
    }
    /// Makes a sandbox and replies when its init is ready. Without a name one is generated.
    pub fn create(&self, request: CreateRequest, reply: Reply<SandboxReport>) {
        todo!()
    }
    /// All sandboxes, sorted by name. Never waits for a driver.
    pub fn list(&self) -> Vec<SandboxReport> {
        todo!()
    }
    /// One sandbox. Never waits for a driver.
    pub fn inspect(&self, id: &SandboxId) -> Result<SandboxReport, Error> {
        todo!()
    }
    /// Its processes as seen from the host's /proc (blocking reads).
    pub fn processes(&self, id: &SandboxId) -> Result<Vec<ProcessReport>, Error> {
        todo!()
    }
    /// Commands it holds: running ones and those whose exit nobody has fetched.
    pub fn execs(&self, id: &SandboxId) -> Result<Vec<ExecReport>, Error> {
        todo!()
    }
    /// Starts a command. `on_exit` is called once, from the driver thread, after the command has ended
    /// (and not at all if this reply is an error).
    pub fn exec(
        &self,
        id: &SandboxId,
        request: ExecRequest,
        on_exit: Box<dyn FnOnce(Exit) + Send>,
        reply: Reply<Attachment>,
    ) {
        todo!()
    }
    /// Attaches to a command that is held (after a lost connection or a daemon restart).
    pub fn attach(&self, id: &SandboxId, pid: u32, on_exit: Box<dyn FnOnce(Exit) + Send>, reply: Reply<Attachment>) {
        todo!()
    }
    /// Sends a signal to a command's process group.
    pub fn signal(&self, id: &SandboxId, pid: u32, signal: i32, reply: Reply<()>) {
        todo!()
    }
    /// The log files of detached commands (of one when `pid` is given), oldest first.
    pub fn logs(&self, id: &SandboxId, pid: Option<u32>) -> Result<Vec<LogReport>, Error> {
        todo!()
    }
    /// Ends every process of a sandbox; its files stay until `remove`.
    pub fn kill(&self, id: &SandboxId, reply: Reply<()>) {
        todo!()
    }
    /// Ends and removes a sandbox with everything it left.
    pub fn remove(&self, id: &SandboxId, reply: Reply<()>) {
        todo!()
    }
    /// Imports a directory or tar archive as a base (blocking, may take long).
    pub fn import_base(&self, name: &str, source: &std::path::Path) -> Result<BaseReport, Error> {
        todo!()
    }
    /// Imported bases, sorted by name.
    pub fn bases(&self) -> Result<Vec<BaseReport>, Error> {
        todo!()
    }
    /// Removes an imported base; refused while a sandbox uses it.
    pub fn remove_base(&self, name: &str) -> Result<(), Error> {
        todo!()
    }
}
