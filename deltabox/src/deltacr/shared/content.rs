//! The content of sparse objects: ranges of data, from an object into the content file and back.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

/// Bytes on their way at once (chosen: they stay in the cache).
const BUFFER_BYTES: usize = 256 << 10;

/// Copies the data of `from` to where `at` is in `into`, one range behind the other.
pub(super) fn write_all(from: &File, data: &[Range<u64>], into: &File, mut at: u64) -> io::Result<()> {
    for range in data {
        each_part(range, |part, bytes| {
            from.read_exact_at(bytes, part)?;
            into.write_all_at(bytes, at + (part - range.start))
        })?;
        at += range.end - range.start;
    }
    Ok(())
}

/// Makes the content of `file` what it was: `data` lie in `content` from `at` on. Written is only what differs.
pub(super) fn put_back(
    file: &File,
    len_bytes: u64,
    data: &[Range<u64>],
    content: &File,
    mut at: u64,
) -> io::Result<()> {
    if file.metadata()?.len() != len_bytes {
        file.set_len(len_bytes)?;
    }
    let mut present = vec![0; BUFFER_BYTES];
    for range in data {
        each_part(range, |part, bytes| {
            content.read_exact_at(bytes, at + (part - range.start))?;
            let present = &mut present[..bytes.len()];
            file.read_exact_at(present, part)?;
            if present == bytes { Ok(()) } else { file.write_all_at(bytes, part) }
        })?;
        at += range.end - range.start;
    }
    holes(data, len_bytes).iter().try_for_each(|hole| punch(file, hole))
}

/// The same for a new file, which has nothing in it.
pub(super) fn fill(file: &File, len_bytes: u64, data: &[Range<u64>], content: &File, mut at: u64) -> io::Result<()> {
    file.set_len(len_bytes)?;
    for range in data {
        each_part(range, |part, bytes| {
            content.read_exact_at(bytes, at + (part - range.start))?;
            file.write_all_at(bytes, part)
        })?;
        at += range.end - range.start;
    }
    Ok(())
}

/// Shows a range in parts, each with room for its bytes.
fn each_part(range: &Range<u64>, mut with: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(BUFFER_BYTES);
        with(at, &mut buffer[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// Ranges with pages.
pub(super) fn scan_data(file: &File, len_bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut data = Vec::new();
    let mut at = 0;
    while at < len_bytes {
        let from = i64::try_from(at).map_err(io::Error::other)?;
        let start = match lseek(file, from, Whence::SeekData) {
            Ok(start) => start,
            // Nothing but a hole from here on.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, start, Whence::SeekHole)?;
        let (start, end) = (start.cast_unsigned(), end.cast_unsigned().min(len_bytes));
        data.push(start..end);
        at = end;
    }
    Ok(data)
}

fn holes(data: &[Range<u64>], len_bytes: u64) -> Vec<Range<u64>> {
    let ends = data.iter().map(|range| range.end);
    let starts = data.iter().map(|range| range.start);
    let holes = [0].into_iter().chain(ends).zip(starts.chain([len_bytes]));
    holes.map(|(start, end)| start..end).filter(|hole| !hole.is_empty()).collect()
}

fn punch(file: &File, hole: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = |at: u64| i64::try_from(at).map_err(io::Error::other);
    Ok(fallocate(file, flags, offset(hole.start)?, offset(hole.end - hole.start)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN_BYTES: u64 = 1 << 20;

    /// A file with some data, what it has, and a content file with that behind something else.
    fn kept(dir: &std::path::Path) -> (File, Vec<Range<u64>>, File) {
        let create = |name: &str| File::options().read(true).write(true).create_new(true).open(dir.join(name)).unwrap();
        let (file, content) = (create("file"), create("content"));
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"later", 600_000).unwrap();
        file.set_len(LEN_BYTES).unwrap();
        let data = scan_data(&file, LEN_BYTES).unwrap();
        assert_eq!(data.len(), 2);
        write_all(&file, &data, &content, 7).unwrap();
        (file, data, content)
    }

    fn check(file: &File, data: &[Range<u64>]) {
        let mut all = vec![0; 1 << 20];
        file.read_exact_at(&mut all, 0).unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[..5].copy_from_slice(b"first");
        expected[600_000..600_005].copy_from_slice(b"later");
        assert!(all == expected);
        assert_eq!((file.metadata().unwrap().len(), scan_data(file, LEN_BYTES).unwrap()), (LEN_BYTES, data.to_vec()));
    }

    #[test]
    fn content_and_holes_are_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let (file, data, content) = kept(dir.path());
        for len_bytes in [2 << 20, 500_000] {
            file.write_all_at(b"changed", 300_000).unwrap();
            file.write_all_at(b"x", 2).unwrap();
            file.set_len(len_bytes).unwrap();
            put_back(&file, LEN_BYTES, &data, &content, 7).unwrap();
            check(&file, &data);
        }
    }

    #[test]
    fn a_new_file_gets_what_was_there_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (_, data, content) = kept(dir.path());
        let new = tempfile::tempfile_in(dir.path()).unwrap();
        fill(&new, LEN_BYTES, &data, &content, 7).unwrap();
        check(&new, &data);
    }

    #[test]
    fn holes_are_what_is_not_data() {
        assert_eq!(holes(&[0..5, 8..10], 20), [5..8, 10..20]);
        assert_eq!(holes(&[], 20).as_slice(), std::slice::from_ref(&(0..20)));
        assert_eq!(holes(&[0..20, 20..20], 20), []);
    }
}
