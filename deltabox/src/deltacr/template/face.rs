//! What `/proc/PID/task/TID/status` tells of a thread: its number inside, its name, what it may do.

use std::fs;
use std::io;

use libc::pid_t;

/// A thread from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Face {
    /// In its own PID namespace.
    pub(super) inside: pid_t,
    /// At most 15 bytes.
    pub(super) name: Vec<u8>,
    /// Users, groups, capabilities and filters, line by line.
    pub(super) rights: String,
}

/// The fields that make up what a thread may do, and that a thread which it makes inherits.
const RIGHTS: [&str; 11] = [
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];
/// CAP_CHECKPOINT_RESTORE and CAP_SYS_ADMIN: either allows to choose a number.
const CHOOSE_NUMBERS: u64 = 1 << 40 | 1 << 21;

impl Face {
    pub(super) fn read(pid: pid_t, tid: pid_t) -> io::Result<Self> {
        Self::of(&fs::read(format!("/proc/{pid}/task/{tid}/status"))?)
    }

    /// From a `status` that was read.
    pub(super) fn of(text: &[u8]) -> io::Result<Self> {
        Self::parse(text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &[u8]) -> Option<Self> {
        if text.last() != Some(&b'\n') {
            // Cut short.
            return None;
        }
        // A name can be any bytes, but for line ends, which are escaped.
        let end = text.iter().position(|byte| *byte == b'\n')?;
        let name = unescape(text[..end].strip_prefix(b"Name:\t")?);
        let (mut inside, mut rights) = (None, String::with_capacity(320));
        for line in str::from_utf8(&text[end + 1..]).ok()?.lines() {
            let Some((field, value)) = line.split_once(':') else { continue };
            if field == "NSpid" {
                inside = value.split_ascii_whitespace().last()?.parse().ok();
            } else if RIGHTS.contains(&field) {
                rights.push_str(line);
                rights.push('\n');
            }
        }
        Some(Self { inside: inside?, name, rights })
    }

    /// Whether it may choose the numbers of threads and processes that it makes.
    pub(super) fn chooses_numbers(&self) -> bool {
        choose_numbers(&self.rights)
    }
}

/// Whether who has these rights may choose the numbers of what he makes.
pub(super) fn choose_numbers(rights: &str) -> bool {
    let effective = rights.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|value| u64::from_str_radix(value.trim(), 16).ok());
    effective.is_some_and(|set| set & CHOOSE_NUMBERS != 0)
}

/// Takes back what seq_escape_str of the kernel has done to line ends and backslashes.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut own = Vec::with_capacity(name.len());
    let mut bytes = name.iter();
    while let Some(byte) = bytes.next() {
        own.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(other) => *other,
                None => b'\\',
            },
            byte => *byte,
        });
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_read_with_its_innermost_number_and_its_own_name() {
        let text = b"Name:\ta\\nb\\\\c \xff\nUmask:\t0022\nNSpid:\t812\t7\nUid:\t0\t0\t0\t0\nCapEff:\t0000010000000000\nThreads:\t2\n";
        let face = Face::parse(text).expect("a face");
        assert_eq!((face.inside, face.name.as_slice()), (7, &b"a\nb\\c \xff"[..]));
        assert_eq!(face.rights, "Uid:\t0\t0\t0\t0\nCapEff:\t0000010000000000\n");
        assert!(face.chooses_numbers());
        for len in 0..=text.iter().position(|byte| *byte == b'7').expect("a number") {
            assert_eq!(Face::parse(&text[..len]), None, "cut at {len}");
        }
    }
}
