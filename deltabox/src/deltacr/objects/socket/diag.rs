//! What the kernel tells of all Unix sockets of a network namespace (sock_diag(7)): who is whose peer.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use libc::pid_t;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use nix::sys::stat::Mode;

/// From the kernel (linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;
const SHOW_PEERS_AND_QUEUES: u32 = 0x04 | 0x08 | 0x10;
const ATTRIBUTE_PEER: u16 = 2;
const ATTRIBUTE_WAITING: u16 = 3;
const ATTRIBUTE_QUEUES: u16 = 4;
const ATTRIBUTE_SHUTDOWN: u16 = 6;
/// The kernel sends up to 32 KB at a time if there is room for it.
const ANSWER_BYTES: usize = 32 * 1024;

/// A socket as the kernel tells of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The peer's inode; 0: the peer has none (any more, or not yet).
    pub(super) peer: Option<u32>,
    /// What it may still take of what it has sent, with the kernel's overhead; of one that listens: the backlog.
    pub(super) n_out: u32,
    /// 1: it receives no more; 2: it sends no more.
    pub(super) shutdown: u8,
}

/// A connection that nobody has accepted yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Inode of the listener.
    pub(super) listener: u32,
    /// Which is accepted first.
    pub(super) nth: usize,
    /// Inode of the client; 0: it is closed.
    client: u32,
}

/// All Unix sockets of a network namespace.
#[derive(Debug, Default)]
pub struct Census {
    by_inode: BTreeMap<u32, Seen>,
    /// Connections that nobody has accepted yet. What was made for them has no inode, and is not told.
    waiting: Vec<Waiting>,
}

