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

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::OptionalFromRequestParts;
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::Response;
use hyper::body::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, oneshot};

use crate::engine::{Attachment, Exit, StdinEnd, StdinHold, Streams};
use crate::sandbox::SandboxId;
use crate::sys;

use super::answer::Refusal;
use super::frame::{
    self, ClientFrame, FrameBuffer, FrameError, HEADER_LEN, MAX_PAYLOAD, PROTOCOL, STDIN_WINDOW, ServerFrame,
};
use super::server::{Daemon, SessionToken};
use super::types::Started;
use super::watch::watch;

/// Most bytes taken from one stream after the command's exit. From the kernel (/proc/sys/fs/pipe-max-size):
/// no pipe holds more; a background process that goes on writing must not hold the exit up.
const MAX_DRAIN: usize = 1024 * 1024;

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

/// Where input goes. Dropped: end of file for a command that reads a pipe (the hold goes after the descriptor).
struct Sink {
    fd: Arc<AsyncFd<OwnedFd>>,
    _hold: Option<StdinHold>,
}

/// A command's streams, watched. A terminal is one descriptor, read and written at the same time.
struct Ends {
    stdin: Option<Sink>,
    stdout: Option<Arc<AsyncFd<OwnedFd>>>,
    stderr: Option<Arc<AsyncFd<OwnedFd>>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
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
    let output = Output { writer, shared: &shared, buffer: vec![0; HEADER_LEN + MAX_PAYLOAD] };
    tokio::select! {
        end = output.run(input.pid, ends.stdout, ends.stderr, exited) => end,
        end = receive(&input, reader, &head, &shared) => end,
        () = feed(ends.stdin, terminal, &shared) => End::Gone,
        () = daemon.ending() => End::Ending,
    }
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

/// What the client's frames act upon.
struct Input {
    daemon: Daemon,
    id: SandboxId,
    pid: u32,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

/// Takes the client's frames as they come. Ends when the client goes, or says that it goes.
async fn receive(input: &Input, mut reader: OwnedReadHalf, head: &[u8], shared: &Shared) -> End {
    let mut frames = FrameBuffer::new();
    // hyper read no more than it needed plus one buffer; it is taken in parts that surely have room.
    let mut head = head.chunks(MAX_PAYLOAD / 2);
    loop {
        let violation = loop {
            match frames.next() {
                Ok(None) => break None,
                Ok(Some((kind, payload))) => match ClientFrame::parse(kind, payload) {
                    Ok(ClientFrame::Detach) => return End::Detached,
                    Ok(frame) => match input.take(frame, shared) {
                        Ok(()) => {}
                        Err(text) => break Some(text),
                    },
                    Err(error) => break Some(FrameError::to_string(&error)),
                },
                Err(error) => break Some(error.to_string()),
            }
        };
        if let Some(text) = violation {
            shared.lock().violation = Some(text);
            shared.notes.notify_one();
            // `Output` tells the client and ends the session, if the client still listens.
            while reader.read(frames.room()).await.is_ok_and(|n| n > 0) {}
            return End::Gone;
        }
        if let Some(part) = head.next() {
            frames.room()[..part.len()].copy_from_slice(part);
            frames.filled(part.len());
            continue;
        }
        match reader.read(frames.room()).await {
            Ok(n) if n > 0 => frames.filled(n),
            _ => return End::Gone,
        }
    }
}

impl Input {
    fn take(&self, frame: ClientFrame<'_>, shared: &Shared) -> Result<(), String> {
        match frame {
            ClientFrame::Stdin(bytes) => {
                let mut state = shared.lock();
                if state.n_queued + bytes.len() > usize::try_from(STDIN_WINDOW).unwrap_or(usize::MAX) {
                    return Err("more standard input than there was credit for".to_owned());
                }
                if !bytes.is_empty() && !state.input_ended {
                    state.n_queued += bytes.len();
                    state.queue.push_back(bytes.to_vec());
                    shared.input.notify_one();
                }
            }
            ClientFrame::StdinEnd => {
                shared.lock().input_ended = true;
                shared.input.notify_one();
            }
            ClientFrame::Resize(size) => {
                if let Some(terminal) = &self.terminal
                    && let Err(error) = sys::tty::set_window_size(terminal.get_ref(), size.rows, size.cols)
                {
                    tracing::debug!(%error, "TIOCSWINSZ");
                }
            }
            ClientFrame::Signal(number) => self.signal(number),
            // Ended the session before it came here.
            ClientFrame::Detach => {}
        }
        Ok(())
    }

