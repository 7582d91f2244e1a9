//! From the command to the client: output as it comes, credit, and at last the exit.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;

use axum::http::StatusCode;
use nix::errno::Errno;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::oneshot;

use crate::daemon::answer::Refusal;
use crate::daemon::frame::{self, HEADER_LEN, MAX_PAYLOAD, ServerFrame};
use crate::daemon::server::Daemon;
use crate::daemon::types::Started;
use crate::engine::Exit;

use super::{End, Shared, Source};

/// Most bytes taken from one stream after the command's exit. From the kernel (/proc/sys/fs/pipe-max-size):
/// no pipe holds more; a background process that goes on writing must not hold the exit up.
const MAX_DRAIN: usize = 1024 * 1024;

/// Everything that is said to the client.
pub(super) struct Output<'a> {
    writer: OwnedWriteHalf,
    shared: &'a Shared,
    /// Header and payload of one output frame.
    buffer: Vec<u8>,
}

impl<'a> Output<'a> {
    pub(super) fn new(writer: OwnedWriteHalf, shared: &'a Shared) -> Self {
        Self { writer, shared, buffer: vec![0; HEADER_LEN + MAX_PAYLOAD] }
    }

    /// Ends with the exit said to the client, or when the client is gone.
    pub(super) async fn run(
        mut self,
        pid: u32,
        stdout: Source,
        stderr: Source,
        exited: oneshot::Receiver<Exit>,
        daemon: &Daemon,
    ) -> End {
        match self.run_until_exit(pid, stdout, stderr, exited, daemon).await {
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
        daemon: &Daemon,
    ) -> io::Result<End> {
        let mut ending = pin!(daemon.ending());
        self.say(&ServerFrame::Started(Started { pid })).await?;
        let (mut out_open, mut err_open) = (stdout.is_some(), stderr.is_some());
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut exited => break exit,
                () = &mut ending => return Ok(End::Ending),
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