impl Census {
    /// Those of the namespace of process `pid`.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn take(pid: pid_t) -> io::Result<Self> {
        let socket = in_network_of(pid, || {
            let flags = SockFlag::SOCK_CLOEXEC;
            Ok(socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkSockDiag)?)
        })?;
        Self::ask(&socket)
    }

    fn ask(socket: &OwnedFd) -> io::Result<Self> {
        let mut request = Vec::with_capacity(40);
        request.extend(40_u32.to_ne_bytes());
        request.extend([SOCK_DIAG_BY_FAMILY.to_ne_bytes(), REQUEST_DUMP.to_ne_bytes()].concat());
        request.extend([0; 8]);
        request.extend([u8::try_from(libc::AF_UNIX).unwrap_or(1), 0, 0, 0]);
        for word in [u32::MAX, 0, SHOW_PEERS_AND_QUEUES, u32::MAX, u32::MAX] {
            request.extend(word.to_ne_bytes());
        }
        send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let (mut census, mut answer) = (Self::default(), vec![0; ANSWER_BYTES]);
        loop {
            let n = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let invalid = || io::Error::new(io::ErrorKind::InvalidData, "sock_diag answers something else");
            if census.add(&answer[..n]).ok_or_else(invalid)?? {
                return Ok(census);
            }
        }
    }

    /// Adds what a datagram of the answer tells; `true` at the end.
    fn add(&mut self, mut bytes: &[u8]) -> Option<io::Result<bool>> {
        while !bytes.is_empty() {
            let len = usize::try_from(word(bytes, 0)?).ok()?;
            let (message, kind) = (bytes.get(16..len)?, half(bytes, 4)?);
            match kind {
                NLMSG_DONE => return Some(Ok(true)),
                NLMSG_ERROR => {
                    let code = word(message, 0)?.cast_signed().checked_neg()?;
                    return Some(Err(io::Error::from_raw_os_error(code)));
                }
                _ => self.add_one(message)?,
            }
            bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        Some(Ok(false))
    }

    fn add_one(&mut self, message: &[u8]) -> Option<()> {
        let (inode, mut attributes) = (word(message, 4)?, message.get(16..)?);
        let mut seen = Seen::default();
        while !attributes.is_empty() {
            let len = usize::from(half(attributes, 0)?);
            let value = attributes.get(4..len)?;
            match half(attributes, 2)? {
                ATTRIBUTE_PEER => seen.peer = Some(word(value, 0)?),
                ATTRIBUTE_WAITING => {
                    let clients = (0..value.len() / 4).filter_map(|nth| Some((nth, word(value, nth * 4)?)));
                    self.waiting.extend(clients.map(|(nth, client)| Waiting { listener: inode, nth, client }));
                }
                ATTRIBUTE_QUEUES => seen.n_out = word(value, 4)?,
                ATTRIBUTE_SHUTDOWN => seen.shutdown = *value.first()?,
                _ => {}
            }
            attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        self.by_inode.insert(inode, seen);
        Some(())
    }

    pub(super) fn of(&self, inode: u32) -> Option<Seen> {
        self.by_inode.get(&inode).copied()
    }

    /// Where the connection of a client waits.
    pub(super) fn waiting(&self, client: u32) -> Option<Waiting> {
        self.waiting.iter().copied().find(|one| one.client == client)
    }

    /// Who waits for a listener.
    pub(super) fn waiting_at(&self, listener: u32) -> impl Iterator<Item = u32> {
        self.waiting.iter().filter(move |one| one.listener == listener).map(|one| one.client)
    }
}

/// Runs `work` in the network namespace of process `pid`: what is made there belongs there.
///
/// # Errors
/// Those of `work`, and the kernel's word.
pub fn in_network_of<R>(pid: pid_t, work: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let own = open("/proc/thread-self/ns/net", flags, Mode::empty())?;
    let other = open(format!("/proc/{pid}/ns/net").as_str(), flags, Mode::empty())?;
    setns(&other, CloneFlags::CLONE_NEWNET)?;
    let result = work();
    setns(&own, CloneFlags::CLONE_NEWNET)?;
    result
}

/// Of a link `socket:[N]`.
pub(super) fn inode_of(socket: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(crate::sys::stat::stat(socket)?.ino).map_err(io::Error::other)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn census() -> Census {
        Census::take(nix::unistd::getpid().as_raw()).unwrap()
    }

    #[test]
    fn peers_know_each_other_and_what_is_gone_has_no_inode() {
        let (a, b) = UnixStream::pair().unwrap();
        let (of_a, of_b) = (inode_of(a.as_fd()).unwrap(), inode_of(b.as_fd()).unwrap());
        assert_eq!(census().of(of_a).unwrap().peer, Some(of_b));
        a.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!((census().of(of_a).unwrap().shutdown, census().of(of_b).unwrap().shutdown), (2, 1));
        drop(b);
        let lone = census().of(of_a).unwrap();
        assert_eq!((lone.peer, lone.shutdown), (Some(0), 3));
    }

    #[test]
    fn a_connection_that_nobody_has_accepted_waits() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let client = UnixStream::connect(dir.path().join("s")).unwrap();
        let inode = inode_of(client.as_fd()).unwrap();
        let of_listener = inode_of(listener.as_fd()).unwrap();
        assert_eq!(census().waiting(inode), Some(Waiting { listener: of_listener, nth: 0, client: inode }));
        assert_eq!(census().waiting_at(of_listener).collect::<Vec<_>>(), [inode]);
        let (_accepted, _) = listener.accept().unwrap();
        assert_eq!(census().waiting(inode), None);
    }

    #[test]
    fn an_answer_that_is_cut_is_none() {
        let mut message = vec![1, 1, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend([8, 0, 2, 0, 9, 0, 0, 0, 5, 0, 6, 0, 3, 0, 0, 0]);
        let len = u32::try_from(16 + message.len()).unwrap();
        let mut bytes = [len.to_ne_bytes().to_vec(), vec![20, 0], vec![0; 10], message].concat();
        let mut census = Census::default();
        assert!(!census.add(&bytes).unwrap().unwrap());
        assert_eq!(census.of(7), Some(Seen { peer: Some(9), n_out: 0, shutdown: 3 }));
        for len in 1..bytes.len() {
            assert!(Census::default().add(&bytes[..len]).is_none(), "cut at {len}");
        }
        bytes[4] = 3;
        assert!(census.add(&bytes).unwrap().unwrap());
    }
}
