//! The daemon's side of an exec session: between a command's streams and a client's connection.
//!
//! ```text
//!   connection --receive--> queue (<= STDIN_WINDOW) --feed--> standard input or terminal
//!   connection <--Output--- stdout, stderr or terminal, stdin credit, exit
//! ```
//! Three loops side by side in one task. Must hold: `receive` never waits for the command and `Output` never
//! waits for the client's input, so a signal, a detach or a lost client is noticed whatever is blocked; memory
//! is constant (one read buffer, one frame, one window of input). The end of a session is the command's exit,
//! not the end of its output: a background process may hold the pipes for ever.

mod input;
mod output;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::OptionalFromRequestParts;
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::Response;
use hyper::body::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, oneshot};

use crate::engine::{Attachment, Exit, StdinEnd, StdinHold, Streams};
use crate::sandbox::SandboxId;

use input::{Input, feed, receive};
use output::Output;

use super::answer::Refusal;
use super::frame::{PROTOCOL, ServerFrame};
use super::server::{Daemon, SessionToken};
use super::watch::watch;

/// How long a client may take for the frame under way when the daemon ends. Chosen: half of what the daemon gives.
const ENDING_PATIENCE: Duration = Duration::from_millis(500);

type OnExit = Box<dyn FnOnce(Exit) + Send>;

/// What the engine calls at the command's exit, and where that arrives.
pub(super) fn exit_channel() -> (OnExit, oneshot::Receiver<Exit>) {
    let (sender, receiver) = oneshot::channel();
    let on_exit = move |exit| {
        // A session that ended before the command does not care.
        let _ = sender.send(exit);
    };
    (Box::new(on_exit), receiver)
}

/// A request that wants its connection to become a session.
pub(super) struct Upgrade(OnUpgrade);

impl<S: Send + Sync> OptionalFromRequestParts<S> for Upgrade {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Refusal> {
        let Some(wanted) = parts.headers.get(header::UPGRADE) else { return Ok(None) };
        if !wanted.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()) {
            return Err(upgrade_required());
        }
        parts.extensions.remove::<OnUpgrade>().map(|on| Some(Self(on))).ok_or_else(upgrade_required)
    }
}

/// The answer to an exec or attach that lacks the header.
pub(super) fn upgrade_required() -> Refusal {
    let message = format!("this needs `Connection: Upgrade` and `Upgrade: {PROTOCOL}`");
    let hint = "ask for the upgrade, or exec with stdio kind `log`";
    Refusal::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message, hint)
}

impl Upgrade {
    /// Answers 101 and goes on with the session in a task of its own.
    pub(super) fn start_session(
        self,
        daemon: Daemon,
        id: SandboxId,
        attachment: Attachment,
        exited: oneshot::Receiver<Exit>,
    ) -> Response {
        let token = daemon.session_token();
        tokio::spawn(async move {
            let upgraded = tokio::select! {
                upgraded = self.0 => upgraded,
                () = daemon.ending() => return,
            };
            let upgraded = match upgraded {
                Ok(upgraded) => upgraded,
                Err(error) => return tracing::debug!(%error, "client gone before its session began"),
            };
            session(daemon, id, attachment, exited, upgraded, token).await;
        });
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("Upgrade"));
        response.headers_mut().insert(header::UPGRADE, header::HeaderValue::from_static(PROTOCOL));
        response
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client has the exit.
    Exited,
    /// The connection broke, or the client broke the rules.
    Gone,
    /// The client said that the command goes on without it.
    Detached,
    /// This daemon ends; the client will find the next one.
    Ending,
}

