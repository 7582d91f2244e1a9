//! Where a command's output goes on the client's side.
//!
//! Writing to our own standard output may block for as long as its reader likes; a thread of its own does it,
//! so that signals still get through. The queue to it holds a few frames: constant memory, and a slow reader
//! slows the command down.

use std::io::{self, Write};
use std::thread;

use tokio::sync::{mpsc, oneshot};

/// Frames between the connection and the thread. Chosen: enough to keep both busy.
const QUEUE: usize = 4;
/// Most bytes of each stream that a capture keeps; the rest is counted and thrown away. Chosen: an answer in
/// one JSON object should stay well below what its reader holds in memory.
pub const MAX_CAPTURE: usize = 8 * 1024 * 1024;

/// Where it is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputTo {
    /// Our own standard output and error.
    Streams,
    /// Memory, up to [`MAX_CAPTURE`] of each.
    Capture,
}

/// What a command wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// The first of its standard output (or terminal).
    pub stdout: Vec<u8>,
    /// The first of its standard error.
    pub stderr: Vec<u8>,
    /// Whether there was more.
    pub truncated: bool,
}

/// One of the two output streams.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

pub(super) enum Output {
    Thread { queue: mpsc::Sender<(Stream, Vec<u8>)>, done: oneshot::Receiver<io::Result<()>> },
    Capture(Captured),
}

impl Output {
    pub(super) fn open(to: OutputTo) -> io::Result<Self> {
        match to {
            OutputTo::Capture => Ok(Self::Capture(Captured::default())),
            OutputTo::Streams => {
                let (queue, receiver) = mpsc::channel(QUEUE);
                let (sender, done) = oneshot::channel();
                let write = move || {
                    // Nobody waits for it any more when the client left first.
                    let _ = sender.send(write_all(receiver));
                };
                thread::Builder::new().name("output".to_owned()).spawn(write)?;
                Ok(Self::Thread { queue, done })
            }
        }
    }

    /// Hands bytes on. `false` when our own output takes no more; [`Self::finish`] says why.
    pub(super) async fn send(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        match self {
            Self::Thread { queue, .. } => queue.send((stream, bytes.to_vec())).await.is_ok(),
            Self::Capture(captured) => {
                let kept = match stream {
                    Stream::Stdout => &mut captured.stdout,
                    Stream::Stderr => &mut captured.stderr,
                };
                let n = bytes.len().min(MAX_CAPTURE - kept.len());
                kept.extend_from_slice(&bytes[..n]);
                captured.truncated |= n < bytes.len();
                true
            }
        }
    }

    /// Waits until all is written.
    pub(super) async fn finish(self) -> io::Result<Captured> {
        match self {
            Self::Capture(captured) => Ok(captured),
            Self::Thread { queue, done } => {
                drop(queue);
                match done.await {
                    Ok(result) => result.map(|()| Captured::default()),
                    Err(_) => Err(io::Error::other("output thread panicked")),
                }
            }
        }
    }
}

fn write_all(mut queue: mpsc::Receiver<(Stream, Vec<u8>)>) -> io::Result<()> {
    while let Some((stream, bytes)) = queue.blocking_recv() {
        match stream {
            Stream::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes)?;
                out.flush()?;
            }
            Stream::Stderr => io::stderr().lock().write_all(&bytes)?,
        }
    }
    Ok(())
}
