//! The engine: every sandbox of one store, each with a driver thread of its own.
//!
//! Callers (the daemon) hand in a request and a [`Reply`]; the driver of that sandbox answers from
//! its own thread, so a caller never waits inside the engine and nothing here is async.

mod api;
mod bases;
mod command;
mod create;
mod diff;
mod driver;
mod error;
mod footing;
mod gc;
mod inbox;
mod logs;
mod manifest;
mod processes;
mod ready;
mod recover;
mod request;
mod store;
mod switch;
mod tree;
mod worker;

pub use api::{
    Attachment, BackReport, BaseReport, BoundReport, CheckpointReport, CheckpointRequest, CreateRequest, DiffReport,
    DiffRequest, DiskReport, ExecReport, ExecRequest, Exit, GcReport, LogReport, OnDisconnect, PhaseTime, PoolReport,
    ProcessReport, Reply, RollbackReport, RollbackRequest, SandboxReport, SandboxState, StdinEnd, StdinHold, Stdio,
    Streams, TreeNode, TreeReport, WindowSize,
};
pub use error::{Error, Kind};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::deltafs::fixtures::Fixtures;
use crate::deltafs::hostbase::HostBase;
use crate::deltafs::imported::ImportedBases;
use crate::deltafs::layers::Layers;
use crate::kernel::cgroups::Hierarchies;
use crate::latency::{self, Book, Operation, Span, Subject};
use crate::pool::Pool;
use crate::sandbox::{PoolBounds, SandboxId, idmap};
use driver::{Mail, Message, Shown};
use logs::Logs;
use store::Store;
use worker::Worker;

/// Where an engine keeps its state.
#[derive(Clone, Debug)]
pub struct Config {
    /// The store directory; made with mode 0700 when missing.
    pub store: PathBuf,
    /// What the templates of all sandboxes may take.
    pub pool: PoolBounds,
}

/// All sandboxes of one store. Cheap to clone and share; every method may be called from any thread.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    hosts: Hierarchies,
    id_map: OwnedFd,
    fixtures: Fixtures,
    logs: Logs,
    book: Arc<Book>,
    /// Host bases in use, by what was asked to be shown beyond the default.
    host_bases: Mutex<HashMap<Vec<PathBuf>, Arc<HostBase>>>,
    images: ImportedBases,
    layers: Layers,
    janitor: Worker,
    merger: Worker,
    /// Measures what is in the pool.
    surveyor: Worker,
    pool: Arc<Pool>,
    sandboxes: Mutex<BTreeMap<SandboxId, Handle>>,
    /// Images on their way out, which no new sandbox may take. Locked only with `sandboxes` held.
    leaving: Mutex<BTreeSet<String>>,
    /// Set by [`Engine::retire`].
    retired: Arc<AtomicBool>,
}

