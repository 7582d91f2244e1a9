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

use crate::command::{self, Ends, Starting};
use crate::{boot, sys};

/// A command from its start until the engine forgets it.
struct Held {
    seq: u32,
    tag: Vec<u8>,
    streams: Streams,
    ends: Ends,
    /// Until exec has happened or failed.
    verdict: Option<OwnedFd>,
    status: Option<i32>,
}

/// The engine on the other side, with what it has not taken yet.
struct Engine {
    socket: UnixStream,
    input: Assembler<OwnedFd>,
    output: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

struct Init {
    engine: Option<Engine>,
    commands: BTreeMap<u32, Held>,
}

/// Serves until the sandbox is killed.
pub(crate) fn run(connection: UnixStream, listener: UnixListener) -> ExitCode {
    sys::reset_signals();
    let mut init = Init { engine: None, commands: BTreeMap::new() };
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
        let verdicts = self.commands.values().filter_map(|held| held.verdict.as_ref());
        fds.extend(verdicts.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        // EINTR and ENOMEM end here too: the loop looks at everything without blocking anyway.
        let _ = nix::poll::poll(&mut fds, PollTimeout::NONE);
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
                let fds = duplicate(&held.ends.all());
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
            if let Some(held) = self.commands.get_mut(&pid) {
                held.status = Some(status);
                self.tell(&FromInit::Exited { pid, status }, Vec::new());
            }
        }
    }

    /// Takes what the engine says and gives what it is owed. An error ends init.
    fn converse(&mut self) -> Result<(), ExitCode> {
        if let Err(_gone) = self.receive()? {
            self.engine = None;
        }
        if let Some(engine) = &mut self.engine
            && engine.flush().is_err()
        {
            self.engine = None;
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
                Ok(()) => {
                    // Failing costs memory, nothing else.
                    let _ = sys::release_program_pages();
                    self.tell(&FromInit::Ready, Vec::new());
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
                    held.ends.stdin = None;
                }
            }
            ToInit::Forget { pid } => {
                self.commands.remove(&pid);
            }
            ToInit::List => self.list(),
        }
        Ok(())
    }

    fn start(&mut self, request: Start) {
        match command::start(&request) {
            Ok(Starting { pid, ends, verdict }) => {
                let Start { seq, tag, streams, .. } = request;
                self.commands.insert(pid, Held { seq, tag, streams, ends, verdict: Some(verdict), status: None });
            }
            Err(not) => {
                let answer = FromInit::StartFailed { seq: request.seq, step: not.step.to_owned(), errno: not.errno };
                self.tell(&answer, Vec::new());
            }
        }
    }

    /// Only commands that still run, so that a number used again is never hit.
    fn signal(&self, pid: u32, signal: i32) {
        let runs = self.commands.get(&pid).is_some_and(|held| held.status.is_none());
        let (Ok(pid), Ok(signal)) = (i32::try_from(pid), Signal::try_from(signal)) else { return };
        if runs {
            // Every command leads its own process group; one that has just ended answers ESRCH.
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), signal);
        }
    }

    fn list(&mut self) {
        let mut answers = Vec::new();
        for (&pid, held) in self.commands.iter().filter(|(_, held)| held.verdict.is_none()) {
            let answer = FromInit::Held { pid, status: held.status, streams: held.streams, tag: held.tag.clone() };
            answers.push((answer, duplicate(&held.ends.all())));
        }
        for (answer, fds) in answers {
            self.tell(&answer, fds);
        }
        self.tell(&FromInit::ListEnd, Vec::new());
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
