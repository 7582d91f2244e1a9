//! Unix sockets: read all together, because each tells who its peer is, and made all together.
//!
//! ```text
//! Held::open          all without names are made by the engine: it can be done, and nothing has changed yet
//! make_late_sockets   with the processes there: each by the process that its peer shall see; names are bound, then
//!                     connections are made through them and accepted by the engine
//! ```
//! A name that is no file's is free only when nobody has the socket that had it last. So the processes close all sockets
//! that they have first; what they shall have they are given after that.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use libc::pid_t;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, UnixAddr, bind, connect, getsockname, listen, socket};

use super::open::file_error;
use super::read::Raw;
use super::{DescriptorError, Held, Opened, What};
use crate::deltacr::HandoverError;
use crate::deltacr::handover::{call, check, number, unsigned};
use crate::deltacr::objects::ObjectKind;
use crate::deltacr::objects::socket::{
    Census, Found, Kind, Means, Name, Named, Socket, can_be_read, in_network_of, make_sockets, pair, read_sockets,
};
use crate::deltacr::place::Place;
use crate::deltacr::rebase::listener::{bind_again, directory, find_name};
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::pid_inside;
use crate::sandbox::root::{Door, Root};
use crate::sys::process::{pidfd_getfd, pidfd_open};
use crate::sys::unix::name_of;

/// Reads the Unix sockets among `raw`; which is which.
pub(super) fn read(
    root: &Root,
    raw: &[Raw],
    init: pid_t,
    held: &mut Held,
) -> Result<BTreeMap<usize, usize>, DescriptorError> {
    let (mut at, mut found) = (Vec::new(), Vec::new());
    for (nth, one) in raw.iter().enumerate().filter(|(_, one)| one.kind == ObjectKind::Socket) {
        let failed = |source| DescriptorError::Process { op: "look at a socket", pid: one.pid, source };
        let socket = one.copy.as_fd();
        if can_be_read(socket).map_err(failed)? {
            let place = place_of(socket, root).map_err(failed)?;
            at.push(nth);
            let holder = one.holders.first().map_or(0, |(_, _, inside)| *inside);
            found.push(Found { socket, holder, fdinfo: &one.text, place });
        }
    }
    if found.is_empty() {
        return Ok(BTreeMap::new());
    }
    let failed = |source| DescriptorError::Process { op: "list the sockets", pid: init, source };
    let census = Census::take(init).map_err(failed)?;
    let read = read_sockets(&found, &census, |host| pid_inside(host).ok());
    held.sockets = read.map_err(|(nth, source)| {
        let one = &raw[at[nth]];
        DescriptorError::Object { pid: one.pid, number: one.number, source }
    })?;
    Ok(at.into_iter().enumerate().map(|(socket, at)| (at, socket)).collect())
}

/// Where the name of a socket is, if its address still leads there.
fn place_of(socket: BorrowedFd<'_>, root: &Root) -> io::Result<Option<CString>> {
    let Some(name) = name_of(socket)? else { return Ok(None) };
    let link = CString::new(format!("/proc/thread-self/fd/{}", name.as_raw_fd()))?;
    let Some(place) = Place::behind(root, name.as_fd(), &link)? else { return Ok(None) };
    let address: UnixAddr = getsockname(socket.as_raw_fd())?;
    let leads = !place.unlinked && directory(&address, &place.path).is_some();
    Ok(leads.then_some(place.path))
}

/// Makes those without names, in the sandbox's network; `to` is the root that they will be on.
pub(super) fn make(sockets: &[Socket], to: &Root, init: pid_t) -> Result<Vec<Option<OwnedFd>>, DescriptorError> {
    if sockets.is_empty() {
        return Ok(Vec::new());
    }
    let made = in_network_of(init, || make_sockets(sockets, |_| None, &mut Ahead { to }));
    made.map_err(file_error("make", c"a Unix socket"))
}

/// Before anything has changed.
struct Ahead<'a> {
    to: &'a Root,
}

impl Means for Ahead<'_> {
    fn pair(&mut self, kind: Kind, _: Option<pid_t>) -> io::Result<(OwnedFd, OwnedFd)> {
        pair(kind)
    }

    fn bind(&mut self, _: Kind, _: Option<pid_t>, named: &Named) -> io::Result<Option<OwnedFd>> {
        if let Some(place) = &named.place {
            find_name(place, self.to)?.ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(None)
    }

    fn connect(&mut self, _: Kind, _: Option<pid_t>, _: (&OwnedFd, &Named)) -> io::Result<OwnedFd> {
        // Nobody listens yet.
        Err(io::ErrorKind::NotConnected.into())
    }
}