async fn session(
    daemon: Daemon,
    id: SandboxId,
    mut attachment: Attachment,
    exited: oneshot::Receiver<Exit>,
    upgraded: Upgraded,
    _token: Option<SessionToken>,
) {
    let pid = attachment.pid;
    let streams = std::mem::replace(&mut attachment.streams, Streams::Log);
    let end = match upgraded.downcast::<TokioIo<UnixStream>>() {
        Ok(parts) => {
            let (read_half, write_half) = parts.io.into_inner().into_split();
            match Ends::new(streams) {
                Ok(ends) => {
                    let input = Input { daemon: daemon.clone(), id: id.clone(), pid, terminal: ends.terminal.clone() };
                    relay(ends, input, &daemon, exited, read_half, parts.read_buf, write_half).await
                }
                Err(source) => fail(source, write_half).await,
            }
        }
        Err(_) => End::Gone,
    };
    tracing::debug!(sandbox = %id, pid, ?end, "session ended");
    match end {
        // A retired engine takes no notice.
        End::Exited | End::Gone | End::Ending => drop(attachment),
        End::Detached => attachment.detach(),
    }
}

async fn fail(source: io::Error, mut writer: OwnedWriteHalf) -> End {
    let refusal = Refusal::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "io",
        format!("watch the command's streams: {source}"),
        "see the daemon's log in the store directory",
    );
    let mut bytes = Vec::new();
    ServerFrame::Error(refusal.into_body()).encode(&mut bytes);
    // The connection may be gone as well; then nobody is there to be told.
    let _ = writer.write_all(&bytes).await;
    tracing::error!(error = %source, "watch the command's streams");
    End::Gone
}

type Source = Option<Arc<AsyncFd<OwnedFd>>>;

/// Where input goes. Dropped: end of file for a command that reads a pipe (the hold goes after the descriptor).
struct Sink {
    fd: Arc<AsyncFd<OwnedFd>>,
    _hold: Option<StdinHold>,
}

/// A command's streams, watched. A terminal is one descriptor, read and written at the same time.
struct Ends {
    stdin: Option<Sink>,
    stdout: Source,
    stderr: Source,
    terminal: Source,
}

impl Ends {
    fn new(streams: Streams) -> io::Result<Self> {
        let watch = |fd| watch(fd).map(Arc::new);
        Ok(match streams {
            Streams::Pipes { stdin, stdout, stderr } => {
                let sink = |end: StdinEnd| Ok::<_, io::Error>(Sink { fd: watch(end.fd)?, _hold: Some(end.hold) });
                Self {
                    stdin: stdin.map(sink).transpose()?,
                    stdout: Some(watch(stdout)?),
                    stderr: Some(watch(stderr)?),
                    terminal: None,
                }
            }
            Streams::Pty { master } => {
                let master = watch(master)?;
                Self {
                    stdin: Some(Sink { fd: Arc::clone(&master), _hold: None }),
                    stdout: Some(Arc::clone(&master)),
                    stderr: None,
                    terminal: Some(master),
                }
            }
            Streams::Log => Self { stdin: None, stdout: None, stderr: None, terminal: None },
        })
    }
}

async fn relay(
    ends: Ends,
    input: Input,
    daemon: &Daemon,
    exited: oneshot::Receiver<Exit>,
    reader: OwnedReadHalf,
    head: Bytes,
    writer: OwnedWriteHalf,
) -> End {
    let shared = Shared::default();
    let terminal = ends.terminal.is_some();
    let output = Output::new(writer, &shared);
    tokio::select! {
        end = output.run(input.pid, ends.stdout, ends.stderr, exited, daemon) => end,
        end = receive(&input, reader, &head, &shared) => end,
        () = feed(ends.stdin, terminal, &shared) => End::Gone,
        () = out_of_patience(daemon) => End::Ending,
    }
}

/// `Output` notices the daemon's end by itself, between two frames, so that nothing is lost; one that waits for
/// a client that does not read is not waited for.
async fn out_of_patience(daemon: &Daemon) {
    daemon.ending().await;
    tokio::time::sleep(ENDING_PATIENCE).await;
}

/// What the three loops tell each other. Locked for a few instructions, never across an await.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is input to feed.
    input: Notify,
    /// There is something to say besides output.
    notes: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    n_queued: usize,
    input_ended: bool,
    credit: u32,
    violation: Option<String>,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