    /// A command that is just ending cannot be signalled: its exit is the answer to that.
    fn signal(&self, number: u8) {
        let Ok(engine) = self.daemon.engine() else { return };
        let pid = self.pid;
        let reply = Box::new(move |answer| {
            if let Err(error) = answer {
                tracing::debug!(pid, number, error = %error, "signal");
            }
        });
        engine.signal(&self.id, pid, number.into(), reply);
    }
}

/// Writes queued input as fast as the command takes it and gives credit for it. Never returns: without
/// input it waits for more, and a command that closed its input has the rest thrown away.
async fn feed(mut stdin: Option<Sink>, terminal: bool, shared: &Shared) {
    loop {
        let (part, ended) = {
            let mut state = shared.lock();
            (state.queue.pop_front(), state.input_ended)
        };
        let Some(part) = part else {
            if ended && let Some(stdin) = stdin.take() {
                end_input(&stdin.fd, terminal).await;
            }
            shared.input.notified().await;
            continue;
        };
        if let Some(sink) = &stdin
            && let Err(error) = write_all(&sink.fd, &part).await
        {
            tracing::debug!(%error, "the command takes no more input");
            stdin = None;
        }
        let mut state = shared.lock();
        state.n_queued -= part.len();
        state.credit += u32::try_from(part.len()).unwrap_or(u32::MAX);
        drop(state);
        shared.notes.notify_one();
    }
}

/// A pipe ends when its last writer is dropped, which the caller does; a terminal in line mode is told by
/// its end-of-file character, as script(1) does, and one in raw mode knows no end.
async fn end_input(stdin: &AsyncFd<OwnedFd>, terminal: bool) {
    use nix::sys::termios::{LocalFlags, SpecialCharacterIndices, tcgetattr};
    if terminal
        && let Ok(modes) = tcgetattr(stdin.get_ref())
        && modes.local_flags.contains(LocalFlags::ICANON)
    {
        let eof = modes.control_chars[SpecialCharacterIndices::VEOF as usize];
        if let Err(error) = write_all(stdin, &[eof]).await {
            tracing::debug!(%error, "write end of file to the terminal");
        }
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut guard = fd.writable().await?;
        if let Ok(result) = guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?)) {
            bytes = &bytes[result?..];
        }
    }
    Ok(())
}

/// Everything that is said to the client.
struct Output<'a> {
    writer: OwnedWriteHalf,
    shared: &'a Shared,
    /// Header and payload of one output frame.
    buffer: Vec<u8>,
}

type Source = Option<Arc<AsyncFd<OwnedFd>>>;

impl Output<'_> {
    async fn run(mut self, pid: u32, stdout: Source, stderr: Source, exited: oneshot::Receiver<Exit>) -> End {
        match self.run_until_exit(pid, stdout, stderr, exited).await {
            Ok(end) => end,
            // Nobody listens any more.
            Err(_) => End::Gone,
        }
    }

    async fn run_until_exit(
        &mut self,
        pid: u32,
        stdout: Source,
        stderr: Source,
        mut exited: oneshot::Receiver<Exit>,
    ) -> io::Result<End> {
        self.say(&ServerFrame::Started(Started { pid })).await?;
        let (mut out_open, mut err_open) = (stdout.is_some(), stderr.is_some());
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut exited => break exit,
                () = self.shared.notes.notified() => {
                    if let Some(end) = self.say_notes().await? {
                        return Ok(end);
                    }
                }
                ready = readable(&stdout), if out_open => out_open = self.pass(frame::STDOUT, ready).await?,
                ready = readable(&stderr), if err_open => err_open = self.pass(frame::STDERR, ready).await?,
            }
        };
        // The engine dropped the sender: it is ending, and the next daemon has the exit.
        let Ok(exit) = exit else { return Ok(End::Ending) };
        self.drain(frame::STDOUT, &stdout).await?;
        self.drain(frame::STDERR, &stderr).await?;
        self.say(&ServerFrame::Exit(exit)).await?;
        self.writer.shutdown().await?;
        Ok(End::Exited)
    }

    /// Passes on one read. Says whether there may be more.
    async fn pass(&mut self, kind: u8, ready: io::Result<Ready<'_>>) -> io::Result<bool> {
        let mut ready = ready?;
        let room = &mut self.buffer[HEADER_LEN..];
        match ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), room)?)) {
            Err(_would_block) => Ok(true),
            Ok(Ok(n)) if n > 0 => self.send(kind, n).await.map(|()| true),
            // End of file; EIO is how a terminal says that no process has it open.
            Ok(_) => Ok(false),
        }
    }

    /// Passes on what is still in the pipe or terminal. (A terminal's read flushes what the kernel still holds
    /// between its two sides before it says EAGAIN: n_tty_read, since Linux 4.6.)
    async fn drain(&mut self, kind: u8, source: &Source) -> io::Result<()> {
        let Some(fd) = source else { return Ok(()) };
        let mut n_drained = 0;
        while n_drained < MAX_DRAIN {
            match nix::unistd::read(fd.get_ref(), &mut self.buffer[HEADER_LEN..]) {
                Ok(n) if n > 0 => {
                    n_drained += n;
                    self.send(kind, n).await?;
                }
                Err(Errno::EINTR) => {}
                _ => break,
            }
        }
        Ok(())
    }

    async fn send(&mut self, kind: u8, n: usize) -> io::Result<()> {
        self.buffer[..HEADER_LEN].copy_from_slice(&frame::header(kind, n));
        self.writer.write_all(&self.buffer[..HEADER_LEN + n]).await
    }

    async fn say(&mut self, frame: &ServerFrame<'_>) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.writer.write_all(&bytes).await
    }

    async fn say_notes(&mut self) -> io::Result<Option<End>> {
        let (credit, violation) = {
            let mut state = self.shared.lock();
            (std::mem::take(&mut state.credit), state.violation.take())
        };
        if let Some(text) = violation {
            let refusal = Refusal::new(StatusCode::BAD_REQUEST, "bad_frame", text, "see docs/api.md");
            self.say(&ServerFrame::Error(refusal.into_body())).await?;
            return Ok(Some(End::Gone));
        }
        if credit > 0 {
            self.say(&ServerFrame::StdinCredit(credit)).await?;
        }
        Ok(None)
    }
}

type Ready<'a> = tokio::io::unix::AsyncFdReadyGuard<'a, OwnedFd>;

async fn readable(source: &Source) -> io::Result<Ready<'_>> {
    match source {
        Some(fd) => fd.readable().await,
        None => std::future::pending().await,
    }
}
