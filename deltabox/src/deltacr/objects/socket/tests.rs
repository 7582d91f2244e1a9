use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, shutdown, socket};

use super::*;

/// Without processes.
struct Engine;

impl Means for Engine {
    fn pair(&mut self, kind: Kind, _: Option<pid_t>) -> io::Result<(OwnedFd, OwnedFd)> {
        pair(kind)
    }

    fn bind(&mut self, _: Kind, _: Option<pid_t>, _: &Named) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    fn connect(&mut self, _: Kind, _: Option<pid_t>, _: (&OwnedFd, &Named)) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NotConnected.into())
    }
}

fn read_again(ends: &[&OwnedFd]) -> Result<Vec<Socket>, ObjectError> {
    let infos: Vec<String> = ends.iter().map(|end| crate::deltacr::objects::own_fdinfo(end.as_fd()).unwrap()).collect();
    let found = ends.iter().zip(&infos);
    let of: Vec<_> =
        found.map(|(end, fdinfo)| Found { socket: end.as_fd(), holder: 17, fdinfo, place: None }).collect();
    let own = nix::unistd::getpid().as_raw();
    read_sockets(&of, &Census::take(own).unwrap(), |pid| (pid == own).then_some(17)).map_err(|(_, error)| error)
}

fn again(ends: &[&OwnedFd]) -> Vec<OwnedFd> {
    let sockets = read_again(ends).unwrap();
    // A look changes nothing.
    assert_eq!(read_again(ends).unwrap(), sockets);
    let own = nix::unistd::getpid().as_raw();
    let made = make_sockets(&sockets, |pid| (pid == 17).then_some(own), &mut Engine).unwrap();
    let made: Vec<OwnedFd> = made.into_iter().flatten().collect();
    assert_eq!(read_again(&made.iter().collect::<Vec<_>>()).unwrap(), sockets);
    made
}

fn streams() -> (OwnedFd, OwnedFd) {
    pair(Kind::Stream).unwrap()
}

fn write(end: &OwnedFd, bytes: &[u8]) {
    UnixStream::from(end.try_clone().unwrap()).write_all(bytes).unwrap();
}

fn rest(end: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    UnixStream::from(end).read_to_end(&mut bytes).unwrap();
    bytes
}

fn next(end: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 300_000];
    let socket = UnixDatagram::from(end.try_clone().unwrap());
    socket.set_nonblocking(true).unwrap();
    let n = socket.recv(&mut bytes)?;
    Ok(bytes[..n].to_vec())
}

#[test]
fn a_stream_has_the_same_bytes_in_both_directions_again() {
    let (a, b) = streams();
    write(&a, b"to b");
    write(&b, &[7; 100_000]);
    let mut made = again(&[&a, &b]);
    let (new_b, new_a) = (made.pop().unwrap(), made.pop().unwrap());
    for (a, b) in [(new_a, new_b), (a, b)] {
        let mut bytes = vec![0; 100_000];
        UnixStream::from(a).read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, vec![7; 100_000]);
        assert_eq!(rest(b), b"to b");
    }
}

#[test]
fn a_stream_that_is_full_is_full_again() {
    let (a, b) = streams();
    nix::fcntl::fcntl(&a, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&a, b"abc").is_ok() {}
    let made = again(&[&a, &b]);
    drop(a);
    let wanted = rest(b);
    let mut made = made.into_iter();
    drop(made.next());
    assert_eq!(rest(made.next().unwrap()), wanted);
}

