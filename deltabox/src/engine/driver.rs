//! The driver: the one thread that changes a sandbox.
//!
//! ```text
//!             create                init ends, kill
//!  (nothing) --------> Running --------------------> Dead
//!                         \                            /
//!                          `---------- remove --------'--> (nothing)
//! ```
//! It waits for its inbox, for init's messages and for init's end, and handles one thing at a time. Requests that do not
//! fit the state are answered with an error; nothing is queued for later.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deltabox_common::init::{FromInit, Start, ToInit};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::api::{
    Attachment, Departure, ExecReport, ExecRequest, Exit, OnDisconnect, Reply, SandboxReport, SandboxState, Stdio,
};
use super::command::{self, Command, OnExit, Tag};
use super::inbox::Inbox;
use super::logs::Logs;
use super::manifest::Manifest;
use super::store::SandboxDir;
use super::{Error, unix_ms};
use super::{ready, request};
use crate::latency::{Book, Phase, Span};
use crate::sandbox::link::InitLink;
use crate::sys::process::{self, Child};

/// Where a driver is reached.
pub(super) type Mail = Inbox<Message>;

/// What a driver is asked or told.
pub(super) enum Message {
    Exec { request: Box<ExecRequest>, span: Span, on_exit: OnExit, reply: Reply<Attachment> },
    Attach { pid: u32, on_exit: OnExit, reply: Reply<Attachment> },
    Signal { pid: u32, signal: i32, reply: Reply<()> },
    StdinClosed { pid: u32 },
    ClientLeft { pid: u32, departure: Departure },
    Kill { reply: Reply<()> },
    Remove { span: Span, reply: Reply<()> },
}

/// What other threads may look at without asking the driver.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) report: SandboxReport,
    pub(super) execs: Vec<ExecReport>,
}

/// How long processes may take to die after cgroup.kill (chosen: an unkillable one is stuck in the kernel).
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// Between SIGHUP and SIGKILL for a command whose client vanished (chosen; part of the documented behaviour).
const HANGUP_GRACE: Duration = Duration::from_secs(5);
/// How long a command found after a restart waits for its client to come back (chosen, longer than a client tries).
pub(super) const REATTACH_GRACE: Duration = Duration::from_secs(15);
/// Ended commands with a log that are still listed (chosen: enough to look back, bounded).
const N_ENDED_SHOWN: usize = 256;
/// A running init and the connection to it.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) init: Child,
    pub(super) link: InitLink,
}

struct Pending {
    program: String,
    tag: Tag,
    span: Span,
    on_exit: OnExit,
    reply: Reply<Attachment>,
}

/// What a driver is given of the engine and its sandbox.
pub(super) struct DriverParts {
    pub(super) manifest: Manifest,
    pub(super) dir: SandboxDir,
    pub(super) mail: Arc<Mail>,
    pub(super) shown: Arc<Mutex<Shown>>,
    pub(super) logs: Logs,
    pub(super) retired: Arc<AtomicBool>,
    pub(super) book: Arc<Book>,
}

pub(super) struct Driver {
    manifest: Manifest,
    dir: SandboxDir,
    mail: Arc<Mail>,
    shown: Arc<Mutex<Shown>>,
    logs: Logs,
    /// The engine is going: clients leave because of that.
    retired: Arc<AtomicBool>,
    book: Arc<Book>,
    life: Option<Life>,
    commands: BTreeMap<u32, Command>,
    starting: BTreeMap<u32, Pending>,
    next_seq: u32,
    /// What to do with a command when its time has come.
    alarms: Vec<(Instant, u32, Alarm)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alarm {
    /// Nobody attached after a restart: as if its client had just gone.
    Abandoned,
    /// It did not heed SIGHUP.
    Kill,
}

impl Driver {
    pub(super) fn new(parts: DriverParts, life: Option<Life>) -> Self {
        let DriverParts { manifest, dir, mail, shown, logs, retired, book } = parts;
        Self {
            manifest,
            dir,
            mail,
            shown,
            logs,
            retired,
            book,
            life,
            commands: BTreeMap::new(),
            starting: BTreeMap::new(),
            next_seq: 0,
            alarms: Vec::new(),
        }
    }

