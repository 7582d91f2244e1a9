//! Unix sockets: what waits in one, who its peer is, and its settings.
//!
//! ```text
//! read   sock_diag (all at once) --> peer, shutdown        MSG_PEEK --> messages      getsockopt --> settings
//! make   socketpair --> messages of each sent by the other --> shutdown, or the other closed --> settings
//! ```
//! A socket has one description, however many descriptors lead to it. Both ends of a connection are made together, and
//! in the sandbox's network namespace, or they could not be found there at the next checkpoint.
//!
//! Who made a pair is told to its ends (SO_PEERCRED): so it is made by that process, if it lives, and by the engine otherwise.
//!
//! An end whose peer is closed is made with a peer, which is closed again: with something unread if a reset
//! (ECONNRESET) still waits to be told.

mod diag;
mod make;
mod options;
mod queue;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

use libc::pid_t;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockType, UnixAddr, getsockname};
use serde::{Deserialize, Serialize};

use super::error::failed;
use super::own::{Permissions, field};
use super::{ObjectError, ObjectRefusal};
use crate::sys::unix::option;

pub use diag::{Census, in_network_of};
pub use make::{Means, make_sockets, pair};
use options::Options;
use queue::Message;

/// `sk_shutdown` of the kernel.
const RECEIVES_NO_MORE: u8 = 1;
const SENDS_NO_MORE: u8 = 2;

/// A Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    kind: Kind,
    peer: Peer,
    shutdown: u8,
    queue: Vec<Message>,
    options: Options,
    permissions: Permissions,
    named: Option<Named>,
    /// PID inside of the process that made the pair, connected, or listens: whom the peer sees.
    maker: Option<pid_t>,
}

/// What bind(2) and listen(2) did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// As it was bound, or as who accepted it was.
    pub name: Name,
    /// Of a path: where that is in the tree of files. Of one that was accepted: nothing.
    pub place: Option<CString>,
    /// How many connections may wait.
    pub listens: Option<u32>,
}

/// A socket's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Name {
    /// That of a file, absolute or not.
    Path(PathBuf),
    /// One that the network namespace knows.
    Abstract(Vec<u8>),
}

impl Name {
    fn of(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let address: UnixAddr = getsockname(socket.as_raw_fd())?;
        let path = address.path().map(|path| Self::Path(path.to_owned()));
        Ok(path.or_else(|| address.as_abstract().map(|name| Self::Abstract(name.to_vec()))))
    }

    /// As the kernel takes it.
    ///
    /// # Errors
    /// It is longer than names can be.
    pub fn address(&self) -> io::Result<UnixAddr> {
        Ok(match self {
            Self::Path(path) => UnixAddr::new(path)?,
            Self::Abstract(name) => UnixAddr::new_abstract(name)?,
        })
    }
}

/// How a socket sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// SOCK_STREAM.
    Stream,
    /// SOCK_DGRAM.
    Datagram,
    /// SOCK_SEQPACKET.
    Packet,
}

/// The other end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Peer {
    /// It is not connected.
    None,
    /// Which of those that were read together.
    Inside(usize),
    /// It is not accepted yet, by a listener among those that were read together; which one it accepts first.
    Waiting { listener: usize, nth: usize },
    /// It is closed. With a reset that the socket has not been told of.
    Closed { is_reset: bool },
}

impl Kind {
    fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        match number(socket, libc::SO_TYPE)? {
            libc::SOCK_STREAM => Ok(Self::Stream),
            libc::SOCK_DGRAM => Ok(Self::Datagram),
            _ => Ok(Self::Packet),
        }
    }

    /// As socket(2) takes it.
    pub fn of_socket(self) -> SockType {
        match self {
            Self::Stream => SockType::Stream,
            Self::Datagram => SockType::Datagram,
            Self::Packet => SockType::SeqPacket,
        }
    }

    /// As socketpair(2) takes it.
    pub fn number(self) -> i32 {
        self.of_socket() as i32
    }
}

