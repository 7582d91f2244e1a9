//! The bytes of a log file as a response body, to its end or for as long as its command may write.
//!
//! One chunk in memory at a time: the next is read when the client has taken the last. At the end of the file
//! inotify says when there is more; a slow tick makes up for what inotify cannot say (that the command has
//! ended without writing).

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use hyper::body::{Bytes, Frame};
use nix::fcntl::OFlag;
use nix::sys::inotify::AddWatchFlags;
use tokio::sync::mpsc;

use crate::engine::{Engine, Error};
use crate::sandbox::SandboxId;

use super::answer::{Refusal, block};
use super::server::Daemon;
use super::watch::PathWatch;

/// Bytes of one chunk. Chosen: one read is far cheaper than its way through the socket.
const CHUNK: usize = 128 * 1024;
/// How late the end of a silent command may be noticed. Chosen: nobody waits for it, so rarely.
const TICK: Duration = Duration::from_secs(1);

/// An open log.
pub(super) struct Log {
    daemon: Daemon,
    id: SandboxId,
    pid: u32,
    path: PathBuf,
    file: File,
}

/// Opens the log of a command (never through a symbolic link, never anything but a regular file).
pub(super) async fn open(daemon: Daemon, engine: Arc<Engine>, id: SandboxId, pid: u32) -> Result<Log, Refusal> {
    block(move || {
        let report = engine.logs(&id, Some(pid))?.pop().ok_or_else(|| Error::NoExec { id: id.clone(), pid })?;
        let failed = |source| Error::Io { op: "open", path: report.path.clone(), source };
        let file = File::options()
            .read(true)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&report.path)
            .map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        Ok(Log { daemon, id, pid, path: report.path, file })
    })
    .await
}

impl Log {
    /// Its bytes, from the first.
    pub(super) fn into_body(self, follow: bool) -> Body {
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let path = self.path.clone();
            if let Err(error) = self.send(follow, sender).await {
                tracing::warn!(path = %path.display(), %error, "read log");
            }
        });
        Body::new(Chunks(receiver))
    }

    async fn send(mut self, follow: bool, sender: mpsc::Sender<Bytes>) -> io::Result<()> {
        let watch = if follow { Some(watch(&self.file)?) } else { None };
        loop {
            // Asked before the file is read: what a command wrote before it ended is then surely seen.
            let live = follow && self.live().await;
            loop {
                let chunk;
                (self.file, chunk) = read_chunk(self.file).await?;
                if chunk.is_empty() {
                    break;
                }
                if sender.send(chunk).await.is_err() {
                    return Ok(());
                }
            }
            let Some(watch) = watch.as_ref().filter(|_| live) else { return Ok(()) };
            tokio::select! {
                () = sender.closed() => return Ok(()),
                () = self.daemon.ending() => return Ok(()),
                changed = watch.changed() => changed?,
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    async fn live(&self) -> bool {
        let Ok(engine) = self.daemon.engine() else { return false };
        let (id, pid) = (self.id.clone(), self.pid);
        let logs = block(move || engine.logs(&id, Some(pid))).await;
        logs.is_ok_and(|logs| logs.iter().any(|log| log.live))
    }
}

async fn read_chunk(mut file: File) -> io::Result<(File, Bytes)> {
    let read = move || {
        let mut bytes = vec![0; CHUNK];
        let n = file.read(&mut bytes)?;
        bytes.truncate(n);
        Ok((file, Bytes::from(bytes)))
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

/// Watches the very file that is open, whatever its path names by now.
fn watch(file: &File) -> io::Result<PathWatch> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    PathWatch::new(Path::new(&path), AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE)
}

struct Chunks(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
    }
}
