//! `deltabox serve`: from the lock to the last connection.
//!
//! Order matters: the lock first (nobody else touches the socket), then the engine (it recovers what is in
//! the store), then the socket, so that whoever can connect is served. At the end the other way round;
//! sandboxes live on, and commands whose clients were connected are left exactly as a crash would leave them.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::engine::{self, Engine};
use crate::sandbox::PoolBounds;

use super::Place;
use super::answer::Refusal;
use super::listen::{ListenError, SocketLock, make_private_dir, may_connect};
use super::routes;

/// How long a daemon that a client started waits for one that is just ending. Chosen: below the client's
/// own deadline of ten seconds, so that the client can still report it.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How long open sessions and requests may take to end at a shutdown. Chosen: they only have to notice it.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(1);

/// What `serve` is told.
#[derive(Clone, Debug)]
pub struct ServeRequest {
    /// Socket and store.
    pub place: Place,
    /// Descriptor that gets one byte when connections are accepted.
    pub ready_fd: Option<u32>,
    /// What the templates of all sandboxes may take.
    pub pool: PoolBounds,
}

/// Why the daemon did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No engine.
    #[error("open store: {0}")]
    Engine(#[from] engine::Error),
    /// The runtime, signals or the ready descriptor.
    #[error("{op}: {source}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
}

impl ServeError {
    /// What the user can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Listen(ListenError::AlreadyRunning { .. }) => {
                "use it, or end it with SIGTERM first (sandboxes live on)".to_owned()
            }
            Self::Listen(ListenError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                "run as root".to_owned()
            }
            Self::Listen(ListenError::Io { .. }) => "choose another socket with --socket".to_owned(),
            Self::Engine(error) => error.hint(),
            Self::Io { .. } => "see the limits of the system (ulimit -a)".to_owned(),
        }
    }
}

/// What every request and session has of the daemon.
#[derive(Clone, Debug)]
pub(super) struct Daemon {
    shared: Arc<Shared>,
    ending: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Shared {
    /// Taken away at the shutdown: requests still under way are then refused.
    open: Mutex<Option<Open>>,
    store: PathBuf,
}

#[derive(Debug)]
struct Open {
    engine: Arc<Engine>,
    sessions: SessionToken,
}

/// Held by every session; the last one dropped tells the shutdown.
pub(super) type SessionToken = mpsc::Sender<Infallible>;

impl Daemon {
    /// The engine, or a refusal when the daemon is ending.
    pub(super) fn engine(&self) -> Result<Arc<Engine>, engine::Error> {
        self.slot().as_ref().map(|open| Arc::clone(&open.engine)).ok_or(engine::Error::ShuttingDown)
    }

    /// What a session holds to its end; `None` when the daemon is ending.
    pub(super) fn session_token(&self) -> Option<SessionToken> {
        self.slot().as_ref().map(|open| open.sessions.clone())
    }

    /// The store's canonical path.
    pub(super) fn store(&self) -> &Path {
        &self.shared.store
    }

