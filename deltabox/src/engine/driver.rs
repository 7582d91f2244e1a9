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

mod checkpoints;
mod commands;
mod merging;
mod moments;
mod spare;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deltabox_common::init::{FromInit, ToInit};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::api::{
    Attachment, CheckpointReport, CheckpointRequest, Departure, ExecReport, ExecRequest, Exit, GcReport, Reply,
    RollbackReport, RollbackRequest, SandboxReport, SandboxState,
};
use super::command::{Command, OnExit, Tag};
use super::footing::Footing;
use super::gc::Tops;
use super::inbox::Inbox;
use super::logs::Logs;
use super::manifest::Manifest;
use super::store::SandboxDir;
use super::switch::Standing;
use super::tree::{CheckpointId, Tree};
use super::{Engine, Error, ready};
use crate::deltacr::moment::{Identity, Moment, Outlook};
use crate::deltacr::stop::Tracer;
use crate::deltafs::layer::{LayerId, LiveLayer, Record};
use crate::latency::{Book, Phase, Span};
use crate::sandbox::backstage::Backstage;
use crate::sandbox::link::InitLink;
use crate::sys::process::{self, Child};
use merging::Merging;
use moments::Moments;
use spare::Spares;

pub(super) use merging::MAX_LAYERS;
pub(super) use spare::sweep;

/// Where a driver is reached.
pub(super) type Mail = Inbox<Message>;

/// What a driver is asked or told.
pub(super) enum Message {
    Exec {
        request: Box<ExecRequest>,
        span: Span,
        on_exit: OnExit,
        reply: Reply<Attachment>,
    },
    Attach {
        pid: u32,
        on_exit: OnExit,
        reply: Reply<Attachment>,
    },
    Signal {
        pid: u32,
        signal: i32,
        reply: Reply<()>,
    },
    StdinClosed {
        pid: u32,
        life: u32,
    },
    ClientLeft {
        pid: u32,
        /// That in which it came.
        life: u32,
        departure: Departure,
    },
    Checkpoint {
        request: Box<CheckpointRequest>,
        span: Span,
        reply: Reply<CheckpointReport>,
    },
    Rollback {
        request: RollbackRequest,
        span: Span,
        reply: Reply<RollbackReport>,
    },
    RemoveCheckpoint {
        checkpoint: String,
        reply: Reply<()>,
    },
    /// How rollbacks to each checkpoint that holds processes would go.
    Outlook {
        reply: Reply<BTreeMap<CheckpointId, Outlook>>,
    },
    Collect {
        reply: Reply<GcReport>,
    },
    /// The merger thread has done what it was given.
    MergeEnded,
    Kill {
        reply: Reply<()>,
    },
    Remove {
        span: Span,
        reply: Reply<()>,
    },
}

/// What other threads may look at without asking the driver.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) report: SandboxReport,
    pub(super) execs: Vec<ExecReport>,
    pub(super) tree: Arc<Tree>,
    pub(super) live: LayerId,
    pub(super) next: Option<LayerId>,
    /// Layers that it needs, with all below them.
    pub(super) tops: Tops,
    pub(super) held: Held,
}

/// Directories of layers that are in use, whatever the stacks are now.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    pub(super) dirs: BTreeSet<LayerId>,
    /// A layer whose record cannot be read: what it is mounted over cannot be told, but that it is older.
    pub(super) unread: Option<LayerId>,
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
    /// Not there until init has told of it, after a restart.
    pub(super) backstage: Option<Arc<Backstage>>,
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
    pub(super) engine: Engine,
    pub(super) tree: Tree,
    pub(super) manifest: Manifest,
    pub(super) dir: SandboxDir,
    pub(super) mail: Arc<Mail>,
    pub(super) shown: Arc<Mutex<Shown>>,
    pub(super) logs: Logs,
    pub(super) retired: Arc<AtomicBool>,
    pub(super) book: Arc<Book>,
}

