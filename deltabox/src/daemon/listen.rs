//! The socket: whose it is, who may connect.
//!
//! Must hold: at most one daemon per socket. The lock `SOCKET.lock` is held for a daemon's whole life, and
//! only its holder replaces or removes the socket file. The file appears by rename, ready to accept, with
//! mode 0600: no client ever sees one that is half made.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon has it.
    #[error("{}: a daemon is already running, pid {pid}", socket.display())]
    AlreadyRunning {
        /// The socket.
        socket: PathBuf,
        /// What its lock file says.
        pid: String,
    },
    /// A file operation failed.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

/// The right to the socket. While this lives no other daemon listens there.
#[derive(Debug)]
pub(super) struct SocketLock {
    socket: PathBuf,
    _lock: Flock<File>,
}

impl SocketLock {
    /// Takes the lock. One held by a daemon that still answers is refused at once; one whose holder does not
    /// answer (it is just ending, or just starting) is waited for.
    pub(super) fn take(socket: &Path, patience: Duration) -> Result<Self, ListenError> {
        make_parent(socket)?;
        let path = with_suffix(socket, ".lock");
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(&path)
        };
        let file = open().map_err(io_error("open", &path))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                if patience.is_zero() || is_served(socket) {
                    return Err(already_running(socket, file));
                }
                lock_within(file, patience).ok_or_else(|| match open() {
                    Ok(file) => already_running(socket, file),
                    Err(source) => ListenError::Io { op: "open", path: path.clone(), source },
                })?
            }
            Err((_, errno)) => return Err(io_error("lock", &path)(errno.into())),
        };
        let mut file: &File = &lock;
        file.set_len(0)
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .map_err(io_error("write", &path))?;
        Ok(Self { socket: socket.to_owned(), _lock: lock })
    }

    /// Listens, in place of whatever socket was there (its daemon is dead: we hold the lock).
    pub(super) fn listen(&self) -> Result<UnixListener, ListenError> {
        let temporary = self.socket.with_file_name(format!(".{}", std::process::id()));
        remove_if_there(&temporary)?;
        let listener = UnixListener::bind(&temporary).map_err(io_error("bind", &self.socket))?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600)).map_err(io_error("chmod", &temporary))?;
        fs::rename(&temporary, &self.socket).map_err(io_error("rename to", &self.socket))?;
        listener.set_nonblocking(true).map_err(io_error("set O_NONBLOCK on", &self.socket))?;
        Ok(listener)
    }

    /// Takes the socket file away, so that the next client starts a daemon instead of meeting a dead one.
    pub(super) fn remove_socket(&self) -> Result<(), ListenError> {
        remove_if_there(&self.socket)
    }
}

/// Whether a connection of this user is served: root, or the user the daemon runs as.
pub(super) fn may_connect(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == 0 || peer_uid == own_uid
}

/// Makes a directory and its missing parents, only for its owner; one that exists stays as it is.
pub(super) fn make_private_dir(path: &Path) -> Result<(), ListenError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create", path))
}

fn make_parent(socket: &Path) -> Result<(), ListenError> {
    match socket.parent() {
        Some(parent) => make_private_dir(parent),
        None => Ok(()),
    }
}

/// Whether the one who listens lives. A child of a daemon that was killed while it made a sandbox has the socket for a
/// moment longer, until it gets to close it.
fn is_served(socket: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(socket) else { return false };
    let Ok(peer) = getsockopt(&stream, PeerCredentials) else { return true };
    let stat = fs::read_to_string(format!("/proc/{}/stat", peer.pid())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// flock(2) has no deadline: a thread waits for the lock, we wait for the thread.
fn lock_within(file: File, patience: Duration) -> Option<Flock<File>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(Flock::lock(file, FlockArg::LockExclusive)));
    receiver.recv_timeout(patience).ok()?.ok()
}

