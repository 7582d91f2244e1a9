//! Reading files to compare them. What is a hole in both is not read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use sha2::{Digest, Sha256};

use crate::deltafs::view::{Entry, Kind};

/// Chosen: large enough that calls cost nothing beside copying.
const CHUNK_BYTES: usize = 128 << 10;

/// Whether two regular files hold the same bytes.
pub(super) fn is_same(one: &Entry, other: &Entry) -> io::Result<bool> {
    if one.kind != Kind::File || other.kind != Kind::File || one.size != other.size {
        return Ok(false);
    }
    if one.identity == other.identity {
        return Ok(true);
    }
    let (one_file, other_file) = (one.content()?, other.content()?);
    let (mut a, mut b) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at = 0;
    loop {
        at = next_data(&one_file, at, one.size)?.min(next_data(&other_file, at, other.size)?);
        if at >= one.size {
            return Ok(true);
        }
        let (n, m) = (read_at(&one_file, &mut a, at)?, read_at(&other_file, &mut b, at)?);
        // One of them got shorter meanwhile: not both at 0, or it would be its end.
        if n != m || a[..n] != b[..m] || n == 0 {
            return Ok(n == 0 && m == 0);
        }
        at += u64::try_from(n).unwrap_or(0);
    }
}

/// The first byte from `at` on that is no hole, or `end`.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<u64> {
    let offset = i64::try_from(at).map_err(io::Error::other)?;
    match lseek64(file, offset, Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).unwrap_or(end)),
        Err(Errno::ENXIO) => Ok(end),
        // A file system that knows no holes.
        Err(Errno::EINVAL) => Ok(at),
        Err(errno) => Err(errno.into()),
    }
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read_at(&mut buffer[n..], at + u64::try_from(n).unwrap_or(0)) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(n)
}

/// Names what a regular file holds.
pub(super) fn digest(entry: &Entry) -> io::Result<Vec<u8>> {
    let mut hash = Sha256::new();
    let mut file = entry.content()?.take(entry.size);
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().to_vec()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// All of a regular file, or `None` if it is larger than `max_bytes`.
pub(super) fn read(entry: &Entry, max_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    entry.content()?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    Ok((u64::try_from(bytes.len()).is_ok_and(|n| n <= max_bytes)).then_some(bytes))
}
