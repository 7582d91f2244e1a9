//! Why something behind a descriptor was not read, or not made.

use std::io;

use libc::pid_t;

use super::ObjectKind;

/// A failure. Nothing was changed, unless the function says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// It cannot be held.
    #[error(transparent)]
    Refused(#[from] ObjectRefusal),
    /// A step failed.
    #[error("{op}: {source}")]
    Failed {
        /// What was being done, and to what.
        op: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
}

/// What cannot be held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectRefusal {
    /// Nothing of this kind can.
    #[error("process {pid} has descriptor {number}, {}, which cannot be held", kind.word())]
    Kind {
        /// The process.
        pid: pid_t,
        /// The descriptor.
        number: i32,
        /// What it is.
        kind: ObjectKind,
    },
    /// What an epoll instance waits for is no longer where it was added.
    #[error("an epoll instance waits for what was descriptor {number} and is not any more")]
    Target {
        /// The number under which it was added.
        number: i32,
    },
    /// A pidfd of a process outside.
    #[error("a pidfd of process {pid}, which is not in the sandbox")]
    OutsideProcess {
        /// Its host PID.
        pid: pid_t,
    },
    /// A memfd of huge pages.
    #[error("memfd {name}, which is made of huge pages")]
    HugePages {
        /// Its name.
        name: String,
    },
    /// A timer that was cancelled when the clock was set, and nobody has read that yet.
    #[error("a timer that was cancelled when the clock was set, which nobody has read yet")]
    CancelledTimer,
    /// An eventfd that the kernel itself has filled beyond what can be written.
    #[error("an eventfd that is filled beyond what can be written")]
    Overflown,
    /// A terminal with another line discipline than the usual one.
    #[error("terminal {index} has line discipline {discipline}")]
    Discipline {
        /// N of `/dev/pts/N`.
        index: i32,
        /// Its number (`N_*`).
        discipline: i32,
    },
    /// A master in packet mode that has not been told yet what happened to its slave.
    #[error("the master of terminal {index} has a packet-mode status that nobody has read yet")]
    PacketStatus {
        /// N of `/dev/pts/N`.
        index: i32,
    },
    /// Descriptors that were sent wait in a socket.
    #[error("a Unix socket with {n} descriptors on their way")]
    OnTheirWay {
        /// How many.
        n: usize,
    },
    /// A byte sent with MSG_OOB waits in a socket.
    #[error("a Unix socket with an urgent byte (MSG_OOB) that nobody has read yet")]
    Urgent,
    /// A connection waits to be accepted.
    #[error("a Unix socket whose connection nobody has accepted yet")]
    NotAccepted,
    /// The peer of a socket is not in the sandbox, or on its way in a message.
    #[error("a Unix socket whose other end is outside of the sandbox")]
    PeerOutside,
    /// A socket that sends to one that does not send back.
    #[error("a Unix socket that is connected in one direction only")]
    OneWay,
    /// A socket whose path leads to it no more.
    #[error("a Unix socket whose name was removed or leads elsewhere")]
    NameGone,
    /// Both ends of a connection have names.
    #[error("a Unix socket that was bound to a name and then connected")]
    TwoNames,
    /// What waits in a socket that anybody may have sent to.
    #[error("a datagram socket with messages that nobody has read yet")]
    Datagrams,
    /// A socket of another network namespace.
    #[error("a Unix socket of another network namespace")]
    OtherNetwork,
    /// Messages that cannot be looked at without taking them.
    #[error("a Unix socket with empty messages that cannot be looked at twice")]
    Unseen,
    /// A terminal whose name another one has by now.
    #[error("terminal {index} is another one by now")]
    TerminalTaken {
        /// N of `/dev/pts/N`.
        index: i32,
    },
}

impl ObjectRefusal {
    /// Whether it passes by itself, as soon as the programs have run a little.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::CancelledTimer
                | Self::PacketStatus { .. }
                | Self::OnTheirWay { .. }
                | Self::Urgent
                | Self::NotAccepted
                | Self::Unseen
                | Self::Datagrams
        )
    }
}

/// For `map_err`.
pub(super) fn failed<E: Into<io::Error>>(op: &'static str) -> impl FnOnce(E) -> ObjectError {
    move |source| ObjectError::Failed { op, source: source.into() }
}