    /// Serves until the sandbox is removed. Returns the reply of that request, for when its name is free again.
    pub(super) fn run(mut self) -> Reply<()> {
        loop {
            self.wait();
            for message in self.mail.take() {
                if let Some(reply) = self.handle(message) {
                    return reply;
                }
            }
            self.listen();
            self.ring();
            self.show();
        }
    }

    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.mail.as_fd(), PollFlags::POLLIN)];
        if let Some(life) = &self.life {
            fds.push(PollFd::new(life.link.as_fd(), PollFlags::POLLIN));
            fds.push(PollFd::new(life.init.pidfd.as_fd(), PollFlags::POLLIN));
        }
        let timeout = match self.alarms.iter().map(|alarm| alarm.0).min() {
            None => PollTimeout::NONE,
            // Rounded up, so that the alarm is due when poll returns.
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        // EINTR and ENOMEM: the loop looks at everything without blocking anyway.
        let _ = nix::poll::poll(&mut fds, timeout);
    }

    /// The reply to give when the sandbox is no more.
    fn handle(&mut self, message: Message) -> Option<Reply<()>> {
        match message {
            Message::Exec { request, span, on_exit, reply } => self.exec(*request, span, on_exit, reply),
            Message::Attach { pid, on_exit, reply } => reply(self.attach(pid, on_exit)),
            Message::Signal { pid, signal, reply } => reply(self.signal(pid, signal)),
            Message::StdinClosed { .. } | Message::ClientLeft { .. } if self.retired.load(Ordering::SeqCst) => {}
            Message::StdinClosed { pid } => self.close_stdin(pid),
            Message::ClientLeft { pid, departure } => self.client_left(pid, departure),
            Message::Kill { reply } => {
                let result = self.kill("killed by request");
                self.show();
                reply(result);
            }
            Message::Remove { span, reply } => return self.remove(span, reply),
        }
        None
    }

    fn alive(&mut self) -> Result<&mut Life, Error> {
        if self.life.is_none() {
            let reason = match &self.lock_shown().report.state {
                SandboxState::Dead { reason } => reason.clone(),
                SandboxState::Running => "it has no init".to_owned(),
            };
            return Err(Error::Dead { id: self.manifest.id.clone(), reason });
        }
        self.life.as_mut().ok_or(Error::ShuttingDown)
    }

    fn exec(&mut self, request: ExecRequest, mut span: Span, on_exit: OnExit, reply: Reply<Attachment>) {
        span.end_of(Phase::Queue);
        let seq = self.next_seq;
        let start = Start {
            seq,
            tag: Vec::new(),
            streams: command::wire_streams(request.stdio),
            uid: request.uid,
            gid: request.gid.unwrap_or(request.uid),
            cwd: request.cwd.clone().unwrap_or_else(|| "/".to_owned()),
            argv: request.argv.clone(),
            env: request::environment(&self.manifest.spec.env, &request),
        };
        let tag = Tag::of(&request, unix_ms());
        let program = request.argv.first().cloned().unwrap_or_default();
        let sent = request::check(&request).and_then(|()| {
            let tag =
                serde_json::to_vec(&tag).map_err(|error| Error::Invalid { what: "argv", why: error.to_string() })?;
            self.tell(&ToInit::Start(Start { tag, ..start }))
        });
        match sent {
            Ok(()) => {
                self.next_seq = seq.wrapping_add(1);
                self.starting.insert(seq, Pending { program, tag, span, on_exit, reply });
            }
            Err(error) => reply(Err(error)),
        }
    }

    fn attach(&mut self, pid: u32, on_exit: OnExit) -> Result<Attachment, Error> {
        let id = self.manifest.id.clone();
        let command = self.commands.get_mut(&pid).ok_or_else(|| Error::NoExec { id: id.clone(), pid })?;
        if command.client.is_some() {
            return Err(Error::Refused {
                what: format!("attach to {pid} in `{id}`"),
                why: "another client is attached".to_owned(),
                hint: "a command has one client at a time; end that one first".to_owned(),
            });
        }
        let attachment =
            command.attachment(&self.mail).map_err(io_error("copy the streams of a command in", &self.dir))?;
        self.alarms.retain(|alarm| alarm.1 != pid);
        if matches!(command.tag.stdio, Stdio::Pty { .. }) {
            self.logs.release(&self.dir.log(pid));
        }
        match command.exit {
            Some(exit) => {
                command.client = Some(None);
                on_exit(exit);
            }
            None => command.client = Some(Some(on_exit)),
        }
        Ok(attachment)
    }

    fn signal(&mut self, pid: u32, signal: i32) -> Result<(), Error> {
        if nix::sys::signal::Signal::try_from(signal).is_err() {
            return Err(Error::Invalid { what: "signal", why: format!("{signal} is no signal") });
        }
        let command = self.commands.get(&pid);
        let command = command.ok_or_else(|| Error::NoExec { id: self.manifest.id.clone(), pid })?;
        if command.exit.is_some() {
            // As kill(2) on a zombie: too late is not wrong.
            return Ok(());
        }
        self.tell(&ToInit::Signal { pid, signal })
    }

    fn close_stdin(&mut self, pid: u32) {
        if let Some(command) = self.commands.get_mut(&pid)
            && command.ends.stdin.take().is_some()
        {
            self.tell_or_lose(&ToInit::CloseStdin { pid });
        }
    }

    fn client_left(&mut self, pid: u32, departure: Departure) {
        let Some(command) = self.commands.get_mut(&pid) else { return };
        command.client = None;
        if command.exit.is_some() {
            if command.tag.stdio != Stdio::Log {
                self.forget(pid);
            }
            return;
        }
        match (departure, command.tag.on_disconnect) {
            (Departure::Detached, _) | (Departure::Gone, OnDisconnect::Leave) => self.leave(pid),
            (Departure::Gone, OnDisconnect::End) if command.tag.stdio == Stdio::Log => {}
            (Departure::Gone, OnDisconnect::End) => {
                self.tell_or_lose(&ToInit::Signal { pid, signal: libc::SIGHUP });
                self.alarms.push((Instant::now() + HANGUP_GRACE, pid, Alarm::Kill));
                self.empty_into_log(pid);
            }
        }
    }

    /// The command goes on by itself; a later client finds its output in the log.
    fn leave(&mut self, pid: u32) {
        if let Some(command) = self.commands.get_mut(&pid)
            && !matches!(command.tag.stdio, Stdio::Pty { .. })
        {
            command.tag.stdio = Stdio::Log;
        }
        self.empty_into_log(pid);
    }

    /// Hands the ends that something may still come from to the log thread.
    fn empty_into_log(&mut self, pid: u32) {
        let path = self.dir.log(pid);
        let Some(command) = self.commands.get_mut(&pid) else { return };
        let terminal = matches!(command.tag.stdio, Stdio::Pty { .. });
        for end in std::mem::take(&mut command.ends.outer) {
            // A terminal's master is kept as well: a client may come back to it.
            if terminal && let Ok(copy) = end.try_clone() {
                command.ends.outer.push(copy);
            }
            if let Err(error) = self.logs.follow(end, &path) {
                tracing::error!(sandbox = %self.manifest.id, pid, %error, "log lost");
            }
        }
    }

    /// The command has ended and its client has all it wants: what background processes still print goes to the log.
    fn forget(&mut self, pid: u32) {
        if let Some(command) = self.commands.get_mut(&pid) {
            command.ends.outer.retain(ready::may_still_print);
        }
        self.empty_into_log(pid);
        self.commands.remove(&pid);
        self.alarms.retain(|alarm| alarm.1 != pid);
        self.tell_or_lose(&ToInit::Forget { pid });
    }

    fn kill(&mut self, reason: &str) -> Result<(), Error> {
        let init = self.life.as_ref().map(|life| life.init.pidfd.as_fd());
        self.manifest.cgroups.kill(init, KILL_DEADLINE).map_err(Error::from)?;
        self.bury(reason);
        Ok(())
    }

    /// Everything that a sandbox without processes no longer has.
    fn bury(&mut self, reason: &str) {
        if let Some(life) = self.life.take() {
            // Usually dead already; needs no descriptor where cgroup.kill could not be opened.
            let _ = process::pidfd_send_signal(life.init.pidfd.as_fd(), libc::SIGKILL);
            // Ours to reap only if this engine started it. One that is stuck in the kernel is left to the next start.
            if ready::wait_readable(life.init.pidfd.as_fd(), KILL_DEADLINE) {
                let _ = process::reap(&life.init);
            }
        }
        for (_, pending) in std::mem::take(&mut self.starting) {
            (pending.reply)(Err(Error::Dead { id: self.manifest.id.clone(), reason: reason.to_owned() }));
        }
        for command in self.commands.values_mut() {
            if command.exit.is_none() {
                end(command, Exit::Lost);
            }
        }
        self.alarms.clear();
        let mut shown = self.lock_shown();
        if shown.report.state == SandboxState::Running {
            shown.report.state = SandboxState::Dead { reason: reason.to_owned() };
            shown.report.init_pid = None;
        }
    }

    /// Gives the reply back when nothing is left. After a failure the sandbox stays, dead, and can be removed again.
    fn remove(&mut self, mut span: Span, reply: Reply<()>) -> Option<Reply<()>> {
        span.end_of(Phase::Queue);
        let result = self
            .kill("being removed")
            .inspect(|()| span.end_of(Phase::Kill))
            .and_then(|()| self.manifest.cgroups.remove().map_err(Error::from))
            .inspect(|()| span.end_of(Phase::Cgroup))
            .and_then(|()| self.dir.remove().map_err(io_error("remove", &self.dir)));
        self.show();
        if let Err(error) = result {
            reply(Err(error));
            return None;
        }
        span.end_of(Phase::Files);
        self.book.record(self.manifest.id.as_str(), &span);
        for message in self.mail.close() {
            refuse(message, &self.manifest.id);
        }
        Some(reply)
    }

    fn listen(&mut self) {
        loop {
            let Some(life) = &mut self.life else { return };
            match life.link.try_recv() {
                Ok(Some((message, fds))) => self.hear(message, fds),
                Ok(None) => break,
                Err(error) => {
                    self.lost(&error);
                    return;
                }
            }
        }
        let Some(life) = &self.life else { return };
        let mut fds = [PollFd::new(life.init.pidfd.as_fd(), PollFlags::POLLIN)];
        if nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0) {
            self.lost(&io::Error::other("its init has ended"));
        }
    }

    /// Init is gone or no longer to be trusted: without it the sandbox cannot be used.
    fn lost(&mut self, error: &io::Error) {
        tracing::error!(sandbox = %self.manifest.id, %error, "init lost");
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => "its init has ended (killed from outside, or out of memory)".to_owned(),
            _ => error.to_string(),
        };
        if let Err(error) = self.kill(&reason) {
            tracing::error!(sandbox = %self.manifest.id, %error, "processes of a lost sandbox remain");
            self.bury(&reason);
        }
    }

    /// After a restart: takes in what init holds, so that no client is told that its command is unknown. Requests wait
    /// in the inbox meanwhile. An init that does not answer in time is heard later, like any message.
    pub(super) fn hear_the_list(&mut self, within: Duration) {
        let end = Instant::now() + within;
        loop {
            let Some(life) = &mut self.life else { return };
            match life.link.recv(end) {
                Ok((FromInit::ListEnd, _)) => break,
                Ok((message, fds)) => self.hear(message, fds),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    tracing::warn!(sandbox = %self.manifest.id, "its init does not answer (stopped?); going on");
                    break;
                }
                Err(error) => return self.lost(&error),
            }
        }
        self.show();
    }

    /// Takes what init says.
    fn hear(&mut self, message: FromInit, fds: Vec<OwnedFd>) {
        match message {
            FromInit::Started { seq, pid } => self.started(seq, pid, fds),
            FromInit::StartFailed { seq, step, errno } => {
                let Some(pending) = self.starting.remove(&seq) else { return };
                (pending.reply)(Err(Error::Start {
                    id: self.manifest.id.clone(),
                    program: pending.program,
                    step,
                    source: io::Error::from_raw_os_error(errno),
                }));
            }
            FromInit::Exited { pid, status } => self.ended(pid, command::exit_of(status)),
            FromInit::Held { pid, status, streams: _, tag } => self.found(pid, status, &tag, fds),
            FromInit::ListEnd | FromInit::Ready | FromInit::BootFailed { .. } => {}
        }
    }

    fn started(&mut self, seq: u32, pid: u32, fds: Vec<OwnedFd>) {
        let Some(Pending { tag, mut span, on_exit, reply, .. }) = self.starting.remove(&seq) else { return };
        span.end_of(Phase::Start);
        self.book.record(self.manifest.id.as_str(), &span);
        let stdio = tag.stdio;
        let ends = match command::ends(stdio, true, fds) {
            Ok(ends) => ends,
            Err(error) => {
                self.tell_or_lose(&ToInit::Signal { pid, signal: libc::SIGKILL });
                return reply(Err(io_error("set up the streams of a command in", &self.dir)(error)));
            }
        };
        let command = Command { pid, tag, ends, client: Some(Some(on_exit)), exit: None };
        let attachment = command.attachment(&self.mail);
        self.commands.insert(pid, command);
        if stdio == Stdio::Log {
            self.empty_into_log(pid);
        }
        match attachment {
            Ok(attachment) => reply(Ok(attachment)),
            Err(error) => {
                self.client_left(pid, Departure::Gone);
                reply(Err(io_error("copy the streams of a command in", &self.dir)(error)));
            }
        }
    }

    /// A command that an earlier engine started.
    fn found(&mut self, pid: u32, status: Option<i32>, tag: &[u8], fds: Vec<OwnedFd>) {
        let Ok(tag) = serde_json::from_slice::<Tag>(tag) else {
            tracing::error!(sandbox = %self.manifest.id, pid, "command with an unknown tag");
            return;
        };
        let has_stdin = fds.len() == 3;
        let Ok(ends) = command::ends(tag.stdio, has_stdin, fds) else { return };
        let (stdio, exit) = (tag.stdio, status.map(command::exit_of));
        self.commands.insert(pid, Command { pid, tag, ends, client: None, exit });
        if stdio == Stdio::Log {
            self.empty_into_log(pid);
            if let Some(exit) = exit {
                self.ended(pid, exit);
            }
        } else {
            self.alarms.push((Instant::now() + REATTACH_GRACE, pid, Alarm::Abandoned));
        }
    }

    fn ended(&mut self, pid: u32, exit: Exit) {
        let Some(command) = self.commands.get_mut(&pid) else { return };
        end(command, exit);
        let (log, attached) = (command.tag.stdio == Stdio::Log, command.client.is_some());
        if log {
            // Its output is the log thread's, so init need not hold it; it stays listed for its exit.
            self.tell_or_lose(&ToInit::Forget { pid });
            self.trim_ended();
        } else if !attached && !self.alarms.iter().any(|alarm| (alarm.1, alarm.2) == (pid, Alarm::Abandoned)) {
            self.forget(pid);
        }
    }

    fn trim_ended(&mut self) {
        let is_over = |command: &&Command| command.exit.is_some() && command.client.is_none();
        let mut over: Vec<(u64, u32)> =
            self.commands.values().filter(is_over).map(|command| (command.tag.started_unix_ms, command.pid)).collect();
        over.sort_unstable();
        let n_too_many = over.len().saturating_sub(N_ENDED_SHOWN);
        for (_, pid) in over.into_iter().take(n_too_many) {
            self.commands.remove(&pid);
        }
    }

    fn ring(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self.alarms.extract_if(.., |alarm| alarm.0 <= now).collect();
        for (_, pid, alarm) in due {
            match alarm {
                Alarm::Kill => self.tell_or_lose(&ToInit::Signal { pid, signal: libc::SIGKILL }),
                Alarm::Abandoned => self.client_left(pid, Departure::Gone),
            }
        }
    }

    fn tell(&mut self, message: &ToInit) -> Result<(), Error> {
        let dir = self.dir.clone();
        self.alive()?.link.send(message, &[]).map_err(io_error("send to the init of", &dir))
    }

    /// For what no client waits for. A dead sandbox needs none of it; a failed connection is noticed by `listen`.
    fn tell_or_lose(&mut self, message: &ToInit) {
        if self.life.is_some()
            && let Err(error) = self.tell(message)
        {
            tracing::error!(sandbox = %self.manifest.id, %error, "init does not take messages");
        }
    }

    fn lock_shown(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self) {
        self.lock_shown().execs = self.commands.values().map(Command::report).collect();
    }
}

/// Tells the client, if there is one.
fn end(command: &mut Command, exit: Exit) {
    command.exit = Some(exit);
    if let Some(on_exit) = command.client.as_mut().and_then(Option::take) {
        on_exit(exit);
    }
}

/// Answers what came too late for a sandbox that is no more.
pub(super) fn refuse(message: Message, id: &crate::sandbox::SandboxId) {
    let gone = || Error::NoSandbox { id: id.to_string() };
    match message {
        Message::Exec { reply, .. } | Message::Attach { reply, .. } => reply(Err(gone())),
        Message::Signal { reply, .. } | Message::Kill { reply } | Message::Remove { reply, .. } => reply(Err(gone())),
        Message::StdinClosed { .. } | Message::ClientLeft { .. } => {}
    }
}

fn io_error(op: &'static str, dir: &SandboxDir) -> impl FnOnce(io::Error) -> Error {
    let path = dir.path().to_owned();
    move |source| Error::Io { op, path, source }
}