impl Opened<'_> {
    /// Makes those again that tell of processes, now that these are there, and those with names. `host` tells the host PID of
    /// one by that inside; `to` is the root that they are on.
    ///
    /// # Errors
    /// The processes are not what they should be.
    pub(in crate::deltacr) fn make_late_sockets(
        &mut self,
        stopped: &mut Stopped,
        host: impl Fn(pid_t) -> Option<pid_t>,
        to: &Root,
    ) -> Result<(), DescriptorError> {
        if !self.held.sockets.iter().any(Socket::waits_for_processes) {
            return Ok(());
        }
        if self.held.sockets.iter().any(Socket::has_abstract_name) {
            for pid in self.held.seats.keys().filter_map(|inside| host(*inside)) {
                close_sockets(stopped, pid)?;
            }
        }
        let failed = file_error("make", c"a Unix socket");
        let door = Door::of(self.init).map_err(&failed)?;
        let mut workshop = Workshop { stopped, host: &host, to, door };
        let made = in_network_of(self.init, || make_sockets(&self.held.sockets, &host, &mut workshop));
        let mut made = made.map_err(&failed)?;
        for (description, opened) in self.held.descriptions.iter().zip(&mut self.descriptions) {
            let What::Socket { socket } = description.what else { continue };
            let new = made.get_mut(socket).and_then(Option::take);
            if let (Some(new), Some(settings)) = (&new, &description.settings) {
                settings.set(new.as_fd()).map_err(file_error("set the flags of", c"a Unix socket"))?;
            }
            *opened = new;
        }
        Ok(())
    }
}

/// Has a process close all sockets that it has.
fn close_sockets(stopped: &mut Stopped, pid: pid_t) -> Result<(), DescriptorError> {
    let failed = |source| DescriptorError::Process { op: "list the descriptors", pid, source };
    let mut calls = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_socket =
            std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str().as_bytes().starts_with(b"socket:["));
        if let (true, Some(fd)) = (is_socket, entry.file_name().to_str().and_then(|name| name.parse().ok())) {
            calls.push(call(libc::SYS_close, &[number(fd)]));
        }
    }
    if calls.is_empty() {
        return Ok(());
    }
    let mut hand = stopped.hand(pid).map_err(HandoverError::from)?;
    hand.run(&calls).map_err(HandoverError::from)?;
    Ok(hand.close().map_err(HandoverError::from)?)
}

/// Where the processes make them; the engine does it for those that are gone, or cannot, and the peer is told that.
struct Workshop<'a, H> {
    stopped: &'a mut Stopped,
    host: H,
    to: &'a Root,
    door: Door,
}

impl<H: Fn(pid_t) -> Option<pid_t>> Means for Workshop<'_, H> {
    fn pair(&mut self, kind: Kind, maker: Option<pid_t>) -> io::Result<(OwnedFd, OwnedFd)> {
        let made = maker.and_then(&self.host).and_then(|pid| make_pair_in(self.stopped, pid, kind).ok());
        made.map_or_else(|| pair(kind), Ok)
    }

    fn bind(&mut self, kind: Kind, maker: Option<pid_t>, named: &Named) -> io::Result<Option<OwnedFd>> {
        let pid = maker.and_then(&self.host);
        let made = pid.and_then(|pid| Some((pid, make_in(self.stopped, pid, kind).ok()?)));
        let (new, process) = match made {
            Some((pid, (number, new))) => (new, Some((pid, number))),
            None => (socket(AddressFamily::Unix, kind.of_socket(), SockFlag::SOCK_CLOEXEC, None)?, None),
        };
        let address = named.name.address()?;
        match &named.place {
            Some(place) => {
                let at = find_name(place, self.to)?.ok_or(io::ErrorKind::NotFound)?;
                bind_again(&new, &address, place, &at, |work| self.door.visit(work))?;
            }
            None => bind(new.as_raw_fd(), &address)?,
        }
        if let Some(backlog) = named.listens {
            let by_process = process.is_some_and(|(pid, number)| {
                call_in(self.stopped, pid, libc::SYS_listen, &[number, backlog.into()]).is_ok()
            });
            if !by_process {
                let backlog = i32::try_from(backlog).unwrap_or(libc::SOMAXCONN).min(libc::SOMAXCONN);
                listen(&new, Backlog::new(backlog)?)?;
            }
        }
        if let Some((pid, number)) = process {
            call_in(self.stopped, pid, libc::SYS_close, &[number]).map_err(io::Error::other)?;
        }
        Ok(Some(new))
    }

    fn connect(&mut self, kind: Kind, maker: Option<pid_t>, (_, named): (&OwnedFd, &Named)) -> io::Result<OwnedFd> {
        // From the root: working directories are not yet what they were.
        let address = match &named.place {
            Some(place) => UnixAddr::new(place.as_c_str())?,
            None => named.name.address()?,
        };
        let pid = maker.and_then(&self.host);
        let client = match pid.and_then(|pid| Some((pid, make_in(self.stopped, pid, kind).ok()?))) {
            Some((pid, (number, new))) => {
                let connected = connect_in(self.stopped, pid, number, named);
                call_in(self.stopped, pid, libc::SYS_close, &[number]).map_err(io::Error::other)?;
                connected.is_ok().then_some(new)
            }
            None => None,
        };
        let client = match client {
            Some(client) => client,
            // It is gone, or may not connect (any more).
            None => {
                let new = socket(AddressFamily::Unix, kind.of_socket(), SockFlag::SOCK_CLOEXEC, None)?;
                self.door.visit(|| Ok(connect(new.as_raw_fd(), &address)?))?;
                new
            }
        };
        Ok(client)
    }
}

