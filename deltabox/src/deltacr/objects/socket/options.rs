//! Settings of a socket, as setsockopt(2) knows them.

use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::sys::unix::{option, set_option};

/// SO_PASSPIDFD, SO_PASSRIGHTS and SO_BUF_LOCK (asm-generic/socket.h).
const SO_PASSPIDFD: i32 = 76;
const SO_PASSRIGHTS: i32 = 83;
const SO_BUF_LOCK: i32 = 72;

/// Those that are told as they are set.
const PLAIN: [i32; 16] = [
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_KEEPALIVE,
    libc::SO_BROADCAST,
    libc::SO_OOBINLINE,
    libc::SO_PRIORITY,
    libc::SO_LINGER,
    libc::SO_RCVLOWAT,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_TIMESTAMP,
    libc::SO_PASSSEC,
    libc::SO_PASSCRED,
    SO_PASSPIDFD,
    SO_PASSRIGHTS,
    libc::SO_PEEK_OFF,
];

/// Those that the kernel doubles.
const SIZES: [(i32, i32); 2] = [(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)];

/// What a socket has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Options {
    plain: Vec<(i32, Vec<u8>)>,
    sizes: [i32; 2],
    locks: i32,
}

impl Options {
    pub(super) fn read(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut plain = Vec::with_capacity(PLAIN.len());
        for name in PLAIN {
            plain.extend(known(option(socket, name))?.map(|value| (name, value)));
        }
        let mut sizes = [0; 2];
        for (size, (name, _)) in sizes.iter_mut().zip(SIZES) {
            *size = number(&option(socket, name)?)?;
        }
        Ok(Self { plain, sizes, locks: number(&option(socket, SO_BUF_LOCK)?)? })
    }

    /// Gives `socket` the same.
    pub(super) fn set(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let is = Self::read(socket)?;
        for (is, (wanted, (_, force))) in is.sizes.iter().zip(self.sizes.iter().zip(SIZES)) {
            if is != wanted {
                set_option(socket, force, &(wanted / 2).to_ne_bytes())?;
            }
        }
        // Setting a size locks it.
        if number(&option(socket, SO_BUF_LOCK)?)? != self.locks {
            set_option(socket, SO_BUF_LOCK, &self.locks.to_ne_bytes())?;
        }
        for (name, value) in self.plain.iter().filter(|one| !is.plain.contains(one)) {
            set_option(socket, *name, value)?;
        }
        Ok(())
    }
}

/// Makes room for sending so much.
pub(super) fn enlarge(socket: BorrowedFd<'_>, room_bytes: usize) -> io::Result<()> {
    let wanted = i32::try_from(room_bytes).map_err(io::Error::other)?;
    if number(&option(socket, libc::SO_SNDBUF)?)? < wanted {
        set_option(socket, libc::SO_SNDBUFFORCE, &wanted.to_ne_bytes())?;
    }
    Ok(())
}

/// `None`: this kernel, or this kind of socket, does not know it.
fn known(value: io::Result<Vec<u8>>) -> io::Result<Option<Vec<u8>>> {
    match value {
        Err(error) if matches!(error.raw_os_error(), Some(no) if no == Errno::ENOPROTOOPT as i32 || no == Errno::EOPNOTSUPP as i32) => {
            Ok(None)
        }
        value => value.map(Some),
    }
}

fn number(value: &[u8]) -> io::Result<i32> {
    value.try_into().map(i32::from_ne_bytes).map_err(io::Error::other)
}
