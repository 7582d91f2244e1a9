//! The event loop: signals, the engine's connection, the listener, and commands on their way to exec.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;

use deltabox_common::init::{Assembler, FromInit, Start, Streams, ToInit};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::boot::{self, Booted};
use crate::command::{self, Ends, Starting};
use crate::sys;

/// A command from its start until the engine forgets it.
struct Held {
    seq: u32,
    tag: Vec<u8>,
    streams: Streams,
    outer: Ends,
    /// Until exec has happened or failed.
    verdict: Option<OwnedFd>,
    /// Which of its lives the engine knows of: rollbacks make it again.
    life: u32,
    /// The first one that is known here.
    first: u32,
    /// How they have ended, from the first on. The process of a life is killed before that of the next is made, and ends are
    /// told in their order, but the engine's word may come before or after.
    ends: Vec<i32>,
}

impl Held {
    /// The end of its present life.
    fn end(&self) -> Option<i32> {
        let at = usize::try_from(self.life.checked_sub(self.first)?).ok()?;
        self.ends.get(at).copied()
    }

    /// Takes in that the next of its lives has ended; which.
    fn end_next(&mut self, status: i32) -> u32 {
        self.ends.push(status);
        self.first.saturating_add(u32::try_from(self.ends.len() - 1).unwrap_or(u32::MAX))
    }
}

/// The engine on the other side, with what it has not taken yet.
struct Engine {
    socket: UnixStream,
    input: Assembler<OwnedFd>,
    output: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

struct Init {
    engine: Option<Engine>,
    /// From the set-up on.
    booted: Option<Booted>,
    commands: BTreeMap<u32, Held>,
    /// The last ones that have ended and were no commands, the latest last: one of them may turn out to be.
    others: VecDeque<(u32, i32)>,
}

/// How many of them are remembered (chosen: the engine's word comes a few milliseconds late).
const N_OTHERS: usize = 64;

/// Serves until the sandbox is killed.
pub(crate) fn run(connection: UnixStream, listener: UnixListener) -> ExitCode {
    sys::reset_signals();
    let mut init = Init { engine: None, booted: None, commands: BTreeMap::new(), others: VecDeque::new() };
    let mask = SigSet::from(Signal::SIGCHLD);
    let prepared =
        mask.thread_block().and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK));
    let Ok(children) = prepared else { return ExitCode::from(2) };
    if listener.set_nonblocking(true).is_err() || init.connect(connection).is_err() {
        return ExitCode::from(2);
    }
    loop {
        init.wait(&children, &listener);
        while let Ok(Some(_)) = children.read_signal() {}
        if let Ok((connection, _)) = listener.accept() {
            // A connection that cannot be set up is as good as one that was never made.
            let _ = init.connect(connection);
        }
        // Verdicts before exits: a command that failed to start is not one that ended.
        init.collect_verdicts();
        init.collect_exits();
        init.attend();
        if let Err(status) = init.converse() {
            return status;
        }
    }
}