/// A pair that a process makes; it keeps no descriptor of it.
fn make_pair_in(stopped: &mut Stopped, pid: pid_t, kind: Kind) -> Result<(OwnedFd, OwnedFd), HandoverError> {
    let failed = |source| HandoverError::Process { op: "copy a descriptor", pid, source };
    let mut hand = stopped.hand(pid)?;
    let (at, mut bytes) = (hand.scratch().start, [0; 8]);
    let flags = unsigned(kind.number() | libc::SOCK_CLOEXEC);
    let make = call(libc::SYS_socketpair, &[unsigned(libc::AF_UNIX), flags, 0, at]);
    let made = hand.run_with(&[make], (at, &[]), (at, &mut bytes))?;
    check(pid, "socketpair", made[0])?;
    let numbers = [0, 4].map(|at| bytes[at..at + 4].try_into().map_or(-1, i32::from_ne_bytes));
    let pidfd = pidfd_open(pid).map_err(failed)?;
    let copies = numbers.map(|number| pidfd_getfd(pidfd.as_fd(), number));
    hand.run(&numbers.map(|end| call(libc::SYS_close, &[number(end)])))?;
    hand.close()?;
    let [one, other] = copies;
    Ok((one.map_err(failed)?, other.map_err(failed)?))
}

/// A socket that a process makes: its number there, and the engine's copy.
fn make_in(stopped: &mut Stopped, pid: pid_t, kind: Kind) -> Result<(u64, OwnedFd), HandoverError> {
    let failed = |source| HandoverError::Process { op: "copy a descriptor", pid, source };
    let flags = unsigned(kind.number() | libc::SOCK_CLOEXEC);
    let made = call_in(stopped, pid, libc::SYS_socket, &[unsigned(libc::AF_UNIX), flags, 0])?;
    let pidfd = pidfd_open(pid).map_err(failed)?;
    let copy = pidfd_getfd(pidfd.as_fd(), i32::try_from(made).unwrap_or(-1)).map_err(failed)?;
    Ok((made.cast_unsigned(), copy))
}

fn connect_in(stopped: &mut Stopped, pid: pid_t, number: u64, to: &Named) -> Result<(), HandoverError> {
    let family = u16::try_from(libc::AF_UNIX).unwrap_or(1).to_ne_bytes();
    let name = match (&to.place, &to.name) {
        (Some(place), _) => place.as_bytes_with_nul().to_vec(),
        (None, Name::Abstract(name)) => [&[0][..], name].concat(),
        (None, Name::Path(path)) => path.as_os_str().as_bytes().to_vec(),
    };
    let address = [&family[..], &name].concat();
    let mut hand = stopped.hand(pid)?;
    let at = hand.scratch().start;
    hand.write(at, &address)?;
    let connected = hand.call(libc::SYS_connect, call(0, &[number, at, address.len() as u64]).args)?;
    hand.close()?;
    check(pid, "connect", connected)
}

fn call_in(stopped: &mut Stopped, pid: pid_t, nr: i64, args: &[u64]) -> Result<i64, HandoverError> {
    let mut hand = stopped.hand(pid)?;
    let result = hand.call(nr, call(nr, args).args)?;
    hand.close()?;
    check(pid, "a call for a socket", result)?;
    Ok(result)
}
