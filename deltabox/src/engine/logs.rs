//! One thread that empties the log pipes of all commands into their files, so that no command waits for a reader
//! and no driver waits for a disk.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::inbox::Inbox;

/// A log that is still written to, by its path.
type Live = Arc<Mutex<BTreeMap<PathBuf, usize>>>;

/// A pipe's or terminal's read end and the file it goes to.
#[derive(Debug)]
struct Source {
    end: std::fs::File,
    path: PathBuf,
    /// Absent after a write failed: then the pipe is emptied into nothing.
    file: Option<std::fs::File>,
}

/// What the log thread is told.
#[derive(Debug)]
enum Order {
    Follow(Source),
    Release(PathBuf),
}

/// The log thread, as the drivers see it.
#[derive(Clone, Debug)]
pub(super) struct Logs {
    inbox: Arc<Inbox<Order>>,
    live: Live,
}

impl Logs {
    /// Starts the thread.
    pub(super) fn start() -> io::Result<Self> {
        let logs = Self { inbox: Arc::new(Inbox::new()?), live: Live::default() };
        let theirs = logs.clone();
        std::thread::Builder::new().name("logs".to_owned()).spawn(move || theirs.run())?;
        Ok(logs)
    }

    /// Appends what comes from `end` (non-blocking) to `path` until its last writer has gone.
    ///
    /// # Errors
    /// The file could not be opened: what comes is read all the same, so that no command blocks, and lost.
    pub(super) fn follow(&self, end: OwnedFd, path: &Path) -> io::Result<()> {
        let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let file = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(path);
        let (file, result) = match file {
            Ok(file) => (Some(file), Ok(())),
            Err(error) => (None, Err(error)),
        };
        *self.lock().entry(path.to_owned()).or_default() += 1;
        let source = Source { end: end.into(), path: path.to_owned(), file };
        // The inbox is never closed while the process lives.
        let _ = self.inbox.post(Order::Follow(source));
        result
    }

    /// Stops reading what goes to `path`: a client has come back to the terminal. What was read already stays there.
    pub(super) fn release(&self, path: &Path) {
        let _ = self.inbox.post(Order::Release(path.to_owned()));
    }

    /// Whether something may still be written to `path`.
    pub(super) fn is_live(&self, path: &Path) -> bool {
        self.lock().contains_key(path)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, usize>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut sources: Vec<Source> = Vec::new();
        let mut buf = vec![0_u8; 64 << 10];
        loop {
            let mut released = Vec::new();
            for order in self.inbox.take() {
                match order {
                    Order::Follow(source) => sources.push(source),
                    Order::Release(path) => released.push(path),
                }
            }
            sources.retain_mut(|source| {
                let more = !released.contains(&source.path) && source.empty(&mut buf);
                if !more {
                    self.finished(&source.path);
                }
                more
            });
            let mut fds = vec![PollFd::new(self.inbox.as_fd(), PollFlags::POLLIN)];
            fds.extend(sources.iter().map(|source| PollFd::new(source.end.as_fd(), PollFlags::POLLIN)));
            // EINTR and ENOMEM: the loop looks at everything without blocking anyway.
            let _ = nix::poll::poll(&mut fds, PollTimeout::NONE);
        }
    }

    fn finished(&self, path: &Path) {
        let mut live = self.lock();
        if let Some(n) = live.get_mut(path) {
            *n -= 1;
            if *n == 0 {
                live.remove(path);
            }
        }
    }
}

impl Source {
    /// Takes what is there, at most a few buffers so that one loud command does not silence the others.
    /// False when nothing will come any more.
    fn empty(&mut self, buf: &mut [u8]) -> bool {
        for _ in 0..16 {
            match self.end.read(buf) {
                Ok(0) => return false,
                Ok(n) => self.write(&buf[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A terminal whose last slave has closed: EIO.
                Err(_) => return false,
            }
        }
        true
    }

    fn write(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        if let Err(error) = file.write_all(bytes) {
            tracing::error!(path = %self.path.display(), %error, "log lost from here on");
            self.file = None;
        }
    }
}
