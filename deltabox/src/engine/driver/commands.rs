//! The driver's commands: started, attached to, ended, forgotten.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use deltabox_common::init::{FromInit, Start, ToInit};

use super::{Alarm, Driver, HANGUP_GRACE, N_ENDED_SHOWN, Pending, REATTACH_GRACE, end, io_error};
use crate::engine::api::{Attachment, Departure, ExecRequest, Exit, OnDisconnect, Reply, Stdio};
use crate::engine::command::{self, Command, OnExit, Tag};
use crate::engine::{Error, ready, request, unix_ms};
use crate::latency::{Phase, Span};
use crate::sandbox::backstage::Backstage;

impl Driver {
    pub(super) fn exec(&mut self, request: ExecRequest, mut span: Span, on_exit: OnExit, reply: Reply<Attachment>) {
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

    pub(super) fn attach(&mut self, pid: u32, on_exit: OnExit) -> Result<Attachment, Error> {
        let id = self.manifest.id.clone();
        let command = self.commands.get_mut(&pid).ok_or_else(|| Error::NoExec { id: id.clone(), pid })?;
        if command.client.is_some() {
            return Err(Error::Refused {
                what: format!("attach to {pid} in `{id}`"),
                why: "another client is attached".to_owned(),
                hint: "a command has one client at a time; end that one first".to_owned(),
            });
        }
        command.came = command.life;
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

    pub(super) fn signal(&mut self, pid: u32, signal: i32) -> Result<(), Error> {
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

    pub(super) fn close_stdin(&mut self, pid: u32) {
        if let Some(command) = self.commands.get_mut(&pid)
            && command.ends.stdin.take().is_some()
        {
            self.tell_or_lose(&ToInit::CloseStdin { pid });
        }
    }

    pub(super) fn client_left(&mut self, pid: u32, departure: Departure) {
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

    /// Takes what init says.
    pub(super) fn hear(&mut self, message: FromInit, fds: Vec<OwnedFd>) {
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
            FromInit::Exited { pid, life, status } => {
                // That of an earlier life was a rollback's doing.
                if self.commands.get(&pid).is_some_and(|command| command.life == life) {
                    self.ended(pid, command::exit_of(status));
                }
            }
            FromInit::Held { pid, life, status, streams: _, tag } => self.found((pid, life), status, &tag, fds),
            FromInit::ListEnd => self.go_backstage(fds),
            FromInit::Ready | FromInit::BootFailed { .. } => {}
        }
    }

    /// After a restart: takes hold of the numbers of templates. What an engine that died in a stop has left is undone.
    fn go_backstage(&mut self, fds: Vec<OwnedFd>) {
        let Some(life) = &mut self.life else { return };
        match Backstage::new(life.init.pid, fds) {
            Ok(backstage) => {
                let taken = self.moments.iter().flat_map(|(_, moment)| moment.template_numbers());
                taken.for_each(|number| backstage.reserve.keep_clear_of(number));
                life.backstage = Some(Arc::new(backstage));
            }
            Err(error) => {
                tracing::error!(sandbox = %self.manifest.id, %error, "no place for templates: no checkpoint of processes can be made");
            }
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
        let command = Command { pid, life: 0, tag, ends, client: Some(Some(on_exit)), came: 0, exit: None };
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
    fn found(&mut self, (pid, life): (u32, u32), status: Option<i32>, tag: &[u8], fds: Vec<OwnedFd>) {
        let Ok(tag) = serde_json::from_slice::<Tag>(tag) else {
            tracing::error!(sandbox = %self.manifest.id, pid, "command with an unknown tag");
            return;
        };
        let has_stdin = fds.len() == 3;
        let Ok(ends) = command::ends(tag.stdio, has_stdin, fds) else { return };
        let (stdio, exit) = (tag.stdio, status.map(command::exit_of));
        self.commands.insert(pid, Command { pid, life, tag, ends, client: None, came: life, exit });
        if stdio == Stdio::Log {
            self.empty_into_log(pid);
            if let Some(exit) = exit {
                self.ended(pid, exit);
            }
        } else {
            self.alarms.push((Instant::now() + REATTACH_GRACE, pid, Alarm::Abandoned));
        }
    }

    /// Whether the client that came in that life is still the command's.
    pub(super) fn is_client(&self, pid: u32, life: u32) -> bool {
        self.commands.get(&pid).is_some_and(|command| command.came == life)
    }

    /// A rollback has made a command again, at the `n_births`th attempt. One that still had a client goes on with it, as if nothing had happened; else
    /// what it writes goes to its log.
    pub(super) fn returned(&mut self, pid: u32, tag: Tag, n_births: u32) {
        let present = self.commands.get_mut(&pid);
        let life = present.as_ref().map_or(0, |command| command.life) + n_births;
        let same = present.filter(|command| command.tag.is_of(&tag) && command.exit.is_none());
        let is_same = same.is_some();
        if let Some(command) = same {
            command.life = life;
        }
        let tag = Tag { stdio: if is_same { tag.stdio } else { Stdio::Log }, ..tag };
        match serde_json::to_vec(&tag) {
            Ok(tag) => self.tell_or_lose(&ToInit::Returned { pid, life, same: is_same, tag }),
            Err(error) => tracing::error!(sandbox = %self.manifest.id, pid, %error, "a command is not listed"),
        }
        if is_same {
            return;
        }
        if let Some(command) = self.commands.get_mut(&pid) {
            if command.exit.is_none() {
                // The number had been given to another one, which the rollback has ended.
                end(command, Exit::Signaled { signal: 9, core_dumped: false });
            }
            self.empty_into_log(pid);
        }
        self.alarms.retain(|alarm| alarm.1 != pid);
        let ends = command::Ends { stdin: None, outer: Vec::new() };
        self.commands.insert(pid, Command { pid, life, tag, ends, client: None, came: life, exit: None });
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

    pub(super) fn ring(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self.alarms.extract_if(.., |alarm| alarm.0 <= now).collect();
        for (_, pid, alarm) in due {
            match alarm {
                Alarm::Kill => self.tell_or_lose(&ToInit::Signal { pid, signal: libc::SIGKILL }),
                Alarm::Abandoned => self.client_left(pid, Departure::Gone),
            }
        }
    }
}
