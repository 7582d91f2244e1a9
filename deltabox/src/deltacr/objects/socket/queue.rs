//! What waits in a Unix socket to be read: looked at without taking it, and sent again.
//!
//! MSG_PEEK alone shows the first message only (of a stream: all that was sent by one sender, if the reader is told who sent).
//! SO_PEEK_OFF makes it go on behind that. It is the socket's own setting: an engine that dies between the two calls
//! that set it (microseconds) leaves a program that peeks itself an offset that it did not ask for; readers see no difference.
//!
//! An empty message that was looked at is passed over by the next look (`skb->peeked`, Linux 6.18). What the sender is
//! charged for tells that there is one: [`charge`].

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use super::Kind;
use crate::sys::notify::n_readable;
use crate::sys::unix::{option, set_option};

/// A message; of a stream: bytes of one sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Message {
    bytes: Vec<u8>,
    /// Told to readers that ask for it (SO_PASSCRED).
    sender: Option<Sender>,
}

/// Who sent a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sender {
    /// Inside; `None`: it has ended, or is outside.
    pid: Option<pid_t>,
    uid: u32,
    gid: u32,
}

impl Message {
    pub(super) fn has_sender(&self) -> bool {
        self.sender.is_some()
    }
}

/// Room for a message (chosen: more than most send; it grows).
const ROOM_BYTES: usize = 16 * 1024;

/// The offset of looks, put back in the end.
struct Offset<'a> {
    socket: BorrowedFd<'a>,
    own: Vec<u8>,
}

impl<'a> Offset<'a> {
    fn of(socket: BorrowedFd<'a>) -> io::Result<Self> {
        Ok(Self { socket, own: option(socket, libc::SO_PEEK_OFF)? })
    }

    fn is_off(&self) -> bool {
        self.own == (-1_i32).to_ne_bytes()
    }

    fn set(&self, offset_bytes: usize) -> io::Result<()> {
        let offset = i32::try_from(offset_bytes).map_err(io::Error::other)?;
        set_option(self.socket, libc::SO_PEEK_OFF, &offset.to_ne_bytes())
    }
}

impl Drop for Offset<'_> {
    fn drop(&mut self) {
        let _ = set_option(self.socket, libc::SO_PEEK_OFF, &self.own);
    }
}

/// All that waits in `socket`; `is_shut`: it will receive no more.
pub(super) fn look(
    socket: BorrowedFd<'_>,
    kind: Kind,
    is_shut: bool,
    inside: impl Fn(pid_t) -> Option<pid_t>,
) -> io::Result<Vec<Message>> {
    // Of datagrams that of the first alone.
    let n_bytes = n_readable(socket)?;
    let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let waits = fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
    if n_bytes == 0 && (kind == Kind::Stream || is_shut || !waits) {
        return Ok(Vec::new());
    }
    let tells_senders = option(socket, libc::SO_PASSCRED)? != [0; 4];
    let offset = Offset::of(socket)?;
    let mut room = vec![0; n_bytes.max(ROOM_BYTES)];
    if kind == Kind::Stream && !tells_senders && offset.is_off() {
        // Dropped, it would set what nobody has changed.
        std::mem::forget(offset);
        let (n, _) = peek(socket, &mut room, MsgFlags::empty(), false)?;
        room.truncate(n);
        return complete(vec![Message { bytes: room, sender: None }], n_bytes);
    }
    offset.set(0)?;
    let length = if kind == Kind::Stream { MsgFlags::empty() } else { MsgFlags::MSG_TRUNC };
    let (mut messages, mut total): (Vec<Message>, usize) = (Vec::new(), 0);
    while kind == Kind::Datagram || !is_shut && kind == Kind::Packet || total < n_bytes {
        let (n, sender) = match peek(socket, &mut room, length, tells_senders) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            peeked => peeked?,
        };
        if n > room.len() {
            room.resize(n, 0);
            offset.set(total)?;
            continue;
        }
        if n == 0 && kind == Kind::Stream {
            break;
        }
        total += n;
        let sender = sender.map(|told| Sender {
            pid: Some(told.pid()).filter(|pid| *pid != 0).and_then(&inside),
            uid: told.uid(),
            gid: told.gid(),
        });
        match messages.last_mut() {
            Some(last) if kind == Kind::Stream && last.sender == sender => last.bytes.extend(&room[..n]),
            _ => messages.push(Message { bytes: room[..n].to_vec(), sender }),
        }
    }
    drop(offset);
    match kind {
        Kind::Datagram => Ok(messages),
        Kind::Stream | Kind::Packet => complete(messages, n_bytes),
    }
}

