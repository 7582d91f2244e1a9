//! What the kernel tells about processes and threads in `/proc` and cgroups.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libc::pid_t;

/// The fields of `/proc/PID/task/TID/stat` that matter here. Signal sets hold signals 1 to 31, bit `n - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// The state's letter.
    pub(super) state: char,
    /// Pending for this thread alone.
    pub(super) pending: u64,
    /// With disposition "ignore".
    pub(super) ignored: u64,
    /// With a handler.
    pub(super) caught: u64,
    /// Threads of its process, ended ones that are not reaped too.
    pub(super) n_threads: u32,
    /// What its parent is sent at its end; -1 for what is no leader.
    pub(super) exit_signal: i32,
    /// The CPU it ran on last.
    pub(super) cpu: usize,
}

/// Parses a line of `stat`; the name in it may hold anything, brackets too.
fn parse_stat(text: &str) -> Option<Stat> {
    let rest = &text[text.rfind(')')? + 1..];
    // The third field of proc_pid_stat(5) is the first here.
    let mut fields = [""; 50];
    for (place, field) in fields.iter_mut().zip(rest.split_ascii_whitespace()) {
        *place = field;
    }
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Stat {
        state: field(3)?.chars().next()?,
        pending: field(31)?.parse().ok()?,
        ignored: field(33)?.parse().ok()?,
        caught: field(34)?.parse().ok()?,
        n_threads: field(20)?.parse().ok()?,
        exit_signal: field(38)?.parse().ok()?,
        cpu: field(39)?.parse().ok()?,
    })
}

fn none_if_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `stat` of a thread, `None` if there is none.
pub(super) fn read_stat(pid: pid_t, tid: pid_t) -> io::Result<Option<Stat>> {
    match none_if_gone(open_stat(pid, tid))? {
        Some(stat) => reread_stat(&stat),
        None => Ok(None),
    }
}

/// `stat` of a thread, to be read again and again.
pub(super) fn open_stat(pid: pid_t, tid: pid_t) -> io::Result<File> {
    File::open(format!("/proc/{pid}/task/{tid}/stat"))
}

/// Reads an open `stat`, `None` if its thread is gone.
pub(super) fn reread_stat(stat: &File) -> io::Result<Option<Stat>> {
    let mut bytes = [0; 2048];
    let Some(len_bytes) = none_if_gone(stat.read_at(&mut bytes, 0))? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes[..len_bytes]);
    parse_stat(&text).map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a stat line"))
}

/// How long a process that was killed may take to end (chosen: it needs a CPU and microseconds).
const END_PATIENCE: Duration = Duration::from_millis(100);

/// Whether a process has been killed, which is why something about it failed: waits for its end if it is about to.
pub(super) fn is_over(pid: pid_t) -> bool {
    let has_ended = || {
        read_stat(pid, pid).is_ok_and(|stat| stat.is_none_or(|stat| matches!(stat.state, 'Z' | 'X')))
            && scan_threads(pid).is_ok_and(|threads| threads.len() <= 1)
    };
    let end = Instant::now() + END_PATIENCE;
    while !has_ended() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// How many PID namespaces a process's own lies below the one that `/proc` shows.
pub(super) fn pid_depth(pid: pid_t) -> io::Result<usize> {
    let text = fs::read(format!("/proc/{pid}/status"))?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("NSpid:")).ok_or(io::ErrorKind::InvalidData)?;
    Ok(line.split_ascii_whitespace().count().saturating_sub(1))
}

/// A process's number in its own PID namespace.
pub(super) fn pid_inside(pid: pid_t) -> io::Result<pid_t> {
    let text = fs::read(format!("/proc/{pid}/status"))?;
    let text = String::from_utf8_lossy(&text);
    let own = text.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_ascii_whitespace().last()?.parse().ok());
    own.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A child of a process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    /// In its own PID namespace.
    pub(super) inside: pid_t,
    /// In the host's.
    pub(super) host: pid_t,
    /// It has ended and nobody has asked for its status.
    pub(super) is_zombie: bool,
}

/// The children of all threads of a process.
pub(super) fn scan_children(pid: pid_t) -> io::Result<Vec<Child>> {
    let mut children = Vec::new();
    for tid in scan_threads(pid)? {
        let Some(text) = none_if_gone(fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")))? else {
            continue;
        };
        for child in text.split_ascii_whitespace().filter_map(|number| number.parse::<pid_t>().ok()) {
            let Some(stat) = read_stat(child, child)? else { continue };
            if let Some(inside) = none_if_gone(pid_inside(child))? {
                children.push(Child { inside, host: child, is_zombie: stat.state == 'Z' });
            }
        }
    }
    Ok(children)
}

