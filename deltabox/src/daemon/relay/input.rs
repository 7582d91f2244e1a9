//! From the client to the command: frames as they come, input as fast as it is taken.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::OwnedReadHalf;

use crate::daemon::frame::{ClientFrame, FrameBuffer, FrameError, MAX_PAYLOAD, STDIN_WINDOW};
use crate::daemon::server::Daemon;
use crate::sandbox::SandboxId;
use crate::sys;

use super::{End, Shared, Sink, Source};

/// What the client's frames act upon.
pub(super) struct Input {
    pub(super) daemon: Daemon,
    pub(super) id: SandboxId,
    pub(super) pid: u32,
    pub(super) terminal: Source,
}

/// Takes the client's frames as they come. Ends when the client goes, or says that it goes.
pub(super) async fn receive(input: &Input, mut reader: OwnedReadHalf, head: &[u8], shared: &Shared) -> End {
    let mut frames = FrameBuffer::new();
    // hyper read no more than it needed plus one buffer; it is taken in parts that surely have room.
    let mut head = head.chunks(MAX_PAYLOAD / 2);
    loop {
        let violation = loop {
            match frames.take_frame() {
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
pub(super) async fn feed(mut stdin: Option<Sink>, terminal: bool, shared: &Shared) {
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