    /// Returns when the daemon is ending.
    pub(super) async fn ending(&self) {
        // An error means that the sender is gone: the daemon has ended.
        let _ = self.ending.clone().wait_for(|ending| *ending).await;
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Open>> {
        self.shared.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The daemon's side of [`Daemon`], which ends it.
struct Ender {
    ending: watch::Sender<bool>,
    sessions: mpsc::Receiver<Infallible>,
}

fn daemon(engine: Option<Arc<Engine>>, store: PathBuf) -> (Daemon, Ender) {
    let (ending, ending_receiver) = watch::channel(false);
    let (token, sessions) = mpsc::channel(1);
    let open = engine.map(|engine| Open { engine, sessions: token });
    let shared = Arc::new(Shared { open: Mutex::new(open), store });
    (Daemon { shared, ending: ending_receiver }, Ender { ending, sessions })
}

/// One that refuses whatever needs an engine, as at its end.
#[cfg(test)]
pub(super) fn daemon_without_engine(store: PathBuf) -> Daemon {
    let (daemon, ender) = daemon(None, store);
    // It never ends, which it would as soon as its ender is dropped.
    std::mem::forget(ender);
    daemon
}

/// Serves until SIGTERM or SIGINT. `on_ready` is called once connections are accepted.
///
/// # Errors
/// [`ServeError`]; nothing is left behind but the lock file.
pub fn serve(request: &ServeRequest, on_ready: impl FnOnce()) -> Result<(), ServeError> {
    // What we inherit from whichever client started us must make no difference.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let unmask = nix::sys::signal::SigSet::empty().thread_set_mask();
    unmask.map_err(|errno| ServeError::Io { op: "unblock signals", source: errno.into() })?;
    raise_descriptor_limit();
    let patience = if request.ready_fd.is_some() { LOCK_PATIENCE } else { Duration::ZERO };
    let lock = SocketLock::take(&request.place.socket, patience)?;
    make_private_dir(&request.place.store)?;
    let store = request.place.store.canonicalize().map_err(|source| ServeError::Io { op: "open store", source })?;
    let engine = Arc::new(Engine::open(&engine::Config { store: store.clone(), pool: request.pool })?);
    let (daemon, ender) = daemon(Some(engine), store);

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| ServeError::Io { op: "start runtime", source })?;
    let result = runtime.block_on(async {
        let mut ends = Ends::listen().map_err(|source| ServeError::Io { op: "handle signals", source })?;
        let listener = UnixListener::from_std(lock.listen()?)
            .map_err(|source| ServeError::Io { op: "watch the socket", source })?;
        tracing::info!(socket = %request.place.socket.display(), store = %daemon.store().display(), "listening");
        tell_ready(request.ready_fd).map_err(|source| ServeError::Io { op: "write to --ready-fd", source })?;
        on_ready();
        tokio::select! {
            () = accept(&listener, &daemon) => {}
            name = ends.next() => tracing::info!(signal = name, "ending; sandboxes live on"),
        }
        let removed = lock.remove_socket();
        drop(listener);
        end(&daemon, ender).await;
        Ok(removed?)
    });
    runtime.shutdown_timeout(SHUTDOWN_PATIENCE);
    result
}

/// Every command costs the daemon up to six descriptors. A limit that cannot be raised is one we live with.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open descriptors stays as it is");
    }
}

/// Takes the engine away from requests, ends the sessions, drops the engine.
async fn end(daemon: &Daemon, mut ender: Ender) {
    let engine = daemon.slot().take().map(|open| open.engine);
    if let Some(engine) = &engine {
        engine.retire();
    }
    ender.ending.send_replace(true);
    if tokio::time::timeout(SHUTDOWN_PATIENCE, ender.sessions.recv()).await.is_err() {
        tracing::warn!("sessions still open at shutdown");
    }
    // Its drop may wait for driver threads, which must not stall the runtime.
    if let Err(error) = tokio::task::spawn_blocking(move || drop(engine)).await {
        tracing::error!(%error, "engine panicked at shutdown");
    }
}

struct Ends {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Ends {
    fn listen() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

async fn accept(listener: &UnixListener, daemon: &Daemon) {
    let own_uid = nix::unistd::geteuid().as_raw();
    let router = routes::router(daemon.clone());
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(stream, router.clone(), own_uid));
            }
            Err(error) => {
                tracing::warn!(%error, "accept");
                // Out of descriptors or memory: the connection stays in the queue, so there is nothing to
                // poll for; trying again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, router: Router, own_uid: u32) {
    let peer = match stream.peer_cred() {
        Ok(peer) => peer,
        Err(error) => return tracing::warn!(%error, "SO_PEERCRED"),
    };
    connection_of(stream, router, peer.uid(), own_uid).await;
}

async fn connection_of(stream: UnixStream, router: Router, peer_uid: u32, own_uid: u32) {
    let io = TokioIo::new(stream);
    // A connection that breaks is its client's business; commands learn of it through their sessions.
    let served = if may_connect(peer_uid, own_uid) {
        http1::Builder::new().serve_connection(io, TowerToHyperService::new(router)).with_upgrades().await
    } else {
        tracing::warn!(uid = peer_uid, "connection of another user refused");
        let service = hyper::service::service_fn(async |_| Ok::<_, Infallible>(stranger(peer_uid)));
        http1::Builder::new().keep_alive(false).serve_connection(io, service).await
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection");
    }
}

fn stranger(uid: u32) -> Response {
    let message = format!("uid {uid} may not use this daemon");
    Refusal::new(StatusCode::FORBIDDEN, "forbidden", message, "run as root or as the user the daemon runs as")
        .into_response()
}

/// Writes the byte. The descriptor is opened anew through /proc, because a number from the command line proves
/// no ownership; on standard input (where an auto-starting client puts it) /dev/null takes its place.
fn tell_ready(fd: Option<u32>) -> io::Result<()> {
    use io::Write;
    let Some(fd) = fd else { return Ok(()) };
    std::fs::File::options().write(true).open(format!("/proc/self/fd/{fd}"))?.write_all(b"1")?;
    if fd == 0 {
        nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
