//! A command as its driver knows it: streams, client, how it ended.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use deltabox_common::init::{Size, Streams as WireStreams};
use nix::fcntl::{FcntlArg, OFlag};
use serde::{Deserialize, Serialize};

use super::api::{
    Attachment, ExecReport, ExecRequest, Exit, OnDisconnect, StdinEnd, StdinHold, Stdio, Streams, WindowSize,
};
use super::driver::{Mail, Message};

/// Called once, when the command has ended.
pub(super) type OnExit = Box<dyn FnOnce(Exit) + Send>;

/// What init keeps for us while there is no engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Tag {
    pub(super) argv: Vec<String>,
    pub(super) stdio: Stdio,
    pub(super) on_disconnect: OnDisconnect,
    pub(super) started_unix_ms: u64,
}

impl Tag {
    pub(super) fn of(request: &ExecRequest, started_unix_ms: u64) -> Self {
        let ExecRequest { argv, stdio, on_disconnect, .. } = request.clone();
        Self { argv, stdio, on_disconnect, started_unix_ms }
    }

    /// Whether both are of the same command, wherever its streams lead now.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        (&self.argv, self.started_unix_ms) == (&other.argv, other.started_unix_ms)
    }
}

/// The host's ends, which the driver keeps a copy of while a client has them.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) outer: Vec<OwnedFd>,
}

/// One command that init holds.
pub(super) struct Command {
    pub(super) pid: u32,
    /// 0, and one more with each rollback that has made it again.
    pub(super) life: u32,
    pub(super) tag: Tag,
    pub(super) ends: Ends,
    /// Set while a client is attached. The callback goes when the command has ended.
    pub(super) client: Option<Option<OnExit>>,
    /// In which life the last client came.
    pub(super) came: u32,
    pub(super) exit: Option<Exit>,
}

impl Command {
    pub(super) fn report(&self) -> ExecReport {
        ExecReport {
            pid: self.pid,
            argv: self.tag.argv.clone(),
            stdio: self.tag.stdio,
            on_disconnect: self.tag.on_disconnect,
            attached: self.client.is_some(),
            started_unix_ms: self.tag.started_unix_ms,
            exit: self.exit,
        }
    }

    /// A client's hold on this command: copies of the ends, and the news of its departure.
    pub(super) fn attachment(&self, mail: &Arc<Mail>) -> std::io::Result<Attachment> {
        let (pid, life) = (self.pid, self.came);
        let mut outer = self
            .ends
            .outer
            .iter()
            .map(|fd| fd.as_fd().try_clone_to_owned())
            .collect::<Result<Vec<_>, _>>()?
            .into_iter();
        let streams = match (self.tag.stdio, outer.next(), outer.next()) {
            (Stdio::Pipes { .. }, Some(stdout), Some(stderr)) => {
                let stdin = match &self.ends.stdin {
                    None => None,
                    Some(fd) => {
                        let mail = Arc::clone(mail);
                        // A sandbox that is gone has no input to close.
                        let on_drop = Box::new(move || _ = mail.post(Message::StdinClosed { pid, life }));
                        Some(StdinEnd { fd: fd.try_clone()?, hold: StdinHold(Some(on_drop)) })
                    }
                };
                Streams::Pipes { stdin, stdout, stderr }
            }
            (Stdio::Pty { .. }, Some(master), _) => Streams::Pty { master },
            (Stdio::Log, ..) => Streams::Log,
            // Init sent fewer descriptors than agreed: it ran out of them.
            (Stdio::Pipes { .. } | Stdio::Pty { .. }, ..) => {
                return Err(std::io::Error::from_raw_os_error(libc::EMFILE));
            }
        };
        let mail = Arc::clone(mail);
        let on_drop = Box::new(move |departure| _ = mail.post(Message::ClientLeft { pid, life, departure }));
        Ok(Attachment { pid, streams, on_drop: Some(on_drop) })
    }
}

/// Sorts the descriptors of a `Started` or `Held` and makes them non-blocking.
pub(super) fn ends(stdio: Stdio, has_stdin: bool, fds: Vec<OwnedFd>) -> std::io::Result<Ends> {
    for fd in &fds {
        nix::fcntl::fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let mut fds = fds.into_iter();
    let stdin = match stdio {
        Stdio::Pipes { stdin: true } if has_stdin => fds.next(),
        _ => None,
    };
    Ok(Ends { stdin, outer: fds.collect() })
}

pub(super) fn wire_streams(stdio: Stdio) -> WireStreams {
    match stdio {
        Stdio::Pipes { stdin: true } => WireStreams::Pipes,
        Stdio::Pipes { stdin: false } => WireStreams::PipesNoStdin,
        Stdio::Pty { size: WindowSize { rows, cols } } => WireStreams::Pty(Size { rows, cols }),
        Stdio::Log => WireStreams::Log,
    }
}

/// A raw wait status in our words.
pub(super) fn exit_of(status: i32) -> Exit {
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    if libc::WIFEXITED(status) {
        Exit::Exited { status: byte(libc::WEXITSTATUS(status)) }
    } else {
        Exit::Signaled { signal: byte(libc::WTERMSIG(status)), core_dumped: libc::WCOREDUMP(status) }
    }
}