/// Whether it is a Unix socket: others have no record.
///
/// # Errors
/// The kernel's word.
pub fn can_be_read(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(number(socket, libc::SO_DOMAIN)? == libc::AF_UNIX)
}

/// A socket that is to be read.
#[derive(Clone, Debug)]
pub struct Found<'a> {
    /// The engine's copy.
    pub socket: BorrowedFd<'a>,
    /// A process that has it (PID inside).
    pub holder: pid_t,
    /// Its fdinfo.
    pub fdinfo: &'a str,
    /// Where its name is in the tree of files, if it has one there.
    pub place: Option<CString>,
}

/// Reads sockets, all that are inside together; `of` has the fdinfo of each. `inside` tells the PID inside of a host PID.
/// The error's index is that of the socket.
///
/// # Errors
/// What cannot be held, or the kernel's word.
pub fn read_sockets(
    of: &[Found<'_>],
    census: &Census,
    inside: impl Fn(pid_t) -> Option<pid_t>,
) -> Result<Vec<Socket>, (usize, ObjectError)> {
    let mut inodes = Vec::with_capacity(of.len());
    for (at, Found { socket, .. }) in of.iter().enumerate() {
        inodes.push(diag::inode_of(*socket).map_err(failed("look at a socket")).map_err(|error| (at, error))?);
    }
    let read = |at: usize, one: &Found<'_>| read(one, (at, &inodes), census, &inside);
    let read = of.iter().enumerate().map(|(at, one)| read(at, one).map_err(|error| (at, error)));
    let sockets = read.collect::<Result<Vec<_>, _>>()?;
    for (at, one) in sockets.iter().enumerate() {
        if let Peer::Inside(peer) = one.peer
            && one.named.is_some()
            && sockets[peer].named.is_some()
        {
            return Err((at, ObjectRefusal::TwoNames.into()));
        }
    }
    for (at, inode) in inodes.iter().enumerate() {
        check_charge(&sockets, at, census, *inode).map_err(|error| (at, error))?;
    }
    Ok(sockets)
}

fn read(
    Found { socket, holder, fdinfo, place }: &Found<'_>,
    (at, inodes): (usize, &[u32]),
    census: &Census,
    inside: &impl Fn(pid_t) -> Option<pid_t>,
) -> Result<Socket, ObjectError> {
    let socket = *socket;
    let kind = Kind::of(socket).map_err(failed("look at a socket"))?;
    let inode = inodes[at];
    let seen = census.of(inode).ok_or(ObjectRefusal::OtherNetwork)?;
    let name = Name::of(socket).map_err(failed("look at a socket"))?;
    let listens = (number(socket, libc::SO_ACCEPTCONN).map_err(failed("look at a socket"))? != 0).then_some(seen.n_out);
    let n = field(fdinfo, "scm_fds").and_then(|n| n.parse().ok()).unwrap_or(0);
    if n > 0 {
        return Err(ObjectRefusal::OnTheirWay { n }.into());
    }
    if kind == Kind::Stream && queue::has_urgent(socket).map_err(failed("look into a socket"))? {
        return Err(ObjectRefusal::Urgent.into());
    }
    let peer = match seen.peer {
        None => Peer::None,
        Some(0) if census.waiting(inode).is_some() => {
            let waiting = census.waiting(inode).ok_or(ObjectRefusal::NotAccepted)?;
            // What it has sent nobody can look at.
            if seen.n_out > 0 {
                return Err(ObjectRefusal::NotAccepted.into());
            }
            let listener = inodes.iter().position(|inode| *inode == waiting.listener);
            Peer::Waiting { listener: listener.ok_or(ObjectRefusal::PeerOutside)?, nth: waiting.nth }
        }
        Some(0) => Peer::Closed { is_reset: has_error(socket).map_err(failed("look at a socket"))? },
        Some(peer) => {
            let at = inodes.iter().position(|inode| *inode == peer).ok_or(ObjectRefusal::PeerOutside)?;
            if census.of(peer).and_then(|peer| peer.peer) != Some(inode) {
                return Err(ObjectRefusal::OneWay.into());
            }
            Peer::Inside(at)
        }
    };
    let named = match (name, peer) {
        (None, _) => None,
        // Who accepted it may be gone: then it comes back without the name.
        (Some(name), Peer::Inside(_) | Peer::Closed { .. }) if kind != Kind::Datagram => {
            Some(Named { name, place: None, listens: None })
        }
        (Some(_), Peer::Waiting { .. }) => return Err(ObjectRefusal::TwoNames.into()),
        (Some(_), Peer::Inside(_) | Peer::Closed { .. }) => return Err(ObjectRefusal::OneWay.into()),
        (Some(name), Peer::None) => {
            if place.is_none() && matches!(name, Name::Path(_)) {
                return Err(ObjectRefusal::NameGone.into());
            }
            Some(Named { name, place: place.clone(), listens })
        }
    };
    if census.waiting_at(inode).any(|client| !inodes.contains(&client)) {
        return Err(ObjectRefusal::NotAccepted.into());
    }
    let is_shut = seen.shutdown & RECEIVES_NO_MORE != 0;
    let queue = match (peer, kind) {
        // There is no way for anything to have come.
        (Peer::None, Kind::Stream | Kind::Packet) | (Peer::Waiting { .. }, _) => Vec::new(),
        (Peer::None, Kind::Datagram) if waits(socket).map_err(failed("look at a socket"))? => {
            return Err(ObjectRefusal::Datagrams.into());
        }
        _ => queue::look(socket, kind, is_shut, inside).map_err(failed("look into a socket"))?,
    };
    let options = Options::read(socket).map_err(failed("read the settings of a socket"))?;
    let permissions = Permissions::of(socket).map_err(failed("look at a socket"))?;
    let maker = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials);
    let maker = maker.map_err(failed("look at a socket"))?.pid();
    let maker = match peer {
        // Whom the other end will see, only that could tell.
        Peer::Waiting { .. } => Some(*holder),
        _ => Some(maker).filter(|pid| *pid > 0).and_then(inside),
    };
    Ok(Socket { kind, peer, shutdown: seen.shutdown, queue, options, permissions, named, maker })
}