pub(super) struct Driver {
    engine: Engine,
    manifest: Manifest,
    tree: Arc<Tree>,
    /// Its live layer and base, opened for the first checkpoint.
    live: Option<LiveLayer>,
    footing: Option<Arc<Footing>>,
    spares: Spares,
    merging: Merging,
    /// Directories that its programs keep open.
    standing: Standing,
    /// The processes of its checkpoints, those whose templates are there.
    moments: Moments,
    /// Processes that a rollback made again, as they were and as they are, until all moments know.
    made_again: Vec<(Identity, Identity)>,
    /// PIDs inside of those that the last rollback made as children of init, whatever became of them.
    born: Vec<i32>,
    /// Why its processes are on different roots.
    torn: Option<String>,
    tracer: Tracer,
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
        let DriverParts { engine, tree, manifest, dir, mail, shown, logs, retired, book } = parts;
        let (pool, sandbox) = (Arc::clone(&engine.0.pool), manifest.id.clone());
        Self {
            engine,
            tree: Arc::new(tree),
            live: None,
            footing: None,
            spares: Spares::default(),
            merging: Merging::default(),
            standing: Standing::default(),
            moments: Moments::new(pool, sandbox),
            made_again: Vec::new(),
            born: Vec::new(),
            torn: None,
            tracer: Tracer::new(),
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

    /// Its processes are on different roots, and that could not be mended.
    pub(super) fn set_torn(&mut self, why: String) {
        self.torn = Some(why);
    }

    /// The processes that its checkpoints hold.
    pub(super) fn set_moments(&mut self, moments: BTreeMap<CheckpointId, Moment>) {
        for (id, moment) in moments {
            self.moments.insert(id, moment);
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
            Message::StdinClosed { pid, life } => {
                if self.is_client(pid, life) {
                    self.close_stdin(pid);
                }
            }
            Message::ClientLeft { pid, life, departure } => {
                if self.is_client(pid, life) {
                    self.client_left(pid, departure);
                }
            }
            Message::Checkpoint { request, mut span, reply } => match self.checkpoint(&request, &mut span) {
                Ok((report, old)) => {
                    self.show();
                    reply(Ok(report));
                    self.clean_up(old, None);
                    self.merge_if_long();
                    self.prepare_spare();
                }
                Err(error) => reply(Err(error)),
            },
            Message::Rollback { request, mut span, reply } => match self.rollback(&request, &mut span) {
                Ok((report, old, discarded)) => {
                    self.show();
                    reply(Ok(report));
                    self.clean_up(old, Some(discarded));
                    self.merge_if_long();
                    self.prepare_spare();
                }
                Err(error) => reply(Err(error)),
            },
            Message::RemoveCheckpoint { checkpoint, reply } => reply(self.remove_checkpoint(&checkpoint)),
            Message::Outlook { reply } => reply(Ok(self.outlook())),
            Message::Collect { reply } => reply(self.engine.collect_of(&self.manifest.id)),
            Message::MergeEnded => self.end_merge(),
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
        // Their templates were in the sandbox's cgroup.
        self.moments.clear();
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
            .inspect(|()| self.spares.discard(&self.engine))
            .and_then(|()| self.dir.remove().map_err(io_error("remove", &self.dir)))
            .and_then(|()| {
                // From here on nothing needs its layers but what other sandboxes have of them.
                self.merging.cancel();
                let mut shown = self.lock_shown();
                (shown.tops, shown.held) = Default::default();
                drop(shown);
                self.engine.collect_removed(&self.manifest.id).map(drop)
            });
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
                Ok((message, fds)) => {
                    let is_end = message == FromInit::ListEnd;
                    self.hear(message, fds);
                    if is_end {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    tracing::warn!(sandbox = %self.manifest.id, "its init does not answer (stopped?); going on");
                    break;
                }
                Err(error) => return self.lost(&error),
            }
        }
        self.show();
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
        let execs = self.commands.values().map(Command::report).collect();
        let mut shown = self.lock_shown();
        shown.execs = execs;
        if shown.report.epoch == self.manifest.epoch
            && (shown.live, shown.next) == (self.manifest.live, self.manifest.next)
            && Arc::ptr_eq(&shown.tree, &self.tree)
            && self.merging.sources().all(|layer| shown.held.dirs.contains(&layer))
        {
            return;
        }
        shown.report.epoch = self.manifest.epoch;
        shown.report.head = self.manifest.head.map(|id| id.to_string());
        shown.report.live_layer = self.engine.0.layers.path(self.manifest.live);
        (shown.live, shown.next) = (self.manifest.live, self.manifest.next);
        shown.tree = Arc::clone(&self.tree);
        shown.tops = tops(&self.manifest, &self.tree);
        shown.held = mounted_over(&self.engine, &self.manifest);
        shown.held.dirs.extend(self.merging.sources());
    }
}

/// The layers by which a sandbox needs others.
pub(super) fn tops(manifest: &Manifest, tree: &Tree) -> Tops {
    let own = [Some(manifest.live), manifest.next].into_iter().flatten();
    tree.iter().filter_map(|one| one.top).chain(own).collect()
}

/// The directories that a sandbox's root is mounted over, or may be. Merged ones may have taken their place in stacks.
pub(super) fn mounted_over(engine: &Engine, manifest: &Manifest) -> Held {
    let mut held = Held::default();
    for id in [Some(manifest.live), manifest.next].into_iter().flatten() {
        match Record::load(&engine.0.layers.path(id)) {
            Ok(record) => held.dirs.extend(record.stack),
            Err(error) => {
                tracing::error!(layer = %id, %error, "its record cannot be read; no older layer is removed");
                held.unread = held.unread.max(Some(id));
            }
        }
    }
    held
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
        Message::Checkpoint { reply, .. } => reply(Err(gone())),
        Message::Rollback { reply, .. } => reply(Err(gone())),
        Message::RemoveCheckpoint { reply, .. } => reply(Err(gone())),
        Message::Outlook { reply } => reply(Err(gone())),
        Message::Collect { reply } => reply(Err(gone())),
        Message::StdinClosed { .. } | Message::ClientLeft { .. } | Message::MergeEnded => {}
    }
}

fn io_error(op: &'static str, dir: &SandboxDir) -> impl FnOnce(io::Error) -> Error {
    let path = dir.path().to_owned();
    move |source| Error::Io { op, path, source }
}
