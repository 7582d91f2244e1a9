//! The client's side of an exec session, across daemons: when the connection breaks, the command is attached
//! to again through the next daemon.
//!
//! Sending and receiving go on side by side, so that a signal gets through to a command whose output nobody
//! takes. Bytes that a daemon had in its hands when it was killed may be lost: standard input, and at most one
//! frame of output (none when it was told to end).

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use hyper::body::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use crate::daemon::frame::{ClientFrame, FrameBuffer, MAX_PAYLOAD, STDIN_WINDOW, ServerFrame};
use crate::engine::{ExecRequest, Exit};
use crate::sandbox::SandboxId;

use super::input::Input;
use super::output::{Captured, Output, OutputTo, Stream};
use super::signals::Signals;
use super::terminal::{RawMode, terminal_size};
use super::{Client, ClientError, encode, start, success, upgraded};

/// How long a broken session is tried to be taken up again. Chosen: a daemon's start has the same.
const RECONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Attempts that may meet an ending daemon. Chosen: one is usual, two if its successor ends as well, each met twice where it is
/// slow to end.
const MAX_ENDED: u32 = 4;

/// What the session has on our side.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    /// Whether standard input is passed on (and consumed).
    pub stdin: bool,
    /// Whether the command has a terminal: ours is then in raw mode, and its size is passed on.
    pub tty: bool,
    /// Where output goes.
    pub output: OutputTo,
}

/// How a session ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// The command ended.
    Exit {
        /// Its PID inside.
        pid: u32,
        /// How.
        exit: Exit,
        /// What it wrote, if that was asked for.
        captured: Captured,
    },
    /// We left: by this signal (SIGPIPE when nobody takes our output).
    Left {
        /// Its number.
        signal: u8,
    },
}

impl Client {
    /// Starts a command and stays with it.
    ///
    /// # Errors
    /// [`ClientError`]; after [`ClientError::SessionLost`] the command may still run.
    pub fn exec(&self, id: &SandboxId, request: &ExecRequest, local: Local) -> Result<Ended, ClientError> {
        let body = encode(request)?;
        self.block_on(async {
            let result = self.session(id, format!("/v1/sandboxes/{id}/execs"), Some(body), local).await;
            self.explain(result).await
        })
    }

    /// Stays with a command that the sandbox holds.
    ///
    /// # Errors
    /// As of [`Self::exec`].
    pub fn attach(&self, id: &SandboxId, pid: u32, local: Local) -> Result<Ended, ClientError> {
        self.block_on(async {
            let result = self.session(id, attach_path(id, pid), None, local).await;
            self.explain(result).await
        })
    }

    async fn session(
        &self,
        id: &SandboxId,
        path: String,
        body: Option<Vec<u8>>,
        local: Local,
    ) -> Result<Ended, ClientError> {
        let mut connection = self.open_session(&path, body).await?;
        let mut near = Near::open(local)?;
        let mut pid = None;
        loop {
            match near.stay(connection, &mut pid).await? {
                Stayed::Exit(exit) => return near.finish(pid.unwrap_or(0), exit).await,
                Stayed::Left(signal) => return Ok(Ended::Left { signal }),
                Stayed::OutputClosed => return near.output_closed().await,
                Stayed::Broken(source) => {
                    let Some(pid) = pid else { return Err(self.broken(source)) };
                    connection = tokio::select! {
                        again = self.again(id, pid) => again.map_err(|why| ClientError::SessionLost {
                            sandbox: id.to_string(),
                            pid,
                            why: Box::new(why),
                        })?,
                        signal = near.signals.next() => return Ok(Ended::Left { signal }),
                    };
                }
            }
        }
    }

    async fn open_session(&self, path: &str, body: Option<Vec<u8>>) -> Result<Connection, ClientError> {
        let response = success(self.request(Method::POST, path, body, true).await?).await?;
        let (stream, head) = upgraded(response).await?;
        Ok(Connection { stream, head })
    }

    /// Attaches through whichever daemon is there within the deadline.
    async fn again(&self, id: &SandboxId, pid: u32) -> Result<Connection, ClientError> {
        let path = attach_path(id, pid);
        let attempts = async {
            let mut n_ended = 0;
            loop {
                let watch = start::watch_socket(&self.place);
                match (self.open_session(&path, None).await, watch) {
                    // Nobody listens and we may not start a daemon: somebody else does.
                    (Err(ClientError::Connect { .. }), Ok(watch)) => {
                        watch.changed().await.map_err(|source| ClientError::Local { op: "watch socket", source })?;
                    }
                    // It ended while we asked. (One that ends whenever it is asked must not be started for ever.)
                    (Err(error), _) if n_ended < MAX_ENDED && was_ending(&error) => n_ended += 1,
                    (result, _) => return result,
                }
            }
        };
        match tokio::time::timeout(RECONNECT_WITHIN, attempts).await {
            Ok(result) => result,
            Err(_) => Err(self.broken(io::ErrorKind::TimedOut.into())),
        }
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Lost { socket: PathBuf::clone(&self.place.socket), source }
    }
}