/// Fails if a peer is charged for messages that were not seen.
fn check_charge(sockets: &[Socket], at: usize, census: &Census, inode: u32) -> Result<(), ObjectError> {
    let one = &sockets[at];
    let Peer::Inside(peer) = one.peer else { return Ok(()) };
    let charged = census.of(inode).map_or(0, |seen| seen.n_out);
    let sent = &sockets[peer].queue;
    // A stream has no messages, and its pieces are the sender's affair.
    if one.kind == Kind::Stream || charged == 0 && sent.is_empty() {
        return Ok(());
    }
    if queue::charge(one.kind, sent).map_err(failed("count what waits in a socket"))? == charged {
        return Ok(());
    }
    Err(ObjectRefusal::Unseen.into())
}

impl Socket {
    /// Whether it tells of processes (who made it, who sent what waits in it), or has a name that must be free.
    pub fn waits_for_processes(&self) -> bool {
        self.named.is_some()
            || matches!(self.peer, Peer::Waiting { .. })
            || self.maker.is_some() && self.peer != Peer::None
            || self.queue.iter().any(Message::has_sender)
    }

    /// Whether its name is not one of a file.
    pub fn has_abstract_name(&self) -> bool {
        self.named.as_ref().is_some_and(|named| matches!(named.name, Name::Abstract(_)))
    }
}

/// Whether an error waits to be told.
fn has_error(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(events(socket)?.contains(PollFlags::POLLERR))
}

/// Whether something waits to be read, or to be accepted.
fn waits(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(events(socket)?.contains(PollFlags::POLLIN))
}

fn events(socket: BorrowedFd<'_>) -> io::Result<PollFlags> {
    let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

fn number(socket: BorrowedFd<'_>, name: i32) -> io::Result<i32> {
    let value = option(socket, name)?;
    value.as_slice().try_into().map(i32::from_ne_bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
