//! `/proc/PID/fdinfo/N` (proc_pid_fdinfo(5)). Pure.

use serde::{Deserialize, Serialize};

/// What fdinfo tells of a descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FdInfo {
    /// Position, bytes (of a directory: the file system's own).
    pub(super) position: i64,
    /// Flags as open(2) takes them; `O_CLOEXEC` is the descriptor's own.
    pub(super) flags: i32,
    /// Number of the mount.
    pub(super) mount: u64,
    /// Inode number.
    pub(super) ino: u64,
    /// Locks held through it: by its description, or on its file by its process.
    pub(super) locks: Vec<Lock>,
    /// What an inotify instance watches.
    pub(super) watches: Vec<Watch>,
    /// What an epoll instance waits for.
    pub(super) targets: Vec<Target>,
    /// Descriptors in messages that wait to be received here: for Unix sockets only.
    pub(super) n_in_flight: Option<u32>,
}

/// Who holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Owner {
    /// flock(2): the description, the whole file.
    Description,
    /// fcntl(2): the process.
    Process,
    /// fcntl(2), `F_OFD_SETLK`: the description, a range.
    DescriptionRange,
    /// A lease, or a kind of later kernels.
    Other,
}

/// A lock that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Lock {
    pub(super) owner: Owner,
    pub(super) exclusive: bool,
    /// First byte.
    pub(super) start: i64,
    /// How many bytes; 0 for all from `start` on.
    pub(super) len_bytes: i64,
}

/// A watch of inotify(7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Watch {
    pub(super) number: i32,
    /// The kernel's own number of the device.
    pub(super) dev: u64,
    pub(super) mask: u32,
    /// The file handle: its type and bytes.
    pub(super) handle: (i32, Vec<u8>),
}

/// A descriptor in an epoll instance's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) number: i32,
    pub(super) events: u32,
    pub(super) data: u64,
}

impl FdInfo {
    /// `None`: not what a kernel writes.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut info = Self::default();
        for line in text.lines() {
            let (key, value) = line.split_once(':').map_or((line, ""), |(key, value)| (key, value.trim()));
            match key {
                "pos" => info.position = value.parse().ok()?,
                "flags" => info.flags = i32::from_str_radix(value, 8).ok()?,
                "mnt_id" => info.mount = value.parse().ok()?,
                "ino" => info.ino = value.parse().ok()?,
                "lock" => info.locks.push(parse_lock(value)?),
                "scm_fds" => info.n_in_flight = Some(value.parse().ok()?),
                "tfd" => info.targets.push(parse_target(line)?),
                _ if line.starts_with("inotify wd:") => info.watches.push(parse_watch(line)?),
                _ => {}
            }
        }
        Some(info)
    }
}

/// `1: POSIX  ADVISORY  WRITE 123 fe:00:456 0 EOF`
fn parse_lock(value: &str) -> Option<Lock> {
    let mut words = value.split_ascii_whitespace().skip(1);
    let owner = match words.next()? {
        "FLOCK" => Owner::Description,
        "POSIX" => Owner::Process,
        "OFDLCK" => Owner::DescriptionRange,
        _ => Owner::Other,
    };
    let (_, access) = (words.next()?, words.next()?);
    let mut range = words.skip(2);
    let start = range.next()?.parse().ok()?;
    let len_bytes = match range.next()? {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Lock { owner, exclusive: access == "WRITE", start, len_bytes })
}