impl Init {
    fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.engine = Some(Engine { socket, input: Assembler::default(), output: VecDeque::new() });
        Ok(())
    }

    fn wait(&self, children: &SignalFd, listener: &UnixListener) {
        let mut fds =
            vec![PollFd::new(children.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if let Some(engine) = &self.engine {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, !engine.output.is_empty());
            fds.push(PollFd::new(engine.socket.as_fd(), events));
        }
        if let Some(Booted { numbers, everyone }) = &self.booted {
            fds.push(PollFd::new(everyone.listener(), PollFlags::POLLIN));
            fds.extend(numbers.line().map(|line| PollFd::new(line, PollFlags::POLLIN)));
        }
        let verdicts = self.commands.values().filter_map(|held| held.verdict.as_ref());
        fds.extend(verdicts.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        // EINTR and ENOMEM end here too: the loop looks at everything without blocking anyway.
        let _ = nix::poll::poll(&mut fds, PollTimeout::NONE);
    }

    /// Does what the kernel and the engine want of PID 1 of the namespace.
    fn attend(&mut self) {
        let Some(Booted { numbers, everyone }) = &mut self.booted else { return };
        numbers.serve();
        let mut fds = [PollFd::new(everyone.listener(), PollFlags::POLLIN)];
        if nix::poll::poll(&mut fds, PollTimeout::ZERO).unwrap_or(0) > 0 {
            everyone.serve();
        }
    }

    /// The engine is gone: nothing of what it does to numbers stays.
    fn part(&mut self) {
        self.engine = None;
        if let Some(booted) = &self.booted {
            // The next engine tries again.
            let _ = booted.numbers.lower();
        }
    }

    fn collect_verdicts(&mut self) {
        let mut ready = Vec::new();
        for (&pid, held) in &self.commands {
            let Some(verdict) = &held.verdict else { continue };
            let mut fds = [PollFd::new(verdict.as_fd(), PollFlags::POLLIN)];
            if nix::poll::poll(&mut fds, PollTimeout::ZERO).unwrap_or(0) > 0 {
                ready.push(pid);
            }
        }
        for pid in ready {
            self.take_verdict(pid);
        }
    }

    fn take_verdict(&mut self, pid: u32) {
        let Some(held) = self.commands.get_mut(&pid) else { return };
        let Some(verdict) = held.verdict.take() else { return };
        let mut bytes = Vec::new();
        let _ = std::fs::File::from(verdict).read_to_end(&mut bytes);
        let seq = held.seq;
        match command::read_verdict(&bytes) {
            None => {
                let fds = duplicate(&held.outer.all());
                self.tell(&FromInit::Started { seq, pid }, fds);
            }
            Some(not) => {
                self.commands.remove(&pid);
                self.tell(&FromInit::StartFailed { seq, step: not.step.to_owned(), errno: not.errno }, Vec::new());
            }
        }
    }

    fn collect_exits(&mut self) {
        while let Some((pid, status)) = sys::reap() {
            if self.commands.get(&pid).is_some_and(|held| held.verdict.is_some()) {
                self.take_verdict(pid);
            }
            match self.commands.get_mut(&pid) {
                Some(held) => {
                    let life = held.end_next(status);
                    self.tell(&FromInit::Exited { pid, life, status }, Vec::new());
                }
                // A template, or who has helped to make one.
                None if self.booted.as_ref().is_some_and(|booted| !booted.numbers.is_programs(pid)) => {}
                None => {
                    let n_old = (self.others.len() + 1).saturating_sub(N_OTHERS);
                    self.others.drain(..n_old);
                    self.others.push_back((pid, status));
                }
            }
        }
    }

    /// Takes what the engine says and gives what it is owed. An error ends init.
    fn converse(&mut self) -> Result<(), ExitCode> {
        if let Err(_gone) = self.receive()? {
            self.part();
        }
        if let Some(engine) = &mut self.engine
            && engine.flush().is_err()
        {
            self.part();
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<io::Result<()>, ExitCode> {
        let mut buf = vec![0_u8; 16 << 10];
        loop {
            let Some(engine) = &mut self.engine else { return Ok(Ok(())) };
            let mut fds = Vec::new();
            match sys::socket::recv_with_fds(engine.socket.as_fd(), &mut buf, &mut fds) {
                Ok(0) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => engine.input.feed(&buf[..n], fds),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Err(error)),
            }
            loop {
                let Some(engine) = &mut self.engine else { return Ok(Ok(())) };
                let frame = match engine.input.next_frame() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => return Ok(Err(io::Error::other(error))),
                };
                match ToInit::decode(frame.0, &frame.1) {
                    Ok(message) => self.obey(message, frame.2)?,
                    Err(error) => return Ok(Err(io::Error::other(error))),
                }
            }
        }
    }

    fn obey(&mut self, message: ToInit, fds: Vec<OwnedFd>) -> Result<(), ExitCode> {
        match message {
            ToInit::Boot(request) => match boot::boot(&request, fds) {
                Ok(booted) => {
                    // Failing costs memory, nothing else.
                    let _ = sys::release_program_pages();
                    let numbers = self.booted.insert(booted).numbers.lend();
                    self.tell(&FromInit::Ready, numbers.unwrap_or_default());
                }
                Err(failed) => {
                    let errno = failed.source.raw_os_error().unwrap_or(0);
                    self.tell(&FromInit::BootFailed { step: failed.step, errno }, Vec::new());
                    if let Some(engine) = &mut self.engine {
                        let _ = engine.flush();
                    }
                    return Err(ExitCode::FAILURE);
                }
            },
            ToInit::Start(request) => self.start(request),
            ToInit::Signal { pid, signal } => self.signal(pid, signal),
            ToInit::CloseStdin { pid } => {
                if let Some(held) = self.commands.get_mut(&pid) {
                    held.outer.stdin = None;
                }
            }
            ToInit::Forget { pid } => {
                self.commands.remove(&pid);
            }
            ToInit::List => self.list(),
            ToInit::Returned { pid, life, same, tag } => self.take_back((pid, life), same, tag),
        }
        Ok(())
    }

    fn start(&mut self, request: Start) {
        match command::start(&request) {
            Ok(Starting { pid, ends, verdict }) => {
                let Start { seq, tag, streams, .. } = request;
                let verdict = Some(verdict);
                let held = Held { seq, tag, streams, outer: ends, verdict, life: 0, first: 0, ends: Vec::new() };
                self.commands.insert(pid, held);
            }
            Err(not) => {
                let answer = FromInit::StartFailed { seq: request.seq, step: not.step.to_owned(), errno: not.errno };
                self.tell(&answer, Vec::new());
            }
        }
    }

    /// A command that a rollback has made again, whether or not it is still held.
    fn take_back(&mut self, (pid, life): (u32, u32), same: bool, tag: Vec<u8>) {
        if let Some(held) = self.commands.get_mut(&pid) {
            if !same {
                // The number had been given to another one, which has ended now.
                held.tag = tag;
                held.streams = Streams::Log;
                held.outer = Ends::none();
            }
            held.life = life;
            return;
        }
        let held = Held {
            seq: 0,
            tag,
            streams: Streams::Log,
            outer: Ends::none(),
            verdict: None,
            life,
            first: life,
            ends: Vec::new(),
        };
        self.commands.insert(pid, held);
        let lives =
            i32::try_from(pid).is_ok_and(|pid| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok());
        if !lives {
            // It has ended before this was heard.
            let found = self.others.iter().rev().find(|(other, _)| *other == pid);
            let status = found.map_or(libc::SIGKILL, |(_, status)| *status);
            if let Some(held) = self.commands.get_mut(&pid) {
                held.end_next(status);
            }
            self.tell(&FromInit::Exited { pid, life, status }, Vec::new());
        }
    }

    /// Only commands that still run, so that a number used again is never hit.
    fn signal(&self, pid: u32, signal: i32) {
        let runs = self.commands.get(&pid).is_some_and(|held| held.end().is_none());
        let (Ok(pid), Ok(signal)) = (i32::try_from(pid), Signal::try_from(signal)) else { return };
        if runs {
            // Every command leads its own process group; one that has just ended answers ESRCH.
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), signal);
        }
    }

    fn list(&mut self) {
        let mut answers = Vec::new();
        for (&pid, held) in self.commands.iter().filter(|(_, held)| held.verdict.is_none()) {
            let (life, status) = (held.life, held.end());
            let answer = FromInit::Held { pid, life, status, streams: held.streams, tag: held.tag.clone() };
            answers.push((answer, duplicate(&held.outer.all())));
        }
        for (answer, fds) in answers {
            self.tell(&answer, fds);
        }
        let numbers = self.booted.as_mut().map(|booted| booted.numbers.lend());
        self.tell(&FromInit::ListEnd, numbers.and_then(Result::ok).unwrap_or_default());
    }

    /// Without an engine nothing is said: it asks with `List` when it comes.
    fn tell(&mut self, answer: &FromInit, fds: Vec<OwnedFd>) {
        if let Some(engine) = &mut self.engine {
            engine.output.push_back((answer.encode(fds.len()), fds));
        }
    }
}

impl Engine {
    fn flush(&mut self) -> io::Result<()> {
        while let Some((bytes, fds)) = self.output.front_mut() {
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match sys::socket::send_with_fds(self.socket.as_fd(), bytes, &borrowed) {
                Ok(n) => {
                    bytes.drain(..n);
                    fds.clear();
                    if bytes.is_empty() {
                        self.output.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Copies for a frame on its way. One that cannot be copied (out of descriptors) is left out, and the engine
/// sees a frame that is short of descriptors rather than none.
fn duplicate(fds: &[BorrowedFd<'_>]) -> Vec<OwnedFd> {
    fds.iter().filter_map(|fd| fd.try_clone_to_owned().ok()).collect()
}
