//! What a process has mapped: exact lists, as `/proc/PID/smaps` and `maps` tell them. Pure but for the reading.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::Range;

use libc::pid_t;
use serde::{Deserialize, Serialize};

/// A mapping (a VMA of the kernel).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `PROT_*`.
    pub protection: u64,
    /// MAP_SHARED: `s` in `maps`.
    pub shared: bool,
    /// Where in the file it begins, bytes.
    pub offset_bytes: u64,
    /// The file's device, major and minor number; zeros without a file.
    pub device: (u32, u32),
    /// The file's inode number, 0 without a file.
    pub inode: u64,
    /// The file's path, or a name like `[heap]`, as `maps` shows it.
    pub name: String,
    /// What has been advised and how it behaves, sorted.
    pub advice: BTreeSet<Advice>,
    /// Bytes in memory that are its own, not of a file.
    pub anonymous_bytes: u64,
    /// Shared, of a file in the sandbox's tree: its path tells which, device and inode change with each root.
    #[serde(default)]
    pub in_tree: bool,
}

/// Flags of `VmFlags` that matter to a copy or a return.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Advice {
    /// `sh`: shared, of a file open for writing.
    SharedWritable,
    /// `dc`: MADV_DONTFORK.
    DontFork,
    /// `wf`: MADV_WIPEONFORK.
    WipeOnFork,
    /// `lo`: mlock.
    Locked,
    /// `gd`: MAP_GROWSDOWN.
    GrowsDown,
    /// `nr`: MAP_NORESERVE.
    NoReserve,
    /// `hg`: MADV_HUGEPAGE.
    Huge,
    /// `nh`: MADV_NOHUGEPAGE.
    NoHuge,
    /// `mg`: MADV_MERGEABLE.
    Mergeable,
    /// `dd`: MADV_DONTDUMP.
    DontDump,
    /// `dp`: MAP_DROPPABLE.
    Droppable,
    /// `sr`: MADV_SEQUENTIAL.
    Sequential,
    /// `rr`: MADV_RANDOM.
    Random,
    /// `ht`: pages of hugetlbfs.
    HugeTlb,
    /// `io` or `pf`: memory of a device, or of the kernel itself.
    Special,
    /// `sl`: sealed against changes.
    Sealed,
    /// `lf`: locked from the first access on (MLOCK_ONFAULT).
    LockedOnFault,
}

impl Advice {
    fn parse(flag: &str) -> Option<Self> {
        Some(match flag {
            "sh" => Self::SharedWritable,
            "dc" => Self::DontFork,
            "wf" => Self::WipeOnFork,
            "lo" => Self::Locked,
            "gd" => Self::GrowsDown,
            "nr" => Self::NoReserve,
            "hg" => Self::Huge,
            "nh" => Self::NoHuge,
            "mg" => Self::Mergeable,
            "dd" => Self::DontDump,
            "dp" => Self::Droppable,
            "sr" => Self::Sequential,
            "rr" => Self::Random,
            "ht" => Self::HugeTlb,
            "io" | "pf" => Self::Special,
            "sl" => Self::Sealed,
            "lf" => Self::LockedOnFault,
            _ => return None,
        })
    }
}

impl Mapping {
    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Its size.
    pub fn len_bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Whether something was advised.
    pub fn has(&self, advice: Advice) -> bool {
        self.advice.contains(&advice)
    }

    /// Whether a file lies behind it.
    pub fn has_file(&self) -> bool {
        self.inode != 0
    }

