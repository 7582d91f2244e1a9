//! Connecting, and starting a daemon when none listens.
//!
//! Clients that find none at the same time take turns at a lock beside the socket: the first starts the
//! daemon, the others then just connect. The started daemon has a session of its own, `/` as its directory, no
//! descriptor of ours but the log, and as standard input the pipe on which it says that it is ready.

use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::AddWatchFlags;
use tokio::net::UnixStream;

use crate::daemon::Place;
use crate::daemon::watch::PathWatch;
use crate::sys;

use super::ClientError;

/// How long a daemon may take to be ready. Chosen: recovery of a full store takes well below that.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// How much of its log is shown when it is not. Chosen: a few lines.
const TAIL: u64 = 2048;

/// A connection to the daemon of this place.
pub(super) async fn connect(place: &Place, autostart: bool) -> Result<UnixStream, ClientError> {
    match UnixStream::connect(&place.socket).await {
        Ok(stream) => Ok(stream),
        Err(source) if autostart && nobody_listens(&source) => {
            let owned = place.clone();
            let started = tokio::task::spawn_blocking(move || start(&owned)).await;
            started.map_err(|error| ClientError::Local { op: "start daemon", source: io::Error::other(error) })??;
            UnixStream::connect(&place.socket).await.map_err(|source| refused(place, source))
        }
        Err(source) => Err(refused(place, source)),
    }
}

/// Tells when a socket file comes (or goes).
pub(super) fn watch_socket(place: &Place) -> io::Result<PathWatch> {
    let dir = place.socket.parent().unwrap_or(Path::new("/"));
    PathWatch::new(dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn refused(place: &Place, source: io::Error) -> ClientError {
    ClientError::Connect { socket: place.socket.clone(), source }
}

/// Returns when a daemon accepts connections. Blocks for at most [`READY_WITHIN`] and a bit.
fn start(place: &Place) -> Result<(), ClientError> {
    let deadline = Instant::now() + READY_WITHIN;
    let _turn = take_turn(place, deadline)?;
    match std::os::unix::net::UnixStream::connect(&place.socket) {
        Ok(_) => return Ok(()),
        Err(source) if !nobody_listens(&source) => return Err(refused(place, source)),
        Err(_) => {}
    }
    make_dir(&place.store)?;
    let log_path = place.store.join("daemon.log");
    let mut log = File::options()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(&log_path)
        .map_err(failed("open", &log_path))?;
    let log_start = log.seek(SeekFrom::End(0)).map_err(failed("seek", &log_path))?;
    let (ready, mut child) = spawn(place, &log)?;
    let Err(how) = wait_ready(ready, &mut child, deadline) else { return Ok(()) };
    // Somebody else's daemon may have won the socket meanwhile; any will do.
    if std::os::unix::net::UnixStream::connect(&place.socket).is_ok() {
        return Ok(());
    }
    Err(ClientError::NotReady { how, tail: tail(&mut log, log_start), log: log_path })
}

/// The right to start a daemon, held until it is ready.
fn take_turn(place: &Place, deadline: Instant) -> Result<Flock<File>, ClientError> {
    if let Some(parent) = place.socket.parent() {
        make_dir(parent)?;
    }
    let mut path = place.socket.clone().into_os_string();
    path.push(".start");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(&path)
        .map_err(failed("open", Path::new(&path)))?;
    // flock(2) has no deadline: a thread waits for the lock, we wait for the thread.
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(Flock::lock(file, FlockArg::LockExclusive)));
    let source = match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(lock)) => return Ok(lock),
        Ok(Err((_, errno))) => errno.into(),
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    Err(failed("lock", Path::new(&path))(source))
}

fn spawn(place: &Place, log: &File) -> Result<(PipeReader, Child), ClientError> {
    let program = Path::new("/proc/self/exe");
    let fail = |op| failed(op, program);
    let (ready, ready_writer) = io::pipe().map_err(fail("pipe for"))?;
    let (stdout, stderr) = (log.try_clone().map_err(fail("log of"))?, log.try_clone().map_err(fail("log of"))?);
    // Whatever our own parent left open must not stay open for the daemon's whole life.
    sys::process::set_all_close_on_exec().map_err(fail("close descriptors of"))?;
    let mut command = Command::new(program);
    command.arg("serve").arg("--ready-fd").arg("0");
    command.arg("--socket").arg(&place.socket).arg("--store").arg(&place.store);
    command.current_dir("/").stdin(ready_writer).stdout(Stdio::from(stdout)).stderr(Stdio::from(stderr));
    sys::process::start_in_new_session(&mut command);
    let child = command.spawn().map_err(fail("start"))?;
    Ok((ready, child))
}

/// Waits for the byte. Without it says what the daemon did instead, and ends one that is still starting.
fn wait_ready(mut ready: PipeReader, child: &mut Child, deadline: Instant) -> Result<(), String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut byte = [0];
    let readable = poll(&mut [PollFd::new(ready.as_fd(), PollFlags::POLLIN)], timeout);
    match readable {
        Ok(0) => {
            // A daemon that is not ready has accepted nothing; it must not take the socket later unasked.
            let ended = child.kill().and_then(|()| child.wait());
            let left = if ended.is_ok() { "and was ended" } else { "and could not be ended" };
            Err(format!("not ready within {} s, {left}", READY_WITHIN.as_secs()))
        }
        Ok(_) if matches!(ready.read(&mut byte), Ok(1)) => Ok(()),
        Ok(_) => match child.wait() {
            Ok(status) => Err(format!("it ended at once ({status})")),
            Err(error) => Err(format!("it ended at once ({error})")),
        },
        Err(errno) => Err(format!("poll: {errno}")),
    }
}

/// The last lines that the daemon wrote since it was started.
fn tail(log: &mut File, log_start: u64) -> String {
    let mut bytes = Vec::new();
    let read = log.seek(SeekFrom::End(0)).and_then(|end| {
        log.seek(SeekFrom::Start(log_start.max(end.saturating_sub(TAIL))))?;
        log.take(TAIL).read_to_end(&mut bytes)
    });
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        Err(_) => String::new(),
    }
}

fn make_dir(path: &Path) -> Result<(), ClientError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("create", path))
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ClientError + use<> {
    let path = path.to_owned();
    move |source| ClientError::Start { op, path, source }
}