/// A sandbox's driver, as the engine reaches it.
#[derive(Clone, Debug)]
struct Handle {
    mail: Arc<Mail>,
    /// The imported image it stands on.
    image: Option<String>,
    /// `None` while it is being created.
    shown: Option<Arc<Mutex<Shown>>>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

impl Engine {
    /// Locks the store (one engine per store), recovers what is in it, cleans up what was half made.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let store = Store::open(&config.store)?;
        let io = |op: &'static str, path: &str| {
            let path = PathBuf::from(path);
            move |source| Error::Io { op, path, source }
        };
        let hosts = Hierarchies::find().map_err(|error| Error::Refused {
            what: "find the host's cgroups".to_owned(),
            why: error.to_string(),
            hint: "mount a cgroup2 file system; `deltabox doctor` tells more".to_owned(),
        })?;
        let id_map =
            idmap::open_namespace().map_err(io("make a user namespace with the id map", "/proc/self/ns/user"))?;
        let fixtures = Fixtures::make().map_err(io("make the shared device directory on", "tmpfs"))?;
        let logs = Logs::start().map_err(io("start the log thread of", "deltabox"))?;
        let images = ImportedBases::at(&store.bases());
        let bases = store.bases();
        images.clean().map_err(|source| Error::Io { op: "clean up", path: bases, source })?;
        let dir = store.layers();
        let layers = Layers::open(&dir).map_err(|source| Error::Io { op: "open", path: dir, source })?;
        let janitor = Worker::start("janitor").map_err(io("start the janitor of", "deltabox"))?;
        let merger = Worker::start_in_background("merger").map_err(io("start the merger of", "deltabox"))?;
        let surveyor = Worker::start_in_background("surveyor").map_err(io("start the surveyor of", "deltabox"))?;
        let pool = Pool::new(config.pool);
        let (host_bases, sandboxes, leaving, retired) = Default::default();
        let engine = Self(Arc::new(Inner {
            store,
            hosts,
            id_map,
            fixtures,
            logs,
            book: Arc::default(),
            host_bases,
            images,
            layers,
            janitor,
            merger,
            surveyor,
            pool,
            sandboxes,
            leaving,
            retired,
        }));
        recover::recover(&engine)?;
        Ok(engine)
    }

    /// From now on the departure of a client means nothing: it is the daemon that ends, and the client will find the
    /// next one. Sandboxes and their commands run on.
    pub fn retire(&self) {
        self.0.retired.store(true, Ordering::SeqCst);
    }

    /// Makes a sandbox and replies when its init is ready. Without a name one is generated.
    pub fn create(&self, request: CreateRequest, reply: Reply<SandboxReport>) {
        create::create(self, request, reply);
    }

    /// All sandboxes, sorted by name. Never waits for a driver.
    pub fn list(&self) -> Vec<SandboxReport> {
        let handles: Vec<Handle> = self.sandboxes().values().cloned().collect();
        handles.iter().filter_map(|handle| Some(lock(handle.shown.as_ref()?).report.clone())).collect()
    }

    /// One sandbox. Never waits for a driver.
    pub fn inspect(&self, id: &SandboxId) -> Result<SandboxReport, Error> {
        let shown = self.shown(id)?;
        Ok(lock(&shown).report.clone())
    }

    /// Its processes as seen from the host's /proc (blocking reads).
    pub fn processes(&self, id: &SandboxId) -> Result<Vec<ProcessReport>, Error> {
        let cgroup = self.inspect(id)?.cgroup;
        processes::read(&cgroup.join("live"))
    }

    /// Commands it holds: running ones and those that ended and are still listed.
    pub fn execs(&self, id: &SandboxId) -> Result<Vec<ExecReport>, Error> {
        let shown = self.shown(id)?;
        Ok(lock(&shown).execs.clone())
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
        self.post(id, Message::Exec { request: Box::new(request), span: Span::begin(Operation::Exec), on_exit, reply });
    }

    /// Attaches to a command that is held (after a lost connection or a daemon restart).
    pub fn attach(&self, id: &SandboxId, pid: u32, on_exit: Box<dyn FnOnce(Exit) + Send>, reply: Reply<Attachment>) {
        self.post(id, Message::Attach { pid, on_exit, reply });
    }

    /// Sends a signal to a command's process group.
    pub fn signal(&self, id: &SandboxId, pid: u32, signal: i32, reply: Reply<()>) {
        self.post(id, Message::Signal { pid, signal, reply });
    }

    /// The log files of detached commands (of one when `pid` is given), by pid.
    pub fn logs(&self, id: &SandboxId, pid: Option<u32>) -> Result<Vec<LogReport>, Error> {
        self.shown(id)?;
        let dir = self.0.store.sandbox(id).logs();
        let io = |source| Error::Io { op: "list", path: dir.clone(), source };
        let mut reports = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            let Some(number) = number else { continue };
            if pid.is_none_or(|pid| pid == number) {
                let len_bytes = std::fs::symlink_metadata(&path).map_err(io)?.len();
                let live = self.0.logs.is_live(&path);
                reports.push(LogReport { pid: number, path, len_bytes, live });
            }
        }
        match pid {
            Some(pid) if reports.is_empty() => Err(Error::NoExec { id: id.clone(), pid }),
            _ => {
                reports.sort_by_key(|report| report.pid);
                Ok(reports)
            }
        }
    }

    /// Latencies of a sandbox's operations, or of all that this engine has carried out. Never waits for a driver.
    pub fn stats(&self, id: Option<&SandboxId>) -> Result<Vec<latency::Row>, Error> {
        let subject = match id {
            None => Subject::All,
            Some(id) => {
                self.shown(id)?;
                Subject::Sandbox(id.to_string())
            }
        };
        Ok(self.0.book.rows(&subject))
    }

    /// Makes a checkpoint and replies when it exists.
    pub fn checkpoint(&self, id: &SandboxId, request: CheckpointRequest, reply: Reply<CheckpointReport>) {
        let span = Span::begin(Operation::Checkpoint);
        self.post(id, Message::Checkpoint { request: Box::new(request), span, reply });
    }

    /// Takes a sandbox back to a checkpoint and replies when its programs run on.
    pub fn rollback(&self, id: &SandboxId, request: RollbackRequest, reply: Reply<RollbackReport>) {
        self.post(id, Message::Rollback { request, span: Span::begin(Operation::Rollback), reply });
    }

    /// Removes a checkpoint, by id or name; its children get its parent.
    pub fn remove_checkpoint(&self, id: &SandboxId, checkpoint: String, reply: Reply<()>) {
        self.post(id, Message::RemoveCheckpoint { checkpoint, reply });
    }

    /// Removes all layers that nobody needs.
    pub fn gc(&self, reply: Reply<GcReport>) {
        self.collect(reply);
    }

    /// Ends every process of a sandbox; its files stay until `remove`.
    pub fn kill(&self, id: &SandboxId, reply: Reply<()>) {
        self.post(id, Message::Kill { reply });
    }

    /// Ends and removes a sandbox with everything it left.
    pub fn remove(&self, id: &SandboxId, reply: Reply<()>) {
        self.post(id, Message::Remove { span: Span::begin(Operation::Remove), reply });
    }

    fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Handle>> {
        lock(&self.0.sandboxes)
    }

    fn shown(&self, id: &SandboxId) -> Result<Arc<Mutex<Shown>>, Error> {
        let handle = self.sandboxes().get(id).cloned();
        handle.and_then(|handle| handle.shown).ok_or_else(|| Error::NoSandbox { id: id.to_string() })
    }

    /// A sandbox that is still being created does not exist yet for requests.
    fn post(&self, id: &SandboxId, message: Message) {
        let handle = self.sandboxes().get(id).cloned();
        match handle.filter(|handle| handle.shown.is_some()) {
            None => driver::refuse(message, id),
            Some(handle) => {
                if let Err(message) = handle.mail.post(message) {
                    driver::refuse(message, id);
                }
            }
        }
    }

    /// The host base that shows `with`, made at its first use.
    fn host_base(&self, with: &[PathBuf]) -> Result<Arc<HostBase>, Error> {
        let mut bases = lock(&self.0.host_bases);
        if let Some(base) = bases.get(with) {
            return Ok(Arc::clone(base));
        }
        let base = HostBase::prepare(&self.0.store.frames(), with, &self.0.id_map);
        let base = Arc::new(base.map_err(|error| error::base_refused("host", error))?);
        bases.insert(with.to_vec(), Arc::clone(&base));
        Ok(base)
    }
}

/// Nothing here is left half changed by a panic, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since the Unix epoch.
fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