fn complete(messages: Vec<Message>, n_bytes: usize) -> io::Result<Vec<Message>> {
    if n_bytes_of(&messages) == n_bytes {
        return Ok(messages);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "not all that waits there can be looked at"))
}

fn peek(
    socket: BorrowedFd<'_>,
    room: &mut [u8],
    flags: MsgFlags,
    tells_senders: bool,
) -> io::Result<(usize, Option<UnixCredentials>)> {
    let flags = flags | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    // There is room for the sender alone: a pidfd (SO_PASSPIDFD) would be the engine's to close.
    let mut control = nix::cmsg_space!(UnixCredentials);
    let mut parts = [IoSliceMut::new(room)];
    let control = tells_senders.then_some(control.as_mut_slice());
    let got = recvmsg::<()>(socket.as_raw_fd(), &mut parts, control, flags)?;
    let sender = got.cmsgs().ok().and_then(|mut all| {
        all.find_map(|one| if let ControlMessageOwned::ScmCredentials(told) = one { Some(told) } else { None })
    });
    Ok((got.bytes, sender))
}

/// Whether an urgent byte (MSG_OOB) is among what waits.
pub(super) fn has_urgent(socket: BorrowedFd<'_>) -> io::Result<bool> {
    match peek(socket, &mut [0], MsgFlags::MSG_OOB, false) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAGAIN)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sends messages through `from`, as their senders: `host` tells the host PID of one inside.
pub(super) fn send(
    from: BorrowedFd<'_>,
    kind: Kind,
    messages: &[Message],
    host: impl Fn(pid_t) -> Option<pid_t>,
) -> io::Result<()> {
    for Message { bytes, sender } in messages {
        let told = sender.map(|Sender { pid, uid, gid }| {
            let pid = pid.and_then(&host).unwrap_or_else(|| nix::unistd::getpid().as_raw());
            UnixCredentials::from(libc::ucred { pid, uid, gid })
        });
        let control: Vec<_> = told.iter().map(ControlMessage::ScmCredentials).collect();
        let (mut sent, flags) = (0, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        loop {
            let n = sendmsg::<()>(from.as_raw_fd(), &[IoSlice::new(&bytes[sent..])], &control, flags, None)?;
            sent += n;
            if sent == bytes.len() {
                break;
            }
            if n == 0 || kind != Kind::Stream {
                return Err(Errno::EMSGSIZE.into());
            }
        }
    }
    Ok(())
}

/// What a sender is charged for these messages.
pub(super) fn charge(kind: Kind, messages: &[Message]) -> io::Result<u32> {
    let (from, to) = super::pair(kind)?;
    super::options::enlarge(from.as_fd(), messages_charge(messages))?;
    let plain = |message: &Message| Message { bytes: message.bytes.clone(), sender: None };
    send(from.as_fd(), kind, &messages.iter().map(plain).collect::<Vec<_>>(), |_| None)?;
    let charge = crate::sys::notify::n_unsent(from.as_fd())?;
    drop(to);
    u32::try_from(charge).map_err(io::Error::other)
}

/// Room that these messages surely do not need more than.
pub(super) fn messages_charge(messages: &[Message]) -> usize {
    // Chosen: the kernel rounds a message up to pages and adds some hundred bytes.
    messages.iter().map(|message| message.bytes.len() * 2 + 16 * 1024).sum()
}

fn n_bytes_of(messages: &[Message]) -> usize {
    messages.iter().map(|message| message.bytes.len()).sum()
}
