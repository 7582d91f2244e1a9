//! Sockets made again: those that have no peer, pairs, connections through their listeners, those that wait to be accepted.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use libc::pid_t;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, shutdown, socket, socketpair};

use super::{Kind, Named, Peer, RECEIVES_NO_MORE, SENDS_NO_MORE, Socket, options, queue};

/// By what sockets are made.
pub trait Means {
    /// A pair; `maker` is the PID inside of the process that had made it.
    ///
    /// # Errors
    /// The kernel's word.
    fn pair(&mut self, kind: Kind, maker: Option<pid_t>) -> io::Result<(OwnedFd, OwnedFd)>;

    /// A socket with a name; `None`: not now.
    ///
    /// # Errors
    /// The kernel's word.
    fn bind(&mut self, kind: Kind, maker: Option<pid_t>, named: &Named) -> io::Result<Option<OwnedFd>>;

    /// The client's end of a connection to a socket that listens; `maker` is whom the other end shall see.
    ///
    /// # Errors
    /// The kernel's word.
    fn connect(&mut self, kind: Kind, maker: Option<pid_t>, to: (&OwnedFd, &Named)) -> io::Result<OwnedFd>;
}

/// Makes sockets again. `host` tells the host PID of one inside.
///
/// # Errors
/// The kernel's word.
pub fn make_sockets(
    sockets: &[Socket],
    host: impl Fn(pid_t) -> Option<pid_t>,
    means: &mut impl Means,
) -> io::Result<Vec<Option<OwnedFd>>> {
    let mut made: Vec<Option<OwnedFd>> = sockets.iter().map(|_| None).collect();
    for (one, made) in sockets.iter().zip(&mut made).filter(|(one, _)| one.peer == Peer::None) {
        *made = match &one.named {
            Some(named) => means.bind(one.kind, one.maker, named)?,
            None => Some(socket(AddressFamily::Unix, one.kind.of_socket(), SockFlag::SOCK_CLOEXEC, None)?),
        };
        if let Some(made) = made {
            one.shut(made.as_fd())?;
        }
    }
    for (at, one) in sockets.iter().enumerate() {
        match one.peer {
            Peer::Inside(other) if other > at => {
                let theirs = sockets.get(other).ok_or(io::ErrorKind::InvalidData)?;
                let (new, peer) = one.connect(theirs, (sockets, &made), means)?;
                one.fill(peer.as_fd(), &host)?;
                theirs.fill(new.as_fd(), &host)?;
                one.shut(new.as_fd())?;
                theirs.shut(peer.as_fd())?;
                (made[at], made[other]) = (Some(new), Some(peer));
            }
            Peer::Inside(_) | Peer::None | Peer::Waiting { .. } => {}
            Peer::Closed { is_reset } => {
                let (new, peer) = means.pair(one.kind, one.maker)?;
                one.fill(peer.as_fd(), &host)?;
                if is_reset {
                    nix::sys::socket::send(new.as_raw_fd(), &[0], nix::sys::socket::MsgFlags::MSG_DONTWAIT)?;
                }
                drop(peer);
                one.shut(new.as_fd())?;
                made[at] = Some(new);
            }
        }
    }
    connect_waiting(sockets, &mut made, means)?;
    for (one, made) in sockets.iter().zip(&made) {
        if let Some(made) = made {
            one.permissions.set(made.as_fd())?;
            one.options.set(made.as_fd())?;
        }
    }
    Ok(made)
}

/// Connects those again that were not accepted, in the order in which they will be.
fn connect_waiting(sockets: &[Socket], made: &mut [Option<OwnedFd>], means: &mut impl Means) -> io::Result<()> {
    let place = |(at, one): (usize, &Socket)| match one.peer {
        Peer::Waiting { listener, nth } => Some((listener, nth, at)),
        _ => None,
    };
    let mut waiting: Vec<_> = sockets.iter().enumerate().filter_map(place).collect();
    waiting.sort_unstable();
    for (listener, _, at) in waiting {
        let named = sockets.get(listener).and_then(|one| one.named.as_ref());
        if let (Some(Some(to)), Some(named)) = (made.get(listener), named) {
            let client = means.connect(sockets[at].kind, sockets[at].maker, (to, named))?;
            sockets[at].shut(client.as_fd())?;
            made[at] = Some(client);
        }
    }
    Ok(())
}

/// A pair that the engine makes.
///
/// # Errors
/// The kernel's word.
pub fn pair(kind: Kind) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, kind.of_socket(), None, SockFlag::SOCK_CLOEXEC)?)
}

impl Socket {
    /// Both ends, this one's first. One that was accepted has the name of who listened, so it is accepted again.
    fn connect(
        &self,
        theirs: &Self,
        (sockets, made): (&[Self], &[Option<OwnedFd>]),
        means: &mut impl Means,
    ) -> io::Result<(OwnedFd, OwnedFd)> {
        let (accepted, is_ours) = if self.named.is_some() { (self, true) } else { (theirs, false) };
        let listens =
            |one: &&Named| accepted.named.as_ref().is_some_and(|name| one.name == name.name && one.listens.is_some());
        let listener = sockets.iter().zip(made).find_map(|(one, made)| {
            let named = one.named.as_ref().filter(|_| one.kind == self.kind && one.shutdown == 0).filter(listens)?;
            Some((made.as_ref()?, named))
        });
        let Some(listener) = listener else { return means.pair(self.kind, self.maker) };
        let client = means.connect(self.kind, accepted.maker, listener)?;
        // It is there: connect(2) has put it there.
        let (accepted, _) = UnixListener::from(listener.0.try_clone()?).accept()?;
        let accepted = accepted.into();
        Ok(if is_ours { (accepted, client) } else { (client, accepted) })
    }

    fn fill(&self, from: BorrowedFd<'_>, host: impl Fn(pid_t) -> Option<pid_t>) -> io::Result<()> {
        if self.queue.is_empty() {
            return Ok(());
        }
        options::enlarge(from, queue::messages_charge(&self.queue))?;
        queue::send(from, self.kind, &self.queue, host)
    }

    /// A stream's peer is shut with it.
    fn shut(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let how = match self.shutdown & (RECEIVES_NO_MORE | SENDS_NO_MORE) {
            0 => return Ok(()),
            RECEIVES_NO_MORE => Shutdown::Read,
            SENDS_NO_MORE => Shutdown::Write,
            _ => Shutdown::Both,
        };
        Ok(shutdown(socket.as_raw_fd(), how)?)
    }
}