    /// The path that its name stands for. A line end in it was shown as `\012` by the kernel, and so is that itself: then there
    /// are two.
    pub(super) fn paths(&self) -> Vec<Vec<u8>> {
        let mut path = Vec::with_capacity(self.name.len());
        for letter in self.name.chars() {
            match u32::from(letter).checked_sub(BYTES).and_then(|byte| u8::try_from(byte).ok()) {
                Some(byte) => path.push(byte),
                None => path.extend(letter.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        let Some(at) = path.windows(4).position(|four| four == br"\012") else { return vec![path] };
        let mut with_lines = path[..at].to_vec();
        let mut rest = &path[at..];
        while let Some((first, more)) = rest.split_first() {
            let is_line = rest.starts_with(br"\012");
            with_lines.push(if is_line { b'\n' } else { *first });
            rest = if is_line { &rest[4..] } else { more };
        }
        vec![path, with_lines]
    }

    /// Says of shared mappings of files on devices (the kernel's numbers of them) that they are in the tree, unless those
    /// have no name there (any more).
    pub(super) fn mark_tree(mappings: &mut [Self], devices: &[u64]) {
        for one in mappings.iter_mut().filter(|one| one.shared && one.has_file()) {
            let is_there = devices.contains(&(u64::from(one.device.0) << 20 | u64::from(one.device.1)));
            one.in_tree = is_there && !one.name.ends_with(" (deleted)");
        }
    }

    /// Whether the kernel made it: vdso, vvar, vsyscall.
    pub fn is_kernels(&self) -> bool {
        self.name.starts_with("[v") && !self.has_file()
    }

    /// Whether both show the same file at the same place, or none.
    pub fn shows_the_same(&self, other: &Self) -> bool {
        let file = match (self.in_tree, other.in_tree) {
            (true, true) => self.name == other.name,
            _ => (self.shared, self.device, self.inode) == (other.shared, other.device, other.inode),
        };
        let shift = |one: &Self| one.offset_bytes.wrapping_sub(one.start);
        file && (!self.has_file() || shift(self) == shift(other)) && self.is_kernels() == other.is_kernels()
    }

    /// Whether calls that keep a mapping lead from one to the other, where they lie at the same addresses.
    pub fn is_alike(&self, other: &Self) -> bool {
        const FOR_LIFE: [Advice; 3] = [Advice::GrowsDown, Advice::Droppable, Advice::NoReserve];
        self.shows_the_same(other) && FOR_LIFE.iter().all(|one| self.has(*one) == other.has(*one))
    }
}

/// Reads all mappings with their flags. The kernel walks all pages for it (measured: `docs/templates.md`).
pub fn read_smaps(pid: pid_t) -> io::Result<Vec<Mapping>> {
    let bytes = fs::read(format!("/proc/{pid}/smaps"))?;
    parse(&legible(&bytes)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Reads all mappings; nothing is known of what was advised.
pub(in crate::deltacr) fn read_maps(pid: pid_t) -> io::Result<Vec<Mapping>> {
    let bytes = fs::read(format!("/proc/{pid}/maps"))?;
    parse(&legible(&bytes)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// With what a byte that is no text stands for itself: U+F780 to U+F7FF, whose own bytes are written so too.
const BYTES: u32 = 0xf700;

/// Names of files are any bytes: those that are no text are written in a way that can be undone.
fn legible(bytes: &[u8]) -> String {
    let is_own = |letter: char| (BYTES..BYTES + 256).contains(&u32::from(letter));
    let byte = |byte: &u8| char::from_u32(BYTES + u32::from(*byte)).unwrap_or(char::REPLACEMENT_CHARACTER);
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if is_own(letter) {
                text.extend(letter.encode_utf8(&mut [0; 4]).as_bytes().iter().map(byte));
            } else {
                text.push(letter);
            }
        }
        text.extend(chunk.invalid().iter().map(byte));
    }
    text
}

fn parse(text: &str) -> Option<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        // Fields of smaps begin with a capital, addresses are in small letters.
        if line.starts_with(|first: char| first.is_ascii_uppercase()) {
            let last = mappings.last_mut()?;
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                last.advice = flags.split_ascii_whitespace().filter_map(Advice::parse).collect();
            } else if let Some(size) = line.strip_prefix("Anonymous:") {
                last.anonymous_bytes = parse_kilobytes(size)?;
            }
        } else {
            mappings.push(parse_line(line)?);
        }
    }
    // The page of old system calls lies in the kernel's half.
    mappings.retain(|mapping| mapping.start < 1 << 63);
    Some(mappings)
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let (word, more) = rest.trim_start_matches(' ').split_once(' ').unwrap_or((rest.trim_start_matches(' '), ""));
        rest = more;
        word
    };
    let (start, end) = word().split_once('-')?;
    let flags = word().as_bytes();
    let offset = word();
    let (major, minor) = word().split_once(':')?;
    let inode = word();
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let protection = [(0, b'r', libc::PROT_READ), (1, b'w', libc::PROT_WRITE), (2, b'x', libc::PROT_EXEC)]
        .into_iter()
        .filter(|(at, letter, _)| flags.get(*at) == Some(letter))
        .fold(0, |all, (.., one)| all | u64::from(one.cast_unsigned()));
    Some(Mapping {
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
        protection,
        shared: *flags.get(3)? == b's',
        offset_bytes: hexadecimal(offset)?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        name: rest.trim_start_matches(' ').to_owned(),
        advice: BTreeSet::new(),
        anonymous_bytes: 0,
        in_tree: false,
    })
}

/// The number in a line like `VmSize:   12 kB`, in bytes.
pub(super) fn parse_kilobytes(text: &str) -> Option<u64> {
    let kilobytes: u64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Anonymous:             8 kB
VmFlags: rd wr mr mw me ac sd
7f0000000000-7f0000001000 r--s 00002000 fe:00 123                        /tmp/a b (deleted)
VmFlags: rd mr me ms
7f0000001000-7f0000002000 ---p 00000000 00:00 0
VmFlags: mr mw me dc wf lo dd
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
";

    #[test]
    fn mappings_are_read_with_names_and_flags() {
        let read = parse(TEXT).expect("mappings");
        assert_eq!(read.len(), 3);
        assert_eq!((read[0].name.as_str(), read[0].protection, read[0].anonymous_bytes), ("[heap]", 3, 8192));
        assert_eq!((read[1].name.as_str(), read[1].shared, read[1].device), ("/tmp/a b (deleted)", true, (0xfe, 0)));
        assert_eq!((read[1].offset_bytes, read[1].inode), (0x2000, 123));
        assert_eq!((read[2].name.as_str(), read[2].protection), ("", 0));
        let advice = [Advice::DontFork, Advice::WipeOnFork, Advice::Locked, Advice::DontDump];
        assert_eq!(read[2].advice, advice.into_iter().collect());
    }

    #[test]
    fn names_that_are_no_text_lead_back_to_their_bytes() {
        let named = |name: &[u8]| {
            let line = [b"1000-2000 rw-s 00000000 fe:00 7   ", name, b"\n"].concat();
            parse(&legible(&line)).expect("a mapping").remove(0).paths()
        };
        for name in ["/a b".as_bytes(), b"/caf\xe9\xff", "/\u{f7e9}é".as_bytes(), b"/\xef\x9e\xe9"] {
            assert_eq!(named(name), [name]);
        }
        assert_eq!(named(br"/a\012b\012"), [br"/a\012b\012".to_vec(), b"/a\nb\n".to_vec()]);
    }

    #[test]
    fn a_cut_list_is_not_misread() {
        for len in 0..TEXT.len() {
            // Whatever is made of it, addresses are whole.
            for mapping in parse(&TEXT[..len]).unwrap_or_default() {
                assert!(
                    [0x55d0_c000_0000, 0x7f00_0000_0000, 0x7f00_0000_1000].contains(&mapping.start),
                    "cut at {len}"
                );
            }
        }
        assert!(parse("Size: 3 kB\n").is_none());
    }
}