fn attach_path(id: &SandboxId, pid: u32) -> String {
    format!("/v1/sandboxes/{id}/execs/{pid}/attach")
}

fn was_ending(error: &ClientError) -> bool {
    match error {
        ClientError::Lost { .. } => true,
        ClientError::Answer { error, .. } => error.code == "shutting_down",
        _ => false,
    }
}

/// An upgraded connection and what was read of it already.
struct Connection {
    stream: UnixStream,
    head: Bytes,
}

/// How one connection ended.
enum Stayed {
    Exit(Exit),
    Left(u8),
    OutputClosed,
    Broken(io::Error),
}

/// Our side: outlives connections.
struct Near {
    local: Local,
    signals: Signals,
    input: Input,
    /// Read but not yet sent when a connection broke.
    unsent: Vec<u8>,
    stdin_ended: bool,
    output: Output,
    _raw: Option<RawMode>,
}

impl Near {
    fn open(local: Local) -> Result<Self, ClientError> {
        let failed = |op| move |source| ClientError::Local { op, source };
        Ok(Self {
            local,
            signals: Signals::listen().map_err(failed("handle signals"))?,
            input: if local.stdin { Input::open().map_err(failed("watch standard input"))? } else { Input::Closed },
            unsent: Vec::new(),
            stdin_ended: false,
            output: Output::open(local.output).map_err(failed("start output"))?,
            // Last: everything that can fail comes before.
            _raw: if local.tty { RawMode::enter().map_err(failed("set raw mode"))? } else { None },
        })
    }

    /// Passes everything on until the command ends, we leave, or the connection breaks.
    async fn stay(&mut self, connection: Connection, pid: &mut Option<u32>) -> Result<Stayed, ClientError> {
        let (reader, writer) = connection.stream.into_split();
        let (credit, credit_receiver) = watch::channel(u64::from(STDIN_WINDOW));
        let sending = Sending {
            local: self.local,
            signals: &mut self.signals,
            input: &mut self.input,
            unsent: &mut self.unsent,
            stdin_ended: &mut self.stdin_ended,
            writer,
            credit: credit_receiver,
        };
        tokio::select! {
            // An exit that has arrived counts more than a connection that breaks after it.
            biased;
            stayed = receive(reader, &connection.head, &mut self.output, credit, pid) => stayed,
            stayed = sending.run() => stayed,
        }
    }

    async fn finish(mut self, pid: u32, exit: Exit) -> Result<Ended, ClientError> {
        tokio::select! {
            written = self.output.finish() => match written {
                Ok(captured) => Ok(Ended::Exit { pid, exit, captured }),
                Err(source) => output_error(source),
            },
            signal = self.signals.next() => Ok(Ended::Left { signal }),
        }
    }

    async fn output_closed(self) -> Result<Ended, ClientError> {
        match self.output.finish().await {
            Ok(_) => output_error(io::ErrorKind::BrokenPipe.into()),
            Err(source) => output_error(source),
        }
    }
}

/// Nobody reads our output: we leave as SIGPIPE would have it, without a word.
fn output_error(source: io::Error) -> Result<Ended, ClientError> {
    match source.kind() {
        io::ErrorKind::BrokenPipe => Ok(Ended::Left { signal: 13 }),
        _ => Err(ClientError::Local { op: "write output", source }),
    }
}

