//! What went wrong between the command line and the daemon.

use std::io;
use std::path::PathBuf;

use crate::daemon::types::ErrorDetail;

/// A call that was not answered as hoped.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection to the daemon.
    #[error("connect {}: {}", socket.display(), word(source))]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A daemon could not even be started.
    #[error("start daemon: {op} {}: {}", path.display(), word(source))]
    Start {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A daemon was started and did not become ready.
    #[error("start daemon: {how}{}", if tail.is_empty() { String::new() } else { format!(": {tail}") })]
    NotReady {
        /// What it did instead.
        how: String,
        /// The last it logged.
        tail: String,
        /// Where the rest is.
        log: PathBuf,
    },
    /// The connection broke before the answer.
    #[error("connection to the daemon at {} broke: {source}", socket.display())]
    Lost {
        /// The socket.
        socket: PathBuf,
        /// What hyper or the kernel says.
        source: io::Error,
    },
    /// A session broke and could not be taken up again.
    #[error("connection to command {pid} in `{sandbox}` broke and could not be made again: {why}")]
    SessionLost {
        /// The sandbox.
        sandbox: String,
        /// PID inside.
        pid: u32,
        /// What the last attempt met.
        why: Box<ClientError>,
    },
    /// The daemon is of another version.
    #[error("the daemon (pid {pid}) is deltabox {version} with interface {api}")]
    OtherVersion {
        /// Its PID.
        pid: u32,
        /// Its version.
        version: String,
        /// Its interface.
        api: u32,
    },
    /// Bytes that are no answer.
    #[error("the daemon's answer makes no sense: {what}")]
    Nonsense {
        /// Why not.
        what: String,
    },
    /// The daemon says no.
    #[error("{}", error.message)]
    Answer {
        /// HTTP status.
        status: u16,
        /// Its words.
        error: ErrorDetail,
    },
    /// Something on our own side: output, terminal, signals.
    #[error("{op}: {}", word(source))]
    Local {
        /// What was being done.
        op: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
}

impl ClientError {
    /// What the program exits with: 2 a request that makes no sense, 3 refused, 125 engine unreachable, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Answer { status: 422, .. } => 3,
            Self::Answer { error, .. } if error.code == "invalid" => 2,
            Self::Answer { .. } | Self::Local { .. } => 1,
            Self::Connect { .. }
            | Self::Start { .. }
            | Self::NotReady { .. }
            | Self::Lost { .. }
            | Self::SessionLost { .. }
            | Self::OtherVersion { .. }
            | Self::Nonsense { .. } => 125,
        }
    }

    /// Code, message and hint, as the command line prints them.
    pub fn detail(&self) -> ErrorDetail {
        let (code, hint) = match self {
            Self::Answer { error, .. } => return error.clone(),
            Self::Connect { source, .. } => ("unreachable", unreachable_hint(source)),
            Self::Start { source, .. } => ("unreachable", unreachable_hint(source)),
            Self::NotReady { log, .. } => ("unreachable", format!("all it said is in {}", log.display())),
            Self::Lost { .. } => ("unreachable", "the daemon may have ended; try again".to_owned()),
            Self::SessionLost { sandbox, pid, .. } => {
                ("unreachable", format!("if it still runs, `deltabox attach {sandbox} {pid}` takes it up again"))
            }
            Self::OtherVersion { pid, .. } => (
                "other_version",
                format!(
                    "this program is {}; `kill {pid}` ends that daemon (sandboxes live on) and the next command starts one of this version",
                    env!("CARGO_PKG_VERSION")
                ),
            ),
            Self::Nonsense { .. } => ("unreachable", "is something else listening on this socket?".to_owned()),
            Self::Local { .. } => ("local", "check standard input and output".to_owned()),
        };
        ErrorDetail { code: code.to_owned(), message: self.to_string(), hint }
    }

    /// Whether our standard output has no reader any more.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Local { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn unreachable_hint(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "run as root".to_owned(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "no daemon listens there: start `deltabox serve`, or unset DELTABOX_NO_AUTOSTART".to_owned()
        }
        _ => "check --socket and --store (DELTABOX_SOCKET, DELTABOX_STORE)".to_owned(),
    }
}

/// The kernel's word without the number that std appends.
fn word(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        io::ErrorKind::NotFound => "no such file or directory".to_owned(),
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16) -> ClientError {
        let error = ErrorDetail { code: "c".into(), message: "m".into(), hint: "h".into() };
        ClientError::Answer { status, error }
    }

    #[test]
    fn a_refusal_exits_3_an_unreachable_daemon_125_and_the_rest_1() {
        let socket = || PathBuf::from("/run/deltabox/deltabox.sock");
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(answer(422).exit_code(), 3);
        for status in [400, 403, 404, 409, 500] {
            assert_eq!(answer(status).exit_code(), 1);
        }
        assert_eq!(ClientError::Connect { socket: socket(), source: denied() }.exit_code(), 125);
        assert_eq!(ClientError::Lost { socket: socket(), source: denied() }.exit_code(), 125);
        assert_eq!(ClientError::Local { op: "write output", source: denied() }.exit_code(), 1);
    }

    #[test]
    fn a_user_without_the_right_is_told_where_why_and_what_to_do() {
        let source = io::Error::from_raw_os_error(libc::EACCES);
        let detail = ClientError::Connect { socket: "/run/deltabox/deltabox.sock".into(), source }.detail();
        assert_eq!(detail.message, "connect /run/deltabox/deltabox.sock: permission denied");
        assert_eq!(detail.hint, "run as root");
        let source = io::Error::from_raw_os_error(libc::EACCES);
        let detail = ClientError::Start { op: "create", path: "/var/lib/deltabox".into(), source }.detail();
        assert_eq!(detail.message, "start daemon: create /var/lib/deltabox: permission denied");
        assert_eq!(detail.hint, "run as root");
    }

    #[test]
    fn the_daemons_own_words_are_passed_on() {
        assert_eq!(answer(404).detail(), ErrorDetail { code: "c".into(), message: "m".into(), hint: "h".into() });
    }
}
