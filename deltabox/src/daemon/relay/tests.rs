//! A session between real pipes (or a real terminal) and a real socket; the command is played by the test.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;

use crate::daemon::frame::{ClientFrame, FrameBuffer, MAX_PAYLOAD, STDIN_WINDOW};
use crate::daemon::server::daemon_without_engine;
use crate::sys;

use super::*;

/// Far above what anything here takes; a test that waits this long has failed.
const DEADLINE: Duration = Duration::from_secs(20);

struct Client {
    reader: OwnedReadHalf,
    frames: FrameBuffer,
    writer: Option<OwnedWriteHalf>,
}

impl Client {
    /// The next frame, copied out. `None` at the end of the connection.
    async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some((kind, payload)) = self.frames.take_frame().unwrap() {
                return Some((kind, payload.to_vec()));
            }
            let read = tokio::time::timeout(DEADLINE, self.reader.read(self.frames.room())).await;
            match read.expect("no frame within the deadline") {
                Ok(n) if n > 0 => self.frames.filled(n),
                _ => return None,
            }
        }
    }

    async fn say(&mut self, frame: ClientFrame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.writer.as_mut().unwrap().write_all(&bytes).await.unwrap();
    }

    /// All that follows `started`: output, error output, credit, and the last frame.
    async fn collect(&mut self) -> (Vec<u8>, Vec<u8>, u32, Option<Exit>) {
        let (mut out, mut err, mut credit, mut exit) = (Vec::new(), Vec::new(), 0, None);
        while let Some((kind, payload)) = self.next().await {
            match ServerFrame::parse(kind, &payload).unwrap() {
                ServerFrame::Started(_) => {}
                ServerFrame::Stdout(bytes) => out.extend_from_slice(bytes),
                ServerFrame::Stderr(bytes) => err.extend_from_slice(bytes),
                ServerFrame::StdinCredit(n) => credit += n,
                ServerFrame::Exit(how) => exit = Some(how),
                ServerFrame::Error(body) => panic!("{body:?}"),
            }
        }
        (out, err, credit, exit)
    }
}

/// The command's ends of its streams.
struct Command {
    stdin: PipeReader,
    stdout: PipeWriter,
    stderr: PipeWriter,
    exit: oneshot::Sender<Exit>,
}

fn start(ends: Ends, exited: oneshot::Receiver<Exit>) -> (Client, JoinHandle<End>) {
    let (near, far) = UnixStream::pair().unwrap();
    let daemon = daemon_without_engine("/the/store".into());
    let input = Input { daemon: daemon.clone(), id: "a".parse().unwrap(), pid: 7, terminal: ends.terminal.clone() };
    let (reader, writer) = far.into_split();
    let task = tokio::spawn(async move { relay(ends, input, &daemon, exited, reader, Bytes::new(), writer).await });
    let (reader, writer) = near.into_split();
    (Client { reader, frames: FrameBuffer::new(), writer: Some(writer) }, task)
}

fn non_blocking(fd: OwnedFd) -> OwnedFd {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    fd
}

fn pipes() -> (Client, Command, JoinHandle<End>) {
    let (stdin, stdin_writer) = io::pipe().unwrap();
    let (stdout_reader, stdout) = io::pipe().unwrap();
    let (stderr_reader, stderr) = io::pipe().unwrap();
    let watched = |fd: OwnedFd| Arc::new(watch(non_blocking(fd)).unwrap());
    let ends = Ends {
        stdin: Some(Sink { fd: watched(stdin_writer.into()), _hold: None }),
        stdout: Some(watched(stdout_reader.into())),
        stderr: Some(watched(stderr_reader.into())),
        terminal: None,
    };
    let (exit, exited) = oneshot::channel();
    let (client, task) = start(ends, exited);
    (client, Command { stdin, stdout, stderr, exit }, task)
}

async fn end_of(task: JoinHandle<End>) -> End {
    tokio::time::timeout(DEADLINE, task).await.expect("no end within the deadline").unwrap()
}

#[tokio::test]
async fn all_output_comes_before_the_exit_though_somebody_holds_the_pipes() {
    let (mut client, mut command, task) = pipes();
    command.stdout.write_all(&[b'o'; 60_000]).unwrap();
    command.stderr.write_all(b"err").unwrap();
    command.exit.send(Exit::Exited { status: 3 }).unwrap();
    let (out, err, _, exit) = client.collect().await;
    assert_eq!((out.len(), err.as_slice(), exit), (60_000, &b"err"[..], Some(Exit::Exited { status: 3 })));
    assert_eq!(end_of(task).await, End::Exited);
    // Only now does the background process that held them let go.
    drop((command.stdout, command.stderr));
}

#[tokio::test]
async fn a_background_process_that_writes_for_ever_does_not_hold_the_exit_up() {
    let (mut client, command, task) = pipes();
    let mut stdout = command.stdout;
    let writer = std::thread::spawn(move || while stdout.write_all(&[b'x'; 4096]).is_ok() {});
    command.exit.send(Exit::Exited { status: 0 }).unwrap();
    assert_eq!(client.collect().await.3, Some(Exit::Exited { status: 0 }));
    assert_eq!(end_of(task).await, End::Exited);
    writer.join().unwrap();
}