#[test]
fn messages_end_where_they_did() {
    for kind in [Kind::Datagram, Kind::Packet] {
        let (a, b) = pair(kind).unwrap();
        let messages: [&[u8]; 4] = [b"one", &[2; 40_000], b"", b"four"];
        for message in messages {
            nix::unistd::write(&a, message).unwrap();
        }
        // Empty ones can be looked at once.
        let sockets = read_again(&[&a, &b]).unwrap();
        let refused = read_again(&[&a, &b]);
        assert!(matches!(refused, Err(ObjectError::Refused(ObjectRefusal::Unseen))), "{refused:?}");
        let made = make_sockets(&sockets, |_| None, &mut Engine).unwrap();
        let made: Vec<OwnedFd> = made.into_iter().flatten().collect();
        for end in [&b, &made[1]] {
            for message in messages {
                assert_eq!(next(end).unwrap(), message, "{kind:?}");
            }
            assert_eq!(next(end).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }
}

#[test]
fn what_is_shut_is_shut_again() {
    let (a, b) = streams();
    write(&a, b"last");
    shutdown(a.as_raw_fd(), Shutdown::Write).unwrap();
    let mut made = again(&[&a, &b]).into_iter();
    let (a, b) = (made.next().unwrap(), made.next().unwrap());
    assert_eq!(nix::unistd::write(&b, b"x"), Ok(1));
    assert_eq!(rest(b), b"last");
    assert!(nix::sys::socket::send(a.as_raw_fd(), b"x", nix::sys::socket::MsgFlags::MSG_NOSIGNAL).is_err());
}

#[test]
fn an_end_whose_peer_is_closed_is_one_again() {
    for kind in [Kind::Stream, Kind::Packet] {
        let (a, b) = pair(kind).unwrap();
        nix::unistd::write(&b, b"bye").unwrap();
        drop(b);
        let a = again(&[&a]).pop().unwrap();
        let mut bytes = [0; 10];
        assert_eq!(nix::unistd::read(&a, &mut bytes), Ok(3));
        assert_eq!(nix::unistd::read(&a, &mut bytes), Ok(0));
    }
}

#[test]
fn a_reset_that_nobody_was_told_of_is_told() {
    let (a, b) = streams();
    write(&a, b"never read");
    drop(b);
    let made = again(&[&a]).pop().unwrap();
    for end in [a, made] {
        assert_eq!(nix::unistd::read(&end, &mut [0; 10]), Err(nix::errno::Errno::ECONNRESET));
        assert_eq!(nix::unistd::read(&end, &mut [0; 10]), Ok(0));
    }
}

#[test]
fn a_socket_that_was_never_connected_is_one_again() {
    for kind in [Kind::Stream, Kind::Datagram, Kind::Packet] {
        let end = socket(AddressFamily::Unix, kind.of_socket(), SockFlag::SOCK_CLOEXEC, None).unwrap();
        assert_eq!(Kind::of(again(&[&end])[0].as_fd()).unwrap(), kind);
    }
}

#[test]
fn settings_come_back() {
    let (a, b) = streams();
    let set = |name, value: &[u8]| crate::sys::unix::set_option(a.as_fd(), name, value).unwrap();
    set(libc::SO_SNDBUF, &50_000_i32.to_ne_bytes());
    set(libc::SO_RCVTIMEO, &[1_i64.to_ne_bytes(), 500_000_i64.to_ne_bytes()].concat());
    set(libc::SO_PASSCRED, &1_i32.to_ne_bytes());
    set(libc::SO_PEEK_OFF, &2_i32.to_ne_bytes());
    write(&b, b"012345");
    let made = again(&[&a, &b]);
    let tell = |name| option(made[0].as_fd(), name).unwrap();
    assert_eq!(tell(libc::SO_SNDBUF), 100_000_i32.to_ne_bytes());
    assert_eq!(tell(libc::SO_PEEK_OFF), 2_i32.to_ne_bytes());
    // The sender's number is not the engine's by chance: the record has it.
    let UnixSender { pid, .. } = sender(made[0].as_fd());
    assert_eq!(pid, nix::unistd::getpid().as_raw());
}

struct UnixSender {
    pid: pid_t,
}

fn sender(socket: BorrowedFd<'_>) -> UnixSender {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
    let mut control = nix::cmsg_space!(UnixCredentials);
    let (mut bytes, fd) = ([0; 10], socket.as_raw_fd());
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let got = recvmsg::<()>(fd, &mut parts, Some(&mut control), MsgFlags::empty()).unwrap();
    match got.cmsgs().unwrap().next() {
        Some(ControlMessageOwned::ScmCredentials(told)) => UnixSender { pid: told.pid() },
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_held_is_named() {
    let (a, b) = streams();
    let refused = |ends: &[&OwnedFd]| match read_again(ends) {
        Err(ObjectError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&[&a]), ObjectRefusal::PeerOutside);
    crate::sys::socket::send_with_fds(a.as_fd(), b"x", &[a.as_fd()]).unwrap();
    assert_eq!(refused(&[&a, &b]), ObjectRefusal::OnTheirWay { n: 1 });
    let (a, b) = streams();
    nix::sys::socket::send(a.as_raw_fd(), b"!", nix::sys::socket::MsgFlags::MSG_OOB).unwrap();
    assert_eq!(refused(&[&a, &b]), ObjectRefusal::Urgent);
}