/// Who traces a thread, 0 for nobody.
pub(super) fn read_tracer(pid: pid_t, tid: pid_t) -> io::Result<Option<pid_t>> {
    let Some(text) = none_if_gone(fs::read(format!("/proc/{pid}/task/{tid}/status")))? else { return Ok(None) };
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().find_map(|line| line.strip_prefix("TracerPid:")?.trim().parse().ok()))
}

/// The kernel's lists of a cgroup's members, to be read again and again.
#[derive(Debug)]
pub(super) struct Lists {
    procs: List,
    threads: List,
}

#[derive(Debug)]
struct List {
    path: PathBuf,
    file: File,
}

impl Lists {
    /// Opens them; an error comes with the path.
    pub(super) fn open(group: &Path) -> Result<Self, (PathBuf, io::Error)> {
        let open = |name: &str| {
            let path = group.join(name);
            let file = File::open(&path).map_err(|error| (path.clone(), error))?;
            Ok(List { path, file })
        };
        Ok(Self { procs: open("cgroup.procs")?, threads: open("cgroup.threads")? })
    }

    /// Host PIDs of its processes.
    pub(super) fn processes(&self) -> Result<Vec<pid_t>, (PathBuf, io::Error)> {
        self.procs.read()
    }

    /// Host TIDs of its threads.
    pub(super) fn threads(&self) -> Result<Vec<pid_t>, (PathBuf, io::Error)> {
        self.threads.read()
    }
}

impl List {
    fn read(&self) -> Result<Vec<pid_t>, (PathBuf, io::Error)> {
        let (mut text, mut len_bytes) = (vec![0; 4096], 0);
        loop {
            let n = self.file.read_at(&mut text[len_bytes..], len_bytes as u64);
            match n.map_err(|error| (self.path.clone(), error))? {
                0 => break,
                n => len_bytes += n,
            }
            if len_bytes == text.len() {
                text.resize(2 * len_bytes, 0);
            }
        }
        let lines = text[..len_bytes].split(|byte| *byte == b'\n');
        Ok(lines.filter_map(|line| str::from_utf8(line).ok()?.parse().ok()).collect())
    }
}

/// Whether a process has such a thread.
pub(super) fn is_thread_of(pid: pid_t, tid: pid_t) -> bool {
    pid == tid || Path::new(&format!("/proc/{pid}/task/{tid}")).exists()
}

/// The threads of a process, the leader first; none if it is gone.
pub(super) fn scan_threads(pid: pid_t) -> io::Result<Vec<pid_t>> {
    let Some(entries) = none_if_gone(fs::read_dir(format!("/proc/{pid}/task")))? else { return Ok(Vec::new()) };
    let mut threads = Vec::new();
    for entry in entries {
        let Some(entry) = none_if_gone(entry)? else { break };
        threads.extend(entry.file_name().to_str().and_then(|name| name.parse::<pid_t>().ok()));
    }
    Ok(threads)
}

/// What a thread that does not stop is doing: system call number (-1 unknown), its first argument, kernel function.
pub(super) fn read_whereabouts(pid: pid_t, tid: pid_t) -> (i64, u64, String) {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{name}")).unwrap_or_default();
    let call = read("syscall");
    let mut words = call.split_ascii_whitespace();
    let number = words.next().and_then(|word| word.parse().ok()).unwrap_or(-1);
    let first = words.next().and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    (number, first.unwrap_or(0), read("wchan"))
}

/// Whether a thread in an uninterruptible sleep in this call waits for a vfork child.
pub(super) fn waits_for_vfork(call: i64, first_argument: u64) -> bool {
    match call {
        libc::SYS_vfork => true,
        libc::SYS_clone => first_argument & libc::CLONE_VFORK.cast_unsigned() as u64 != 0,
        // Its flags lie in memory; it sleeps so for nothing else.
        libc::SYS_clone3 => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "77 (a) b) S 1 77 77 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 3 0 100 4096 10 18446744073709551615 1 \
        1 0 0 0 4 0 4096 65536 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n";

    #[test]
    fn a_stat_line_with_brackets_in_the_name_is_read() {
        let expected =
            Stat { state: 'S', pending: 4, ignored: 4096, caught: 65536, n_threads: 3, exit_signal: 17, cpu: 1 };
        assert_eq!(parse_stat(LINE), Some(expected));
    }

    #[test]
    fn a_cut_stat_line_is_refused() {
        let end = LINE.rfind("17 1").expect("the exit signal");
        for len in 0..end {
            assert_eq!(parse_stat(&LINE[..len]), None, "cut at {len}");
        }
    }

    #[test]
    fn a_vfork_is_known_by_its_call() {
        assert!(waits_for_vfork(libc::SYS_vfork, 0));
        assert!(waits_for_vfork(libc::SYS_clone, 0x4111));
        assert!(!waits_for_vfork(libc::SYS_clone, 0x11));
        assert!(!waits_for_vfork(libc::SYS_read, 0x4111));
    }
}