fn already_running(socket: &Path, mut lock: File) -> ListenError {
    let mut pid = String::new();
    // Only for the message: a file that cannot be read gives an unknown pid.
    let read = Read::take(&mut lock, 32).read_to_string(&mut pid);
    let pid = if read.is_ok() && !pid.trim().is_empty() { pid.trim().to_owned() } else { "unknown".to_owned() };
    ListenError::AlreadyRunning { socket: socket.to_owned(), pid }
}

fn remove_if_there(path: &Path) -> Result<(), ListenError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(suffix);
    text.into()
}

fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ListenError {
    let path = path.to_owned();
    move |source| ListenError::Io { op, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_socket_is_private_and_so_is_the_directory_made_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/deltabox.sock");
        let lock = SocketLock::take(&socket, Duration::ZERO).unwrap();
        let _listener = lock.listen().unwrap();
        assert_eq!(mode(socket.parent().unwrap()), 0o700);
        assert_eq!(mode(&socket), 0o600);
        assert_eq!(mode(&with_suffix(&socket, ".lock")), 0o600);
        UnixStream::connect(&socket).unwrap();
        let names = fs::read_dir(socket.parent().unwrap()).unwrap().count();
        assert_eq!(names, 2, "only the socket and its lock are left");
    }

    #[test]
    fn a_socket_whose_listener_has_died_is_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        // The listener's descriptor outlives the process that listened.
        let listener = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::empty(),
            None,
        )
        .unwrap();
        let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
        nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &address).unwrap();
        let program = "import socket; socket.socket(fileno=0).listen()";
        let mut child = std::process::Command::new("/usr/bin/python3");
        let status = child.args(["-c", program]).stdin(listener.try_clone().unwrap()).status().unwrap();
        assert!(status.success());
        UnixStream::connect(&path).unwrap();
        assert!(!is_served(&path));
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(16).unwrap()).unwrap();
        assert!(is_served(&path));
    }

    #[test]
    fn a_second_daemon_is_refused_and_told_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deltabox.sock");
        let lock = SocketLock::take(&socket, Duration::ZERO).unwrap();
        for patience in [Duration::ZERO, SHORT] {
            let error = SocketLock::take(&socket, patience).unwrap_err();
            let text = error.to_string();
            let expected = format!("already running, pid {}", std::process::id());
            assert!(text.contains(&expected), "{text}");
        }
        let _listener = lock.listen().unwrap();
        let before = std::time::Instant::now();
        SocketLock::take(&socket, Duration::from_secs(60)).unwrap_err();
        assert!(before.elapsed() < Duration::from_secs(30), "a daemon that answers was waited for");
    }

    #[test]
    fn a_daemon_that_is_just_ending_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deltabox.sock");
        let first = SocketLock::take(&socket, Duration::ZERO).unwrap();
        let waiting = std::thread::spawn({
            let socket = socket.clone();
            move || SocketLock::take(&socket, Duration::from_secs(30))
        });
        drop(first);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn the_socket_of_a_dead_daemon_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deltabox.sock");
        drop(UnixListener::bind(&socket).unwrap());
        assert_eq!(UnixStream::connect(&socket).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let lock = SocketLock::take(&socket, Duration::ZERO).unwrap();
        let _listener = lock.listen().unwrap();
        UnixStream::connect(&socket).unwrap();
        lock.remove_socket().unwrap();
        assert!(!socket.exists());
    }

    #[test]
    fn a_planted_link_in_place_of_the_lock_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deltabox.sock");
        let target = dir.path().join("target");
        std::os::unix::fs::symlink(&target, with_suffix(&socket, ".lock")).unwrap();
        SocketLock::take(&socket, Duration::ZERO).unwrap_err();
        assert!(!target.exists());
    }

    #[test]
    fn only_root_and_the_daemons_own_user_may_connect() {
        assert!(may_connect(0, 1000) && may_connect(1000, 1000) && may_connect(0, 0));
        assert!(!may_connect(1000, 0) && !may_connect(65_534, 1000));
    }
}
