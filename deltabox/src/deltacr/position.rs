//! The position of a directory that is being read.
//!
//! Its value means something to the open directory that gave it alone: the name's hash in a directory of one layer, an
//! index into a list in one that several layers make up, and that list is as old as the first read. So what the reader
//! has not been given yet is read from the old directory, and the new one is left at the first of these that it has.
//! Nothing is skipped that is in both; a file is given twice only where the order has changed (the directory of
//! another checkpoint, a file that was copied up since the reader began).

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::unistd::{Whence, lseek};

use crate::sys::fs::read_entries;

/// Bytes of entries per call (chosen: some hundred entries).
const BUFFER_BYTES: usize = 32 << 10;

/// Leaves `new`, just opened, where the reader of `old` goes on. `old` stands at `position`, and does again afterwards.
pub(super) fn carry_over(old: BorrowedFd<'_>, position: i64, new: BorrowedFd<'_>) -> io::Result<()> {
    match unread(old, position) {
        None => Ok(()),
        Some(unread) => go_on(new, &unread),
    }
}

/// The names that the reader of `old` has not been given yet. It stands at `position`, and does again afterwards.
/// `None`: that cannot be read, and its reader begins again: better twice than never.
pub(super) fn unread(old: BorrowedFd<'_>, position: i64) -> Option<Vec<Vec<u8>>> {
    let mut left = Vec::new();
    let read = scan(old, |name, _| {
        left.push(name.to_vec());
        true
    });
    let back = lseek(old, position, Whence::SeekSet);
    (read.is_ok() && back.is_ok()).then_some(left)
}

/// Leaves `new`, just opened, before the first of these names.
pub(super) fn go_on(new: BorrowedFd<'_>, unread: &[Vec<u8>]) -> io::Result<()> {
    let left: HashSet<&[u8]> = unread.iter().map(Vec::as_slice).collect();
    let (mut before, mut found) = (0, false);
    let read = scan(new, |name, after| {
        found = left.contains(name);
        if !found {
            before = after;
        }
        !found
    });
    if found || read.is_err() {
        lseek(new, if found { before } else { 0 }, Whence::SeekSet)?;
    }
    Ok(())
}

/// Shows each entry from the position on, and the position behind it, until `more` says enough.
fn scan(directory: BorrowedFd<'_>, mut more: impl FnMut(&[u8], i64) -> bool) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n = match read_entries(directory.as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            // Removed: it has none.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            let (entry, behind) = parse(rest).ok_or(io::ErrorKind::InvalidData)?;
            if !matches!(entry.name, b"." | b"..") && !more(entry.name, entry.after) {
                return Ok(());
            }
            rest = behind;
        }
    }
}

struct Entry<'a> {
    name: &'a [u8],
    after: i64,
}

/// The first `struct linux_dirent64` (getdents(2)), and what is behind it.
fn parse(bytes: &[u8]) -> Option<(Entry<'_>, &[u8])> {
    let after = i64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?);
    let name = bytes.get(19..usize::from(len))?;
    let name = &name[..name.iter().position(|byte| *byte == 0)?];
    Some((Entry { name, after }, &bytes[usize::from(len)..]))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn directory(names: impl IntoIterator<Item = String>) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        names.into_iter().for_each(|name| drop(File::create(dir.path().join(name)).unwrap()));
        let open = File::open(dir.path()).unwrap();
        (dir, open)
    }

    fn names(directory: &File) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        scan(directory.as_fd(), |name, _| {
            names.push(name.to_vec());
            true
        })
        .unwrap();
        names
    }

    /// Reads a first part.
    fn begin(directory: &File) -> (Vec<Vec<u8>>, i64) {
        let mut first = vec![0; 1024];
        let n = read_entries(directory.as_fd(), &mut first).unwrap();
        let (mut rest, mut read) = (&first[..n], Vec::new());
        while !rest.is_empty() {
            let (entry, behind) = parse(rest).unwrap();
            read.push(entry.name.to_vec());
            rest = behind;
        }
        (read, lseek(directory, 0, Whence::SeekCur).unwrap())
    }

    #[test]
    fn what_was_not_read_yet_is_read_and_what_is_gone_is_not() {
        let (_old, old) = directory((0..300).map(|n| format!("file-{n}")));
        let (read, position) = begin(&old);
        // Another directory, in an order of its own.
        let (_new, new) = directory((0..200).map(|n| format!("file-{n}")));
        carry_over(old.as_fd(), position, new.as_fd()).unwrap();
        let given: HashSet<_> = names(&new).into_iter().collect();
        let left = names(&old);
        assert_eq!(left.len() + read.iter().filter(|name| name.starts_with(b"file")).count(), 300);
        let expected = left.iter().filter(|name| !is_above_200(name));
        assert!(expected.clone().count() > 0 && expected.into_iter().all(|name| given.contains(name)));
        assert!(given.iter().all(|name| !is_above_200(name)));
    }

    fn is_above_200(name: &[u8]) -> bool {
        std::str::from_utf8(&name[5..]).unwrap().parse::<u32>().unwrap() >= 200
    }

    #[test]
    fn the_same_directory_goes_on_where_it_was() {
        let (dir, old) = directory((0..300).map(|n| format!("file-{n}")));
        let (read, position) = begin(&old);
        for name in read.iter().filter(|name| name.starts_with(b"file")) {
            fs::remove_file(dir.path().join(std::str::from_utf8(name).unwrap())).unwrap();
        }
        let new = File::open(dir.path()).unwrap();
        carry_over(old.as_fd(), position, new.as_fd()).unwrap();
        assert_eq!(names(&new), names(&old));
    }

    #[test]
    fn a_directory_that_was_read_to_its_end_stays_there() {
        let (dir, old) = directory((0..300).map(|n| format!("file-{n}")));
        names(&old);
        let position = lseek(&old, 0, Whence::SeekCur).unwrap();
        let new = File::open(dir.path()).unwrap();
        carry_over(old.as_fd(), position, new.as_fd()).unwrap();
        assert!(names(&new).is_empty());
    }

    #[test]
    fn an_entry_that_is_cut_off_is_none() {
        let mut bytes = vec![0; 24];
        bytes[16] = 24;
        bytes[19] = b'a';
        assert_eq!(parse(&bytes).unwrap().0.name, b"a");
        assert!((0..24).all(|len| parse(&bytes[..len]).is_none()));
        bytes[16] = 3;
        assert!(parse(&bytes).is_none());
    }
}