/// `key:value` words, spaces between them and after the colons.
fn word<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let at = line.match_indices(key).find(|(at, _)| *at == 0 || line.as_bytes()[at - 1] == b' ')?.0;
    line[at + key.len()..].split_ascii_whitespace().next()
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:3c sdev:e`
fn parse_target(line: &str) -> Option<Target> {
    Some(Target {
        number: word(line, "tfd:")?.parse().ok()?,
        events: u32::from_str_radix(word(line, "events:")?, 16).ok()?,
        data: u64::from_str_radix(word(line, "data:")?, 16).ok()?,
    })
}

/// `inotify wd:1 ino:8 sdev:2d mask:fff ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:1a2b...`
fn parse_watch(line: &str) -> Option<Watch> {
    let hexadecimal = |key| u64::from_str_radix(word(line, key)?, 16).ok();
    let digits = word(line, "f_handle:").unwrap_or("");
    let byte = |at: usize| digits.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    let bytes = (0..digits.len() / 2).map(|i| byte(i * 2)).collect::<Option<Vec<u8>>>()?;
    Some(Watch {
        // Printed in hexadecimal (fs/notify/fdinfo.c).
        number: i32::try_from(hexadecimal("wd:")?).ok()?,
        dev: hexadecimal("sdev:")?,
        mask: u32::try_from(hexadecimal("mask:")?).ok()?,
        handle: (i32::try_from(hexadecimal("fhandle-type:").unwrap_or(0)).ok()?, bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regular_file_with_locks_is_read() {
        let text = "pos:\t17\nflags:\t02102002\nmnt_id:\t29\nino:\t2818\n\
            lock:\t1: FLOCK  ADVISORY  WRITE 1 fe:00:2818 0 EOF\n\
            lock:\t2: POSIX  ADVISORY  READ 1 fe:00:2818 10 19\n\
            lock:\t3: OFDLCK ADVISORY  WRITE -1 fe:00:2818 5 EOF\n";
        let info = FdInfo::parse(text).expect("an fdinfo");
        assert_eq!((info.position, info.mount, info.ino), (17, 29, 2818));
        assert_eq!(info.flags, libc::O_CLOEXEC | libc::O_APPEND | libc::O_RDWR | libc::O_LARGEFILE | 0o100_000);
        let lock = |owner, exclusive, start, len_bytes| Lock { owner, exclusive, start, len_bytes };
        let locks = [
            lock(Owner::Description, true, 0, 0),
            lock(Owner::Process, false, 10, 10),
            lock(Owner::DescriptionRange, true, 5, 0),
        ];
        assert_eq!(info.locks, locks);
    }

    #[test]
    fn what_epoll_and_inotify_watch_is_read() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1057\n\
            tfd:        5 events:       19 data: ffffffff00000005  pos:0 ino:3c sdev:e\n";
        let targets = FdInfo::parse(text).expect("an fdinfo").targets;
        assert_eq!(targets, [Target { number: 5, events: 0x19, data: 0xffff_ffff_0000_0005 }]);
        let text = "pos:\t0\nflags:\t00\nmnt_id:\t15\nino:\t1057\n\
            inotify wd:1a ino:8 sdev:2d mask:fff ignored_mask:0 fhandle-bytes:2 fhandle-type:f8 f_handle:00fb\n";
        let watches = FdInfo::parse(text).expect("an fdinfo").watches;
        assert_eq!(watches, [Watch { number: 26, dev: 0x2d, mask: 0xfff, handle: (0xf8, vec![0, 0xfb]) }]);
    }

    #[test]
    fn a_unix_socket_tells_how_many_descriptors_it_carries() {
        let info = FdInfo::parse("pos:\t0\nflags:\t02\nmnt_id:\t9\nino:\t1\nscm_fds: 3\n").expect("an fdinfo");
        assert_eq!(info.n_in_flight, Some(3));
    }

    #[test]
    fn no_text_makes_it_panic() {
        let text = "pos:\t17\nflags:\t02\nlock:\t1: POSIX  ADVISORY  READ 1 fe:00:2818 10 19\ntfd: 5 events: 19 data: 5\n\
            inotify wd:1 ino:8 sdev:2d mask:fff ignored_mask:0 fhandle-bytes:2 fhandle-type:f8 f_handle:00fb\n";
        for len in 0..text.len() {
            let _ = FdInfo::parse(&text[..len]);
        }
    }
}