/// From the command to our output.
async fn receive(
    mut reader: OwnedReadHalf,
    head: &[u8],
    output: &mut Output,
    credit: watch::Sender<u64>,
    pid: &mut Option<u32>,
) -> Result<Stayed, ClientError> {
    let nonsense = |what: String| ClientError::Nonsense { what };
    let mut frames = FrameBuffer::new();
    let mut head = head.chunks(MAX_PAYLOAD / 2);
    loop {
        while let Some((kind, payload)) = frames.take_frame().map_err(|error| nonsense(error.to_string()))? {
            let taken = match ServerFrame::parse(kind, payload).map_err(|error| nonsense(error.to_string()))? {
                ServerFrame::Started(started) => {
                    *pid = Some(started.pid);
                    true
                }
                ServerFrame::Stdout(bytes) => output.send(Stream::Stdout, bytes).await,
                ServerFrame::Stderr(bytes) => output.send(Stream::Stderr, bytes).await,
                ServerFrame::StdinCredit(n) => {
                    credit.send_modify(|credit| *credit += u64::from(n));
                    true
                }
                ServerFrame::Exit(exit) => return Ok(Stayed::Exit(exit)),
                ServerFrame::Error(body) => return Err(ClientError::Answer { status: 500, error: body.error }),
            };
            if !taken {
                return Ok(Stayed::OutputClosed);
            }
        }
        if let Some(part) = head.next() {
            frames.room()[..part.len()].copy_from_slice(part);
            frames.filled(part.len());
            continue;
        }
        let source = match reader.read(frames.room()).await {
            Ok(0) => io::ErrorKind::UnexpectedEof.into(),
            Ok(n) => {
                frames.filled(n);
                continue;
            }
            Err(source) => source,
        };
        // A daemon was killed in the middle of a frame: the next one goes on after what it took from the pipe.
        if let Some((is_stdout, bytes)) = frames.partial_output() {
            let stream = if is_stdout { Stream::Stdout } else { Stream::Stderr };
            if !output.send(stream, bytes).await {
                return Ok(Stayed::OutputClosed);
            }
        }
        return Ok(Stayed::Broken(source));
    }
}

/// From us to the command.
struct Sending<'a> {
    local: Local,
    signals: &'a mut Signals,
    input: &'a mut Input,
    unsent: &'a mut Vec<u8>,
    stdin_ended: &'a mut bool,
    writer: OwnedWriteHalf,
    credit: watch::Receiver<u64>,
}

impl Sending<'_> {
    async fn run(mut self) -> Result<Stayed, ClientError> {
        match self.pass_on().await? {
            Some(signal) => Ok(Stayed::Left(signal)),
            // The connection takes no more. What it still holds for us (an exit, perhaps) is read to its end.
            None => Ok(Stayed::Left(self.signals.next().await)),
        }
    }

    /// The signal by which we leave, or `None` when the connection breaks.
    async fn pass_on(&mut self) -> Result<Option<u8>, ClientError> {
        let mut buffer = vec![0; MAX_PAYLOAD];
        let mut n_sent = 0_u64;
        if !self.resume(&mut n_sent).await {
            return Ok(None);
        }
        loop {
            let left = *self.credit.borrow_and_update() - n_sent;
            let room = usize::try_from(left).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD);
            let wants_input = self.local.stdin && !*self.stdin_ended && room > 0;
            let sent = tokio::select! {
                signal = self.signals.next_or_resize() => match signal {
                    None => !self.local.tty || self.send(&ClientFrame::Resize(terminal_size())).await,
                    Some(signal) if self.local.tty => return Ok(Some(signal)),
                    Some(signal) => self.send(&ClientFrame::Signal(signal)).await,
                },
                read = self.input.read(&mut buffer[..room]), if wants_input => match read {
                    Ok(0) => {
                        *self.stdin_ended = true;
                        self.send(&ClientFrame::StdinEnd).await
                    }
                    Ok(n) => {
                        n_sent += u64::try_from(n).unwrap_or(0);
                        self.unsent.extend_from_slice(&buffer[..n]);
                        let sent = self.send(&ClientFrame::Stdin(&buffer[..n])).await;
                        if sent {
                            self.unsent.clear();
                        }
                        sent
                    }
                    Err(source) => return Err(ClientError::Local { op: "read standard input", source }),
                },
                changed = self.credit.changed() => changed.is_ok(),
            };
            if !sent {
                return Ok(None);
            }
        }
    }

    /// What a new connection must know again.
    async fn resume(&mut self, n_sent: &mut u64) -> bool {
        if self.local.tty && !self.send(&ClientFrame::Resize(terminal_size())).await {
            return false;
        }
        if !self.unsent.is_empty() {
            let unsent = self.unsent.clone();
            if !self.send(&ClientFrame::Stdin(&unsent)).await {
                return false;
            }
            *n_sent = u64::try_from(unsent.len()).unwrap_or(0);
            self.unsent.clear();
        }
        !*self.stdin_ended || self.send(&ClientFrame::StdinEnd).await
    }

    /// `false` when the connection takes no more.
    async fn send(&mut self, frame: &ClientFrame<'_>) -> bool {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.writer.write_all(&bytes).await.is_ok()
    }
}