#[tokio::test]
async fn input_arrives_with_its_end_and_is_credited() {
    let (mut client, mut command, task) = pipes();
    client.say(ClientFrame::Stdin(b"some ")).await;
    client.say(ClientFrame::Stdin(b"input")).await;
    client.say(ClientFrame::StdinEnd).await;
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        command.stdin.read_to_string(&mut text).unwrap();
        command.exit.send(Exit::Exited { status: 0 }).unwrap();
        (text, command.stdout, command.stderr)
    });
    assert_eq!(read.await.unwrap().0, "some input");
    // The credit for the last input may come too late for a command that has ended.
    assert!(client.collect().await.2 <= 10);
    assert_eq!(end_of(task).await, End::Exited);
}

#[tokio::test]
async fn a_command_that_does_not_read_hides_neither_a_detach_nor_a_lost_client() {
    for detach in [true, false] {
        let (mut client, _command, task) = pipes();
        for _ in 0..4 {
            client.say(ClientFrame::Stdin(&[0; MAX_PAYLOAD])).await;
        }
        if detach {
            client.say(ClientFrame::Detach).await;
        }
        drop(client);
        assert_eq!(end_of(task).await, if detach { End::Detached } else { End::Gone });
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_can_still_detach() {
    let (mut client, command, task) = pipes();
    let mut stdout = command.stdout;
    let writer = std::thread::spawn(move || while stdout.write_all(&[b'x'; 4096]).is_ok() {});
    // The first frame has come, nothing more is read: socket and pipe fill up.
    client.next().await.unwrap();
    client.say(ClientFrame::Detach).await;
    assert_eq!(end_of(task).await, End::Detached);
    writer.join().unwrap();
}

#[tokio::test]
async fn a_command_that_closed_its_input_has_the_rest_thrown_away() {
    let (mut client, command, task) = pipes();
    drop(command.stdin);
    let mut credit = 0;
    let mut n_sent = 0;
    let window = usize::try_from(STDIN_WINDOW).unwrap();
    while n_sent < 3 * window {
        if n_sent < window + credit {
            client.say(ClientFrame::Stdin(&[0; 32 * 1024])).await;
            n_sent += 32 * 1024;
            continue;
        }
        let (kind, payload) = client.next().await.unwrap();
        if let ServerFrame::StdinCredit(n) = ServerFrame::parse(kind, &payload).unwrap() {
            credit += usize::try_from(n).unwrap();
        }
    }
    command.exit.send(Exit::Exited { status: 0 }).unwrap();
    assert_eq!(client.collect().await.3, Some(Exit::Exited { status: 0 }));
    assert_eq!(end_of(task).await, End::Exited);
}

#[tokio::test]
async fn a_client_that_breaks_the_rules_is_told_and_left() {
    let mut too_much = Vec::new();
    for _ in 0..=(STDIN_WINDOW / 65_536 + 1) {
        ClientFrame::Stdin(&[0; MAX_PAYLOAD]).encode(&mut too_much);
    }
    for bytes in [too_much, vec![99, 0, 0, 0, 0], vec![2, 0, 0, 0, 1, 0], vec![0, 0xff, 0xff, 0xff, 0xff]] {
        let (mut client, _command, task) = pipes();
        // It may be cut off before it has said all.
        let _ = client.writer.as_mut().unwrap().write_all(&bytes).await;
        let mut last = None;
        while let Some(frame) = client.next().await {
            last = Some(frame);
        }
        let (kind, payload) = last.unwrap();
        let ServerFrame::Error(body) = ServerFrame::parse(kind, &payload).unwrap() else { panic!("no error") };
        assert_eq!(body.error.code, "bad_frame");
        assert_eq!(end_of(task).await, End::Gone);
    }
}

#[tokio::test]
async fn a_terminal_passes_size_input_and_its_end() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let (exit, exited) = oneshot::channel();
    let (mut client, task) = start(Ends::new(Streams::Pty { master: non_blocking(pty.master) }).unwrap(), exited);
    client.say(ClientFrame::Resize(crate::engine::WindowSize { rows: 33, cols: 111 })).await;
    client.say(ClientFrame::Stdin(b"line\n")).await;
    client.say(ClientFrame::StdinEnd).await;
    let slave = std::fs::File::from(pty.slave);
    let command = tokio::task::spawn_blocking(move || {
        let mut slave = slave;
        let mut text = String::new();
        // In line mode the end-of-file character ends the read.
        slave.read_to_string(&mut text).unwrap();
        let size = sys::tty::window_size(&slave).unwrap();
        slave.write_all(b"bye").unwrap();
        exit.send(Exit::Exited { status: 0 }).unwrap();
        (text, size, slave)
    });
    let (text, size, _slave) = command.await.unwrap();
    assert_eq!((text.as_str(), size), ("line\n", (33, 111)));
    let (out, _, _, exit) = client.collect().await;
    assert!(out.ends_with(b"bye"), "{out:?}");
    assert_eq!(exit, Some(Exit::Exited { status: 0 }));
    assert_eq!(end_of(task).await, End::Exited);
}

#[tokio::test]
async fn an_engine_that_goes_ends_the_session_without_an_exit() {
    let (mut client, command, task) = pipes();
    drop(command.exit);
    assert_eq!(client.collect().await.3, None);
    assert_eq!(end_of(task).await, End::Ending);
}
